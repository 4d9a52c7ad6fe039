"""The command line of launch/gspo_moe.sh. Standard library only."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gspo_megatron.cluster.exit_codes import OK
from launch.lib.granted_job import COUNT, HOME, SCRIPT, header_number
from launch.lib.plan_request import Refused

FLAGSHIP = "recipes/qwen3_30b_a3b_gspo_100k.yaml"
MOST_NODES = 65536
"""Nodes of a drawing: as many as SLURM's largest clusters have."""
GPUS_DRAWN = 8
"""GPUs of a node of a drawing that nobody has said."""


@dataclass(frozen=True)
class Arguments:
    """What the user asked for."""

    recipe: str
    overrides: tuple[str, ...]
    drawing: bool
    nodes: int
    """Of a drawing; of a job SLURM says it."""
    gpus: int
    """GPUs of a node of a drawing; 0 = none."""


def read_arguments(words: Sequence[str], called_in: Path) -> Arguments:
    """The command line; sbatch's own options stand before the script. Raises Refused."""
    header = SCRIPT.read_text()
    gpus = header_number(header, "gpus-per-node")
    found = Arguments("", (), False, header_number(header, "nodes") or 1, GPUS_DRAWN if gpus is None else gpus)
    sizes: list[str] = []
    for word in words:
        name, _, value = word.partition("=")
        if word == "--dry-run":
            found = replace(found, drawing=True)
        elif name in ("--nodes", "--gpus-per-node"):
            number = COUNT.fullmatch(value)
            if number is None or (name == "--nodes" and not 0 < int(number[1]) <= MOST_NODES):
                raise Refused(f"{word} is no number of {name[2:]}; write for example {name}=4")
            found = replace(found, **{"nodes" if name == "--nodes" else "gpus": int(number[1])})
            sizes.append(word)
        elif word in ("--help", "-h"):
            print(re.sub(r"^# ?", "", header.split("\n", 1)[1].split("#SBATCH", 1)[0], flags=re.MULTILINE).rstrip())
            sys.exit(OK)
        elif word.startswith("-"):
            raise Refused(
                f"unknown option {word}; sbatch's own options go before the script, recipe keys are written key=value"
            )
        elif "=" in word:
            found = replace(found, overrides=(*found.overrides, word))
        elif found.recipe:
            raise Refused(f"two recipes, {found.recipe} and {word}; give one, and overrides as key=value")
        else:
            found = replace(found, recipe=word)
    if sizes and not found.drawing:
        raise Refused(f"{sizes[0]} after the script is of --dry-run; sbatch's own options go before the script")
    recipe = found.recipe or FLAGSHIP
    if called_in != HOME and (called_in / recipe).is_file():
        recipe = str(called_in / recipe)
    return replace(found, recipe=recipe)
