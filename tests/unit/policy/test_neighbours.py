"""Importing the policy on a machine with no GPU leaves other libraries in the process as they were."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.places import ROOT

SCRIPT = """
import sys

import torch
import torch._dynamo, torch.distributed, torch.utils._device
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

PLACES = (torch, torch.cuda, torch.cuda.nvtx, torch.Tensor, torch._C.TensorBase, torch.nn, torch.nn.functional,
          torch.distributed, torch.utils._device, transformers.modeling_utils, sys.modules["builtins"])

def names():
    return [dict(vars(place)) for place in PLACES], torch._dynamo.config.disable, torch.get_rng_state().tolist()

def logprobs():
    # A model that has just been freed leaves its values in the memory that the next one gets.
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(60)[None] % 50).logits.log_softmax(-1)

config = Qwen3Config(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=16, initializer_range=0.3)
Qwen3ForCausalLM(config).save_pretrained(sys.argv[1])
first = logprobs()
before = names()
import gspo_megatron.policy
import gspo_megatron.policy.policy, gspo_megatron.policy.snapshot
after = names()
assert before[1:] == after[1:]
for place, old, new in zip(PLACES, before[0], after[0], strict=True):
    changed = [name for name in old if name not in new or new[name] is not old[name]]
    # A module that was imported only now is a new attribute of its package.
    changed += [name for name in new.keys() - old.keys() if f"{place.__name__}.{name}" not in sys.modules]
    assert not changed, (place, changed)
for _ in range(3):
    assert torch.equal(logprobs(), first)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device layer is for machines with no GPU")
def test_importing_the_policy_replaces_nothing_of_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-3000:]
