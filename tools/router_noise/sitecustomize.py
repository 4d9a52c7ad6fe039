"""Noise on the choice of experts in the trainer, a stressor of `tools/study.py`.

Python imports a module of this name when it starts, if its folder is on the path, so every process of a run has it.
With GSPO_STUDY_ROUTER_NOISE=S each pass of the trainer chooses experts by router logits plus S times a standard normal
number, drawn anew for each token, expert and pass. Their weights come from the logits without noise. The servers have
none, nor has a cold start, which cells with and without noise share: its passes neither record routes nor compare them.
A choice that is replayed is the recorded one. S = 0 changes nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ROUTERS = "gspo_megatron.policy.replay"
"""The module in which routers choose."""


class Finder(MetaPathFinder):
    """Adds the noise when the module of the routers is imported; the interpreter itself has not loaded torch."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with a loader that adds the noise."""
        if fullname != ROUTERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_with_noise(module: ModuleType) -> None:
                load(module)
                add_noise(module.RouterSeam, self.scale)

            spec.loader.exec_module = load_with_noise
        return spec


def add_noise(seam: Any, scale: float) -> None:
    """Let routers of this class choose by logits with noise, and weigh by those without."""
    choose = seam.get_replay_topk

    @functools.wraps(choose)
    def choose_with_noise(self: Any, scores: Any, topk: int, *rest: Any) -> tuple[Any, Any]:
        if self.routes is None and self.recorded is None:
            return choose(self, scores, topk, *rest)
        _, chosen = choose(
            self, scores.detach() + scale * scores.detach().new_empty(scores.shape).normal_(), topk, *rest
        )
        return scores.gather(1, chosen), chosen

    seam.get_replay_topk = choose_with_noise


if scale := float(os.environ.get("GSPO_STUDY_ROUTER_NOISE", "0")):
    sys.meta_path.insert(0, Finder(scale))
