"""What vLLM logs at every weight update: the line that means nothing is left out, every other one stays."""

from __future__ import annotations

import logging

import pytest

from gspo_megatron.inference.vllm_plugin import RELOAD_LOGGER, is_of_weights

FAILED = "%s: Failed to load weights"


@pytest.mark.parametrize(
    ("message", "arguments", "stays"),
    [
        (FAILED, ("RotaryEmbedding",), False),
        (FAILED, ("YaRNScalingRotaryEmbedding",), False),
        (FAILED, ("RMSNorm",), True),
        ("%s: moved", ("RotaryEmbedding",), True),
        ("done", (), True),
    ],
)
def test_only_the_table_of_angles_is_not_missed(message: str, arguments: tuple[str, ...], stays: bool) -> None:
    record = logging.LogRecord(RELOAD_LOGGER, logging.WARNING, "", 0, message, arguments, None)
    assert is_of_weights(record) is stays
