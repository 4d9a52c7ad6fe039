"""The reference weights change places with the policy's, and nothing else happens."""

from __future__ import annotations

import pytest
import torch

from gspo_megatron.policy.reference import ReferenceWeights


def test_inside_the_reference_computes_and_afterwards_every_bit_is_back() -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reference = ReferenceWeights([model])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7).add_(0.3)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    present = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(KeyError), reference.in_place():
            assert all(torch.equal(tensor, first[name]) for name, tensor in model.state_dict().items())
            raise KeyError  # the pass fails: the policy gets its weights back all the same
        assert all(torch.equal(tensor, present[name]) for name, tensor in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == places, "optimizer and buffers hold these"
    assert reference.num_bytes == 8 * 8
