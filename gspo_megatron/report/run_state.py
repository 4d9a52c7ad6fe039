"""How far a run is, read off the files that it writes: also from another node, and while they are cut or removed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.run_dir import ATTEMPT, RunDir

SILENT_SECONDS = 60.0
"""A run whose ranks have written nothing for so long has stopped; a rank writes every 2 s."""
TAIL_BYTES = 64 * 1024
"""Of a server's log, what is read of its end."""
RECENT = 10
"""Steps whose mean time gives the time left."""
THROUGHPUT = re.compile(
    r"Avg generation throughput: ([\d.]+) tokens/s, Running: (\d+) reqs, Waiting: (\d+) reqs, "
    r".*KV cache usage: ([\d.]+)%"
)
"""vLLM's own line, every 10 s."""
WAITS = {
    "rollout": "waits for responses", "sync": "sends the weights to the servers", "evaluate": "waits for an evaluation",
    "train": "trains", "old_logprobs": "scores the old policy", "reference": "scores the reference policy",
    "pack": "packs samples", "take_over": "takes over the devices", "start": "starts, or is between two steps",
    "probe": "probes the routers", "export": "writes an export",
}  # fmt: skip
"""What a rank does in a stage, in words."""


@dataclass(frozen=True, slots=True)
class RankState:
    """What one trainer rank reported last."""

    rank: str
    stage: str
    since: float
    """Seconds since it last made progress."""
    silent: float
    """Seconds since it wrote."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """What one inference server logged last."""

    name: str
    tokens_per_second: float
    running: int
    """Requests in work."""
    waiting: int
    """Requests that wait for memory."""
    kv: float
    """Share of the KV cache in use."""
    age: float
    """Seconds since its log was written."""


@dataclass(frozen=True, slots=True)
class RunState:
    """How far a run is."""

    kind: str
    """`finished`, `running` or `stopped`."""
    step: int
    steps: int | None
    """Steps that the recipe asks for; None = not known."""
    seconds_per_step: float | None
    """Mean of the last steps."""
    ranks: tuple[RankState, ...]
    servers: tuple[ServerState, ...]

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the rate of the last ones."""
        if self.kind != "running" or self.steps is None or self.seconds_per_step is None:
            return None
        return max(self.steps - self.step, 0) * self.seconds_per_step

    @property
    def text(self) -> str:
        """In words, for the page."""
        of = f"step {self.step}" + (f" of {self.steps}" if self.steps else "")
        if self.kind == "finished":
            return f"finished, {of}"
        if self.kind == "stopped":
            return f"not running, {of}"
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"running, {of}{left}"


def duration(seconds: float) -> str:
    """Seconds for people: `42 s`, `12 min`, `3 h 20 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def read_state(run: RunDir, rows: Sequence[Mapping[str, Any]], steps: int | None, now: float | None = None) -> RunState:
    """The state of a run.

    Args:
        run: its directory; any file of it may be missing.
        rows: of metrics.jsonl.
        steps: `trainer.max_steps`.
        now: seconds since 1970; None = the clock of this node.
    """
    now = time.time() if now is None else now
    ranks, servers = tuple(_ranks(run, now)), tuple(_servers(run, now))
    alive = any(one.silent < SILENT_SECONDS for one in ranks)
    kind = "finished" if run.done.exists() else "running" if alive else "stopped"
    recent = [row["seconds/step"] for row in rows[-RECENT:] if "seconds/step" in row]
    per_step = sum(recent) / len(recent) if recent else None
    return RunState(kind, rows[-1]["step"] if rows else 0, steps, per_step, ranks, servers)


def _ranks(run: RunDir, now: float) -> list[RankState]:
    found = []
    for file in _list(run.heartbeat, "trainer-*.json"):
        try:
            beat = json.loads(file.read_text())
            one = RankState(file.stem, str(beat["stage"]), now - float(beat["at"]), now - float(beat["written"]))
        except (OSError, ValueError, KeyError, TypeError):  # replaced, removed or cut off at this moment
            continue
        found.append(one)
    return sorted(found, key=lambda one: int(one.rank.rpartition("-")[2]) if one.rank[-1].isdigit() else 0)


def _servers(run: RunDir, now: float) -> list[ServerState]:
    newest = list(ATTEMPT.find(run.logs).values())[-1:]
    found = []
    for file in _list(newest[0], "rollout-*.log") if newest else ():
        try:
            lines, age = _read_end(file), now - file.stat().st_mtime
        except OSError:
            continue
        said = THROUGHPUT.findall(lines)
        if said:
            rate, running, waiting, kv = said[-1]
            name = file.stem
            found.append(ServerState(name, float(rate), int(running), int(waiting), float(kv) / 100, age))
    return found


def _list(directory: Path, pattern: str) -> list[Path]:
    try:
        return sorted(directory.glob(pattern))
    except OSError:
        return []


def _read_end(file: Path) -> str:
    with file.open("rb") as opened:
        opened.seek(0, 2)
        opened.seek(max(0, opened.tell() - TAIL_BYTES))
        return opened.read().decode(errors="replace")
