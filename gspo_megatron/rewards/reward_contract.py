"""The contract of a user's own reward: its form, and what it returns for sample responses."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gspo_megatron.config.hook_samples import NotedLine, Samples
from gspo_megatron.config.judge_section import PARAMETER, asks_judge
from gspo_megatron.config.plugins import describe_fault, source_of
from gspo_megatron.config.task_sections import RewardSection
from gspo_megatron.rewards.judge import Judge, Usage
from gspo_megatron.rewards.reward_input import RewardInput, read_parts, weigh_parts
from gspo_megatron.rewards.time_limit import OutOfTime, limit_time

SAMPLE_SECONDS = 10.0
"""Processor time of a reward for one sample response."""
MOST_PROBLEMS = 3
"""Of a recipe's data, each with all sample responses."""
PROBLEM = {"prompt": "What is 1 + 1?", "answer": "2"}
SAMPLES = (
    RewardInput("It is \\boxed{2}.", "It is \\boxed{2}.", (5, 6, 7, 2), "stop"),
    RewardInput("<think>1 + 1</think>3", "3", (8, 9, 2), "stop"),
    RewardInput("", "", (2,), "stop"),
    RewardInput("\ufffd\x00 " * 50, "\ufffd\x00 " * 50, (95,) * 50, "length"),
    RewardInput("x" * 100_000, "x" * 100_000, (4,) * 100_000, "length"),
)
"""A right answer, a wrong one, an empty one, one cut within characters, a long one."""
SHORT = 3
"""The first of them, for a judge."""


def check_form(found: Any) -> list[str]:
    """Check what can be seen without a call. Raises ValueError with one fault a line."""
    if inspect.isclass(found):
        raise ValueError(f"is the class {found.__name__}; name a function, or an instance that can be called")
    if not callable(found):
        raise ValueError(f"is a {type(found).__name__}; name a function score(problem, response)")
    call = found if inspect.isroutine(found) else found.__call__
    if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
        raise ValueError("is a generator (it holds `yield`); return the score instead")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        raise ValueError("has no readable signature; wrap it in a function score(problem, response)") from None
    judge = {PARAMETER: None} if asks_judge(found) else {}
    try:
        signature.bind({}, SAMPLES[0], **judge)
    except TypeError as error:
        raise ValueError(f"cannot be called as score(problem, response): {error}; take these two") from None
    if judge and not is_asynchronous(found):
        raise ValueError("asks a judge, which is awaited; write `async def` and `await judge.answer(messages)`")
    takes = "takes (problem, response, judge)" if judge else "takes (problem, response)"
    return [takes + (", asynchronous" if is_asynchronous(found) else "")]


def is_asynchronous(reward: Any) -> bool:
    """Whether a reward is `async def`, as a function or as the call of an object."""
    call = reward if inspect.isroutine(reward) else reward.__call__
    return inspect.iscoroutinefunction(call)


def try_samples(found: Any, samples: Samples | None = None) -> list[str]:
    """Call the reward with sample responses.

    Args:
        found: the reward.
        samples: whose problems are scored; None = the problem PROBLEM.

    Raises:
        ValueError: one fault a line, each named once.
    """
    if asks_judge(found):
        return _try_judge(found, samples)
    problems = [problem.line for problem in samples.draw(MOST_PROBLEMS)] if samples else [PROBLEM]
    return _try(found, problems, SAMPLES, samples.recipe.reward if samples else None)


def _try_judge(found: Any, samples: Samples | None) -> list[str]:
    """The same with the judge of a recipe: short samples of one problem, because each may cost money."""
    section = samples.recipe.reward.judge if samples else None
    if samples is None or section is None:
        return ["asks a judge: give a recipe with reward.judge to try it"]
    judge, used = Judge(section), Usage()

    async def ask(problem: dict[str, Any], response: RewardInput) -> object:
        async with judge.open() as inquiry:
            result = await found(problem, response, judge=inquiry)
        used.add(inquiry.usage)
        return result

    checked = _try(found, [samples.draw(1)[0].line], SAMPLES[:SHORT], samples.recipe.reward, ask)
    return [*checked, f"the judge took {used.requests} requests, {used.prompt_tokens} + {used.answer_tokens} tokens"]


def _try(
    found: Any,
    problems: Sequence[Mapping[str, Any]],
    responses: Sequence[RewardInput],
    section: RewardSection | None,
    ask: Callable[..., Any] | None = None,
) -> list[str]:
    faults: dict[str, None] = {}
    scores, names, is_stable = list[float](), set[frozenset[str]](), True
    for fields, sample in itertools.product(problems, responses):
        line = NotedLine(fields)
        try:
            parts = read_parts(_call(found, line, sample, ask or found))
            # A judge's second opinion would cost money.
            if ask is None and not scores:
                is_stable = read_parts(_call(found, line, sample, found)) == parts
            scores.append(weigh_parts(parts, section.weights if section else {}))
        except _MissingField as missing:
            if section is None:
                # The sample cannot know which fields the user's lines have.
                return [
                    f"reads problem[{missing.name!r}], which the sample line lacks: give a recipe to score its data"
                ]
            faults[f"reads problem[{missing.name!r}]; the lines of the data have {', '.join(fields)}"] = None
            continue
        except ValueError as fault:
            faults[str(fault)] = None
            continue
        if line != fields:
            faults["changed the problem, which all responses to a prompt share; copy it first"] = None
        names.add(frozenset(parts))
    if len(names) > 1:
        listed = " and ".join(sorted(f"({', '.join(sorted(part))})" for part in names))
        faults[f"returned other parts for other responses: {listed}; return the same parts always"] = None
    if faults:
        raise ValueError("\n".join(faults))
    checked = _describe(scores, names, section)
    if not is_stable:
        checked.append("scored one response twice, and differently: equal responses should have equal scores")
    return checked


class _MissingField(ValueError):
    """The reward reads a field that the line has not."""

    def __init__(self, name: object) -> None:
        super().__init__(name)
        self.name = name


def _call(found: Any, line: NotedLine, sample: RewardInput, ask: Callable[..., Any]) -> object:
    """What the reward returns. Raises ValueError with what it does instead, in a sentence."""
    try:
        with limit_time(SAMPLE_SECONDS):
            result = ask(line, sample)
            if is_asynchronous(found):
                result = asyncio.run(result)
    except OutOfTime:
        raise ValueError(f"took more than {SAMPLE_SECONDS:g} s for one response; set a limit within it") from None
    except KeyboardInterrupt:
        raise
    # The code is the user's own and may raise anything, CancelledError included.
    except BaseException as error:
        if isinstance(error, KeyError) and error.args == tuple(line.missing[-1:]):
            raise _MissingField(error.args[0]) from None
        raise ValueError(f"raised {describe_fault(error, source_of(found))}; return a score for any text") from None
    if inspect.isawaitable(result):
        getattr(result, "close", lambda: None)()
        raise ValueError("returned something to await; define it with `async def`")
    return result


def _describe(scores: list[float], names: set[frozenset[str]], section: RewardSection | None) -> list[str]:
    checked = [f"scored {len(scores)} sample responses from {min(scores):g} to {max(scores):g}"]
    parts = sorted(next(iter(names)) - {""})
    if rewarded := [name for name in parts if not name.startswith("_")]:
        checked.append(f"parts: {', '.join(rewarded)}; reward.weights weighs them, 1 each without it")
    if measured := [name for name in parts if name.startswith("_")]:
        checked.append(f"measured, not rewarded: {', '.join(measured)}")
    low, high = section.bounds if section else (0.0, 1.0)
    if min(scores) < low or max(scores) > high:
        bounds = f"reward.bounds=[{low:g}, {high:g}]"
        checked.append(f"scores outside {bounds} are clipped to it: set reward.bounds to the range you mean")
    return checked
