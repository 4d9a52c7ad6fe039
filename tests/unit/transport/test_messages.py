"""Every message class goes through JSON and back, and no field is ignored, guessed or left untyped."""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import types
import typing
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gspo_megatron.config.model_section import Architecture
from gspo_megatron.controller.server_admin import ServerAdmin
from gspo_megatron.controller.server_client import ServerClient
from gspo_megatron.models.vllm_layout import ServerLayout
from gspo_megatron.parallel import Layout
from gspo_megatron.transport import messages, routes, update_messages
from gspo_megatron.transport.controller_client import ControllerClient
from gspo_megatron.transport.messages import (
    ControllerState,
    EvaluationRequest,
    GenerationState,
    GroupState,
    RolloutRequest,
)
from gspo_megatron.transport.weights.shared_memory import JsonConnection
from gspo_megatron.transport.wire_message import MessageError, WireMessage
from gspo_megatron.types import Masked, Problem, Prompt, SampleRef, Segment
from tests.places import ROOT
from tests.shards import ARCH

CLASSES = sorted(
    {
        value
        for module in (messages, update_messages)
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, WireMessage) and value is not WireMessage
    },
    key=lambda kind: kind.__name__,
)
COUNTS = st.integers(0, 2**64 - 1)
POSITIVE = st.integers(1, 2**64 - 1)
TEXT = st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
st.register_type_strategy(Architecture, st.just(ARCH))
st.register_type_strategy(Layout, st.builds(Layout, st.just(8), tensor=st.sampled_from([1, 2, 4])))
st.register_type_strategy(ServerLayout, st.builds(ServerLayout, tensor=st.sampled_from([1, 2])))
SPANS = st.tuples(st.builds(Segment, COUNTS, COUNTS, COUNTS))
REFS = st.builds(
    SampleRef, TEXT, COUNTS, COUNTS, COUNTS, COUNTS, st.floats(0, 1), st.just("stop"), SPANS,
    masked=st.tuples(st.builds(Masked, COUNTS, COUNTS, st.just("closing"))), limit=st.none() | COUNTS,
)  # fmt: skip
st.register_type_strategy(SampleRef, REFS)
LINES = st.dictionaries(TEXT, JSON, max_size=2)
PROBLEMS = st.builds(Problem, TEXT, TEXT, LINES, st.none() | TEXT, TEXT, st.none() | st.floats(0, 1))
st.register_type_strategy(Prompt, st.builds(Prompt, COUNTS, PROBLEMS, st.tuples(COUNTS, COUNTS)))


def value_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is messages.JsonValue:
        return JSON
    if inspect.isclass(annotation) and issubclass(annotation, WireMessage):
        return instances(annotation)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(value_of(argument) for argument in arguments))
    if origin is tuple and arguments[-1] is ...:
        return st.lists(value_of(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*(value_of(argument) for argument in arguments))
    if origin is dict:
        return st.dictionaries(TEXT, value_of(arguments[1]), max_size=2)
    if annotation is int:
        return COUNTS
    return TEXT if annotation is str else st.from_type(annotation)


@st.composite
def group_states(draw: st.DrawFn) -> GroupState:
    members = [draw(st.booleans()) for _ in range(draw(st.integers(0, 3)))]
    finished = [replace(draw(REFS), sample_index=index) for index, is_finished in enumerate(members) if is_finished]
    unfinished = [draw(fields_of(GenerationState)) | {"sample_index": n} for n, done in enumerate(members) if not done]
    return GroupState(
        prompt=draw(st.from_type(Prompt)),
        answers=len(members),
        limit=draw(st.none() | COUNTS),
        finished=tuple(finished),
        first_versions={str(index): draw(st.none() | COUNTS) for index in range(len(members))},
        generations=tuple(GenerationState(**fields) for fields in unfinished),
    )


@st.composite
def controller_states(draw: st.DrawFn) -> ControllerState:
    groups = draw(st.lists(group_states(), max_size=2))
    stored = [draw(REFS) for group in groups for _ in group.generations]
    fields = draw(fields_of(ControllerState, "groups", "generations"))
    return ControllerState(groups=tuple(groups), generations=tuple(stored), **fields)


def instances(kind: type[WireMessage]) -> st.SearchStrategy[WireMessage]:
    if kind is GroupState:
        return group_states()
    if kind is ControllerState:
        return controller_states()
    if kind is EvaluationRequest:
        return st.builds(EvaluationRequest, problems=POSITIVE, answers=POSITIVE, temperature=st.floats(0, 2))
    return fields_of(kind).map(lambda values: kind(**values))


def fields_of(kind: type[WireMessage], *without: str) -> st.SearchStrategy[dict[str, Any]]:
    chosen = {name: field for name, field in kind.model_fields.items() if name not in without}
    return st.fixed_dictionaries({name: value_of(field.annotation) for name, field in chosen.items()})


def is_same(one: Any, other: Any) -> bool:
    """Equal, where a NaN equals itself."""
    return json.dumps(one.model_dump(mode="json")) == json.dumps(other.model_dump(mode="json"))


SLOW: list[HealthCheck] = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_message_goes_through_json_and_back(kind: type[WireMessage]) -> None:
    @settings(max_examples=10, deadline=None, suppress_health_check=SLOW, database=None)
    @given(instances(kind))
    def check(message: WireMessage) -> None:
        read = kind.from_json(message.to_json())
        assert is_same(read, message) and type(read) is kind
        assert kind.from_json(read.to_json().encode()).to_json() == message.to_json()

    check()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_field_too_many_or_too_few_is_an_error_by_name(kind: type[WireMessage]) -> None:
    @settings(max_examples=3, deadline=None, suppress_health_check=SLOW, database=None)
    @given(instances(kind))
    def check(message: WireMessage) -> None:
        content = json.loads(message.to_json())
        with pytest.raises(MessageError, match=rf"^message {kind.__name__} has no field added_later; run"):
            kind.from_json(json.dumps({**content, "added_later": 1}))
        for name, field in kind.model_fields.items():
            if field.is_required():
                key = field.serialization_alias or name
                less = {other: value for other, value in content.items() if other != key}
                with pytest.raises(MessageError, match=rf"^message {kind.__name__} lacks its field {key}; run"):
                    kind.from_json(json.dumps(less))

    check()


def test_fields_within_fields_are_named_too_and_types_are_exact() -> None:
    ref = {"path": "a", "prompt_index": 0, "sample_index": 0, "prompt_length": 1, "answer_length": 1, "reward": 0.5}
    count = {"tokens": 1, "prompts": 1}
    state = {
        "stream": {"index": 1, "position": 1, "skipped": {}, "fingerprint": "f"},
        "groups": [],
        "accounting": {"sampled_tokens": 1, "taken": count, "dropped": {}, "carried": count},
        "store": "carried-00000001",
        "drafts": [{**ref, "stop_reason": "stop", "segments": [{"version": 0, "start": 0, "end": 1, "worker": 3}]}],
    }
    with pytest.raises(MessageError, match=r"ControllerState has no field drafts\.0\.segments\.0\.worker"):
        ControllerState.from_json(json.dumps(state))
    with pytest.raises(MessageError, match=r"RolloutRequest: field step is wrong: .*valid integer"):
        RolloutRequest.from_json('{"step": "1"}')
    with pytest.raises(MessageError, match="Invalid JSON"):
        RolloutRequest.from_json("Internal Server Error")
    assert math.isnan(update_messages.CanaryReport.from_json('{"largest": NaN, "mean": 0.0}').largest)


STRANGE: list[Any] = [
    None, True, -1, 0.5, 10**400, 1e308, math.nan, math.inf, "", "x", "\ud800", [], {}, [[]], [1, 1, 1], {"a": 1},
    {"model_type": "unheard"}, {"model_type": []}, {"model_type": "llama", "vocab_size": "many"},
]  # fmt: skip
CASES = settings(
    max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10,
    deadline=None,
    database=None,
    suppress_health_check=SLOW,
)


def places_in(content: Any) -> Iterator[tuple[Any, Any]]:
    """Containers within a JSON value, each with one of its keys."""
    keys = content.keys() if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from places_in(content[key])


@CASES
@given(st.data())
def test_whatever_comes_is_a_message_or_one_sentence(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(CLASSES))
    content = {"": json.loads(data.draw(instances(kind)).to_json())}
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(list(places_in(content))))
        container[key] = deepcopy(data.draw(st.sampled_from(STRANGE)))
    text = json.dumps(content[""])
    body = data.draw(
        st.sampled_from([text, text.encode(), text[: len(text) // 2], text + "x", "[" * 9999, b"\xff", ""])
    )
    try:
        kind.from_json(body).to_json()
    except MessageError as error:
        assert str(error).startswith(f"message {kind.__name__}") and "\n" not in str(error)


def test_a_model_of_another_version_is_named() -> None:
    terms = {"architecture": ARCH.model_dump() | {"model_type": "qwen9"}, "dtype": "bfloat16", "trainer": {"world": 1}}
    with pytest.raises(MessageError, match=r"field terms\.architecture is wrong: model_type='qwen9' is no model that"):
        update_messages.UpdateRequest.from_json(json.dumps({"version": 1, "terms": terms}))


def test_a_group_with_a_member_too_few_and_a_state_without_its_tokens_are_refused() -> None:
    prompt = {"index": 7, "problem": {"id": "a", "question": "q", "line": {}}, "token_ids": [1]}
    member = {"sample_index": 0, "parts": 1, "lost": 0, "state": None}
    group = {"prompt": prompt, "answers": 2, "limit": None, "finished": [], "born": {"0": 0}, "drafts": [member]}
    with pytest.raises(MessageError, match=r"the group of prompt 7 has 2 members, its parts are of \[0\]"):
        GroupState.from_json(json.dumps(group))
    count = {"tokens": 1, "prompts": 1}
    state = {
        "stream": {"index": 1, "position": 1, "skipped": {}, "fingerprint": "f"},
        "groups": [group | {"answers": 1}],
        "accounting": {"sampled_tokens": 1, "taken": count, "dropped": {}, "carried": count},
        "store": "carried-00000001",
        "drafts": [],
    }
    with pytest.raises(MessageError, match="0 unfinished generations are stored, the groups have 1"):
        ControllerState.from_json(json.dumps(state))


SCALARS = {str, int, float, bool, bytes, None, type(None)}
OWN_VALUES = {"Generation", "Sampling", "Ending", "StopReason", "Reception", "SamplingRequest", "Frame"}
"""Values of the controller itself; `vllm_format.py` and `token_frames.py` write and read them."""


def annotations_of(function: Any) -> Iterator[Any]:
    own_types = {parameter.__name__: parameter for parameter in function.__type_params__}
    hints = typing.get_type_hints(function, localns=own_types)
    parameters = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    assert {*parameters, "return"} <= hints.keys(), f"{function.__qualname__} has a parameter without a type"
    yield from (hints[name] for name in (*parameters, "return"))


def untyped_parts(annotation: Any, names: set[str]) -> list[Any]:
    """Parts of a type that are neither messages nor plain scalars, nor containers and callables of them."""
    arguments = typing.get_args(annotation)
    if isinstance(annotation, list):
        return [part for argument in annotation for part in untyped_parts(argument, names)]
    if isinstance(annotation, typing.TypeVar):
        return [] if annotation.__bound__ is WireMessage else [annotation]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return []
    if origin is dict or annotation in (dict, Any, object):
        return [annotation]
    if arguments:
        return [part for argument in arguments if argument is not ... for part in untyped_parts(argument, names)]
    known = annotation in SCALARS or getattr(annotation, "__name__", "") in names
    return [] if known or (inspect.isclass(annotation) and issubclass(annotation, WireMessage)) else [annotation]


@pytest.mark.parametrize("owner", [ControllerClient, ServerAdmin, ServerClient, JsonConnection])
def test_what_crosses_between_processes_is_typed(owner: type) -> None:
    own = OWN_VALUES if owner is ServerClient else set()
    methods = [m for n, m in vars(owner).items() if inspect.isfunction(m) and n not in ("__init__", "_need_success")]
    assert methods
    for method in methods:
        for annotation in annotations_of(method):
            if method.__name__ != "_reading":
                assert not untyped_parts(annotation, own), f"{method.__qualname__}: {annotation}"


def test_every_route_has_a_handler_of_its_classes() -> None:
    from gspo_megatron.controller import api
    from gspo_megatron.controller.controller import Controller
    from gspo_megatron.controller.weight_update import WeightUpdater

    class Parts:
        def __getattr__(self, name: str) -> Any:
            return getattr(Controller, name)

        updater = WeightUpdater

    bound = api.endpoints(Parts())  # type: ignore[arg-type]
    assert [endpoint.route for endpoint in bound] == list(routes.ROUTES)
    for endpoint in bound:
        hints = typing.get_type_hints(endpoint.handler)
        result = hints.pop("return")
        assert list(hints.values()) == [endpoint.route.request] and result is endpoint.route.response, endpoint.route


def test_vllms_workers_answer_with_messages() -> None:
    tree = ast.parse((ROOT / "gspo_megatron/inference/vllm_worker.py").read_text())
    [extension] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "WorkerExtension"]
    names = {kind.__name__ for kind in CLASSES}
    for method in extension.body:
        if isinstance(method, ast.FunctionDef):
            assert [argument.arg for argument in method.args.args] == ["self"]
            returned = ast.unparse(method.returns) if method.returns else ""
            decorators = [ast.unparse(decorator) for decorator in method.decorator_list]
            assert (returned in names and decorators == ["as_text"]) or returned in ("str", "None"), method.name


def test_the_readme_lists_every_route_with_its_classes() -> None:
    text = Path(ROOT / "gspo_megatron/controller/README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| `GET", "| `POST"))]
    named = [[cell.strip().strip("`") for cell in row.split("|")[1:4]] for row in rows]
    assert named == [
        [f"{route.method} {route.path}", route.request.__name__, route.response.__name__] for route in routes.ROUTES
    ]
