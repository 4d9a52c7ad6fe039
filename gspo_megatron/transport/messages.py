"""Every message that travels between two processes of a run, as a class that both ends parse.

A message is sent as JSON (`to_json`) and read by the class that the receiver expects (`from_json`). A field that one
end adds and the other does not know, or one that is missing, is an error that names the class and the field: two
processes of different versions never misread each other silently. Those of a weight update are in
`update_messages.py`; vLLM's own formats are in `controller/vllm_format.py`. Imports neither torch nor numpy.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AllowInfNan, JsonValue, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from gspo_megatron.transport.wire_message import WireMessage, json_key
from gspo_megatron.types import Prompt, SampleRef


class Empty(WireMessage):
    """Nothing: the body of a request or a response that says no more than its path."""


class ErrorReply(WireMessage):
    """Why a request was refused."""

    error: str
    """One sentence."""


# The state of the controller and of its servers.


class ProgressReport(WireMessage):
    """How far the present rollout or evaluation is."""

    done: int
    """Responses finished and scored."""
    total: int
    """Responses requested."""
    tokens: int
    """Response tokens of the finished ones."""
    seconds: float
    """Since the start of the phase."""


class ControllerStatus(WireMessage):
    """Response of `GET /status`."""

    phase: str
    """`waiting for servers`, `idle`, `receiving weights of version N` or `failed: REASON`."""
    progress: ProgressReport
    version: int | None
    """Weight version that every live server holds; None before the first update and during one."""
    servers: dict[str, str]
    """By address: why a server is not used, or an empty text."""

    @property
    def ready_servers(self) -> int:
        """Servers that answered their health check."""
        return sum(not fault for fault in self.servers.values()) if self.phase == "idle" else 0


class ServerIdentity(WireMessage):
    """What one server is and serves, reported by its worker 0."""

    run: str
    """Id of the run whose directory it was started from; empty = none."""
    tokenizer: str
    """Hash of the vocabulary files it was started with; empty = none."""
    config: str
    """JSON text in Hugging Face's format: the config of the model that is loaded."""
    dtype: str
    """Of its weights: `bfloat16`."""
    context: int
    """Tokens of the longest prompt and response together."""


# Rollouts and evaluations.


class RolloutRequest(WireMessage):
    """Body of `POST /rollout`."""

    step: NonNegativeInt
    """Training step that the batch is for."""


class TokenCount(WireMessage):
    """Tokens and prompts of one row of the accounting."""

    tokens: int = 0
    prompts: int = 0


class Accounting(WireMessage):
    """Where sampled tokens went since the start of the run: sampled = taken + all dropped + in-flight."""

    sampled_tokens: int
    taken: TokenCount
    """Handed to the trainer."""
    dropped: dict[str, TokenCount]
    """By reason: `cut`, `too-stale`, `equal-rewards`, `agent-branch`, `server-lost`, `attempt-lost`."""
    in_flight: Annotated[TokenCount, json_key("carried")]
    """In groups that no batch has taken yet."""


class Staleness(WireMessage):
    """Versions of the weights that the tokens of a batch are behind."""

    mean: float
    """Over tokens."""
    largest: int


class RolloutBatch(WireMessage):
    """Response of `POST /rollout`: references to stored and scored samples."""

    samples: tuple[SampleRef, ...]
    """Ordered by prompt and sample."""
    seconds: float
    tokens: int
    """Sampled response tokens."""
    measures: dict[str, float]
    """Metrics of the responses, by metric name."""
    staleness: Staleness
    accounting: Accounting
    unscored: dict[str, int]
    """Responses of this batch without a score of their own, by the kind of fault: `raised`, `out-of-time`, `died`,
    `not-started`, `environment-KIND`, `agent-KIND`."""
    skipped_prompts: dict[str, int]
    """Problems that the prompt stream has passed over, by reason."""

    def metrics(self) -> dict[str, float]:
        """What the run log records of a batch."""
        counts = self.accounting
        return {
            "rollout_tokens": self.tokens,
            **self.measures,
            "staleness_mean": self.staleness.mean,
            "staleness_largest": self.staleness.largest,
            "sampled_tokens": counts.sampled_tokens,
            "carried_tokens": counts.in_flight.tokens,
            "unscored": sum(self.unscored.values()),
            **{f"unscored/{kind}": count for kind, count in self.unscored.items()},
            **{f"dropped_tokens/{reason}": count.tokens for reason, count in counts.dropped.items()},
        }


class EvaluationRequest(WireMessage):
    """Body of `POST /evaluate`."""

    problems: PositiveInt | None
    """Held-out problems; None = all that fit into the prompt limit."""
    answers: PositiveInt
    """Responses to each."""
    temperature: Annotated[NonNegativeFloat, AllowInfNan(False)]
    """0 = greedy."""
    keep: bool = False
    """Whether every response is written to `answers.jsonl` of the run directory."""


class EvaluationExample(WireMessage):
    """One response of an evaluation, in words."""

    question: str
    answer_text: str
    reward: float


class EvaluationReport(WireMessage):
    """Response of `POST /evaluate`."""

    accuracy: float
    """Share of full scores."""
    mean_reward: float
    mean_length: float
    """Tokens of a response, observations included."""
    unscored: int
    """Responses without a score of their own: their reward or environment failed."""
    problems: int
    answers: int
    """Responses to each."""
    temperature: float
    """0 = greedy."""
    examples: tuple[EvaluationExample, ...]
    """Responses to different problems."""


# The controller's part of a checkpoint. These keys are on disk: state.json of a run holds them.


class StreamState(WireMessage):
    """Place in the prompt stream; see `data/stream.py`."""

    index: int
    """Prompts given out."""
    position: int
    """Problems looked at."""
    skipped: dict[str, int]
    """Problems passed over, by reason."""
    fingerprint: str
    """Of the problems themselves, their mixture, the seed and the prompt limit."""


class GenerationState(WireMessage):
    """What an unfinished generation has beyond its stored tokens."""

    sample_index: int
    parts: int
    """Requests sent so far."""
    lost: int
    """Tokens that were sampled and could not be kept."""
    state: JsonValue
    """The environment's own, in any JSON form."""


class GroupState(WireMessage):
    """One group of responses in flight."""

    prompt: Prompt
    answers: int
    """Members."""
    limit: int | None
    """Longest response of the step that started it; None = the recipe's limit."""
    finished: tuple[SampleRef, ...]
    first_versions: Annotated[dict[str, int | None], json_key("born")]
    """By sample index: weight version of the first request; None = not started."""
    generations: Annotated[tuple[GenerationState, ...], json_key("drafts")]
    """Unfinished members."""

    @model_validator(mode="after")
    def _has_every_member_once(self) -> Self:
        """A member that is missing or there twice makes a group that never completes."""
        members = sorted(part.sample_index for part in (*self.finished, *self.generations))
        known = sorted(self.first_versions)
        if members != list(range(len(members))) or len(members) != self.answers or known != sorted(map(str, members)):
            raise ValueError(
                f"the group of prompt {self.prompt.index} has {self.answers} members, its parts are of {members[:9]}; "
                "go on from another checkpoint"
            )
        return self


class ControllerState(WireMessage):
    """Response of `GET /state`, body of `POST /state`, and the key `controller` of state.json."""

    stream: StreamState
    groups: tuple[GroupState, ...]
    accounting: Accounting
    store: str
    """Directory of the run that holds the tokens of unfinished generations."""
    generations: Annotated[tuple[SampleRef, ...], json_key("drafts")]
    """Unfinished generations of all groups in order, as stored there."""

    @model_validator(mode="after")
    def _stores_every_generation(self) -> Self:
        unfinished = sum(len(group.generations) for group in self.groups)
        if unfinished != len(self.generations):
            raise ValueError(
                f"{len(self.generations)} unfinished generations are stored, the groups have {unfinished}; go on from "
                "another checkpoint"
            )
        return self
