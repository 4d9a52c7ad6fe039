"""Our step beside TRL's GSPO on the same work: seconds, memory of the whole job, held-out accuracy.

    python tools/bench_against_trl.py [--steps 30] [--repeats 2]

Both train `recipes/tiny_moe.yaml` on 2 cores from the same weights, on the same prompts, reward, updates and learning
rate; TRL samples with Hugging Face's `generate`. They run one after the other in turns. TRL has an environment of its
own, `.venv-trl`, made at the first run: it sees the packages of `.venv`, so torch and transformers are the same.
Memory is the largest sum of the proportional set sizes of all processes of a job, looked at every second. Writes
`tools/results/bench_against_trl.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gspo_megatron.metric_rows import read_rows
from gspo_megatron.run_dir import RunDir
from tools.first_contact import versions
from tools.setup_environment import find_uv

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "tiny_moe.yaml"
VENV = ROOT / ".venv-trl"
RESULT = ROOT / "tools" / "results" / "bench_against_trl.json"
PACKAGES = ("trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0")
NEEDED = ("multiprocess==0.70.19", "xxhash==4.1.0", "pandas", "python-dateutil", "pytz", "tzdata", "six")
"""What these need and `.venv` has not."""
UNCOUNTED = ("evaluate", "checkpoint", "check", "stop")
"""Parts of a step's seconds that TRL's have no counterpart of."""
TARGETS = {"seconds_over_trl": 1.0, "peak_pss_gib": 2.5}


def make_environment() -> Path:
    """TRL and what it needs beyond `.venv`; its Python."""
    python = VENV / "bin" / "python"
    if not (VENV / "complete").is_file():
        uv, packages = find_uv(), next(Path(sys.prefix).glob("lib/python*/site-packages"))
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(VENV)], check=True)
        own = next(VENV.glob("lib/python*/site-packages"))
        (own / "of_the_project.pth").write_text(f"{packages}\n")
        environment = {**os.environ, "UV_CACHE_DIR": str(VENV / "cache"), "UV_SYSTEM_CERTS": "true"}
        install = [uv, "pip", "install", "--quiet", "--python", str(python), "--no-deps", *PACKAGES, *NEEDED]
        subprocess.run(install, check=True, env=environment)
        (VENV / "complete").touch()
    return python


class Memory:
    """The largest memory of a process and its descendants while it runs."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.peak, self.at_peak = 0, dict[str, int]()
        self._root, self._done = psutil.Process(process.pid), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            parts = dict[str, int]()
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.Error:
                continue
            for one in processes:
                try:
                    parts[f"{one.pid} {' '.join(one.cmdline())[-60:]}"] = one.memory_full_info().pss
                except psutil.Error:
                    continue
            if sum(parts.values()) > self.peak:
                self.peak, self.at_peak = sum(parts.values()), parts

    def close(self) -> None:
        """Stop looking."""
        self._done.set()
        self._thread.join()


def run(command: list[str], log: Path) -> Memory:
    """Run one job to its end and watch its memory. Exits with its last words if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        memory = Memory(process)
        process.wait()
        memory.close()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return memory


def gspo(*changes: str) -> list[str]:
    """The command of one of our runs."""
    return [sys.executable, "-m", "gspo_megatron.cli", "train", str(RECIPE), *changes]


def measure_ours(start: Path, changes: list[str], place: Path) -> dict[str, Any]:
    """One run of ours from the weights in `start`."""
    memory = run(
        gspo(f"run.directory={place}", f"model.path={start}", "cold_start=null", *changes), place.with_suffix(".log")
    )
    rows = read_rows(place)
    steps = [row for row in rows if "reward_mean" in row]
    seconds = [row["seconds/step"] - sum(row.get(f"seconds/{part}", 0.0) for part in UNCOUNTED) for row in steps]
    names = ("rollout", "old_logprobs", "train", "probe", "sync", "pack")
    parts = {name: median(row.get(f"seconds/{name}", 0.0) for row in steps) for name in names}
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    return result(seconds, [accuracy[0], accuracy[-1]], memory) | {"parts": parts}


def measure_trl(python: Path, start: Path, changes: list[str], place: Path) -> dict[str, Any]:
    """One run of TRL's from the same weights."""
    out = place.with_suffix(".json")
    memory = run(
        [str(python), "tools/trl_run.py", str(RECIPE), str(start), str(out), *changes], place.with_suffix(".log")
    )
    found = json.loads(out.read_text())
    return result(found["seconds"], found["accuracy"], memory)


def result(seconds: list[float], accuracy: list[float], memory: Memory) -> dict[str, Any]:
    """One run in numbers; the first step warms up."""
    return {
        "seconds_a_step": median(seconds[1:]),
        "peak_pss_gib": memory.peak / 2**30,
        "held_out_accuracy": accuracy,
        "pss_mib": {name: size >> 20 for name, size in memory.at_peak.items()},
    }


def summarize(runs: dict[str, list[dict[str, Any]]], steps: int) -> dict[str, Any]:
    """What the runs of both say together. Exits if one has learned nothing: its seconds say nothing."""
    learned = {name: mean(one["held_out_accuracy"][-1] for one in found) for name, found in runs.items()}
    if any(one["held_out_accuracy"][0] >= one["held_out_accuracy"][-1] for found in runs.values() for one in found):
        raise SystemExit(f"a run has learned nothing, so seconds say nothing; accuracy at the end: {learned}")
    ours, theirs = (median(one["seconds_a_step"] for one in runs[name]) for name in ("ours", "trl"))
    return {
        "seconds_over_trl": ours / theirs,
        "peak_pss_gib": max(one["peak_pss_gib"] for one in runs["ours"]),
        "held_out_accuracy": learned,
        "targets": TARGETS,
        "steps": steps,
        "cores": os.cpu_count(),
        "runs": runs,
    }


def main() -> int:
    """Measure, write and print; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each, in turns")
    parser.add_argument("--json", action="store_true", help="print the result")
    chosen = parser.parse_args()
    python, used = make_environment(), versions() | {"trl": PACKAGES[0]}
    work = Path(tempfile.mkdtemp(prefix="against-trl-"))
    changes = [f"trainer.max_steps={chosen.steps}", "evaluation.every=0", "checkpoint.every=0"]
    run(
        gspo(f"run.directory={work / 'start'}", "trainer.max_steps=1", "optimizer.lr=0", "evaluation.problems=0"),
        work / "start.log",
    )
    start = RunDir(work / "start").final
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for number in range(chosen.repeats):
        runs["ours"].append(measure_ours(start, changes, work / f"ours_{number}"))
        runs["trl"].append(measure_trl(python, start, changes, work / f"trl_{number}"))
        for name, found in runs.items():
            print(
                f"{name}: {found[-1]['seconds_a_step']:.2f} s a step, {found[-1]['peak_pss_gib']:.2f} GiB, "
                f"accuracy {found[-1]['held_out_accuracy']}",
                file=sys.stderr,
                flush=True,
            )
    summary = summarize(runs, chosen.steps)
    found = summary | {"versions": used}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    if chosen.json:
        print(json.dumps(found))
    shutil.rmtree(work)
    return int(any(summary[name] > most for name, most in TARGETS.items()))


if __name__ == "__main__":
    sys.exit(main())
