"""Jobs of the shipped launch script on the lab, and what they left behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.data.sample_index import read_samples
from gspo_megatron.own_directory import RUN, claim_directory
from tests.places import ROOT
from tests.slurm.lab.cluster import Lab, LabError, wait_for

CHEAP = ROOT / "tests" / "slurm" / "cheap"
SCRIPT = "launch/gspo_moe.sh"
TINY = "recipes/tiny_moe.yaml"
START = 1200.0
"""Seconds that a run may take to its first checkpoint: six processes import torch, and more, on two cores."""
END = 300.0
"""Seconds that a job that runs nothing may take; a second on a quiet machine."""
LAST = 40
"""Last step of a run of cheap roles that is to end by itself: long enough to be stopped before."""
SMALL = (
    "placement.gpu=cpu", "batch.prompts=8", "batch.answers=4", "batch.updates=2", "rollout.max_answer_tokens=12",
    "evaluation.problems=8", "evaluation.every=0", "checkpoint.every=1", "optimizer.warmup_updates=0",
    # Sums of single digits: a minute of fine-tuning gives some right answers, so that there is a gradient.
    "data.options={min_digits: 1, max_digits: 1}", "data.held_out=16", "cold_start.steps=60",
    "cold_start.batch_size=64", "cold_start.warmup_steps=5", "cold_start.worked_fraction=0",
)  # fmt: skip


class Workplace:
    """Where the jobs of a test session run: the shared directory that a user would have."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.directory = lab.home / "work"
        self.cold_start = self.directory / "cold_start"
        self.cold_start.mkdir(parents=True)
        self.jobs: list[Job] = []
        self.kept: set[int] = set()
        """Jobs of a module, which several tests look at."""

    def share(self) -> Workplace:
        """The same place, for other jobs."""
        other = copy(self)
        other.jobs, other.kept = [], set()
        return other

    def submit(
        self,
        name: str,
        *overrides: str,
        options: Sequence[str],
        recipe: str = TINY,
        cwd: Path | str = ROOT,
        directory: str = "",
        **environment: str,
    ) -> Job:
        """`sbatch OPTIONS launch/gspo_moe.sh RECIPE OVERRIDES` with a run directory of this name, or another one."""
        run_dir = self.directory / (directory or name)
        log = self.directory / f"{name}.log"
        settings = {"GSPO_SITE": "/dev/null", "GSPO_VENV": sys.prefix, **environment}
        where = (f"run.directory={run_dir}", f"cold_start.cache={self.cold_start}")
        arguments = (f"--output={log}", *options, str(ROOT / SCRIPT), recipe, *overrides, *where)
        job = Job(self.lab, self.lab.submit(*arguments, environment=settings, cwd=Path(cwd)), run_dir, log)
        self.jobs.append(job)
        return job

    def cheap(self, name: str, *overrides: str, options: Sequence[str], directory: str = "", **environment: str) -> Job:
        """The same with small processes as roles (`tests/slurm/cheap`), so that a job is done in seconds."""
        environment = {"PYTHONPATH": str(CHEAP), **environment}
        return self.submit(name, *SMALL, *overrides, options=options, directory=directory, **environment)

    def resume(self, job: Job, name: str, **environment: str) -> Job:
        """Submit what a job's log says that resumes it."""
        (line,) = [line for line in job.text().splitlines() if line.startswith("resume ")][-1:]
        _, program, *words = shlex.split(line)
        assert program == "sbatch"
        # SLURM's record has the limit that a test has set meanwhile; the run is to go on to its end.
        words = [word for word in words if not word.startswith("--time=")]
        log = self.directory / f"{name}.log"
        settings = {"GSPO_SITE": "/dev/null", "GSPO_VENV": sys.prefix, **environment}
        number = self.lab.submit(f"--output={log}", *words, environment=settings, cwd=ROOT)
        again = Job(self.lab, number, job.run_dir, log)
        self.jobs.append(again)
        return again

    @contextmanager
    def keeping(self, jobs: Iterable[Job]) -> Iterator[None]:
        """Jobs that run until the end of this context, whatever tests end meanwhile."""
        self.kept = {job.id for job in jobs if job.lab is self.lab}
        try:
            yield
        finally:
            self.kept = set()
            self.cancel_all()

    def cancel_all(self) -> None:
        """End what a failed test left running."""
        for job in self.jobs:
            if job.id in self.kept:
                continue
            self.lab.run("scancel", str(job.id), check=False)

    def logs(self) -> str:
        """Of the newest job and of the cluster's daemons."""
        job = self.jobs[-1] if self.jobs else None
        return f"{job.everything() if job else ''}\n{self.lab.logs()}"


@dataclass(frozen=True)
class Job:
    """One job."""

    lab: Lab
    id: int
    run_dir: Path
    log: Path

    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text() if self.log.exists() else ""

    def last_line(self) -> str:
        """The last thing it said."""
        return self.text().rstrip().rpartition("\n")[2]

    def finish(self, timeout: float) -> str:
        """Wait for its end; returns SLURM's state."""
        return self.lab.wait(self.id, timeout)["JobState"]

    def exit_code(self) -> int:
        """Of the batch script."""
        return int(self.lab.job(self.id)["ExitCode"].split(":")[0])

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl, without a line that is being written."""
        file = self.run_dir / "metrics.jsonl"
        *whole, _ = file.read_text().split("\n") if file.exists() else [""]
        return [json.loads(line) for line in whole]

    def steps(self) -> list[int]:
        """Steps that metrics.jsonl has a row of."""
        return [row["step"] for row in self.rows()]

    def wait_for_step(self, step: int, timeout: float = START) -> None:
        """Wait until the checkpoint of a step is complete. Raises LabError if the job ends before."""
        marker = self.run_dir / "checkpoints" / f"step_{step:06d}" / "COMPLETE"
        self._wait(marker.exists, timeout, f"checkpoint of step {step}")

    def wait_for_words(self, words: str, timeout: float = START) -> None:
        """Wait until its log holds some words. Raises LabError if the job ends before."""
        self._wait(lambda: words in self.text(), timeout, repr(words))

    def _wait(self, ask: Callable[[], bool], timeout: float, what: str) -> None:
        def reached() -> bool:
            if ask():
                return True
            # Without an answer where slurmctld is down.
            record = self.lab.run("scontrol", "show", "job", "-o", str(self.id), check=False).stdout
            if re.search(r" JobState=(FAILED|COMPLETED) Reason=", record) and not ask():
                raise LabError(f"job {self.id} ended before {what}: {self.text()[-2000:]}")
            return False

        wait_for(reached, timeout, f"{what} (the job's last words: {self.last_line()})", pause=0.25)

    def checkpointed(self) -> int:
        """The newest step whose checkpoint is complete; 0 without any."""
        markers = (self.run_dir / "checkpoints").glob("step_*/COMPLETE")
        return max((int(marker.parent.name.removeprefix("step_")) for marker in markers), default=0)

    def rank(self, rank: int) -> int:
        """Process id of a trainer rank, as this program sees it."""
        command = f"-m gspo_megatron.trainer.loop --run-dir {self.run_dir} ".encode()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if command in path.read_bytes().replace(b"\0", b" ") and f"RANK={rank}".encode() in (
                    path.with_name("environ").read_bytes().split(b"\0")
                ):
                    return int(path.parent.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
        raise LabError(f"trainer-{rank} of job {self.id} does not run")

    def key(self) -> str:
        """The job's key, as its roles have it."""
        variables = Path(f"/proc/{self.rank(0)}/environ").read_bytes().split(b"\0")
        (key,) = [value.removeprefix(b"GSPO_JOB_KEY=") for value in variables if value.startswith(b"GSPO_JOB_KEY=")]
        return key.decode()

    @contextmanager
    def frozen(self, ranks: int = 2) -> Iterator[None]:
        """Stop its trainer ranks for a while, so that the run stays where it is."""
        pids = [self.rank(rank) for rank in range(ranks)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def set_limit(self, minutes: int) -> None:
        """Change its time limit, counted from its start."""
        self.lab.run("scontrol", "update", f"JobId={self.id}", f"TimeLimit={minutes}")

    def minutes(self) -> int:
        """Whole minutes that it has run."""
        hours, minutes, _ = self.lab.job(self.id)["RunTime"].split(":")
        return 60 * int(hours) + int(minutes)

    def seen(self) -> list[dict[str, Any]]:
        """What the cheap trainer ranks saw of their environment, by attempt and rank."""
        return [json.loads(path.read_text()) for path in sorted((self.run_dir / "seen").glob("*.json"))]

    def wait_for_attempt(self, number: int, timeout: float = 600) -> None:
        """Wait until an attempt is planned. SLURM needs some 25 s to miss a node, and 6 to queue a job again."""
        self._wait((self.attempt(number) / "plan.json").exists, timeout, f"attempt {number}")

    def attempt(self, number: int) -> Path:
        """Directory of an attempt."""
        return self.run_dir / "logs" / f"attempt_{number}"

    def plan(self, number: int) -> dict[str, Any]:
        """Where an attempt's tasks ran."""
        return json.loads((self.attempt(number) / "plan.json").read_text())

    def kill(self, kind: str, node: str) -> None:
        """SIGKILL to the first process of a role on a node, as if the kernel wanted its memory back."""
        self.lab.run(*self.lab.on(node), "kill", "-KILL", self._process(kind, node))

    def kill_engine(self, node: str) -> None:
        """The same to the process in which the server of a node runs its engine."""
        on = self.lab.on(node)
        found = self.lab.run(*on, "pgrep", "-P", self._process("rollout", node), "-f", "VLLM::EngineCore").stdout
        self.lab.run(*on, "kill", "-KILL", found.strip())

    def _process(self, kind: str, node: str) -> str:
        module = {"trainer": "gspo_megatron.trainer.loop", "rollout": "gspo_megatron.inference.server"}[kind]
        # `srun` runs on a node too, and has the same words in its command line.
        pattern = f"^[^ ]*python[^ ]* -m {module} --run-dir {self.run_dir}"
        return self.lab.run(*self.lab.on(node), "pgrep", "-f", pattern).stdout.split()[0]

    def everything(self) -> str:
        """Its own words and the ends of all its roles' logs."""
        texts = [f"--- {self.log}\n{self.text()}"]
        for path in sorted(self.run_dir.glob("logs/attempt_*/**/*.*")):
            if path.suffix in (".log", ".txt") and path.stat().st_size:
                lines = path.read_text(errors="replace").splitlines()[-25:]
                texts.append("\n".join([f"--- {path}", *lines]))
        return "\n".join(texts)


def make_run(run_dir: Path) -> Path:
    """A run directory as an earlier job leaves it, for a test to put something into."""
    claim_directory(run_dir, RUN, "run.directory")
    return run_dir


def refused(job: Job) -> str:
    """What a job says that was refused before any role started."""
    assert job.finish(END) == "FAILED" and job.exit_code() == 2, job.text()
    assert not list(job.run_dir.glob("logs/attempt_*/trainer-*.log")), "no role may have started"
    return job.text()


def check_done(job: Job, steps: int, afterwards: str | None = None) -> None:
    """It ended DONE, every step is there once, and every weight update passed the canary.

    `afterwards`: words of the lines that may come after DONE, as from a replaced attempt whose network is back late.
    """
    assert job.finish(START) == "COMPLETED" and (job.run_dir / "DONE").exists(), job.last_line()
    words = job.text().splitlines()
    while afterwards and afterwards in words[-1]:
        words.pop()
    assert words[-1].startswith(f"gspo: DONE; results are in {job.run_dir}; to train further: ")
    rows = job.rows()
    assert [row["step"] for row in rows] == list(range(steps + 1)), "a step is lost or doubled"
    trained = rows[1:]
    assert [row["updates"] for row in trained] == [2 * row["step"] for row in trained]
    assert [row["weight_version"] for row in trained] == [row["step"] - 1 for row in trained]
    assert all(0 <= row["canary_largest"] < 1e-4 for row in trained), "each server was held against the trainer"
    assert any(row["grad_norm"] > 0 for row in trained), "the weights must have changed"
    indices = {sample.ref.prompt_index for sample in read_samples(job.run_dir / "samples")}
    assert indices == set(range(8 * steps)), "each prompt once, in order"


def written(path: Path, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Files of a run that a secret must not be in, by path."""
    suffixes = {".log", ".txt", ".json", ".jsonl", ".yaml", ".html"}
    return {
        str(file): file.read_text(errors="replace")
        for file in path.rglob("*")
        if file.is_file() and file.suffix in suffixes
    } | dict(names or {})
