"""The lab is what it says: nodes with their own names, addresses, ports and files, under a real slurmctld."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm.jobs import Workplace
from tests.slurm.lab.cluster import GPUS, Lab, wait_for

pytestmark = pytest.mark.timeout(900)
LOOK = """
touch /tmp/here-$SLURM_JOB_ID /dev/shm/here
python3 -c 'import socket, time; s = socket.create_server(("", 8000)); time.sleep(1)' || exit 1
echo $SLURM_JOB_ID $SLURMD_NODENAME $(hostname) $(hostname -I) $(ls /tmp/here-* | wc -l) $CUDA_VISIBLE_DEVICES $(nice)
"""


def run_script(lab: Lab, directory: Path, name: str, text: str, *options: str) -> str:
    script, log = directory / f"{name}.sh", directory / f"{name}.log"
    script.write_text(f"#!/bin/bash\n{text}\n")
    job = lab.submit(*options, f"--output={log}", str(script))
    assert lab.wait(job, 180)["JobState"] == "COMPLETED", lab.logs()
    return log.read_text()


def test_nodes_have_names_addresses_ports_and_files_of_their_own(lab: Lab, workplace: Workplace) -> None:
    look = workplace.directory / "look.sh"
    look.write_text(LOOK)
    said = run_script(
        lab, workplace.directory, "nodes", f"srun -N3 -n3 bash {look}", "--nodes=3", f"--gpus-per-node={GPUS}"
    )
    rows = sorted(line.split() for line in said.splitlines())
    assert [row[1:4] for row in rows] == [[f"node{n}", f"node{n}", f"10.77.0.{10 + n}"] for n in (1, 2, 3)], said
    assert len({row[0] for row in rows}) == 1 and rows[0][0].isdigit()
    assert {row[4] for row in rows} == {"1"}, "each node must see only its own /tmp"
    assert {row[5] for row in rows} == {",".join(str(n) for n in range(GPUS))}
    assert {row[6] for row in rows} == {str(os.nice(0))}, "tasks must not run before the rest of the machine"


def test_container_mounts_are_really_bound(lab: Lab, workplace: Workplace) -> None:
    place = workplace.directory
    (place / "hidden").mkdir()
    (place / "hidden" / "file").write_text("model")
    image = place / "look.image"
    image.write_text(f"hide {place / 'hidden'}\nenv MADE_BY=image\n")
    mounts = f"{place / 'hidden'}:{place / 'seen'}:ro"
    flags = f"--container-image={image} --container-mounts={mounts} --container-workdir={place}"
    inside = f"ls {place}/hidden; cat {place}/seen/file; echo; touch {place}/seen/new; pwd; echo $MADE_BY"
    said = run_script(lab, place, "mounts", f"srun {flags} bash -c '{inside}' 2>&1", "--nodes=1")
    # srun brings errors and output by different ways: their order says nothing.
    lines = [line for line in said.splitlines() if "Read-only file system" not in line]
    assert lines == ["model", str(place), "image"] and "Read-only file system" in said, said
    missing = f"srun --container-image={place}/none true 2>&1; true"
    assert "cannot open image" in run_script(lab, place, "no_image", missing, "--nodes=1")


def test_a_node_goes_and_comes_back(lab: Lab) -> None:
    wait_for(lambda: lab.idle_nodes() == lab.nodes, 180, "idle lab")
    lab.power_off("node6")
    lab.run("scontrol", "update", "nodename=node6", "state=down", "reason=test")
    assert lab.idle_nodes() == lab.nodes - 1
    lab.power_on("node6")
    # Refused where the node was quicker and is in service already.
    lab.run("scontrol", "update", "nodename=node6", "state=resume", check=False)
    wait_for(lambda: lab.idle_nodes() == lab.nodes, 180, "node6 again")


def test_the_end_of_one_process_ends_the_cluster(lab: Lab) -> None:
    with Lab(nodes=2) as other:
        assert other.home != lab.home, "labs may stand side by side"
        assert other.idle_nodes() == 2
        home = other.home
        daemons = [path for path in Path("/proc").glob("[0-9]*") if str(home) in command_line(path)]
        assert len(daemons) >= 4, "slurmctld, munged and two slurmd"
    assert not [path for path in Path("/proc").glob("[0-9]*") if str(home) in command_line(path)]
    assert not home.exists()


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
