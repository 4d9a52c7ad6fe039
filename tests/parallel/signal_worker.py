"""One rank of the signal tests: the same updates with and without the passes whose gradient is 0."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gspo_megatron.models import load_recipe
from gspo_megatron.objective import finalize_step
from gspo_megatron.policy import head, mesh
from gspo_megatron.policy.policy import OptimizerSettings, Policy
from gspo_megatron.policy.weights import random_pieces
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer.batches import MiniBatch, TrainingMicroBatch
from gspo_megatron.trainer.metric_sums import reduce_sums
from gspo_megatron.trainer.step import Trainer
from gspo_megatron.types import SampleRef
from tests.parallel.keep_double import KeepDouble
from tests.parallel.recorded import record
from tests.parallel.replay_worker import gradient_of

PROMPTS, ANSWERS = 8, 4
REWARDS: dict[str, Sequence[Sequence[float]]] = {
    "mixed": [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0.5, 1, 0.5], [0, 0, 0, 0], [0, 1, 1, 1]] + 2 * [[0] * 4],
    "first mini-batch silent": [[1] * 4] * 4 + [[0, 1, 1, 0]] * 4,
    "second mini-batch silent": [[0, 1, 0, 0]] * 4 + [[1] * 4] * 4,
    "all silent": [[1] * 4] * 8,
    "live": [[1, 0, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0], [0] * 4, [0, 1, 1, 0]],
}
"""Rewards of every group; the batch is cut into two updates of four groups."""
CLIPPED: dict[str, Callable[[SampleRef], bool]] = {
    "none": lambda _: False,
    "odd": lambda ref: ref.sample_index % 2 == 1,
    "two prompts": lambda ref: ref.prompt_index in (4, 7),
    "all but one": lambda ref: (ref.prompt_index, ref.sample_index) != (5, 2),
    "all": lambda _: True,
}
"""Responses of the second update that are put outside of the band before it."""
FAR = 1.0
"""Nats by which a planted log s lies beyond any band."""


def main() -> None:
    """Run every case of cases.json in one world; CASE.pt comes out of rank 0."""
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    device = mesh.start_world()
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        found = {
            way: run_case(directory / name / way, case, skips, device) for way, skips in (("plain", 0), ("ours", 1))
        }
        if dist.get_rank() == 0:
            torch.save(found, directory / f"{name}.pt")
    dist.barrier()


def run_case(directory: Path, case: dict[str, Any], skips: int, device: torch.device) -> dict[str, Any]:
    """Gradients and metrics of both updates, and how many forward passes a token took."""
    batch = [f"batch.prompts={PROMPTS}", f"batch.answers={ANSWERS}", "batch.updates=2", "reward.bounds=[0, 1]"]
    shape = ["model.architecture.initializer_range=0.1", "trainer.micro_batch_tokens=64", "optimizer.lr=1e-3"]
    overrides = [*batch, *shape, f"trainer.skip_zero_gradients={'true' if skips else 'false'}", *case["overrides"]]
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), overrides)
    directory.mkdir(parents=True, exist_ok=True)
    policy = Policy(recipe, device, torch.float64 if case["double"] else None)
    policy.load(random_pieces(recipe.arch, 3))
    gradients: list[dict[str, torch.Tensor]] = []
    # megatron and the head compute some numbers in float32 whatever the weights are.
    with KeepDouble() if case["double"] else nullcontext(), RunLog(directory, owns_terminal=False) as log:
        trainer = Trainer(recipe, directory, policy, None, log)
        # Megatron clips no float64 gradient on a CPU.
        policy.start_optimizer(OptimizerSettings(1e-3, (0.9, 0.95), 1e-8, 0.1, clip_grad=0.0))
        step_optimizer(policy, gradients)
        refs = references(trainer, REWARDS[case["rewards"]])
        score, asked = policy.score, list[int]()
        policy.score = lambda batches, **named: asked.extend([len(batches)] * bool(named)) or score(batches, **named)
        scored = trainer.score_old_policy(refs)
        policy.score = score
        first, second = trainer.assign_advantages(refs, scored)
        minibatches = [first, plant(second, CLIPPED[case["clipped"]])]
        with counted(policy) as passes:
            sums = [trainer.update(minibatch) for minibatch in minibatches]
        reduced = reduce_sums(sums, trainer._zero_sums)
        metrics = finalize_step(reduced) | trainer.routers.reduce()
    trained = [len(micro.batch.token_ids) for one in minibatches for micro in one.micro_batches if micro.refs]
    tokens = torch.tensor(sum(trained))
    dist.all_reduce(tokens)
    return {
        "gradients": gradients, "metrics": metrics, "row": log.row(), "losses": [float(s["loss"]) for s in reduced],
        "tokens": int(tokens), "updates": trainer.updates, "passes": passes, "asked": asked,
        "weights": dict(policy.export()) if dist.get_rank() == 0 else list(policy.export()) and {},
    }  # fmt: skip


def plant(minibatch: MiniBatch[TrainingMicroBatch], clipped: Callable[[SampleRef], bool]) -> Any:
    """The mini-batch with old log-probs that put some sequences outside of the band, on the side that stops them."""
    changed = []
    for micro in minibatch.micro_batches:
        if micro.old is not None and micro.refs:
            far = [FAR if clipped(ref) else 0.0 for ref in micro.refs]
            shift = torch.tensor(far, dtype=torch.float64) * micro.advantages.sign()
            lengths = micro.batch.cu_seqlens.diff().long()
            old = micro.old.logprobs - shift.repeat_interleave(lengths).to(micro.old.logprobs.dtype)
            micro = replace(micro, old=replace(micro.old, logprobs=old))
        changed.append(micro)
    return replace(minibatch, micro_batches=changed)


@contextmanager
def counted(policy: Policy) -> Iterator[dict[str, int]]:
    """Over all ranks: tokens that go back through the head, and that layers compute with gradients."""
    found, gradient = torch.zeros(2, dtype=torch.int64), head._gradient_of_logits
    passes: dict[str, int] = {}

    def count_head(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        found[0] += len(logits)
        return gradient(logits, *rest)

    def count_layer(*_: Any, hidden_states: torch.Tensor, **__: Any) -> None:
        found[1] += len(hidden_states) if torch.is_grad_enabled() else 0

    layers = [layer for chunk in policy.chunks for layer in chunk.module.decoder.layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: count_layer(*args, **kwargs), with_kwargs=True)
        for layer in layers
    ]
    head._gradient_of_logits = count_head
    try:
        yield passes
    finally:
        head._gradient_of_logits = gradient
        for hook in hooks:
            hook.remove()
    dist.all_reduce(found)
    passes.update(head=int(found[0]), layers=int(found[1]))


def step_optimizer(policy: Policy, kept: list[dict[str, torch.Tensor]]) -> None:
    """Keep the reduced gradients of every update."""
    step = policy.optimizer.step

    def keep_and_step() -> Any:
        kept.append({name: grad.clone() for name, grad in policy.weights.export(2**20, gradient_of)})
        return step()

    policy.optimizer.step = keep_and_step


def references(trainer: Trainer, rewards: Sequence[Sequence[float]]) -> list[SampleRef]:
    """The recorded responses with the rewards of the case, on every rank."""
    refs: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [record(trainer.store, prompt, sample) for prompt in range(PROMPTS) for sample in range(ANSWERS)]
        refs = [[replace(ref, reward=float(rewards[ref.prompt_index][ref.sample_index])) for ref in found]]
    dist.broadcast_object_list(refs, src=0)
    return refs[0]


if __name__ == "__main__":
    main()
