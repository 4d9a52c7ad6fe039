"""What an environment process of the tests builds: the real calculator over one id a character; without torch."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_megatron.config.long_responses import EnvironmentSection
from gspo_megatron.environments import Step, make_step

SECTION = EnvironmentSection(name="calculator", call_start="", call_end="=", reply="[{result}]")


class Characters:
    """Ids 4 to 95 are the characters from the blank on."""

    def encode_text(self, text: str) -> list[int]:
        return [ord(letter) - 28 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i + 28) for i in ids)


def refuse_messages(messages: object, last_id: int) -> list[int]:
    raise AssertionError("the calculator writes no messages")


def make_calculator() -> Step:
    return make_step(SECTION, Characters(), refuse_messages)
