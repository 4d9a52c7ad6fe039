"""GSPO_REQUIRE_GPU=1: a test that needs a GPU fails where it would be skipped."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import REQUIRE_GPU, count_gpus
from tests.places import ROOT


@pytest.mark.skipif(count_gpus() > 0, reason="the tests of a GPU run here")
@pytest.mark.parametrize(("required", "code", "outcome"), [("", 0, "1 skipped"), ("1", 1, "this test was skipped")])
def test_a_skip_fails_where_a_gpu_is_required(required: str, code: int, outcome: str) -> None:
    test = "tests/gpu/test_policy_gpu.py::test_reference_spec_equals_the_oracle_in_float32[moe]"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        cwd=ROOT, env={**os.environ, REQUIRE_GPU: required}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, outcome in done.stdout) == (code, True), done.stdout[-2000:]
