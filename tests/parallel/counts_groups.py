"""Prints the process groups that `build_groups` makes, by kind, as one rank of a large world sees them.

`python -m tests.parallel.counts_groups WORLD TP PP CP EP`; nothing is connected, and torch believes in a GPU.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.parallel import Layout
from gspo_megatron.policy import mesh


def main() -> None:
    """Every rank makes all groups, those that it is no member of too."""
    world, tensor, pipeline, context, expert = map(int, sys.argv[1:])
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    made: Counter[str] = Counter()
    make = dist.new_group

    def count(*arguments: Any, **named: Any) -> Any:
        named.pop("backend", None)
        made[named["group_desc"]] += 1
        return make(*arguments, **named)

    dist.new_group = torch.distributed.new_group = count
    torch.cuda.is_available = lambda: True
    mesh.build_groups(Layout(world, tensor=tensor, pipeline=pipeline, context=context, expert=expert))
    print(json.dumps({"all": made.total(), "kinds": made}))


if __name__ == "__main__":
    main()
