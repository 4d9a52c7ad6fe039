"""What a checkpoint holds of one rank's policy: its weights and its optimizer, as plain tensors.

Layout-bound: a rank reads back exactly what it wrote, so the run must go on with the same layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.policy.policy import Policy


def policy_state(policy: Policy) -> dict[str, Any]:
    """Weights by name and, for every optimizer, its settings and what it keeps of each of its parameters."""
    trained = {id(parameter) for _, parameter in _named_tensors(policy)}
    return {
        "weights": {name: tensor.detach().cpu() for name, tensor in _named_tensors(policy)},
        "optimizers": [_optimizer_state(optimizer, trained) for optimizer in _optimizers(policy)],
    }


def restore_policy(policy: Policy, state: dict[str, Any]) -> None:
    """Put back what `policy_state` gave. The policy's optimizer must have been started.

    Raises:
        ValueError: the state is of another model or another layout.
    """
    tensors = dict(_named_tensors(policy))
    _refuse_other_names(set(tensors), set(state["weights"]))
    with torch.no_grad():
        for name, tensor in tensors.items():
            _copy(name, tensor, state["weights"][name])
        for optimizer, kept in zip(_optimizers(policy), state["optimizers"], strict=True):
            _restore_optimizer(optimizer, kept)


def _named_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every persistent buffer of this rank's chunks."""
    for index, chunk in enumerate(policy.chunks):
        persistent = chunk.state_dict(keep_vars=True)
        for name, tensor in chunk.named_parameters():
            yield f"{index}.{name}", tensor
        for name, tensor in chunk.named_buffers():
            if name in persistent:
                yield f"{index}.{name}", tensor


def _optimizers(policy: Policy) -> list[torch.optim.Optimizer]:
    """torch's optimizers inside megatron's: one for the dense and one for the expert parameters."""
    outer = policy.optimizer
    parts = getattr(outer, "chained_optimizers", [outer])
    return [part.optimizer for part in parts if part.optimizer is not None]


def _optimizer_state(optimizer: torch.optim.Optimizer, trained: set[int]) -> dict[str, Any]:
    groups = []
    for group in optimizer.param_groups:
        # In mixed precision the optimizer steps fp32 copies of the weights, which the weights alone do not give back.
        entries = [
            {
                "value": None if id(parameter) in trained else parameter.detach().cpu(),
                "state": {name: _plain(value) for name, value in optimizer.state.get(parameter, {}).items()},
            }
            for parameter in group["params"]
        ]
        settings = {name: value for name, value in group.items() if isinstance(value, int | float)}
        groups.append({"settings": settings, "parameters": entries})
    return {"groups": groups}


def _restore_optimizer(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    for group, told in zip(optimizer.param_groups, kept["groups"], strict=True):
        group.update(told["settings"])
        for parameter, entry in zip(group["params"], told["parameters"], strict=True):
            if entry["value"] is not None:
                _copy("an optimizer's copy of a weight", parameter, entry["value"])
            optimizer.state[parameter] = {
                # A step counter stays where the optimizer made it; moments belong beside their parameter.
                name: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
                for name, value in entry["state"].items()
            }


def _plain(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _copy(name: str, into: Tensor, value: Tensor) -> None:
    if into.shape != value.shape or into.dtype != value.dtype:
        raise ValueError(
            f"the checkpoint holds {name} as {value.dtype} {tuple(value.shape)}, this run as {into.dtype} "
            f"{tuple(into.shape)}; go on with the model and the layout that it was written with"
        )
    into.copy_(value)


def _refuse_other_names(here: set[str], there: set[str]) -> None:
    if here != there:
        odd = sorted(here ^ there)[0]
        raise ValueError(
            f"tensor {odd} is {'missing from' if odd in here else 'only in'} the checkpoint; "
            "go on with the model and the layout that it was written with"
        )
