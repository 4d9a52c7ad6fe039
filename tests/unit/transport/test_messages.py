"""Every message class goes through JSON and back, and no field is ignored, guessed or left untyped."""

from __future__ import annotations

import ast
import inspect
import json
import math
import types
import typing
from collections.abc import Iterator
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
from gspo_megatron.transport.messages import ControllerState, RolloutRequest
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
PROBLEMS = st.builds(Problem, TEXT, TEXT, st.dictionaries(TEXT, JSON, max_size=2), TEXT, st.none() | st.floats(0, 1))
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


def instances(kind: type[WireMessage]) -> st.SearchStrategy[WireMessage]:
    fields = {name: value_of(field.annotation) for name, field in kind.model_fields.items()}
    return st.fixed_dictionaries(fields).map(lambda values: kind(**values))


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


SCALARS = {str, int, float, bool, bytes, None, type(None)}
OWN_VALUES = {"Generation", "Sampling", "GenerationChunk", "StopReason"}
"""Values of the controller itself; `vllm_format.py` writes and reads them in vLLM's formats."""


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
