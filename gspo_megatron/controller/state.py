"""Groups in flight as a checkpoint holds them: metadata as messages, tokens of unfinished generations in a store."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence

from gspo_megatron.controller.generation import Generation
from gspo_megatron.controller.groups import Group
from gspo_megatron.controller.recorded_routes import RecordedRoutes
from gspo_megatron.data.store import SampleStore
from gspo_megatron.transport.messages import GenerationState, GroupState
from gspo_megatron.types import Prompt, Response, SampleRef


def describe_groups(
    groups: Sequence[Group], has_agent: bool = False
) -> tuple[list[GroupState], list[tuple[Prompt, Response]]]:
    """Metadata of groups, and the unfinished responses that `store_generations` writes; both are copies.

    Args:
        groups: in flight.
        has_agent: an agent makes the responses. It cannot be stored: unfinished ones begin anew.
    """
    states, responses = [], []
    for group in groups:
        unfinished = [
            _as_checkpoint(one, has_agent) for one in group.generations if one.sample_index not in group.finished
        ]
        responses += [(group.prompt, generation.response("abort")) for generation in unfinished]
        states.append(
            GroupState(
                prompt=group.prompt,
                answers=len(group.generations),
                limit=group.generations[0].limit,
                finished=tuple(group.members),
                first_versions={str(one.sample_index): one.first_version for one in group.generations},
                generations=tuple(_describe_generation(generation) for generation in unfinished),
            )
        )
    return states, responses


def _as_checkpoint(generation: Generation, has_agent: bool) -> Generation:
    if not has_agent:
        return generation
    return Generation(generation.prompt, generation.sample_index, limit=generation.limit)


def _describe_generation(generation: Generation) -> GenerationState:
    # An environment may keep tuples or numbered keys; only their JSON form is stored.
    state = json.loads(json.dumps(generation.state))
    return GenerationState(
        sample_index=generation.sample_index, parts=generation.parts, lost=generation.lost, state=state
    )


def store_generations(responses: Sequence[tuple[Prompt, Response]], store: SampleStore) -> list[SampleRef]:
    """Write unfinished responses; their references, in the same order."""
    refs = [store.write(prompt, response, 0.0) for prompt, response in responses]
    store.seal()
    return refs


def read_groups(states: Sequence[GroupState], stored: Sequence[SampleRef], store: SampleStore) -> list[Group]:
    """The groups that `describe_groups` and `store_generations` wrote. Raises DamagedSample if a response is gone."""
    refs = iter(stored)
    groups = []
    for state in states:
        finished = {ref.sample_index: ref for ref in state.finished}
        unfinished = {
            entry.sample_index: _read_generation(state.prompt, entry, next(refs), store) for entry in state.generations
        }
        ended = {index: _finished_generation(state.prompt, ref) for index, ref in finished.items()}
        members = [(unfinished | ended)[index] for index in range(state.answers)]
        for generation in members:
            generation.first_version = state.first_versions[str(generation.sample_index)]
            generation.limit = state.limit
        groups.append(Group(state.prompt, members, finished))
    return groups


def forget_lost_members(groups: Sequence[Group], store: SampleStore) -> None:
    """Start members again if their records are gone: their group was dropped after the checkpoint."""
    for group in groups:
        for ref in group.members:
            if not store.holds(ref):
                del group.finished[ref.sample_index]
                limit = group.generations[ref.sample_index].limit
                group.generations[ref.sample_index] = Generation(group.prompt, ref.sample_index, limit=limit)


def _read_generation(prompt: Prompt, entry: GenerationState, ref: SampleRef, store: SampleStore) -> Generation:
    ids, start, logprobs = store.read(ref)
    routes = store.read_routes(ref)
    return Generation(
        prompt,
        entry.sample_index,
        token_ids=array("i", ids[start:].tolist()),
        logprobs=array("f", logprobs.tolist()),
        segments=list(ref.segments),
        parts=entry.parts,
        lost=entry.lost,
        masked=list(ref.masked),
        state=entry.state,
        routes=RecordedRoutes(None if routes is None else routes.copy()),
    )


def _finished_generation(prompt: Prompt, ref: SampleRef) -> Generation:
    """A finished member; of its tokens only the number matters."""
    zeros = array("i", bytes(4 * ref.answer_length))
    return Generation(prompt, ref.sample_index, zeros, masked=list(ref.masked))
