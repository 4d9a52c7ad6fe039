"""The stages of a training step, as every trainer rank runs them. `loop.py` puts them in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.cluster.machines import takes_turns
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.log_ratios import write_log_ratios
from gspo_megatron.data.model_directory import write_tokenizer
from gspo_megatron.data.store import SampleStore
from gspo_megatron.models.weight_format import form_of
from gspo_megatron.objective import Sums, add_sums, finalize_step, runtime_warnings
from gspo_megatron.policy.instruments import RouterInstruments
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.offload import bytes_at_rest
from gspo_megatron.policy.policy import OptimizerSettings, Policy, Scored
from gspo_megatron.policy.reference import ReferenceWeights
from gspo_megatron.run_dir import RunDir
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer import failure_dump, response_advantages
from gspo_megatron.trainer.batches import Batcher, MiniBatch, ScoredMicroBatch, TrainingMicroBatch, charge_divergence
from gspo_megatron.trainer.critic_advantages import with_critic_advantages
from gspo_megatron.trainer.distilled_advantages import with_teacher_advantages
from gspo_megatron.trainer.failure_dump import TrainedUpdate, write_dump
from gspo_megatron.trainer.metric_sums import TOKEN_ENTROPY, count_left_out, reduce_sums, zero_sums
from gspo_megatron.trainer.old_policy import OldPolicy
from gspo_megatron.trainer.trained_responses import choose_trained
from gspo_megatron.trainer.trained_tokens import trained_responses
from gspo_megatron.trainer.training_loss import make_loss
from gspo_megatron.transport.controller_client import ControllerClient
from gspo_megatron.transport.messages import EvaluationRequest, RolloutRequest
from gspo_megatron.transport.update_messages import UpdateCheck
from gspo_megatron.transport.weights.sender import WeightSender
from gspo_megatron.types import SampleRef


class Trainer:
    """One trainer rank: the policy, the connection to the controller (rank 0 only) and the counters of the run."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, policy: Policy, controller: ControllerClient | None, log: RunLog
    ) -> None:
        self.recipe, self.policy, self.controller, self.log = recipe, policy, controller, log
        self.spec = recipe.objective.spec(recipe.rollout.max_answer_tokens)
        self.store = SampleStore(RunDir(run_dir).samples)
        self.batcher = Batcher(recipe, policy, self.store)
        self.takes_turns = takes_turns(recipe)
        shares = not recipe.placement.rollout_nodes
        self.sender = WeightSender(policy.device, shares=shares, fp8=form_of(recipe).fp8)
        self.routers = RouterInstruments(policy)
        self.old = OldPolicy(recipe, policy, self.routers)
        self.reference: ReferenceWeights | None = None
        self.version = -1
        self.updates = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._zero_sums = zero_sums(self.spec, policy.device)
        self._trained_on: list[TrainedUpdate] = []

    def objective_sentence(self) -> str:
        """The effective objective, as `objective.txt` and every checkpoint hold it."""
        batch = self.recipe.batch
        return self.spec.describe(batch.prompts * batch.answers // batch.updates, batch.updates)

    def on_first_rank[T](self, call: Callable[[ControllerClient], T]) -> T:
        """Make a call of the controller on rank 0; its result on every rank."""
        results: list[T] = [call(self.controller)] if self.controller is not None else cast("list[T]", [None])
        dist.broadcast_object_list(results, src=0)
        return results[0]

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
            self.on_first_rank(lambda it: it.wait_ready(limit, lambda status: bar.update(status.ready_servers)))

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
                check = UpdateCheck(version=version, checksums=tuple(checksums), probes=tuple(probes))
                self.log.add(self.controller.finish_update(check).metrics())
        self.version = version

    def export(self, directory: Path) -> None:
        """Write the weights as a model that one can chat with."""
        self.policy.save(directory, complete=self._add_tokenizer)

    def _add_tokenizer(self, directory: Path) -> None:
        try:
            write_tokenizer(self.recipe, self.log.run_dir.tokenizer, directory)
        except RecipeError as error:  # the weights are worth more than what goes beside them
            for finding in error.findings:
                self.log.warn(finding)

    def reclaim_devices(self) -> None:
        """Where servers share the devices: put them to sleep and move the policy back from host memory."""
        if self.takes_turns:
            with self.log.time("take_over"):
                self.on_first_rank(lambda controller: controller.sleep())
                self.log.add(bytes_at_rest(self.policy.device))
                self.policy.restore()

    def rollout(self, step: int) -> list[SampleRef]:
        """The finished, scored groups of one rollout batch."""
        total = self.recipe.batch.prompts * self.recipe.batch.answers
        with self.log.time("rollout"), self.log.progress("rollout", total) as bar:
            request = RolloutRequest(step=step)
            batch = self.on_first_rank(lambda it: it.rollout(request, on_progress=lambda p: bar.update(p.done)))
        self.log.add(batch.metrics())
        self.reclaim_devices()
        return list(batch.samples)

    def score_old_policy(self, refs: Sequence[SampleRef]) -> list[MiniBatch[ScoredMicroBatch]]:
        """Pack a rollout batch into mini-batches and score each under the old and the reference weights."""
        with self.log.time("pack"):
            parts, dropped = choose_trained(self.recipe, self.spec, refs)
            self.log.add({f"dropped/{reason}": count for reason, count in dropped.items()})
            silent = response_advantages.responses_left_out(self.recipe, self.spec, refs, parts)
            placed = [self.batcher.place_refs([ref for ref in part if ref not in silent]) for part in parts]
        minibatches = []
        for number, (part, (members, batches)) in enumerate(zip(parts, placed, strict=True)):
            with self.log.time("old_logprobs"):
                old = self.old.score(batches, is_first=number == 0)
            totals = response_advantages.count(part)
            left_out = response_advantages.count([ref for ref in part if ref in silent])
            scores = (old.routes, old.is_routed, old.logprobs, self._reference(batches))
            micro_batches = [ScoredMicroBatch(*values) for values in zip(members, batches, *scores, strict=True)]
            minibatches.append(MiniBatch(micro_batches, totals, left_out, number == 0, self.version))
        return minibatches

    def keep_reference(self) -> None:
        """Keep the present weights as the reference policy, where the objective has one."""
        if self.spec.kl != "none":
            self.reference = ReferenceWeights(self.policy.chunks)

    def _reference(self, batches: Sequence[MicroBatch]) -> Sequence[Scored | None]:
        """Log-probs of each micro-batch under the reference policy; None without one."""
        if self.reference is None:
            return [None] * len(batches)
        with self.log.time("reference"), self.reference.in_place():
            return self._each(self.policy.score(batches), batches)

    def _each(self, scored: list[Scored], batches: Sequence[MicroBatch]) -> Sequence[Scored | None]:
        """One entry a micro-batch; None off the last stage, where there are no log-probs."""
        return scored if self.policy.is_last_stage else [None] * len(batches)

    def assign_advantages(
        self, refs: Sequence[SampleRef], minibatches: Sequence[MiniBatch[ScoredMicroBatch]]
    ) -> list[MiniBatch[TrainingMicroBatch]]:
        """Give every sequence its group advantage, or every token its critic's or its teacher's.

        Whole groups count, whatever was left out of training.
        """
        spec = self.spec
        self.log.add(response_advantages.reward_metrics(self.recipe, refs))
        shaped = response_advantages.shaped_rewards(self.recipe, spec, refs)
        if spec.kl != "none" and spec.kl_in == "reward":
            charged = charge_divergence(spec, minibatches)
            charges = torch.tensor([charged.get((r.prompt_index, r.sample_index), 0.0) for r in refs]).double()
            shaped = shaped - charges
            self.log.add({"reference_charge": float(charges.mean())})
        if spec.has_teacher:
            return with_teacher_advantages(minibatches, self.store)
        if spec.has_critic:
            return with_critic_advantages(spec, minibatches, dict(zip(refs, shaped.tolist(), strict=True)), self.policy)
        advantages = response_advantages.advantages_of(spec, refs, shaped)
        return [one.with_advantages(advantages) for one in minibatches]

    def update(self, minibatch: MiniBatch[TrainingMicroBatch]) -> Sums | None:
        """One optimizer step of the objective.

        Returns:
            This rank's metric sums over its micro-batches; None on a rank that counts nothing.
        """
        self.updates += 1
        each, total = self.recipe.batch.updates, self.recipe.total_updates
        lr, critic_lr = self.recipe.critic.learning_rates(self.recipe.optimizer, self.updates, total, each)
        logprobs: list[Tensor] = []
        clipped: list[Tensor] = []
        values: list[Tensor] = []
        self._trained_on.append(TrainedUpdate(self.updates, minibatch, logprobs, clipped, values))
        batches = [micro.batch for micro in minibatch.micro_batches]
        routes = [micro.routes for micro in minibatch.micro_batches]
        fresh = [index for index, micro in enumerate(minibatch.micro_batches) if not micro.is_routed]
        with self.log.time("train"):
            sums, norm, taken = self.policy.train(
                batches,
                make_loss(self.spec, minibatch, logprobs, clipped, values),
                lr,
                routes=routes,
                replays=self.spec.replay != "off",
                records=bool(fresh),
                skips=self.recipe.skips_clipped,
                critic_lr=critic_lr,
            )
        if fresh:
            self.routers.add_load(batches, self.policy.routing.recorded(len(batches)))
        if self.spec.replay == "sampler" and minibatch.is_first:
            self.routers.add_disagreement(batches, fresh)
        self.routers.add_update(batches, routes)
        self.probe_routers()
        self.log.add({"grad_norm": norm, "learning_rate": lr})
        if not taken:
            self.skipped += 1
            self._dump_failure(f"the gradient norm is {norm}; the step is skipped on every rank", self._trained_on[-1])
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > self.recipe.trainer.max_skipped:
            raise ValueError(
                f"{self.skipped_in_a_row} updates in a row had gradients that are not finite, trainer.max_skipped="
                f"{self.recipe.trainer.max_skipped}; look at them with `gspo debug`, then lower optimizer.lr or go on "
                "from an older checkpoint"
            )
        # The tensor-parallel ranks of a stage compute the same loss: the first one counts.
        if not sums or self.policy.at.tensor:
            return None
        return {**add_sums(sums), **count_left_out(minibatch.left_out, self.policy)}

    def probe_routers(self) -> None:
        """Route a fixed batch under the present weights: what changed since the last call is the update's doing."""
        with self.log.time("probe"):
            self.routers.probe(self.policy.place([self.batcher.collate(self.batcher.probes())])[0])

    def _dump_failure(self, reason: str, update: TrainedUpdate) -> None:
        """Say what is wrong with an update and keep it for `gspo debug`."""
        about = {"reason": reason, "metrics": self.log.row()}
        kept = write_dump(self.log.run_dir, self.policy, self.spec, update, about)
        self.log.say(f"update {update.number}: {reason}" + (f"; `gspo debug {kept}` tells more" if kept else ""))

    def reduce_metrics(self, sums: Sequence[Sums | None]) -> None:
        """Reduce the metric sums over all ranks, log what they become and print their warnings.

        Args:
            sums: of each mini-batch, from `update`.
        """
        minibatches = reduce_sums(sums, self._zero_sums)
        whole = add_sums(minibatches)
        entropy = float(whole[TOKEN_ENTROPY]) / max(float(whole["tokens"]), 1.0)
        self.log.add(finalize_step(minibatches) | {TOKEN_ENTROPY: entropy} | self.routers.reduce() | self.old.reduce())
        self.log.add({"weight_version": self.version, "updates": self.updates, "skipped_updates": self.skipped})
        for finding in runtime_warnings(self.spec, self.log.row()):
            self.log.warn(finding)
            if finding.code in failure_dump.CODES:
                self._dump_failure(finding.message, self._trained_on[0])

    def keep_log_ratios(self, step: int) -> None:
        """Store what the passes of a step said of its responses, while the servers sample the next ones."""
        with self.log.time("log_ratios"):
            rows = [row for update in self._trained_on for row in trained_responses(update)]
            if rows and not self.policy.at.tensor:
                write_log_ratios(self.store.directory, step, dist.get_rank(), rows)
        self._trained_on = []

    def evaluate(self, step: int) -> float:
        """Held-out accuracy under the weights of the servers."""
        section = self.recipe.evaluation
        with self.log.time("evaluate"), self.log.progress("evaluate", self.recipe.planned_evaluation) as bar:
            request = EvaluationRequest(
                problems=section.problems, answers=section.answers, temperature=section.temperature
            )
            report = self.on_first_rank(lambda it: it.evaluate(request, lambda p: bar.update(p.done, p.total)))
        self.log.evaluation(step, report.model_dump())
        return report.accuracy
