"""Role entry of one vLLM server: `python -m gspo_megatron.inference.server --run-dir DIR --index K --host H --port P`.

The weights come with the first live update: the server starts from DIR/model/config.json and random values. With
`--loaded` it starts from the safetensors files beside that config.json, and no update comes.

A server that spans N nodes is N such processes, with `--part 0..N-1 --of N --meet ADDRESS:PORT`: the first answers
requests and schedules, the others hold their share of its workers. Whoever starts them ends all when one ends.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gspo_megatron.cluster.child_processes import bind_forked_children, die_with_parent
from gspo_megatron.cluster.gpu_environment import compiler_variables, server_variables
from gspo_megatron.cluster.gpu_parts import cuda_fault
from gspo_megatron.cluster.hosts import LOADED
from gspo_megatron.cluster.machines import machine_of, takes_turns
from gspo_megatron.cluster.watchdog import follow
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.schema import Recipe
from gspo_megatron.inference import vllm_plugin, weight_guard
from gspo_megatron.models import load_resolved
from gspo_megatron.models.vllm_engine import engine_arguments, to_options
from gspo_megatron.run_dir import RunDir
from gspo_megatron.transport import identity
from gspo_megatron.transport.auth import read_key

SHUTDOWN_SECONDS = 5
"""For the requests that are still open once the engine is dead."""


def main() -> None:
    """Serve until the parent ends or SIGTERM comes; exit 1 with one sentence if the server cannot start."""
    die_with_parent()
    arguments = _read_arguments()
    read_key()
    try:
        recipe = load_resolved(RunDir(arguments.run_dir).recipe)
    except RecipeError as error:
        raise SystemExit(f"rollout server {arguments.index}: {error}") from None
    model, config = RunDir(arguments.run_dir).model, RunDir(arguments.run_dir).model_config
    if not config.is_file():
        raise SystemExit(f"rollout server {arguments.index}: {config} does not exist; write the model there first")
    if arguments.part == 0:
        refuse_used_port(arguments.host, arguments.port)
    os.environ[identity.RUN_VARIABLE] = identity.read_run_id(arguments.run_dir)
    os.environ[identity.TOKENIZER_VARIABLE] = identity.hash_vocabulary(recipe)
    follow(arguments.run_dir, f"rollout-{arguments.index}" + (f".{arguments.part}" if arguments.part else ""))
    has_gpu = prepare_environment(arguments.index, recipe)
    if arguments.loaded:
        os.environ[weight_guard.LOADED_VARIABLE] = "1"
    whole = vllm_arguments(recipe, model, arguments.host, arguments.port, has_gpu, arguments.loaded)
    serve([*whole, *part_arguments(arguments.part, arguments.of, arguments.meet)], arguments.index)


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gspo_megatron.inference.server", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="holds recipe.resolved.yaml and model/")
    parser.add_argument("--index", type=int, required=True, help="which server of the run this is, from 0")
    parser.add_argument("--host", required=True, help="address to listen on; one of the job's own")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--part", type=int, default=0, help="which node's part of the server this is, from 0")
    parser.add_argument("--of", type=int, default=1, help="nodes that the server spans")
    parser.add_argument("--meet", default="", help="ADDRESS:PORT on the first node, where the parts find each other")
    parser.add_argument(LOADED, action="store_true", help="serve the weights in model/: no update will come")
    return parser.parse_args()


def refuse_used_port(host: str, port: int) -> None:
    """Exit with a sentence, before the slow imports, if nothing can listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise SystemExit(f"cannot listen on {host}:{port}: {reason}; choose a free port of this host") from None


def prepare_environment(index: int, recipe: Recipe) -> bool:
    """What vLLM and its libraries read from the environment; must run before vllm is imported.

    Returns:
        Whether there is a GPU; exits with a sentence where there should be one.
    """
    os.environ[vllm_plugin.SERVER_VARIABLE] = str(index)
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Otherwise the question itself wakes the driver up, and a forked engine could not use it any more.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    starts = torch.cuda.is_available()
    if not machine_of(recipe).is_cpu and (fault := cuda_fault(starts, torch.__version__, torch.version.cuda)):
        raise SystemExit(f"rollout server {index}: {fault}")
    if starts:
        os.environ.update(server_variables(recipe) | compiler_variables())
        return True
    # Whole GiB only, and it would override the byte-exact argument.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    # By default every server pins its workers to core 0.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Eager mode still compiles a few small functions at their first call: half a minute, for nothing at this size.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    return False


def vllm_arguments(recipe: Recipe, model: Path, host: str, port: int, has_gpu: bool, loaded: bool = False) -> list[str]:
    """vLLM's command line for this recipe.

    Args:
        loaded: whether the weights are those in `model`; without, they are random until the first update.
    """
    arguments = engine_arguments(recipe, model, has_gpu, takes_turns(recipe), loaded)
    return [
        f"--host={host}",
        f"--port={port}",
        *to_options(arguments),
        "--enable-scale-out",
        "--disable-uvicorn-access-log",
        # Development mode would log a growing stack for every request that a dead engine leaves: 300 MB for 500.
        "--no-log-error-stack",
        # The last is asked first.
        "--middleware=gspo_megatron.inference.token_stream.TokenStream",
        "--middleware=gspo_megatron.inference.weight_guard.WeightGuard",
        "--middleware=gspo_megatron.transport.auth.KeyGuard",
    ]


def part_arguments(part: int, nodes: int, meeting: str) -> list[str]:
    """What vLLM's command line needs in addition where a server spans nodes; the rest is equal for every part."""
    if nodes == 1:
        return []
    address, _, port = meeting.rpartition(":")
    places = [f"--nnodes={nodes}", f"--node-rank={part}", f"--master-addr={address}", f"--master-port={port}"]
    # By default vLLM would ask for Ray where it does not see enough GPUs on this node.
    return [*places, "--distributed-executor-backend=mp", *(["--headless"] if part else [])]


def fork_workers() -> None:
    """Let vLLM's CPU platform fork its processes instead of importing everything again in each: 17 s instead of 45."""
    from vllm.config import VllmConfig
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type[CpuPlatform], vllm_config: VllmConfig) -> None:
        original(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        # vLLM puts even a lone worker in a process of its own, to set its threads, which are set here already; the
        # engine's then spins while the worker computes.
        if vllm_config.parallel_config.world_size == 1:
            vllm_config.parallel_config.distributed_executor_backend = "uni"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[assignment]


def make_stage_inputs() -> None:
    """Give later pipeline stages their input buffers: vllm 0.32 makes them in a warm-up that eager CPU servers skip."""
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.sequence import IntermediateTensors
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.load_model

    def load_model(self: CPUModelRunner, load_dummy_weights: bool = False) -> None:
        original(self, load_dummy_weights)
        if not get_pp_group().is_first_rank:
            make: Callable[..., IntermediateTensors] = self.model.make_empty_intermediate_tensors  # type: ignore[assignment]
            self.intermediate_tensors = make(self.max_num_tokens, self.model_config.dtype, self.device)

    CPUModelRunner.load_model = load_model


def end_in_time() -> None:
    """Bound vLLM's shutdown after its engine has died: a request that the engine was to answer would keep it open."""
    from uvicorn import Config
    from vllm.entrypoints.launchers.launcher import NoSignalServer

    original = NoSignalServer.__init__

    def init(self: NoSignalServer, config: Config, *others: Any, **named: Any) -> None:
        config.timeout_graceful_shutdown = SHUTDOWN_SECONDS
        original(self, config, *others, **named)

    NoSignalServer.__init__ = init


def serve(arguments: list[str], index: int) -> None:
    """Run vLLM's own API server in this process, or the workers of a part that answers no requests."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if current_platform.is_cpu():
        from gspo_megatron.inference.route_recorder import record_on_cpu

        fork_workers()
        make_stage_inputs()
        record_on_cpu()
    end_in_time()
    bind_forked_children()
    vllm_plugin.register()
    parsed: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)  # type: ignore[assignment]
    validate_parsed_serve_args(parsed)
    try:
        if parsed.headless:
            from vllm.entrypoints.cli.serve import run_headless

            parsed.api_server_count = 0
            # It returns when a worker has died, without a word.
            run_headless(parsed)
            raise RuntimeError("a worker of this node's part died")
        uvloop.run(run_server(parsed))
    except KeyboardInterrupt:
        sys.exit(0)
    # Whatever ends the engine ends this role; its own words are the reason.
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(str(error).split())
        print(f"rollout server {index} died: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
