"""What is done about responses whose reward, environment, agent or teacher fails: quoted once, counted, and an end to
the run where a whole batch fails alike."""

from __future__ import annotations

import logging

from gspo_megatron.config.hooks import is_reference
from gspo_megatron.controller.generation import Generation
from gspo_megatron.controller.process_pool import Lost
from gspo_megatron.controller.servers import Refused

log = logging.getLogger(__name__)


class FaultTally:
    """Faults of responses, by their reason."""

    def __init__(self, batch: int, lacking: str, consequence: str, metric: str) -> None:
        """
        Args:
            batch: responses of a batch.
            lacking: what a response that failed has not: `score`.
            consequence: what becomes of it: `it gets 0`.
            metric: that counts it; `{kind}` is the kind of the fault.
        """
        self._batch, self._lacking, self._consequence, self._metric = batch, lacking, consequence, metric
        self._quoted: set[str] = set()
        self._alike = 0
        """Responses in a row that failed for the reason `_reason`."""
        self._reason = ""

    def clear(self) -> None:
        """A response did not fail."""
        self._alike = 0

    def count(self, generation: Generation, lost: Lost, kind: str, key: str, name: str, shown: str) -> None:
        """Count one response that failed, and quote the first of each reason.

        Args:
            generation: the response.
            lost: why.
            kind: of the metric.
            key: recipe key that names what failed.
            name: value of the key.
            shown: text of the response.

        Raises:
            Refused: as many responses as a batch have failed for the same reason.
        """
        reason = f"{key} {lost.kind} {lost.why.partition(':')[0] if lost.kind == 'raised' else ''}"
        if reason not in self._quoted:
            self._quoted.add(reason)
            log.warning(
                "%s=%s gave no %s to sample %d of prompt %d (problem %s): %s; %s, and the metric %s counts the others"
                "\nthe response ends %r\n%s",
                key, name, self._lacking, generation.sample_index, generation.prompt.index,
                generation.prompt.problem.id, lost.why, self._consequence, self._metric.format(kind=kind), shown[-200:],
                lost.trace,
            )  # fmt: skip
        self._alike = self._alike + 1 if reason == self._reason else 1
        self._reason = reason
        if self._alike >= self._batch:
            fix = f"run `gspo check {name} RECIPE`" if is_reference(name) else "see the controller's log"
            raise Refused(
                f"{key}={name} gave no {self._lacking} to {self._alike} responses in a row, a whole batch: {lost.why}; "
                f"correct it ({fix}), then start the run again"
            )
