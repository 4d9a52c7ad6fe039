"""The teacher of on-policy distillation: a vLLM server of the user's that scores the tokens of finished responses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Protocol

import aiohttp
import numpy as np

from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller import vllm_format
from gspo_megatron.controller.fault_tally import FaultTally
from gspo_megatron.controller.generation import Generation
from gspo_megatron.controller.process_pool import Lost
from gspo_megatron.controller.servers import Refused
from gspo_megatron.controller.vllm_format import FormatError, PromptToken
from gspo_megatron.http_clients import direct_session
from gspo_megatron.model_requests import QUOTED, Send, make_headers, request_reply, shorten
from gspo_megatron.types import Response

NAME = "teacher"
"""Of its section."""
LEAST_BYTES, BYTES_A_TOKEN = 1 << 20, 512
"""What a reply may have: so many, and so many more for each token, of which vLLM writes the text and about 60 bytes."""
IMPOSSIBLE = -9999.0
"""What vLLM writes for the logarithm of a probability of 0."""
ROUNDING = 1e-3
"""Largest log-prob: in theory 0."""
PROBED = 64
"""Most tokens by which the two vocabularies are compared; fewer where sequences are shorter."""
FAILED = "failed"
"""Kind of the fault of a response that was not scored."""


class TeacherFailed(RuntimeError):
    """The teacher did not score a response, which is not trained on."""


class Vocabulary(Protocol):
    """What is needed of the student's tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def pieces(self, ids: Sequence[int]) -> list[str]: ...


class Teacher:
    """Asks for log-probs. Use it within one event loop: `start` first, `close` at the end."""

    def __init__(self, recipe: Recipe, vocabulary: Vocabulary) -> None:
        """
        Args:
            recipe: `teacher` is set.
            vocabulary: of the student.

        Raises:
            RecipeError: the variable of the key is not set.
        """
        assert recipe.teacher is not None
        self._section, self._vocabulary = recipe.teacher, vocabulary
        self._rows, self._longest = recipe.arch.vocab_size, recipe.rollout.max_sequence_tokens
        self._headers = make_headers(recipe.teacher, NAME)
        self._free = asyncio.Semaphore(recipe.teacher.at_once)
        self._open = AsyncExitStack()
        self._post: Send | None = None
        self._tally = FaultTally(
            recipe.batch.prompts * recipe.batch.answers, "log-probs", "it is not trained on", "dropped/no-teacher"
        )

    async def start(self) -> None:
        """Connect, and check that the server has this model, room for the longest response and the same vocabulary.

        Raises:
            Refused: it has not, or does not answer.
        """
        limit = aiohttp.ClientTimeout(total=self._section.request_seconds)
        made = direct_session(self._headers, connector=aiohttp.TCPConnector(limit=0), timeout=limit)
        session = await self._open.enter_async_context(made)
        self._post = session.post
        try:
            served = vllm_format.read_models(await self._request(session.get, "/models", None, 0))
            fault = self._fault_of(served) or await self._other_token()
        except (TeacherFailed, FormatError) as error:
            await self.close()
            raise Refused(f"teacher.url: {error}; start `vllm serve` there, or correct the section teacher") from None
        if fault:
            await self.close()
            raise Refused(f"teacher.model={self._section.model}: {fault}")

    async def close(self) -> None:
        """Close all connections."""
        await self._open.aclose()

    async def add_logprobs(self, generation: Generation, response: Response) -> tuple[Response, str]:
        """Ask for the log-probs of a finished response.

        Returns:
            The response with them, or as it is and the kind of the fault.

        Raises:
            Refused: as many responses as a batch failed for the same reason.
        """
        if not generation.sampled:
            return response, ""  # nothing of it is trained on
        try:
            found = await self._score(generation)
        except TeacherFailed as error:
            lost, end = Lost(FAILED, str(error)), self._vocabulary.decode(generation.token_ids[-QUOTED:])
            self._tally.count(generation, lost, FAILED, "teacher.model", self._section.model, end)
            return response, FAILED
        self._tally.clear()
        return replace(response, teacher_logprobs=found), ""

    async def _score(self, generation: Generation) -> np.ndarray:
        """[tokens of the response] float32, 0 where masked. Raises TeacherFailed."""
        ids, start = generation.request_ids.tolist(), len(generation.prompt.token_ids)
        tokens = await self._ask(ids)
        found = np.array([token.logprob for token in tokens[start - 1 :]], np.float32)
        for span in generation.masked:
            found[span.start : span.end] = 0.0
        bad = np.flatnonzero(~np.isfinite(found) | (found <= IMPOSSIBLE) | (found > ROUNDING))
        if len(bad):
            at = int(bad[0])
            raise TeacherFailed(f"token {at} of the response (id {ids[start + at]}) has log-prob {found[at]:g}")
        return found

    async def _ask(self, ids: Sequence[int]) -> list[PromptToken]:
        """[len(ids) - 1] what it says of each token but the first. Raises TeacherFailed."""
        assert self._post is not None, "start it first"
        body = vllm_format.prompt_request(self._section.model, ids)
        async with self._free:
            content = await self._request(self._post, "/completions", body, len(ids))
        try:
            # Megabytes of JSON for a long response, which the responses that stream in should not wait for.
            return await asyncio.to_thread(vllm_format.read_prompt_tokens, content, ids)
        except FormatError as error:
            raise TeacherFailed(f"{self._section.url} answered without log-probs of the prompt: {error}") from None

    async def _request(self, send: Send, path: str, body: dict[str, object] | None, tokens: int) -> bytes:
        most = LEAST_BYTES + BYTES_A_TOKEN * tokens
        return await request_reply(self._section, send, path, body, bytes, most, TeacherFailed)

    def _fault_of(self, served: dict[str, int | None]) -> str:
        """Why the server does not do, from what it serves: [name] -> longest sequence; empty = it does."""
        if self._section.model not in served:
            return f"{self._section.url} serves {', '.join(served) or 'nothing'}; name one of these, or start another"
        most, wanted = served[self._section.model], self._longest + 1
        if most is not None and most < wanted:
            return (
                f"it takes {most} tokens, and rollout.max_prompt_tokens + max_answer_tokens, and one that it samples, "
                f"are {wanted}; start it with --max-model-len {wanted}"
            )
        return ""

    async def _other_token(self) -> str:
        """The first token that is another in the teacher's vocabulary, in words; empty = none was found."""
        last = min(self._vocabulary.vocab_size, self._rows) - 1
        count = min(PROBED, self._longest - 1)
        ids = sorted({round(place * last / max(count - 1, 1)) for place in range(count)})
        same = 0
        for token in await self._ask([ids[0], *ids]):
            mine, its = self._vocabulary.decode([token.id]).strip(), (token.text or "").strip()
            if not mine or not its or "\ufffd" in mine + its:  # a special token, or a part of a character
                continue
            # The unknown token is written by its name or by a sign.
            if its not in (mine, self._vocabulary.pieces([token.id])[0].strip()):
                return (
                    f"id {token.id} is {shorten(its)!r} there and {shorten(mine)!r} in the student's vocabulary; "
                    "distillation compares probabilities of ids: take a teacher with the student's tokenizer"
                )
            same += 1
        return "" if same else "it gives no text of tokens, so that vocabularies can be compared; serve its tokenizer"
