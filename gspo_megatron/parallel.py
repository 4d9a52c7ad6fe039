"""Which rank holds what: the coordinates and the layers of every trainer rank, as plain arithmetic.

Equal to megatron-core's `RankGenerator` with its default order `tp-cp-ep-dp-pp`; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.config.trainer_section import TrainerSection


@dataclass(frozen=True, slots=True)
class Coordinates:
    """The position of one rank in each dimension of the layout."""

    tensor: int
    """Position among the tensor-parallel ranks; fastest varying."""
    context: int
    """Position among the context-parallel ranks."""
    data: int
    """Position among the data-parallel ranks."""
    pipeline: int
    """Pipeline stage; slowest varying."""
    expert_tensor: int
    """Position among the ranks that share one expert."""
    expert: int
    """Position among the expert-parallel ranks."""
    expert_data: int
    """Position among the replicas of one expert."""


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `most`."""
    return tuple(2**power for power in range(most.bit_length()))


@dataclass(frozen=True, slots=True)
class Layout:
    """The parallel layout of the policy."""

    world: int
    """Trainer ranks."""
    tensor: int = 1
    """TP; sequence parallelism is on whenever it is above 1."""
    pipeline: int = 1
    """PP stages."""
    virtual: int = 1
    """Model chunks a stage."""
    context: int = 1
    """CP; with `dynamic` the most ranks that share a sequence."""
    expert: int = 1
    """EP."""
    expert_tensor: int = 1
    """ETP."""
    first_stage_layers: int | None = None
    """Layers of the first stage when uneven."""
    last_stage_layers: int | None = None
    """Layers of the last stage when uneven."""
    dynamic: bool = False
    """Whether a pack may be shared by fewer context-parallel ranks: 1, 2, 4, ... consecutive ones."""
    context_exchange: str = "p2p"
    """How the ranks that share a pack meet all its keys and values: `p2p`, `all_gather`, `a2a`, `a2a+p2p`."""
    inner_context: int = 1
    """Of `a2a+p2p`: consecutive context-parallel ranks that exchange heads."""

    @property
    def data(self) -> int:
        """Data-parallel ranks of the attention side."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def pad_multiple(self) -> int:
        """Each sequence that all context-parallel ranks share is padded to a multiple of this."""
        return self.padding_of(self.context)

    def padding_of(self, ranks: int) -> int:
        """A sequence that so many ranks share is padded to a multiple of this: 2 chunks a rank, divisible over TP."""
        return (2 * ranks if ranks > 1 else 1) * self.tensor

    @property
    def context_sizes(self) -> tuple[int, ...]:
        """How many ranks may share a pack, rising."""
        return powers_of_two(self.context) if self.dynamic else (self.context,)

    def head_ranks(self, ranks: int) -> int:
        """Of so many ranks that share a pack, how many consecutive ones exchange heads, so that each has whole ones."""
        return {"a2a": ranks, "a2a+p2p": min(ranks, self.inner_context)}.get(self.context_exchange, 1)

    @property
    def expert_data(self) -> int:
        """Replicas of each expert."""
        return self.world // (self.expert * self.expert_tensor * self.pipeline)

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a global rank."""
        stage_ranks = self.world // self.pipeline
        within, pipeline = rank % stage_ranks, rank // stage_ranks
        rest = within // self.tensor
        expert_rest = within // self.expert_tensor
        return Coordinates(
            tensor=within % self.tensor,
            context=rest % self.context,
            data=rest // self.context,
            pipeline=pipeline,
            expert_tensor=within % self.expert_tensor,
            expert=expert_rest % self.expert,
            expert_data=expert_rest // self.expert,
        )

    def stage_sizes(self, num_layers: int) -> list[int]:
        """Layers of each pipeline stage.

        Raises:
            ValueError: layers that do not divide; the message has the numbers and the fix.
        """
        sizes: list[int | None] = [None] * self.pipeline
        if self.first_stage_layers is not None:
            sizes[0] = self.first_stage_layers
        if self.last_stage_layers is not None:
            sizes[-1] = self.last_stage_layers
        free = sizes.count(None)
        left = num_layers - sum(size for size in sizes if size is not None)
        if left < free or (free and left % free) or (not free and left):
            raise ValueError(
                f"{num_layers} layers over pipeline_parallel={self.pipeline} leave {left % free if free else left}; "
                "set first_stage_layers and last_stage_layers"
            )
        filled = [size if size is not None else left // free for size in sizes]
        for stage, size in enumerate(filled):
            self._chunks(stage, size)
        return filled

    def chunk_sizes(self, num_layers: int) -> list[list[int]]:
        """Layers of each model chunk, a list a stage.

        Raises:
            ValueError: as `stage_sizes`.
        """
        return [self._chunks(stage, size) for stage, size in enumerate(self.stage_sizes(num_layers))]

    def _chunks(self, stage: int, size: int) -> list[int]:
        """Divide a stage. If need be the embedding counts as a layer of the first chunk, the head of the last."""
        if size % self.virtual == 0:
            return [size // self.virtual] * self.virtual
        beside = {0: "embedding", self.pipeline - 1: "head"}.get(stage)
        whole, rest = divmod(size + 1, self.virtual)
        if beside is None or rest or whole == 1:
            counted = f", nor does {size + 1} with the {beside} counted as one" if beside else ""
            raise ValueError(
                f"a stage of {size} layers does not divide by virtual_pipeline={self.virtual}{counted}; "
                "choose a divisor"
            )
        short = 0 if stage == 0 else self.virtual - 1
        return [whole - (chunk == short) for chunk in range(self.virtual)]

    def layers(self, num_layers: int, stage: int, chunk: int = 0) -> range:
        """Global layer numbers, from 0, of one model chunk of one stage (interleaved order)."""
        sizes = self.chunk_sizes(num_layers)
        before = sum(one[number] for one in sizes for number in range(chunk))
        start = before + sum(one[chunk] for one in sizes[:stage])
        return range(start, start + sizes[stage][chunk])


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below the value."""
    return -(-value // multiple) * multiple


def layout_of(trainer: TrainerSection, world: int) -> Layout:
    """The layout of a recipe on `world` ranks."""
    given = trainer.megatron.given()
    return Layout(
        world=world,
        tensor=trainer.tensor_parallel,
        pipeline=trainer.pipeline_parallel,
        virtual=trainer.virtual_pipeline or 1,
        context=trainer.context_parallel,
        dynamic=trainer.dynamic_context_parallel,
        context_exchange=given.get("cp_comm_type", "p2p"),
        inner_context=(given.get("hierarchical_context_parallel_sizes") or (1,))[0],
        expert=trainer.expert_parallel,
        expert_tensor=trainer.expert_tensor_parallel,
        first_stage_layers=trainer.first_stage_layers,
        last_stage_layers=trainer.last_stage_layers,
    )
