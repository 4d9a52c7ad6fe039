"""One rank of the parity runs: every case is a layout; its distances from the oracle go to results.json (rank 0)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.data.packing import PackedBatch, collate
from gspo_megatron.models import load_recipe
from gspo_megatron.objective import BatchTotals, LossInputs, ObjectiveSpec, policy_loss
from gspo_megatron.policy import mesh, weights
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.policy import LossFunction, OptimizerSettings, Policy, Scored
from tests.parallel import faults
from tests.parallel.keep_double import KeepDouble
from tests.parallel.policy_batch import (
    CLIP_HIGH,
    CLIP_LOW,
    PADDED_LENGTH,
    SEQUENCES,
    make_advantages,
    make_samples,
    packs_of,
)

SHARD_BYTES = 150_000
NO_CLIPPING = 0.0


LINEAR = 1e4
"""With so large an epsilon Adam's first step is the gradient times a constant, nearly."""


class SpreadPolicy(Policy):
    """With Megatron's distributed optimizer, which a recipe gets where there is a GPU."""

    _distributes_optimizer = True  # type: ignore[assignment]


def main() -> None:
    """Run every case of cases.json in one world."""
    directory = Path(sys.argv[1])
    weights.SHARD_BYTES = SHARD_BYTES
    device = mesh.start_world()
    results = []
    for case in json.loads((directory / "cases.json").read_text()):
        with faults.planted(case["fault"]):
            results += [run_case(case, dtype, directory, device) for dtype in case["forms"]]
        if dist.get_rank() == 0:
            (directory / "results.json").write_text(json.dumps(results))
    dist.barrier()


def run_case(case: dict[str, Any], dtype: str, directory: Path, device: torch.device) -> dict[str, Any]:
    """Distances of one layout in one type."""
    began = time.monotonic()
    double = dtype == "float64"
    with KeepDouble() if double else contextlib.nullcontext():
        recipe = load_recipe(Path("recipes/tiny_moe.yaml"), case["overrides"])
        policy = (SpreadPolicy if case["spread"] else Policy)(recipe, device, getattr(torch, dtype))
        oracle = torch.load(directory / f"{case['model']}.pt", weights_only=True)
        read = weights.safetensors_pieces(directory / case["model"], recipe.arch)
        found: dict[str, Any] = {"name": case["name"], "dtype": dtype, "fault": case["fault"]}
        for form in case["forms"][dtype]:
            policy.load(read)
            found[form] = compare_step(policy, oracle, form)
        policy.load(read)
        found["skipped"] = skips_what_is_not_finite(policy, oracle)
        found["adam"] = compare_adam(policy, oracle)
        policy.load(read)
        found["saved"] = compare_saved(policy, directory, case["model"], oracle["start"])
    found["seconds"] = time.monotonic() - began
    return found


def compare_step(policy: Policy, oracle: dict[str, Any], form: str) -> dict[str, Any]:
    """Loss, gradients and the weights after one SGD step of a batch that is packed or padded."""
    samples = make_samples(policy.weights.arch.vocab_size)
    layout = policy.layout
    least = 1 if form == "packed" else PADDED_LENGTH
    packs = packs_of(layout, policy.at)
    mine = [members for members, _ in packs]
    whole = [collate([samples[i] for i in m], math.lcm(least, layout.padding_of(n)), n) for m, n in packs]
    batches = policy.place(whole)
    margins: list[torch.Tensor] = []
    scored = policy.score(batches, margins=margins)
    shifts = [0.0]
    old = [place_old(oracle["old"], members, batch) for members, batch in zip(mine, whole, strict=True)]
    lr = start_plain_step(policy, oracle["sgd_lr"])
    values = make_advantages(policy.weights.arch.vocab_size)
    advantages = [torch.tensor([values[i] for i in members] or [0.0]).double().to(policy.device) for members in mine]
    sums, norm, _ = policy.train(batches, objective(policy, scored, old, advantages, shifts), lr)
    bits = collect_bits(policy, sums, norm)
    share = sum(float(entry["loss"]) for entry in sums) if policy.at.tensor == 0 else 0.0
    loss = over_ranks(share, dist.ReduceOp.SUM)
    stepped, worst = oracle["sgd"], None
    if isinstance(policy, SpreadPolicy):  # each replica keeps a part of the gradient: its step tells what it was
        gradients = oracle["gradients"]
        stepped = {
            name: t.double() - lr * gradients[name] / (gradients[name].abs() + LINEAR)
            for name, t in oracle["start"].items()
        }
    else:
        worst = compare_tensors(policy, oracle["gradients"], main_grad)
    return {
        "loss": abs(loss - oracle["loss"]) / oracle["scale"],
        "gradient": worst,
        "norm": abs(norm / oracle["norm"] - 1),
        "sgd": compare_tensors(policy, stepped, torch.Tensor.detach),
        "margin": over_ranks(min((float(gaps.min()) for gaps in margins), default=math.inf), dist.ReduceOp.MIN),
        "shift": over_ranks(max(shifts), dist.ReduceOp.MAX),
        "bits": bits,
    }


def collect_bits(policy: Policy, sums: list[dict[str, torch.Tensor]], norm: float) -> list[dict[str, Any]]:
    """[ranks] digests of gradients and of stepped weights, with this rank's metric sums; for two commits to compare."""
    parameters = [parameter for _, (_, parameter) in sorted(policy.weights.parameters.items())]
    mine = {
        "norm": norm,
        "gradients": digest(main_grad(parameter) for parameter in parameters),
        "weights": digest(parameter.detach() for parameter in parameters),
        "metrics": [{name: float(value) for name, value in entry.items() if value.numel() == 1} for entry in sums],
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def digest(tensors: Iterator[torch.Tensor]) -> str:
    """Of the bytes of tensors in their order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def objective(
    policy: Policy, scored: list[Scored], old: list[torch.Tensor], advantages: list[torch.Tensor], shifts: list[float]
) -> LossFunction:
    """The share of a micro-batch under the paper's objective."""
    totals = BatchTotals(sum(trained > 0 for _, trained in SEQUENCES), sum(trained for _, trained in SEQUENCES))
    spec = ObjectiveSpec.preset("gspo").replace(clip_low=CLIP_LOW, clip_high=CLIP_HIGH)

    def loss(batch: MicroBatch, now: Scored, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs = now.logprobs.detach()
        shifts.append(float((logprobs - scored[index].logprobs).abs().max()))
        inputs = LossInputs(
            logprobs=now.logprobs,
            old_logprobs=old[index][batch.indices.cpu()].to(logprobs),
            advantages=advantages[index],
            loss_mask=batch.loss_mask,
            cu_seqlens=batch.cu_seqlens,
            totals=totals,
            token_advantages=False,
        )
        out = policy_loss(spec, inputs, batch.share.sum)
        return out.loss, {**out.metrics, "loss": out.loss.detach().double()}

    return loss


def place_old(old: list[torch.Tensor], members: list[int], batch: PackedBatch) -> torch.Tensor:
    """[T] the old log-probs at the trained targets of a pack."""
    placed = torch.zeros(len(batch.token_ids), dtype=torch.float64)
    for row, member in enumerate(members):
        size, trained = SEQUENCES[member]
        first = int(batch.cu_seqlens[row]) + size - trained - 1
        placed[first : first + trained] = old[member]
    return placed


def skips_what_is_not_finite(policy: Policy, oracle: dict[str, Any]) -> bool:
    """Whether one rank's gradient that is not a number leaves the weights of all ranks alone."""
    samples = make_samples(policy.weights.arch.vocab_size)
    share = [collate([samples[0]], policy.layout.pad_multiple)] * max(2, policy.layout.pipeline)
    rotten = policy.at.data == policy.layout.data - 1

    def loss(_: MicroBatch, now: Scored, __: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return now.logprobs.sum() * (math.nan if rotten else 1.0), {}

    start_plain_step(policy, 1.0)
    _, _, taken = policy.train(policy.place(share), loss, 1.0)
    return not taken and compare_tensors(policy, oracle["start"], torch.Tensor.detach).get("worst", 0.0) == 0.0


def compare_adam(policy: Policy, oracle: dict[str, Any]) -> dict[str, Any]:
    """The weights after one Adam step of the optimizer, given the oracle's gradient."""
    policy.start_optimizer(OptimizerSettings(1e-2, (0.9, 0.95), 1e-8, 0.1, NO_CLIPPING))
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    for entry, parameter in policy.weights.parameters.values():
        for piece in entry.pieces:
            wanted = oracle["gradients"][piece.tensor][slice(*piece.rows)]
            wanted = wanted if piece.columns is None else wanted[:, slice(*piece.columns)]
            main_grad(parameter)[slice(*piece.at)].copy_(wanted)
    policy.optimizer.step()
    return compare_tensors(policy, oracle["adam"], torch.Tensor.detach)


def compare_saved(policy: Policy, directory: Path, model: str, start: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Whether loading, exporting and saving gives back the files that were loaded: bit for bit, index included."""
    exact = True
    for name, tensor in policy.export():
        exact = exact and torch.equal(tensor.cpu(), start[name].to(tensor.dtype))
    saved = directory / "saved"
    if next(policy.chunks[0].parameters()).dtype is torch.float32:
        policy.save(saved)
        if dist.get_rank() == 0:
            files = sorted(path.name for path in (directory / model).glob("model*"))
            exact = exact and files == sorted(path.name for path in saved.glob("model*"))
            exact = exact and all((saved / f).read_bytes() == (directory / model / f).read_bytes() for f in files)
    return {"exact": exact}


def start_plain_step(policy: Policy, lr: float) -> float:
    """An optimizer whose step shows the size of a gradient, in place of Adam; returns its learning rate.

    Megatron's plain gradient descent, or, where the replicas share the states, Adam with a large epsilon.
    """
    if isinstance(policy, SpreadPolicy):
        policy.start_optimizer(OptimizerSettings(lr * LINEAR, (0.9, 0.95), LINEAR, 0.0, NO_CLIPPING))
        return lr * LINEAR
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="sgd",
        lr=0.0,
        sgd_momentum=0.0,
        weight_decay=0.0,
        clip_grad=NO_CLIPPING,
        params_dtype=policy.config.params_dtype,
    )
    policy.optimizer = get_megatron_optimizer(config, policy.chunks, use_gloo_process_groups=False)
    return lr


def compare_tensors(
    policy: Policy, wanted: Mapping[str, torch.Tensor], values: Callable[[torch.nn.Parameter], torch.Tensor]
) -> dict[str, Any]:
    """The tensor that is farthest off, relative to its norm; names are compared too. Rank 0 knows."""
    off: dict[str, float] = {}
    exported: Iterator[tuple[str, torch.Tensor]] = policy.weights.export(2**22, values)
    for name, tensor in exported:
        off[name] = float((tensor.cpu().double() - wanted[name]).norm() / wanted[name].norm())
    if dist.get_rank():
        return {}
    assert off.keys() == wanted.keys(), sorted(off.keys() ^ wanted.keys())
    # A distance that is not a number is the worst of all.
    worst = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name])
    return {"worst": off[worst], "name": worst}


def main_grad(parameter: Any) -> torch.Tensor:
    """What Megatron gathers a parameter's gradient in."""
    return parameter.main_grad


def over_ranks(value: float, operation: Any) -> float:
    """The smallest, the largest or the sum of a number over all ranks."""
    held = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(held, operation)
    return float(held)


if __name__ == "__main__":
    main()
