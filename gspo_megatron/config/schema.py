"""The recipe, typed: every key a recipe may hold, with its unit, its default and the rule it obeys."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, model_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.long_responses import EnvironmentSection, LengthStage, RepetitionHalt, ThinkingBudget
from gspo_megatron.config.model_section import Architecture, ModelSection
from gspo_megatron.config.objective_spec import ObjectiveSection
from gspo_megatron.config.placement_section import PlacementSection
from gspo_megatron.config.task_sections import ColdStartSection, DataSection, RewardSection, TokenizerSection


class RunSection(Section):
    """`run`: identity of the run."""

    name: str = "run"
    """Used in the run directory's name and in every title."""
    seed: int = Field(default=0, ge=0)
    """Seeds initialisation, data order and sampling; two runs with one seed see the same prompts in the same order."""
    directory: Path | None = None
    """Where the run writes; null = runs/<name>-<date>."""


class BatchSection(Section):
    """`batch`: the algebra of one rollout batch. Everything is counted over all ranks."""

    prompts: int = Field(default=64, gt=0)
    """Prompts a rollout batch. Source: ours: 512 sequences a batch with 8 answers."""
    answers: int = Field(default=8, gt=0)
    """Answers a prompt: the group of the advantage. Source: ours; published runs take 8 to 16."""
    updates: int = Field(default=4, gt=0)
    """Optimizer steps a rollout batch; each trains on prompts/updates whole groups. 4 in the GSPO paper.

    Source: GSPO, section 5.1.
    """

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
    """Learning rate after warm-up; constant from there. 0 switches the updates off (a control).

    Source: what public Qwen3 recipes agree on.
    """
    warmup_updates: int = Field(default=0, ge=0)
    """Linear warm-up, optimizer steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's averaging constants. Source: usual for large language models."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon. Source: Adam, arXiv 1412.6980."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of matrices; the weights of norms are not decayed."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest global gradient norm. Source: usual for transformers."""


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
    """Spread optimizer states over the data-parallel ranks. Ignored, with a line in the log, where there is no GPU.

    Source: Megatron-LM, arXiv 2104.04473: nothing is lost by it.
    """
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: `selective` = core attention and experts, `full` = every layer."""
    offload_activations: bool = False
    """Keep the layer inputs of recompute=full in pinned host memory until their backward pass.

    Source: ours. At 30B-A3B's width the two copies take an eighth of the time of a layer's matrix products, and 2 % of
    the whole layer's at 100K tokens (55 GB/s, not measured).
    """
    aux_loss_coefficient: float = Field(default=0.0, ge=0)
    """Router load-balancing loss; 0 in reinforcement learning."""
    micro_batch_tokens: int = Field(default=16384, gt=0)
    """Most tokens of one packed micro-batch on one data-parallel rank (over its CP ranks).

    Source: ours: fits one 80 GB GPU at the width of 30B-A3B.
    """
    head_chunk_tokens: int = Field(default=1024, gt=0)
    """Tokens whose logits exist at one time in the log-prob head.

    Source: ours: 0.6 GB of fp32 logits at 151,936 words.
    """
    max_steps: int = Field(default=100, ge=0)
    """Rollout batches to train on; 0 = only evaluate the starting weights. Source: ours."""
    max_skipped: int = Field(default=4, ge=0)
    """Updates in a row that may be skipped because a gradient was not finite; one more ends the run. Source: ours."""


class RolloutSection(Section):
    """`rollout`: the vLLM servers and how they sample."""

    servers: int = Field(default=1, gt=0)
    """vLLM servers."""
    tensor_parallel: int = Field(default=1, gt=0)
    """Tensor-parallel size of one server."""
    pipeline_parallel: int = Field(default=1, gt=0)
    """Pipeline-parallel size of one server; it uses tensor_parallel * pipeline_parallel GPUs."""
    expert_parallel: bool = False
    """Whole experts on each tensor-parallel rank of a server, instead of a slice of every expert."""
    decode_context_parallel: int = Field(default=1, gt=0)
    """Ranks of one server's tensor-parallel group that share the KV of a sequence while decoding."""
    prefix_caching: bool = True
    """Keep the KV of a prompt for all answers to it. Source: vLLM."""
    max_answer_tokens: int = Field(gt=0)
    """Longest answer, stop token included."""
    max_prompt_tokens: int = Field(gt=0)
    """Longest prompt; longer ones are refused by name."""
    expected_answer_tokens: int | None = Field(default=None, gt=0)
    """Mean answer length that `gspo plan` counts with, tokens; null = half of max_answer_tokens. Samples nothing."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the trainer divides its logits by the same number.

    Source: GRPO and GSPO sample the policy itself.
    """
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampler; 1 = off. Anything else is refused: the trainer's log-probs cover the whole vocabulary.

    Source: as temperature.
    """
    top_k: int = Field(default=0, ge=0)
    """Most likely tokens the sampler chooses from; 0 = off. Anything else is refused, as top_p is."""
    max_staleness: int = Field(default=0, ge=0)
    """Weight versions that a trained token may be behind; 0 = synchronous, 1 = one step off. Never exceeded."""
    over_provision: float | None = Field(default=None, ge=0)
    """Groups begun beyond a batch, as a share of batch.prompts; null = max_staleness.

    What is unfinished when the batch is complete is cut with max_staleness=0, else carried into later batches.
    """
    length_stages: tuple[LengthStage, ...] = ()
    """Shorter limits for the first steps, in order; after the last of them max_answer_tokens holds. Evaluations, the
    servers and `gspo plan` always take max_answer_tokens. Start at the length that the model was tuned at.
    """
    thinking: ThinkingBudget | None = None
    """Limit of the thinking within an answer; null = none."""
    repetition_halt: RepetitionHalt | None = None
    """End answers that repeat themselves; null = they go on to the limit."""
    stream_interval: int = Field(default=64, gt=0)
    """Tokens that a server sends at a time; a lost server costs each of its answers at most so many. Source: ours."""
    max_concurrency: int = Field(default=256, gt=0)
    """Sequences one server decodes at a time. Source: vLLM, its default."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """KV memory of one server where there is no GPU, GiB. Source: ours: ample for the tiny model."""
    gpu_memory_fraction: float = Field(default=0.85, gt=0, lt=1)
    """Share of each GPU that a server may use. Source: ours: 0.15 for what the trainer leaves behind."""
    start_timeout: float = Field(default=600, gt=0)
    """Seconds a server may take to answer its health check.

    Source: ours: 235B loads in minutes from a cold file system.
    """

    def answer_limit(self, step: int) -> int:
        """Longest answer to a prompt that is begun for this step, tokens."""
        stages = (stage.max_answer_tokens for stage in self.length_stages if step <= stage.until_step)
        return next(stages, self.max_answer_tokens)

    @model_validator(mode="after")
    def length_stages_grow(self) -> RolloutSection:
        for before, after in pairwise(self.length_stages):
            if after.until_step <= before.until_step or after.max_answer_tokens <= before.max_answer_tokens:
                raise ValueError(
                    f"length_stages goes from {before.max_answer_tokens} tokens until step {before.until_step} to "
                    f"{after.max_answer_tokens} until step {after.until_step}; both must grow"
                )
        if self.length_stages and self.length_stages[-1].max_answer_tokens >= self.max_answer_tokens:
            raise ValueError(
                f"length_stages ends at {self.length_stages[-1].max_answer_tokens} tokens, max_answer_tokens="
                f"{self.max_answer_tokens} comes after it and must be longer; name only the shorter stages"
            )
        return self


class WeightUpdateSection(Section):
    """`weight_update`: trainer to servers, after every rollout batch."""

    bucket_mib: int = Field(default=64, gt=0)
    """Most bytes of one packed transfer, MiB. Source: ours: large enough to fill a network, small beside a GPU."""
    canary_prompts: int = Field(default=4, gt=0)
    """Fixed probes that both sides score after every update. Source: ours."""
    canary_tokens: int = Field(default=16, gt=1)
    """Tokens of one probe. Source: ours."""
    canary_bound: float = Field(default=0.5, gt=0)
    """Largest allowed |log-prob difference| of a probe token between trainer and server; more stops the run.

    Source: ours: above the bfloat16 noise of 60 tokens (up to 0.3 in a simulation of 28 layers; not yet seen on a GPU),
    below the nats of a tensor in the wrong layout. That every value arrived is the checksum's to say.
    """
    timeout: float = Field(default=600, gt=0)
    """Seconds one update may take. Source: ours: 100 times what a transfer of 470 GB should take."""


class EvaluationSection(Section):
    """`evaluation`: held-out accuracy during training."""

    every: int = Field(default=10, ge=0)
    """Steps between evaluations; 0 = only at the start and at the end. Source: ours."""
    problems: int = Field(default=256, ge=0)
    """Held-out problems; 0 = never evaluate. Source: ours: a standard error of 3 points."""
    answers: int = Field(default=1, gt=0)
    """Answers a problem, averaged: 32 for the avg@32 of the GSPO paper."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of evaluations; 0 = greedy."""


class CheckpointSection(Section):
    """`checkpoint`: what a run can go on from."""

    every: int = Field(default=10, ge=0)
    """Steps between checkpoints; 0 = only when the job is asked to stop (SIGUSR1).

    Source: ours: about an hour of the shipped recipes.
    """
    keep: int = Field(default=2, gt=0)
    """Complete checkpoints that stay. Source: ours: the newest, and one before in case its files are damaged later."""
    export_every: int = Field(default=0, ge=0)
    """Steps between Hugging Face directories beside the checkpoints, which stay; 0 = only at the end. Source: ours."""


class Recipe(Section):
    """One run: everything that decides what it does."""

    run: RunSection = RunSection()
    placement: PlacementSection = PlacementSection()
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    reward: RewardSection = RewardSection()
    environment: EnvironmentSection | None = None
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
    _arch: Architecture | None = PrivateAttr(None)

    @property
    def arch(self) -> Architecture:
        """The typed architecture of `model`, which `models.resolve` fills in."""
        if self._arch is None:
            raise RuntimeError("this recipe has no typed architecture yet; load it through gspo_megatron.models")
        return self._arch

    def with_arch(self, arch: Architecture) -> Recipe:
        """The same recipe with this typed architecture; `model.architecture` becomes all of its fields."""
        model = self.model.model_copy(update={"architecture": arch.model_dump(mode="json")})
        recipe = self.model_copy(update={"model": model})
        recipe._arch = arch
        return recipe
