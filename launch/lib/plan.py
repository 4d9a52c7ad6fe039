"""Plans a job for `launch/job.py`, which runs this in the trainer's environment: `python -m launch.lib.plan PHASE ...`.

draw    says what would run where, and changes nothing
open    makes the run directory and a new attempt in it
judge   reads what the preflight found on every node; then the roles may start

Words for people go to standard error; the last line of standard output is the plan in JSON. Exit 2 = refused.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from gspo_megatron.cluster import hosts, placement
from gspo_megatron.cluster.attempts import read_attempt, read_jobs, write_job
from gspo_megatron.cluster.exit_codes import REFUSED
from gspo_megatron.cluster.hosts import Host, Kind, Ports, Spread, Task
from gspo_megatron.cluster.shared_files import read_shared, replace_text, retry_stale
from gspo_megatron.cluster.visible_devices import explain_none
from gspo_megatron.commands.train_run import KEY, claim_run, prepare_run, stays_finished
from gspo_megatron.config import Recipe, RecipeError
from gspo_megatron.config.loading import refuse
from gspo_megatron.config.recipe_paths import absolute_path, paths_of, short_path
from gspo_megatron.config.secret_text import SECRET
from gspo_megatron.models import load_recipe, load_resolved
from gspo_megatron.own_directory import refuse_unwritable
from gspo_megatron.plan.run_plan import make_plan, read_contents
from gspo_megatron.run_dir import ATTEMPT, AttemptDir, RunDir
from gspo_megatron.types import Finding
from launch.lib.preflight import find_sick, judge, warnings
from launch.lib.preflight_steps import SICK
from launch.lib.resume import refuse_other_job
from launch.lib.text import fold

WRITTEN = ("run.directory", "cold_start.cache")
"""Paths of a recipe that a run writes to; it reads the others."""
PATTERN = "%\\"
"""What srun does not take as it is in the name of a file. Escaped, some versions of it fail to open the file."""
ENVIRONMENT = re.compile(r"(SLURM|NCCL|GLOO|UCX|FI|CUDA|OMP|TORCH|VLLM|TRITON|GSPO|HF_HOME|TMPDIR|PATH|LD_LIBRARY)")


def main() -> int:
    """Entry of the three phases."""
    parser = argparse.ArgumentParser(prog="launch/lib/plan.py", description=__doc__)
    phases = parser.add_subparsers(dest="phase", required=True)
    for name in ("draw", "open"):
        phase = phases.add_parser(name)
        phase.add_argument("--job", required=True, help="SLURM job id; of a drawing, any text")
        phase.add_argument("--hosts", required=True, help="names of the nodes, comma-separated, trainers first")
        phase.add_argument("--gpus", type=int, required=True, help="GPUs of a node, 0 = none")
        phase.add_argument("--running", nargs="*", default=[], help="ids of the running jobs")
        phase.add_argument("--called-in", type=Path, default=Path(), help="what relative paths are relative to")
        phase.add_argument("recipe", type=Path)
        phase.add_argument("overrides", nargs="*")
    judging = phases.add_parser("judge")
    judging.add_argument("attempt", type=Path)
    chosen = parser.parse_args()
    try:
        if chosen.phase == "judge":
            return judge_attempt(chosen.attempt)
        names = chosen.hosts.split(",")
        recipe = load_for_job(chosen.recipe, chosen.overrides, chosen.job, names, chosen.gpus, chosen.called_in)
        gpus = count_gpus(recipe)
        say_findings(recipe, drawing=chosen.phase == "draw")
        if chosen.phase == "draw":
            return draw(recipe, names, gpus, chosen.job)
        return open_attempt(recipe, names, gpus, chosen.job, chosen.running)
    except RecipeError as error:
        for finding in error.findings:
            print(finding, file=sys.stderr)
        return REFUSED


def load_for_job(
    path: Path, overrides: Sequence[str], job: str, names: Sequence[str], gpus: int, called_in: Path
) -> Recipe:
    """The recipe with the job's nodes and GPUs in `placement`. Raises RecipeError for one that does not fit them."""
    recipe = load_recipe(path, overrides, called_in)
    wanted = recipe.placement.nodes
    if "nodes" in recipe.placement.model_fields_set and wanted != len(names):
        print(f"placement.nodes={wanted} in the recipe, {len(names)} in the job: the latter counts", file=sys.stderr)
    if recipe.placement.gpu == "cpu":
        # An exclusive job is granted the GPUs of its nodes whether it wants them or not.
        gpus = 0
    elif not gpus:
        # Unknown is not zero: a run that was meant for GPUs must not go on without them.
        raise refuse(
            "no-gpus", "placement.gpu", f"SLURM names no GPUs of this job, and {explain_none()}",
            "ask for them (sbatch --gpus-per-node=8), set GSPO_GPUS_PER_NODE where SLURM does not count GPUs, or set "
            "placement.gpu=cpu for a run without",
        )  # fmt: skip
    facts: dict[str, Any] = {"nodes": len(names), "gpus_per_node": gpus or hosts.CPU_RANKS}
    run = {"directory": recipe.run.directory or absolute_path(f"runs/{recipe.run.name}-{job}", called_in)}
    if found := sorted(set(PATTERN) & set(str(run["directory"]))):
        fault = f"{run['directory']} holds {' and '.join(found)}, which srun reads as a pattern in the names of logs"
        raise refuse("not-for-slurm", "run.directory", fault, "name a directory without")
    sections = {"placement": recipe.placement.model_copy(update=facts), "run": recipe.run.model_copy(update=run)}
    recipe = recipe.model_copy(update=sections)
    # What does not fit the nodes makes the plan's own findings noise.
    refuse_errors(list(placement.findings(recipe, len(names), gpus)))
    return recipe


def say_findings(recipe: Recipe, drawing: bool) -> None:
    """What the planner says of the recipe and of its files; a drawing says only what refuses it.

    Raises:
        RecipeError: the run must not start.
    """
    planned = make_plan(recipe, runs_here=not drawing).findings
    refuse_errors(planned)
    contents = read_contents(recipe, runs_here=not drawing)
    refuse_errors(contents)
    for finding in () if drawing else (*planned, *contents):
        print(finding, file=sys.stderr)


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Raise RecipeError with the errors among findings, if there are any."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise RecipeError(errors)


def count_gpus(recipe: Recipe) -> int:
    """GPUs of a node that the run uses."""
    return 0 if recipe.placement.gpu == "cpu" else recipe.placement.gpus_per_node or 0


def layout(recipe: Recipe, at: Sequence[Host], gpus: int, job: str) -> tuple[Spread, Ports, list[Task]]:
    """Where everything runs."""
    assert recipe.run.directory is not None
    over, ports = hosts.spread(recipe, at, gpus), Ports.of_job(int(job) if job.isdigit() else 0)
    return over, ports, hosts.tasks(recipe, over, ports, recipe.run.directory)


def draw(recipe: Recipe, names: Sequence[str], gpus: int, job: str) -> int:
    """Say what would run where, with short paths."""
    assert recipe.run.directory is not None
    run = recipe.run.model_copy(update={"directory": short_path(recipe.run.directory)})
    recipe = recipe.model_copy(update={"run": run})
    over, ports, tasks = layout(recipe, [Host(name, name) for name in names], gpus, job)
    print("\n".join(describe(recipe, over, ports)), file=sys.stderr)
    for kind in ("rollout", "controller", "trainer"):
        task = next(task for task in tasks if task.kind == kind)
        settings = "".join(f"{name}={value} " for name, value in task.environment.items())
        print(f"{task.name} on {task.host.name}: {settings}python {' '.join(task.arguments)}", file=sys.stderr)
    print_plan(recipe, over, {})
    return 0


def describe(recipe: Recipe, over: Spread, ports: Ports) -> list[str]:
    """Hosts, roles and ports as lines."""
    trainer, nodes = recipe.trainer, sorted({*over.trainers, *over.servers}, key=lambda host: host.name)
    sizes = {
        "TP": trainer.tensor_parallel,
        "PP": trainer.pipeline_parallel,
        "CP": trainer.context_parallel,
        "EP": trainer.expert_parallel,
        "ETP": trainer.expert_tensor_parallel,
    }
    each = f"{over.gpus} GPUs each" if over.gpus else "no GPU"
    placement = "colocated: servers share the trainer's nodes" if over.colocated else "disaggregated"
    servers, stages = len(over.server_places()), recipe.rollout.pipeline_parallel
    size = f"tensor-parallel size {recipe.rollout.tensor_parallel}" + (f" with {stages} stages" if stages > 1 else "")
    spread = f"each over {over.server_nodes} nodes" if over.server_nodes > 1 else f"{over.servers_each} a node"
    return [
        f"run         {recipe.run.name} in {recipe.run.directory}",
        f"nodes       {len(nodes)} with {each}, {placement}",
        f"trainer     {over.world} ranks, {over.ranks} a node, on {fold(over.trainers)}; "
        + " ".join(f"{name} {value}" for name, value in sizes.items()),
        f"controller  on {over.trainers[0].name}",
        f"rollout     {servers} server{'s' * (servers > 1)} of {size}, {spread}, on {fold(over.servers)}",
        f"ports       rendezvous {ports.rendezvous}, controller {ports.controller}, servers from {ports.servers[0]}",
    ]


def print_plan(recipe: Recipe, over: Spread, more: Mapping[str, Any]) -> None:
    """Print what the job script has to know (`launch/lib/plan_request.py`), as one line of JSON."""
    roles = {kind: ([host.name for host in over.of(kind)[0]], over.of(kind)[1]) for kind in get_args(Kind)}
    facts = {"run_dir": str(recipe.run.directory), "gpus": over.gpus, "colocated": over.colocated, "roles": roles}
    print(json.dumps({**facts, **more}))


def open_attempt(recipe: Recipe, names: Sequence[str], gpus: int, job: str, running: Sequence[str]) -> int:
    """Make or reopen the run directory, and a directory for a new attempt in it."""
    run_dir = recipe.run.directory
    assert run_dir is not None
    over, ports, _ = layout(recipe, [Host(name, name) for name in names], gpus, job)
    if stays_finished(recipe):
        print_plan(recipe, over, {"done": True})
        return 0
    with refuse_unwritable(run_dir, KEY):
        claim_run(run_dir)
        refuse_other_job(run_dir, job, running)
        number, attempt, earlier = make_attempt(RunDir(run_dir), job)
        try:
            refuse_other_job(run_dir, job, running, earlier)
        except RecipeError:
            shutil.rmtree(attempt)
            raise
        prepare_run(recipe)
        facts = {"job": job, "attempt": number, "gpus": gpus, "hosts": [[name, name] for name in names]}
        write_plan(attempt, facts)
        kept = {key: value for key, value in os.environ.items() if ENVIRONMENT.match(key) and not SECRET.search(key)}
        AttemptDir(attempt).environment.write_text(json.dumps(kept, indent=1, sort_keys=True))
    print("\n".join(describe(recipe, over, ports)), file=sys.stderr)
    print_plan(recipe, over, {"attempt": str(attempt), "number": number, "earlier_jobs": earlier})
    return 0


def make_attempt(run: RunDir, job: str) -> tuple[int, Path, list[str]]:
    """Make the directory of a new attempt, exclusively: it appears with the name of its job in it.

    Returns:
        Its number, its path, and the jobs of older attempts.
    """
    fresh = AttemptDir(run.logs / f".attempt.{job}.{os.getpid()}")
    fresh.preflight.mkdir(parents=True)
    write_job(fresh.path, run.path, job)
    try:
        newest = read_attempt(run.path)
    except ValueError:  # said by refuse_other_job
        newest = None
    while True:
        older = list(ATTEMPT.find(run.logs).values())
        # Logs may have been deleted: an attempt on a node that is cut off must still find a larger number than its own.
        number = max(run.next_attempt(), newest.number + 1 if newest else 1)
        path = run.attempt_logs(number).path
        try:
            # Fails where a job that started in the same second was quicker: the directory is there and not empty.
            fresh.path.rename(path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    return number, path, retry_stale(lambda: read_jobs(run.path, older))


def judge_attempt(attempt: Path) -> int:
    """Hold the nodes' reports against each other; the roles get the addresses that were found."""
    files = AttemptDir(attempt)
    facts = json.loads(read_shared(files.plan))
    recipe = load_resolved(files.run.recipe)
    reports = [json.loads(read_shared(path)) for path in sorted(files.preflight.glob("*.json"))]
    for warning in warnings(reports):
        print(f"preflight: warning: {warning}", file=sys.stderr)
    faults = judge(reports, [name for name, _ in facts["hosts"]], facts["gpus"], recipe)
    for fault in faults:
        print(f"preflight: {fault}", file=sys.stderr)
    sick = find_sick(reports)
    if sick:
        with files.run.bad_nodes.open("a") as file:
            file.writelines(f"{node} {reason} (attempt {facts['attempt']})\n" for node, reason in sick)
    if faults:
        return SICK if len(faults) == len(sick) else REFUSED
    addresses = {report["host"]: report["address"] for report in reports}
    facts["hosts"] = [[name, addresses[name]] for name, _ in facts["hosts"]]
    write_plan(attempt, facts)
    return 0


def write_plan(attempt: Path, facts: dict[str, Any]) -> None:
    """The attempt's table of tasks, which every task reads its own line of."""
    recipe = load_resolved(AttemptDir(attempt).run.recipe)
    _, _, tasks = layout(recipe, [Host(*host) for host in facts["hosts"]], facts["gpus"], facts["job"])
    facts["tasks"] = [
        {
            "kind": task.kind,
            "name": task.name,
            "host": task.host.name,
            "local": task.local,
            "arguments": task.arguments,
            "environment": task.environment,
            "ports": task.ports,
            "restarts": task.restarts,
        }
        for task in tasks
    ]
    facts["read"] = {key: str(path) for key, path in paths_of(recipe).items() if key not in WRITTEN}
    replace_text(AttemptDir(attempt).plan, json.dumps(facts, indent=1))


if __name__ == "__main__":
    sys.exit(main())
