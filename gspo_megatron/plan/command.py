"""The command `gspo plan`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial

from gspo_megatron.cluster.exit_codes import REFUSED
from gspo_megatron.cluster.machines import DEVICES
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.recipe_paths import read_path
from gspo_megatron.config.refusal import refuse
from gspo_megatron.models import load_recipe
from gspo_megatron.plan.run_plan import Plan, add_contents, make_plan, with_placement


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `plan` command to the parser."""
    parser = subparsers.add_parser(
        "plan",
        help="show what a recipe will do and require, without starting anything",
        description="Print layout, batch sizes, memory, time and every fault of a recipe. "
        "Exit 0 = would run, 2 = refused.",
    )
    parser.add_argument("recipe", type=read_path, nargs="?", help="YAML recipe, e.g. recipes/tiny_moe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides: trainer.max_steps=10")
    parser.add_argument("--nodes", type=_positive, help="number of nodes, instead of placement.nodes")
    parser.add_argument("--gpu", choices=sorted(DEVICES), help="kind of GPU, instead of placement.gpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--ranks", action="store_true", help="add the parallel coordinates of every trainer rank")
    parser.add_argument("--explain", metavar="KEY", help="describe a recipe key, e.g. trainer.recompute")
    parser.add_argument(
        "--explain-engines",
        action="store_true",
        help="list what differs from Megatron's and vLLM's defaults, and why",
    )
    parser.add_argument("--search", action="store_true", help="list the fastest layouts for the model and the GPUs")
    parser.add_argument(
        "--least",
        choices=("seconds", "gpu-hours"),
        help="with --search: the least seconds of a step, or GPU-hours of the run, on fewer nodes too",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="KEY=A,B",
        help="plan every combination of values, or other recipes, in one table",
    )

    parser.parse_known_args = partial(parse_mixed, parser)  # type: ignore[method-assign]


def parse_mixed(
    parser: argparse.ArgumentParser, arguments: Sequence[str], namespace: argparse.Namespace | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse with overrides anywhere: argparse itself accepts none after an option. Instead of `parse_known_args`."""
    # A recipe may lie in a directory with such a sign in its name.
    compared = _compared(arguments)
    own = [word for place, word in enumerate(arguments) if place not in compared]
    overrides = [word for word in own if "=" in word and not word.startswith("-") and not os.path.isfile(word)]
    rest = [word for place, word in enumerate(arguments) if place in compared or word not in overrides]
    into = namespace if namespace is not None else argparse.Namespace()
    parsed, unknown = argparse.ArgumentParser.parse_known_args(parser, rest, into)
    parsed.overrides = [*parsed.overrides, *overrides]
    return parsed, unknown


def _compared(arguments: Sequence[str]) -> range:
    """The places of the words after `--compare`, up to the next option."""
    if "--compare" not in arguments:
        return range(0)
    start = end = arguments.index("--compare") + 1
    while end < len(arguments) and not arguments[end].startswith("-"):
        end += 1
    return range(start, end)


def run(namespace: argparse.Namespace) -> int:
    """Run the command. Returns 0 if the recipe would run, 2 if it is refused."""
    if namespace.recipe is None and namespace.explain is None:
        print("gspo plan: name a recipe, e.g. recipes/tiny_moe.yaml, or a key with --explain", file=sys.stderr)
        return REFUSED
    try:
        return _run(namespace)
    except BrokenPipeError:
        # The reader, e.g. head, closed the pipe. Without this Python reports the error again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RecipeError as error:
        if namespace.json:
            document = {"findings": [_as_json(finding) for finding in error.findings]}
            print(json.dumps(document, indent=1))
        else:
            for finding in error.findings:
                print(finding, file=sys.stderr)
        return REFUSED


def _run(namespace: argparse.Namespace) -> int:
    recipe = load_recipe(namespace.recipe, namespace.overrides) if namespace.recipe else None
    if namespace.explain is not None:
        from gspo_megatron.plan.explain import explain

        print(explain(namespace.explain, recipe))
        return 0
    assert recipe is not None
    if namespace.explain_engines:
        from gspo_megatron.plan.engine_text import print_engines

        placed = with_placement(recipe, namespace.nodes, namespace.gpu)
        plan = make_plan(placed)
        if plan.refused:
            _print(plan, namespace)
            return REFUSED
        print_engines(placed, namespace.json)
        return 0
    if namespace.least and not namespace.search:
        raise refuse("option-without-search", "--least", f"{namespace.least} without --search", "add --search")
    searched = (namespace.least or "seconds") if namespace.search else None
    if namespace.compare:
        from gspo_megatron.plan.compare import print_comparison

        more = [f"placement.{key}={value}" for key in ("nodes", "gpu") if (value := getattr(namespace, key))]
        chosen = [*namespace.overrides, *more]
        return print_comparison(namespace.recipe, chosen, namespace.compare, searched, namespace.json)
    if searched:
        from gspo_megatron.plan.search_text import print_search

        return print_search(with_placement(recipe, namespace.nodes, namespace.gpu), searched, namespace.json)
    plan = add_contents(make_plan(recipe, namespace.nodes, namespace.gpu))
    _print(plan, namespace)
    return REFUSED if plan.refused else 0


def _print(plan: Plan, namespace: argparse.Namespace) -> None:
    if namespace.json:
        from gspo_megatron.plan.as_json import to_json

        print(json.dumps(to_json(plan, namespace.ranks), indent=1))
    else:
        from gspo_megatron.plan.as_text import print_plan

        print_plan(plan, namespace.ranks)


def _as_json(finding: object) -> dict[str, str]:
    from dataclasses import asdict

    return asdict(finding)  # type: ignore[call-overload]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of nodes; give 1 or more")
    return int(text)
