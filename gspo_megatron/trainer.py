"""The stages of a training step, as every trainer rank runs them. `loop.py` puts them in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.packing import PackedBatch, collate, pack
from gspo_megatron.data.samples import build_samples, select, split
from gspo_megatron.data.store import SampleStore
from gspo_megatron.metrics import RunLog
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
from gspo_megatron.policy.microbatch import MicroBatch, pad_multiple
from gspo_megatron.policy.policy import LossFunction, OptimizerSettings, Policy, Scored
from gspo_megatron.rollout.link import ControllerLink
from gspo_megatron.rollout.sender import WeightSender
from gspo_megatron.types import Sample, SampleRef

SAMPLE_DIRECTORY = "samples"


Probe = tuple[list[int], list[float]]
"""Token ids and the trainer's log-probs of all but the first."""


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """What one optimizer step trains on."""

    micro_batches: list[MicroBatch]
    """This rank's, as many as every other rank's."""
    totals: BatchTotals
    """Denominators over all ranks."""
    old: list[Scored]
    """Log-probs under the weights at the start of the rollout batch, one entry a micro-batch; last stage only."""


class Trainer:
    """One trainer rank: the policy, the way to the controller (rank 0 only) and the counters of the run."""

    def __init__(self, recipe: Recipe, run_dir: Path, policy: Policy, link: ControllerLink | None, log: RunLog) -> None:
        self.recipe, self.policy, self.link, self.log = recipe, policy, link, log
        self.spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
        self.store = SampleStore(run_dir / SAMPLE_DIRECTORY)
        self.sender = WeightSender(policy.device)
        self.version = -1
        self.updates = 0
        self.skipped = 0

    def objective_sentence(self) -> str:
        """The effective objective, as `objective.txt` and every checkpoint hold it."""
        batch = self.recipe.batch
        return self.spec.describe(batch.prompts * batch.answers // batch.updates, batch.updates)

    def on_first_rank(self, ask: Callable[[ControllerLink], Any]) -> Any:
        """What rank 0 hears from the controller, on every rank."""
        heard = [ask(self.link) if self.link is not None else None]
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
            self.on_first_rank(lambda link: link.wait_ready(limit, lambda status: bar.update(count_ready(status))))

    def sync(self) -> None:
        """Bring the present weights to every server as a new version and prove that they arrived."""
        version = self.version + 1
        weights, layout = self.policy.weights, self.policy.layout
        parameters = {name: parameter.detach() for name, (_, parameter) in weights.parameters.items()}
        with self.log.time("sync"):
            checksums = self.sender.update(self.link, version, weights.arch, layout, parameters)
            probes = self._score_probes()
            if self.link is not None:
                report = self.link.finish_update(version, checksums, probes)
                self.log.add({"canary_largest": report["largest"], "canary_mean": report["mean"]})
                self.log.add({name: report[name] for name in ("transfer_seconds", "received_over_needed")})
        self.version = version

    def _score_probes(self) -> list[Probe]:
        """Fixed probes and the trainer's log-probs; of twice as many, the ones farthest from a router tie."""
        section, arch = self.recipe.weight_update, self.recipe.model.architecture
        assert arch is not None
        generator = np.random.default_rng(self.recipe.run.seed)
        scored = []
        for _ in range(2 * section.canary_prompts):
            token_ids = generator.integers(0, arch.vocab_size, section.canary_tokens).astype(np.int32)
            logprobs, margin = self.policy.probe(self._collate([_untrained(token_ids)]))
            scored.append((margin, (token_ids.tolist(), logprobs[: len(token_ids) - 1].tolist())))
        scored.sort(key=lambda entry: -entry[0])
        return [probe for _, probe in scored[: section.canary_prompts]]

    def rollout(self, step: int) -> list[SampleRef]:
        """The finished, scored groups of one rollout batch."""
        total = self.recipe.batch.prompts * self.recipe.batch.answers
        with self.log.time("rollout"), self.log.progress("rollout", total) as bar:
            answer = self.on_first_rank(lambda link: link.rollout(step, on_progress=lambda p: bar.update(p["done"])))
        refs = answer["samples"]
        self.log.add(
            {"rollout_tokens": answer["tokens"], "answer_length": float(np.mean([ref.answer_length for ref in refs]))}
        )
        self.log.add({"truncated": float(np.mean([ref.stop_reason == "length" for ref in refs]))})
        return refs

    def advantages(self, refs: Sequence[SampleRef]) -> Tensor:
        """[N] float64 group advantages of a rollout batch."""
        rewards = torch.tensor([ref.reward for ref in refs], dtype=torch.float64)
        groups = torch.tensor([ref.prompt_index for ref in refs])
        self.log.add(group_metrics(rewards, groups))
        spec = self.spec
        lengths = torch.tensor([ref.answer_length for ref in refs])
        truncated = torch.tensor([ref.stop_reason == "length" for ref in refs])
        shaped = shape_rewards(spec, rewards, lengths, truncated, self.recipe.rollout.max_answer_tokens)
        return group_advantages(shaped.rewards, groups, spec.advantage, spec.advantage_ddof, spec.advantage_eps)

    def mini_batches(self, refs: Sequence[SampleRef], advantages: Tensor) -> list[MiniBatch]:
        """Pack a rollout batch into optimizer steps and score each under the present weights."""
        with self.log.time("pack"):
            # Filtered answers count in their group's mean, so they leave only after the advantages are taken.
            trained = [self.spec.overlong != "filter" or ref.stop_reason != "length" for ref in refs]
            self.log.add({"dropped/filtered": trained.count(False)} if not all(trained) else {})
            kept = select(list(compress(refs, trained)), advantages.numpy()[trained])
            self.log.add({f"dropped/{reason}": count for reason, count in kept.dropped.items()})
            value = dict(zip(kept.refs, kept.advantages.tolist(), strict=True))
            parts = split(kept.refs, self.recipe.batch.updates)
            packed = [self._pack([ref.prompt_length + ref.answer_length for ref in part]) for part in parts]
            placed = [
                [self._place(part, [value[ref] for ref in part], members) for members in mine]
                for part, mine in zip(parts, packed, strict=True)
            ]
        with self.log.time("old_logprobs"):
            # Scored on the very micro-batches that are trained on, so that the first ratio is exactly 1.
            return [
                MiniBatch(
                    batches, BatchTotals(len(part), sum(ref.answer_length for ref in part)), self.policy.score(batches)
                )
                for part, batches in zip(parts, placed, strict=True)
            ]

    def update(self, minibatch: MiniBatch) -> list[dict[str, Any]]:
        """One optimizer step of the objective; returns this rank's metric sums."""
        section = self.recipe.optimizer
        self.updates += 1
        lr = section.lr * min(1.0, self.updates / max(1, section.warmup_updates))
        with self.log.time("train"):
            sums, norm, taken = self.policy.train(minibatch.micro_batches, self._objective(minibatch), lr)
        self.log.add({"grad_norm": norm})
        if not taken:
            self.skipped += 1
            self.log.say(f"update {self.updates}: the gradient norm is {norm}; the step is skipped on every rank")
        return (
            [{name: value.tolist() for name, value in entry.items()} for entry in sums]
            if self.policy.at.tensor == 0
            else []
        )

    def _objective(self, minibatch: MiniBatch) -> LossFunction:
        def loss(batch: MicroBatch, scored: Scored, index: int) -> tuple[Tensor, dict[str, Tensor]]:
            inputs = LossInputs(
                logprobs=scored.logprobs,
                old_logprobs=minibatch.old[index].logprobs,
                rollout_logprobs=batch.rollout_logprobs,
                advantages=batch.advantages,
                loss_mask=batch.loss_mask,
                cu_seqlens=batch.cu_seqlens,
                totals=minibatch.totals,
                token_advantages=False,
            )
            out = policy_loss(self.spec, inputs, self.policy.sum_over_context)
            entropy = torch.where(batch.loss_mask, scored.entropy, 0.0).sum(dtype=torch.float64)
            return out.loss, {**out.metrics, "token_entropy": entropy}

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
        self.log.add(logged)
        self.log.add({"weight_version": self.version, "updates": self.updates, "skipped_updates": self.skipped})
        for finding in runtime_warnings(self.spec, self.log.row()):
            self.log.warn(finding)

    def evaluate(self, step: int) -> float:
        """Held-out accuracy under the weights of the servers."""
        section = self.recipe.evaluation
        problems = section.problems
        with self.log.time("evaluate"), self.log.progress("evaluate", problems) as bar:
            found = self.on_first_rank(
                lambda link: link.evaluate(
                    problems, section.answers, section.temperature, on_progress=lambda p: bar.update(p["done"])
                )
            )
        self.log.evaluation(step, found)
        return found["accuracy"]

    def _pack(self, lengths: Sequence[int]) -> list[list[int]]:
        """Members of each of this data-parallel rank's micro-batches."""
        layout, multiple = self.policy.layout, pad_multiple(self.policy.layout)
        padded = [-(-length // multiple) * multiple for length in lengths]
        slots = pack(
            padded,
            cost=self._cost,
            num_ranks=layout.data,
            max_tokens=self.recipe.trainer.micro_batch_tokens,
            ranks_per_expert_group=max(1, layout.expert * layout.expert_tensor // (layout.tensor * layout.context)),
        )
        # The interleaved schedule takes micro-batches in groups of PP; empty ones fill the last group.
        group = layout.pipeline if layout.virtual > 1 else 1
        slots += [[[] for _ in range(layout.data)] for _ in range(-len(slots) % group)]
        return [slot[self.policy.at.data] for slot in slots]

    def _cost(self, length: int) -> float:
        """FLOPs of a sequence up to a factor: linear in its tokens, and attention's square of them."""
        arch = self.recipe.model.architecture
        assert arch is not None
        width = 8 * arch.hidden_size + 6 * arch.num_experts_per_tok * arch.moe_intermediate_size
        return length * (arch.hidden_size * width + arch.num_attention_heads * arch.head_dim * length)

    def _place(self, refs: Sequence[SampleRef], advantages: Sequence[float], members: Sequence[int]) -> MicroBatch:
        samples = build_samples([refs[i] for i in members], [advantages[i] for i in members], self.store)
        return self.policy.place([self._collate(samples)])[0]

    def _collate(self, samples: Sequence[Sample]) -> PackedBatch:
        return collate(samples, pad_multiple(self.policy.layout))

    def place_samples(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """Pack samples that are at hand (fine-tuning) and place this rank's share."""
        mine = self._pack([len(sample.token_ids) for sample in samples])
        return self.policy.place([self._collate([samples[i] for i in members]) for members in mine])


def _untrained(token_ids: np.ndarray) -> Sample:
    """A sequence that is only scored."""
    ref = SampleRef("", 0, 0, len(token_ids), 0, 0.0, "stop", ())
    nothing = np.zeros(len(token_ids))
    return Sample(token_ids, nothing.astype(bool), nothing.astype(np.float32), 0.0, ref)


def count_ready(status: dict[str, Any]) -> int:
    """Servers that answered their health check, by the controller's status."""
    return sum(not fault for fault in status["servers"].values()) if status["phase"] == "idle" else 0
