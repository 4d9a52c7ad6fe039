"""The curve of a metric leaves out what somebody wrote that is no number."""

from __future__ import annotations

from gspo_megatron.report.plots import curve


def test_what_is_no_number_is_left_out() -> None:
    rows = [{"step": 1, "loss": 1.5}, {"step": 2, "loss": "oops"}, {"step": 3}, {"step": 4, "loss": 2}]
    assert curve(rows, "loss") == ([1, 4], [1.5, 2])
