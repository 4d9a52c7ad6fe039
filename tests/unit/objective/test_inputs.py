"""Bad input: one sentence that names the tensor, its shape and the first offending index."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gspo_megatron.objective import BatchTotals, LossInputs, ObjectiveSpec, group_advantages, policy_loss


def inputs(**changes: Any) -> LossInputs:
    fields: dict[str, Any] = {
        "logprobs": torch.full((5,), -1.0, requires_grad=True),
        "old_logprobs": torch.full((5,), -1.0),
        "advantages": torch.tensor([1.0, -1.0]),
        "loss_mask": torch.tensor([False, True, True, True, True]),
        "cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32),
        "totals": BatchTotals(2, 4),
    }
    return LossInputs(**{**fields, **changes})


def with_value(at: int, value: float) -> torch.Tensor:
    return torch.full((5,), -1.0).index_fill(0, torch.tensor([at]), value)


def test_the_case_below_is_good() -> None:
    assert torch.isfinite(policy_loss(ObjectiveSpec.preset("gspo"), inputs()).loss)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"logprobs": with_value(2, float("nan"))}, ValueError, ["logprobs [5]", "nan", "trained position 2"]),
        (
            {"old_logprobs": with_value(4, float("-inf"))},
            ValueError,
            ["old_logprobs [5]", "-inf", "trained position 4"],
        ),
        ({"rollout_logprobs": with_value(1, float("inf"))}, ValueError, ["rollout_logprobs [5]", "trained position 1"]),
        ({"advantages": torch.tensor([1.0, float("nan")])}, ValueError, ["advantages [2]", "nan", "sequence 1"]),
        ({"logprobs": torch.full((5,), -1.0).bfloat16()}, TypeError, ["logprobs [5]", "bfloat16", "float32"]),
        ({"old_logprobs": torch.full((5,), -1.0).half()}, TypeError, ["old_logprobs [5]", "float16"]),
        ({"old_logprobs": torch.full((4,), -1.0)}, ValueError, ["old_logprobs", "[4]", "[5]"]),
        ({"logprobs": torch.full((5, 1), -1.0)}, ValueError, ["logprobs", "[5, 1]", "[5]"]),
        ({"advantages": torch.ones(2, 1)}, ValueError, ["advantages", "[2, 1]", "[S] = [2]"]),
        ({"advantages": torch.ones(3)}, ValueError, ["advantages", "[3]", "[S] = [2]", "[T] = [5]"]),
        ({"advantages": torch.ones(5)}, ValueError, ["advantages [5]", "ratio_level=sequence", "gspo_token"]),
        ({"advantages": torch.ones(2, dtype=torch.int64)}, TypeError, ["advantages [2]", "int64"]),
        ({"loss_mask": torch.ones(5)}, ValueError, ["loss_mask", "float32", "bool"]),
        ({"loss_mask": torch.ones(4, dtype=torch.bool)}, ValueError, ["loss_mask", "[4]", "[5]"]),
        (
            {"cu_seqlens": torch.tensor([0, 3, 4])},
            ValueError,
            ["cu_seqlens [3]", "cover T = 5", "ends at 4", "index 2"],
        ),
        ({"cu_seqlens": torch.tensor([0, 3, 6])}, ValueError, ["cu_seqlens [3]", "cover T = 5", "ends at 6"]),
        ({"cu_seqlens": torch.tensor([1, 3, 5])}, ValueError, ["cu_seqlens [3]", "start at 0", "1 at index 0"]),
        ({"cu_seqlens": torch.tensor([0, 6, 5])}, ValueError, ["cu_seqlens [3]", "6 to 5", "index 2"]),
        ({"cu_seqlens": torch.tensor([0.0, 3, 5])}, ValueError, ["cu_seqlens", "float32", "int32"]),
        ({"cu_seqlens": torch.tensor([0]), "advantages": torch.ones(0)}, ValueError, ["cu_seqlens [1]", "5 tokens"]),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        policy_loss(ObjectiveSpec.preset("gspo"), inputs(**changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"correction": "tis"}, ["rollout_logprobs is None", "tis"]),
        ({"ratio_reference": "sampler"}, ["rollout_logprobs is None", "ratio_reference=sampler"]),
        ({"kl": "k3", "kl_coefficient": 0.1}, ["reference_logprobs is None", "kl=k3"]),
        ({"aggregation": "constant"}, ["aggregation_length", "max_answer_tokens"]),
    ],
)
def test_an_axis_without_what_it_reads_is_refused(axes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        policy_loss(ObjectiveSpec.preset("grpo").replace(**axes), inputs())
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_garbage_at_untrained_positions_is_not_refused() -> None:
    policy_loss(ObjectiveSpec.preset("gspo"), inputs(logprobs=with_value(0, float("nan"))))


def test_an_advantage_of_nan_for_a_sequence_without_trained_tokens_is_not_refused() -> None:
    mask = torch.tensor([True, True, True, False, False])
    out = policy_loss(
        ObjectiveSpec.preset("gspo"), inputs(loss_mask=mask, advantages=torch.tensor([1.0, float("nan")]))
    )
    assert torch.isfinite(out.loss)


def test_as_many_tokens_as_sequences() -> None:
    """[S] wins where S == T, unless the caller says otherwise."""
    lengths = torch.tensor([0, 2, 2])
    two = {
        "logprobs": torch.full((2,), -1.0, requires_grad=True),
        "old_logprobs": torch.full((2,), -1.0),
        "advantages": torch.tensor([3.0, 5.0]),
        "loss_mask": torch.ones(2, dtype=torch.bool),
        "cu_seqlens": lengths,
        "totals": BatchTotals(1, 2),
    }
    spec = ObjectiveSpec.preset("gspo_token")
    assert float(policy_loss(spec, LossInputs(**two)).loss.detach()) == -3
    assert float(policy_loss(spec, LossInputs(**two, token_advantages=True)).loss.detach()) == -4


@pytest.mark.parametrize(
    ("rewards", "groups", "word"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]), "index 1"),
        (torch.ones(3), torch.zeros(2), "[3]"),
        (torch.ones(2, 2), torch.zeros(2, 2), "[2, 2]"),
    ],
)
def test_rewards_that_do_not_fit_are_refused(rewards: torch.Tensor, groups: torch.Tensor, word: str) -> None:
    with pytest.raises(ValueError) as caught:
        group_advantages(rewards, groups)
    assert word in str(caught.value)
