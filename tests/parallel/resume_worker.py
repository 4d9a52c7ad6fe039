"""Runs a job of a few ranks again and again until it is done, and interrupts it at given stages.

The ranks are forked from one process that has imported everything, so an attempt starts in a second.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gspo_megatron.policy  # noqa: F401  the device layer must be in before megatron
from gspo_megatron.cluster import watchdog
from gspo_megatron.cluster.exit_codes import FAILED, STOPPED
from gspo_megatron.cluster.free_ports import free_ports
from gspo_megatron.cluster.watchdog import Pulse
from gspo_megatron.models import load_recipe
from gspo_megatron.objective import Sums
from gspo_megatron.policy import mesh
from gspo_megatron.policy.policy import Policy
from gspo_megatron.policy.snapshot import MOMENTS, random_states, stepped
from gspo_megatron.run_dir import RunDir
from gspo_megatron.run_log import RunLog
from gspo_megatron.trainer import loop
from gspo_megatron.trainer.batches import MiniBatch, TrainingMicroBatch
from gspo_megatron.trainer.step import Trainer
from tests.parallel.recorded import NoServers, RecordedController


def main() -> None:
    """Run every job of cases.json; what became of it goes to NAME/history.json."""
    directory = Path(sys.argv[1])
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        history = run_until_done(directory / name, case)
        (directory / name / "history.json").write_text(json.dumps(history))


def run_until_done(run_dir: Path, case: dict) -> list[dict]:
    """Attempts in order: what was to interrupt each, whether it did, how its ranks ended."""
    run_dir.mkdir()
    if "newest_attempt" in case:
        RunDir(run_dir).attempt.write_text(f"{case['newest_attempt']} 4242\n")
    interruptions = list(case["interruptions"])
    history = []
    while not RunDir(run_dir).done.exists():
        expected = interruptions.pop(0) if interruptions else None
        if case.get("fails") and history:
            return history
        history.append(attempt(run_dir, case, expected, len(history)))
        log = run_dir / f"rank-0-{len(history) - 1}.log"
        assert expected or case.get("fails") or set(history[-1]["codes"]) == {0}, log.read_text()[-3000:]
    return history


def attempt(run_dir: Path, case: dict, interruption: dict | None, number: int) -> dict:
    """One attempt from its start to the end of its ranks."""
    port = free_ports(1)[0]
    fork = multiprocessing.get_context("fork")
    size = case["ranks"]
    ranks = [
        fork.Process(target=run_rank, args=(run_dir, case, rank, size, port, number, interruption))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode not in (None, 0, STOPPED) for process in ranks):
            # As the roles of a run do: one that failed takes the others with it.
            for process in ranks:
                process.kill()
        time.sleep(0.01)
    codes = [process.exitcode for process in ranks]
    return {"interruption": interruption, "struck": struck(run_dir, number).exists(), "codes": codes}


def struck(run_dir: Path, number: int) -> Path:
    """File that says that the interruption of an attempt has come."""
    return run_dir / f"struck-{number}"


def interrupt_at(pulse: Pulse, interruption: dict, rank: int, mark: Path) -> None:
    """Have this rank send itself a signal on entering a stage: the event is a place in the run and not a time.

    Args:
        pulse: receives every stage.
        interruption: `kind` of signal, `rank` (USR1 reaches all), and where: `stage` stages behind the start of
            the rollout of the `step`-th step of the attempt.
        rank: this rank.
        mark: file to leave before.
    """
    if interruption["kind"] != "USR1" and interruption["rank"] != rank:
        return
    enter, steps, stages = pulse.enter, 0, -1

    def enter_or_stop(stage: str) -> None:
        nonlocal steps, stages
        enter(stage)
        steps += stage == "rollout"
        stages += steps >= interruption["step"]
        if stages == interruption["stage"]:
            mark.touch()
            os.kill(os.getpid(), getattr(signal, f"SIG{interruption['kind']}"))

    pulse.enter = enter_or_stop


def run_rank(
    run_dir: Path, case: dict, rank: int, size: int, port: int, number: int, interruption: dict | None
) -> None:
    """One rank of one attempt; never returns."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | case.get("environment", {}))
    if case.get("full_disk") == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    out = os.open(run_dir / f"rank-{rank}-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = FAILED
    try:
        code = train(run_dir, case, interruption, struck(run_dir, number))
    except BaseException:  # leaving without destructors would swallow it
        traceback.print_exc()
    loop.end(code)


def train(run_dir: Path, case: dict, interruption: dict | None, mark: Path) -> int:
    torch.set_num_threads(1)
    recipe = load_recipe(Path("recipes/tiny_moe.yaml"), case["overrides"])
    device = mesh.start_world()
    first = dist.get_rank() == 0
    log = RunLog(run_dir, owns_terminal=first)
    if interruption is not None:
        interrupt_at(log.pulse, interruption, dist.get_rank(), mark)
    policy = Policy(recipe, device)
    trainer = Trainer(recipe, run_dir, policy, None, log)
    controller = RecordedController(trainer.store, recipe.batch.prompts, recipe.batch.answers) if first else None
    trainer.controller, trainer.sender = controller, NoServers()  # type: ignore[assignment]
    if "watchdog" in case:
        log.pulse.limit = lambda: case["watchdog"] if mark.exists() else watchdog.FIRST
        watchdog.Watchdog(run_dir, dist.get_rank(), dist.get_world_size(), log.pulse, interval=0.1).start()
    if first:
        trainer.update = poisoned(trainer, case.get("poison", []))  # type: ignore[method-assign]
    with log:
        if not loop.train(trainer):
            return STOPPED
        (run_dir / f"final-{dist.get_rank()}.json").write_text(json.dumps(describe(trainer)))
        dist.barrier()
        if first:
            RunDir(run_dir).done.touch()
    dist.barrier()
    return 0


def poisoned(trainer: Trainer, updates: list[int]) -> Callable[[MiniBatch[TrainingMicroBatch]], Sums | None]:
    """`Trainer.update` with weights of this one rank that are no numbers during the given updates."""
    update, weight = trainer.update, next(trainer.policy.chunks[0].parameters())

    def with_poison(minibatch: MiniBatch[TrainingMicroBatch]) -> Sums | None:
        if trainer.updates + 1 not in updates:
            return update(minibatch)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        try:
            return update(minibatch)
        finally:
            with torch.no_grad():
                weight.copy_(kept)

    return with_poison


def describe(trainer: Trainer) -> dict:
    """Everything that the next step would depend on, hashed."""
    found: dict[str, Any] = {"version": trainer.version, "updates": trainer.updates, "skipped": trainer.skipped}
    for run in stepped(trainer.policy):
        state = run.optimizer.state[run.main]
        for kind, tensor in {"value": run.main, "step": state["step"], **{k: state[k] for k in MOMENTS}}.items():
            found[f"{kind}/{run.entry.name}"] = digest(trainer.policy.read(tensor.detach()))
    found |= {f"rng/{name}": digest(state) for name, state in random_states().items()}
    return found | {"stream": getattr(trainer.controller, "position", None)}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main()
