"""vLLM's own formats (0.32), written and read in one place.

Our side of each is a typed value: `Sampling` and `Generation` go in, `Ending` and plain values come out. The readers
raise FormatError for a body that vLLM would not send. Samples travel in frames of ours (`transport/token_frames.py`);
their parameters and endings are in vLLM's words.
"""

from __future__ import annotations

import itertools
import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gspo_megatron.controller.generation import Generation, Sampling, response_seed
from gspo_megatron.transport.token_frames import SamplingRequest
from gspo_megatron.transport.update_messages import JoinRequest
from gspo_megatron.types import Segment

GENERATED_TOKENS = re.compile(rb"^vllm:generation_tokens_total\{[^}]*\} ([0-9.e+]+)", re.MULTILINE)
_scorings = itertools.count()
BUSY = (408, 425, 429)
"""Statuses of a server that might take the same request at another time."""


class FormatError(ValueError):
    """A body that is not in vLLM's format, or in which vLLM reports that it failed."""


class RefusedRequest(ValueError):
    """A request that the server refuses, whoever of them is asked; with its own words."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended."""

    finish_reason: str | None
    """vLLM's word for why the response ended."""
    segments: tuple[Segment, ...]
    """Weight versions of all tokens of the request, counted from its first one."""


@dataclass(frozen=True, slots=True)
class PromptToken:
    """What a server says of one token of a prompt."""

    id: int
    logprob: float
    text: str | None
    """None where it has no tokenizer."""


def sampling_request(generation: Generation, sampling: Sampling, left: int) -> SamplingRequest:
    """The request for the rest of a response, of at most `left` tokens."""
    greedy = sampling.temperature == 0
    place = (generation.prompt.index, generation.sample_index, generation.parts)
    parameters: dict[str, Any] = {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": left,
        "stop_token_ids": list(sampling.stop_ids),
        # Only the ids above stop: a model's own end-of-text id may differ from the tokenizer's.
        "ignore_eos": True,
        "detokenize": False,
        "seed": response_seed(sampling.seed, *place),
    }
    if not greedy:
        parameters["logprobs"] = 0
    if sampling.routes:
        parameters["routed_experts_prompt_start"] = len(generation.routes)
    if sampling.halt is not None:
        halt = {"max_pattern_size": sampling.halt.longest_pattern, "min_count": sampling.halt.times}
        parameters["repetition_detection"] = halt
    name = "-".join(map(str, (*place, "greedy" if greedy else "sampled")))
    return SamplingRequest(name, generation.request_ids, parameters)


def read_ending(text: bytes) -> Ending:
    """The last frame's own words on a request. Raises FormatError or RefusedRequest for an error in their place."""
    try:
        body = json.loads(text)
        if "error" in body:
            raise read_error(body)
        spans = body.get("weight_versions") or ()
        return Ending(body["finish_reason"], tuple(Segment(int(label), start, end) for label, start, end in spans))
    except (FormatError, RefusedRequest):
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"{type(error).__name__}: {error}") from None


def is_refusal(status: object) -> bool:
    """Whether an HTTP status says that the request is at fault, and not the server."""
    return isinstance(status, int) and 400 <= status < 500 and status not in BUSY


def read_error(body: dict[str, Any]) -> FormatError | RefusedRequest:
    """Read the error that a server puts in place of an ending, where the status has been sent already."""
    error = body["error"]
    code, words = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, error)
    sentence = " ".join(str(words).split())[:400]
    return RefusedRequest(sentence) if is_refusal(code) else FormatError(sentence)


def scoring_request(token_ids: Sequence[int]) -> SamplingRequest:
    """The request for the log-probs of a prompt."""
    parameters = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
    return SamplingRequest(f"score-{next(_scorings)}", array("i", token_ids), parameters)


def prompt_request(model: str, token_ids: Sequence[int]) -> dict[str, object]:
    """The body of `/v1/completions` for the log-probs of a prompt; one token is sampled, and not looked at."""
    return {"model": model, "prompt": list(token_ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


def read_prompt_tokens(body: bytes, token_ids: Sequence[int]) -> list[PromptToken]:
    """[len(token_ids) - 1] what the answer to `prompt_request` says of the tokens but the first."""
    try:
        rows = json.loads(body)["choices"][0]["prompt_logprobs"]
        found = [row[str(token)] for row, token in zip(rows[1:], token_ids[1:], strict=True)]
        return [
            PromptToken(token, float(one["logprob"]), one.get("decoded_token"))
            for one, token in zip(found, token_ids[1:], strict=True)
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{type(error).__name__}: {error}") from None


def read_models(body: bytes) -> dict[str, int | None]:
    """The models that a server lists, and the most tokens of a sequence; None = it does not say."""
    try:
        return {str(card["id"]): card.get("max_model_len") for card in json.loads(body)["data"]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{type(error).__name__}: {error}") from None


def write_abort(request_ids: Sequence[str]) -> bytes:
    """The request to forget other requests."""
    return _write({"request_ids": list(request_ids)})


def write_worker_call(method: str) -> bytes:
    """The request that calls a method of `WorkerExtension` in every worker."""
    return _write({"method": method})


def read_worker_replies(body: bytes) -> list[str | None]:
    """[workers] what each method returned: text, or None."""
    replies = _read_field(body, "results")
    if not isinstance(replies, list) or not all(reply is None or isinstance(reply, str) for reply in replies):
        raise FormatError(f"results are no list of texts: {str(replies)[:100]}")
    return replies


def write_joining(request: JoinRequest) -> bytes:
    """The body of `/init_weight_transfer_engine`; vLLM passes `init_info` on to `JoinInfo` of our worker."""
    return _write({"init_info": {"request": request.to_json()}})


def write_reception() -> bytes:
    """The body of `/update_weights`; the ticket has said everything."""
    return _write({"update_info": {}})


def write_version(version: int) -> bytes:
    """The body of `/finish_weight_update`: the label of the new weights."""
    return _write({"weight_version": str(version)})


def write_label(version: int) -> bytes:
    """The body of `/update_weight_version`: another label for the weights that are there."""
    return _write({"new_version": str(version)})


def read_version(body: bytes) -> str:
    """The label of a server's weights."""
    return str(_read_field(body, "weight_version"))


def read_is_paused(body: bytes) -> bool:
    """Whether the engine is paused."""
    return bool(_read_field(body, "is_paused"))


def read_generated_tokens(body: bytes) -> int:
    """Tokens generated since the server started, from its metrics page."""
    found = GENERATED_TOKENS.search(body)
    return int(float(found.group(1))) if found else 0


def _write(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _read_field(body: bytes, name: str) -> Any:
    try:
        return json.loads(body)[name]
    except (ValueError, LookupError, TypeError) as error:
        raise FormatError(f"{type(error).__name__}: {error}") from None
