"""What a metric sink is: the protocol, what it is given, and the contract that a user's own is checked against."""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gspo_megatron.config.hook_samples import Samples
from gspo_megatron.config.plugins import describe_fault, source_of


@dataclass(frozen=True, slots=True)
class SinkRun:
    """What a sink is given of its run."""

    id: str
    """16 hex digits, the same in every attempt: a resumed run appends to what this id has."""
    name: str
    """`run.name`."""
    project: str
    """`metrics.project`."""
    directory: Path
    """A directory of this sink's own in the run directory; it exists."""
    online: bool
    """`metrics.online`: whether the sink may use the network."""
    recipe: dict[str, Any]
    """The resolved recipe as plain values. It holds no key."""


class MetricSink(Protocol):
    """Receives the rows of one attempt, in a thread of its own. A hook is a callable that makes one from a SinkRun."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Take the numbers of a step. Values may be nan or inf. After a resume the steps since the checkpoint come
        again."""
        ...

    def close(self) -> None:
        """Finish: nothing comes after it."""
        ...


def check_sink(found: Any) -> Sequence[str]:
    """Check the form of a user's sink, without making one. Returns what was checked.

    Raises:
        ValueError: one fault a line.
    """
    if not callable(found):
        raise ValueError(f"it is a {type(found).__name__}; name a class or function that takes a SinkRun")
    faults = []
    try:
        inspect.signature(found).bind(None)
    except TypeError as error:
        faults.append(f"it is called with one SinkRun, and takes others ({error}); write def NAME(run)")
    except ValueError:  # no signature to look at
        pass
    for method, arguments in (("write", (None, None)), ("close", ())):
        if not inspect.isclass(found):
            break
        member = getattr(found, method, None)
        if not callable(member):
            faults.append(f"its class has no method {method}; add it (sinks/README.md)")
            continue
        try:
            inspect.signature(member).bind(None, *arguments)
        except TypeError as error:
            wanted = "write(self, step, row)" if arguments else "close(self)"
            faults.append(f"{method} takes other arguments ({error}); write def {wanted}")
    if faults:
        raise ValueError("\n".join(faults))
    return ["it is made from one SinkRun", *(["it has write(step, row) and close()"] if inspect.isclass(found) else [])]


def try_sink(found: Any, samples: Samples | None = None) -> Sequence[str]:
    """Make a user's sink in an empty directory and write two rows, one of them without finite values.

    Args:
        found: makes the sink.
        samples: the recipe that the sink is given; None = one of a name only.

    Raises:
        ValueError: what it raised.
    """
    with tempfile.TemporaryDirectory() as directory:
        values = samples.recipe.model_dump(mode="json") if samples else {"run": {"name": "check"}}
        run = SinkRun("0123456789abcdef", values["run"]["name"], "gspo", Path(directory), False, values)
        rows: tuple[dict[str, float], ...] = (
            {"loss": 0.5, "experts/load_entropy": 1.0},
            {"loss": math.nan, "reward_mean": math.inf},
        )
        doing = "making it"
        try:
            sink = found(run)
            for step, row in enumerate(rows, 1):
                doing = f"write({step}, {row})"
                if inspect.iscoroutinefunction(sink.write):
                    raise TypeError("it is `async def`; write def")
                sink.write(step, row)
            doing = "close()"
            sink.close()
        except (Exception, SystemExit) as error:  # some libraries leave by SystemExit
            raise ValueError(f"{doing} raised {describe_fault(error, source_of(found))}") from error
    return ["it took two rows, one with nan and inf, and closed"]
