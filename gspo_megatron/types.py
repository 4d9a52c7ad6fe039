"""The data contracts between the parts of a run.

Frozen, free of torch, one docstring a field with its shape, its unit and an example. Ids in and out
everywhere: a text is tokenized once, when it becomes a prompt, and never again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # only named in annotations: a launcher that reads recipes needs no numpy
    import numpy as np

StopReason = Literal["stop", "length", "repetition", "abort"]
Severity = Literal["error", "warning", "info"]
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "float8_e4m3fn": 1}
"""Bytes of one number of a type, by the name that recipes and torch give it."""
ROUTE_TYPES = {1: "<u1", 2: "<u2"}
"""numpy's type of the number of an expert that a sampler reports, by its bytes: one up to 256 experts."""


def are_equal(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group are all the same number: its advantages are all 0, so it teaches nothing."""
    return min(rewards) == max(rewards)


def printable(text: str, keep: str = "") -> str:
    """A text of somebody else's for a terminal: what is not printable as its escape, but for the characters to keep."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True, slots=True)
class Finding:
    """One statement of `gspo plan`, of a loader or of a running job about a recipe."""

    code: str
    """Stable name, kebab-case: `clip-too-wide`."""
    severity: Severity
    """`error` stops the run before it starts, `warning` needs a reason, `info` is only printed."""
    key: str
    """The dotted recipe key it is about: `objective.clip_high`."""
    message: str
    """What is wrong, with the numbers in it."""
    fix: str
    """What to do: `set objective.clip_high to about 4e-4`."""

    def __str__(self) -> str:
        line = f"{self.severity} [{self.code}] {self.key}: {self.message}; {self.fix}"
        # Findings quote files and keys of a user's: whatever they hold, a finding is one printable line.
        return printable(line)


@dataclass(frozen=True, slots=True)
class Problem:
    """A task with a checkable answer, before it is turned into tokens."""

    id: str
    """Unique and stable over runs: a hash of the question text."""
    question: str
    """The text of the task, without any template: `Calculate 879 + 974.`"""
    line: dict[str, Any]
    """All that its file says about it, keys as written: a line of JSONL, a row of Parquet, a reasoning-gym entry."""
    answer: str | None = None
    """The gold answer as text: `1853`; None = its line has none."""
    source: str = ""
    """Which collection it comes from: `aime`; empty = its file does not say."""
    pass_rate: float | None = None
    """Share of answers of some model that were right; None = its file does not say."""
    messages: tuple[dict[str, Any], ...] = ()
    """The conversation that the response continues; `question` is its last turn. Empty = `question` is all of it."""
    tools: tuple[dict[str, Any], ...] = ()
    """What the chat template is given as tools, by the JSON schema of OpenAI's interface."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem at its place in the prompt stream, as token ids."""

    index: int
    """Position in the stream, from 0; never given twice in a run."""
    problem: Problem
    """The task itself."""
    token_ids: tuple[int, ...]
    """[prompt_length] ids, template included."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of response tokens that were sampled under one version of the weights."""

    version: int
    """Weight version; 0 = the weights the run started with."""
    start: int
    """First response token of the segment."""
    end: int
    """One past its last response token."""


@dataclass(frozen=True, slots=True)
class Masked:
    """A stretch of response tokens that were not sampled: they have no log-prob and none is trained on."""

    start: int
    """First response token of the stretch."""
    end: int
    """One past its last; equal to `start` where the inserted text was empty."""
    why: Literal["observation", "closing"]
    """`observation` = reply of an environment; `closing` = text that ends a thinking beyond its budget."""


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response, complete or partial."""

    prompt_index: int
    """`Prompt.index` of its prompt."""
    sample_index: int
    """Which of the G responses to that prompt, 0..G-1."""
    token_ids: np.ndarray
    """[answer_length] int32, the stop token included when the sampler emitted one."""
    logprobs: np.ndarray
    """[answer_length] float32, what the sampler reported for each of them; 0 where masked."""
    segments: tuple[Segment, ...]
    """Cover [0, answer_length) in order."""
    stop_reason: StopReason
    """`stop` = a stop token was sampled; `length` = cut at the response limit."""
    routes: np.ndarray | None = None
    """[rows, layers, k] expert of each token from the first of the prompt on, in one byte up to 256 experts and else in
    two. The last rows may be missing: the last token was sampled and never routed."""
    masked: tuple[Masked, ...] = ()
    """In order; versions of masked tokens are those of the token before."""
    limit: int | None = None
    """Limit of its tokens in the step that started it; None = `rollout.max_answer_tokens`."""
    teacher_logprobs: np.ndarray | None = None
    """[answer_length] float32, the teacher's of each token; 0 where masked; None = it said none."""


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Metadata of a stored sample: all that the controller and the loop handle of it."""

    path: str
    """Place in the sample store of the run directory: file and offset, `written_000017.bin@4096`."""
    prompt_index: int
    """Group key: the responses to one prompt share it."""
    sample_index: int
    """Place in the group."""
    prompt_length: int
    """Tokens of the prompt."""
    answer_length: int
    """Tokens of the response, stop token included."""
    reward: float
    """Score within `reward.bounds`."""
    stop_reason: StopReason
    """Why the response ended."""
    segments: tuple[Segment, ...]
    """Weight versions of the response tokens."""
    masked: tuple[Masked, ...] = ()
    """Response tokens that were not sampled."""
    limit: int | None = None
    """Limit of the response tokens; None = `rollout.max_answer_tokens`."""
    parts: tuple[tuple[str, float], ...] = ()
    """Named parts of its reward, if it has any: `(("right", 1.0), ("short", 0.2))`."""
    unscored: str = ""
    """Kind of the fault for which it has no score of its own: `raised`; empty = it was scored."""
    teacher_fault: str = ""
    """Kind of the fault for which it has no log-probs of the teacher: `failed`; empty = it has, or none were asked for.
    """

    @property
    def trained_length(self) -> int:
        """Response tokens that were sampled: the length |y| of the objective."""
        return self.answer_length - sum(span.end - span.start for span in self.masked)


@dataclass(frozen=True, slots=True)
class Sample:
    """A training sequence: prompt and response in one row of token ids."""

    token_ids: np.ndarray
    """[length] int32: prompt, then response."""
    loss_mask: np.ndarray
    """[length] bool, True on trained tokens: the response with its stop token; prompt and tool output are False."""
    rollout_logprobs: np.ndarray
    """[length] float32, the sampler's log-prob of each token; 0 where `loss_mask` is False."""
    ref: SampleRef
    """Where it came from."""
    routes: np.ndarray | None = None
    """[length, layers, k] int16, the sampler's experts of each token, -1 = not recorded; None = none reported."""
