"""Groups under way, as a checkpoint holds them: metadata as JSON, tokens of unfinished answers in a sample store."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gspo_megatron.controller.generation import Generation
from gspo_megatron.controller.groups import Group
from gspo_megatron.data.store import SampleStore, read_ref
from gspo_megatron.types import Problem, Prompt, Response, SampleRef

KEPT = ("sample_index", "parts", "lost", "state")
"""What a draft has beyond what the sample store holds of it."""


def describe_groups(groups: Sequence[Group]) -> tuple[list[dict[str, Any]], list[tuple[Prompt, Response]]]:
    """Metadata of groups, and the unfinished responses that `store_generations` writes; both are copies."""
    rows, answers = [], []
    for group in groups:
        open_ = [generation for generation in group.generations if generation.sample_index not in group.finished]
        answers += [(group.prompt, generation.answer("abort")) for generation in open_]
        rows.append(
            {
                "prompt": asdict(group.prompt),
                "answers": len(group.generations),
                "limit": group.generations[0].limit,
                "finished": [asdict(ref) for ref in group.members],
                "born": {generation.sample_index: generation.first_version for generation in group.generations},
                "drafts": [{name: getattr(generation, name) for name in KEPT} for generation in open_],
            }
        )
    return rows, answers


def store_generations(answers: Sequence[tuple[Prompt, Response]], store: SampleStore) -> list[dict[str, Any]]:
    """Write unfinished answers; their references, in the same order."""
    return [asdict(store.write(prompt, answer, 0.0)) for prompt, answer in answers]


def read_groups(
    rows: Sequence[dict[str, Any]], generations: Sequence[dict[str, Any]], store: SampleStore
) -> list[Group]:
    """The groups that `describe_groups` and `store_generations` wrote. Raises DamagedSample if a response is gone."""
    stored = iter(generations)
    groups = []
    for row in rows:
        given = row["prompt"]
        prompt = Prompt(given["index"], Problem(**given["problem"]), tuple(given["token_ids"]))
        finished = {entry["sample_index"]: read_ref(entry) for entry in row["finished"]}
        open_ = {entry["sample_index"]: _read_generation(prompt, entry, next(stored), store) for entry in row["drafts"]}
        ended = {index: _finished_generation(prompt, ref) for index, ref in finished.items()}
        members = [(open_ | ended)[index] for index in range(row["answers"])]
        for generation in members:
            generation.first_version, generation.limit = row["born"][str(generation.sample_index)], row["limit"]
        groups.append(Group(prompt, members, finished))
    return groups


def forget_lost_members(groups: Sequence[Group], store: SampleStore) -> None:
    """Begin those members anew whose files are gone: after the checkpoint their group was dropped."""
    for group in groups:
        for ref in group.members:
            if not store.holds(ref):
                del group.finished[ref.sample_index]
                limit = group.generations[ref.sample_index].limit
                group.generations[ref.sample_index] = Generation(group.prompt, ref.sample_index, limit=limit)


def _read_generation(prompt: Prompt, entry: dict[str, Any], stored: dict[str, Any], store: SampleStore) -> Generation:
    ref = read_ref(stored)
    ids, start, logprobs = store.read(ref)
    return Generation(
        prompt,
        token_ids=array("i", ids[start:].tolist()),
        logprobs=array("f", logprobs.tolist()),
        segments=list(ref.segments),
        masked=list(ref.masked),
        **{name: entry[name] for name in KEPT},
    )


def _finished_generation(prompt: Prompt, ref: SampleRef) -> Generation:
    """What is left to know of a stored answer: how long it is."""
    zeros = array("i", bytes(4 * ref.answer_length))
    return Generation(prompt, ref.sample_index, zeros, masked=list(ref.masked))
