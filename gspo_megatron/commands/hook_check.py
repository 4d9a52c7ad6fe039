"""The command `gspo check`: tests a user's own object against the contract of its hook."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import os
import sys
from collections.abc import Iterator
from typing import NoReturn, TextIO

from gspo_megatron.cluster.exit_codes import OK, REFUSED
from gspo_megatron.commands.recipe_arguments import add_overrides
from gspo_megatron.config.hook_samples import Samples
from gspo_megatron.config.hooks import HOOKS, Hook, check_contract, recognise_hook
from gspo_megatron.config.plugins import load_object
from gspo_megatron.config.recipe_paths import read_path
from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.secret_text import hide_secrets
from gspo_megatron.models import load_recipe
from gspo_megatron.types import Problem


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `check` command to the parser."""
    parser = subparsers.add_parser("check", help=f"test an object of your own: {', '.join(HOOKS)}")
    parser.add_argument("reference", help="file.py:NAME or package.module:NAME")
    parser.add_argument("recipe", type=read_path, nargs="?", help="recipe whose data and settings it is tried with")
    add_overrides(parser)
    parser.add_argument("--hook", choices=HOOKS, help="what it is; without it, its parameters or members decide")


def run(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    samples = None
    if chosen.recipe:
        recipe = load_recipe(chosen.recipe, chosen.overrides)
        samples = Samples(recipe, functools.partial(_draw, recipe))
    return check_object(chosen.reference, chosen.hook, samples)


def _draw(recipe: Recipe, count: int) -> list[Problem]:
    from gspo_megatron.data.own_source import TRAIN
    from gspo_megatron.data.problems import open_problems

    source = open_problems(recipe.data, needs_answer=not recipe.reward.is_own)
    drawn = (source.draw(TRAIN, recipe.run.seed, position) for position in range(source.span))
    return list(itertools.islice((problem for problem in drawn if problem), count))


def check_object(reference: str, name: str | None = None, samples: Samples | None = None) -> int:
    """Check one object and print what was checked, or one sentence a fault.

    Args:
        reference: `file.py:NAME`, relative to the working directory, or `package.module:NAME`.
        name: name of the hook; None = recognised from the object.
        samples: a recipe and its data, to try the object with; None = built-in ones.
    """
    try:
        hook, checked = _check(reference, name, samples)
    except ValueError as faults:
        for fault in str(faults).splitlines():
            print(f"{reference}: {hide_secrets(fault)}", file=sys.stderr)
        return REFUSED
    except SystemExit as error:
        print(f"{reference}: ended Python (SystemExit: {error}); return, or raise another exception", file=sys.stderr)
        return REFUSED
    print(f"{reference} fits the hook {hook.name}: set {hook.key}={reference}")
    for sentence in checked:
        print(f"  {sentence}")
    return OK


def _check(reference: str, name: str | None, samples: Samples | None) -> tuple[Hook, list[str]]:
    with _watch_output() as said, _stay():
        found = load_object(reference)
        hook = HOOKS[name] if name else recognise_hook(found)
        checked = check_contract(hook, found)
        if hook.trial:
            checked += load_object(hook.trial)(found, samples)
    if said.secrets:
        raise ValueError("printed the value of an environment variable that holds a secret; remove it from the output")
    return hook, checked


@contextlib.contextmanager
def _stay() -> Iterator[None]:
    """Make `os._exit` a fault as `sys.exit` is: else the command would end with the code of a user's, and no word."""
    leave, owner = os._exit, os.getpid()

    def refuse_to_leave(status: int) -> NoReturn:
        if os.getpid() != owner:
            leave(status)  # a process that the code forked
        raise SystemExit(status)

    os._exit = refuse_to_leave
    try:
        yield
    finally:
        os._exit = leave


class _Recorder(io.TextIOBase):
    """Passes text on without secrets, and notes whether there were any."""

    def __init__(self, target: TextIO) -> None:
        self._target = target
        self.secrets = False

    def write(self, text: str) -> int:
        """Pass a text on."""
        hidden = hide_secrets(text)
        self.secrets = self.secrets or hidden != text
        self._target.write(hidden)
        return len(text)


@contextlib.contextmanager
def _watch_output() -> Iterator[_Recorder]:
    """Send what a user's code prints to standard error: it is no part of the command's result."""
    recorder = _Recorder(sys.stderr)
    with contextlib.redirect_stdout(recorder), contextlib.redirect_stderr(recorder):
        yield recorder
