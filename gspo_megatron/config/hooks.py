"""The table of hooks: every place where a recipe takes an object of the user's own by `file.py:NAME`.

Add a hook: one row in HOOKS, one contract function in the part that uses the object, and the row in the table of
gspo_megatron/README.md, which a test prints. `gspo check`, `load_hook` and the tests read the row.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gspo_megatron.config.plugins import load_object
from gspo_megatron.config.refusal import refuse

Contract = Callable[[Any], Sequence[str]]
"""Takes a user's object and returns what was checked, one sentence each. Raises ValueError with one fault a line."""
Trial = Callable[[Any, Any], Sequence[str]]
"""A contract that also takes `config.hook_samples.Samples` of a recipe, None without one."""


@dataclass(frozen=True, slots=True)
class Hook:
    """One kind of object that a user can supply."""

    name: str
    """Name of the kind, as `gspo check --hook` takes it."""
    key: str
    """Recipe key that names the object."""
    signature: str
    """What the object must be, as the README shows it."""
    default: str
    """What runs where the key is not set."""
    example: str
    """A working object in this repository, `recipes/...py:NAME`."""
    contract: str
    """`module:NAME` of its `Contract`. `load_hook` runs it, so it is quick and has no effect outside the process."""
    trial: str = ""
    """`module:NAME` of a `Trial` that only `gspo check` runs: it calls the object with sample inputs, or with those of
    a recipe. Empty = the contract does so already."""
    may_be_async: bool = False
    """Whether the object may be `async def`: the part that uses it awaits it."""
    parameters: tuple[str, ...] = ()
    """Names of the first parameters of a function, by which `gspo check` recognises the kind."""
    members: tuple[str, ...] = ()
    """Names that a class or an object of the kind has, by which `gspo check` recognises it."""


HOOKS: dict[str, Hook] = {
    hook.name: hook
    for hook in (
        Hook(
            name="reward",
            key="reward.name",
            signature="score(problem, response) -> float or dict of named parts; may be async, and ask a judge",
            default="math_verify",
            example="recipes/rewards/closeness.py:score",
            contract="gspo_megatron.rewards.reward_contract:check_form",
            trial="gspo_megatron.rewards.reward_contract:try_samples",
            may_be_async=True,
            parameters=("problem", "response"),
        ),
        Hook(
            name="environment",
            key="environment.name",
            signature="class with reset(line) -> state and step(state, turn) -> Reply",
            default="none",
            example="recipes/environments/guess_number.py:GuessNumber",
            contract="gspo_megatron.environments.own_environment:check_form",
            trial="gspo_megatron.environments.own_environment:try_episodes",
            members=("reset", "step"),
        ),
        Hook(
            name="agent",
            key="agent.program",
            signature="async run(problem, client) -> score, dict of named parts, or None",
            default="none",
            example="recipes/agents/calculator.py:run",
            contract="gspo_megatron.environments.agent_contract:check_agent",
            trial="gspo_megatron.controller.agent_trial:try_agent",
            may_be_async=True,
            parameters=("problem", "client"),
        ),
        Hook(
            name="source",
            key="data.source",
            signature="problems(split, seed, start, **options) -> iterator of objects with prompt and answer",
            default="file",
            example="recipes/sources/sums.py:problems",
            contract="gspo_megatron.data.own_source:check_source",
            trial="gspo_megatron.data.own_source:try_source",
            parameters=("split", "seed", "start"),
        ),
        Hook(
            name="rendering",
            key="tokenizer.rendering",
            signature="render(line, chat) -> text, token ids or messages",
            default="the chat template",
            example="recipes/renderings/one_example.py:render",
            contract="gspo_megatron.data.prompt_writer:check_rendering",
            trial="gspo_megatron.data.prompt_writer:try_rendering",
            parameters=("line", "chat"),
        ),
        Hook(
            name="objective",
            key="objective.preset",
            signature="ObjectiveSpec(name=..., AXIS=...)",
            default="gspo",
            example="recipes/objectives/dppo.py:DPPO",
            contract="gspo_megatron.objective.objective_contract:check_objective",
            members=("ratio_level", "trust", "aggregation"),
        ),
        Hook(
            name="trust",
            key="objective.trust",
            signature="rule(terms: TokenTerms) -> Surrogate",
            default="clip",
            example="recipes/objectives/dppo.py:binary_tv",
            contract="gspo_megatron.objective.objective_contract:check_trust_rule",
            parameters=("terms",),
        ),
        Hook(
            name="sink",
            key="metrics.sinks",
            signature="make(run: SinkRun) -> object with write(step, row) and close()",
            default="none",
            example="recipes/sinks/csv_rows.py:CsvRows",
            contract="gspo_megatron.sinks.sink_protocol:check_sink",
            trial="gspo_megatron.sinks.sink_protocol:try_sink",
            parameters=("run",),
            members=("write", "close"),
        ),
    )
}
"""Name -> hook. The contract is named by text, because the part that owns it lies above this one."""


def is_reference(text: str) -> bool:
    """Whether a value of a key names a user's object, and not one of the built-in choices."""
    return ":" in text


def check_choice(name: str, choices: Sequence[str]) -> str:
    """Return a value of a hook's key: one of the built-in choices, or a reference. For a validator of the key.

    Raises:
        ValueError: it is neither.
    """
    if name in choices or is_reference(name):
        return name
    if name.endswith(".py"):
        raise ValueError(f"{name} names no object in the file; write {name}:NAME")
    close = difflib.get_close_matches(name, choices, n=1)
    known = f"use {f'one of {", ".join(choices)}, ' if choices else ''}file.py:NAME or package.module:NAME"
    raise ValueError(f"{name} is not known; {f'did you mean {close[0]}?' if close else known}")


def load_hook(name: str, reference: str) -> Any:
    """Return the object that a recipe names, after its contract was checked.

    Raises:
        RecipeError: it cannot be imported, or is not what the hook takes.
    """
    hook = HOOKS[name]
    try:
        found = load_object(reference)
        check_contract(hook, found)
    except ValueError as fault:
        faults = "; ".join(str(fault).splitlines())
        raise refuse(
            "hook", hook.key, f"{reference}: {faults}", f"see `gspo check {reference} --hook {name}`"
        ) from None
    return found


def check_contract(hook: Hook, found: Any) -> list[str]:
    """Return what was checked of an object. Raises ValueError with one fault a line."""
    call = found if inspect.isroutine(found) or inspect.isclass(found) else getattr(found, "__call__", None)  # noqa: B004
    calls = {"": call, **{f"{name} ": getattr(found, name, None) for name in hook.members}}
    faults = [
        f"{name}is `async def`, and nothing awaits it in a hook {hook.name}; write def"
        for name, function in calls.items()
        if inspect.iscoroutinefunction(function) and not hook.may_be_async
    ]
    if faults:
        raise ValueError("\n".join(faults))
    return list(load_object(hook.contract)(found))


def recognise_hook(found: Any) -> Hook:
    """Return the hook that an object is meant for, by the parameters of a function or the members of an object.

    Raises:
        ValueError: no hook or several take such an object.
    """
    names = _parameters(found)
    fitting = [
        hook
        for hook in HOOKS.values()
        if (hook.parameters and names[: len(hook.parameters)] == hook.parameters)
        or (hook.members and all(hasattr(found, member) for member in hook.members))
    ]
    if len(fitting) == 1:
        return fitting[0]
    kinds = ", ".join(f"{hook.name} ({hook.signature})" for hook in fitting or HOOKS.values())
    what = f"a function of ({', '.join(names)})" if names else f"a {type(found).__name__}"
    many = "could be several of" if fitting else "is none of"
    raise ValueError(f"{what} {many} the hooks: {kinds}; name one with --hook")


def _parameters(found: Any) -> tuple[str, ...]:
    """Names of the parameters of a function or of an object that can be called; nothing for a class."""
    if inspect.isclass(found) or not callable(found):
        return ()
    try:
        return tuple(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return ()


def write_table() -> str:
    """The table of hooks as the README shows it."""
    rows = [("hook", "key", "what it is", "default", "example"), ("---",) * 5]
    for hook in HOOKS.values():
        file, _, name = hook.example.rpartition(":")
        link = f"[{file.rpartition('/')[2]}:{name}](../{file})"
        rows.append((hook.name, f"`{hook.key}`", f"`{hook.signature}`", hook.default, link))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
