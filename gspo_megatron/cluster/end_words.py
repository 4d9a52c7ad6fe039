"""What an ended server or attempt says, and what to type. Standard library of Python 3.9: a batch node reads it."""

from __future__ import annotations

from gspo_megatron.cluster.events import Decision, Print


def say_resume(newest: int, command: str) -> list[Decision]:
    """How a run goes on, where the command is known.

    Args:
        newest: step of the newest checkpoint; 0 without any.
        command: empty = not known.
    """
    where = f"step {newest} is checkpointed" if newest else "no step is checkpointed, so it starts at the first"
    return [Print(f"{where}; to go on: {command}")] if command else []


def say_done(results: str, command: str) -> list[Decision]:
    """That a run is done, and how it is trained further, where something of that is known.

    Args:
        results: directory; empty = said elsewhere.
        command: empty = not known.
    """
    where, further = f"; results are in {results}", f"; to train further: {command}"
    return [Print(f"DONE{where if results else ''}{further if command else ''}")] if results or command else []


def restart_sentence(name: str, left: int) -> str:
    """What the log says of a server that is started again."""
    return f"{name} ended and is started again; {left} more times"


def not_queued_sentence(resume: str) -> str:
    """What the log says where SLURM has refused to queue the job again."""
    return f"SLURM does not queue this job again; to go on: {resume}"
