"""The stages of a training step, as every trainer rank runs them. `loop.py` puts them in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.cluster.machines import takes_turns
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.samples import select, split
from gspo_megatron.data.store import SampleStore
from gspo_megatron.objective import (
    BatchTotals,
    LossInputs,
    finalize_step,
    group_advantages,
    group_metrics,
    policy_loss,
    runtime_warnings,
    shape_rewards,
)
from gspo_megatron.objective.summary import add_sums
from gspo_megatron.policy.instruments import RouterInstruments
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.offload import bytes_at_rest
from gspo_megatron.policy.policy import LossFunction, OptimizerSettings, Policy, Scored
from gspo_megatron.policy.reference import ReferenceWeights
from gspo_megatron.policy.replay import Routes
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer import failure_dump
from gspo_megatron.trainer.batches import Batcher, MiniBatch, divergence
from gspo_megatron.trainer.failure_dump import write_bundle
from gspo_megatron.transport.controller_client import ControllerClient, count_ready
from gspo_megatron.transport.weights.sender import WeightSender
from gspo_megatron.types import SampleRef

SAMPLE_DIRECTORY = "samples"


class Trainer:
    """One trainer rank: the policy, the way to the controller (rank 0 only) and the counters of the run."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, policy: Policy, controller: ControllerClient | None, log: RunLog
    ) -> None:
        self.recipe, self.policy, self.controller, self.log = recipe, policy, controller, log
        self.spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
        self.store = SampleStore(run_dir / SAMPLE_DIRECTORY)
        self.batcher = Batcher(recipe, policy, self.store)
        self.takes_turns = takes_turns(recipe)
        self.sender = WeightSender(policy.device, shares=not recipe.placement.rollout_nodes)
        self.routers = RouterInstruments(policy)
        self.reference: ReferenceWeights | None = None
        self.version = -1
        self.updates = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._trained_on: list[tuple[int, MiniBatch, list[Tensor]]] = []

    def objective_sentence(self) -> str:
        """The effective objective, as `objective.txt` and every checkpoint hold it."""
        batch = self.recipe.batch
        return self.spec.describe(batch.prompts * batch.answers // batch.updates, batch.updates)

    def on_first_rank(self, ask: Callable[[ControllerClient], Any]) -> Any:
        """What rank 0 hears from the controller, on every rank."""
        heard = [ask(self.controller) if self.controller is not None else None]
        dist.broadcast_object_list(heard, src=0)
        return heard[0]

    def start_reinforcement(self) -> None:
        """A fresh optimizer for the reinforcement learning phase."""
        wanted = self.recipe.optimizer
        self.policy.start_optimizer(
            OptimizerSettings(wanted.lr, wanted.betas, wanted.eps, wanted.weight_decay, wanted.clip_grad)
        )

    def wait_for_servers(self) -> None:
        """Wait until the controller and all its servers answer."""
        limit = self.recipe.rollout.start_timeout
        with self.log.time("start_servers"), self.log.progress("servers", self.recipe.rollout.servers) as bar:
            self.on_first_rank(lambda it: it.wait_ready(limit, lambda status: bar.update(count_ready(status))))

    def sync(self) -> None:
        """Bring the present weights to every server as a new version and prove that they arrived."""
        version = self.version + 1
        weights, layout = self.policy.weights, self.policy.layout
        parameters = {name: parameter.detach() for name, (_, parameter) in weights.parameters.items()}
        with self.log.time("sync"):
            if self.takes_turns:
                self.policy.offload_states()
            checksums = self.sender.update(self.controller, version, weights.arch, layout, parameters)
            probes = self.batcher.score_probes()
            if self.takes_turns:
                self.policy.offload()
                dist.barrier()  # the servers take memory for KV next, on every rank's device
            if self.controller is not None:
                report = self.controller.finish_update(version, checksums, probes)
                self.log.add({"canary_largest": report["largest"], "canary_mean": report["mean"]})
                self.log.add({name: report[name] for name in ("transfer_seconds", "received_over_needed")})
        self.version = version

    def take_over(self) -> None:
        """Where servers share the devices: they go to sleep, and the policy comes back from host memory."""
        if self.takes_turns:
            with self.log.time("take_over"):
                self.on_first_rank(lambda controller: controller.sleep())
                self.log.add(bytes_at_rest(self.policy.device))
                self.policy.restore()

    def rollout(self, step: int) -> list[SampleRef]:
        """The finished, scored groups of one rollout batch."""
        total = self.recipe.batch.prompts * self.recipe.batch.answers
        with self.log.time("rollout"), self.log.progress("rollout", total) as bar:
            answer = self.on_first_rank(lambda it: it.rollout(step, on_progress=lambda p: bar.update(p["done"])))
        refs, counts = answer["samples"], answer["accounting"]
        self.log.add({"rollout_tokens": answer["tokens"], **answer["measures"]})
        self.log.add({f"staleness_{name}": value for name, value in answer["staleness"].items()})
        self.log.add({"sampled_tokens": counts["sampled_tokens"], "carried_tokens": counts["carried"]["tokens"]})
        self.log.add({f"dropped_tokens/{reason}": gone["tokens"] for reason, gone in counts["dropped"].items()})
        self.take_over()
        return refs

    def prepare(self, refs: Sequence[SampleRef]) -> list[MiniBatch]:
        """Pack a rollout batch into optimizer steps and score each under the present and the reference weights."""
        with self.log.time("pack"):
            trained = self._trained(refs)
            kept = select(trained, np.zeros(len(trained)))
            self.log.add({f"dropped/{reason}": count for reason, count in kept.dropped.items()})
            parts = split(kept.refs, self.recipe.batch.updates)
            placed = [self.batcher.place_refs(part) for part in parts]
        prepared = []
        for part, (members, batches) in zip(parts, placed, strict=True):
            with self.log.time("old_logprobs"):
                # Scored on the very micro-batches that are trained on, so that the first ratio is exactly 1.
                old = self.policy.score(batches, records=True, routes=self._reported(batches))
                # Of tokens without a reported choice the routers' own is replayed.
                routes = self.policy.routing.recorded(len(batches))
                if self.spec.replay == "sampler":
                    self.routers.add_disagreement(batches)
                self.routers.add_load(batches, routes)
            totals = BatchTotals(len(part), sum(ref.trained_length for ref in part))
            reference = self._score_reference(batches)
            prepared.append(MiniBatch(members, batches, totals, old, routes, reference))
        return prepared

    def _reported(self, batches: Sequence[MicroBatch]) -> list[Routes] | None:
        """The sampler's routes, where they are to be replayed."""
        arch = self.recipe.arch
        reports = self.spec.replay == "sampler"
        return self.policy.routing.reported(batches, arch.num_experts_per_tok) if reports else None

    def keep_reference(self) -> None:
        """Take the present weights as the reference policy, where the objective asks for one."""
        if self.spec.kl != "none":
            self.reference = ReferenceWeights(self.policy.chunks)

    def _score_reference(self, batches: Sequence[MicroBatch]) -> list[Scored] | None:
        if self.reference is None:
            return None
        with self.log.time("reference"), self.reference.in_place():
            return self.policy.score(batches)

    def _trained(self, refs: Sequence[SampleRef]) -> list[SampleRef]:
        """Filtered answers count in their group's mean, so they leave only when the advantages are taken."""
        return [ref for ref in refs if self.spec.overlong != "filter" or ref.stop_reason != "length"]

    def weigh(self, refs: Sequence[SampleRef], minibatches: Sequence[MiniBatch]) -> list[MiniBatch]:
        """Give every sequence its group advantage."""
        spec, rewards = self.spec, torch.tensor([ref.reward for ref in refs], dtype=torch.float64)
        groups = torch.tensor([ref.prompt_index for ref in refs])
        self.log.add(group_metrics(rewards, groups))
        lengths = torch.tensor([ref.answer_length for ref in refs])
        truncated = torch.tensor([ref.stop_reason == "length" for ref in refs])
        longest = self.recipe.rollout.max_answer_tokens
        limits = torch.tensor([longest if ref.limit is None else ref.limit for ref in refs])
        shaped = shape_rewards(spec, rewards, lengths, truncated, limits).rewards
        if spec.kl != "none" and spec.kl_in == "reward":
            charged = divergence(spec, minibatches, self.policy.sum_over_context)
            charges = torch.tensor([charged.get((r.prompt_index, r.sample_index), 0.0) for r in refs]).double()
            shaped = shaped - charges
            self.log.add({"reference_charge": float(charges.mean())})
        values = group_advantages(shaped, groups, spec.advantage, spec.advantage_ddof, spec.advantage_eps)
        trained = self._trained(refs)
        self.log.add({"dropped/filtered": len(refs) - len(trained)} if len(trained) < len(refs) else {})
        by_ref = dict(zip(refs, values.tolist(), strict=True))
        kept = select(trained, [by_ref[ref] for ref in trained])
        value = dict(zip(kept.refs, kept.advantages.tolist(), strict=True))
        return [minibatch.with_advantages(value) for minibatch in minibatches]

    def update(self, minibatch: MiniBatch) -> list[dict[str, Any]]:
        """One optimizer step of the objective; returns this rank's metric sums."""
        section = self.recipe.optimizer
        self.updates += 1
        lr = section.lr * min(1.0, self.updates / max(1, section.warmup_updates))
        logprobs: list[Tensor] = []
        self._trained_on.append((self.updates, minibatch, logprobs))
        with self.log.time("train"):
            sums, norm, taken = self.policy.train(
                minibatch.micro_batches,
                self._objective(minibatch, logprobs),
                lr,
                routes=minibatch.routes,
                replays=self.spec.replay != "off",
            )
        self.routers.add_update(minibatch.micro_batches, minibatch.routes)
        self.probe_routers()
        self.log.add({"grad_norm": norm})
        if not taken:
            self.skipped += 1
            self._raise_alarm(f"the gradient norm is {norm}; the step is skipped on every rank", at=-1)
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > self.recipe.trainer.max_skipped:
            raise ValueError(
                f"{self.skipped_in_a_row} updates in a row had gradients that are not finite, trainer.max_skipped="
                f"{self.recipe.trainer.max_skipped}; look at them with `gspo debug`, then lower optimizer.lr or go on "
                "from an older checkpoint"
            )
        return (
            [{name: value.tolist() for name, value in entry.items()} for entry in sums]
            if self.policy.at.tensor == 0
            else []
        )

    def probe_routers(self) -> None:
        """Route a fixed batch under the present weights: what changed since the last call is the update's doing."""
        with self.log.time("probe"):
            self.routers.probe(self.policy.place([self.batcher.collate(self.batcher.probes())])[0])

    def _raise_alarm(self, reason: str, at: int) -> None:
        """Say it and keep the update that it is about: the step's first (0) or last one (-1)."""
        number, minibatch, logprobs = self._trained_on[at]
        about = {"reason": reason, "metrics": self.log.row()}
        kept = write_bundle(self.log.run_dir, self.policy, self.spec, number, minibatch, logprobs, about)
        self.log.say(f"update {number}: {reason}" + (f"; `gspo debug {kept}` tells more" if kept else ""))

    def _objective(self, minibatch: MiniBatch, logprobs: list[Tensor]) -> LossFunction:
        def loss(batch: MicroBatch, scored: Scored, index: int) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs.append(scored.logprobs.detach())
            old = minibatch.old[index].logprobs
            finite = torch.isfinite(scored.logprobs) & torch.isfinite(old) | ~batch.loss_mask
            inputs = LossInputs(
                logprobs=torch.where(finite, scored.logprobs, 0.0),
                old_logprobs=torch.where(finite, old, 0.0),
                rollout_logprobs=batch.rollout_logprobs,
                reference_logprobs=minibatch.reference[index].logprobs if minibatch.reference is not None else None,
                advantages=batch.advantages,
                loss_mask=batch.loss_mask,
                cu_seqlens=batch.cu_seqlens,
                totals=minibatch.totals,
                token_advantages=False,
            )
            out = policy_loss(self.spec, inputs, self.policy.sum_over_context)
            entropy = torch.where(batch.loss_mask & finite, scored.entropy, 0.0).sum(dtype=torch.float64)
            bad = out.metrics["nonfinite_tokens"] + (~finite).sum(dtype=torch.float64)
            # A gradient that is not finite is what skips the step on every rank.
            share = out.loss * torch.where(finite.all(), 1.0, float("nan"))
            return share, {**out.metrics, "nonfinite_tokens": bad, "token_entropy": entropy}

        return loss

    def reduce_metrics(self, sums: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Add the metric sums of all ranks, log them and say what they warn of.

        Args:
            sums: for each mini-batch this rank's sums of each micro-batch.
        """
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, sums)
        minibatches = [add_sums([entry for rank in gathered for entry in rank[index]]) for index in range(len(sums))]
        logged = finalize_step(minibatches)
        whole = add_sums(minibatches)
        logged["token_entropy"] = float(whole["token_entropy"]) / max(float(whole["tokens"]), 1.0)  # type: ignore[arg-type]
        self.log.add(logged | self.routers.reduce())
        self.log.add({"weight_version": self.version, "updates": self.updates, "skipped_updates": self.skipped})
        for finding in runtime_warnings(self.spec, self.log.row()):
            self.log.warn(finding)
            if finding.code in failure_dump.CODES:
                self._raise_alarm(finding.message, at=0)
        self._trained_on = []

    def evaluate(self, step: int) -> float:
        """Held-out accuracy under the weights of the servers."""
        section = self.recipe.evaluation
        problems = section.problems
        with self.log.time("evaluate"), self.log.progress("evaluate", problems) as bar:
            found = self.on_first_rank(
                lambda controller: controller.evaluate(
                    problems, section.answers, section.temperature, on_progress=lambda p: bar.update(p["done"])
                )
            )
        self.log.evaluation(step, found)
        return found["accuracy"]
