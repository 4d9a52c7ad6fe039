"""Check that the objective's tests detect faults that other implementations shipped.

Each fault is a small edit of a copy of the package. The tests run on the copy until the first one fails. Prints a table
and exits with 1 if a fault is not detected, or if the copy without a fault fails.

    python tools/planted_faults_objective.py [WORD ...]     only faults with one of the words in their name
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from token_advantage_faults import CRITIC_FAULTS, TEACHER_FAULTS

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "critic", "distillation", "fixtures", "fixtures_mismatch", "advantages", "inputs", "invariance", "metrics",
    "oracle",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One edit of one file of gspo_megatron/objective."""

    name: str
    file: str
    correct: str
    """Text that stands there exactly once."""
    planted: str


FAULTS = (
    *(Fault(*row) for row in (*CRITIC_FAULTS, *TEACHER_FAULTS)),
    Fault(
        "sequences of this micro-batch as denominator",
        "loss.py",
        "sequences, tokens = max(inputs.totals.sequences, 1)",
        "sequences, tokens = max(len(inputs.cu_seqlens) - 1, 1)",
    ),
    Fault(
        "trained tokens of this rank as denominator",
        "loss.py",
        ", max(inputs.totals.tokens, 1)",
        ", max(int(packed.mask.sum()), 1)",
    ),
    Fault(
        "mean of means for a token mean",
        "loss.py",
        "return 1.0 / tokens\n",
        "return packed.spread(1.0 / (packed.num_tokens.clamp(min=1) * sequences))\n",
    ),
    Fault(
        "token mean for a sequence mean",
        "loss.py",
        "return packed.spread(1.0 / (packed.num_tokens.clamp(min=1) * sequences))",
        "return 1.0 / tokens",
    ),
    Fault(
        "|y| counted after a correction",
        "loss.py",
        "objective = objective * factor\n",
        "objective = objective * factor * packed.spread(\n"
        "            packed.num_tokens / packed.totals((factor != 0).double()).clamp(min=1))\n",
    ),
    Fault("|y| of this context-parallel rank", "packed.py", "sum_over_context(local.clone())", "local.clone()"),
    Fault(
        "mean log-ratio of this context-parallel rank", "packed.py", "return self.sum_over_context(sums)", "return sums"
    ),
    Fault(
        "clip on the wrong side",
        "trust.py",
        "low = (terms.advantages < 0) & (terms.ratio < 1 - terms.spec.clip_low)\n"
        "    high = (terms.advantages > 0) & (terms.ratio > 1 + terms.spec.clip_high)",
        "low = (terms.advantages > 0) & (terms.ratio < 1 - terms.spec.clip_low)\n"
        "    high = (terms.advantages < 0) & (terms.ratio > 1 + terms.spec.clip_high)",
    ),
    Fault(
        "clip whatever the sign of the advantage",
        "trust.py",
        "low = (terms.advantages < 0) & (terms.ratio < 1 - terms.spec.clip_low)",
        "low = terms.ratio < 1 - terms.spec.clip_low",
    ),
    Fault(
        "difference of sums, in float32",
        "loss.py",
        "log_s = packed.means(log_ratio)",
        "log_s = torch.zeros_like(packed.num_tokens, dtype=torch.float32)\n"
        "    log_s = log_s.index_add(0, packed.sequence, current.detach().float()) - log_s.index_add(\n"
        "        0, packed.sequence, base.float())\n"
        "    log_s = packed.sum_over_context(log_s.double()) / packed.num_tokens.clamp(min=1)",
    ),
    Fault(
        "log-probs rounded to bfloat16",
        "loss.py",
        "packed.trained(inputs.logprobs)",
        "packed.trained(inputs.logprobs.bfloat16())",
    ),
    Fault(
        "log-probs in 16 bits accepted",
        "inputs.py",
        "not in (torch.float32, torch.float64)",
        "not in (torch.float32, torch.float64, torch.float16, torch.bfloat16)",
    ),
    Fault("a gradient through the detached mean", "packed.py", "self.trained(values.detach())", "self.trained(values)"),
    Fault(
        "unnormalised sequence ratio",
        "packed.py",
        "return self.totals(values) / self.num_tokens.clamp(min=1)",
        "return self.totals(values)",
    ),
    Fault(
        "std of a group without variance",
        "advantages.py",
        "flat = equal_groups(values, group, num_groups)[group]",
        "flat = torch.zeros_like(values, dtype=torch.bool)",
    ),
    Fault("sample standard deviation by default", "advantages.py", "ddof: int = 0", "ddof: int = 1"),
    Fault(
        "loss mask shifted by one token",
        "loss.py",
        "Packed.of(inputs.loss_mask,",
        "Packed.of(inputs.loss_mask.roll(1),",
    ),
    Fault("padding counted in |y|", "packed.py", "mask.double())", "torch.ones_like(mask).double())"),
    Fault(
        "garbage at untrained positions multiplied by 0",
        "packed.py",
        "torch.where(self.mask, values.double(), 0.0)",
        "values.double() * self.mask",
    ),
    Fault("first token of a sequence given to the one before", "packed.py", "right=True", "right=False"),
    Fault(
        "a gradient through CISPO's weight",
        "trust.py",
        "terms.ratio.detach().clamp(max=terms.spec.ratio_cap)",
        "terms.ratio.clamp(max=terms.spec.ratio_cap)",
    ),
    Fault(
        "band rounded to float32",
        "trust.py",
        "1 + terms.spec.clip_high, terms.ratio)",
        "float(torch.tensor(1 + terms.spec.clip_high)), terms.ratio)",
    ),
    Fault("dual clip read but not applied", "trust.py", "torch.where(worst, ", "torch.where(worst & False, "),
    Fault(
        "OPSM by token, not by sequence",
        "correction.py",
        "packed.spread(packed.means(sampler - current) > spec.opsm_delta)",
        "(sampler - current > spec.opsm_delta)",
    ),
    Fault(
        "trust region left by one token only",
        "correction.py",
        "packed.spread(packed.totals(outside.double()) > 0), 0.0",
        "outside, 0.0",
    ),
    Fault(
        "trust region around the old policy",
        "correction.py",
        "(current - sampler).detach().square() / 2",
        "(old - sampler).detach().square() / 2",
    ),
    Fault("the token itself in its prefix", "prefix.py", "least = _earlier(least, sequence, beyond, 1)\n", ""),
    Fault("prefix of the sequence before", "prefix.py", "torch.where(source == sequence, moved, beyond)", "moved"),
    Fault(
        "untrained tokens in the prefix",
        "prefix.py",
        "torch.where(packed.mask, log_ratio.detach().double(), beyond)",
        "log_ratio.detach().double()",
    ),
    Fault("no end to the line from the sampler", "loss.py", "behind / (behind + 1)", "behind"),
    Fault("line from the current policy to the sampler", "loss.py", "behind / (behind + 1)", "1 / (behind + 1)"),
    Fault(
        "a gradient through the interpolated policy",
        "loss.py",
        "* (current.detach() - sampler)",
        "* (current - sampler)",
    ),
    Fault("weight of the recomputed policy", "loss.py", "current, proximal, sampler", "current, old, sampler"),
    Fault(
        "groups in the normalisation of the batch",
        "advantages.py",
        'group_ids, normalize = torch.zeros_like(group_ids), "std"',
        'normalize = "std"',
    ),
    Fault(
        "veto seen by one token only",
        "correction.py",
        "packed.spread(packed.totals((k < spec.veto_below).double()) > 0)",
        "(k < spec.veto_below)",
    ),
    Fault(
        "divergence rewarded, not charged",
        "loss.py",
        "objective - spec.kl_coefficient",
        "objective + spec.kl_coefficient",
    ),
    Fault(
        "clip fraction of sequences weighed by tokens",
        "metrics.py",
        "(fraction * low).sum()",
        "low.sum(dtype=torch.float64) / mask.sum().clamp(min=1) * packed.local_share().sum()",
    ),
    Fault(
        "ratio against the sampler ignored",
        "loss.py",
        'if spec.ratio_reference == "recomputed" or',
        "if True or",
    ),
)


def main(words: list[str]) -> int:
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    # Torch once, before the forks; the package only in each fork, from its own copy.
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    survivors = 0
    print(f"| {'planted fault':56} | first red test\n|{'-' * 58}|{'-' * 60}", flush=True)
    for fault in (None, *chosen):
        started = time.monotonic()
        red = first_red_test(fault)
        name = fault.name if fault else "(none)"
        said = red or ("all green" if fault is None else "SURVIVED: every test is green")
        print(f"| {name:56} | {said}  ({time.monotonic() - started:.0f} s)", flush=True)
        survivors += (red is None) == (fault is not None)
    print(f"{len(chosen)} faults, {survivors} rows are not as they should be")
    return 1 if survivors else 0


def first_red_test(fault: Fault | None) -> str | None:
    """The first test that fails on a copy of the package with the fault in it."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for part in ("gspo_megatron", "tests", "recipes"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        if fault is not None:
            plant(fault, copy / "gspo_megatron" / "objective" / fault.file)
        child = os.fork()
        if child == 0:
            os._exit(run_tests(copy))
        os.waitpid(child, 0)
        return (copy / "red").read_text() or None


def plant(fault: Fault, file: Path) -> None:
    text = file.read_text()
    if text.count(fault.correct) != 1:
        raise SystemExit(
            f"fault {fault.name!r}: {fault.file} holds its text {text.count(fault.correct)} times, not once"
        )
    file.write_text(text.replace(fault.correct, fault.planted))


def run_tests(copy: Path) -> int:
    """In the fork: run the tests of a copy, leave the first red one's name in `copy`/red."""
    import hypothesis
    import pytest

    # The first red test is wanted, not its smallest case.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("first-red", phases=phases, database=None)
    hypothesis.settings.load_profile("first-red")

    class FirstRed:
        name = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not self.name:
                self.name = report.nodeid.split("/")[-1]

    os.chdir(copy)
    sys.path.insert(0, str(copy))
    watcher = FirstRed()
    files = [f"tests/unit/objective/test_{name}.py" for name in TESTS]
    options = ["-x", "-q", "-c", os.devnull, f"--rootdir={copy}", "--import-mode=importlib", "-p", "no:cacheprovider"]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        code = int(pytest.main([*options, *files], plugins=[watcher]))
    (copy / "red").write_text(watcher.name or ("" if code == 0 else f"pytest ended with code {code}"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
