"""The command `gspo data`: what a recipe would train on, before anything is trained."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from gspo_megatron.cluster.exit_codes import OK, REFUSED
from gspo_megatron.commands.recipe_arguments import add_recipe
from gspo_megatron.commands.train_run import is_refused
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.problem_lines import find_field
from gspo_megatron.data.prompt_check import import_without_torch, tokenizer_findings
from gspo_megatron.data.stream import PromptStream, Survey
from gspo_megatron.data.tokenizers import Tokenizer, load_tokenizer
from gspo_megatron.models import load_recipe
from gspo_megatron.plan.rules import data_files
from gspo_megatron.types import Prompt, printable

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
GENERATED = 2000
"""Positions of a source without end that are looked at."""
SHOWN = 3
"""Prompts that are shown whole."""
LONGEST_SHOWN = 400
"""Tokens of a shown prompt; of a longer one the middle is left out."""
WIDTH = 110


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `data` command to the parser."""
    add_recipe(subparsers.add_parser("data", help="count, measure and show the prompts of a recipe"))


def run(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    return report_prompts(chosen.recipe, chosen.overrides)


def report_prompts(path: Path, overrides: Sequence[str]) -> int:
    """Print counts, lengths, what is left out and why, and three prompts token by token."""
    recipe = load_recipe(path, overrides)
    if is_refused(list(data_files.findings(recipe, runs_here=True))):
        return REFUSED
    if recipe.tokenizer.kind == "huggingface":
        import_without_torch()
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.model.path)
    refused = is_refused(list(tokenizer_findings(recipe, tokenizer)))
    stream = PromptStream(recipe, tokenizer)
    survey = stream.survey(None if recipe.data.source == "file" else GENERATED)
    print("\n".join(describe(recipe, stream, survey)))
    try:
        held_out = stream.held_out(recipe.evaluation.problems) if recipe.planned_evaluation else []
        print(f"held out   {len(held_out)} are evaluated")
        for number, prompt in enumerate(stream.next(SHOWN), start=1):
            print("\n".join(show_prompt(prompt, number, tokenizer, recipe.data.answer_key)))
    except RecipeError as error:
        refused = is_refused(list(error.findings)) or refused
    return REFUSED if refused else OK


def describe(recipe: Recipe, stream: PromptStream, survey: Survey) -> Iterator[str]:
    """Counts of the source, lengths of the prompts, and what is left out."""
    data, limit = recipe.data, recipe.rollout.max_prompt_tokens
    name = data.path if data.source == "file" else data.task if data.source == "reasoning_gym" else data.source
    counts = ", ".join(f"{count} {what}" for what, count in stream.counts.items())
    yield f"problems   {name}: {counts}"
    lost = sum(survey.left_out.values())
    yield f"prompts    {len(survey.lengths)} of {len(survey.lengths) + lost} positions of the stream are usable"
    if survey.lengths:
        found = ", ".join(f"{_name(part)} {quantile(survey.lengths, part)}" for part in QUANTILES)
        yield f"tokens     {found}; rollout.max_prompt_tokens={limit}"
    for reason, count in sorted(survey.left_out.items()):
        first = f": the first {survey.first[reason]}" if survey.first[reason] else ""
        yield f"left out   {count} {reason}{first}"


def quantile(values: Sequence[int], part: float) -> int:
    """The smallest value that at least this part of all values does not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def _name(part: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(part, f"{part:.0%}")


def show_prompt(prompt: Prompt, number: int, tokenizer: Tokenizer, answer_key: str) -> Iterator[str]:
    """A prompt with each token in brackets, its line feeds as \\n; then its gold answer."""
    ids = prompt.token_ids
    pieces = [f"[{printable(piece)}]" for piece in tokenizer.pieces(ids)]
    if len(pieces) > LONGEST_SHOWN:
        half = LONGEST_SHOWN // 2
        pieces = [*pieces[:half], f" ... {len(pieces) - 2 * half} tokens ... ", *pieces[-half:]]
    problem = prompt.problem
    # A reward of the user's own gets the line as it is: lists, objects, truth values.
    gold = find_field(problem.line, answer_key) if problem.answer is None else problem.answer
    yield f"prompt {number}   {len(ids)} tokens, problem {problem.id}, answer {gold!r}"
    line = ""
    for piece in pieces:
        if line and len(line) + len(piece) > WIDTH:
            yield f"  {line}"
            line = ""
        line += piece
    yield from (f"  {part}" for part in textwrap.wrap(line, 4 * WIDTH, drop_whitespace=False))
