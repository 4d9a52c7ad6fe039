"""The names in a run directory: one property a file, and one strict parser of the numbered names.

A name that it would not have written (`step_12`) is a user's. Runs under a batch node's Python 3.9 without packages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NumberedName:
    """A family of names that differ in a number: `step_000012`."""

    prefix: str
    """What stands before the underscore."""
    digits: int
    """Least number of digits; zeros fill the front."""
    suffix: str = ""
    """What follows the number: `.bin`."""

    def name(self, number: int) -> str:
        """The name of one member."""
        return f"{self.prefix}_{number:0{self.digits}d}{self.suffix}"

    def parse(self, name: str) -> int | None:
        """The number in a name of this family; None for any other name."""
        match = re.fullmatch(rf"{self.prefix}_([0-9]+){re.escape(self.suffix)}", name)
        return int(match[1]) if match and self.name(int(match[1])) == name else None

    def find(self, directory: Path) -> dict[int, Path]:
        """Members in a directory by number, smallest first; empty where there is no such directory."""
        paths = directory.iterdir() if directory.is_dir() else ()
        return dict(sorted((number, path) for path in paths if (number := self.parse(path.name)) is not None))


CHECKPOINT = NumberedName("step", 6)
"""Checkpoints, by rollout batches trained on."""
EXPORT = NumberedName("hugging_face", 6)
"""Hugging Face directories of `checkpoint.export_every`, by the same number."""
ATTEMPT = NumberedName("attempt", 1)
"""Log directories, by attempt, from 1."""
DUMP = NumberedName("update", 6)
"""Failure dumps, by optimizer step."""


@dataclass(frozen=True)
class CheckpointDir:
    """One checkpoint: `checkpoints/step_000012`. The files of the ranks are named in policy/snapshot.py."""

    path: Path

    @property
    def state(self) -> Path:
        """Counters, controller state, layout, objective and file sizes."""
        return self.path / "state.json"

    @property
    def recipe(self) -> Path:
        """The recipe that was running."""
        return self.path / "recipe.resolved.yaml"

    @property
    def marker(self) -> Path:
        """Written last: a directory without it is no checkpoint."""
        return self.path / "COMPLETE"


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints in `checkpoints`, oldest first."""
    return [path for path in CHECKPOINT.find(directory).values() if CheckpointDir(path).marker.is_file()]


def partial_name(step: int, token: str) -> str:
    """Name of a checkpoint while it is written: `.step_000012.0a1b2c3d.partial`; the token is of this save."""
    return f".{CHECKPOINT.name(step)}.{token}.partial"


def is_partial(name: str) -> bool:
    """Whether this is the name of a checkpoint that is being written, or was left half-written."""
    match = re.fullmatch(r"\.(step_[0-9]+)\.[0-9a-f]{8}\.partial", name)
    return match is not None and CHECKPOINT.parse(match[1]) is not None


@dataclass(frozen=True)
class AttemptDir:
    """The logs of one attempt: `logs/attempt_3`."""

    path: Path

    @property
    def run(self) -> RunDir:
        """The run directory that it lies in."""
        return RunDir(self.path.parent.parent)

    @property
    def key(self) -> Path:
        """The job's key, while the attempt runs; readable by the user alone."""
        return self.path / "key"

    @property
    def plan(self) -> Path:
        """The table of tasks of a SLURM job."""
        return self.path / "plan.json"

    @property
    def job(self) -> Path:
        """The id of the SLURM job that it belongs to."""
        return self.path / "job"

    @property
    def preflight(self) -> Path:
        """Directory of the reports of the nodes of a SLURM job."""
        return self.path / "preflight"

    @property
    def environment(self) -> Path:
        """Environment variables that the attempt ran under, without secrets."""
        return self.path / "environment.json"

    def log(self, role: str) -> Path:
        """Output of one role: `trainer-0`; of a SLURM job, of a kind of role on a node: `trainer-node7`."""
        return self.path / f"{role}.log"

    def srun(self, step: str) -> Path:
        """What srun itself wrote about a step: which task ended, and how."""
        return self.path / f"srun-{step}.txt"


@dataclass(frozen=True)
class RunDir:
    """Every file and directory that a run writes."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe with every key."""
        return self.path / "recipe.resolved.yaml"

    @property
    def named_files(self) -> Path:
        """A digest of each file that the recipe names and that a resumed run must find as it was."""
        return self.path / "named_files.json"

    @property
    def run_id(self) -> Path:
        """The id of the run, which its servers carry."""
        return self.path / "run_id"

    @property
    def objective(self) -> Path:
        """The effective objective in one sentence."""
        return self.path / "objective.txt"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same numbers for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def sinks(self) -> Path:
        """One directory a metric sink."""
        return self.path / "sinks"

    @property
    def warnings(self) -> Path:
        """Named warnings of the running job, one object each."""
        return self.path / "warnings.jsonl"

    @property
    def provenance(self) -> Path:
        """With which code and packages the run was started, one object a start."""
        return self.path / "provenance.jsonl"

    @property
    def examples(self) -> Path:
        """Responses of the last evaluation to three problems."""
        return self.path / "examples.json"

    @property
    def answers(self) -> Path:
        """Every response of `gspo eval`, one JSON object a line."""
        return self.path / "answers.jsonl"

    @property
    def weights_source(self) -> Path:
        """Where the weights came from that `gspo eval` evaluated: one path."""
        return self.path / "weights_source"

    @property
    def evaluation(self) -> Path:
        """The results of `gspo eval`."""
        return self.path / "evaluation.json"

    @property
    def plot(self) -> Path:
        """Accuracy, reward and clip fraction by step."""
        return self.path / "accuracy.png"

    @property
    def page(self) -> Path:
        """The page of the run."""
        return self.path / "report.html"

    @property
    def samples(self) -> Path:
        """The sample store."""
        return self.path / "samples"

    @property
    def model(self) -> Path:
        """What the servers start from."""
        return self.path / "model"

    @property
    def model_config(self) -> Path:
        """The Hugging Face description of the model."""
        return self.model / "config.json"

    @property
    def tokenizer(self) -> Path:
        """The files of the tokenizer, which exports take along."""
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints and exported weights."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """Hugging Face directory of the last weights."""
        return self.checkpoints / "final"

    @property
    def heartbeat(self) -> Path:
        """One file a trainer rank, kept up to date."""
        return self.path / "heartbeat"

    @property
    def alarms(self) -> Path:
        """Failure dumps, one directory an update."""
        return self.path / "alarms"

    @property
    def logs(self) -> Path:
        """One directory an attempt."""
        return self.path / "logs"

    @property
    def latest(self) -> Path:
        """Link to the logs of the newest attempt of a SLURM job."""
        return self.logs / "latest"

    @property
    def restarts(self) -> Path:
        """One line for each restart of a SLURM job after a crash."""
        return self.logs / "restarts"

    @property
    def bad_nodes(self) -> Path:
        """One line for each node of a SLURM job whose hardware must not be used: its name and the reason."""
        return self.logs / "bad_nodes"

    @property
    def attempt(self) -> Path:
        """File with the number of the newest attempt and its job."""
        return self.path / "attempt"

    @property
    def done(self) -> Path:
        """Written when the run is finished."""
        return self.path / "DONE"

    def checkpoint(self, step: int) -> CheckpointDir:
        """The checkpoint after a step."""
        return CheckpointDir(self.checkpoints / CHECKPOINT.name(step))

    def export(self, step: int) -> Path:
        """Hugging Face directory of the weights after a step."""
        return self.checkpoints / EXPORT.name(step)

    def dump(self, update: int) -> Path:
        """The failure dump of one optimizer step."""
        return self.alarms / DUMP.name(update)

    def attempt_logs(self, number: int) -> AttemptDir:
        """The logs of one attempt."""
        return AttemptDir(self.logs / ATTEMPT.name(number))

    def next_attempt(self) -> int:
        """One more than the largest number of an attempt."""
        return 1 + max(ATTEMPT.find(self.logs), default=0)
