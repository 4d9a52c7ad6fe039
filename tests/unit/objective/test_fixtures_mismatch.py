"""The entries of tests/data/objective_vectors.json about the gap between sampler and trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.objective import finalize_metrics
from gspo_megatron.objective.correction import correction_factor
from gspo_megatron.objective.packed import Packed, identity
from tests import reference
from tests.unit.objective.cases import FIXTURES, as_rows, as_sums, engine, near, preset, run


def mismatch_tensors() -> tuple[Tensor, Tensor, Packed]:
    entry = FIXTURES["mismatch"]
    old, sampler = (torch.tensor(entry[key], dtype=torch.float64).log() for key in ("pi_train", "mu_infer"))
    return old, sampler, Packed.of(torch.ones(4, dtype=torch.bool), torch.tensor([0, 4]), identity)


@pytest.mark.parametrize(
    ("column", "changes"),
    [
        ("ratio", {"correction": "tis", "tis_cap": 1e9}),
        ("tis_C2", {"correction": "tis"}),
        ("mis_C2_mask", {"correction": "mis"}),
        ("icepop_.5_5", {"correction": "icepop"}),
        ("icepop_.5_2", {"correction": "icepop", "mask_high": 2.0}),
    ],
)
def test_token_corrections(column: str, changes: dict[str, Any]) -> None:
    old, sampler, packed = mismatch_tensors()
    spec = preset("gspo").replace(**changes)
    factor = correction_factor(spec, packed, old, old, sampler, torch.ones(4, dtype=torch.float64))
    assert factor.tolist() == pytest.approx(FIXTURES["mismatch"][column], abs=5e-10)


def test_sequence_corrections() -> None:
    entry = FIXTURES["mismatch"]
    old, sampler, packed = mismatch_tensors()
    ones = torch.ones(4, dtype=torch.float64)

    def factor(**changes: Any) -> float:
        found = correction_factor(preset("gspo").replace(**changes), packed, old, old, sampler, ones)
        assert len(set(found.tolist())) == 1
        return float(found[0])

    assert factor(correction="sequence_product", tis_cap=1e9) == near(entry["seq_product"])
    assert math.log(entry["seq_product"]) == pytest.approx(entry["log_seq_product"], abs=1e-8)
    geometric = entry["geo_mean"]
    assert factor(correction="geometric_mask", geometric_low=geometric - 1e-8, geometric_high=9) == 1
    assert factor(correction="geometric_mask", geometric_low=geometric + 1e-8, geometric_high=9) == 0
    assert factor(correction="geometric_mask", geometric_low=0, geometric_high=geometric - 1e-8) == 0
    assert factor(correction="veto", veto_below=0.0999) == 1
    assert factor(correction="veto", veto_below=0.1001) == 0


def test_mismatch_metrics() -> None:
    entry = FIXTURES["mismatch"]
    old, sampler, _ = mismatch_tensors()
    answer = reference.Response(old.clone(), old, torch.ones(4, dtype=torch.float64), sampler)
    logged = finalize_metrics(as_sums(engine(preset("gspo"), as_rows([answer]))[2]))
    for name, column in {
        "mismatch_k1": "k1",
        "mismatch_k3": "k3",
        "mismatch_dp_mean": "abs_prob_diff_mean",
        "mismatch_ppl_ratio": "ppl_ratio_train_over_infer",
        "mismatch_f2": "F2",
        "mismatch_ess": "ESS_norm",
        "mismatch_chi2": "chi2_token",
        "mismatch_ratio_max": "max_ratio",
    }.items():
        assert logged[name] == near(entry[column]), name
    assert math.exp(logged["mismatch_log_ppl_sampler"]) == near(entry["ppl_infer"])
    assert math.exp(logged["mismatch_log_ppl_trainer"]) == near(entry["ppl_train"])
    p, q = torch.tensor(entry["pi_train"]).double(), torch.tensor(entry["mu_infer"]).double()
    assert logged["mismatch_correlation"] == pytest.approx(float(torch.corrcoef(torch.stack([p, q]))[0, 1]), abs=1e-7)
    assert logged["mismatch_abs_max"] == pytest.approx(float((old - sampler).abs().max()), abs=1e-12)
    assert logged["mismatch_dp_max"] == pytest.approx(0.3, abs=1e-12)
    assert logged["mismatch_outside_icepop"] == 0.25


def test_opsm() -> None:
    entry = FIXTURES["opsm"]
    gap = entry["mean(logold-lognew)"]
    spec = preset("gspo").replace(trust="none", correction="opsm", opsm_delta=entry["delta"])
    value, grads, sums = run(spec, [[-gap - 0.3, -gap + 0.3]], [-1.0])
    assert (value, grads[0].tolist(), sums["zero_tokens"]) == (0.0, [0.0, 0.0], 2)
    assert run(spec, [[-gap - 0.3, -gap + 0.3]], [1.0])[0] == near(entry["s"])
