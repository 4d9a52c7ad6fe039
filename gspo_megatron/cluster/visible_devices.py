"""Which GPUs of this machine a process may use: what `CUDA_VISIBLE_DEVICES` shows of what nvidia-smi lists.

A table of tasks names devices by their place among the visible ones, so that one table serves every node. Where a
process is started, `name_devices` turns places into the names that its machine was given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from gspo_megatron.cluster.command_output import TOOL_SECONDS, read_command

VARIABLE = "CUDA_VISIBLE_DEVICES"
UUID = re.compile(r"(GPU|MIG)-\S+")
"""nvidia-smi prints other lines too: `WARNING: infoROM is corrupted at gpu 0000:1A:00.0`."""


@dataclass(frozen=True)
class Gpu:
    """One GPU that the process may use."""

    name: str
    """Its entry of `CUDA_VISIBLE_DEVICES`: an index, `GPU-...` or `MIG-...`."""
    model: str
    """What nvidia-smi calls it, e.g. `NVIDIA H100 80GB HBM3`; empty for a part of a GPU."""


def query_gpus(*fields: str, timeout: float | None = TOOL_SECONDS, through: Sequence[str] = ()) -> list[list[str]]:
    """What nvidia-smi says of each GPU, whoever may use it; empty where it says nothing.

    Args:
        fields: of its `--query-gpu`; only the last may hold commas.
        timeout: seconds.
        through: command that runs it elsewhere, as srun.

    Returns:
        A row for each GPU: its UUID, and the fields.
    """
    query = f"--query-gpu={','.join(('uuid', *fields))}"
    listed = read_command(
        *through, "nvidia-smi", query, "--format=csv,noheader,nounits", timeout=timeout, any_code=True
    )
    rows = [[cell.strip() for cell in line.split(",", len(fields))] for line in listed.splitlines()]
    return [row for row in rows if len(row) == 1 + len(fields) and UUID.fullmatch(row[0])]


def list_gpus() -> list[Gpu]:
    """The GPUs that this process may use; empty without a GPU or nvidia-smi."""
    rows = query_gpus("name")
    uuids, models = [row[0] for row in rows], [row[1] for row in rows]
    names = select_devices(os.environ.get(VARIABLE), uuids)
    return [Gpu(name, "" if (place := _place_of(name, uuids)) is None else models[place]) for name in names]


def explain_none() -> str:
    """Why no GPU is to be had on the first node of a job, as half a sentence."""
    shown = os.environ.get(VARIABLE)
    if shown is None:
        return f"nvidia-smi lists none on its first node within {TOOL_SECONDS:g} s"
    return f"{VARIABLE}={shown!r} shows none of those of its first node, if it has any"


def select_devices(text: str | None, uuids: Sequence[str]) -> list[str]:
    """Return the visible devices, in order, by the rules of CUDA.

    The first entry that names no device ends the list (`-1`, `NoDevFiles`), a repeated device empties it, and all
    entries are of the first one's kind.

    Args:
        text: of `CUDA_VISIBLE_DEVICES`; null = not set, all are visible.
        uuids: of the machine's GPUs.
    """
    if text is None:
        return [str(index) for index in range(len(uuids))]
    words = [word.strip() for word in text.split(",")]
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if words[0].startswith(prefix)), "")
    read = words if prefix else [_number_of(word) for word in words]
    entries = list(takewhile(lambda word: word is not None and word.startswith(prefix), read))
    # nvidia-smi lists the parts of a GPU elsewhere, and the driver checks them.
    places = entries if prefix == "MIG-" else [_place_of(entry or "", uuids) for entry in entries]
    places = list(takewhile(lambda place: place is not None, places))
    is_repeated = len(set(entries)) < len(entries) or len(set(places)) < len(places)
    return [] if is_repeated else [entry or "" for entry in entries[: len(places)]]


def name_devices(places: str, visible: Sequence[Gpu]) -> str:
    """Return `CUDA_VISIBLE_DEVICES` for a process that may use some of the visible devices.

    Args:
        places: comma-separated, among the visible ones.
        visible: of this machine. Empty = nothing is known here, and places are indices.

    Raises:
        ValueError: there are fewer.
    """
    wanted = [int(place) for place in places.split(",")]
    if not visible:
        return places
    if max(wanted) >= len(visible):
        raise ValueError(
            f"GPU number {max(wanted)} is wanted, but {VARIABLE}={os.environ.get(VARIABLE)} shows {len(visible)}; "
            "set it to more GPUs, or lower trainer.ranks and rollout.servers"
        )
    return ",".join(visible[place].name for place in wanted)


def _place_of(name: str, uuids: Sequence[str]) -> int | None:
    """The index of a GPU that an entry names; None for no GPU or several."""
    if name.startswith("GPU-"):
        found = [index for index, uuid in enumerate(uuids) if uuid.startswith(name)]
        return found[0] if len(found) == 1 else None
    number = _number_of(name)
    return int(number) if number is not None and int(number) < len(uuids) else None


def _number_of(word: str) -> str | None:
    """The digits that an entry begins with, as strtoul reads it: what follows them is not looked at."""
    digits = re.match(r"\+?([0-9]+)", word)
    return str(int(digits[1])) if digits else None
