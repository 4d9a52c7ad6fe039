"""Sections for the task: tokenizer, data, reward and cold start."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.recipe_paths import RecipePath


class TokenizerSection(Section):
    """`tokenizer`: conversion between text and token ids."""

    kind: Literal["sentencepiece", "huggingface"] = "huggingface"
    """Library that reads the tokenizer. Source: the format that Qwen3 ships."""
    path: RecipePath | None = None
    """SentencePiece model file or Hugging Face directory; null = `model.path`."""
    system_prompt: str | None = None
    """System message of the chat template; null = none. Hugging Face only."""
    enable_thinking: bool | None = None
    """`enable_thinking` argument of the chat template of hybrid Qwen3 models; null = not passed. Hugging Face only."""


class DataSection(Section):
    """`data`: the source of training and held-out problems."""

    source: Literal["reasoning_gym", "jsonl"] = "jsonl"
    """`reasoning_gym` = generated problems; `jsonl` = the file `path`, one object with `prompt` and `answer` per line.

    Source: the usual format of prompt sets.
    """
    path: RecipePath | None = None
    """JSONL file of training problems."""
    held_out_path: RecipePath | None = None
    """JSONL file of held-out problems; null = `held_out` questions of `path`, chosen by the hash of their text."""
    task: str | None = None
    """Name of a reasoning-gym task: `basic_arithmetic`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the reasoning-gym task, passed unchanged."""
    held_out: int = Field(default=256, ge=0)
    """Problems reserved for evaluation. The split is by question text, so none of them is trained on.

    Source: chosen here: a standard error of 3 points.
    """

    pass_rate: tuple[float, float] | None = None
    """Keep training problems with a `pass_rate` in this interval, bounds included; null = all. Held-out problems stay.

    [0.01, 0.99] removes problems that the measured model never or always solved.
    """
    mixture: dict[str, int] = Field(default_factory=dict)
    """Number of problems per `source` in each block of consecutive prompts; the block length is the sum of the numbers.
    Empty = no mixing."""

    @model_validator(mode="after")
    def only_a_file_has_rates_and_sources(self) -> DataSection:
        if self.source != "jsonl" and (self.pass_rate is not None or self.mixture):
            raise ValueError("pass_rate and mixture choose among the lines of a file; set source=jsonl or remove them")
        if self.pass_rate is not None and not 0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1:
            raise ValueError(f"pass_rate={list(self.pass_rate)} is no interval within 0 to 1; give the low end first")
        if self.mixture and (min(self.mixture.values()) < 0 or not any(self.mixture.values())):
            raise ValueError(f"mixture={self.mixture} draws no problem; give whole numbers from 0 on, not all 0")
        return self

    @model_validator(mode="after")
    def source_has_what_it_reads(self) -> DataSection:
        if self.source == "jsonl" and self.path is None:
            raise ValueError("source=jsonl without path; set data.path to a file with one object per line")
        if self.source == "reasoning_gym" and self.task is None:
            raise ValueError("source=reasoning_gym without task; set data.task, e.g. basic_arithmetic")
        return self


class RewardSection(Section):
    """`reward`: the score in [0, 1] of a response's text."""

    name: Literal["reasoning_gym", "math_verify"] = "math_verify"
    """`reasoning_gym` = the task's own scorer; `math_verify` = mathematical equality with the reference answer.

    Source: chosen here: the verifier for mathematics.
    """
    answer_marker: str | None = None
    """Only the text after the last occurrence is scored (e.g. `=`); null = the whole response."""
    exact: bool = True
    """Only a full score counts; a partial score becomes 0. Source: GSPO trains on scores of 0 or 1."""
    require_stop: bool = True
    """A truncated response scores 0. Source: chosen here."""


class ColdStartSection(Section):
    """`cold_start`: supervised fine-tuning on demonstrations before reinforcement learning."""

    demonstrations: str
    """Name of the writer of demonstrations: `column_addition`."""
    worked_fraction: float = Field(default=1.0, ge=0, le=1)
    """Share of demonstrations that show their working; the others are direct answers. Chosen by the question's hash.

    Source: chosen here: plain fine-tuning.
    """
    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(gt=0)
    """Sequences per step, over all ranks."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps, at the end, over which the rate falls linearly to a twentieth.

    Source: chosen here: stable on the tiny model.
    """
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's decay rates of the first and second moment. Source: chosen here: stable on the tiny model."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest global gradient norm. Source: usual for transformers."""
    accuracy_band: tuple[float, float] = (0.15, 0.5)
    """Interval of held-out greedy accuracy to reach; outside it the run warns `cold-start-outside-band`.

    Source: chosen here: enough right responses for a signal, enough wrong ones to learn from.
    """
    cache: RecipePath = Path("runs/cold_start")
    """Directory of finished cold starts, named by the hash of everything that made them. The default lies where the
    command was started. Source: chosen here."""
