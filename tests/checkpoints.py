"""The smallest checkpoint that counts as whole."""

from __future__ import annotations

import json
from pathlib import Path

from gspo_megatron.cluster.attempts import STATE_KEYS
from gspo_megatron.run_dir import CHECKPOINT, CheckpointDir

RANK_FILE = "rank_00000.safetensors"


def write_checkpoint(place: Path) -> Path:
    """Write it under a name of ours, or under any other."""
    place.mkdir(parents=True)
    (place / RANK_FILE).write_bytes(bytes(100))
    state = {**dict.fromkeys(STATE_KEYS, 0), "step": CHECKPOINT.parse(place.name), "files": {RANK_FILE: 100}}
    CheckpointDir(place).state.write_text(json.dumps(state))
    CheckpointDir(place).marker.touch()
    return place
