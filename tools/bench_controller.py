"""Processor time of the controller while it takes in long responses, whatever samples them.

    python tools/bench_controller.py [--json] [--tokens 100000] [--rate 200000]

512 responses at a time on 4 servers that compute nothing (`paced_server.py`) and send what vLLM would, at 200,000
tokens a second. The controller is the product's: group buffer, scheduler, HTTP client, tokenizer, scoring processes,
sample store with its index and checksums. Reported are the processor seconds of the controller's process, its threads
included, per million tokens: 1.0 is 10 % of a core at 100,000 tokens a second. Exits 1 above that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gspo_megatron.controller.controller import Controller
from gspo_megatron.controller.scoring import make_scoring_pool
from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.controller.servers import ServerSet
from gspo_megatron.data.store import SampleStore
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.models import load_recipe
from gspo_megatron.transport.messages import RolloutRequest
from gspo_megatron.types import Problem, Prompt

ROOT = Path(__file__).resolve().parents[1]
SERVERS, ANSWERS, PROMPT_TOKENS = 4, 8, 256
MOST_CPU = 1.0
"""Seconds a million tokens."""


class FixedPrompts:
    """Prompts that cost nothing to make."""

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self._drawn = 0

    def next(self, count: int) -> list[Prompt]:
        """The next prompts."""
        first, self._drawn = self._drawn, self._drawn + count
        return [
            Prompt(index, Problem(str(index), "What?", {"answer": "1"}, "1"), (5,) * PROMPT_TOKENS)
            for index in range(first, first + count)
        ]

    def held_out(self, count: int | None) -> list[Prompt]:
        """None."""
        return []

    def state(self) -> dict[str, Any]:
        """Nothing that a checkpoint needs."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing."""


@contextmanager
def paced_servers(key: str, rate: float, responses: int, interval: int, vocab: int) -> Iterator[list[str]]:
    """Addresses of servers that share the pace."""
    with ExitStack() as stack:
        urls = []
        for _ in range(SERVERS):
            command = [
                sys.executable, str(ROOT / "tools" / "paced_server.py"), f"--key={key}", f"--rate={rate / SERVERS}",
                f"--answers={responses // SERVERS}", f"--interval={interval}", f"--vocab={vocab}",
            ]  # fmt: skip
            server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(server.kill)
            assert server.stdout is not None
            urls.append(f"http://127.0.0.1:{server.stdout.readline().strip()}")
        yield urls


async def measure(responses: int, tokens: int, rate: float, interval: int, run_dir: Path) -> dict[str, Any]:
    """One rollout batch."""
    changes = [
        f"batch.prompts={responses // ANSWERS}", f"batch.answers={ANSWERS}", f"rollout.max_answer_tokens={tokens}",
        f"rollout.max_prompt_tokens={PROMPT_TOKENS}", "reward.name=recipes/rewards/closeness.py:score",
        "model.architecture.max_position_embeddings=131072",
    ]  # fmt: skip
    recipe = load_recipe(ROOT / "recipes" / "tiny_agent.yaml", [*changes, "agent=null", "cold_start=null"])
    tokenizer, key = load_tokenizer(recipe.tokenizer, recipe.model.path), secrets.token_hex(8)
    vocab, context = tokenizer.vocab_size, recipe.rollout.max_sequence_tokens
    with paced_servers(key, rate, responses, interval, vocab) as urls:
        clients = [ServerClient(url, key, recipe.arch.vocab_size, context, responses // SERVERS) for url in urls]
        pool = make_scoring_pool(recipe, 1)
        controller = Controller(
            recipe, ServerSet(clients), FixedPrompts(), tokenizer, pool, SampleStore(run_dir / "samples"), "127.0.0.1",
            overlaps=True, sleeps=False, loaded=True,
        )  # fmt: skip
        await controller.start()
        try:
            scorers = psutil.Process().children()
            began, before, scoring = time.monotonic(), processor_seconds(), children_seconds(scorers)
            batch = await controller.rollout(RolloutRequest(step=0))
            seconds, spent = time.monotonic() - began, processor_seconds() - before
            scoring = children_seconds(scorers) - scoring
        finally:
            await controller.close()
    return {
        "responses": responses,
        "tokens_a_response": tokens,
        "stream_interval": interval,
        "tokens_per_second": round(batch.tokens / seconds),
        "cpu_seconds_per_million_tokens": round(spent / batch.tokens * 1e6, 3),
        "core_share_at_100k_tokens_per_second": round(spent / batch.tokens * 1e5, 4),
        "scoring_processes_cpu_seconds_per_million_tokens": round(scoring / batch.tokens * 1e6, 3),
        "seconds": round(seconds, 1),
    }


def processor_seconds() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def children_seconds(processes: list[psutil.Process]) -> float:
    """Of other processes."""
    return sum(sum(process.cpu_times()[:2]) for process in processes if "paced_server" not in str(process.cmdline()))


def main() -> int:
    """Measure and print; 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=100_000, help="of each response")
    parser.add_argument("--rate", type=float, default=200_000, help="tokens a second of all servers")
    parser.add_argument("--interval", type=int, default=64, help="rollout.stream_interval")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = measure(chosen.responses, chosen.tokens, chosen.rate, chosen.interval, Path(directory))
        found = asyncio.run(work)
    print(json.dumps(found) if chosen.json else "\n".join(f"{name}: {value}" for name, value in found.items()))
    return int(found["cpu_seconds_per_million_tokens"] > MOST_CPU)


if __name__ == "__main__":
    sys.exit(main())
