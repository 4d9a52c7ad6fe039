"""Groups under way, as a checkpoint holds them: metadata as JSON, tokens of unfinished answers in a sample store."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gspo_megatron.data.store import SampleStore, read_ref
from gspo_megatron.rollout.drafts import Draft
from gspo_megatron.rollout.groups import Group
from gspo_megatron.types import Answer, Problem, Prompt, SampleRef

KEPT = ("sample_index", "parts", "lost", "state")
"""What a draft has beyond what the sample store holds of it."""


def describe_groups(groups: Sequence[Group]) -> tuple[list[dict[str, Any]], list[tuple[Prompt, Answer]]]:
    """Metadata of groups, and the unfinished answers that `store_drafts` writes; later tokens do not change either."""
    rows, answers = [], []
    for group in groups:
        open_ = [draft for draft in group.drafts if draft.sample_index not in group.finished]
        answers += [(group.prompt, draft.answer("abort")) for draft in open_]
        rows.append(
            {
                "prompt": asdict(group.prompt),
                "answers": len(group.drafts),
                "limit": group.drafts[0].limit,
                "finished": [asdict(ref) for ref in group.members],
                "born": {draft.sample_index: draft.born for draft in group.drafts},
                "drafts": [{name: getattr(draft, name) for name in KEPT} for draft in open_],
            }
        )
    return rows, answers


def store_drafts(answers: Sequence[tuple[Prompt, Answer]], store: SampleStore) -> list[dict[str, Any]]:
    """Write unfinished answers; their references, in the same order."""
    return [asdict(store.write(prompt, answer, 0.0)) for prompt, answer in answers]


def read_groups(rows: Sequence[dict[str, Any]], drafts: Sequence[dict[str, Any]], store: SampleStore) -> list[Group]:
    """The groups that `describe_groups` and `store_drafts` described. Raises DamagedSample if an answer is gone."""
    stored = iter(drafts)
    groups = []
    for row in rows:
        given = row["prompt"]
        prompt = Prompt(given["index"], Problem(**given["problem"]), tuple(given["token_ids"]))
        finished = {entry["sample_index"]: read_ref(entry) for entry in row["finished"]}
        open_ = {entry["sample_index"]: _read_draft(prompt, entry, next(stored), store) for entry in row["drafts"]}
        ended = {index: _finished_draft(prompt, ref) for index, ref in finished.items()}
        members = [(open_ | ended)[index] for index in range(row["answers"])]
        for draft in members:
            draft.born, draft.limit = row["born"][str(draft.sample_index)], row["limit"]
        groups.append(Group(prompt, members, finished))
    return groups


def forget_lost_members(groups: Sequence[Group], store: SampleStore) -> None:
    """Begin those members anew whose files are gone: after the checkpoint their group was dropped."""
    for group in groups:
        for ref in group.members:
            if not store.holds(ref):
                del group.finished[ref.sample_index]
                limit = group.drafts[ref.sample_index].limit
                group.drafts[ref.sample_index] = Draft(group.prompt, ref.sample_index, limit=limit)


def _read_draft(prompt: Prompt, entry: dict[str, Any], stored: dict[str, Any], store: SampleStore) -> Draft:
    ref = read_ref(stored)
    ids, start, logprobs = store.read(ref)
    return Draft(
        prompt,
        token_ids=array("i", ids[start:].tolist()),
        logprobs=array("f", logprobs.tolist()),
        segments=list(ref.segments),
        masked=list(ref.masked),
        **{name: entry[name] for name in KEPT},
    )


def _finished_draft(prompt: Prompt, ref: SampleRef) -> Draft:
    """What is left to know of a stored answer: how long it is."""
    zeros = array("i", bytes(4 * ref.answer_length))
    return Draft(prompt, ref.sample_index, zeros, masked=list(ref.masked))
