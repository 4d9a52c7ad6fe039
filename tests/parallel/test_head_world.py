"""The log-prob head over two vocabulary-parallel ranks against a full log-softmax in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.world import run_world

CASES = [
    {"dtype": dtype, "temperature": temperature, "chunk": chunk, "buffer": buffer}
    for dtype, temperature, chunk, buffer in [
        ("float32", 1.0, 64, False),
        ("float32", 0.6, 7, True),
        ("float32", 0.6, 1, True),
        ("float32", 0.6, 41, True),
        ("float64", 0.6, 13, True),
    ]
]
TOLERANCE = {"float32": 2e-6, "float64": 1e-13}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("head")
    generator = torch.Generator().manual_seed(5)
    data = {
        "hidden": torch.randn(41, 32, generator=generator),
        "weight": 0.5 * torch.randn(96, 32, generator=generator),
        "targets": torch.randint(0, 96, (41,), generator=generator),
        "coefficients": torch.randn(41, generator=generator),
    }
    torch.save(data, directory / "data.pt")
    run_world("head_worker.py", 2, CASES, directory)
    return directory


@pytest.mark.parametrize("index", range(len(CASES)))
def test_head_equals_the_full_softmax(directory: Path, index: int) -> None:
    case, data = CASES[index], torch.load(directory / "data.pt", weights_only=True)
    hidden, weight = data["hidden"].double().requires_grad_(), data["weight"].double().requires_grad_()
    whole = torch.log_softmax(hidden @ weight.T / case["temperature"], dim=-1)
    wanted = whole.gather(1, data["targets"][:, None])[:, 0]
    (wanted * data["coefficients"]).sum().backward()
    entropy = -(whole.exp() * whole).sum(-1)
    found = torch.load(directory / f"head_{index}.pt", weights_only=True)
    for name, value in (("logprobs", wanted), ("entropy", entropy), ("hidden", hidden.grad), ("weight", weight.grad)):
        assert value is not None
        error = (found[name].double() - value).abs().max() / value.abs().max()
        assert error <= TOLERANCE[case["dtype"]], f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_the_gradient_does_not_depend_on_the_chunk(directory: Path, name: str) -> None:
    """Chunks of 7, 1 and all 41 tokens."""
    found = [torch.load(directory / f"head_{index}.pt", weights_only=True)[name].double() for index in (1, 2, 3)]
    assert max(float((other - found[0]).norm() / found[0].norm()) for other in found[1:]) <= 1e-6
