"""What can be known of problems, tokenizer and prompts before a process of a run starts.

python -m gspo_megatron.data.prompt_check [--runs-here] < recipe as JSON > findings as JSON
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict

from gspo_megatron.cluster.attempts import find_checkpoint
from gspo_megatron.cluster.shared_files import read_shared
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.plugins import load_object
from gspo_megatron.config.schema import Recipe
from gspo_megatron.config.task_sections import ColdStartSection
from gspo_megatron.data.demonstrations import build_demonstrations
from gspo_megatron.data.own_demonstrations import encode_demonstrations
from gspo_megatron.data.problems import every_problem, open_problems
from gspo_megatron.data.stream import HELD_OUT, PromptStream
from gspo_megatron.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from gspo_megatron.run_dir import CheckpointDir, RunDir
from gspo_megatron.types import Finding, Problem

DEMONSTRATIONS = 100
"""Lines of `cold_start.path` that a plan looks at."""
POSITIONS = 1000
"""Positions of the training stream that are looked at; the whole stream only where none of them is usable."""
WRITTEN = 100
"""Prompts that are held against the text that the template makes of them."""
PROBE = "What is 12345 + 67890?"
"""A user's message that every chat template writes as it is."""


def check_prompts(recipe: Recipe, runs_here: bool) -> list[Finding]:
    """Read the problems and the tokenizer as the run will, as far as they are on this machine.

    Args:
        recipe: names them.
        runs_here: whether the run starts from this machine; else generated problems are not made.
    """
    found: list[Finding] = []
    tokenizer, data = None, recipe.data
    directory = recipe.tokenizer.path or recipe.model.path
    if directory is not None and os.path.exists(directory):
        with _collecting(found):
            tokenizer = load_tokenizer(recipe.tokenizer, recipe.model.path)
            found += tokenizer_findings(recipe, tokenizer)
    if any(finding.severity == "error" for finding in found):
        tokenizer = None  # what it makes of the prompts would only repeat it
    paths = [path for path in (data.path, data.held_out_path) if path is not None]
    # Generated problems take longer than a plan may; a user's own may need what is where the run starts.
    is_here = all(map(os.path.exists, paths)) if data.source == "file" else runs_here
    if not is_here or data.held_out_is_training:
        return found
    with _collecting(found):
        if tokenizer is None:
            open_problems(data, needs_answer=not recipe.reward.is_own)
        else:
            stream = PromptStream(recipe, tokenizer)
            refuse_other_problems(recipe, stream)
            found += _prompt_findings(recipe, stream, tokenizer, runs_here)
        # Rewards lie beside this part.
        found += load_object("gspo_megatron.rewards.gold_check:gold_findings")(recipe, every_problem(recipe))
    return found


def refuse_other_problems(recipe: Recipe, stream: PromptStream) -> None:
    """Raise RecipeError if the run that this would resume has drawn from other problems."""
    if recipe.run.directory is None:
        return
    newest, _ = find_checkpoint(RunDir(recipe.run.directory).checkpoints)
    if newest is not None:
        state = json.loads(read_shared(CheckpointDir(newest).state))
        with suppress(LookupError, TypeError):  # a state that is no state is named by the one who reads it whole
            stream.refuse_other(state["controller"]["stream"]["fingerprint"])


@contextmanager
def _collecting(found: list[Finding]) -> Iterator[None]:
    try:
        yield
    except RecipeError as error:
        found += error.findings


def tokenizer_findings(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Hold the tokenizer against the model, and its template against the settings."""
    rows, path = recipe.arch.vocab_size, recipe.tokenizer.path or recipe.model.path
    if tokenizer.vocab_size > rows:
        yield Finding(
            "vocabulary-too-small", "error", "tokenizer.path",
            f"{path} has {tokenizer.vocab_size} ids, and the model vocab_size={rows} rows: it would never see the last",
            "name the model's own tokenizer, or a model with a row for each id",
        )  # fmt: skip
    if not isinstance(tokenizer, HuggingFaceTokenizer) or recipe.tokenizer.rendering is not None:
        return
    try:
        unused = tokenizer.unused_settings()
        text = tokenizer.write_prompt([{"role": "user", "content": PROBE}], ())
    except ValueError as error:
        fix = "correct the template, or " + ("set tokenizer.system_prompt" if "role" in str(error) else "the settings")
        yield Finding("chat-template-fails", "error", "tokenizer.path", f"{path}: {error}", fix)
        return
    if PROBE not in text:
        message = f"the template of {path} leaves out the user's message, or a part: of {PROBE!r} it makes {text!r}"
        fix = "correct the template, or set tokenizer.rendering"
        yield Finding("question-left-out", "error", "tokenizer.path", message[:400], fix)
        return
    end = tokenizer.turn_end()
    if end is not None and end[0] not in tokenizer.stop_ids:
        yield Finding(
            "turn-end-not-a-stop", "warning", "tokenizer.path",
            f"the chat template of {path} ends a turn with {end[1]} "
            f"({'no token of the tokenizer' if end[0] is None else f'id {end[0]}'}), which is none of the ids that end "
            f"a response: {', '.join(map(str, tokenizer.stop_ids))}; a response may go on into a next turn",
            "add it to eos_token_id in generation_config.json"
            if end[0] is not None
            else "take the tokenizer of the template",
        )  # fmt: skip
    for name in unused:
        yield Finding(
            "template-setting-unused", "error", f"tokenizer.{name}",
            f"is set, but the chat template of {path} gives the same text whatever it is",
            "remove it, or name a tokenizer whose template reads it",
        )  # fmt: skip


def _prompt_findings(recipe: Recipe, stream: PromptStream, tokenizer: Tokenizer, runs_here: bool) -> Iterator[Finding]:
    """Walk the beginning of the stream, the held-out set and the demonstrations."""
    survey = stream.survey(POSITIONS)
    if not survey.lengths:
        stream.next(1)
    lost = {reason: count for reason, count in survey.left_out.items() if reason != HELD_OUT}
    if sum(lost.values()) > len(survey.lengths) > 0:
        reason = max(lost, key=lambda name: lost[name])
        yield Finding(
            "prompts-left-out", "warning", "data",
            f"{sum(lost.values())} of the first {sum(lost.values()) + len(survey.lengths)} prompts are left out; the "
            f"first for {reason}: it {survey.first[reason]}",
            "`gspo data RECIPE` counts them; raise rollout.max_prompt_tokens or correct the data",
        )  # fmt: skip
    if 2 * survey.alike > len(survey.lengths):
        severity = "error" if survey.alike == len(survey.lengths) - 1 else "warning"
        key = "tokenizer.path" if recipe.tokenizer.rendering is None else "tokenizer.rendering"
        yield Finding(
            "prompts-alike", severity, key,
            f"{survey.alike} of the first {len(survey.lengths)} prompts have the very tokens of an earlier problem's: "
            "what tells the problems apart is left out, or has no token", "`gspo data RECIPE` shows three of them",
        )  # fmt: skip
    if isinstance(tokenizer, HuggingFaceTokenizer) and recipe.tokenizer.rendering is None and survey.lengths:
        yield from _left_out(recipe, stream.training_problems(min(WRITTEN, len(survey.lengths)), "written"), tokenizer)
    with_reason: list[Finding] = []
    if recipe.planned_evaluation:
        with _collecting(with_reason):
            stream.held_out(recipe.evaluation.problems)
    if recipe.cold_start is not None:
        with _collecting(with_reason):
            with_reason += _demonstration_findings(recipe, recipe.cold_start, stream, tokenizer, runs_here)
    yield from with_reason


def _left_out(recipe: Recipe, problems: Sequence[Problem], tokenizer: HuggingFaceTokenizer) -> Iterator[Finding]:
    """Whether the chat template writes every message of the problems, and their tools."""
    path, lost, tools = recipe.tokenizer.path or recipe.model.path, Counter[str](), 0
    for problem in problems:
        text = tokenizer.write_prompt(problem.messages, problem.tools) if problem.messages else ""
        for message in problem.messages:
            content = str(message["content"]).strip()
            # The thinking of earlier turns goes by design; what a tool said may be written as JSON.
            if message["role"] not in ("assistant", "tool") and content not in text:
                lost[message["role"]] += 1
        tools += bool(problem.tools)
        if problem.tools and text == tokenizer.write_prompt(problem.messages, ()):
            yield Finding(
                "tools-left-out", "error", "data.tools_key",
                f"the chat template of {path} writes the same with and without the tools of a problem: the model would "
                "not know of them", "take a model whose template reads tools, or remove data.tools_key",
            )  # fmt: skip
            return
    for role, count in lost.items():
        yield Finding(
            "message-left-out", "warning", "tokenizer.path",
            f"the chat template of {path} leaves out a message of role={role}, or a part of it, in {count} of the "
            f"first {len(problems)} prompts", "write the roles that it knows (system, user, tool), or correct it",
        )  # fmt: skip
    is_named = recipe.data.tools_key != type(recipe.data).model_fields["tools_key"].default
    if is_named and recipe.data.source == "file" and not tools:
        yield Finding(
            "tools-missing", "warning", "data.tools_key",
            f"none of the first {len(problems)} problems has `{recipe.data.tools_key}`",
            "correct the key if it is misspelt, or remove it",
        )  # fmt: skip


def _demonstration_findings(
    recipe: Recipe, section: ColdStartSection, stream: PromptStream, tokenizer: Tokenizer, runs_here: bool
) -> Sequence[Finding]:
    """Write the demonstrations of a cold start: all of a file that a run reads, the first ones for a plan."""
    if section.path is not None:
        if not os.path.exists(section.path):
            return []
        most = None if runs_here else DEMONSTRATIONS
        encoded = encode_demonstrations(recipe, tokenizer, stream.holds_out, most)
        return encoded.findings(recipe.rollout.max_sequence_tokens)
    try:
        build_demonstrations(stream.training_problems(1, "cold_start"), section, tokenizer, stream.write)
    except RecipeError:
        raise
    except ValueError as error:
        fix = "name a tokenizer with these characters, or another writer"
        return [Finding("demonstration-does-not-fit", "error", "cold_start.demonstrations", str(error), fix)]
    return []


def main() -> None:
    """Check the recipe on standard input and print the findings as the last line."""
    from gspo_megatron.models.resolution import parse_recipe

    output, sys.stdout = sys.stdout, sys.stderr  # a library or a user's file may print
    recipe = parse_recipe(json.load(sys.stdin))
    if recipe.tokenizer.kind == "huggingface":
        import_without_torch()
    found = check_prompts(recipe, "--runs-here" in sys.argv[1:])
    print(json.dumps([asdict(finding) for finding in found]), file=output, flush=True)


def import_without_torch() -> None:
    """Import what reads a tokenizer. transformers imports torch for its models, which takes four times as long.

    Not in a process that uses a model of transformers later: the library then believes that there is no torch.
    """
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers import AutoTokenizer  # noqa: F401
    finally:
        del sys.modules["torch"]


if __name__ == "__main__":
    main()
