"""Sections for the task: tokenizer, data, reward and cold start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.hooks import check_choice, is_reference
from gspo_megatron.config.judge_section import JudgeSection
from gspo_megatron.config.optimizer_section import DecayRate
from gspo_megatron.config.recipe_paths import ObjectReference, RecipePath

BUILT_IN_REWARDS = ("math_verify", "reasoning_gym")
"""Values of `reward.name` beside a user's own."""


SOURCES = ("file", "reasoning_gym")
"""Values of `data.source` beside a user's own."""


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

    rendering: ObjectReference | None = None
    """Your own rendering of prompts by `file.py:NAME` or `package.module:NAME`; null = the chat template."""

    @field_validator("rendering")
    @classmethod
    def rendering_is_an_object(cls, name: str | None) -> str | None:
        return name if name is None else check_choice(name, ())


class DataSection(Section):
    """`data`: the source of training and held-out problems."""

    source: ObjectReference = "file"
    """`file` = the file `path`; `reasoning_gym` = generated problems; or your own by `file.py:NAME` or
    `package.module:NAME`. `jsonl` is an earlier name of `file`.

    Source: the usual format of prompt sets.
    """
    path: RecipePath | None = None
    """Training problems: JSONL, a JSON list, Parquet, or a directory that `datasets` saved. Its content decides."""
    held_out_path: RecipePath | None = None
    """Held-out problems, as `path`; null = `held_out` questions of `path`, chosen by the hash of their text."""
    prompt_key: str = "prompt"
    """Key of the prompt: a text, or a list of messages. Dots lead into objects. `messages` is read too where a line has
    no `prompt`. Source: chosen here."""
    answer_key: str = "answer"
    """Key of the gold answer, a text or a number: `reward_model.ground_truth`. Source: chosen here."""
    tools_key: str = "tools"
    """Key of the tools that the chat template is given. Source: OpenAI's interface."""
    task: str | None = None
    """Name of a reasoning-gym task: `basic_arithmetic`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the reasoning-gym task, or of your own source; passed unchanged."""
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

    @field_validator("source")
    @classmethod
    def source_is_known(cls, name: str) -> str:
        return "file" if name == "jsonl" else check_choice(name, SOURCES)

    @property
    def held_out_is_training(self) -> bool:
        """Whether the held-out file is the training file, under this name or another."""
        if self.path is None or self.held_out_path is None:
            return False
        return os.path.realpath(self.path) == os.path.realpath(self.held_out_path)

    @model_validator(mode="after")
    def only_a_file_has_rates_and_sources(self) -> DataSection:
        if self.source != "file" and (self.pass_rate is not None or self.mixture):
            raise ValueError("pass_rate and mixture choose among the lines of a file; set source=file or remove them")
        if self.pass_rate is not None and not 0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1:
            raise ValueError(f"pass_rate={list(self.pass_rate)} is no interval within 0 to 1; give the low end first")
        if self.mixture and (min(self.mixture.values()) < 0 or not any(self.mixture.values())):
            raise ValueError(f"mixture={self.mixture} draws no problem; give whole numbers from 0 on, not all 0")
        return self

    @model_validator(mode="after")
    def source_has_what_it_reads(self) -> DataSection:
        if self.source == "file" and self.path is None:
            raise ValueError("source=file without path; set data.path to a file with one object per line")
        if is_reference(self.source) and (self.path is not None or self.held_out_path is not None):
            raise ValueError(
                "path and held_out_path are for source=file; give your own source its files by data.options"
            )
        if self.source == "reasoning_gym" and self.task is None:
            raise ValueError("source=reasoning_gym without task; set data.task, e.g. basic_arithmetic")
        return self


class RewardSection(Section):
    """`reward`: the score of a response."""

    name: ObjectReference = "math_verify"
    """`math_verify` = equality with the gold answer; `reasoning_gym` = the task's own scorer; or your own by
    `file.py:NAME` or `package.module:NAME`.

    Source: chosen here: the verifier for mathematics.
    """
    answer_marker: str | None = None
    """Only the text after the last occurrence counts (e.g. `=`); null = all that follows the thinking."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each named part that your own reward returns; it must name exactly these. Empty = 1 for each."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest score: others are set to the nearer one. The lowest is the score of a wrong response.

    Source: GSPO trains on scores of 0 to 1.
    """
    exact: bool | None = None
    """Only the highest score counts; a lower one becomes the lowest. null = true for built-in rewards, false for your
    own. Source: GSPO trains on scores of 0 or 1."""
    require_stop: bool = True
    """A truncated response gets the lowest score, and no reward is computed for it. Source: chosen here."""

    judge: JudgeSection | None = None
    """The model that your own reward asks; null = none."""

    @property
    def is_own(self) -> bool:
        """Whether the reward is the user's own object."""
        return is_reference(self.name)

    def describe(self) -> str:
        """What becomes of a score, in one sentence."""
        low, high = self.bounds
        parts = [Path(self.name).name if self.is_own else self.name]
        if self.weights:
            parts.append(" + ".join(f"{weight:g} {part}" for part, weight in self.weights.items()))
        parts.append(f"below {high:g} counts {low:g} (exact)" if self.exact else f"clipped to [{low:g}, {high:g}]")
        if self.require_stop:
            parts.append(f"truncated counts {low:g}")
        return ", ".join(parts)

    @model_validator(mode="before")
    @classmethod
    def exact_is_filled_in(cls, values: Any) -> Any:
        """A checked recipe says it, so that a run of an earlier version, which wrote true, is the same run."""
        if not isinstance(values, dict) or values.get("exact") is not None:
            return values
        return {**values, "exact": not is_reference(str(values.get("name", cls.model_fields["name"].default)))}

    @field_validator("name")
    @classmethod
    def name_is_known(cls, name: str) -> str:
        return check_choice(name, BUILT_IN_REWARDS)

    @model_validator(mode="after")
    def bounds_are_an_interval(self) -> RewardSection:
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"bounds={list(self.bounds)} is no interval; give the lowest score first")
        return self

    @model_validator(mode="after")
    def parts_and_judge_are_the_user_s(self) -> RewardSection:
        if self.weights and not self.is_own:
            raise ValueError(f"weights weigh named parts, and name={self.name} has none; remove them or name your own")
        if self.judge and not self.is_own:
            raise ValueError(f"judge is asked by a reward of your own, and name={self.name} is none; remove it")
        if measured := [name for name in self.weights if name.startswith("_")]:
            raise ValueError(f"weights holds {measured[0]}: a part that begins with _ is only measured; remove it")
        return self


class ColdStartSection(Section):
    """`cold_start`: supervised fine-tuning on demonstrations before reinforcement learning."""

    demonstrations: str | None = None
    """Writer of demonstrations: `column_addition`, or `calculator_call` = a call of a tool, its reply, the answer.
    null = those of `path`."""
    path: RecipePath | None = None
    """JSONL file of your own demonstrations, an object with `messages` per line. The assistant's turns are trained on,
    all others are context. null = a writer's."""
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
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.98)
    """Adam's decay rates of the first and second moment. Source: chosen here: stable on the tiny model."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest global gradient norm. Source: usual for transformers."""
    accuracy_band: tuple[float, float] = (0.15, 0.5)
    """Interval of held-out accuracy to reach; outside it the run warns `cold-start-outside-band`.

    Source: chosen here: enough right responses for a signal, enough wrong ones to learn from.
    """
    cache: RecipePath = Path("runs/cold_start")
    """Directory of finished cold starts, named by the hash of everything that made them. The default lies where the
    command was started. Source: chosen here."""

    @model_validator(mode="after")
    def demonstrations_have_one_source(self) -> ColdStartSection:
        if (self.demonstrations is None) == (self.path is None):
            given = "neither" if self.path is None else "both"
            raise ValueError(f"{given} of demonstrations and path is set; name a writer, or a file of your own")
        if self.path is not None and self.worked_fraction != 1:
            raise ValueError(f"worked_fraction={self.worked_fraction} is for a writer, and path is a file; remove it")
        return self
