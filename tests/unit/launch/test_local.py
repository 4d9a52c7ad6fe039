"""`launch/local.sh`: the run of this machine, with the site's settings and the roles of a job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.cluster.hosts import Host, Ports, spread, tasks
from gspo_megatron.cluster.local_backend import plan_roles
from gspo_megatron.models import load_recipe
from tests.places import ROOT

SAYS = f"""#!/bin/bash
if [ "$2" = launch.job ]; then exec {sys.executable} "$@"; fi
pwd
echo "$GSPO_ROLLOUT_PYTHON"
printf '%s\\n' "$@"
"""


def run(venv: Path | str, *arguments: str, cwd: Path = ROOT, **settings: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GSPO")}
    environment = {**inherited, "GSPO_SITE": "/dev/null", "GSPO_VENV": str(venv), **settings}
    command = (str(ROOT / "launch" / "local.sh"), *arguments)
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment whose interpreter says what it was called with."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(SAYS)
    python.chmod(0o755)
    return tmp_path / "venv"


def test_it_trains_the_recipe_of_the_caller_where_the_caller_is(venv: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    said = run(venv, "mine.yaml", "run.seed=1", cwd=tmp_path)
    words = ["-m", "gspo_megatron.cli", "train", str(tmp_path / "mine.yaml"), "run.seed=1"]
    assert said.stdout.splitlines() == [str(tmp_path), str(venv / "bin" / "python"), *words]
    assert run(venv).stdout.splitlines()[-1] == str(ROOT / "recipes" / "tiny_moe.yaml")


def test_images_are_left_to_srun_and_servers_keep_their_own_environment(venv: Path) -> None:
    said = run(venv, GSPO_IMAGE="/images/gspo.sqsh", GSPO_ROLLOUT_VENV=sys.prefix)
    assert said.stdout.splitlines()[1] == f"{sys.prefix}/bin/python"
    said = run(venv, GSPO_ROLLOUT_VENV="/nowhere")
    assert said.returncode == 2 and "gspo: /nowhere/bin/python is not there; run make setup" in said.stderr


def test_without_slurm_the_job_script_becomes_it(venv: Path) -> None:
    environment = {**os.environ, "GSPO_SITE": "/dev/null", "GSPO_VENV": str(venv)}
    environment.pop("SLURM_JOB_ID", None)
    command = (str(ROOT / "launch" / "gspo_moe.sh"), "recipes/tiny_moe.yaml", "run.seed=1")
    for where in (ROOT, venv):
        said = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True)
        assert said.stdout.splitlines()[-2:] == [str(ROOT / "recipes" / "tiny_moe.yaml"), "run.seed=1"]
        assert said.stdout.splitlines()[0] == str(where)


def test_a_relative_environment_is_the_checkouts_and_the_package_is_found_from_elsewhere(tmp_path: Path) -> None:
    said = run(".venv", "absent.yaml", cwd=tmp_path)
    assert said.returncode == 2 and "absent.yaml does not exist" in said.stderr, said.stderr


def test_make_train_goes_through_it() -> None:
    said = subprocess.run(["make", "-n", "train", "ARGS=run.seed=1"], cwd=ROOT, capture_output=True, text=True)
    assert "launch/local.sh recipes/tiny_moe.yaml run.seed=1" in said.stdout


def test_its_roles_are_those_of_a_job_of_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(ROOT / "recipes" / "tiny_moe.yaml", ["rollout.servers=2"])
    monkeypatch.setenv("GSPO_ROLLOUT_PYTHON", "/vllm/bin/python")
    roles = plan_roles(recipe, tmp_path, 2)
    port = {r.name: r.command[r.command.index("--port") + 1] for r in roles[:3]}
    rendezvous = int(roles[-1].environment["MASTER_PORT"])
    ports = Ports(rendezvous, int(port["controller"]), (int(port["rollout-0"]), int(port["rollout-1"])))
    table = tasks(recipe, spread(recipe, [Host("localhost", "127.0.0.1")], 0), ports, tmp_path)
    assert [(role.name, role.command[1:]) for role in roles] == [(task.name, task.arguments) for task in table]
    assert [role.command[0] for role in roles] == ["/vllm/bin/python"] * 2 + [sys.executable] * 3
    for role, task in zip(roles, table, strict=True):
        assert task.environment.items() <= role.environment.items()
