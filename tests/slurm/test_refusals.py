"""What the launch script refuses on the real SLURM before any role starts: a sentence with the fix, exit 2."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.slurm.jobs import END, ROOT, SMALL, Workplace, refused, written
from tests.slurm.lab.cluster import wait_for
from tests.slurm.lanes import Scenarios

pytestmark = pytest.mark.timeout(1800)
SCENARIOS = Scenarios()
SECRET = "hf_0123456789abcdef"


@SCENARIOS.add
def a_recipe_that_does_not_fit_the_nodes(workplace: Workplace) -> None:
    job = workplace.submit("uneven", *SMALL, "placement.rollout_nodes=2", "rollout.servers=3", options=["--nodes=3"])
    assert "[servers-uneven-on-nodes] rollout.servers: 3 servers do not divide over 2 nodes" in refused(job)
    job = workplace.submit("unknown", "trainer.max_step=3", options=["--nodes=1"])
    assert "max_steps" in refused(job)


@SCENARIOS.add
def nodes_that_lack_what_slurm_granted(workplace: Workplace) -> None:
    # Without placement.gpu=cpu the granted (and here fake) GPUs count, and no nvidia-smi lists them.
    job = workplace.submit("gpus", "placement.gpu=h100", "placement.rollout_nodes=1", options=["--nodes=2"])
    said = refused(job)
    lack = r"(node\d): nvidia-smi lists 0 GPUs where SLURM granted 8; drain the node and leave the node out"
    assert len(set(re.findall(lack, said))) == 2, "each of its nodes, whichever are free"


@SCENARIOS.add
def a_heterogeneous_job_puts_the_servers_on_its_second_component(workplace: Workplace) -> None:
    second = ["--nodes=1", "--nodelist=node4", "--gpus-per-node=8", "--exclusive", "--mem=0"]
    parts = ["--nodes=2", "--nodelist=node[1-2]", ":", *second]
    said = refused(workplace.submit("het", "placement.gpu=h100", options=parts))
    assert "16 ranks, 8 a node, on node[1-2]" in said and "1 a node, on node4" in said
    assert "node4: nvidia-smi lists 0 GPUs" in said, "the preflight must have run on the second component too"


def test_a_port_in_use(workplace: Workplace) -> None:
    lab = workplace.lab
    # The controller's port of every job id.
    hold = "import socket, time; s = [socket.create_server(('', p)) for p in range(20001, 32000, 16)]; "
    hold += "open('/tmp/holding', 'w'); time.sleep(600)"
    lab.run(*lab.on("node1"), "bash", "-c", f'python3 -c "{hold}" >/dev/null 2>&1 & echo $! >/tmp/holder')
    wait_for(lambda: not lab.run(*lab.on("node1"), "ls", "/tmp/holding", check=False).returncode, END, "held ports")
    try:
        job = workplace.submit("port", *SMALL, options=["--nodes=2", "--nodelist=node[1-2]"])
        port = 20001 + 16 * (job.id % 750)
        assert f"node1: port {port} is taken by another program; end it (ss -tlnp shows it)" in refused(job)
    finally:
        lab.run(*lab.on("node1"), "bash", "-c", "kill $(cat /tmp/holder)")


@SCENARIOS.add
def an_environment_that_one_node_lacks(workplace: Workplace) -> None:
    # /tmp is each node's own: what the batch host has there, the second node has not.
    lab, venv = workplace.lab, Path("/tmp/venv-of-node1")
    lab.run(*lab.on("node1"), "ln", "-sfn", sys.prefix, str(venv))
    job = workplace.submit("lacking", *SMALL, options=["--nodes=2", "--nodelist=node[1-2]"], GSPO_VENV=str(venv))
    assert f"node2: {venv}/bin/python is not there; run make setup, or set GSPO_VENV" in refused(job)


@SCENARIOS.add
def a_file_of_the_recipe_that_one_node_lacks(workplace: Workplace) -> None:
    lab, tokenizer = workplace.lab, "/tmp/tokenizer-of-node1.model"
    lab.run(*lab.on("node1"), "cp", str(ROOT / "recipes" / "tokenizers" / "arithmetic.model"), tokenizer)
    options = ["--nodes=2", "--nodelist=node[1-2]"]
    said = refused(workplace.submit("file", *SMALL, f"tokenizer.path={tokenizer}", options=options))
    assert f"node2: tokenizer.path={tokenizer} is not there; put it on a file system that all nodes share" in said
    assert "node1: " not in said


@SCENARIOS.add
def a_finished_run_is_not_run_again(workplace: Workplace) -> None:
    jobs = [workplace.cheap("finished", "trainer.max_steps=1", options=["--nodes=1"])]
    assert jobs[0].finish(END) == "COMPLETED"
    jobs.append(workplace.cheap("finished", "trainer.max_steps=1", options=["--nodes=1"]))
    assert jobs[1].finish(END) == "COMPLETED" and "holds a finished run (DONE)" in jobs[1].text()
    assert jobs[1].steps() == [1]


@SCENARIOS.add
def it_finds_itself_from_another_directory(workplace: Workplace) -> None:
    # Submitted from elsewhere, SLURM runs a copy from its spool directory, and relative names are the user's.
    elsewhere = workplace.directory / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.yaml").write_text(f"base: {ROOT / 'recipes' / 'tiny_moe.yaml'}\nbatch: {{answers: 0}}\n")
    job = workplace.submit("spool", options=["--nodes=1"], recipe="mine.yaml", cwd=elsewhere)
    assert "batch.answers" in refused(job)


@SCENARIOS.add
def secrets_stay_out_of_what_is_written(workplace: Workplace) -> None:
    shape = ("placement.gpu=h100", "placement.rollout_nodes=1")
    job = workplace.submit("secret", *shape, options=["--nodes=2"], HF_TOKEN=SECRET)
    refused(job)
    record = workplace.lab.run("scontrol", "show", "job", "-dd", str(job.id)).stdout
    for name, text in written(job.run_dir, {"scontrol": record, "log": job.text()}).items():
        assert SECRET not in text, name
    assert not (job.attempt(1) / "key").exists()


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "launch").rglob("*.sh")))
def test_scripts_parse(file: str) -> None:
    path = next((ROOT / "launch").rglob(file))
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.fixture(scope="module")
def ends(workplace: Workplace) -> dict[str, Future[None]]:
    return SCENARIOS.run(workplace)


@pytest.mark.parametrize("name", SCENARIOS.functions)
def test_refusals(name: str, ends: dict[str, Future[None]]) -> None:
    ends[name].result()
