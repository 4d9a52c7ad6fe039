"""The forward pass of one micro-batch through one chunk of the model, with the head where the chunk has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from gspo_megatron.policy.head import HeadOutput, chosen_logprobs
from gspo_megatron.policy.microbatch import MicroBatch
from gspo_megatron.policy.value_head import VALUE_HEAD


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
    values: list[Tensor] = field(default_factory=list)
    """Takes the critic's values [T_local], where the chunk has a value head."""

    def run(self, model: torch.nn.Module) -> Tensor:
        """Log-probs [T_local] of the targets on the last chunk, hidden states on the others."""
        return model(
            input_ids=self.batch.token_ids[None],
            position_ids=None,
            attention_mask=None,
            packed_seq_params=self.batch.params,
            output_processor=partial(self._head, critic=getattr(getattr(model, "module", model), VALUE_HEAD, None)),
        )

    def _head(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, critic: Any, **_: Any
    ) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        assert isinstance(group, dist.ProcessGroup)
        if critic is not None:
            self.values.append(critic(hidden_states, group, self.sequence_parallel))
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
