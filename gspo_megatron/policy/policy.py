"""The Megatron policy of one rank: score, train, export. Every method is a collective over all trainer ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.packing import PackedBatch
from gspo_megatron.parallel import layout_of
from gspo_megatron.policy import mesh
from gspo_megatron.policy.chunk_pass import ChunkPass
from gspo_megatron.policy.gradients import wrap_chunks
from gspo_megatron.policy.head import HeadOutput
from gspo_megatron.policy.layer_outputs import seams_of
from gspo_megatron.policy.microbatch import MicroBatch, place
from gspo_megatron.policy.model import assert_settings, build_chunks
from gspo_megatron.policy.offload import Residence
from gspo_megatron.policy.optimizer import CRITIC, OptimizerSettings, make_optimizer
from gspo_megatron.policy.replay import Routes, Routing
from gspo_megatron.policy.surviving_training import SurvivingTraining
from gspo_megatron.policy.weights import ReadPiece, ShardedWeights, save_hf
from gspo_megatron.policy.zero_backward import ZeroBackward


@dataclass(frozen=True, slots=True)
class Scored:
    """The head's output for one micro-batch; it exists on the last pipeline stage only."""

    logprobs: Tensor
    """[T_local] float32, of each position's target."""
    entropy: Tensor
    """[T_local] float32, nats."""
    values: Tensor | None = None
    """[T_local] float32, of the critic: of the state before each position's target."""


LossFunction = Callable[[MicroBatch, Scored, int], tuple[Tensor, dict[str, Tensor]]]
"""(micro-batch, head output, its index) -> (this rank's share of the loss, metric sums)."""


class Policy:
    """A model over the trainer ranks."""

    def __init__(self, recipe: Recipe, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.recipe, self.device = recipe, device
        self.layout = layout_of(recipe.trainer, dist.get_world_size())
        self._shares = mesh.build_groups(self.layout)
        self.at = self.layout.coordinates(dist.get_rank())
        torch.manual_seed(recipe.run.seed)  # importing megatron sets a seed of its own
        tensor_parallel.model_parallel_cuda_manual_seed(recipe.run.seed)
        bare = build_chunks(recipe, device, dtype)
        self.config = bare[0].config
        self._layers = seams_of(recipe, bare)
        assert_settings(self.config, recipe.trainer)
        self.weights = ShardedWeights(recipe.arch, self.layout, dist.get_rank(), bare)
        self.routing = Routing(bare, recipe.arch.num_experts, self.at.tensor, self.layout.tensor)
        self.chunks: list[Any] = wrap_chunks(bare, self.config, recipe.trainer, self._distributes_optimizer)
        self.optimizer: Any = None
        self._residence = Residence()
        self._gate: ZeroBackward | None = None
        self.temperature = recipe.rollout.temperature

    @property
    def _distributes_optimizer(self) -> bool:
        return self.recipe.trainer.distributed_optimizer and torch.cuda.is_available()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes log-probs and the loss."""
        return self.at.pipeline == self.layout.pipeline - 1

    def load(self, read: ReadPiece) -> None:
        """Fill the weights from pieces of Hugging Face tensors."""
        self.weights.load(read)
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def start_optimizer(self, settings: OptimizerSettings) -> None:
        """A fresh optimizer over the present weights; an earlier phase's states are dropped."""
        self.optimizer = make_optimizer(settings, self.config, self.chunks, self._distributes_optimizer)

    def offload_states(self) -> None:
        """Move what only training needs to host memory. Scoring and exporting still work."""
        self._residence.offload_states(self.optimizer, self.chunks)

    def offload(self) -> None:
        """Move everything to host memory, so that servers can use this device."""
        self.offload_states()
        self._residence.offload_weights(self.chunks)

    def restore(self) -> None:
        """Undo `offload`."""
        self._residence.restore(self.chunks)

    def read(self, tensor: Tensor) -> Tensor:
        """Values of a weight or an optimizer state, on the device or in host memory."""
        return self._residence.read(tensor)

    def place(self, batches: Sequence[PackedBatch]) -> list[MicroBatch]:
        """This rank's part of each packed batch of its data-parallel rank."""
        whole = self.layout.context
        return [place(batch, self._shares[batch.ranks or whole], self.device) for batch in batches]

    def score(
        self,
        batches: Sequence[MicroBatch],
        *,
        records: bool = False,
        routes: Sequence[Routes] | None = None,
        margins: list[Tensor] | None = None,
    ) -> list[Scored]:
        """Log-probs of every micro-batch at the sampling temperature, without gradients; last pipeline stage only.

        Args:
            batches: this rank's micro-batches.
            records: keep the choice of experts: `routing.recorded`.
            routes: of each micro-batch, chosen again.
            margins: see `Routing.run`.
        """

        def keep(_: MicroBatch, scored: Scored, __: int) -> tuple[Tensor, dict[str, Any]]:
            return scored.logprobs.sum(), {"scored": scored}

        # The interleaved schedule takes micro-batches in groups of PP; the padding of the last group is dropped.
        group = self.layout.pipeline if self.layout.virtual > 1 else 1
        spare = -len(batches) % group
        filled = [*batches, *[batches[-1]] * spare]
        routes = None if routes is None else [*routes, *[routes[-1]] * spare]
        choices = self.routing.run(filled, trains=False, routes=routes, replays=True, records=records, margins=margins)
        with torch.no_grad(), choices:
            results = self._run(filled, keep, forward_only=True)
        return [result["scored"] for result in results[: len(batches)]]

    def probe(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Log-probs of a pack at temperature 1, and how far the routing of its sequences is from a tie.

        Every data-parallel rank passes the same pack, and every rank gets the result.

        Returns:
            [T] of every token, and [S] of every sequence the smallest gap, over its tokens and all layers, between the
            last chosen and the first rejected router logit; infinite when dense.
        """
        (placed,) = self.place([batch])
        self.temperature = 1.0
        found: list[Tensor] = []
        scored = self.score([placed], margins=found)
        self.temperature = self.recipe.rollout.temperature
        logprobs = torch.zeros(len(batch.token_ids), dtype=torch.float64, device=self.device)
        if scored and self.at.tensor == self.at.data == 0:
            logprobs[placed.indices] = scored[0].logprobs.double()
        gaps, rows = torch.full_like(logprobs, torch.inf), self.routing.of_this_rank(placed.indices)
        for margins in found:
            gaps[rows] = torch.minimum(gaps[rows], margins.double())
        dist.all_reduce(logprobs)
        dist.all_reduce(gaps, dist.ReduceOp.MIN)
        lengths = torch.as_tensor(batch.cu_seqlens).diff().tolist()
        return logprobs, torch.stack([part.min() for part in gaps.split(lengths)])

    def train(
        self,
        batches: Sequence[MicroBatch],
        loss: LossFunction,
        lr: float,
        routes: Sequence[Routes | None] | None = None,
        replays: bool = False,
        records: bool = False,
        skips: bool = False,
        critic_lr: float | None = None,
    ) -> tuple[list[dict[str, Tensor]], float, bool]:
        """One optimizer step.

        Args:
            batches: this rank's micro-batches; every rank passes the same number.
            loss: returns this rank's share; the shares of all ranks and micro-batches add up to the loss.
            lr: learning rate of this step.
            routes: recorded routes of each micro-batch; choices that differ from them are counted.
            replays, records: whether the routers choose the recorded experts again; as in `score`.
            skips: leave out backward passes whose gradient is 0; the loss must reach the model by log-probs only.
            critic_lr: of the value head; None = `lr`.

        Returns:
            Metric sums of each micro-batch (last stage only), global gradient norm before clipping, whether the step
            was taken (a gradient that is not finite skips it on every rank).
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        narrows = skips and self._layers is not None
        records |= narrows
        with self.routing.run(batches, trains=not narrows, routes=routes, replays=replays, records=records):
            sums = self._survivors(batches, loss) if narrows else self._run(batches, loss, False, skips)
        for group in self.optimizer.param_groups:
            group["lr"] = critic_lr if critic_lr is not None and group.get(CRITIC) else lr
        self.optimizer.prepare_grads()  # the norm is read where the optimizer steps, not where the buffers are
        norm = self.optimizer.get_grad_norm()
        if not torch.isfinite(torch.as_tensor(norm)):
            return sums, float(norm), False
        self.optimizer.step()
        return sums, float(norm), True

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Whole Hugging Face tensors on rank 0, none on other ranks; every rank must exhaust the iterator."""
        return self.weights.export(self.recipe.weight_update.bucket_mib * 2**20)

    def save(self, directory: Path, key: str = "run.directory", complete: Callable[[Path], None] | None = None) -> None:
        """Write a Hugging Face directory, under another name until it is complete.

        Args:
            directory, key, complete: as of `save_hf`; `key` names the directory that it lies in.

        Raises:
            RecipeError: on rank 0, a place that is not ours or cannot be written.
        """
        tensors = self.export()
        if dist.get_rank() == 0:
            save_hf(tensors, self.weights.arch.to_hugging_face(self.recipe.model.dtype), directory, key, complete)
        for _ in tensors:
            pass
        dist.barrier()

    def _survivors(self, batches: Sequence[MicroBatch], loss: LossFunction) -> list[dict[str, Any]]:
        def share(index: int, head: HeadOutput) -> tuple[Tensor, dict[str, Any]]:
            found, sums = loss(batches[index], Scored(head.logprobs, head.entropy), index)
            return self.scale_share(found, 1) * self.layout.context, sums

        finalize = self.config.finalize_model_grads_func
        assert self._layers is not None and finalize is not None
        training = SurvivingTraining(self.chunks[0], self._layers, self.routing, self._new_pass)
        sums = training.run(batches, self.layout.tensor, share)
        finalize(self.chunks, None)
        return sums

    def _new_pass(self, batch: MicroBatch, known: HeadOutput | None = None) -> ChunkPass:
        chunk = self.recipe.trainer.head_chunk_tokens
        return ChunkPass(batch, self.temperature, chunk, self.config.sequence_parallel, known)

    def _run(
        self, batches: Sequence[MicroBatch], loss: LossFunction, forward_only: bool, skips: bool = False
    ) -> list[dict[str, Any]]:
        gate = self._gate = ZeroBackward(self.routing.skip) if skips else None
        schedule = get_forward_backward_func()
        iterators: list[Any] = [iter(enumerate(batches)) for _ in self.chunks]
        with contextlib.nullcontext() if gate is None else gate.around():
            return schedule(
                forward_step_func=partial(self._forward, loss=loss, num_microbatches=len(batches)),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(batches),
                seq_length=1,  # the true lengths travel with the activations (variable_seq_lengths)
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _forward(
        self,
        iterator: Iterator[tuple[int, MicroBatch]],
        model: torch.nn.Module,
        *,
        loss: LossFunction,
        num_microbatches: int,
    ) -> tuple[Tensor, Callable[[Any], tuple[Tensor, dict[str, Any]]]]:
        index, batch = next(iterator)
        chunk, one = self.chunks.index(model), self._new_pass(batch)
        with self.routing.forward(chunk, index):
            output = one.run(model)
        if self._gate is not None:
            self._gate.note(output, chunk)

        def finish(logprobs: Tensor) -> tuple[Tensor, dict[str, Any]]:
            values = one.values[0] if one.values else None
            share, sums = loss(batch, Scored(logprobs, one.found[0].entropy, values), index)
            if values is not None:
                # A phase without a critic's loss (fine-tuning) leaves the head out, and the reduction of gradients that
                # overlaps with the backward pass waits for every weight.
                share = share + 0 * torch.nan_to_num(values).sum().to(share.dtype)
            share = self.scale_share(share, num_microbatches)
            return share if self._gate is None else self._gate.cut_loss(share, logprobs, chunk), sums

        return output, finish

    def scale_share(self, share: Tensor, num_microbatches: int) -> Tensor:
        """Turn a share of the loss into what Megatron's schedule and data-parallel reduction expect.

        The schedule multiplies by CP and divides by the number of micro-batches (`schedules.forward_step_calc_loss`),
        the gradient reduction divides by DP * CP; what is left to undo is num_microbatches * DP.
        """
        return share * (num_microbatches * self.layout.data)
