"""Names of nodes as SLURM writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Protocol


class Named(Protocol):
    @property
    def name(self) -> str: ...


def fold(hosts: Iterable[Named]) -> str:
    """`node[01-04],login1` for node01, node02, node03, node04, login1; the order is kept."""
    return ",".join(_runs([host.name for host in hosts]))


def _runs(names: list[str]) -> Iterator[str]:
    start = 0
    for index, (one, two) in enumerate([*pairwise(names), (names[-1], "")], start=1):
        if _follows(one, two):
            continue
        first, last = names[start], names[index - 1]
        stem, digits = _split(first)
        yield first if first == last else f"{stem}[{digits}-{_split(last)[1]}]"
        start = index


def _follows(one: str, two: str) -> bool:
    (stem, digits), (other, more) = _split(one), _split(two)
    return bool(digits and more) and stem == other and len(digits) <= len(more) and int(more) == int(digits) + 1


def _split(name: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.*?)(\d*)", name)
    assert match is not None
    return match[1], match[2]
