"""The library `verifiers` as an unmodified client, in an environment of its own that VERIFIERS_PYTHON names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.config.plugins import load_object
from gspo_megatron.data.samples import build_samples
from gspo_megatron.transport.messages import RolloutRequest
from tests.places import ROOT
from tests.unit.controller.agent_runs import STOP, agents_at_work, ids_of
from tests.unit.controller.fakes import FakeServer

PYTHON = os.environ.get("VERIFIERS_PYTHON", "")
AGENT = ROOT / "recipes" / "agents" / "verifiers_client.py"
PROGRAM = ROOT / "recipes" / "agents" / "verifiers_program.py"


@pytest.mark.skipif(not PYTHON, reason="set VERIFIERS_PYTHON to the Python of an environment with verifiers 0.4")
async def test_an_episode_of_verifiers_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    written = subprocess.run([PYTHON, str(PROGRAM), "verifiers_sums"], capture_output=True, text=True, check=True)
    line = json.loads(written.stdout)
    assert line == {"prompt": "Calculate 879 + 974.", "taskset": "verifiers_sums", "task": 0}
    play = load_object(f"{AGENT}:run")

    async def agent(problem: dict[str, Any], client: Any) -> Any:
        return await play(line, client)

    fake = FakeServer()
    right, wrong = [*ids_of("1853"), STOP], [*ids_of("17"), STOP]
    fake.ids = lambda body: right if body["request_id"].startswith("0-0-") else wrong
    async with agents_at_work(tmp_path, fake, agent) as controller:
        batch = await controller.rollout(RolloutRequest(step=1))
        rows = build_samples(batch.samples, controller._store)
    assert batch.unscored == {} and [ref.reward for ref in batch.samples] == [1.0, 0.0]
    assert [row.token_ids[row.loss_mask].tolist() for row in rows] == [right, wrong]
    assert batch.measures["tokens_retokenized"] == 0


async def test_without_its_environment_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERIFIERS_PYTHON", raising=False)

    class Client:
        base_url = api_key = model = ""

    with pytest.raises(RuntimeError, match="VERIFIERS_PYTHON is not set"):
        await load_object(f"{AGENT}:run")({"taskset": "a", "task": 0}, Client())
