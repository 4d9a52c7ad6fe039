"""A model directory as the trainer writes it, and a vLLM server over it that knows nothing of this package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gspo_megatron.cluster.free_ports import free_ports
from gspo_megatron.commands.train_run import prepare_run
from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.model_directory import write_tokenizer
from gspo_megatron.models.hf_table import Piece, hf_shapes
from gspo_megatron.policy.weights import random_pieces, save_hf
from gspo_megatron.run_dir import RunDir
from tests.rollout.conftest import answers
from tests.waiting import HANG, wait_until

NAME = "mine"
"""Of the model, as the server knows it."""
ARGUMENTS = (
    "--dtype=float32", "--max-model-len=64", "--enforce-eager", "--kv-cache-memory-bytes=67108864", "--max-num-seqs=4",
    "--no-enable-chunked-prefill", "--disable-uvicorn-access-log",
)  # fmt: skip


def write_random_model(recipe: Recipe, run: Path, seed: int = 1) -> Path:
    """The model of a recipe with random weights, where a run leaves its last ones."""
    prepare_run(recipe.model_copy(update={"run": recipe.run.model_copy(update={"directory": run})}))
    read = random_pieces(recipe.arch, seed)
    tensors = (
        (name, read(Piece(name, (0, shape[0]), (0, shape[1]) if len(shape) == 2 else None, (0, shape[0]))))
        for name, shape in hf_shapes(recipe.arch).items()
    )
    config = recipe.arch.to_hugging_face(recipe.model.dtype)
    final = RunDir(run).final
    save_hf(tensors, config, final, complete=lambda place: write_tokenizer(recipe, RunDir(run).tokenizer, place))
    return final


@contextmanager
def plain_server(model: Path, log: Path) -> Iterator[str]:
    """What `vllm serve MODEL` starts, on loopback; its address once it answers."""
    (port,) = free_ports(1)
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1", "VLLM_HOST_IP": "127.0.0.1",
    }  # fmt: skip
    where = ["--model", str(model), "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *where, *ARGUMENTS]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    def assert_lives() -> None:
        assert process.poll() is None, log.read_text()[-3000:]

    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}"), "the server", assert_lives)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(HANG)
