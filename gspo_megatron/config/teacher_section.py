"""The section `teacher`: the model that on-policy distillation imitates."""

from __future__ import annotations

from pydantic import Field

from gspo_megatron.config.model_server import ModelServerSection


class TeacherSection(ModelServerSection):
    """`teacher`: a model of the same vocabulary behind a vLLM server of the user's (`vllm serve`), which scores the
    tokens of every training response for `objective.advantage=teacher`. It is reached directly, without a proxy.
    """

    request_seconds: float = Field(default=300.0, gt=0)
    """Longest time of one request, seconds. Source: chosen here: the prompt pass of `at_once` long responses."""

    def describe(self) -> str:
        """What is asked, in one sentence."""
        return f"{self.model} at {self.url}, a request a response, {self.at_once} at once; its time is not in the plan"
