"""The figures of a run: which metrics stand together, and against which level they are read."""

from __future__ import annotations

import math
from collections.abc import Callable

from gspo_megatron.cluster.machines import takes_turns
from gspo_megatron.config.schema import Recipe
from gspo_megatron.report.intervals import of_mean, wilson
from gspo_megatron.report.panels import Json, Panel, Table, areas, describe, figure, heat, shade_of
from gspo_megatron.report.series import Series, align

TIMES = {
    "rollout": "rollout", "take_over": "take over devices", "pack": "pack", "old_logprobs": "old log-probs",
    "reference": "reference log-probs", "train": "train", "probe": "probe routers", "export": "export",
    "sync": "weight update", "log_ratios": "store log-ratios", "evaluate": "evaluate",
    "checkpoint": "copy of a checkpoint", "check": "check", "stop": "stop",
}  # fmt: skip
"""Parts of a step, in their order."""


def make_figures(table: Table, recipe: Recipe | None) -> list[Json]:
    """The figures of a run that have something to show.

    Args:
        table: every series of the run.
        recipe: its recipe, which holds the clip band and the limits; None = not known.
    """
    return [made for make in FIGURES if (made := make(table, recipe)) is not None]


def _reward(table: Table, recipe: Recipe | None) -> Json | None:
    panel = Panel("Reward of sampled responses, accuracy on held-out problems", "share")
    needed = ("reward_mean", "reward_group_std", "groups")
    if all(name in table for name in needed):
        steps, (mean, deviation, groups) = align(*(table[name] for name in needed))
        ends = [of_mean(*one) for one in zip(mean, deviation, groups, strict=True)]
        panel.band(steps, [low for low, _ in ends], [high for _, high in ends], "95 % of the mean reward, over groups")
    panel.line(table, "reward_mean", "mean reward")
    if "eval/accuracy" in table:
        panel.traces.append(_accuracy(table))
        panel.said.append(describe("held-out accuracy", table["eval/accuracy"]))
    parts, groups = Panel("Parts of the reward", "mean"), Panel("Groups that teach nothing", "share of groups")
    for name in table:
        if name.startswith("reward/"):
            parts.line(table, name, name.removeprefix("reward/"))
    groups.line(table, "zero_variance_groups", "equal rewards")
    groups.line(table, "solved_groups", "all right")
    groups.line(table, "unsolved_groups", "all wrong")
    about = (
        "Held-out points carry Wilson's 95 % interval over problems. A rising reward with a flat accuracy is "
        "over-fitting, or a reward that can be tricked."
    )
    return figure("reward", "Reward and accuracy", about, panel, parts, groups)


def _accuracy(table: Table) -> Json:
    """Held-out accuracy with its intervals, where the number of problems is known."""
    accuracy = table["eval/accuracy"]
    problems = table.get("eval/problems", Series([], []))
    counts = dict(zip(problems.steps, problems.values, strict=True))
    ends = [
        wilson(value, counts[step]) if step in counts else (value, value)
        for step, value in zip(accuracy.steps, accuracy.values, strict=True)
    ]
    return {
        "kind": "points", "name": "held-out accuracy", "x": accuracy.steps, "y": accuracy.values,
        "low": [low for low, _ in ends], "high": [high for _, high in ends],
    }  # fmt: skip


def _ratio(table: Table, recipe: Recipe | None) -> Json | None:
    by_step = Panel("By step", "log s")
    for low, high, text, depth in (("p01", "p99", "1 % to 99 %", 0), ("p10", "p90", "10 % to 90 %", 1)):
        names = (f"log_s_{low}", f"log_s_{high}")
        if all(name in table for name in names):
            steps, (lows, highs) = align(*(table[name] for name in names))
            by_step.band(steps, lows, highs, text, depth)
            by_step.said += [describe(text.split(" to ")[at], table[name]) for at, name in enumerate(names)]
    by_step.line(table, "log_s_p50", "median")
    by_length = Panel("By tokens of the response, last step", "log s")
    buckets = _buckets(table)
    for bucket in buckets:
        names = [f"log_s_{q}/{bucket}" for q in ("p01", "p50", "p99")]
        if all(name in table for name in names):
            low, middle, high = (table[name].values[-1] for name in names)
            text = _tokens_of(bucket)
            one = {"kind": "points", "name": text, "x": [text], "y": [middle], "low": [low], "high": [high]}
            by_length.traces.append(one)
            by_length.said.append(f"{text}: median {middle:.2g}, 1 % {low:.2g}, 99 % {high:.2g}")
    over_steps = Panel("99 % quantile by step and tokens of the response", "log s")
    noise = Panel("Noise: root mean square of log s times root of length", "nats per root token")
    for place, bucket in enumerate(buckets):
        over_steps.line(table, f"log_s_p99/{bucket}", _tokens_of(bucket), shade_of(place, len(buckets)))
    noise.line(table, "log_s_noise", "noise")
    for panel in (by_step, by_length, over_steps):
        _add_clip_band(panel, recipe)
    about = (
        "s is the likelihood ratio of a response to the power of 1 / length (equation 7 of the paper). Inside the "
        "clip band a response keeps its gradient. The first mini-batch of a step has log s = 0."
    )
    return figure("ratio", "Sequence ratio", about, by_step, by_length, over_steps, noise)


def _buckets(table: Table) -> list[str]:
    """Classes of length that were seen, shortest first: `le_64`, `gt_65536`."""
    found = [name.partition("/")[2] for name in table if name.startswith("log_s_p50/le_")]
    found += [name.partition("/")[2] for name in table if name.startswith("log_s_p50/gt_")]
    return sorted(found, key=lambda bucket: (bucket.startswith("gt"), int(bucket.partition("_")[2])))


def _tokens_of(bucket: str) -> str:
    side, _, tokens = bucket.partition("_")
    return ("to " if side == "le" else "above ") + f"{int(tokens):,}"


def _add_clip_band(panel: Panel, recipe: Recipe | None) -> None:
    """The clip band of a sequence ratio as log s; that of a token ratio is no band of log s."""
    spec = None if recipe is None else recipe.objective.spec(recipe.rollout.max_answer_tokens)
    if panel.traces and spec is not None and spec.per_sequence and spec.clip_low < 1:
        panel.span(math.log1p(-spec.clip_low), math.log1p(spec.clip_high), "clip band")


def _clipping(table: Table, recipe: Recipe | None) -> Json | None:
    panels = []
    for unit in ("sequences", "tokens"):
        for side, text in (("left", "the ratio fell"), ("right", "the ratio rose")):
            panel = Panel(f"{unit.capitalize()}, clipped on the {side} ({text})", f"share of {unit}")
            panel.lines(table, f"clip_{side}_{unit}/minibatch_", "mini-batch")
            if not panel.traces:
                panel.line(table, f"clip_{side}_{unit}", "all mini-batches")
            panels.append(panel)
    about = (
        "A clipped response or token has no gradient in that update. Mini-batch 0 is trained with the weights that "
        "its old log-probs come from: anything but 0 there is a fault. GSPO clips far more than GRPO, by design."
    )
    return figure("clipping", "Clipping", about, *panels)


def _routers(table: Table, recipe: Recipe | None) -> Json | None:
    panels = [
        heat(table, "experts/load_max_over_mean", "Load of the busiest expert over the mean", "times the mean"),
        heat(table, "experts/changed", "Choices changed since the old log-probs, last mini-batch", "share"),
        heat(table, "experts/probe_changed", "Choices changed by one update, on fixed tokens", "share"),
        heat(table, "experts/sampler_disagreement", "Choices in which sampler and trainer differ", "share"),
    ]
    changed = Panel("Changed choices by mini-batch", "share")
    changed.lines(table, "experts/changed/minibatch_", "mini-batch")
    about = (
        "Layers from bottom to top. The paper saw about 10 % of the choices of a 48-layer model change in one "
        "update. A busiest expert above 3 times the mean means that the router narrows."
    )
    return figure("routers", "Router load and expert change", about, *panels, changed)


def _gradient(table: Table, recipe: Recipe | None) -> Json | None:
    norm, rate, skipped = Panel("Norm before clipping", log=True), Panel("Learning rate"), Panel("Skipped updates")
    norm.line(table, "grad_norm", "gradient norm")
    if recipe is not None and recipe.optimizer.clip_grad:
        norm.limit(recipe.optimizer.clip_grad, "optimizer.clip_grad")
    rate.line(table, "learning_rate", "learning rate")
    if any(table.get("skipped_updates", Series([], [])).values):
        skipped.line(table, "skipped_updates", "not finite, since the start")
    return figure("gradient", "Gradient norm", "Of the last update of each step.", norm, rate, skipped)


def _critic(table: Table, recipe: Recipe | None) -> Json | None:
    explained, loss = Panel("Share of the returns' variance that values explain", "share"), Panel("Value loss", "")
    level, clipped = Panel("Mean over tokens", "reward"), Panel("Tokens whose value left its band", "share of tokens")
    explained.line(table, "explained_variance", "explained variance")
    loss.line(table, "value_loss", "value loss")
    level.line(table, "value_mean", "values before the updates")
    level.line(table, "return_mean", "returns")
    clipped.line(table, "value_clipped", "clipped")
    about = "Values are those before the updates of a step. Below 0 the critic explains less than a constant would."
    return figure("critic", "Critic", about, explained, level, loss, clipped)


def _mismatch(table: Table, recipe: Recipe | None) -> Json | None:
    gap = Panel("Divergence of sampler and trainer", "nats a token", log=True)
    gap.line(table, "mismatch_k3", "k3")
    gap.line(table, "mismatch_abs_max", "largest difference of a token")
    ratio = Panel("Effective sample size, correlation", "1 = equal", from_zero=False)
    ratio.line(table, "mismatch_ess", "effective share")
    ratio.line(table, "mismatch_correlation", "correlation of probabilities")
    ratio.line(table, "mismatch_ppl_ratio", "ratio of perplexities")
    canary = Panel("Canary after each weight update", "nats", log=True)
    canary.line(table, "canary_mean", "mean")
    canary.line(table, "canary_largest", "largest")
    if recipe is not None:
        canary.limit(recipe.weight_update.canary_bound, "weight_update.canary_bound")
    about = "The same tokens under the same weights, scored by vLLM and by Megatron. Healthy: k3 below 0.01."
    return figure("mismatch", "Sampler-trainer mismatch", about, gap, ratio, canary)


def _policy(table: Table, recipe: Recipe | None) -> Json | None:
    entropy, moved = Panel("Entropy", "nats a token"), Panel("Distance from the old policy", "nats a token", log=True)
    entropy.line(table, "token_entropy", "of the next-token distribution")
    entropy.line(table, "entropy", "of the sampled tokens")
    moved.line(table, "policy_k3", "k3 to the old policy")
    moved.line(table, "reference_kl", "KL to the reference policy")
    other = Panel("Distance from the teacher", "nats a token")
    other.line(table, "teacher_kl", "KL to the teacher")
    return figure("policy", "Entropy and divergence", "Entropy below 0.05 is collapse.", entropy, moved, other)


def _responses(table: Table, recipe: Recipe | None) -> Json | None:
    length, cut = Panel("Length of responses", "tokens"), Panel("Truncated, halted", "share of responses")
    length.line(table, "answer_length", "sampled")
    length.line(table, "eval/mean_length", "held-out")
    length.line(table, "answer_limit", "limit of the stage")
    if recipe is not None and not recipe.rollout.length_stages:
        length.limit(recipe.rollout.max_answer_tokens, "rollout.max_answer_tokens")
    cut.line(table, "truncated", "cut at the limit")
    cut.line(table, "halted", "halted, repeats itself")
    stale = Panel("Staleness", "weight versions")
    stale.line(table, "staleness_mean", "mean over tokens")
    stale.line(table, "staleness_largest", "largest")
    if recipe is not None:
        stale.limit(recipe.rollout.max_staleness, "rollout.max_staleness")
    dropped = Panel("Tokens sampled and not trained on", "tokens since the start")
    for name in table:
        if name.startswith("dropped_tokens/"):
            dropped.line(table, name, name.removeprefix("dropped_tokens/"))
    about = "A truncated response has no answer; how it is trained on is objective.overlong."
    return figure("lengths", "Length, truncation, staleness", about, length, cut, stale, dropped)


def _time(table: Table, recipe: Recipe | None) -> Json | None:
    if "seconds/step" not in table:
        return None
    parts, idle, rate = Panel("Parts of a step", "seconds"), Panel("Idle share", "share of the step"), Panel("Tokens")
    known = [(f"seconds/{name}", label) for name, label in TIMES.items()]
    known += [
        (name, name.removeprefix("seconds/"))
        for name in table
        if name.startswith("seconds/") and name not in dict(known) and name != "seconds/step"
    ]
    areas(parts, table, known, table["seconds/step"].steps)
    if recipe is not None:
        for name, label in (("idle/trainers", "trainers"), ("idle/servers", "servers")):
            idle.line(table, name, label)
    rate.unit = "trained tokens a second"
    rate.line(table, "tokens_per_second", "tokens a second")
    about = (
        "Trainers idle while they wait for responses, servers while they are not asked for any. Where both share "
        "their devices neither counts as idle while the other works: only the weight update does."
    )
    return figure("time", "Time", about, parts, idle, rate)


def derive(table: dict[str, Series], recipe: Recipe | None) -> None:
    """Add what is worked out from several metrics: the idle shares, and the rate of trained tokens."""
    if not {"seconds/step", "rollout_tokens"} <= table.keys():
        return
    step = dict(zip(table["seconds/step"].steps, table["seconds/step"].values, strict=True))

    def over_step(value: Callable[[int], float], steps: list[int]) -> Series:
        kept = [at for at in steps if step.get(at, 0.0) > 0]
        return Series(kept, [value(at) / step[at] for at in kept])

    tokens = dict(zip(table["rollout_tokens"].steps, table["rollout_tokens"].values, strict=True))
    steps = table["rollout_tokens"].steps
    table["tokens_per_second"] = over_step(tokens.__getitem__, steps)
    if recipe is None:
        return
    parts = {
        name: dict(zip(table[key].steps, table[key].values, strict=True)) if (key := f"seconds/{name}") in table else {}
        for name in ("rollout", "sync", "evaluate")
    }
    shares, asynchronous = takes_turns(recipe), recipe.rollout.max_staleness > 0

    def spent(at: int, *names: str) -> float:
        return sum(parts[name].get(at, 0.0) for name in names)

    table["idle/trainers"] = over_step(
        lambda at: spent(at, "sync", *(() if shares else ("rollout", "evaluate"))), steps
    )
    if shares:
        table["idle/servers"] = over_step(lambda at: spent(at, "sync"), steps)
    elif not asynchronous:
        table["idle/servers"] = over_step(lambda at: max(step[at] - spent(at, "rollout", "evaluate"), 0.0), steps)


FIGURES: tuple[Callable[[Table, Recipe | None], Json | None], ...] = (
    _reward, _ratio, _clipping, _routers, _gradient, _critic, _mismatch, _policy, _responses, _time,
)  # fmt: skip
"""In the order of the page."""
