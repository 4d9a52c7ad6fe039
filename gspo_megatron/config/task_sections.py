"""What is learned: problems, how they are written and scored, and the model's start."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from gspo_megatron.config.base import Section


class TokenizerSection(Section):
    """`tokenizer`: text to ids and back."""

    kind: Literal["sentencepiece", "huggingface"] = "huggingface"
    """Which library reads it. Source: what Qwen3 ships."""
    path: Path | None = None
    """SentencePiece model file or Hugging Face directory; null = `model.path`."""
    system_prompt: str | None = None
    """Put before the question by the chat template; null = none. Hugging Face only."""
    enable_thinking: bool | None = None
    """Passed to the chat template of the hybrid Qwen3 models; null = not passed. Hugging Face only."""


class DataSection(Section):
    """`data`: where the problems come from."""

    source: Literal["reasoning_gym", "jsonl"] = "jsonl"
    """`reasoning_gym` = its generators; `jsonl` = `path`, one object with `prompt` and `answer` a line.

    Source: what real prompt sets come as.
    """
    path: Path | None = None
    """The JSONL file of training problems."""
    held_out_path: Path | None = None
    """The JSONL file of held-out problems; null = `held_out` questions of `path`, chosen by the hash of their text."""
    task: str | None = None
    """Name of a reasoning-gym task: `basic_arithmetic`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the reasoning-gym task as it is."""
    held_out: int = Field(default=256, ge=0)
    """Problems kept for evaluation, none of which is ever trained on: the split is by question text.

    Source: ours: a standard error of 3 points.
    """

    pass_rate: tuple[float, float] | None = None
    """Keep the training problems whose `pass_rate` lies within, bounds included; null = all. Held-out ones stay.

    [0.01, 0.99] leaves out what some model never and always solved.
    """
    mixture: dict[str, int] = Field(default_factory=dict)
    """Problems of each `source` of the file among so many in a row as all numbers together; empty = as they lie."""

    @model_validator(mode="after")
    def only_a_file_has_rates_and_sources(self) -> DataSection:
        if self.source != "jsonl" and (self.pass_rate is not None or self.mixture):
            raise ValueError("pass_rate and mixture choose among the lines of a file; set source=jsonl or drop them")
        if self.pass_rate is not None and not 0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1:
            raise ValueError(f"pass_rate={list(self.pass_rate)} is no window within 0 to 1; give the lower share first")
        if self.mixture and (min(self.mixture.values()) < 0 or not any(self.mixture.values())):
            raise ValueError(f"mixture={self.mixture} draws nothing, or less; give whole numbers from 0 on")
        return self

    @model_validator(mode="after")
    def source_has_what_it_reads(self) -> DataSection:
        if self.source == "jsonl" and self.path is None:
            raise ValueError("source=jsonl without path; set data.path to a file with one object a line")
        if self.source == "reasoning_gym" and self.task is None:
            raise ValueError("source=reasoning_gym without task; set data.task, e.g. basic_arithmetic")
        return self


class RewardSection(Section):
    """`reward`: text of an answer -> score in [0, 1]."""

    name: Literal["reasoning_gym", "math_verify"] = "math_verify"
    """`reasoning_gym` = the task's own scorer; `math_verify` = mathematical equality with the reference answer.

    Source: ours: the verifier for mathematics.
    """
    answer_marker: str | None = None
    """Only the text after its last occurrence is scored (`=`); null = the whole answer."""
    exact: bool = True
    """Count only a full score: partial marks become 0. Source: GSPO trains on a score of 0 or 1."""
    require_stop: bool = True
    """An answer cut at the limit scores 0. Source: ours: a cut answer was not given."""


class ColdStartSection(Section):
    """`cold_start`: supervised fine-tuning on worked answers before reinforcement learning."""

    demonstrations: str
    """Name of the writer of worked answers: `column_addition`."""
    worked_fraction: float = Field(default=1.0, ge=0, le=1)
    """Share of demonstrations in the worked style; the rest are direct answers. Chosen by hash of the question.

    Source: ours: plain fine-tuning.
    """
    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(gt=0)
    """Sequences a step, over all ranks."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up, steps."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Last share of the steps over which the rate falls linearly to a twentieth.

    Source: ours, seen to be stable on the tiny model.
    """
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's averaging constants. Source: ours, seen to be stable on the tiny model."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest global gradient norm. Source: usual for transformers."""
    accuracy_band: tuple[float, float] = (0.15, 0.5)
    """Held-out greedy accuracy it should reach; outside, the run warns `cold-start-outside-band`.

    Source: ours: enough right answers for a signal, enough wrong ones to learn from.
    """
    cache: Path = Path("runs/cold_start")
    """Checkpoints are kept here, named by the hash of everything that made them. Source: ours."""
