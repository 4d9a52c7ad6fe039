"""What torch's allocator of pinned host memory takes, where there is no GPU: a step of `make cuda-dry`.

    python tools/cuda_dry_pinned.py RECIPE ...        one line of JSON; exit 1 where it is not what the plan counts

torch's own allocator runs in a second process, with the settings that a trainer of the recipe gets. Below it a CUDA
runtime that knows one GPU and does nothing notes what is asked of `cudaHostAlloc`; no memory is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.gpu_environment import ALLOCATOR, trainer_variables
from gspo_megatron.config.schema import Recipe
from gspo_megatron.models import load_recipe
from gspo_megatron.plan import make_plan
from gspo_megatron.plan.rules.resources import pinned_bytes

RUNTIME = """
#include <stdio.h>
#include <sys/mman.h>
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
const char *cudaGetErrorString(int code) { return "none"; }
const char *cudaGetErrorName(int code) { return "none"; }
int cudaHostAlloc(void **place, size_t size, unsigned flags) {
    *place = mmap(0, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    printf("taken %zu\\n", size);
    fflush(stdout);
    return *place == MAP_FAILED;
}
"""
DRIVER = "int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = *active = 0; return 0; }"
ALLOCATE = """
import sys, torch
kept = [torch.empty(int(size), dtype=torch.uint8, pin_memory=True) for size in sys.argv[1:]]
"""
SIZES = 60
LARGEST = 34
"""Power of two of the largest random size."""


def build(place: Path, name: str, source: str) -> Path:
    """A shared library of C source."""
    command = ("gcc", "-w", "-shared", "-fPIC", "-x", "c", "-", "-o", str(place / name))
    subprocess.run(command, input=source, text=True, check=True)
    return place / name


def make_runtime(place: Path) -> Path:
    """A CUDA runtime with every function that torch is linked against; those not written out succeed."""
    import torch

    libraries = [Path(torch.__file__).parent / "lib" / name for name in ("libtorch_cuda.so", "libc10_cuda.so")]
    names: set[str] = set()
    for library in libraries:
        listed = subprocess.run(("nm", "-D", "--undefined-only", str(library)), capture_output=True, text=True).stdout
        names |= set(re.findall(r" (cuda[A-Z]\w*)", listed))
    rest = (f"int {name}(void) {{ return 0; }}\n" for name in sorted(names) if f"{name}(" not in RUNTIME)
    return build(place, "runtime.so", RUNTIME + "".join(rest))


def sizes_of(recipe: Recipe) -> list[int]:
    """Bytes of a rank's weights and states as the plan counts them, and random ones."""
    drawn = random.Random(0)
    planned = [size for stage in make_plan(recipe).memory or () for size in stage.exact.values() if size]
    return [*planned, *(drawn.randrange(1, 1 << drawn.randrange(1, LARGEST)) for _ in range(SIZES))]


def taken(sizes: list[int], settings: str, place: Path) -> list[int]:
    """What is asked of the runtime for each of these blocks, in order."""
    build(place, "libcuda.so.1", DRIVER)
    environment = {**os.environ, ALLOCATOR: settings, "LD_PRELOAD": str(make_runtime(place))}
    command = (sys.executable, "-c", ALLOCATE, *map(str, sizes))
    environment["LD_LIBRARY_PATH"] = str(place)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [int(size) for size in re.findall(r"^taken (\d+)$", done.stdout, re.MULTILINE)]


def main() -> int:
    """Compare for every recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+")
    found: dict[str, Any] = {}
    for path in parser.parse_args().recipes:
        recipe = load_recipe(path)
        sizes = sizes_of(recipe)
        with tempfile.TemporaryDirectory() as place:
            was = taken(sizes, trainer_variables(recipe)[ALLOCATOR], Path(place))
        wrong = [
            {"asked": size, "taken": real, "planned": pinned_bytes(size)}
            for size, real in zip(sizes, was, strict=True)
            if real != pinned_bytes(size)
        ]
        found[path.stem] = {"blocks": len(sizes), "taken_over_asked": round(sum(was) / sum(sizes), 4), "wrong": wrong}
    print(json.dumps(found), flush=True)
    return int(any(one["wrong"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
