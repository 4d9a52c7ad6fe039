"""`gspo debug`: a kept update gives its loss again, also when two context-parallel ranks held it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.cli import main
from gspo_megatron.objective import BatchTotals, LossInputs, ObjectiveSpec, policy_loss
from gspo_megatron.policy.attention import zigzag_indices
from gspo_megatron.trainer.failure_replay import micro_batches

SPEC = ObjectiveSpec.preset("gspo").replace(clip_low=0.1, clip_high=0.2)
PPO, DISTILLATION = ObjectiveSpec.preset("ppo"), ObjectiveSpec.preset("distillation")
TOTALS = BatchTotals(sequences=2, tokens=10)
STARTS = torch.tensor([0, 8, 16], dtype=torch.int32)


def pack() -> dict[str, Tensor]:
    """Two sequences of 8, of which 4 and 6 tokens are trained."""
    generator = torch.Generator().manual_seed(1)
    old = -torch.rand(16, generator=generator)
    mask = torch.zeros(16, dtype=torch.bool)
    mask[3:7], mask[9:15] = True, True
    return {
        "targets": torch.arange(100, 116),
        "loss_mask": mask,
        "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64),
        "rollout_logprobs": old + 0.01,
        "cu_seqlens": STARTS,
        "old_logprobs": old,
        "logprobs": old + 0.1 * torch.randn(16, generator=generator),
    }


def critic_pack() -> dict[str, Tensor]:
    """The same with a critic, whose advantages are one a token."""
    values = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    named = dict(zip(("advantages", "values", "old_values", "returns"), values, strict=True))
    return {**pack(), **named, "advantages": named["advantages"].double()}


def write(directory: Path, whole: dict[str, Tensor], context: int, spec: ObjectiveSpec = SPEC) -> Path:
    """The bundle that `context` ranks would have written."""
    directory.mkdir()
    for rank in range(context):
        indices = zigzag_indices(STARTS, rank, context)
        part = {
            "0/" + name: value[indices].contiguous() if len(value) == len(whole["targets"]) else value
            for name, value in {**whole, "indices": torch.arange(16)}.items()
        }
        part["0/cu_seqlens"] = STARTS // context
        part["0/ranks"] = torch.tensor(context)
        save_file(part, directory / f"rank_{rank:05d}.safetensors")
    about = {
        "update": 7, "reason": "the gradient norm is nan", "metrics": {"grad_norm": 1.5, "a/b": 2.0},
        "objective": spec.model_dump(mode="json"), "totals": {"sequences": 2, "tokens": 10},
    }  # fmt: skip
    (directory / "bundle.json").write_text(json.dumps(about))
    return directory


def expected_loss(whole: dict[str, Tensor], spec: ObjectiveSpec = SPEC) -> float:
    values = {name: value for name, value in whole.items() if name != "targets"}
    values["logprobs"] = whole["logprobs"].clone().requires_grad_()
    return float(
        policy_loss(spec, LossInputs(**values, totals=TOTALS, token_advantages=spec.has_token_advantages)).loss
    )


@pytest.mark.parametrize("context", [1, 2])
def test_the_loss_comes_out_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], context: int) -> None:
    whole = pack()
    assert main(["debug", str(write(tmp_path / "bundle", whole, context))]) == 0
    said = capsys.readouterr().out
    found = re.search(r"loss (\S+) over 2 sequences with 10 trained tokens", said)
    assert found is not None
    assert float(found[1]) == pytest.approx(expected_loss(whole), rel=1e-5)
    assert "update 7: the gradient norm is nan" in said and "grad_norm 1.5" in said
    gap = (whole["logprobs"] - whole["old_logprobs"])[3:7].double().mean()
    assert f"sequence 0: log s {float(gap):+.3e} over 4 tokens, advantage +1" in said


@pytest.mark.parametrize("context", [1, 2])
def test_the_loss_of_a_critic_comes_out_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], context: int) -> None:
    whole = critic_pack()
    whole["values"][11] = float("nan") if context == 2 else 0.0
    assert main(["debug", str(write(tmp_path / "bundle", whole, context, PPO))]) == 0
    said = capsys.readouterr().out
    found = re.search(r"loss (\S+) over 2 sequences", said)
    assert found is not None
    if context == 2:
        assert found[1] == "nan" and "token 3 (id 111): values nan" in said
    else:
        assert float(found[1]) == pytest.approx(expected_loss(whole, PPO), rel=1e-5)
    assert f"advantage {float(whole['advantages'][3:7].mean()):+.3g}" in said


@pytest.mark.parametrize("context", [1, 2])
def test_the_loss_of_a_teacher_comes_out_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], context: int
) -> None:
    whole = {**pack(), "advantages": critic_pack()["advantages"]}
    assert main(["debug", str(write(tmp_path / "bundle", whole, context, DISTILLATION))]) == 0
    said = capsys.readouterr().out
    found = re.search(r"loss (\S+) over 2 sequences", said)
    assert found is not None and float(found[1]) == pytest.approx(expected_loss(whole, DISTILLATION), rel=1e-5)
    assert f"advantage {float(whole['advantages'][3:7].mean()):+.3g}" in said


@pytest.mark.parametrize("context", [1, 2])
def test_the_parts_of_context_parallel_ranks_make_the_pack(tmp_path: Path, context: int) -> None:
    whole = pack()
    ((_, found),) = micro_batches(write(tmp_path / "bundle", whole, context), token_advantages=False)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_a_log_prob_that_is_not_finite_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = pack()
    whole["logprobs"][11] = float("nan")
    whole["logprobs"][0] = float("nan")  # not trained
    assert main(["debug", str(write(tmp_path / "bundle", whole, 2))]) == 0
    said = capsys.readouterr().out
    assert "1 trained tokens without a finite log-prob:" in said
    assert "sequence 1, token 3 (id 111): logprobs nan" in said


def test_another_directory_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["debug", str(tmp_path)]) == 2
    assert "holds no bundle.json" in capsys.readouterr().err
