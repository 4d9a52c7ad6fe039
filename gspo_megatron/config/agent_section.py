"""The section of an agent: a program of the user's own that holds the conversation."""

from __future__ import annotations

from pydantic import Field, field_validator

from gspo_megatron.config.base import Section
from gspo_megatron.config.hooks import is_reference
from gspo_megatron.config.recipe_paths import ObjectReference


class AgentSection(Section):
    """`agent`: a program that talks to the model through the controller's OpenAI-compatible endpoint.

    Each response is one episode: the prompt is the first request, replies of tools and of users are appended as ids and
    not trained on. All turns share `rollout.max_answer_tokens`.
    """

    program: ObjectReference
    """`file.py:NAME` or `package.module:NAME` of `async def run(problem, client)`. It returns the score, named parts of
    it, or None: then `reward` scores the last turn."""
    max_turns: int = Field(default=64, gt=0)
    """Most requests of an episode that are answered; the next one is refused, and the response counts as truncated.
    Source: chosen here."""
    seconds: float = Field(default=600, gt=0)
    """Most seconds of an episode outside its requests, by the clock: its own work and its tools. An agent that takes
    longer is ended and counted. Source: chosen here."""
    concurrency: int = Field(default=256, gt=0)
    """Most episodes at a time. Source: `rollout.max_concurrency` of one server."""

    @field_validator("program")
    @classmethod
    def program_is_a_reference(cls, program: str) -> str:
        if not is_reference(program):
            raise ValueError(f"{program} names no function; write file.py:NAME or package.module:NAME")
        return program


def check_conversation(agent: AgentSection | None, has_environment: bool, tokenizer_kind: str) -> None:
    """Raise ValueError where an agent cannot hold the conversation of a recipe."""
    if agent is not None and has_environment:
        raise ValueError("agent and environment both reply to the model between its turns; remove one of them")
    if agent is not None and tokenizer_kind != "huggingface":
        raise ValueError(
            f"agent sends messages, and tokenizer.kind={tokenizer_kind} has no chat template to write them with; "
            "name a Hugging Face tokenizer directory"
        )
