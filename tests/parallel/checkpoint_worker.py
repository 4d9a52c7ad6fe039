"""One rank of the checkpoint tests: save under one layout, go on under another, and compare with going on directly."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.data.packing import collate
from gspo_megatron.models import load_recipe
from gspo_megatron.parallel import Layout
from gspo_megatron.policy import mesh
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import OptimizerSettings, Policy, Scored
from gspo_megatron.policy.restore import SavedPolicy, restore
from gspo_megatron.policy.snapshot import MOMENTS, Snapshot, optimizer_steps, rank_file, stepped
from gspo_megatron.policy.weights import random_pieces
from tests.parallel.policy_batch import SLOTS, make_samples

SETTINGS = OptimizerSettings(1e-3, (0.9, 0.95), 1e-8, 0.01, 1.0)
State = dict[str, dict[str, Tensor]]


class SpreadPolicy(Policy):
    """With the distributed optimizer where there is no GPU, too."""

    _distributes_optimizer = True  # type: ignore[assignment]


def main() -> None:
    """Save every layout of cases.json, then load every pair; rank 0 writes its verdicts to verdicts.json."""
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    device = mesh.start_world()
    cases = json.loads((directory / "cases.json").read_text())
    for name, case in cases["save"].items():
        save(directory / name, make(case, device))
    verdicts = {}
    for pair in cases["load"]:
        source, name = pair
        verdicts[f"{source} -> {name}"] = go_on(directory / source, make(cases["layouts"][name], device))
    if dist.get_rank() == 0:
        (directory / "verdicts.json").write_text(json.dumps(verdicts))
    dist.barrier()


def make(case: dict, device: torch.device) -> Policy:
    """A policy with weights that no checkpoint holds."""
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), case["overrides"])
    policy = (SpreadPolicy if case["spread"] else Policy)(recipe, device)
    policy.load(random_pieces(recipe.arch, 99))
    policy.start_optimizer(SETTINGS)
    return policy


def save(directory: Path, policy: Policy) -> None:
    """Two steps, a checkpoint, one more step; what was saved and what came of it go to truth.pt."""
    policy.load(random_pieces(policy.recipe.arch, 3))
    train(policy, 2)
    directory.mkdir(exist_ok=True)
    snapshot = Snapshot()
    snapshot.take(policy)
    saved = gather(policy)
    steps = optimizer_steps(policy)
    norm = train(policy, 1)
    # Written only now: what the file holds must be what the copy held.
    snapshot.write(rank_file(directory, dist.get_rank()), "0a1b2c3d")
    after = gather(policy)
    if dist.get_rank() == 0:
        (directory / "layout.json").write_text(json.dumps(asdict(policy.layout)))
        torch.save({"saved": saved, "after": after, "norm": norm, "steps": steps}, directory / "truth.pt")
    dist.barrier()


def go_on(directory: Path, policy: Policy) -> dict[str, float]:
    """How far a policy that reads the checkpoint is from the one that wrote it, then and after the next step."""
    truth = torch.load(directory / "truth.pt", weights_only=True)
    layout = Layout(**json.loads((directory / "layout.json").read_text()))
    restore(policy, SavedPolicy(directory, policy.recipe.arch, layout), truth["steps"])
    found = gather(policy)
    norm = train(policy, 1)
    after = gather(policy)
    if dist.get_rank():
        return {}
    return {
        "restored": largest_gap(found, truth["saved"]),
        "norm": abs(norm / truth["norm"] - 1),
        "after": largest_gap({"value": after["value"]}, {"value": truth["after"]["value"]}),
        "after_moments": largest_gap(after, truth["after"]),
    }


def largest_gap(found: State, wanted: State) -> float:
    """Largest absolute difference over all tensors of all kinds."""
    assert found.keys() == wanted.keys()
    gaps = [0.0]
    for kind, tensors in wanted.items():
        assert found[kind].keys() == tensors.keys()
        gaps += [float((found[kind][name].double() - tensor.double()).abs().max()) for name, tensor in tensors.items()]
    return max(gaps)


def gather(policy: Policy) -> State:
    """Weights, what the optimizer steps and its moments, whole, under Hugging Face names; on rank 0."""
    runs = {id(run.weight): run for run in stepped(policy)}

    def of_kind(kind: str) -> Callable[[torch.nn.Parameter], Tensor]:
        wholes = {}
        for entry, weight in policy.weights.trained():
            whole = torch.zeros(weight.numel(), dtype=torch.float32)
            run = runs.get(id(weight))
            if run is not None:
                part = run.main if kind == "main" else run.optimizer.state[run.main][kind]
                whole[run.start : run.start + run.main.numel()] = part.detach().view(-1)
            if policy._distributes_optimizer:
                dist.all_reduce(whole, group=replicas(policy, entry.expert))
            wholes[id(weight)] = whole.view(weight.shape)
        return lambda parameter: wholes[id(parameter)]

    kinds = {"value": torch.Tensor.detach, **{kind: of_kind(kind) for kind in ("main", *MOMENTS)}}
    state = {kind: dict(policy.weights.export(2**20, of)) | of_the_head(policy, of) for kind, of in kinds.items()}
    return {kind: {name: tensor.clone() for name, tensor in tensors.items()} for kind, tensors in state.items()}


def of_the_head(policy: Policy, of: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """The same of the value head, where there is one."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {name: of(weight).clone() for name, (_, weight) in policy.weights.critic.items()})
    return {name: tensor for part in gathered for name, tensor in part.items()}


def replicas(policy: Policy, expert: bool) -> Any:
    """The ranks that step parts of one parameter."""
    from megatron.core import parallel_state

    if expert:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def train(policy: Policy, steps: int) -> float:
    """Optimizer steps of cross entropy on the fixed batch; the last gradient norm."""
    samples = make_samples(policy.recipe.arch.vocab_size)
    data = policy.layout.data
    mine = [SLOTS[i : i + data][policy.at.data] for i in range(0, len(SLOTS), data)]
    batches = policy.place([collate([samples[i] for i in members], policy.layout.pad_multiple) for members in mine])

    def loss(batch: MicroBatch, scored: Scored, _: int) -> tuple[Tensor, dict[str, Tensor]]:
        # A value head learns something, too.
        wanted = scored.logprobs if scored.values is None else scored.logprobs - (scored.values - 1).square()
        return -torch.where(batch.loss_mask, wanted, 0.0).sum() / 48, {}

    return [policy.train(batches, loss, 1e-3)[1] for _ in range(steps)][-1]


if __name__ == "__main__":
    main()
