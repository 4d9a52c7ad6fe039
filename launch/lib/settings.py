"""The site's settings, as launch/lib/site.sh has put them into the environment. Standard library only."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gspo_megatron.cluster.slurm_allocation import Allocation
from gspo_megatron.cluster.slurm_steps import Step, srun


@dataclass(frozen=True)
class Settings:
    """Interpreters and images of the roles, and what every srun is given."""

    home: Path
    """The checkout."""
    called_in: Path
    """Where the command was started: paths on the command line are relative to it."""
    venvs: dict[str, str]
    """Virtual environment of each kind of environment, `trainer` and `rollout`."""
    images: dict[str, str]
    """Image of each; empty = none."""
    mounts: str
    """What is mounted beside the checkout: `from:to[:ro],...`."""
    max_restarts: int
    grace: float
    srun_arguments: tuple[str, ...] = ()
    """What the site wants of every srun beyond ours; it overrides ours."""
    gpus: int = 0
    """GPUs of a node, where SLURM does not count them; 0 = not said."""
    allocation: Allocation = field(default_factory=Allocation)
    """Of the job; empty before it is known, and in a drawing."""

    @classmethod
    def read(cls, home: Path, called_in: Path) -> Settings:
        """The settings of this process's environment. Raises ValueError for one that cannot be read."""
        get = os.environ.get
        venv, image = get("GSPO_VENV") or ".venv", get("GSPO_IMAGE") or ""
        found = cls(
            home,
            called_in,
            {"trainer": venv, "rollout": get("GSPO_ROLLOUT_VENV") or venv},
            {"trainer": image, "rollout": get("GSPO_ROLLOUT_IMAGE") or image},
            get("GSPO_MOUNTS") or "",
            _seconds_or_count("GSPO_MAX_RESTARTS", "3"),
            _seconds_or_count("GSPO_GRACE", "240"),
            _words("GSPO_SRUN_ARGS"),
            _seconds_or_count("GSPO_GPUS_PER_NODE", "0"),
        )
        cut = [place for place in found.places if {",", ":"} & set(str(place))]
        if cut and any(found.images.values()):
            raise ValueError(
                f"{cut[0]} holds a comma or a colon, which pyxis reads as the end of a path; "
                "rename it, or submit from elsewhere"
            )
        return found

    @property
    def places(self) -> list[Path]:
        """What an image sees without the site's mounts: the checkout, and where the command was started."""
        return [self.home] if self.called_in.is_relative_to(self.home) else [self.home, self.called_in]

    def python(self, kind: str) -> str:
        """The interpreter of a role; in an image it is the one on the PATH."""
        environment = environment_of(kind)
        return "python3" if self.images[environment] else self.own_python(environment)

    def own_python(self, environment: str) -> str:
        """The interpreter of a virtual environment."""
        return f"{self.venvs[environment]}/bin/python"

    def container(self, kind: str) -> list[str]:
        """pyxis' flags for a role; none without an image."""
        image = self.images[environment_of(kind)]
        if not image:
            return []
        mounts = ",".join([*(f"{place}:{place}" for place in self.places), *([self.mounts] if self.mounts else [])])
        return [
            f"--container-image={image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={self.home}",
            "--no-container-mount-home",
        ]

    def srun_outside(self, step: Step, command: Sequence[str]) -> list[str]:
        """The srun of a command of the node itself, which no image has."""
        return srun(step, command, self.allocation, self.srun_arguments)

    def srun(self, step: Step, command: Sequence[str], output: str = "") -> list[str]:
        """The srun of a step: in the image of its kind, with the site's arguments."""
        extra = (*self.container(step.kind), *self.srun_arguments)
        return srun(step, command, self.allocation, extra, output)


def environment_of(kind: str) -> str:
    """Which environment a kind of role runs in: the controller shares the trainer's."""
    return "rollout" if kind == "rollout" else "trainer"


def _seconds_or_count(name: str, default: str) -> int:
    text = os.environ.get(name) or default
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name}={text} is not a whole number; correct it in the site file or the environment")
    return int(text)


def _words(name: str) -> tuple[str, ...]:
    text = os.environ.get(name) or ""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"{name}={text} cannot be read ({error}); correct its quotes") from None
