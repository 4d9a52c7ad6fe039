"""What an evaluation leaves: its report, and a file of every response where one is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gspo_megatron.controller.scoring import Scored
from gspo_megatron.transport.messages import EvaluationExample, EvaluationReport, EvaluationRequest
from gspo_megatron.types import Prompt

NUM_EXAMPLES = 3


def report_evaluation(request: EvaluationRequest, scored: Sequence[Scored], highest: float) -> EvaluationReport:
    """Count what an evaluation found.

    Args:
        request: how it sampled.
        scored: [problems * answers], the responses to a problem one after the other.
        highest: the score of a right response.
    """
    count = len(scored)
    return EvaluationReport(
        accuracy=sum(s.reward >= highest for s in scored) / count,
        mean_reward=sum(s.reward for s in scored) / count,
        mean_length=sum(len(s.response.token_ids) for s in scored) / count,
        unscored=sum(bool(s.unscored) for s in scored),
        problems=count // request.answers,
        answers=request.answers,
        temperature=request.temperature,
        # One response to each of the first problems.
        examples=tuple(
            EvaluationExample(question=s.question, answer_text=s.text, reward=s.reward)
            for s in scored[:: request.answers][:NUM_EXAMPLES]
        ),
    )


class AnswersFile:
    """Responses as JSON lines, each written when it is scored, so that an evaluation that is cut keeps what it has."""

    def __init__(self, path: Path | None, highest: float) -> None:
        """
        Args:
            path: of the file, which is replaced; None = nothing is written.
            highest: the score of a right response.
        """
        self._path, self._highest = path, highest
        self._file: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._path is not None:
            # ASCII: json escapes the rest, half a surrogate pair included.
            self._file = self._stack.enter_context(self._path.open("w", encoding="ascii"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, prompt: Prompt, scored: Scored) -> None:
        """Write one response. Raises OSError."""
        if self._file is None:
            return
        problem, response = prompt.problem, scored.response
        line = {
            "problem": problem.id,
            "prompt": prompt.index,
            "sample": response.sample_index,
            "question": problem.question,
            "answer": problem.answer,
            "source": problem.source,
            "response": scored.text,
            "reward": scored.reward,
            "right": scored.reward >= self._highest,
            "parts": dict(scored.parts),
            "unscored": scored.unscored,
            "stop_reason": response.stop_reason,
            "tokens": len(response.token_ids),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
