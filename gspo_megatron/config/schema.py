"""The recipe, typed: every key a recipe may hold, with its unit, its default and the rule it obeys."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.model import ModelSection
from gspo_megatron.config.objective import ObjectiveSection
from gspo_megatron.config.placement import PlacementSection


class RunSection(Section):
    """`run`: identity of the run."""

    name: str = "run"
    """Used in the run directory's name and in every title."""
    seed: int = Field(default=0, ge=0)
    """Seeds initialisation, data order and sampling; two runs with one seed see the same prompts in the same order."""
    directory: Path | None = None
    """Where the run writes; null = runs/<name>-<date>."""


class TokenizerSection(Section):
    """`tokenizer`: text to ids and back."""

    kind: Literal["sentencepiece", "huggingface"] = "huggingface"
    """Which library reads it."""
    path: Path | None = None
    """SentencePiece model file or Hugging Face directory; null = `model.path`."""
    system_prompt: str | None = None
    """Put before the question by the chat template; null = none. Hugging Face only."""
    enable_thinking: bool | None = None
    """Passed to the chat template of the hybrid Qwen3 models; null = not passed. Hugging Face only."""


class DataSection(Section):
    """`data`: where the problems come from."""

    source: Literal["reasoning_gym", "jsonl"] = "jsonl"
    """`reasoning_gym` = its generators; `jsonl` = `path`, one object with `prompt` and `answer` a line."""
    path: Path | None = None
    """The JSONL file of training problems."""
    held_out_path: Path | None = None
    """The JSONL file of held-out problems; null = `held_out` questions of `path`, chosen by the hash of their text."""
    task: str | None = None
    """Name of a reasoning-gym task: `basic_arithmetic`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the reasoning-gym task as it is."""
    held_out: int = Field(default=256, ge=0)
    """Problems kept for evaluation, none of which is ever trained on: the split is by question text."""

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
    """`reasoning_gym` = the task's own scorer; `math_verify` = mathematical equality with the reference answer."""
    answer_marker: str | None = None
    """Only the text after its last occurrence is scored (`=`); null = the whole answer."""
    exact: bool = True
    """Count only a full score: partial marks become 0."""
    require_stop: bool = True
    """An answer cut at the limit scores 0."""


class ColdStartSection(Section):
    """`cold_start`: supervised fine-tuning on worked answers before reinforcement learning."""

    demonstrations: str
    """Name of the writer of worked answers: `column_addition`."""
    worked_fraction: float = Field(default=1.0, ge=0, le=1)
    """Share of demonstrations in the worked style; the rest are direct answers. Chosen by hash of the question."""
    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(gt=0)
    """Sequences a step, over all ranks."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up, steps."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Last share of the steps over which the rate falls linearly to a twentieth."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's averaging constants."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    accuracy_band: tuple[float, float] = (0.15, 0.5)
    """Held-out greedy accuracy it should reach; outside, the run warns `cold-start-outside-band`."""
    cache: Path = Path("runs/cold_start")
    """Checkpoints are kept here, named by the hash of everything that made them."""


class BatchSection(Section):
    """`batch`: the algebra of one rollout batch. Everything is counted over all ranks."""

    prompts: int = Field(default=64, gt=0)
    """Prompts a rollout batch."""
    answers: int = Field(default=8, gt=0)
    """Answers a prompt: the group of the advantage."""
    updates: int = Field(default=4, gt=0)
    """Optimizer steps a rollout batch; each trains on prompts/updates whole groups. 4 in the GSPO paper."""

    @model_validator(mode="after")
    def updates_divide_the_prompts(self) -> BatchSection:
        if self.prompts % self.updates:
            raise ValueError(
                f"updates={self.updates} does not divide prompts={self.prompts}; choose prompts as a multiple"
            )
        return self


class OptimizerSection(Section):
    """`optimizer`: AdamW of the reinforcement learning phase."""

    lr: float = Field(default=1e-6, ge=0)
    """Learning rate after warm-up; constant from there. 0 switches the updates off (a control)."""
    warmup_updates: int = Field(default=0, ge=0)
    """Linear warm-up, optimizer steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's averaging constants."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""


class TrainerSection(Section):
    """`trainer`: processes and layout of the policy."""

    ranks: int | None = Field(default=None, gt=0)
    """Trainer processes; null = one a GPU, or 2 gloo ranks where there is none."""
    tensor_parallel: int = Field(default=1, gt=0)
    """TP; sequence parallelism is on whenever it is above 1."""
    pipeline_parallel: int = Field(default=1, gt=0)
    """PP stages."""
    virtual_pipeline: int | None = Field(default=None, gt=1)
    """Model chunks a stage (interleaved schedule); null = one."""
    first_stage_layers: int | None = Field(default=None, gt=0)
    """Layers of the first stage; null = even."""
    last_stage_layers: int | None = Field(default=None, gt=0)
    """Layers of the last stage; null = even."""
    context_parallel: int = Field(default=1, gt=0)
    """CP: each sequence is cut into 2*CP chunks over CP ranks."""
    expert_parallel: int = Field(default=1, gt=0)
    """EP: ranks over which the experts are spread."""
    expert_tensor_parallel: int = Field(default=1, gt=0)
    """ETP: ranks over which one expert is cut."""
    distributed_optimizer: bool = True
    """Spread optimizer states over the data-parallel ranks. Ignored, with a line in the log, where there is no GPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: `selective` = core attention and experts, `full` = every layer."""
    aux_loss_coefficient: float = Field(default=0.0, ge=0)
    """Router load-balancing loss; 0 in reinforcement learning."""
    micro_batch_tokens: int = Field(default=16384, gt=0)
    """Most tokens of one packed micro-batch on one data-parallel rank (over its CP ranks)."""
    head_chunk_tokens: int = Field(default=1024, gt=0)
    """Tokens whose logits exist at one time in the log-prob head."""
    max_steps: int = Field(default=100, ge=0)
    """Rollout batches to train on; 0 = only evaluate the starting weights."""


class RolloutSection(Section):
    """`rollout`: the vLLM servers and how they sample."""

    servers: int = Field(default=1, gt=0)
    """vLLM servers."""
    tensor_parallel: int = Field(default=1, gt=0)
    """Tensor-parallel size of one server."""
    pipeline_parallel: int = Field(default=1, gt=0)
    """Pipeline-parallel size of one server; it uses tensor_parallel * pipeline_parallel GPUs."""
    decode_context_parallel: int = Field(default=1, gt=0)
    """Ranks of one server's tensor-parallel group that share the KV of a sequence while decoding."""
    prefix_caching: bool = True
    """Keep the KV of a prompt for all answers to it."""
    max_answer_tokens: int = Field(gt=0)
    """Longest answer, stop token included."""
    max_prompt_tokens: int = Field(gt=0)
    """Longest prompt; longer ones are refused by name."""
    expected_answer_tokens: int | None = Field(default=None, gt=0)
    """Mean answer length that `gspo plan` counts with, tokens; null = half of max_answer_tokens. Samples nothing."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the trainer divides its logits by the same number."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampler; 1 = off. Anything else is refused: the trainer's log-probs cover the whole vocabulary."""
    top_k: int = Field(default=0, ge=0)
    """Most likely tokens the sampler chooses from; 0 = off. Anything else is refused, as top_p is."""
    max_staleness: int = Field(default=0, ge=0)
    """Weight versions that a trained token may be behind; 0 = synchronous."""
    max_concurrency: int = Field(default=256, gt=0)
    """Sequences one server decodes at a time."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """KV memory of one server where there is no GPU, GiB."""
    gpu_memory_fraction: float = Field(default=0.85, gt=0, lt=1)
    """Share of each GPU that a server may use."""
    start_timeout: float = Field(default=600, gt=0)
    """Seconds a server may take to answer its health check."""


class WeightUpdateSection(Section):
    """`weight_update`: trainer to servers, after every rollout batch."""

    bucket_mib: int = Field(default=64, gt=0)
    """Most bytes of one packed transfer, MiB."""
    canary_prompts: int = Field(default=4, gt=0)
    """Fixed probes that both sides score after every update."""
    canary_tokens: int = Field(default=16, gt=1)
    """Tokens of one probe."""
    canary_bound: float = Field(default=5e-2, gt=0)
    """Largest allowed |log-prob difference| of a probe token between trainer and server; more stops the run."""
    timeout: float = Field(default=600, gt=0)
    """Seconds one update may take."""


class EvaluationSection(Section):
    """`evaluation`: held-out accuracy during training."""

    every: int = Field(default=10, ge=0)
    """Steps between evaluations; 0 = only at the start and at the end."""
    problems: int = Field(default=256, gt=0)
    """Held-out problems."""
    answers: int = Field(default=1, gt=0)
    """Answers a problem, averaged: 32 for the avg@32 of the GSPO paper."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of evaluations; 0 = greedy."""


class CheckpointSection(Section):
    """`checkpoint`: what a run can go on from."""

    every: int = Field(default=10, ge=0)
    """Steps between checkpoints; 0 = only when the job is asked to stop (SIGUSR1)."""


class Recipe(Section):
    """One run: everything that decides what it does."""

    run: RunSection = RunSection()
    placement: PlacementSection = PlacementSection()
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    reward: RewardSection = RewardSection()
    cold_start: ColdStartSection | None = None
    batch: BatchSection = BatchSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    trainer: TrainerSection = TrainerSection()
    rollout: RolloutSection
    weight_update: WeightUpdateSection = WeightUpdateSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    acknowledge: dict[str, str] = Field(default_factory=dict)
    """Warning codes that this recipe accepts, each with the reason."""
