"""What the tests of rewards share."""

import pytest

from gspo_megatron.rewards import mathematics


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    """What math-verify imports takes seconds of processor time, which the limit of a score would count."""
    mathematics.load()
