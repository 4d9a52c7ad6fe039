"""fp8 from each of three trainer layouts to servers of three layouts at once: nine pairs, vLLM's CPU kernels."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen3MoeForCausalLM

from gspo_megatron.config.schema import Recipe
from gspo_megatron.models.weight_format import is_quantised
from gspo_megatron.transport.messages import RolloutRequest
from gspo_megatron.transport.update_messages import UpdateRequest, WeightTerms
from tests.rollout.conftest import open_controller, running_servers, save_run
from tests.rollout.rounded_model import NEEDS_AVX512, round_matrix, write_model
from tests.rollout.serves_fp8 import HERE
from tests.rollout.tiny import ARCH, Oracle, make_recipe
from tests.rollout.updates import TRAINERS, differences, update_check
from tests.shards import TrainerRanks, cut_shards

# Two tensor-parallel ranks of a server cut at whole blocks of 128; four of the trainer, in half of one.
WIDE = ARCH.model_copy(
    update={
        "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "moe_intermediate_size": 256,
        "intermediate_size": 256,
    }
)  # fmt: skip


def fp8_recipe(**rollout: int) -> Recipe:
    """The tiny recipe with wide matrices, served in fp8 by servers of some layout."""
    recipe = make_recipe().with_arch(WIDE)
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"dtype": "bfloat16"}),
            "rollout": recipe.rollout.model_copy(update={"weight_dtype": "fp8", **rollout}),
            "weight_update": recipe.weight_update.model_copy(update={"canary_bound": 3.0}),
        }
    ).with_arch(WIDE)


def make_oracle(seed: int, directory: Path) -> Oracle:
    """bfloat16 to send, and the model of bytes times scales that a server must then be."""
    oracle = Oracle(seed, WIDE)
    oracle.tensors = {name: value.bfloat16() for name, value in oracle.tensors.items()}
    oracle.model.config.save_pretrained(directory / "plain")
    rounded = {name: round_matrix(name, value) for name, value in oracle.tensors.items()}
    place = write_model(directory / "plain", directory / "rounded", rounded)
    oracle.model = Qwen3MoeForCausalLM.from_pretrained(place, experts_implementation="eager").float().eval()
    return oracle


@NEEDS_AVX512
@pytest.mark.slow
def test_every_trainer_layout_reaches_every_server_layout_in_fp8(tmp_path: Path) -> None:
    """Each worker's checksum is of the bytes and scales that the trainer made; a byte out of place moves a log-prob.

    vLLM's CPU kernels leave activations in bfloat16, which exchanges an expert now and then: medians are compared.
    """
    oracles = [make_oracle(seed, tmp_path / str(seed)) for seed in (0, 1)]
    assert any(is_quantised(name) for name in oracles[0].tensors)
    layouts: list[dict[str, int]] = [{"tensor_parallel": 1}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}]
    run_dirs = [save_run(tmp_path / f"server{place}", fp8_recipe(**layout)) for place, layout in enumerate(layouts)]
    with running_servers(*run_dirs, module=HERE) as servers, ExitStack() as stack:
        controller, link = open_controller(stack, servers, tmp_path / "samples", fp8_recipe())
        for version, trainer in enumerate(TRAINERS):
            oracle, other = oracles[version % 2], oracles[1 - version % 2]
            terms = WeightTerms(architecture=WIDE, dtype="bfloat16", trainer=trainer, fp8=True)
            ticket = link.begin_update(UpdateRequest(version=version, terms=terms))
            checksums = TrainerRanks(trainer.world).send(ticket, cut_shards(WIDE, trainer, oracle.tensors))
            report = link.finish_update(update_check(version, checksums, oracle.probes()))
            assert len(report.servers) == len(servers), link.status().servers
            assert report.received_over_needed == 1.0
            batch = link.rollout(RolloutRequest(step=version))
            assert np.median(differences(oracle, controller.store, batch.samples)) < 0.03
            assert np.median(differences(other, controller.store, batch.samples)) > 0.3
