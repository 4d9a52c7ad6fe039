"""Hold vLLM's log-probs against transformers in float32: its two model runners, and routers in float32 or not.

    python tools/compare_samplers.py runners     one line of JSON; exit 1 if v2 is further away than v1
    python tools/compare_samplers.py gates       the same of float32 routers beside the model's own type

The model is the one of `recipes/tiny_moe.yaml` with random weights, in bfloat16. Without a GPU vLLM has one runner, and
`runners` says so and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.cluster.gpu_environment import RUNNER
from gspo_megatron.models import load_recipe

VARIANTS = {"runners": ("v1", "v2"), "gates": ("plain", "float32")}
SEQUENCES, TOKENS = 8, 64
MORE = 1.5
"""How much further from the reference the newer variant may be: noise of bfloat16 in another order."""


def main() -> int:
    """Print one line of JSON. Exit 1 if the second variant is further from the reference than the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*VARIANTS, "one"))
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.what == "one":
        print(json.dumps(score_with_vllm(chosen.model, chosen.variant)))
        return 0
    if chosen.what == "runners" and not torch.cuda.is_available():
        print("vLLM's second runner needs a GPU", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as place:
        reference = write_model(Path(place))
        found = {name: distance(reference, run_variant(Path(place), name)) for name in VARIANTS[chosen.what]}
    first, second = (found[name]["mean"] for name in VARIANTS[chosen.what])
    print(json.dumps({"measured": chosen.what, "distance_to_float32": found}))
    return int(not second <= MORE * first + 1e-4)


def sequences(vocabulary: int) -> list[list[int]]:
    """Fixed token ids."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (SEQUENCES, TOKENS), generator=draw).tolist()


def write_model(place: Path) -> torch.Tensor:
    """Write a model with random weights there; returns [sequences, tokens - 1] log-probs of it in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = load_recipe(Path("recipes/tiny_moe.yaml")).arch
    keys: dict[str, Any] = arch.to_hugging_face("bfloat16") | {"initializer_range": 0.12}
    config = AutoConfig.for_model(**keys)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(place)
    ids = torch.tensor(sequences(arch.vocab_size))
    with torch.no_grad():
        logits = model.float()(ids).logits.log_softmax(-1)
    return logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def run_variant(place: Path, variant: str) -> torch.Tensor:
    """vLLM's log-probs of the same tokens, in a process of its own."""
    command = [sys.executable, __file__, "one", "--variant", variant, "--model", str(place)]
    # The engine runs in this one process, so that a changed class is the one that it builds.
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    settings |= {RUNNER: str(int(variant == "v2"))} if variant in VARIANTS["runners"] else {}
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant}: {done.stderr[-2000:]}")
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def score_with_vllm(model: Path, variant: str) -> list[list[float]]:
    """Log-probs of every token but the first of each sequence."""
    if variant == "float32":
        import gspo_megatron.inference.router_gate  # noqa: F401  replaces vLLM's gates
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(model), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=2 * TOKENS, enforce_eager=True,
        gpu_memory_utilization=0.3, logprobs_mode="processed_logprobs", hf_overrides={"head_dtype": "float32"},
        enable_prefix_caching=False,
    )  # fmt: skip
    ids = sequences(load_recipe(Path("recipes/tiny_moe.yaml")).arch.vocab_size)
    settings = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts: Any = [{"prompt_token_ids": one} for one in ids]
    found = []
    for output, asked in zip(engine.generate(prompts, settings, use_tqdm=False), ids, strict=True):
        given = output.prompt_logprobs or []
        found.append([float(at[token].logprob) for at, token in zip(given[1:], asked[1:], strict=True) if at])
    return found


def distance(reference: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    """Mean and largest difference, nats."""
    apart = (reference - found).abs()
    return {"mean": round(float(apart.mean()), 6), "largest": round(float(apart.max()), 6)}


if __name__ == "__main__":
    sys.exit(main())
