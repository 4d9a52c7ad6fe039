"""A number in a file of problems is the gold that scores, as it was written: through file, problem and pipe."""

from __future__ import annotations

import pickle
import random
from fractions import Fraction
from pathlib import Path

from gspo_megatron.config.task_sections import DataSection
from gspo_megatron.data.problems import open_problems
from gspo_megatron.rewards import mathematics
from tests.unit.rewards.fuzz_cases import CASES


def write_number(draw: random.Random) -> str:
    """A number as JSON allows it: small and large, with zeros at its end, with an exponent of any spelling."""
    sign, digits = draw.choice(("", "-")), str(draw.randrange(1, 10 ** draw.randrange(1, 19)))
    power = f"{draw.choice('eE')}{draw.choice(('', '+', '-'))}{draw.randrange(0, 250)}"
    forms = (
        digits,
        f"{digits}.{draw.randrange(10**5)}0",
        f"0.{'0' * draw.randrange(8)}{digits}",
        f"{digits[0]}.{digits[1:] or 0}{power}",
        f"{digits[0]}{power}",
        "0.0",
    )
    return sign + draw.choice(forms)


def test_a_number_keeps_its_text_to_the_score(tmp_path: Path) -> None:
    written = {f"p{seed}": write_number(random.Random(f"path/{seed}")) for seed in range(CASES)}
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f'{{"prompt": "{name}", "answer": {text}}}\n' for name, text in written.items()))
    source = open_problems(DataSection(path=file, held_out=1))
    drawn = [*source.held_out, *(source.draw("training", 0, place) for place in range(source.span))]
    problems = {problem.question: problem for problem in pickle.loads(pickle.dumps(drawn)) if problem}
    assert set(problems) == set(written)
    for name, text in written.items():
        gold = problems[name].answer
        assert gold == text == str(problems[name].line["answer"])
        assert mathematics.score(gold, f"\\boxed{{{text}}}") == 1.0, text
        exact = Fraction(text)
        assert (
            mathematics.score(gold, f"\\boxed{{{exact.numerator}/{exact.denominator}}}") == 1.0
            or len(str(exact)) > 1000
        )
        other = exact * Fraction(10001, 10000) if exact else Fraction(1, 100)
        wrong = f"\\boxed{{{other.numerator}/{other.denominator}}}"
        assert mathematics.score(gold, wrong) == 0.0, (text, wrong)
