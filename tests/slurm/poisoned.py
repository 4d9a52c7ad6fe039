"""Trust rule of the fault tests: GSPO's clip, once no number when somebody asks for it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gspo_megatron.objective.trust import Surrogate, TokenTerms

POISON = "GSPO_TEST_POISON"
"""Environment: a file. The first micro-batch of any rank that finds it takes it away and is spoilt."""


def clip(terms: TokenTerms) -> Surrogate:
    """The clip, times nan if the file was there."""
    from gspo_megatron.objective.trust import find_rule

    kept = find_rule("clip")(terms)
    try:
        Path(os.environ[POISON]).unlink()
    except FileNotFoundError:
        return kept
    return replace(kept, objective=kept.objective * float("nan"))
