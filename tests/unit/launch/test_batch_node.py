"""What runs outside the image, under the Python of a batch node: 3.9 or newer, the standard library only."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.places import ROOT

OLDEST = (3, 9)
TARGETS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["per-file-target-version"]
FILES = sorted(name for name in TARGETS if name.startswith(("launch/", "gspo_megatron/")))
LOADED = """
import sys
import launch.job
names = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
ours = sorted(module.__file__ for name, module in sys.modules.items()
              if name.split(".")[0] in ("launch", "gspo_megatron") and getattr(module, "__file__", None))
print(sorted(names), *ours, sep="\\n")
"""


@pytest.mark.parametrize("name", FILES)
def test_it_parses_under_the_oldest_python(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(), feature_version=OLDEST)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            words = {keyword.arg for keyword in node.keywords}
            assert not (node.func.id == "dataclass" and words & {"slots", "kw_only"}), "dataclass options of 3.10"
            assert not (node.func.id == "zip" and "strict" in words), "zip(strict=) is of 3.10"


def test_it_imports_nothing_but_the_standard_library_and_the_files_of_the_list() -> None:
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}){LOADED}"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    names, *files = done.stdout.splitlines()
    assert set(ast.literal_eval(names)) <= {"launch", "gspo_megatron", "__main__"}
    loaded = {str(Path(file).relative_to(ROOT)) for file in files}
    assert {name for name in loaded if not name.endswith("__init__.py")} == set(FILES)


def test_every_interpreter_of_this_machine_that_is_new_enough_can_plan() -> None:
    pythons = [*Path("/usr/bin").glob("python3.[0-9]*"), *Path.home().glob(".pyenv/versions/3.*/bin/python")]
    tried = 0
    for python in pythons:
        version = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True)
        if version.returncode or tuple(map(int, version.stdout.split())) < OLDEST or "-" in python.name:
            continue
        done = subprocess.run(
            [python, "-m", "launch.job", str(ROOT), "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and "sbatch --nodes=16 launch/gspo_moe.sh" in done.stdout, (python, done.stderr)
        tried += 1
    assert tried or not pythons
