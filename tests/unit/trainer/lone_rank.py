"""What a stop request sees of a trainer of one rank."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

LOG = SimpleNamespace(time=lambda stage: contextlib.nullcontext())
TRAINER: Any = SimpleNamespace(on_first_rank=lambda ask: ask(None), log=LOG)
