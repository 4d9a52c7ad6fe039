"""`make cuda-dry`: the CUDA packages on a machine without a GPU, after every change of their pins.

Makes `.venv-cuda` from requirements/cuda.txt, then runs what needs no kernel: vLLM's configuration for every shipped
recipe of GPUs, the weight update on its CUDA classes at three capabilities, Transformer Engine's spec and its Python
with compiled functions answered by torch, pinned memory, a kernel through the installed compiler, Megatron's groups.
Writes tools/results/cuda_dry.json, each step with a hash of the pins that it ran with.
`--skip-setup` takes the environment as it is, `--only NAME ...` some steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-cuda"
RESULT = ROOT / "tools" / "results" / "cuda_dry.json"
PINS = ROOT / "requirements" / "cuda.txt"
OF_THE_PAGE = ("narwhals", "plotly")
"""Packages that only draw report.html: no step imports them."""
LIMIT = 5400
NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE, which every function of the stand-in for libcuda returns."""
GPU_RECIPES = tuple(sorted(ROOT.glob("recipes/qwen3_*.yaml")))
RELOADED = "recipes/qwen3_30b_a3b_gspo.yaml"


def main() -> int:
    """Run the steps. Exit 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-setup", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--venv", type=Path, default=VENV, help="the environment to use")
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    if not chosen.skip_setup:
        make_environment(chosen.venv)
    library = make_driver(chosen.venv)
    results: dict[str, Any] = {"steps": {}}
    if chosen.only and chosen.out.is_file():
        results = json.loads(chosen.out.read_text(encoding="utf-8"))
    for name, command in steps(chosen.venv / "bin" / "python"):
        if chosen.only and name not in chosen.only:
            continue
        results["steps"][name] = found = run(command, library) | {"pins": pins_hash()}
        chosen.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {found['verdict']} ({found['seconds']} s)", flush=True)
    return int(any(found["verdict"] != "passed" for found in results["steps"].values()))


def pins_hash() -> str:
    """Of the pinned packages, without comments and without what no step can import."""
    pins = [line for line in PINS.read_text(encoding="utf-8").splitlines() if re.match(r"[A-Za-z0-9]", line)]
    lines = [line for line in pins if line.partition("==")[0] not in OF_THE_PAGE]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def steps(python: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and command of each."""
    recipes = [str(path.relative_to(ROOT)) for path in GPU_RECIPES]
    yield "arguments", (str(python), "tools/cuda_dry_vllm.py", *recipes)
    ranks = (str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    for capability in ("9.0", "10.0", "10.3"):
        yield (
            f"reload at {capability}",
            (*ranks, "2", "tools/cuda_dry_reload.py", RELOADED, "--capability", capability),
        )
    yield "engine on meta", (str(python), "-m", "tests.parallel.engine_meta")
    yield "engine parity", (str(python), "-m", "tests.parallel.engine_parity")
    yield "engine in bfloat16", (str(python), "-m", "tests.parallel.engine_narrow")
    yield "pinned memory", (str(python), "tools/cuda_dry_pinned.py", *recipes)
    yield "compiler", (str(python), "tools/first_contact.py", "--compiler")
    for layout in ("32 2 4 2 4", "128 2 8 8 16"):
        yield (
            f"groups of {layout.split()[0]} ranks",
            (str(python), "-m", "tests.parallel.counts_groups", *layout.split()),
        )


def make_environment(venv: Path) -> None:
    """Install the CUDA stack there. Transformer Engine takes a quarter of an hour; uv keeps what it has built."""
    sys.path.insert(0, str(ROOT))
    from tools import setup_environment as setup

    setup.VENV, setup.VENV_PYTHON, setup.STAMP = venv, venv / "bin" / "python", venv / "gspo-setup"
    os.environ["GSPO_STACK"] = "cuda"
    setup.main()


def make_driver(venv: Path) -> Path:
    """A libcuda that knows no device, with the functions that vLLM's libraries are linked against; its directory."""
    place = venv / "no-driver"
    place.mkdir(exist_ok=True)
    names: set[str] = set()
    for library in venv.glob("lib/python*/site-packages/vllm/**/*.so"):
        listed = subprocess.run(("nm", "-D", "--undefined-only", str(library)), capture_output=True, text=True).stdout
        names |= set(re.findall(r" (cu[A-Z]\w*)$", listed, re.MULTILINE))
    source = "".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in sorted(names))
    command = ("gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(place / "libcuda.so.1"))
    subprocess.run(command, input=source, text=True, check=True)
    return place


def run(command: tuple[str, ...], library: Path) -> dict[str, Any]:
    """Run one step."""
    began = time.monotonic()
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(library), "HF_HUB_OFFLINE": "1"}
    settings |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, said = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        # Its ranks are of the same session.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"verdict": "failed", "seconds": LIMIT, "said": [f"ended after {LIMIT} s"]}
    lines = out.strip().splitlines()
    found: dict[str, Any] = {"verdict": "failed" if process.returncode else "passed"}
    found |= {"seconds": round(time.monotonic() - began, 1), "when": datetime.now(UTC).date().isoformat()}
    if lines and lines[-1].startswith("{"):
        found["figures"] = json.loads(lines[-1])
    return found | ({} if not process.returncode else {"said": (lines + said.splitlines())[-12:]})


if __name__ == "__main__":
    sys.exit(main())
