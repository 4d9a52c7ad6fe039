"""Presets, the recipe section, the sentence, findings, and an objective from a file of one's own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from gspo_megatron.config.axes import Axes
from gspo_megatron.config.objective_spec import ObjectiveSection, ObjectiveSpec
from gspo_megatron.config.presets import PRESETS
from gspo_megatron.objective import trust
from gspo_megatron.plan.rules.objective import _READ_WHEN, findings, typical_band
from tests import reference
from tests.places import ROOT
from tests.unit.objective.cases import PRESET_NAMES, as_rows, assert_same, engine, random_answers

DPPO = ROOT / "recipes" / "objectives" / "dppo.py"
RUN = {"updates": 4, "answers": 8, "max_answer_tokens": 8192}


def codes(spec: ObjectiveSpec, **run: Any) -> list[str]:
    return [finding.code for finding in findings(spec, **{**RUN, **run})]


def test_gspo_is_written_out_and_is_the_default_of_every_axis() -> None:
    """The preset names every axis that decides its algorithm; the numbers of other axes have no effect on it."""
    row, written = PRESETS["gspo"], ObjectiveSpec.preset("gspo").model_dump()
    assert {name: written[name] for name in row} == row
    assert ObjectiveSpec().model_dump() == written
    numbers = {"dual_clip_bound", "ratio_cap", "tau_positive", "tau_negative", "options", "tis_cap", "mask_low"}
    numbers |= {"mask_high", "geometric_low", "geometric_high", "opsm_delta", "veto_below", "aggregation_length"}
    numbers |= {"trust_region_delta", "gae_discount", "gae_decay", "value_clip", "value_coefficient"}
    numbers |= {"kl_in", "kl_coefficient", "overlong_buffer", "name"}
    assert written.keys() == row.keys() | numbers and not row.keys() & numbers


def test_the_presets_are_the_promised_ones() -> None:
    assert tuple(PRESETS) == PRESET_NAMES


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_preset_is_quiet_and_a_section_of_it_is_the_same_point(name: str) -> None:
    assert codes(ObjectiveSpec.preset(name)) == []
    section = ObjectiveSection.model_validate({"preset": name, "clip_low": None})
    assert section.spec() == ObjectiveSpec.preset(name)
    assert ObjectiveSection.model_validate(section.model_dump()) == section


def test_published_numbers() -> None:
    gspo, grpo = ObjectiveSpec.preset("gspo"), ObjectiveSpec.preset("grpo")
    assert (gspo.clip_low, gspo.clip_high, grpo.clip_low, grpo.clip_high) == (3e-4, 4e-4, 0.2, 0.27)
    assert ObjectiveSection.model_validate({"preset": "grpo", "clip_high": 0.5}).spec() == grpo.replace(clip_high=0.5)
    assert ObjectiveSection.model_validate({"preset": "dr_grpo"}).spec(2048).aggregation_length == 2048
    assert ObjectiveSection().spec() == gspo


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"preset": "grbo"}, "did you mean grpo?"),
        ({"trust": "clipp"}, "clipp is no trust rule; use one of clip, dual_clip"),
        ({"clip_hgh": 1}, "clip_hgh"),
        ({"correction": "product"}, "sequence_product"),
        ({"ratio_level": "seq"}, "sequence_token"),
        ({"preset": "nowhere.py:X"}, "nowhere.py does not exist"),
        ({"preset": "gspo_megatron.nowhere:X"}, "cannot be found"),
        ({"preset": f"{DPPO}:NOTHING"}, "holds no NOTHING"),
        ({"preset": f"{DPPO}:binary_tv"}, "is a function, not an ObjectiveSpec"),
    ],
)
def test_what_is_not_known_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ObjectiveSection.model_validate(values)
    assert words in str(caught.value)


def test_the_sentence() -> None:
    assert ObjectiveSpec.preset("gspo").describe(1024, 4) == (
        "gspo: sequence ratio vs recomputed old policy, clip -3.0e-4/+4.0e-4, mean over tokens then over "
        "1024 sequences, 4 updates a batch, no KL, no correction, replay off"
    )
    everything = ObjectiveSpec.preset("dr_grpo").replace(
        ratio_reference="sampler", kl="k3", kl_coefficient=1e-3, correction=["icepop", "veto"], aggregation_length=99,
        overlong="soft", overlong_buffer=20, group_filter="dynamic_sampling", replay="sampler",
    )  # fmt: skip
    assert everything.describe() == (
        "dr_grpo: token ratio vs sampler's log-probs, clip -0.2/+0.2, sum over tokens / 99, mean over sequences, "
        "1.0e-3 x KL k3 in the loss, IcePop [0.5, 5]+veto below 1.0e-4, replay of the sampler's routes, "
        "advantage r - group mean, soft overlong penalty over 20 tokens, groups of equal rewards replaced"
    )


def test_two_objectives_have_two_sentences() -> None:
    """Every axis shows: moving any of them, where it is read, changes the sentence."""
    moved: dict[str, Any] = {
        "advantage": "mean",
        "advantage_ddof": 1,
        "advantage_eps": 0.1,
        "gae_discount": 0.9,
        "gae_decay": 0.9,
        "value_clip": 9.0,
        "value_coefficient": 9.0,
        "ratio_level": "token",
        "ratio_reference": "interpolated",
        "ratio_prefix": "minimum",
        "trust": "none",
        "clip_low": 0.1,
        "clip_high": 0.1,
        "dual_clip_bound": 9.0,
        "ratio_cap": 9.0,
        "tau_positive": 9.0,
        "tau_negative": 9.0,
        "options": {"up": 1.0},
        "correction": ["opsm"],
        "tis_cap": 9.0,
        "mask_low": 0.9,
        "mask_high": 9.0,
        "geometric_low": 0.1,
        "geometric_high": 9.0,
        "opsm_delta": 0.1,
        "trust_region_delta": 0.1,
        "veto_below": 0.1,
        "aggregation": "token_mean",
        "aggregation_length": 9,
        "kl": "k2",
        "kl_in": "reward",
        "kl_coefficient": 0.5,
        "overlong": "zero",
        "overlong_buffer": 9,
        "group_filter": "dynamic_sampling",
        "replay": "trainer",
    }
    assert set(moved) == set(Axes.model_fields)
    readers: dict[str, dict[str, Any]] = {
        **{axis: {"advantage": "gae"} for axis in ("gae_discount", "gae_decay", "value_clip", "value_coefficient")},
        "dual_clip_bound": {"trust": "dual_clip"},
        "ratio_cap": {"trust": "detached_clip"},
        "tau_positive": {"trust": "soft_gate"},
        "tau_negative": {"trust": "soft_gate"},
        "options": {"trust": "x.py:y"},
        "tis_cap": {"correction": ["tis"]},
        "mask_low": {"correction": ["mis"]},
        "mask_high": {"correction": ["icepop"]},
        "geometric_low": {"correction": ["geometric_mask"]},
        "geometric_high": {"correction": ["geometric_mask"]},
        "opsm_delta": {"correction": ["opsm"]},
        "trust_region_delta": {"correction": ["trust_region_mask"]},
        "veto_below": {"correction": ["veto"]},
        "aggregation_length": {"aggregation": "constant"},
        "kl_in": {"kl": "k3"},
        "kl_coefficient": {"kl": "k3"},
        "overlong_buffer": {"overlong": "soft"},
    }
    for axis, value in moved.items():
        before = ObjectiveSpec.preset("gspo").replace(**readers.get(axis, {}))
        assert before.replace(**{axis: value}).describe(8, 4) != before.describe(8, 4), axis


@pytest.mark.parametrize(
    ("preset", "axes", "run", "code"),
    [
        ("gspo", {"aggregation": "token_mean"}, {}, "token-mean-with-gspo"),
        ("gspo_token", {"aggregation": "constant"}, {}, "token-mean-with-gspo"),
        ("grpo", {"trust": "log_clip"}, {}, "log-clip-without-mean"),
        ("gspo", {"clip_low": 0.2, "clip_high": 0.2}, {}, "clip-too-wide"),
        ("gspo", {}, {"max_answer_tokens": 28}, "clip-too-narrow"),
        ("grpo", {"clip_low": 3e-4, "clip_high": 4e-4}, {}, "clip-too-narrow"),
        ("grpo", {"trust": "dual_clip", "dual_clip_bound": 1.1}, {}, "dual-clip-inside-band"),
        ("gspo", {"ratio_reference": "sampler"}, {}, "sampler-logprobs-as-old"),
        ("gspo", {"ratio_reference": "interpolated"}, {}, "sampler-logprobs-as-old"),
        ("gspo", {"ratio_prefix": "minimum"}, {}, "prefix-without-token-ratio"),
        ("gspo", {"trust_region_delta": 0.1}, {}, "objective-key-inert"),
        ("gspo", {}, {"updates": 1}, "gspo-inert"),
        ("grpo", {}, {"updates": 1}, "ratio-inert"),
        ("gspo", {"correction": ["tis", "icepop"]}, {}, "correction-twice"),
        ("grpo", {"correction": ["tis"], "ratio_reference": "sampler"}, {}, "correction-twice"),
        ("gspo", {"correction": ["sequence_product"]}, {}, "sequence-product-at-length"),
        ("gspo", {"correction": ["mis"], "mask_low": 3.0, "mask_high": 2.0}, {}, "empty-band"),
        ("grpo", {"kl": "k3"}, {}, "kl-coefficient-zero"),
        ("grpo", {"kl": "k1", "kl_coefficient": 0.1}, {}, "kl-k1-in-loss"),
        ("grpo", {"kl": "k3_unbiased", "kl_coefficient": 0.1, "kl_in": "reward"}, {}, "kl-unbiased-in-reward"),
        ("dr_grpo", {}, {"max_answer_tokens": None}, "aggregation-length-missing"),
        ("dapo", {"overlong": "soft"}, {}, "overlong-buffer-missing"),
        ("dapo", {"overlong": "soft", "overlong_buffer": 9999}, {}, "overlong-buffer-too-long"),
        ("gspo", {}, {"answers": 1}, "group-of-one"),
        ("gspo", {"advantage": "gae"}, {}, "critic-with-sequence-ratio"),
        ("gspo_token", {"advantage": "gae", "correction": ["opsm"]}, {}, "critic-with-opsm"),
        ("gspo", {"value_clip": 0.1}, {}, "objective-key-inert"),
        ("gspo", {"advantage": "maxrl", "overlong": "soft", "overlong_buffer": 20}, {}, "rewards-below-zero"),
        (
            "gspo",
            {"advantage": "maxrl", "kl": "k3", "kl_coefficient": 0.1, "kl_in": "reward"},
            {},
            "rewards-below-zero",
        ),
        ("gspo", {"kl_coefficient": 0.1}, {}, "objective-key-inert"),
        ("cispo", {"clip_low": 0.1}, {}, "objective-key-inert"),
        ("gspo", {"tis_cap": 5.0}, {}, "objective-key-inert"),
    ],
)
def test_combinations_that_are_no_algorithm_are_named(
    preset: str, axes: dict[str, Any], run: dict[str, Any], code: str
) -> None:
    assert code in codes(ObjectiveSpec.preset(preset).replace(**axes), **run)


def test_every_axis_that_can_be_inert_is_watched() -> None:
    choices = {name for name in Axes.model_fields if name not in _READ_WHEN}
    assert choices == {
        "advantage", "ratio_level", "ratio_reference", "ratio_prefix", "trust", "correction", "aggregation", "kl",
        "overlong", "group_filter", "replay",
    }  # fmt: skip


def test_the_band_follows_the_noise_of_short_answers() -> None:
    """The tiny recipe's band, 7e-3 / 9.3e-3 at 28 tokens, is quiet; the paper's is right from 10,000 tokens on."""
    assert typical_band(100_000) == typical_band(10_000) == 3.5e-4
    assert codes(ObjectiveSpec.preset("gspo").replace(clip_low=7e-3, clip_high=9.3e-3), max_answer_tokens=28) == []


def test_short_products_and_recomputed_corrections_are_quiet() -> None:
    spec = ObjectiveSpec.preset("grpo").replace(correction=["sequence_product"])
    assert codes(spec, max_answer_tokens=128) == []
    assert codes(ObjectiveSpec.preset("gspo").replace(correction=["icepop", "veto", "opsm"])) == []


def test_an_objective_from_a_file() -> None:
    section = ObjectiveSection.model_validate({"preset": f"{DPPO}:DPPO", "options": {"up": 0.3}})
    spec = section.spec()
    assert spec.options == {"down": 0.2, "up": 0.3, "cap": 20.0}
    assert "trust rule dppo.py:binary_tv cap=20 down=0.2 up=0.3" in spec.describe()
    assert codes(spec) == []
    clipped = 0.0
    for seed in range(10):
        answers = random_answers(seed, 0.8)
        value, grads = reference.gradients(lambda a: reference.dppo_tv(a, low=0.2, high=0.3), answers)
        got, got_grads, sums = engine(spec, as_rows(answers, seed=seed))
        assert got == pytest.approx(value, abs=1e-12)
        assert_same(got_grads, grads, 1e-12)
        clipped += sums["clip_low_tokens"] * sums["clip_high_tokens"]
    assert clipped > 0


def test_a_rule_that_is_no_function_is_refused() -> None:
    with pytest.raises(ValueError, match="is a ObjectiveSpec, not a function"):
        trust.find_rule(f"{DPPO}:DPPO")


def test_the_objective_of_a_recipe_is_read_without_torch() -> None:
    program = (
        "import sys; from gspo_megatron.config.objective_spec import ObjectiveSection;"
        "from gspo_megatron.plan.rules.objective import findings;"
        f"spec = ObjectiveSection.model_validate({{'preset': {str(DPPO) + ':DPPO'!r}}}).spec(); findings(spec);"
        "spec.describe(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
