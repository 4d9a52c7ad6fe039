"""A job distilled from a teacher behind a plain vLLM server, every process real: it becomes like the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gspo_megatron.data.sample_index import INDEX, read_refs
from gspo_megatron.data.store import SampleStore
from gspo_megatron.models import load_recipe
from tests.places import ROOT
from tests.rollout.jobs import SMALL, assert_all_ended, finish, rows_of, start
from tests.rollout.plain_server import NAME, plain_server, write_random_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 8
SETTINGS = (
    "objective.preset=distillation", "objective.clip_low=null", "objective.clip_high=null",
    f"trainer.max_steps={STEPS}", "batch.prompts=32", "batch.updates=2", "evaluation.problems=0",
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A run that is done."""

    directory: Path
    teacher: Path
    said: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    directory = tmp_path_factory.mktemp("distillation")
    wide = next(one for one in SMALL if one.startswith("model.architecture.initializer_range="))
    teacher = write_random_model(load_recipe(ROOT / "recipes" / "tiny_moe.yaml", [wide]), directory / "other")
    with plain_server(teacher, directory / "server.log") as url:
        job = start(directory, *SETTINGS, f'teacher={{"url": "{url}/v1", "model": "{NAME}"}}')
        said = finish(job)
    assert job.returncode == 0, said[-3000:]
    yield Finished(directory, teacher, said)


def test_the_divergence_from_the_teacher_falls(finished: Finished) -> None:
    rows = rows_of(finished.directory)
    found = [row["teacher_kl"] for row in rows]
    print(found)
    assert len(found) == STEPS and found[-1] < found[0] / 2
    assert all("dropped/no-teacher" not in row and row["nonfinite_tokens"] == 0 for row in rows)
    assert all(row["scored_sequences"] == row["compared_sequences"] == 1 for row in rows)
    assert "advantage log p(teacher) - log p(old) of each token" in finished.said
    assert_all_ended(finished.directory)


def test_each_token_has_the_teacher_s_log_prob(finished: Finished) -> None:
    store = SampleStore(finished.directory / "run" / "samples")
    model: Any = AutoModelForCausalLM.from_pretrained(finished.teacher, dtype=torch.float32)
    for ref in list(read_refs(INDEX.find(store.directory)[1]))[:16]:
        ids, first, _ = store.read(ref)
        with torch.no_grad():
            logits = model(torch.tensor(ids[None].astype("int64"))).logits[0].log_softmax(-1)
        wanted = logits[torch.arange(first - 1, len(ids) - 1), torch.tensor(ids[first:].astype("int64"))]
        found = store.read_teacher(ref)
        assert found is not None
        assert torch.allclose(torch.from_numpy(found.copy()), wanted, atol=1e-4, rtol=0)
