"""Rules of resources: device memory, host memory, time limit, disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gspo_megatron.cluster.gpu_environment import ROUNDED_MIB
from gspo_megatron.cluster.machines import Machine
from gspo_megatron.config.model_section import Architecture
from gspo_megatron.config.schema import Recipe
from gspo_megatron.parallel import layout_of
from gspo_megatron.plan.estimate import flops
from gspo_megatron.plan.estimate.batch import BatchPlan
from gspo_megatron.plan.estimate.memory import PROCESS_BYTES, StageMemory, held_by
from gspo_megatron.plan.estimate.rollout import CPU_SERVER_BYTES, RolloutPlan
from gspo_megatron.plan.estimate.step_time import ComputePlan
from gspo_megatron.types import ITEM_BYTES, Finding

TIGHT = 0.94
"""Share of the memory above which an estimate gives a warning."""
TRUSTED = 1.15
"""Factor over the memory above which an estimate gives an error. Below it the estimate may be wrong: a warning."""
START_UP_SECONDS = 900
"""Seconds of start-up: loading weights, starting servers, capturing graphs."""
STATE_BYTES = 14
"""Bytes of a parameter in a checkpoint: bfloat16 weight, float32 main copy and two float32 moments."""
INDEX_BYTES = 500
"""Bytes of a sample in the index of its step: reward, lengths, weight versions, its share of the question."""


def fits(stages: list[StageMemory], machine: Machine) -> bool:
    """Return whether training fits, with a margin for the error of the estimated part."""
    fullest = max(stage.static_bytes + TRUSTED * (stage.peak_bytes - stage.static_bytes) for stage in stages)
    peak = max(stage.peak_bytes for stage in stages)
    return fullest <= machine.device.memory and peak <= TIGHT * machine.device.memory


@dataclass(frozen=True, slots=True)
class Moment:
    """Memory use of a GPU, or of a CPU machine, in one phase of a step."""

    name: str
    """Name of the phase: `training`, `sampling`, `weight update`."""
    bytes: int
    """Bytes in use."""
    largest: str
    """Name and size of the largest term."""
    key: str
    """The recipe key with the largest effect."""
    fix: str = "lower it"
    """What to do with it; empty = `suggest.cheapest_change` says."""


def moments(recipe: Recipe, machine: Machine, stages: list[StageMemory], rollout: RolloutPlan | None) -> list[Moment]:
    """Return the phases of a trainer GPU with the most memory in use, or the one phase of a CPU machine."""
    fullest = max(stages, key=lambda stage: stage.peak_bytes)
    name, size = fullest.largest
    term = f"{name}, {size / 1e9:.1f} GB on stage {fullest.stage}"
    if machine.is_cpu:
        trainers = sum(stage.peak_bytes for stage in stages) * machine.ranks // len(stages)
        servers = 0
        if rollout is not None:
            each = (rollout.weight_bytes + rollout.kv_room) * rollout.devices_per_server + CPU_SERVER_BYTES
            servers = rollout.servers * each
        key = "rollout.kv_cache_gib" if servers > trainers else "trainer.micro_batch_tokens"
        return [Moment("all processes", trainers + servers, term, key)]
    found = [Moment("training", fullest.peak_bytes, term, "trainer.micro_batch_tokens", fix="")]
    if machine.colocated and rollout is not None:
        left = PROCESS_BYTES["one" if machine.ranks == 1 else "many"]
        awake = int(machine.device.memory * recipe.rollout.gpu_memory_fraction)
        weights = max(sum(size for name, size in stage.exact.items() if "weights" in name) for stage in stages)
        found.append(Moment("sampling", awake + left, "the server's share of the GPU", "rollout.gpu_memory_fraction"))
        updating = weights + rollout.weight_bytes + 2 * left
        key = "trainer.expert_parallel" if recipe.arch.num_experts else "trainer.tensor_parallel"
        key = "rollout.tensor_parallel" if rollout.weight_bytes >= weights else key
        fix = "raise it: a GPU then holds a smaller part of the weights; or give the servers nodes of their own"
        found.append(Moment("weight update", updating, "both copies of the weights", key, fix))
    return found


def host_bytes(
    recipe: Recipe, arch: Architecture, machine: Machine, batch: BatchPlan, stages: list[StageMemory]
) -> dict[str, int]:
    """Return the host memory of one node in bytes, by use."""
    if machine.is_cpu:
        return {}
    ranks = min(machine.per_node, machine.ranks)
    # A copy from which a thread writes; the buffer is kept for the next checkpoint.
    found = {"copy for checkpoints": ranks * max(pinned_bytes(_sum(stage, "optimizer")) for stage in stages)}
    if recipe.objective.kl != "none":
        chunks = held_by(arch, layout_of(recipe.trainer, machine.ranks), 0, recipe.objective.has_critic)
        sizes = [size * ITEM_BYTES[recipe.model.dtype] for chunk in chunks for size in (*chunk.dense, *chunk.expert)]
        found["reference weights"] = ranks * sum(map(pinned_bytes, sizes))
    if recipe.trainer.offload_activations:
        found["offloaded activations"] = ranks * max(stage.offloaded for stage in stages)
    if machine.colocated:
        # Weights and states move to the host while the servers are awake; gradients are freed.
        found["offloaded trainer states"] = ranks * max(_offloaded(stage) for stage in stages)
    sample = batch.expected_tokens * (4 + 4 + 1 + _teacher_bytes(recipe))
    routes = flops.route_bytes(arch) * batch.expected_tokens if recipe.objective.replay != "off" else 0
    found["samples of a batch"] = int(batch.sequences * sample)
    if routes:
        found["routes of a batch"] = int(batch.sequences * routes)
    return found


def pinned_bytes(size: int) -> int:
    """Return what torch takes for one block of pinned memory: the next power of two, or the size of a large one."""
    if size > ROUNDED_MIB << 20:
        return size
    return 1 << (size - 1).bit_length() if size > 0 else 0


def _offloaded(stage: StageMemory) -> int:
    """Return the pinned bytes of a rank's weights and states: a block each."""
    return pinned_bytes(_sum(stage, "weights")) + pinned_bytes(_sum(stage, "optimizer"))


def _sum(stage: StageMemory, kind: str) -> int:
    return sum(size for name, size in stage.exact.items() if kind in name)


def _teacher_bytes(recipe: Recipe) -> int:
    """Return the bytes of a teacher's log-prob of a response token."""
    return 4 if recipe.objective.has_teacher else 0


def disk_bytes(recipe: Recipe, arch: Architecture, batch: BatchPlan) -> dict[str, int]:
    """Return the bytes that a run writes to its directory, by kind."""
    parameters = flops.parameters(arch)
    routes = flops.route_bytes(arch) if recipe.objective.replay == "sampler" else 0
    checkpoint, steps = recipe.checkpoint, recipe.trainer.max_steps
    weights = parameters * ITEM_BYTES[recipe.model.dtype]
    exports = steps // checkpoint.export_every if checkpoint.export_every else 0
    # An old state is removed only when the new one is complete.
    states = min(checkpoint.keep, -(-steps // checkpoint.every) if checkpoint.every else 1) + 1
    kept = min(steps, recipe.rollout.keep_samples or steps)
    # A step has an index, a file of tokens and one of log-ratios a data-parallel rank; a checkpoint begins another one.
    files = (2 + batch.data_ranks) * kept + (kept // checkpoint.every if checkpoint.every else 0) + 1
    samples = batch.expected_tokens_per_batch * (11 + _teacher_bytes(recipe) + routes) + batch.sequences * INDEX_BYTES
    return {
        f"{states} training states": states * parameters * STATE_BYTES,
        f"{exports + 1} exported models": (exports + 1) * weights,
        f"samples of {kept} steps in {files} files": int(kept * samples),
    }


def findings(
    recipe: Recipe,
    arch: Architecture,
    machine: Machine,
    batch: BatchPlan,
    stages: list[StageMemory],
    rollout: RolloutPlan,
    compute: ComputePlan,
) -> Iterator[Finding]:
    """Find what does not fit. An empty fix is filled in by `suggest.cheapest_change`."""
    for moment in moments(recipe, machine, stages, rollout):
        yield from _device(moment, machine, stages)
    host = host_bytes(recipe, arch, machine, batch, stages)
    if sum(host.values()) > machine.host_memory:
        name = max(host, key=lambda part: host[part])
        yield Finding(
            "host-memory-exceeded", "error", "placement.host_memory_gib",
            f"a node requires {sum(host.values()) / 1e9:.0f} GB of host memory, most of it {name}, and has "
            f"{machine.host_memory / 1e9:.0f} GB",
            "take more nodes, give the servers nodes of their own (placement.rollout_nodes), or correct the key",
        )  # fmt: skip
    yield from _time(recipe, arch, machine, compute)
    needed = disk_bytes(recipe, arch, batch)
    allowed = recipe.placement.disk_gib
    if allowed is not None and sum(needed.values()) > allowed * 2**30:
        name = max(needed, key=lambda part: needed[part])
        yield Finding(
            "disk-too-small", "error", "placement.disk_gib",
            f"{allowed:g} GiB, but the run writes about {sum(needed.values()) / 2**30:.0f}, most of it {name} "
            f"(checkpoint.keep={recipe.checkpoint.keep} and one that is being written)",
            f"set it to {sum(needed.values()) / 2**30 * 1.2:.0f}",
        )  # fmt: skip


def _device(moment: Moment, machine: Machine, stages: list[StageMemory]) -> Iterator[Finding]:
    share = moment.bytes / machine.device.memory
    if share <= TIGHT:
        return
    certain = share > TRUSTED or max(stage.static_bytes for stage in stages) > machine.device.memory
    if share <= 1:
        code, severity = "memory-tight", "warning"
    else:
        code, severity = "memory-exceeded", "error" if certain or moment.name != "training" else "warning"
    yield Finding(
        code, severity, moment.key,  # type: ignore[arg-type]
        f"{moment.name} takes about {moment.bytes / 1e9:.1f} GB of the {machine.device.memory / 1e9:.1f} GB of "
        f"{'this machine' if machine.is_cpu else 'a ' + machine.device.kind.upper()}; largest: {moment.largest}",
        moment.fix,
    )  # fmt: skip


def _time(recipe: Recipe, arch: Architecture, machine: Machine, compute: ComputePlan) -> Iterator[Finding]:
    limit = recipe.placement.walltime_hours
    if limit is None:
        return
    saving = flops.parameters(arch) * STATE_BYTES / (5e9 * machine.nodes)
    least = (START_UP_SECONDS + 2 * compute.seconds_per_step + saving) / 3600
    if limit < least:
        yield Finding(
            "walltime-too-short", "error", "placement.walltime_hours",
            f"{limit:g} h, but start-up, two steps of about {compute.seconds_per_step:.0f} s and a checkpoint take "
            f"{least:.1f} h: the job would be requeued without progress",
            f"set it to at least {2 * least:.1f}",
        )  # fmt: skip
    elif limit < compute.hours:
        yield Finding(
            "several-jobs", "info", "placement.walltime_hours",
            f"{recipe.trainer.max_steps} steps take about {compute.hours:.0f} h, {compute.hours / limit:.1f} time "
            "limits: the job is requeued and resumes", "nothing to do",
        )  # fmt: skip
