"""The steps of `make first-contact`: a command each, the one without a GPU, and what to do when it fails."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

LIMIT = 480
"""Most seconds of a step."""
REAL_MODEL = Path("models/Qwen3-0.6B")
"""A downloaded model, where there is one."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step."""

    name: str
    about: str
    """What it shows."""
    command: tuple[str, ...]
    """On a GPU."""
    remedy: str
    """What to do when it fails."""
    gpus: int = 1
    """Least number of GPUs of this machine."""
    nodes: int = 1
    """Least number of nodes of the SLURM allocation that it is started in."""
    dry: tuple[str, ...] | None = None
    """The same function at a tiny size, without a GPU; None = it cannot run there."""
    needs: Path | None = None
    """A directory that must be there."""
    why_not: str = "it runs on a GPU only"
    """Why it is not run where it is not run."""


def _tool(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, f"tools/{name}.py", *arguments)


def _tests(*names: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *names)


def _train(recipe: str, *overrides: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "gspo_megatron.cli", "train", recipe, *overrides)


SMALL_RUN = (
    "model.dtype=bfloat16", "weight_update.canary_bound=0.5", "rollout.gpu_memory_fraction=0.6", "cold_start.steps=3",
    "cold_start.batch_size=8", "batch.prompts=8", "batch.answers=4", "trainer.max_steps=2", "data.held_out=32",
    "evaluation.problems=16",
)  # fmt: skip
FP8 = ("rollout.weight_dtype=fp8", "weight_update.canary_bound=3", "model.architecture.num_key_value_heads=4")
"""With heads that are whole blocks."""
POLICY = "tests/gpu/test_policy_gpu.py"
SLICE_DRY = _tool("measure_gpu", "step", "--layers", "1", "--tokens", "1024")

STEPS = (
    Step(
        "versions", "GPU, driver, torch, Transformer Engine and vLLM are those of requirements/",
        _tool("first_contact", "--versions"), "run `make clean setup`; a driver below 580 does not start CUDA 13",
        dry=_tool("first_contact", "--versions"),
    ),
    Step(
        "compiler", "the compiler among the packages compiles a kernel with CUB, as FlashInfer does at run time",
        _tool("first_contact", "--compiler"),
        "run `make clean setup`; nvidia-cuda-nvcc, -crt, nvidia-nvvm and -cccl must be of torch's CUDA",
        why_not="the packages of the CPU stack have no CUDA compiler",
    ),
    Step(
        "objective", "the objective on the device: numbers of the CPU, no synchronisation",
        _tests("tests/gpu/test_objective_gpu.py"), "see the failing test; the objective is plain torch",
        dry=_tests("tests/unit/objective/test_invariance.py", "-k", "token_advantages"),
    ),
    Step(
        "parity", "layers of plain torch on the device, in float32, beside transformers",
        _tests(POLICY, "-k", "oracle_in_float32"), "something of torch computes in TF32: see NVIDIA_TF32_OVERRIDE",
        why_not="on a CPU it is `make parity`, which takes a quarter of an hour",
    ),
    Step(
        "bounds", "Transformer Engine in bfloat16 within its bound; scoring and training agree to the bit",
        _tests(POLICY, "-k", "bfloat16 or bit_for_bit"),
        "train with trainer.megatron.attention_backend=unfused to see whether the attention is it, then with "
        "trainer.megatron.gradient_accumulation_fusion=false",
    ),
    Step(
        "offload", "weights, states and layer inputs go to the host and come back unchanged",
        _tests(POLICY, "-k", "host_memory or offloading"), "see PYTORCH_ALLOC_CONF in launch/README.md",
    ),
    Step(
        "slice-32k", "two layers of 30B at 32,768 tokens: peak memory beside the plan's, synchronisations, kernels",
        _tool("measure_gpu", "step", "--layers", "2", "--tokens", "32768"),
        "compare train_peak_bytes with plan; correct plan/estimate/calibration.py", dry=SLICE_DRY,
    ),
    Step(
        "slice-100k", "the same at 102,400 tokens",
        _tool("measure_gpu", "step", "--layers", "2", "--tokens", "102400"),
        "lower trainer.micro_batch_tokens or raise trainer.context_parallel, and correct plan/estimate/calibration.py",
        why_not="without a GPU the size shrinks to that of slice-32k",
    ),
    Step(
        "rates", "products, attention and copies beside what the planner assumes",
        _tool("measure_gpu", "rates"), "correct plan/estimate/calibration.py",
        why_not="rates of a CPU say nothing of a GPU",
    ),
    Step(
        "head", "FLOPs, memory and error of the log-prob head beside one that holds the logits",
        _tool("bench_head", "--json"), "lower trainer.head_chunk_tokens",
        why_not="minutes on a CPU: `python tools/bench_head.py`",
    ),
    Step(
        "sleep-and-reload", "a server sleeps, wakes up, and takes weights over CUDA IPC",
        _tests("tests/gpu/test_rollout_gpu.py", "-k", "gives_its_memory"),
        "give the servers nodes of their own (placement.rollout_nodes), where weights go over NCCL",
    ),
    Step(
        "runners", "log-probs of vLLM's second model runner beside those of the first",
        _tool("compare_samplers", "runners"), "set rollout.model_runner=v1",
        why_not="vLLM's CPU build has one runner",
    ),
    Step(
        "gates", "log-probs with float32 routers beside those without",
        _tool("compare_samplers", "gates"), "look at inference/router_gate.py: vLLM may build another gate",
        why_not="a minute on a CPU: `python tools/compare_samplers.py gates`",
    ),
    Step(
        "shared-gpu", "a whole run with trainer and server on one GPU",
        _tests("tests/gpu/test_rollout_gpu.py", "-k", "one_shared_gpu"), "read the logs that the message names",
        why_not="on a CPU it is `make train`, which takes minutes",
    ),
    Step(
        "routes", "a whole run that replays the experts that vLLM chose",
        _train("recipes/tiny_moe.yaml", *SMALL_RUN, "objective.replay=sampler",
               "run.directory=runs/first_contact_routes"),
        "set objective.replay=trainer; vLLM's log names a kernel that records no routes",
        why_not="on a CPU it is tests/rollout/test_routes_job.py",
    ),
    Step(
        "one-node", "a whole run over every GPU of the node: data-parallel trainer, a server on each GPU",
        _train("recipes/tiny_moe.yaml", *SMALL_RUN, "rollout.servers=2", "run.directory=runs/first_contact_node"),
        "set NCCL_DEBUG=INFO; then gspo train with trainer.ranks=1", gpus=2,
    ),
    Step(
        "kill-9", "kill -9 of a server during an update over NCCL: the trainer and the other server go on",
        _tests("tests/gpu/test_rollout_gpu.py", "-k", "killed_during_an_update"),
        "look at transport/weights/nccl_group.py: torch may start NCCL's watchdog in another way now; until then give "
        "the servers the trainer's GPUs (placement.rollout_nodes=0), where weights go over CUDA IPC", gpus=3,
        why_not="over gloo it is tests/rollout/test_layout_pairs.py, minutes with its servers",
    ),
    Step(
        "fp8", "a whole run whose server holds matrices in fp8, quantised by the trainer",
        _train("recipes/tiny_moe.yaml", *SMALL_RUN, *FP8, "run.directory=runs/first_contact_fp8"),
        "compare canary_mean with 0.2, what a CPU gives; remove rollout.weight_dtype",
        why_not="on a CPU it is tests/rollout/test_fp8_servers.py",
    ),
    Step(
        "two-nodes", "a job over two nodes with servers on one of them: weights go over NCCL",
        ("launch/gspo_moe.sh", "recipes/tiny_moe.yaml", *SMALL_RUN, "placement.nodes=2", "placement.rollout_nodes=1",
         "run.directory=runs/first_contact_two_nodes"),
        "read launch/SITES.md; the preflight names node and cure", nodes=2,
    ),
    Step(
        "real-model", "two steps of a downloaded Qwen3-0.6B",
        _train("recipes/qwen3_0p6b_gspo.yaml", f"model.path={REAL_MODEL}", "trainer.max_steps=2", "batch.prompts=8",
               "batch.answers=4", "rollout.max_answer_tokens=1024", "placement.nodes=1",
               "run.directory=runs/first_contact_real"),
        "compare canary_mean with the bound of the recipe, and the responses with `gspo answers`", needs=REAL_MODEL,
    ),
)  # fmt: skip
