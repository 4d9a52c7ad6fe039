"""The tiny recipe by the shipped script on the lab, with real Megatron ranks and real vLLM servers."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT, SMALL, START, Job, Workplace, check_done, written
from tests.slurm.lab.cluster import Lab, LabError, wait_for

pytestmark = pytest.mark.timeout(1800)
SERVES = "Application startup complete"
"""What vLLM logs when it starts to serve."""
ASK = """
import json, sys, urllib.error, urllib.request
url, key = sys.argv[1:]
request = urllib.request.Request(url, headers={"Authorization": "Bearer " + key} if key else {})
try:
    print(urllib.request.urlopen(request, timeout=10).read().decode())
except urllib.error.HTTPError as error:
    print(json.dumps(error.code))
"""


def ask(lab: Lab, node: str | None, url: str, key: str) -> object:
    """What a role answers to a program on a node, or on the login node."""
    on = lab.on(node) if node else ()
    return json.loads(lab.run(*on, "python3", "-c", ASK, url, key).stdout)


def places(job: Job, number: int, kind: str) -> list[str]:
    """`name node address` of every task of a kind, as the tasks themselves said."""
    lines = [line for log in job.attempt(number).glob(f"{kind}-*.log") for line in log.read_text().splitlines()]
    return sorted(line.split(": ")[-1].partition(", process")[0] for line in lines if ", process " in line)


def test_two_trainer_and_two_rollout_nodes_stopped_in_between(workplace: Workplace) -> None:
    lab = workplace.lab
    shape = ("placement.rollout_nodes=2", "rollout.servers=2", "trainer.ranks=4", "trainer.max_steps=26")
    job = workplace.submit("two_and_two", *SMALL, *shape, options=["--nodes=4", "--nodelist=node[1-4]"])
    job.wait_for_step(1)
    check_printed_lines(lab, job)
    lose_a_server(job)
    lab.run("scancel", "--batch", "--signal=USR1", str(job.id))
    job.wait_for_attempt(2)
    job.wait_for_step(max(job.steps()) + 1)
    # Some steps are left, so that the roles are there to be asked.
    check_control_plane(lab, job, 2)
    check_done(job, steps=26)
    said = job.text()
    assert "asked to stop (USR1)" in said and "gspo: attempt 1 stopped as asked; step" in said
    assert "gspo: goes on after step" in said
    assert lab.job(job.id)["Restarts"] == "1", "neither for the lost server"
    assert "SLURM ends this attempt" not in said, "it was asked to"
    for number in (1, 2):
        assert job.plan(number)["job"] == str(job.id)
        trainers = [f"trainer-{rank} on node{1 + rank // 2} (10.77.0.{11 + rank // 2})" for rank in range(4)]
        assert places(job, number, "trainer") == trainers
        assert places(job, number, "rollout") == [f"rollout-{n} on node{3 + n} (10.77.0.{13 + n})" for n in range(2)]
    assert (job.run_dir / "logs" / "latest").resolve() == job.attempt(2).resolve()
    again = workplace.submit("two_and_two", *SMALL, *shape, options=["--nodes=4"])
    assert again.finish(START) == "COMPLETED" and "holds a finished run (DONE)" in again.text()


def lose_a_server(job: Job) -> None:
    """Its neighbour serves meanwhile, and with the first weights after its return it serves again."""
    job.kill("rollout", "node4")
    (controller,) = job.attempt(1).glob("controller-*.log")
    wait_for(lambda: "server http://10.77.0.14" in controller.read_text(), START, "server that is taken out")
    job.wait_for_step(max(job.steps()) + 2)
    assert "is back" not in controller.read_text(), "the run must not wait for it"

    log = job.attempt(1) / "rollout-node4.log"
    while "is back" not in controller.read_text():
        # However slow the machine is: the run waits, in parts that the watchdog takes for no standstill.
        with job.frozen(ranks=4), suppress(LabError):
            wait_for(lambda: log.read_text().count(SERVES) > 1, 60, "server that serves again")
        job.wait_for_step(max(job.steps()) + 1)
    assert "gspo: rollout-1 ended and is started again; 2 more times" in log.read_text()


def check_printed_lines(lab: Lab, job: Job) -> None:
    """The log that is to be followed is there, and the command to attach enters the first node beside the roles."""
    lines = dict(line.split(maxsplit=1) for line in job.text().splitlines() if line.startswith(("follow", "attach")))
    assert "trainer-0 on node1" in Path(lines["follow"].removeprefix("tail -F ")).read_text()
    *attach, shell = shlex.split(lines["attach"])
    # No terminal here.
    assert shell == "bash" and lab.run(*attach, "hostname").stdout.strip() == "node1"


def check_control_plane(lab: Lab, job: Job, number: int) -> None:
    """Both servers hold the checked weights; without the key nothing is served, and the key is nowhere to be read."""
    key, tasks = job.key(), job.plan(number)["tasks"]
    controller = tasks[-1]["arguments"][-1]
    servers = [f"http://10.77.0.{13 + n}:{task['ports'][0]}" for n, task in enumerate(tasks[:2])]
    assert not (job.attempt(number) / "key").exists(), "every role has read it"
    status = ask(lab, "node1", f"{controller}/status", key)
    assert isinstance(status, dict)
    assert status["servers"] == dict.fromkeys(servers, ""), "both took part in every update"
    for url in (*[f"{server}/is_paused" for server in servers], f"{controller}/status"):
        # From the login node even the right key opens nothing.
        assert ask(lab, None, url, key) == 401
        assert ask(lab, "node2", url, "") == 401 and ask(lab, "node2", url, "0" * 32) == 401
    record = lab.run("scontrol", "show", "job", "-dd", str(job.id)).stdout
    commands = "".join(lab.run(*lab.on(f"node{n}"), "ps", "-eo", "args").stdout for n in (1, 2, 3, 4))
    for name, text in written(job.run_dir, {"scontrol": record, "log": job.text(), "ps": commands}).items():
        assert key not in text, name


def test_a_node_without_power_costs_no_step(workplace: Workplace) -> None:
    lab = workplace.lab
    shape = ("placement.rollout_nodes=1", "trainer.max_steps=12", "trainer.ranks=2")
    job = workplace.submit("power", *SMALL, *shape, options=["--nodes=3"])
    job.wait_for_step(1)
    lost = job.plan(1)["hosts"][1][0]
    lab.power_off(lost)
    try:
        job.wait_for_attempt(2)
        assert lost not in dict(job.plan(2)["hosts"])
        assert not (job.attempt(1) / "key").exists()
        check_done(job, steps=12)
    finally:
        lab.power_on(lost)
        lab.run("scontrol", "update", f"nodename={lost}", "state=resume", check=False)


def test_a_server_over_the_trainer_s_two_nodes_ends_the_attempt_when_its_engine_dies(workplace: Workplace) -> None:
    shape = ("placement.server_nodes=2", "rollout.tensor_parallel=2", "trainer.ranks=2", "trainer.max_steps=40")
    options = ["--nodes=2", "--nodelist=node[5-6]"]
    job = workplace.submit("spanned", *SMALL, *shape, options=options, GSPO_MAX_RESTARTS="0")
    job.wait_for_step(2)
    assert places(job, 1, "rollout") == ["rollout-0 on node5 (10.77.0.15)", "rollout-0.1 on node6 (10.77.0.16)"]
    assert all(0 <= row["canary_largest"] < 1e-4 for row in job.rows()[1:]), "it samples with the trainer's weights"
    job.kill_engine("node5")
    assert job.finish(START) == "FAILED"
    # The only server: whichever notices first, its task or the controller, gives the reason.
    last = job.last_line()
    assert last.startswith("gspo: rollout failed on node5: rollout-0 ended without") or "no server is left" in last, (
        last
    )


def test_container_path_and_a_heterogeneous_job(workplace: Workplace) -> None:
    # The image has the interpreter's environment; checkout and run directory are there only if they are mounted.
    place, tools = workplace.directory, Path(sys.prefix)
    image = place / "gspo.image"
    image.write_text(f"hide {ROOT / 'gspo_megatron'}\nhide {place / 'inside'}\nenv PATH={tools}/bin:/usr/bin:/bin\n")
    (place / "inside").mkdir()
    mounts = f"{place / 'inside'}:{place / 'inside'},{workplace.cold_start}:{workplace.cold_start}"
    second = ["--nodes=1", "--nodelist=node4", "--gpus-per-node=8", "--exclusive", "--mem=0"]
    job = workplace.submit(
        "inside/run", *SMALL, "trainer.max_steps=3", options=["--nodes=1", "--nodelist=node2", ":", *second],
        GSPO_IMAGE=str(image), GSPO_MOUNTS=mounts, GSPO_VENV="/nowhere",
    )  # fmt: skip
    check_done(job, steps=3)
    assert places(job, 1, "trainer") == [f"trainer-{rank} on node2 (10.77.0.12)" for rank in range(2)]
    assert places(job, 1, "rollout") == ["rollout-0 on node4 (10.77.0.14)"]
    assert (place / "inside" / "run" / "DONE").exists(), "the mounted directory is the one outside"
    forgotten = workplace.submit("outside", *SMALL, options=["--nodes=1"], GSPO_IMAGE=f"{image}.missing")
    assert forgotten.finish(START) == "FAILED" and "cannot open image" in forgotten.text()
    image.write_text(image.read_text().replace(f"{tools}/bin:/usr/bin:/bin", str(place / "empty")))
    without = workplace.submit("bare", *SMALL, options=["--nodes=1"], GSPO_IMAGE=str(image))
    assert without.finish(START) == "FAILED" and f"has no python3 on its PATH ({place / 'empty'})" in without.text()
