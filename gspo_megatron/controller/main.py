"""Role entry of the controller.

python -m gspo_megatron.controller.main --run-dir DIR --host HOST --port PORT --servers URL,URL
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, cast

from aiohttp import web

from gspo_megatron.cluster.child_processes import die_with_parent
from gspo_megatron.cluster.hosts import LOADED
from gspo_megatron.cluster.machines import machine_of, takes_turns
from gspo_megatron.cluster.watchdog import follow
from gspo_megatron.config.hooks import load_hook
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.config.schema import Recipe
from gspo_megatron.controller.agent_pool import AgentPool
from gspo_megatron.controller.agent_scheduler import Agents
from gspo_megatron.controller.api import Service
from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.environment_pool import make_environment_pool
from gspo_megatron.controller.multi_turn import make_thinking
from gspo_megatron.controller.scheduler import with_reserve
from gspo_megatron.controller.scoring import make_scoring_pool
from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.controller.servers import Refused, ServerSet
from gspo_megatron.controller.teacher_client import Teacher
from gspo_megatron.data.store import SampleStore
from gspo_megatron.models import load_resolved
from gspo_megatron.rewards.gold_check import gold_findings
from gspo_megatron.run_dir import RunDir
from gspo_megatron.transport.auth import read_key
from gspo_megatron.transport.identity import identity_of

if TYPE_CHECKING:
    from gspo_megatron.controller.agent_session import AgentTokenizer
    from gspo_megatron.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

MAX_SCORING_PROCESSES = 8


def build(recipe: Recipe, run_dir: Path, host: str, urls: list[str], key: str, loaded: bool = False) -> Controller:
    """A controller of real parts. Needs a running event loop."""
    from gspo_megatron.data.stream import PromptStream
    from gspo_megatron.data.tokenizers import load_tokenizer

    rollout = recipe.rollout
    context = rollout.max_sequence_tokens
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.model.path)
    vocab = recipe.arch.vocab_size
    # Before the connections: a broken prompt file or reward ends the controller with its sentence as the last line.
    stream = PromptStream(recipe, tokenizer)
    check_golds(recipe)
    processes = min(MAX_SCORING_PROCESSES, os.cpu_count() or 1)
    scoring = make_scoring_pool(recipe, processes)
    servers = [ServerClient(url, key, vocab, context, with_reserve(rollout.max_concurrency)) for url in urls]
    return Controller(
        recipe,
        ServerSet(servers, identity_of(recipe, run_dir)),
        stream,
        tokenizer,
        scoring,
        SampleStore(RunDir(run_dir).samples),
        host,
        overlaps=not machine_of(recipe).colocated,
        sleeps=takes_turns(recipe) and not loaded,
        thinking=make_thinking(rollout.thinking, tokenizer),
        environment=make_environment_pool(recipe, tokenizer, processes),
        loaded=loaded,
        agents=make_agents(recipe, tokenizer, processes),
        # An evaluation trains on nothing.
        teacher=None if recipe.teacher is None or loaded else Teacher(recipe, tokenizer),
    )


def check_golds(recipe: Recipe) -> None:
    """Say which gold answers no response can match. Raises RecipeError where that is all of them."""
    from gspo_megatron.data.problems import every_problem

    found = gold_findings(recipe, every_problem(recipe))
    for finding in found:
        log.warning("%s", finding)
    if errors := [finding for finding in found if finding.severity == "error"]:
        raise RecipeError(errors)


def make_agents(recipe: Recipe, tokenizer: Tokenizer, workers: int) -> Agents | None:
    """The agent of a recipe, if it has one. Raises RecipeError for a program that is none."""
    if recipe.agent is None:
        return None
    load_hook("agent", recipe.agent.program)
    # The schema lets an agent have no other.
    return Agents(AgentPool(recipe.agent, workers), cast("AgentTokenizer", tokenizer))


def main() -> None:
    """Serve until the parent ends or SIGTERM comes."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m gspo_megatron.controller.main", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="holds recipe.resolved.yaml; samples go there")
    parser.add_argument("--host", required=True, help="this controller's address as trainer and servers reach it")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--servers", required=True, help="addresses of the vLLM servers, comma-separated")
    parser.add_argument(LOADED, action="store_true", help="the servers have loaded weights; no update will come")
    arguments = parser.parse_args()
    # Every answer in flight holds a connection; the usual soft limit is 1024.
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    key = read_key()
    follow(arguments.run_dir, "controller")

    async def application() -> web.Application:
        recipe = load_resolved(RunDir(arguments.run_dir).recipe)
        controller = build(
            recipe, arguments.run_dir, arguments.host, arguments.servers.split(","), key, arguments.loaded
        )
        try:
            await controller.open_teacher()
        except Refused:
            await controller.servers.close()  # an open connection would be the last line of the log
            raise
        return Service(controller, key).application()

    try:
        web.run_app(
            application(), host=arguments.host, port=arguments.port, access_log=None, print=None, shutdown_timeout=1.0
        )
    except (RecipeError, Refused) as error:
        raise SystemExit(f"controller: {error}") from None
    except OSError as error:
        raise SystemExit(f"controller: cannot listen on {arguments.host}:{arguments.port}: {error.strerror}") from None


if __name__ == "__main__":
    main()
