"""What is compared of a server: every key that decides what it samples, and none that it merely writes otherwise."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from gspo_megatron.config.schema import Recipe, WeightUpdateSection
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.controller.weight_update import WeightUpdater
from gspo_megatron.models import load_recipe
from gspo_megatron.models.qwen3.architecture import Qwen3Architecture
from gspo_megatron.transport.identity import Identity, hash_vocabulary, read_run_id
from tests.unit.controller.fakes import FakeServer, serving
from tests.unit.controller.test_controller import ARCHITECTURE
from tests.unit.controller.test_weight_update import TERMS, NoStore

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DENSE = {"model_type": "qwen3", "num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}


def identity(**architecture: Any) -> Identity:
    return Identity("run-1", "00ff", Qwen3Architecture.model_validate(ARCHITECTURE | architecture), "bfloat16", 64)


def report(directory: Path, own: Identity, **changes: Any) -> dict[str, Any]:
    """What a server says that was started from this identity's own config.json, as transformers reads it."""
    config = own.architecture.to_hugging_face(own.dtype) | changes.pop("config", {})
    (directory / "config.json").write_text(json.dumps(config))
    read = json.loads(AutoConfig.from_pretrained(directory).to_json_string(use_diff=False))
    return {"run": "run-1", "tokenizer": "00ff", "config": read, "dtype": "bfloat16", "context": 64, **changes}


@pytest.mark.parametrize("architecture", [{}, {"rope_scaling": YARN}, DENSE, {"tie_word_embeddings": True}])
def test_a_server_of_the_run_s_own_config_has_no_fault(tmp_path: Path, architecture: dict[str, Any]) -> None:
    own = identity(**architecture)
    assert own.fault_of(report(tmp_path, own)) == ""
    assert own.fault_of(report(tmp_path, own, context=65)) == "", "a longer server cuts nothing"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}}, "rope_theta is 5000000.0 there"),
        ({"config": {"rope_parameters": {**YARN, "rope_theta": 1e6}}}, "rope_scaling is"),
        ({"config": {"norm_topk_prob": False}}, "norm_topk_prob is False there and True in the recipe"),
        ({"config": {"vocab_size": 51}}, "vocab_size is 51 there and 50 in the recipe"),
        ({"dtype": "float32"}, "dtype is float32 there"),
        ({"tokenizer": ""}, "hash of none there and 00ff here"),
        ({"run": ""}, "belongs to run nobody, this is run run-1"),
        ({"context": 63}, "takes 63 tokens"),
    ],
)  # fmt: skip
def test_every_difference_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    own = identity()
    assert words in own.fault_of(report(tmp_path, own, **changes))


def test_another_stretch_of_the_context_is_named(tmp_path: Path) -> None:
    own = identity(rope_scaling=YARN)
    rope = {**YARN, "factor": 2.0, "rope_theta": 1e6}
    assert "'factor': 2.0" in own.fault_of(report(tmp_path, own, config={"rope_parameters": rope}))
    assert "rope_scaling is None there" in own.fault_of(report(tmp_path, identity()))


def test_a_server_that_changed_hands_gets_neither_a_pause_nor_a_weight(tmp_path: Path) -> None:
    async def run() -> None:
        own, kept, lost = identity(), FakeServer(), FakeServer()
        kept.identity = lost.identity = report(tmp_path, own)
        async with serving(kept, lost) as clients:
            updater = WeightUpdater(ServerSet(clients, own), WeightUpdateSection(), "127.0.0.1", sleeps=False)
            updater._store = NoStore()
            await updater._servers.wait_healthy(5)
            lost.identity = report(tmp_path, own, run="run-2")
            ticket = await updater.begin(0, TERMS)
            assert len(ticket["servers"]) == 1 and "/pause" in kept.calls and "/pause" not in lost.calls
            assert "belongs to run run-2, this is run run-1" in updater._servers.faults()[lost.url]
            kept.identity = lost.identity
            with pytest.raises(Refused, match=r"no server is left: .* belongs to run run-2"):
                await updater.begin(1, TERMS)

    asyncio.run(run())


def test_a_foreign_server_ends_the_start_with_its_sentence(tmp_path: Path) -> None:
    async def run() -> None:
        own, fake = identity(), FakeServer()
        fake.identity = report(tmp_path, own, context=63)
        async with serving(fake) as clients:
            with pytest.raises(Refused, match=f"server {fake.url} takes 63 tokens"):
                await ServerSet(clients, own).wait_healthy(5)

    asyncio.run(run())


def test_all_roles_of_a_run_directory_read_one_id(tmp_path: Path) -> None:
    first = read_run_id(tmp_path)
    assert len(first) == 16 and read_run_id(tmp_path) == first
    (tmp_path / "other").mkdir()
    assert read_run_id(tmp_path / "other") != first
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["run_id"]


def test_the_hash_is_of_what_decides_ids(tmp_path: Path) -> None:
    def recipe(path: Path) -> Recipe:
        return load_recipe(Path("recipes/tiny_moe.yaml"), [f"tokenizer.path={path}"])

    (tmp_path / "one").write_bytes(b"pieces")
    (tmp_path / "two").write_bytes(b"other pieces")
    assert hash_vocabulary(recipe(tmp_path / "one")) != hash_vocabulary(recipe(tmp_path / "two"))
    (tmp_path / "tokenizer.json").write_text("{}")
    before = hash_vocabulary(recipe(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("changed")
    assert hash_vocabulary(recipe(tmp_path)) == before
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert hash_vocabulary(recipe(tmp_path)) != before
