"""One rank of the critic's tests: an update of PPO in a layout, against transformers in float64 and the formulas."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.samples import build_samples
from gspo_megatron.models import load_recipe
from gspo_megatron.models.hf_table import hf_shapes
from gspo_megatron.policy import mesh
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import OptimizerSettings, Policy, Scored
from gspo_megatron.policy.weights import random_pieces
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer.batches import MiniBatch, TrainingMicroBatch
from gspo_megatron.trainer.metric_sums import reduce_sums
from gspo_megatron.trainer.step import Trainer
from gspo_megatron.types import SampleRef
from tests import reference
from tests.parallel.hf_model import build_oracle, gradients, read_whole
from tests.parallel.keep_double import KeepDouble
from tests.parallel.parity_worker import main_grad
from tests.parallel.signal_worker import ANSWERS, PROMPTS, REWARDS, references

SEED = 3
LR, HEAD_LR = 1e-3, 1e-2
HEAD = "value_head.weight"
Shift = Callable[[SampleRef], Tensor]
Place = tuple[int, int]
"""Prompt and sample of a response."""


@dataclass
class Oracle:
    """What one update must give."""

    values: dict[Place, Tensor]
    """[n] of every response before any update."""
    advantages: dict[Place, Tensor]
    """[n] after normalisation."""
    loss: float
    gradients: dict[str, Tensor]
    """Of every Hugging Face tensor and the head."""


def main() -> None:
    """Run every case of cases.json in one world; CASE.pt comes out of rank 0."""
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    device = mesh.start_world()
    oracles: dict[str, Oracle] = {}
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        found = run_case(directory / name, case, oracles, device)
        if dist.get_rank() == 0:
            torch.save(found, directory / f"{name}.pt")
    dist.barrier()


def run_case(directory: Path, case: dict[str, Any], oracles: dict[str, Oracle], device: torch.device) -> dict[str, Any]:
    """Distances of one layout."""
    batch = [f"batch.prompts={PROMPTS}", f"batch.answers={ANSWERS}", "batch.updates=2", "reward.bounds=[0, 1]"]
    shape = ["model.architecture.initializer_range=0.1", "trainer.micro_batch_tokens=64"]
    shape += [f"optimizer.lr={LR}", "optimizer.warmup_updates=0", f"critic.lr={HEAD_LR}"]
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), [*batch, *shape, *case["overrides"]])
    directory.mkdir(parents=True, exist_ok=True)
    policy = Policy(recipe, device, torch.float64 if case["double"] else None)
    policy.load(random_pieces(recipe.arch, SEED))
    for _, weight in policy.weights.critic.values():
        weight.data.copy_(head_weight(recipe))
    with KeepDouble() if case["double"] else nullcontext(), RunLog(directory, owns_terminal=False) as log:
        trainer = Trainer(recipe, directory, policy, None, log)
        untouched = leaves_the_head_alone(trainer)
        policy.start_optimizer(OptimizerSettings(LR, (0.9, 0.95), 1e-8, 0.1, clip_grad=0.0))
        refs = references(trainer, REWARDS["live"])
        key = " ".join(word for word in case["overrides"] if not word.startswith(("trainer.", "critic.warmup")))
        if key not in oracles:
            made = [make_oracle(recipe, trainer, refs) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(made, src=0)
            (oracles[key],) = [one for one in made if one is not None]
        wanted = oracles[key]
        scored = trainer.score_old_policy(refs)
        first, second = trainer.assign_advantages(refs, scored)
        values = largest_gap(policy, first, second, of_values, wanted.values)
        advantages = largest_gap(policy, first, second, lambda micro: micro.advantages, wanted.advantages)
        before = weights_of(policy)
        gradients = kept_gradients(policy)
        sums = [trainer.update(plant(first))]
        reduced = reduce_sums(sums, trainer._zero_sums)
        after = weights_of(policy)
    if dist.get_rank():
        return {}
    return {
        "values": values,
        "advantages": advantages,
        "loss": abs(float(reduced[0]["loss"]) - wanted.loss) / abs(wanted.loss),
        "gradients": {
            name: float((gradients[0][name].double() - tensor).norm() / tensor.norm())
            for name, tensor in wanted.gradients.items()
        },
        "clipped": float(reduced[0]["value_clipped"]),
        "moved": {name for name, tensor in after.items() if not torch.equal(tensor, before[name])},
        "untouched": untouched,
        "exported": set(after) - {HEAD} == set(hf_shapes(recipe.arch)),
    }


def leaves_the_head_alone(trainer: Trainer) -> bool:
    """Whether a phase that knows no critic (fine-tuning) runs, and gives the value head a gradient of 0."""
    policy = trainer.policy

    def loss(batch: MicroBatch, scored: Scored, _: int) -> tuple[Tensor, dict[str, Tensor]]:
        return -torch.where(batch.loss_mask, scored.logprobs, 0.0).sum(), {}

    policy.start_optimizer(OptimizerSettings(0.0, (0.9, 0.95), 1e-8, 0.0, clip_grad=0.0))
    policy.train(trainer.batcher.place_samples(trainer.batcher.probes()), loss, 0.0)
    return not any(bool(main_grad(weight).any()) for _, weight in policy.weights.critic.values())


def head_weight(recipe: Recipe) -> Tensor:
    """[H] float64, so large that values are about 1."""
    return torch.randn(recipe.arch.hidden_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 10


def drawn(ref: SampleRef, width: float, kind: int) -> Tensor:
    """[n] float64, of one response, by its place."""
    generator = torch.Generator().manual_seed(1000 * kind + 10 * ref.prompt_index + ref.sample_index)
    return width * torch.randn(ref.answer_length, generator=generator, dtype=torch.float64)


def ratio_shift(ref: SampleRef) -> Tensor:
    """[n] nats by which the log-probs are above the old ones: some ratios leave the band."""
    return drawn(ref, 0.2, 1)


def value_shift(ref: SampleRef) -> Tensor:
    """[n] by which the values are above the old ones: some leave the band."""
    return drawn(ref, 0.2, 2)


def make_oracle(recipe: Recipe, trainer: Trainer, refs: Sequence[SampleRef]) -> Oracle:
    """Each response alone through transformers' model; advantages and loss by their formulas."""
    arch, spec = recipe.arch, trainer.spec
    hf: Any = build_oracle(arch, read_whole(random_pieces(arch, SEED), arch))
    weight = head_weight(recipe).requires_grad_()
    answers: dict[SampleRef, reference.Response] = {}
    rows: dict[SampleRef, tuple[list[float], list[float]]] = {}
    for ref, sample in zip(refs, build_samples(refs, trainer.store, False), strict=True):
        ids = torch.as_tensor(sample.token_ids).long()
        states = hf.model(ids[None]).last_hidden_state[0][ref.prompt_length - 1 : -1]
        logp = hf.lm_head(states).log_softmax(-1).gather(1, ids[ref.prompt_length :, None])[:, 0]
        value = (states.detach() if recipe.critic.trunk == "detached" else states) @ weight
        rewards = [0.0] * (ref.answer_length - 1) + [ref.reward]
        rows[ref] = reference.generalized(rewards, value.tolist(), spec.gae_discount, spec.gae_decay)
        old, old_value = logp.detach() - ratio_shift(ref), value.detach() - value_shift(ref)
        answers[ref] = reference.Response(logp, old, old, value=value, old_value=old_value)
    normalised = reference.over_their_std([advantages for advantages, _ in rows.values()])
    for answer, (_, returns), advantages in zip(answers.values(), rows.values(), normalised, strict=True):
        answer.advantage = torch.tensor(advantages, dtype=torch.float64)
        answer.returns = torch.tensor(returns, dtype=torch.float64)
    trained = [answers[ref] for ref in refs if ref.prompt_index < PROMPTS // 2]
    loss = -reference.ppo(trained, spec.clip_low, spec.clip_high, spec.value_coefficient)
    loss.backward()
    assert weight.grad is not None
    return Oracle(
        {place(ref): answer.value.detach() for ref, answer in answers.items() if answer.value is not None},
        {place(ref): answer.advantage for ref, answer in answers.items()},
        loss.item(),
        {**gradients(arch, hf), HEAD: weight.grad},
    )


def place(ref: SampleRef) -> Place:
    return ref.prompt_index, ref.sample_index


def spread(batch: MicroBatch, refs: Sequence[SampleRef], of: Shift) -> tuple[Tensor, Tensor]:
    """[T_local] numbers of responses at their tokens, 0 elsewhere, and where they stand."""
    starts = batch.params.cu_seqlens_q.tolist()
    whole, held = torch.zeros(starts[-1], dtype=torch.float64), torch.zeros(starts[-1], dtype=torch.bool)
    for ref, start in zip(refs, starts, strict=False):
        first = start + ref.prompt_length - 1  # the last token of the prompt predicts the first of the response
        whole[first : first + ref.answer_length] = of(ref)
        held[first : first + ref.answer_length] = True
    return whole[batch.indices], held[batch.indices]


def plant(minibatch: MiniBatch[TrainingMicroBatch]) -> MiniBatch[TrainingMicroBatch]:
    """The mini-batch as if weights had moved: old log-probs and old values are shifted."""
    changed = []
    for micro in minibatch.micro_batches:
        if micro.old is not None and micro.old.values is not None:
            old = micro.old
            logprobs = old.logprobs - spread(micro.batch, micro.refs, ratio_shift)[0].to(old.logprobs.dtype)
            values = micro.old.values - spread(micro.batch, micro.refs, value_shift)[0].to(old.logprobs.dtype)
            micro = replace(micro, old=replace(old, logprobs=logprobs, values=values))
        changed.append(micro)
    return replace(minibatch, micro_batches=changed)


def of_values(micro: TrainingMicroBatch) -> Tensor:
    assert micro.old is not None and micro.old.values is not None
    return micro.old.values


def largest_gap(
    policy: Policy,
    first: MiniBatch[TrainingMicroBatch],
    second: MiniBatch[TrainingMicroBatch],
    found: Callable[[TrainingMicroBatch], Tensor],
    wanted: dict[Place, Tensor],
) -> float:
    """The largest absolute difference at a token of a response, over all ranks."""
    gap, count = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    for micro in [*first.micro_batches, *second.micro_batches] if policy.is_last_stage else []:
        numbers, held = spread(micro.batch, micro.refs, lambda ref: wanted[place(ref)])
        gap = torch.maximum(gap, torch.where(held, (found(micro) - numbers).abs(), 0.0).max())
        count += held.sum() * (policy.at.tensor == 0)
    dist.all_reduce(gap, dist.ReduceOp.MAX)
    dist.all_reduce(count)
    assert int(count) == sum(map(len, wanted.values()))
    return float(gap)


def kept_gradients(policy: Policy) -> list[dict[str, Tensor]]:
    """Takes the reduced gradients of every update, the head's too, on rank 0."""
    step, kept = policy.optimizer.step, list[dict[str, Tensor]]()

    def keep_and_step() -> Any:
        found = {name: grad.clone() for name, grad in policy.weights.export(2**20, main_grad)}
        kept.append(found | of_the_head(policy, main_grad))
        return step()

    policy.optimizer.step = keep_and_step
    return kept


def of_the_head(policy: Policy, number: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """A tensor of the value head, which every rank of the last stage holds and must hold alike; on every rank."""
    mine = [number(weight).detach().clone() for _, weight in policy.weights.critic.values()]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    found = [tensor for part in gathered for tensor in part]
    assert found and all(torch.equal(tensor, found[0]) for tensor in found), "replicas of the value head differ"
    return {HEAD: found[0]}


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """Every weight, whole, on rank 0; the head on every rank."""
    return {name: tensor.clone() for name, tensor in policy.export()} | of_the_head(policy, lambda weight: weight)


if __name__ == "__main__":
    main()
