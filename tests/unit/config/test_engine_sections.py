"""The sections that pass arguments on to Megatron and vLLM: what they take and refuse, and where values arrive."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel

from gspo_megatron.config import RecipeError
from gspo_megatron.config.engine_keys import MEGATRON_KEYS, VLLM_KEYS, named_keys
from gspo_megatron.config.engine_sections import MegatronMap, VllmMap, arguments_of
from gspo_megatron.config.resolved_file import save_resolved
from gspo_megatron.models import load_recipe, load_resolved
from gspo_megatron.models.vllm_engine import to_options
from tools.make_engine_table import TABLE, make_table, to_text

GPU = Path("recipes/qwen3_30b_a3b_gspo.yaml")
TINY = Path("recipes/tiny_moe.yaml")
SECTIONS = {"trainer.megatron": ("megatron", MegatronMap), "rollout.vllm": ("vllm", VllmMap)}


def fault_of(override: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(GPU, [override])
    return str(caught.value)


def test_the_table_is_that_of_the_installed_libraries() -> None:
    assert TABLE.read_text() == to_text(make_table()), "run tools/make_engine_table.py after a change of pins"


@pytest.mark.parametrize("engine", ["megatron", "vllm"])
def test_every_named_argument_exists(engine: str) -> None:
    allowed = set(MEGATRON_KEYS if engine == "megatron" else VLLM_KEYS)
    assert allowed | named_keys(engine) <= set(arguments_of(engine))
    assert not allowed & named_keys(engine)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_other_argument_is_refused_with_a_reason(section: str) -> None:
    """Also one that a new release of the library brings."""
    engine, kind = SECTIONS[section]
    others = set(arguments_of(engine)) - set(kind.model_fields)
    said = fault_of(f"{section}={{{', '.join(f'{name}: 1' for name in others)}}}")
    assert {line.split(": ")[0] for line in said.splitlines()} == {f"error [engine-key] {section}.{n}" for n in others}


@pytest.mark.parametrize("section", SECTIONS)
def test_no_number_is_below_zero_where_the_library_s_own_is_not(section: str) -> None:
    """Both libraries end on one after the nodes are allotted, and a plan with one had negative seconds."""
    engine, kind = SECTIONS[section]
    numbers = {
        name: form["type"]
        for name, form in arguments_of(engine).items()
        if name in kind.model_fields and form["type"] in ("int", "float", "list of int")
        if not isinstance(form["default"], int | float) or form["default"] >= 0
    }
    assert len(numbers) > 3
    for name, form in numbers.items():
        said = fault_of(f"{section}.{name}={'[-2]' if form.startswith('list') else '-2'}")
        assert "input should be" in said and f"{section}.{name}" in said, name


@pytest.mark.parametrize(
    "override",
    ["trainer.megatron.bucket_size=0", "rollout.vllm.block_size=0", "rollout.vllm.cudagraph_capture_sizes=[]"],
)
def test_sizes_are_one_or_more(override: str) -> None:
    assert "at least 1" in fault_of(override).replace("greater than or equal to 1", "at least 1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.megatron.tensor_model_parallel_size=2", "use trainer.tensor_parallel"),
        ("trainer.megatron.hidden_dropout=0.1", "would change the objective"),
        ("trainer.megatron.moe_router_fusion=true", "record of choices"),
        ("trainer.megatron.overlap_grad_reducee=true", "did you mean overlap_grad_reduce?"),
        ("trainer.megatron.bucket_size=4.5", "is not a whole number"),
        ("trainer.megatron.moe_token_dispatcher_type=allgather", "'alltoall' or 'flex'"),
        ("rollout.vllm.max_num_seqs=4", "use rollout.max_concurrency"),
        ("rollout.vllm.logprobs_mode=raw_logits", "log-probs that are reported"),
        ("rollout.vllm.moe_backend=foo", "'triton'"),
        ("rollout.vllm.compilation_config={cudagraf_mode: FULL}", "did you mean cudagraph_mode?"),
        ("rollout.vllm.compilation_config={cudagraph_capture_sizes: [1]}", "is an argument of its own"),
        ("rollout.vllm.kernel_config={moe_backend: marlin}", "is an argument of its own"),
        ("rollout.vllm.speculative_config={method: ngram}", "is not the policy's"),
        ("trainer.megatron.memory_efficient_layer_norm=true", "acts on Apex's norms"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_by_name(override: str, said: str) -> None:
    assert said in fault_of(override)


@pytest.mark.parametrize("key", ["objective", "model", "optimizer", "batch"])
def test_an_owner_is_a_key_of_the_recipe(key: str) -> None:
    """`use KEY` names a key that exists."""
    recipe = load_recipe(TINY)
    owners = {fix.removeprefix("use ") for kind in (MegatronMap, VllmMap) for _, fix in kind.refused.values()}
    for owner in owners - {"leave it out"}:
        section, name = owner.split(".")
        assert name in type(getattr(recipe, section)).model_fields, owner
    assert hasattr(recipe, key)


def test_values_survive_the_resolved_recipe(tmp_path: Path) -> None:
    overrides = [
        "trainer.megatron={overlap_grad_reduce: true, recompute_modules: [moe]}",
        "trainer.recompute=selective",
    ]
    recipe = load_recipe(GPU, [*overrides, "rollout.vllm={cudagraph_capture_sizes: [1, 2], moe_backend: triton}"])
    save_resolved(recipe, tmp_path / "recipe.yaml")
    again = load_resolved(tmp_path / "recipe.yaml")
    assert again.trainer.megatron.given() == {"overlap_grad_reduce": True, "recompute_modules": ("moe",)}
    assert again.rollout.vllm.given() == {"cudagraph_capture_sizes": (1, 2), "moe_backend": "triton"}
    assert "null" not in json.dumps(again.model_dump(mode="json")["rollout"]["vllm"])


def values_of(kind: type[BaseModel], name: str, default: Any) -> list[Any]:
    """Every choice of a key, or a value of its type that is not the library's default."""
    annotation = plain(get_args(kind.model_fields[name].annotation)[0])
    if name.endswith("_config"):
        return [{"compilation_config": {"cudagraph_mode": "NONE"}, "attention_config": {"flash_attn_version": 2},
                 "kernel_config": {"moe_backend": "triton"}}[name]]  # fmt: skip
    if choices := get_args(annotation):
        return list(choices) if isinstance(choices[0], str) else [(plain(choices[0])(1), plain(choices[0])(2))]
    return [not default] if annotation is bool else [64]


def plain(annotation: Any) -> Any:
    """A type without its bounds."""
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


@cache
def vllm_parser() -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return EngineArgs.add_cli_args(FlexibleArgumentParser())


@pytest.mark.parametrize("name", sorted(VLLM_KEYS))
def test_vllm_reads_what_was_passed_on(name: str) -> None:
    """Through vLLM's own parser of the command line, to the attributes of its EngineArgs."""
    from vllm.engine.arg_utils import EngineArgs

    parser = vllm_parser()
    for value in values_of(VllmMap, name, arguments_of("vllm")[name]["default"]):
        parsed = parser.parse_args(to_options({"model": "m", name: value}))
        read: Any = getattr(EngineArgs.from_cli_args(parsed), name)
        if isinstance(value, dict):
            ((field, value),) = value.items()
            read = getattr(read, field)
        read = getattr(read, "name", read)
        assert (tuple(read) if isinstance(read, list) else read) == value


def test_megatron_reads_what_was_passed_on() -> None:
    from gspo_megatron.policy.model import transformer_config

    given = (
        "{deterministic_mode: false, batch_p2p_sync: false, attention_backend: flash, recompute_modules: [core_attn]}"
    )
    recipe = load_recipe(TINY, [f"trainer.megatron={given}", "trainer.recompute=selective"])
    config = transformer_config(recipe.arch, recipe.trainer, torch.bfloat16)
    assert (config.batch_p2p_sync, config.attention_backend.name) == (False, "flash")
    assert config.recompute_modules == ["core_attn"]


def test_what_megatron_refuses_is_a_sentence() -> None:
    from gspo_megatron.policy.model import refuse_by_name, transformer_config

    recipe = load_recipe(TINY, ["trainer.megatron.moe_permute_fusion=true"])
    with (
        pytest.raises(RecipeError, match=r"engine-refuses\] trainer\.megatron: Megatron refuses .*moe_permute_fusion"),
        refuse_by_name(recipe.trainer),
    ):
        transformer_config(recipe.arch, recipe.trainer, torch.bfloat16)
