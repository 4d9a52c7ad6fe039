"""Fine-tuning on own demonstrations over two ranks: the loss falls, and only the assistant's turns ask for it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.parallel.world import run_world
from tests.places import ROOT


def demonstration(number: int) -> str:
    left, right = 3 * number, 7 + number
    call = {"name": "calculate", "arguments": {"expression": f"{left} + {right}"}}
    messages = [
        {"role": "system", "content": "Add the numbers."},
        {"role": "user", "content": f"Calculate {left} + {right}."},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": str(left + right)},
        {"role": "assistant", "content": str(left + right)},
    ]
    return json.dumps({"messages": messages}) + "\n"


def test_the_loss_falls_and_context_has_no_gradient(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(map(demonstration, range(16))))
    overrides = [
        "cold_start.demonstrations=null", f"cold_start.path={file}", "cold_start.worked_fraction=1",
        "cold_start.steps=30", "cold_start.batch_size=8", "cold_start.warmup_steps=2",
        "tokenizer.kind=huggingface", f"tokenizer.path={ROOT}/recipes/tokenizers/agent",
        "model.architecture.vocab_size=116", "model.architecture.num_hidden_layers=2",
        "model.architecture.max_position_embeddings=256",
        "rollout.max_prompt_tokens=96", "rollout.max_answer_tokens=96", "data.held_out=4", "trainer.ranks=2",
    ]  # fmt: skip
    run_world("cold_start_worker.py", 2, overrides, tmp_path)
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2))
    assert first["before"] == second["before"] and first["after"] == second["after"]
    before, after = first["before"][0], first["after"][0]
    assert before > 4.0 and after < 0.25 * before, "log 116 = 4.75 before anything is learnt"
    for found in (first, second):
        assert len(found["masked"]) >= 30 and set(found["masked"]) == {0.0}
        assert all(slope < 0 for slope in found["trained"])
    # Context is predicted no better than by chance: nothing trained on it.
    assert first["after"][1] > 4.0
