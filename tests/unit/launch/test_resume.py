"""What a job refuses to go on with: another job's run. The rule for recipes: tests/unit/plan/test_resume_rule.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.config import RecipeError
from launch.lib.resume import refuse_other_job


def test_a_run_whose_job_is_alive_is_left_alone(tmp_path: Path) -> None:
    refuse_other_job(tmp_path, "8", ["7"])
    (tmp_path / "attempt").write_text("2 7\n")
    refuse_other_job(tmp_path, "8", ["6", "8"])
    refuse_other_job(tmp_path, "7", ["7"])
    with pytest.raises(RecipeError, match="job 7 is running in"):
        refuse_other_job(tmp_path, "8", ["7"])
