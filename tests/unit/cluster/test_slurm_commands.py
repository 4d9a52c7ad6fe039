"""What scontrol prints, as it is read: what people write into a job's record is no field of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.cluster.slurm_commands import (
    await_answer,
    describe_job,
    exclusion_fault,
    is_ending,
    is_preempted,
    plain_names,
    read_field,
)

NAMES = (
    "gspo", "x Requeue=0 JobState=FAILED PreemptTime=now", "x\n   Requeue=0 JobState=FAILED\n   ExcNodeList=n9",
    "x UserId=a(1) GroupId=b(2) MCS_label=N/A Requeue=0", "   Command=/x/launch/gspo_moe.sh",
)  # fmt: skip
RECORD = """JobId=7 HetJobId=7 HetJobOffset=0 JobName={name}
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   PreemptEligibleTime=2026-11-30T14:55:44 PreemptTime=None
   Partition=gpu AllocNode:Sid=ctl:1
   ReqNodeList=n[1-2] ExcNodeList=n3
   NumNodes=2 NumCPUs=1
   Comment={text}
     Nodes=n[1-2] CPU_IDs=0 Mem=0 GRES=gpu:8(IDX:0-7)
   Command={text}
   WorkDir={text}

JobId=8 HetJobId=7 HetJobOffset=1 JobName=gspo
   JobState=PENDING Requeue=0
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show job") cat {folder}/record ;;
"show partition") echo "   Nodes=n[1-4]" ;;
"show hostnames") eval echo "$(sed 's/\\[/{{/; s/\\]/}}/; s/-/../' <<<"$3")" | tr ' ,' '\\n\\n' ;;
esac
"""


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "scontrol"
    program.write_text(SCONTROL.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_job_is_read_as_its_record(scontrol: Path, name: str) -> None:
    (scontrol / "record").write_text(RECORD.format(name=name, text=name.replace("\n", " ")))
    record = describe_job("7")
    fields = {field: read_field(record, field) for field in ("Requeue", "JobState", "PreemptTime", "ExcNodeList")}
    assert fields == {"Requeue": "1", "JobState": "RUNNING", "PreemptTime": "", "ExcNodeList": "n3"}
    assert not is_preempted(record) and not is_ending(record)
    assert record.count("\n") == 1 and "HetJobId=7" in record and " CPU_IDs=0 Mem=0 GRES=gpu:8" in record


def test_names_that_people_have_folded_are_unfolded(scontrol: Path) -> None:
    assert plain_names(["n[1-2]"]) == ["n1", "n2"] and plain_names(["n1", "n4"]) == ["n1", "n4"]
    (scontrol / "scontrol").unlink()
    assert plain_names(["n[1-2]"]) == ["n[1-2]"]


def test_why_slurmctld_does_not_answer_is_said(scontrol: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "scontrol: error: Could not establish a configuration source"
    (scontrol / "scontrol").write_text(f"#!/bin/bash\necho '{words}' >&2\nexit 1\n")
    answers = iter([None, "here"])
    assert await_answer(lambda: next(answers)) == "here"
    assert capsys.readouterr().out == f"gspo: slurmctld does not answer; waiting for it ({words})\n"


@pytest.mark.parametrize(
    ("asked", "wanted", "bad", "fault"),
    [
        ("n[1-2]", 2, ["n2"], "--nodelist asks for n2"),
        ("n[1-2]", 2, ["n4"], ""),
        ("(null)", 2, ["n1"], ""),
        ("(null)", 2, ["n1", "n2"], "partition gpu has 1 other node and the job takes 2"),
        ("(null)", 3, ["n1"], "partition gpu has 2 other nodes and the job takes 3"),
        ("(null)", 3, ["n3", "n9"], ""),
    ],
)
def test_nodes_that_a_job_cannot_do_without(
    scontrol: Path, asked: str, wanted: int, bad: list[str], fault: str
) -> None:
    (scontrol / "record").write_text(
        f"JobId=7 JobName=x\n   Partition=gpu\n   ReqNodeList={asked} ExcNodeList=n3\n   NumNodes={wanted} X=1\n"
    )
    assert exclusion_fault(describe_job("7"), bad) == fault
