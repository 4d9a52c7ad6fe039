"""What `launch/gspo_moe.sh --dry-run` says, against golden files. This file, run by Python, renews them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import GOLDEN, ROOT

SCRIPT = ROOT / "launch" / "gspo_moe.sh"
RECIPE = "tests/data/golden/moe.yaml"
ROLLOUT_NODES = {1: 1, 2: 1, 16: 4, 32: 8}
"""Of each number of nodes, when servers have nodes of their own. Of one node nothing is left, and the file says so."""
CASES = [(nodes, placement) for nodes in ROLLOUT_NODES for placement in ("colocated", "disaggregated")]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "GSPO"))}
    # No site file: what a developer keeps in launch/site.sh must not change the answer.
    settings = {**inherited, "GSPO_SITE": "/dev/null", "GSPO_VENV": sys.prefix, **environment}
    return subprocess.run([str(SCRIPT), *arguments], env=settings, cwd=ROOT, capture_output=True, text=True)


def draw(nodes: int, placement: str) -> str:
    apart = ROLLOUT_NODES[nodes] if placement == "disaggregated" else 0
    overrides = (f"placement.rollout_nodes={apart}", f"rollout.servers={2 * (apart or nodes)}")
    said = run("--dry-run", f"--nodes={nodes}", RECIPE, *overrides)
    return f"{said.stderr}{said.stdout}exit {said.returncode}\n".replace(sys.prefix, ".venv")


def golden_file(nodes: int, placement: str) -> Path:
    return GOLDEN / f"dry_run_{nodes:02d}_{placement}.txt"


@pytest.mark.parametrize(("nodes", "placement"), CASES)
def test_dry_run_says_what_the_golden_file_says(nodes: int, placement: str) -> None:
    said = draw(nodes, placement)
    assert said == golden_file(nodes, placement).read_text()
    assert str(ROOT) not in said and str(Path.home()) not in said


def test_without_a_number_of_nodes_it_draws_what_sbatch_would_start() -> None:
    said = run("--dry-run", RECIPE, "rollout.servers=8")
    header = re.findall(r"^#SBATCH --(?:nodes|gpus-per-node)=(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert "nodes       {} with {} GPUs each".format(*header) in said.stderr


def test_the_235b_on_h100_as_its_recipe_says_has_servers_of_two_nodes() -> None:
    overrides = (
        "placement.gpu=h100",
        "rollout.pipeline_parallel=2",
        "rollout.servers=8",
        "trainer.recompute=selective",
    )
    said = run("--dry-run", "--nodes=16", "recipes/qwen3_235b_a22b_gspo.yaml", *overrides)
    assert said.returncode == 0, said.stderr
    assert (
        "rollout     8 servers of tensor-parallel size 8 with 2 stages, each over 2 nodes, on node[01-16]"
        in said.stderr
    )


def test_an_unknown_option_is_refused() -> None:
    said = run("--dry-run", "--node=4", RECIPE)
    assert said.returncode == 2
    assert "unknown option --node=4" in said.stderr


def test_two_recipes_are_refused() -> None:
    said = run("--dry-run", RECIPE, RECIPE)
    assert said.returncode == 2 and "two recipes" in said.stderr


def test_a_site_file_that_is_missing_is_refused() -> None:
    said = run("--dry-run", RECIPE, GSPO_SITE="/nowhere/site.sh")
    assert said.returncode == 2 and "/nowhere/site.sh does not exist" in said.stderr


def test_container_flags_only_with_an_image(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text("GSPO_ROLLOUT_IMAGE=/images/vllm.sqsh\nGSPO_MOUNTS=/models:/models:ro\n")
    said = run("--dry-run", "--nodes=1", RECIPE, "rollout.servers=2", GSPO_SITE=str(site))
    rollout, controller, trainer = said.stdout.splitlines()
    assert "--container-image=/images/vllm.sqsh" in rollout
    assert f"--container-mounts={ROOT}:{ROOT},/models:/models:ro" in rollout
    assert " python3 -m launch.lib.task" in rollout
    assert "--container" not in controller + trainer and "/bin/python -m launch.lib.task" in trainer


def test_what_sbatch_needs_is_in_the_header() -> None:
    options = dict(re.findall(r"^#SBATCH (--[^=\n]+)=?(.*)$", SCRIPT.read_text(), re.MULTILINE))
    assert options["--output"] == "%x-%j.log", "the directory that sbatch was called in always exists"
    assert options["--signal"] == "B:USR1@300" and "--requeue" in options and options["--open-mode"] == "append"
    assert not {"--account", "--partition", "--qos", "--nodelist"} & set(options)


def test_nothing_in_launch_reaches_out_of_the_job() -> None:
    for path in sorted((ROOT / "launch").rglob("*")):
        if path.suffix not in (".sh", ".py"):
            continue
        code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        for word in ("ssh ", "pkill", "killall", "/home/", "/scratch/", "BASH_SOURCE%"):
            assert word not in code, f"{path} holds {word!r}"


if __name__ == "__main__":
    for case in CASES:
        golden_file(*case).write_text(draw(*case))
