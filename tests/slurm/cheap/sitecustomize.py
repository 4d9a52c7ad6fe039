"""Puts small processes in place of the roles of a job: with this folder in PYTHONPATH every Python takes them.

The launcher, its plan, its preflight and SLURM are the real ones. What a role would import counts as importable.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROLES = {
    "gspo_megatron.trainer.loop": "cheap_trainer.py",
    "gspo_megatron.controller.main": "cheap_server.py",
    "gspo_megatron.inference.server": "cheap_server.py",
    "torch": "cheap_torch.py",
    "transformer_engine": "cheap_server.py",
    "transformer_engine.pytorch": "cheap_server.py",
}


class Finder(MetaPathFinder):
    """Finds the small ones first."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The file in this folder, for the names of the table."""
        file = ROLES.get(fullname)
        inside = [] if any(name.startswith(f"{fullname}.") for name in ROLES) else None  # of a package
        if file is None:
            return None
        return importlib.util.spec_from_file_location(fullname, HERE / file, submodule_search_locations=inside)


sys.meta_path.insert(0, Finder())
