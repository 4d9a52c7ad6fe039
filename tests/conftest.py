"""What decides whether a test runs here: its markers, the machine, and --slow."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Generator

import pytest

REQUIRE_GPU = "GSPO_REQUIRE_GPU"
"""Set to 1, a test of a GPU that is skipped fails: on a machine where all should run, none is left out unseen."""


def pytest_configure() -> None:
    # A shell starts background commands with Ctrl-C ignored, and every process that a test starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        reason = why_not(item, slow=bool(config.getoption("--slow")))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    is_of_gpu = item.get_closest_marker("gpu") is not None and item.get_closest_marker("multi_gpu") is None
    if report.skipped and is_of_gpu and os.environ.get(REQUIRE_GPU) == "1" and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"{REQUIRE_GPU}=1, and this test was skipped: {report.longrepr}"
    return report


def why_not(item: pytest.Item, slow: bool) -> str | None:
    """The sentence a skipped test shows, or None for one that runs."""
    if item.get_closest_marker("slow") and not slow:
        return "it takes more than a minute: run it with --slow"
    if item.get_closest_marker("multi_gpu") and count_gpus() < 2:
        return f"it needs two NVIDIA GPUs and torch sees {count_gpus()}"
    if item.get_closest_marker("gpu") and count_gpus() < 1:
        return "it needs an NVIDIA GPU and torch sees none"
    return None


@functools.cache
def count_gpus() -> int:
    # Imported late: torch takes seconds, and most runs hold no test that asks.
    import torch

    return torch.cuda.device_count()
