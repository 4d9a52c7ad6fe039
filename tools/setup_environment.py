"""Set up `.venv`: Python 3.12, the pinned packages of this machine's stack, and this package in editable form.

`make setup` runs it under any python3 of the machine, so it uses the standard library only. An existing environment is
reused: a second run compares one hash and returns.

Environment: GSPO_STACK=cpu|cuda chooses the stack (default: cuda on a machine with an NVIDIA GPU, otherwise cpu).
GSPO_WITHOUT=transformer-engine accepts a CUDA stack without it.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "gspo-setup"
TOOLS = ROOT / ".venv-tools"
REQUIREMENTS = ROOT / "requirements"
# Bytes on disk, unpacked; the second is estimated from the sizes of the wheels.
NEEDED = {"cpu": 7e9, "cuda": 16e9}
# Headers of CUDA and cuDNN are in NVIDIA's wheels; a wheel that could be had would be of another torch.
BUILD_SETTINGS = {"NVTE_BUILD_USE_NVIDIA_WHEELS": "1", "NVTE_PYTORCH_FORCE_BUILD": "TRUE"}
WITHOUT, ENGINE = "GSPO_WITHOUT", "transformer-engine"
OLDEST_UV = (0, 8)
PROBE = "import ensurepip, sys; print(sys.version_info[:2] == (3, 12))"


class SetupError(Exception):
    """Something is missing. The message says what and how to fix it, in one sentence."""


def main() -> None:
    check_platform()
    # Use the machine's certificates, as pip does: uv's built-in list lacks the certificate of a company's proxy.
    os.environ.setdefault("UV_SYSTEM_CERTS", "true")
    stack = choose_stack(os.environ)
    with open(ROOT / ".venv.lock", "w") as lock:
        # Two `make` processes must not install into one environment at the same time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_current(stack):
            say(f".venv is up to date ({stack} stack)")
            return
        started = time.monotonic()
        uv = find_uv()
        make_venv(uv, stack)
        install(uv, stack)
        write_stamp(stack, fingerprint(stack))
        say(f".venv is ready ({stack} stack, {time.monotonic() - started:.0f} s)")


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def check_platform() -> None:
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise SetupError(
            f"this machine is {system} on {machine}, and the pins in requirements/ are for Linux on x86_64; "
            "resolve them again there (requirements/README.md says how)"
        )


def choose_stack(environ: Mapping[str, str]) -> str:
    """Return `cpu` or `cuda`."""
    chosen = environ.get("GSPO_STACK")
    if chosen is None:
        return "cuda" if has_nvidia_gpu() else "cpu"
    if chosen not in NEEDED:
        raise SetupError(f"GSPO_STACK={chosen} names no stack; set it to cpu or cuda, or unset it")
    return chosen


def has_nvidia_gpu() -> bool:
    if glob.glob("/dev/nvidia[0-9]*"):
        return True
    nvidia_smi = shutil.which("nvidia-smi")
    return nvidia_smi is not None and "GPU 0" in output_of([nvidia_smi, "-L"])


# The stamp file: line 1 is the identity of the environment, line 2 the fingerprint of its contents.


def identity(stack: str) -> str:
    """Return stack and path of the environment. An environment with another identity is made again.

    Both vLLM builds own the module `vllm`, and the scripts of an environment contain its path.
    """
    return f"{stack} {ROOT}"


def fingerprint(stack: str) -> str:
    """Return the hash of everything that the environment is made from."""
    files = (REQUIREMENTS / f"{stack}.txt", ROOT / "pyproject.toml", Path(__file__))
    said = waived() if stack == "cuda" else ""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files) + said.encode()).hexdigest()


def read_stamp() -> list[str]:
    return STAMP.read_text().splitlines() if STAMP.is_file() else []


def write_stamp(stack: str, state: str) -> None:
    STAMP.write_text(f"{identity(stack)}\n{state}\n")


def is_current(stack: str) -> bool:
    # An uninstalled Python leaves a dangling link, for which exists() is False.
    return VENV_PYTHON.exists() and read_stamp() == [identity(stack), fingerprint(stack)]


def find_uv() -> str:
    """Return the uv on the PATH if it is recent enough, otherwise install one into `.venv-tools`."""
    on_path = shutil.which("uv")
    if on_path is not None and uv_version(on_path) >= OLDEST_UV:
        return on_path
    own = TOOLS / "bin" / "uv"
    if not own.exists():
        say("installing uv into .venv-tools")
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(TOOLS)], capture_output=True, text=True)
        if made.returncode:
            raise SetupError(
                f"{sys.executable} cannot make a virtual environment ({last_line(made.stdout + made.stderr)}); install "
                "its venv module (Debian and Ubuntu: the package python3-venv) or put uv on the PATH"
            )
        pip = [str(TOOLS / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        fetched = subprocess.run([*pip, "-r", str(REQUIREMENTS / "uv.txt")], capture_output=True, text=True)
        if fetched.returncode:
            raise SetupError(
                f"pip could not fetch uv ({last_line(fetched.stderr)}); check the network, the proxy and pip's index "
                "settings, or put uv on the PATH"
            )
    return str(own)


def uv_version(uv: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)", output_of([uv, "--version"]))
    return tuple(int(part) for part in found.groups()) if found else (0,)


def find_python() -> str | None:
    """Return a Python 3.12 of this machine: on the PATH, then among pyenv's versions."""
    candidates = [str(folder / name) for name in ("python3.12", "python3") for folder in path_folders()]
    for root in pyenv_roots():
        candidates += sorted(glob.glob(str(root / "versions" / "3.12.*" / "bin" / "python3.12")))
    # python3.12 can be a pyenv shim that fails, so each candidate is run.
    return next((path for path in candidates if output_of([path, "-c", PROBE]) == "True"), None)


def path_folders() -> list[Path]:
    return [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]


def pyenv_roots() -> list[Path]:
    named = [Path(os.environ["PYENV_ROOT"])] if os.environ.get("PYENV_ROOT") else []
    of_shims = [folder.parent for folder in path_folders() if folder.name == "shims"]
    return list(dict.fromkeys([*named, *of_shims, Path.home() / ".pyenv"]))


def make_venv(uv: str, stack: str) -> None:
    """Make `.venv` with Python 3.12, unless one of the same identity exists (from an interrupted or older set-up)."""
    stamp = read_stamp()
    if stamp and stamp[0] == identity(stack) and VENV_PYTHON.exists():
        return
    if VENV.exists() and not stamp:
        raise SetupError(".venv exists but this set-up did not make it; move it away or delete it, and run this again")
    check_compiler()
    check_disk(stack, uv)
    python = find_python()
    say(f"making .venv with {python or 'a Python 3.12 that uv finds or downloads'}")
    made = subprocess.run([uv, "venv", "--quiet", "--clear", "--python", python or "3.12", str(VENV)])
    if made.returncode and python is None:
        roots = ", ".join(str(root) for root in pyenv_roots())
        raise SetupError(
            f"no Python 3.12 was found: tried python3.12 and python3 on the PATH, pyenv's versions in {roots}, and "
            "uv's own download; install it (a package of your system, or `pyenv install 3.12`) and run this again"
        )
    if made.returncode:
        raise SetupError(f"uv could not make .venv with {python}; its message is above")
    write_stamp(stack, "incomplete")


def check_compiler() -> None:
    """Check for a C compiler: pycosat (of reasoning-gym) comes as source, and vLLM's CPU build compiles at run time."""
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        raise SetupError(
            "no C compiler was found (gcc or cc on the PATH) and some packages come as source; install one (Debian and "
            "Ubuntu: the packages gcc and g++) and run this again"
        )


def check_disk(stack: str, uv: str) -> None:
    """Check the free disk space. uv unpacks into its cache and links from there, so both places must have room."""
    for place in (ROOT, Path(output_of([uv, "cache", "dir"]) or Path.home())):
        folder = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(folder).free
        if free < NEEDED[stack]:
            raise SetupError(
                f"{folder} has {free / 1e9:.1f} GB free and the {stack} stack needs {NEEDED[stack] / 1e9:.1f} GB; free "
                "some disk, or set UV_CACHE_DIR and the checkout to a larger one"
            )


def install(uv: str, stack: str) -> None:
    """Install the pinned packages without resolving, then this package in editable form."""
    pins, built_here = split_pins((REQUIREMENTS / f"{stack}.txt").read_text())
    say(f"installing {len(pins)} packages of requirements/{stack}.txt ({NEEDED[stack] / 1e9:.1f} GB on disk)")
    if pip_install(uv, "--no-deps", "-r", "-", lines=pins):
        raise SetupError(diagnose(uv, f"requirements/{stack}.txt"))
    build_engine(uv, built_here)
    # Built with the pinned setuptools of the environment: nothing else is downloaded.
    if pip_install(uv, "--quiet", "--no-deps", "--no-build-isolation", "-e", str(ROOT)):
        raise SetupError("uv could not install this package into .venv; its message is above")


def waived() -> str:
    """Return what GSPO_WITHOUT names: ENGINE or nothing."""
    named = os.environ.get(WITHOUT, "")
    if named not in ("", ENGINE):
        raise SetupError(f"{WITHOUT}={named} names a part that is not optional; it can name {ENGINE} only")
    return named


def build_engine(uv: str, pins: list[str]) -> None:
    """Build Transformer Engine against the installed torch, and import it after torch, whose NCCL it is linked to."""
    if not pins or waived():
        return
    say(f"building {ENGINE} (a quarter of an hour of processor time; {WITHOUT}={ENGINE} accepts slow training instead)")
    if pip_install(uv, "--no-deps", "--no-build-isolation", "-r", "-", lines=pins, settings=BUILD_SETTINGS):
        fault = "could not be built; uv's message is above"
    else:
        probe = "import torch, transformer_engine.pytorch"
        tried = subprocess.run([str(VENV_PYTHON), "-c", probe], capture_output=True, text=True)
        fault = f"was built but cannot be imported ({last_line(tried.stderr)})" if tried.returncode else ""
    if fault:
        raise SetupError(f"{ENGINE} {fault}. Fix that, or accept slow training with {WITHOUT}={ENGINE}")


def split_pins(text: str) -> tuple[list[str], list[str]]:
    """Split the `name==version` lines of a requirement file into wheels and transformer-engine.

    The PyTorch part of transformer-engine is compiled against the installed torch, so it comes last.
    """
    pins = [line for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    built_here = [pin for pin in pins if pin.startswith("transformer-engine")]
    return [pin for pin in pins if pin not in built_here], built_here


def pip_install(uv: str, *arguments: str, lines: list[str] | None = None, settings: Mapping[str, str] = {}) -> int:
    """Run `uv pip install` and return its exit code. uv draws progress bars on a terminal."""
    command = [uv, "pip", "install", "--python", str(VENV_PYTHON), *arguments]
    text, environment = "\n".join(lines or []), {**os.environ, **settings}
    return subprocess.run(command, input=text, text=True, cwd=ROOT, env=environment).returncode


def diagnose(uv: str, what: str) -> str:
    """Return why an installation failed: full disk, unreachable index, or see uv's message."""
    if shutil.disk_usage(ROOT).free < 0.5e9:
        return f"the disk became full while installing {what}; free some and run this again: what is downloaded is kept"
    ask = [uv, "pip", "compile", "--quiet", "--no-cache", "--no-deps", "--python", str(VENV_PYTHON), "-"]
    if subprocess.run(ask, input="packaging", text=True, capture_output=True).returncode:
        return (
            f"the package index could not be reached while installing {what}; check the network and the proxy (uv "
            "reads HTTPS_PROXY and UV_DEFAULT_INDEX, not pip's settings) and run this again: what is downloaded is kept"
        )
    return f"uv could not install {what}; its message is above"


def output_of(command: list[str]) -> str:
    """Return the output of a command, stripped; empty if it cannot be run or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup: {error}")
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; run it again to continue")
