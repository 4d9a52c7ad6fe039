"""The recorder of the routers' choices on a CPU.

vllm 0.32 has one (`enable_return_routed_experts`): it keeps the choices of each request by position, those of prompts
in the prefix cache beside their blocks, and hands them out with the tokens. Only its second model runner feeds it, and
that has no CPU build. Here the first one does, so that everything behind it is vLLM's own on both devices.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.aux_output_connector.worker import (
    AuxOutputWorkerConnector,
    PendingAuxOutput,
    get_aux_output_connector,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class RecordingRunner(CPUModelRunner):
    """vLLM's runner, with the recorder around each step where the recipe asks for it."""

    _recorder: AuxOutputWorkerConnector | None = None
    _recorded: PendingAuxOutput | None = None

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if self.vllm_config.aux_output_config.enabled:
            self._recorder = get_aux_output_connector(self.model, self.vllm_config, kv_cache_config)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        if self._recorder is None:
            return super().execute_model(scheduler_output, *args, **kwargs)
        self._recorder.begin_step(scheduler_output.aux_output_connector_metadata)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            # The rows of the forward pass, before sampling moves the requests on.
            count = self.input_batch.num_reqs
            step = SimpleNamespace(
                req_ids=self.input_batch.req_ids[:count],
                query_start_loc_np=self.query_start_loc.np[: count + 1].copy(),
                num_computed_tokens_np=self.input_batch.num_computed_tokens_cpu[:count].copy(),
            )
            self._recorded = self._recorder.prepare_output(step)  # type: ignore[arg-type]
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        output = super().sample_tokens(grammar_output)
        recorded, self._recorded = self._recorded, None
        if recorded is not None:
            assert isinstance(output, ModelRunnerOutput), "vLLM's CPU platform does not schedule ahead"
            sampled = np.array([len(ids) for ids in output.sampled_token_ids])
            recorded.enqueue_cpu_copy(sampled, np.zeros_like(sampled))
            output.aux_output_connector_output = recorded.process_output()
        return output


class _AsSecondRunner:
    """A configuration that says of itself that it uses the second model runner."""

    use_v2_model_runner = True

    def __init__(self, config: VllmConfig) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def record_on_cpu() -> None:
    """Let vLLM's CPU workers record routes. Its rule that this needs the second runner no longer holds; others do."""
    from vllm.v1.worker import cpu_worker

    verify = VllmConfig._verify_aux_output_compatibility
    cpu_worker.CPUModelRunner = RecordingRunner
    VllmConfig._verify_aux_output_compatibility = lambda self: verify(_AsSecondRunner(self))  # type: ignore[assignment,arg-type]
