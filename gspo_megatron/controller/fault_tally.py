"""What is done about responses whose reward, environment or agent fails: quoted once, counted, and an end to the run
where a whole batch fails alike."""

from __future__ import annotations

import logging

from gspo_megatron.config.hooks import is_reference
from gspo_megatron.controller.generation import Generation
from gspo_megatron.controller.process_pool import Lost
from gspo_megatron.controller.servers import Refused

log = logging.getLogger(__name__)


class FaultTally:
    """Faults of responses, by their reason."""

    def __init__(self, batch: int, lowest: float) -> None:
        """
        Args:
            batch: responses of a batch.
            lowest: score of a response that failed.
        """
        self._batch, self._lowest = batch, lowest
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
            kind: of the metric `unscored/KIND`.
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
                "%s=%s gave no score to sample %d of prompt %d (problem %s): %s; it gets %g, and the metric "
                "unscored/%s counts the others\nthe response ends %r\n%s",
                key, name, generation.sample_index, generation.prompt.index, generation.prompt.problem.id, lost.why,
                self._lowest, kind, shown[-200:], lost.trace,
            )  # fmt: skip
        self._alike = self._alike + 1 if reason == self._reason else 1
        self._reason = reason
        if self._alike >= self._batch:
            fix = f"run `gspo check {name} RECIPE`" if is_reference(name) else "see the controller's log"
            raise Refused(
                f"{key}={name} gave no score to {self._alike} responses in a row, a whole batch: {lost.why}; "
                f"correct it ({fix}), then start the run again"
            )
