"""The forward pass of one micro-batch through one chunk of the model, with the head where the chunk has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from gspo_megatron.policy.head import HeadOutput, chosen_logprobs
from gspo_megatron.policy.microbatch import MicroBatch


@dataclass(frozen=True, slots=True)
class ChunkPass:
    """One pass."""

    batch: MicroBatch
    temperature: float
    """Of the sampler."""
    chunk_tokens: int
    """Tokens for which the head holds logits at one time."""
    sequence_parallel: bool
    """Whether the tensor-parallel ranks share the tokens between them."""
    known: HeadOutput | None = None
    """The head's output where an earlier pass has it."""
    found: list[HeadOutput] = field(default_factory=list)
    """Takes the head's output, on the chunk that has the head."""

    def run(self, model: torch.nn.Module) -> Tensor:
        """Log-probs [T_local] of the targets on the last chunk, hidden states on the others."""
        return model(
            input_ids=self.batch.token_ids[None],
            position_ids=None,
            attention_mask=None,
            packed_seq_params=self.batch.params,
            output_processor=self._head,
        )

    def _head(self, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        assert isinstance(group, dist.ProcessGroup)
        if self.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=group
            )
        output = chosen_logprobs(
            hidden_states[:, 0],
            output_layer.weight if output_weight is None else output_weight,
            self.batch.targets,
            self.temperature,
            self.chunk_tokens,
            group,
            self.known,
        )
        self.found.append(output)
        return output.logprobs
