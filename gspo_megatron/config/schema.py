"""The typed recipe: every key with its unit, its default and its rules.

Each docstring is what `gspo plan --explain KEY` prints. "Source: chosen here" marks a default without a publication.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from gspo_megatron.config.agent_section import AgentSection, check_conversation
from gspo_megatron.config.base import Section
from gspo_megatron.config.checkpoint_section import CheckpointSection
from gspo_megatron.config.critic_section import CriticSection
from gspo_megatron.config.engine_sections import VllmMap
from gspo_megatron.config.long_responses import EnvironmentSection, LengthStage, RepetitionHalt, ThinkingBudget
from gspo_megatron.config.metrics_section import MetricsSection
from gspo_megatron.config.model_section import Architecture, ModelSection
from gspo_megatron.config.objective_spec import ObjectiveSection
from gspo_megatron.config.optimizer_section import OptimizerSection
from gspo_megatron.config.placement_section import PlacementSection
from gspo_megatron.config.run_section import RunSection
from gspo_megatron.config.task_sections import ColdStartSection, DataSection, RewardSection, TokenizerSection
from gspo_megatron.config.teacher_section import TeacherSection
from gspo_megatron.config.trainer_section import TrainerSection

LOWEST_TEMPERATURE = 0.01
"""vLLM samples at this one instead of a lower one but 0. Source: `_MAX_TEMP` of vllm 0.32."""


def is_sampled_as_written(temperature: float) -> float:
    """A temperature that vLLM takes as it is; 0 is greedy. Raises ValueError."""
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise ValueError(f"{temperature:g} would be sampled by vLLM as {LOWEST_TEMPERATURE}; set 0.01 or more")
    return temperature


Temperature = Annotated[float, AfterValidator(is_sampled_as_written)]


class BatchSection(Section):
    """`batch`: sizes of one rollout batch, counted over all ranks."""

    prompts: int = Field(default=64, gt=0)
    """Prompts per rollout batch. Source: chosen here: 512 sequences per batch with 8 responses per prompt."""
    answers: int = Field(default=8, gt=0)
    """Responses per prompt: the group over which advantages are normalised. Source: chosen here; published runs
    use 8 to 16."""
    updates: int = Field(default=4, gt=0)
    """Optimizer steps per rollout batch. Each trains on prompts/updates whole groups.

    Source: GSPO, section 5.1.
    """

    @model_validator(mode="after")
    def updates_divide_the_prompts(self) -> BatchSection:
        if self.prompts % self.updates:
            raise ValueError(
                f"updates={self.updates} does not divide prompts={self.prompts}; set prompts to a multiple"
            )
        return self


class RolloutSection(Section):
    """`rollout`: the vLLM servers and their sampling settings."""

    servers: int = Field(default=1, gt=0)
    """Number of vLLM servers."""
    tensor_parallel: int = Field(default=1, gt=0)
    """Tensor-parallel size of one server."""
    pipeline_parallel: int = Field(default=1, gt=0)
    """Pipeline-parallel size of one server. A server uses tensor_parallel * pipeline_parallel GPUs."""
    expert_parallel: bool = False
    """Place whole experts on each tensor-parallel rank of a server, instead of a slice of every expert."""
    decode_context_parallel: int = Field(default=1, gt=0)
    """Tensor-parallel ranks of a server that share the KV cache of a sequence during decoding."""
    prefix_caching: bool = True
    """Reuse the KV cache of a prompt for all responses to it. Source: vLLM."""
    max_answer_tokens: int = Field(gt=0)
    """Longest response, tokens, stop token included."""
    max_prompt_tokens: int = Field(gt=0)
    """Longest prompt, tokens. A longer one is left out, counted and logged."""
    expected_answer_tokens: int | None = Field(default=None, gt=0)
    """Mean response length for the estimates of `gspo plan`, tokens; null = half of max_answer_tokens. It does not
    change sampling."""
    temperature: Temperature = Field(default=1.0, gt=0)
    """Sampling temperature, at least 0.01. The trainer divides its logits by the same number.

    Source: GRPO and GSPO sample from the policy itself.
    """
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 = off. Other values are refused: the trainer's log-probs cover the whole vocabulary.

    Source: as temperature.
    """
    top_k: int = Field(default=0, ge=0)
    """Number of most likely tokens to sample from; 0 = off. Other values are refused, as for top_p."""
    max_staleness: int = Field(default=0, ge=0)
    """Most weight versions between the sampling of a token and its training. 0 = synchronous, 1 = one step off-policy.
    The limit is never exceeded."""
    over_provision: float | None = Field(default=None, ge=0)
    """Extra groups in flight beyond one batch, as a share of batch.prompts; null = max_staleness.

    Responses that are in flight when the batch is complete are aborted with max_staleness=0, and continued for later
    batches otherwise.
    """
    length_stages: tuple[LengthStage, ...] = ()
    """Shorter response limits for the first steps, in order; max_answer_tokens holds after the last stage. Evaluations,
    the servers and `gspo plan` always use max_answer_tokens. Start at the length that the model was tuned at."""
    thinking: ThinkingBudget | None = None
    """Limit of the thinking within a response; null = none."""
    repetition_halt: RepetitionHalt | None = None
    """End responses that repeat themselves; null = they run to the limit."""
    stream_interval: int = Field(default=64, gt=0)
    """Tokens per streamed message of a server. A lost server costs each of its responses at most this many tokens.

    Source: chosen here.
    """
    max_concurrency: int = Field(default=256, gt=0)
    """Most sequences that one server decodes at a time. Source: the default of vLLM."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """KV cache of one server without a GPU, GiB; null = twice what `max_concurrency` of the longest fill, at most 1."""
    gpu_memory_fraction: float = Field(default=0.85, gt=0, lt=1)
    """Share of each GPU's memory that a server may use. Source: chosen here: 0.15 remains for the trainer's process."""
    start_timeout: float = Field(default=600, gt=0)
    """Longest time until a started server passes its health check, seconds.
    Source: chosen here: 235B loads in minutes from a cold file system."""
    keep_samples: int | None = Field(default=100, gt=0)
    """Steps whose samples (ids, log-probs, rewards) stay in the run directory, the newest; null = all.

    Source: chosen here: 100 steps of 512 responses of 100,000 tokens are 40 GB.
    """
    weight_dtype: Literal["fp8"] | None = None
    """fp8 = the servers of a run hold matrices as e4m3 bytes with a scale per 128 x 128 block, which the trainer makes;
    half the memory and transfer, and other log-probs. null = as model.dtype. Source: Qwen3's FP8 checkpoints."""
    model_runner: Literal["v1", "v2"] | None = None
    """vLLM's model runner on a GPU; null = vLLM's choice, which is v2 where it can run the model. v1 is the older one,
    to fall back on. Source: vLLM."""
    vllm: VllmMap = VllmMap()
    """Arguments of vLLM's EngineArgs, passed on as they are. `gspo plan RECIPE --explain-engines` shows what differs
    from vLLM's defaults."""

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens of the longest prompt with the longest response to it."""
        return self.max_prompt_tokens + self.max_answer_tokens

    def answer_limit(self, step: int) -> int:
        """Return the longest response, in tokens, to a prompt that is started for this step."""
        stages = (stage.max_answer_tokens for stage in self.length_stages if step <= stage.until_step)
        return next(stages, self.max_answer_tokens)

    @model_validator(mode="after")
    def length_stages_grow(self) -> RolloutSection:
        for before, after in pairwise(self.length_stages):
            if after.until_step <= before.until_step or after.max_answer_tokens <= before.max_answer_tokens:
                raise ValueError(
                    f"length_stages goes from {before.max_answer_tokens} tokens until step {before.until_step} to "
                    f"{after.max_answer_tokens} until step {after.until_step}; let both numbers grow"
                )
        if self.length_stages and self.length_stages[-1].max_answer_tokens >= self.max_answer_tokens:
            raise ValueError(
                f"length_stages ends at {self.length_stages[-1].max_answer_tokens} tokens, max_answer_tokens="
                f"{self.max_answer_tokens} follows it and must be longer; list only the shorter stages"
            )
        return self


class WeightUpdateSection(Section):
    """`weight_update`: transfer of the weights from trainer to servers after every rollout batch."""

    bucket_mib: int = Field(default=64, gt=0)
    """Size of one packed transfer, MiB. Source: chosen here: large enough to fill a network, small beside a GPU."""
    canary_prompts: int = Field(default=4, gt=0)
    """Fixed probe sequences that trainer and servers score after every update. Source: chosen here."""
    canary_tokens: int = Field(default=16, gt=1)
    """Tokens per probe sequence. Source: chosen here."""
    canary_bound: float = Field(default=0.5, gt=0)
    """Largest allowed |log-prob difference| of a probe token between trainer and server, nats; more stops the run.

    Source: chosen here: above the bfloat16 noise of 60 tokens (up to 0.3 in a simulation of 28 layers; not yet seen on
    a GPU), below the effect of a tensor in the wrong layout. The checksum shows that every value arrived.
    """
    timeout: float = Field(default=600, gt=0)
    """Longest duration of one update, seconds. Source: chosen here: 100 times the expected transfer of 470 GB."""


class EvaluationSection(Section):
    """`evaluation`: held-out accuracy during training."""

    every: int = Field(default=10, ge=0)
    """Steps between evaluations; 0 = only at the start and at the end. Source: chosen here."""
    problems: int | None = Field(default=None, ge=0)
    """Held-out problems per evaluation; null = all that fit into the prompt limit, 0 = never evaluate."""
    answers: int = Field(default=1, gt=0)
    """Responses per problem, averaged; 32 gives the avg@32 of the GSPO paper."""
    temperature: Temperature = Field(default=0.0, ge=0)
    """Sampling temperature of evaluations; 0 = greedy, otherwise at least 0.01."""


class Recipe(Section):
    """The recipe: all settings of one run."""

    run: RunSection = RunSection()
    placement: PlacementSection = PlacementSection()
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    reward: RewardSection = RewardSection()
    environment: EnvironmentSection | None = None
    agent: AgentSection | None = None
    cold_start: ColdStartSection | None = None
    batch: BatchSection = BatchSection()
    objective: ObjectiveSection = ObjectiveSection()
    critic: CriticSection = CriticSection()
    teacher: TeacherSection | None = None
    optimizer: OptimizerSection = OptimizerSection()
    trainer: TrainerSection = TrainerSection()
    rollout: RolloutSection
    weight_update: WeightUpdateSection = WeightUpdateSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    metrics: MetricsSection = MetricsSection()
    acknowledge: dict[str, str] = Field(default_factory=dict)
    """Warnings that this recipe accepts: code -> reason."""
    _arch: Architecture | None = PrivateAttr(None)

    @model_validator(mode="after")
    def an_agent_has_the_conversation(self) -> Recipe:
        check_conversation(self.agent, self.environment is not None, self.tokenizer.kind)
        return self

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.trainer.max_steps * self.batch.updates

    @property
    def requires_every_sequence(self) -> str:
        """Why no training pass may be left out although its gradient is 0; empty = it may."""
        if self.trainer.aux_loss_coefficient:
            return "the router's balancing loss has a gradient for every token"
        return self.objective.spec(self.rollout.max_answer_tokens).requires_every_sequence

    @property
    def skips_zero_gradients(self) -> bool:
        """Whether passes whose gradient is 0 are left out."""
        return self.trainer.skip_zero_gradients and not self.requires_every_sequence

    @property
    def skips_clipped(self) -> bool:
        """Whether backward passes are left out where the loss of whole sequences has no gradient."""
        return self.skips_zero_gradients and not self.keeps_every_gradient

    @property
    def keeps_every_gradient(self) -> str:
        """Why no backward pass of a sequence with an advantage is left out; empty = it may be."""
        if self.trainer.megatron.given().get("overlap_grad_reduce"):
            return "overlap_grad_reduce waits for the gradients of the last micro-batch"
        return self.objective.spec(self.rollout.max_answer_tokens).keeps_every_gradient

    @property
    def scores_old_policy(self) -> bool:
        """Whether a pass computes log-probs of the old weights. The first mini-batch's own pass gives them anyway."""
        objective = self.objective.spec(self.rollout.max_answer_tokens)
        return not self.skips_zero_gradients or bool(objective.requires_old_logprobs)

    @property
    def planned_evaluation(self) -> int:
        """Held-out problems of one evaluation; 0 = never evaluated. An estimate where `data.held_out_path` decides."""
        count, data = self.evaluation.problems, self.data
        return count if count is not None else max(data.held_out, int(data.held_out_path is not None))

    @property
    def arch(self) -> Architecture:
        """The typed architecture of `model`, which `models.resolve` fills in."""
        if self._arch is None:
            raise RuntimeError("this recipe has no typed architecture yet; load it through gspo_megatron.models")
        return self._arch

    def with_arch(self, arch: Architecture) -> Recipe:
        """Return a copy with this typed architecture. `model.architecture` becomes all of its fields."""
        model = self.model.model_copy(update={"architecture": arch.model_dump(mode="json")})
        recipe = self.model_copy(update={"model": model})
        recipe._arch = arch
        return recipe
