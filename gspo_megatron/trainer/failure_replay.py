"""`gspo debug BUNDLE`: compute the loss of a failure dump again, and list tokens and sequences that stand out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gspo_megatron.config.objective_spec import ObjectiveSpec
from gspo_megatron.objective import BatchTotals, LossInputs, policy_loss

BUNDLE = "bundle.json"
SHOWN = 5
"""Most tokens and most sequences that are listed."""
READ = ("logprobs", "old_logprobs", "rollout_logprobs", "reference_logprobs", "values", "old_values", "returns")


def replay_bundle(directory: Path) -> str:
    """Examine a failure dump; returns the text to print.

    Raises:
        ValueError: the directory is no failure dump.
    """
    if not (directory / BUNDLE).is_file():
        raise ValueError(f"{directory} holds no {BUNDLE}; name a directory under alarms/ of a run")
    about = json.loads((directory / BUNDLE).read_text())
    spec, totals = ObjectiveSpec.model_validate(about["objective"]), BatchTotals(**about["totals"])
    lines = [f"update {about['update']}: {about['reason']}", spec.describe()]
    loss, faults, rows = 0.0, [], []
    for name, pack in micro_batches(directory, spec.has_token_advantages):
        faults += list(_nonfinite(name, pack))
        loss += _loss(spec, totals, pack)
        rows += list(_sequences(name, pack, spec.has_token_advantages))
    lines.append(f"loss {loss:.6g} over {totals.sequences} sequences with {totals.tokens} trained tokens")
    lines.append(f"{len(faults)} trained tokens without a finite log-prob" + (":" if faults else ""))
    lines += faults[:SHOWN]
    lines.append("sequences that moved furthest from the old policy:")
    lines += [text for _, text in sorted(rows, key=lambda row: -row[0])[:SHOWN]]
    lines += [f"{name} {value:.6g}" for name, value in about["metrics"].items() if "/" not in name]
    return "\n".join(lines)


def micro_batches(directory: Path, token_advantages: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, tensors) of every micro-batch, its context-parallel parts joined: those of the ranks that follow.

    Args:
        directory: the failure dump.
        token_advantages: whether its advantages are one a token.
    """
    files = sorted(directory.glob("rank_*.safetensors"))
    parts = [load_file(file) for file in files]
    for index in range(1 + max((int(name.split("/")[0]) for name in parts[0]), default=-1) if parts else 0):
        start = 0
        while start < len(files):
            end = start + int(parts[start][f"{index}/ranks"])
            mine = [_of(part, index) for part in parts[start:end]]
            yield f"{files[start].stem} micro-batch {index}", _join(mine, token_advantages)
            start = end


def _of(part: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {n.removeprefix(f"{index}/"): tensor for n, tensor in part.items() if n.startswith(f"{index}/")}


def _join(parts: list[dict[str, Tensor]], token_advantages: bool) -> dict[str, Tensor]:
    order = torch.cat([part["indices"] for part in parts]).argsort()
    whole = {"cu_seqlens": parts[0]["cu_seqlens"] * len(parts)}
    if not token_advantages:
        whole["advantages"] = parts[0]["advantages"]
    tokens = parts[0].keys() - whole.keys() - {"indices", "ranks"}
    return whole | {name: torch.cat([part[name] for part in parts])[order] for name in tokens}


def _loss(spec: ObjectiveSpec, totals: BatchTotals, pack: dict[str, Tensor]) -> float:
    """This micro-batch's share; NaN where a log-prob is not finite."""
    if any(True for _ in _nonfinite("", pack)):
        return float("nan")
    values: dict[str, Any] = {name: tensor for name, tensor in pack.items() if name != "targets"}
    values["logprobs"] = pack["logprobs"].requires_grad_()
    return float(
        policy_loss(spec, LossInputs(**values, totals=totals, token_advantages=spec.has_token_advantages)).loss
    )


def _nonfinite(name: str, pack: dict[str, Tensor]) -> Iterator[str]:
    for kind in READ:
        if kind in pack:
            for at in torch.nonzero(~torch.isfinite(pack[kind]) & pack["loss_mask"]).flatten().tolist():
                sequence = int((pack["cu_seqlens"] <= at).sum()) - 1
                token = at - int(pack["cu_seqlens"][sequence])
                target = int(pack["targets"][at])
                yield f"  {name}, sequence {sequence}, token {token} (id {target}): {kind} {float(pack[kind][at])}"


def _sequences(name: str, pack: dict[str, Tensor], token_advantages: bool) -> Iterator[tuple[float, str]]:
    starts = pack["cu_seqlens"].tolist()
    for sequence, (start, end) in enumerate(pairwise(starts)):
        trained = pack["loss_mask"][start:end]
        if trained.any():
            gap = (pack["logprobs"] - pack["old_logprobs"])[start:end][trained].detach().double()
            largest = int(gap.abs().argmax())
            advantages = pack["advantages"]
            advantage = advantages[start:end][trained].mean() if token_advantages else advantages[sequence]
            yield (
                abs(float(gap.mean())) if torch.isfinite(gap).all() else float("inf"),
                f"  {name}, sequence {sequence}: log s {float(gap.mean()):+.3e} over {len(gap)} tokens, advantage "
                f"{float(advantage):+.3g}, largest token ratio {float(gap[largest].exp()):.4g} "
                f"at trained token {largest}",
            )
