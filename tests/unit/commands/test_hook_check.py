"""`gspo check`: every example fits its hook; wrong objects are refused, each in its own sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.cli import main
from gspo_megatron.config.hooks import HOOKS, Hook
from tests.places import ROOT


@pytest.mark.parametrize("hook", HOOKS.values(), ids=lambda hook: hook.name)
def test_the_example_of_every_hook_is_recognised_and_fits(
    hook: Hook, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["check", hook.example]) == 0
    first, *checked = capsys.readouterr().out.splitlines()
    assert first == f"{hook.example} fits the hook {hook.name}: set {hook.key}={hook.example}"
    assert checked


REWARDS = {
    "score = 3": "is a int; name a function",
    "class score:\n    pass": "is the class score",
    "def score(problem): return 1": "cannot be called as score(problem, response)",
    "def score(problem, response, tests): return 1": "missing a required argument: 'tests'",
    "def score(problem, response, *, tests): return 1": "missing a required keyword-only argument: 'tests'",
    "def score(problem, response): yield 1": "is a generator",
    "def score(problem, response): return None": "returned None",
    "def score(problem, response): return '1'": "returned a str",
    "def score(problem, response): return [1.0]": "returned a list",
    "def score(problem, response): return float('nan')": "returned nan, which is not finite",
    "def score(problem, response): return {}": "returned no part",
    "def score(problem, response): return {'a b': 1}": "a part named 'a b'",
    "def score(problem, response): return {'right': None}": "returned None for part 'right'",
    "def score(problem, response): return {response.text[:1] or 'x': 1}": "a part named",
    "def score(problem, response): return {'short' if len(response.text) < 9 else 'long': 1}": "other parts",
    "def score(problem, response): return 1 / len(response.text)": "raised ZeroDivisionError",
    "def score(problem, response): return float(response.answer)": "raised ValueError: could not convert",
    "def score(problem, response): problem['answer'] = 'x'; return 1": "changed the problem",
    "def score(problem, response): raise SystemExit": "raised SystemExit",
    "async def late(): return 1\ndef score(problem, response): return late()": "define it with `async def`",
    "async def score(problem, response): return None": "returned None",
    "import nothing_of_this_name": "cannot be imported (ModuleNotFoundError",
    "other = 1": "holds no score",
    "def score(problem, response, /, *, low=0): return response": "returned a RewardInput",
    "def score(problem, response): raise ValueError('no\\nreturn')": "raised ValueError: no return (line 1)",
    "def score(problem, response): raise RuntimeError(KEY)\nimport os; KEY = os.environ['MY_API_KEY']": "Error: ***",
    "import os\ndef score(problem, response): print(os.environ['MY_API_KEY']); return 1": "printed the value of an env",
    "class Own:\n    def __call__(self, problem): return 1\nscore = Own()": "cannot be called as score(problem, resp",
    "class Own:\n    async def __call__(self, problem, response): return None\nscore = Own()": "returned None",
    "def score(problem, response): response.text = ''; return 1": "raised FrozenInstanceError",
    "def score(problem, response): return 10 ** 400": "returned inf, which is not finite",
    "def score(problem, response): return 1 + 2j": "returned a complex",
    "def score(problem, response): exec('x = 1 ' * 9)": "raised SyntaxError",
    "def score(problem, response): return score(problem, response)": "raised RecursionError",
}


@pytest.mark.parametrize("code", REWARDS)
def test_a_wrong_reward_is_refused_in_a_sentence(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-123456")
    file = tmp_path / "wrong.py"
    file.write_text(code)
    assert main(["check", f"{file}:score", "--hook", "reward"]) == 2
    error = capsys.readouterr().err
    assert REWARDS[code] in error and "Traceback" not in error and "sk-123456" not in error
    assert all(line.startswith(f"{file}:score: ") for line in error.splitlines() if line != "***"), error


RULES = {
    "rule = 3": "is a int",
    "async def rule(terms): return terms": "is `async def`, and nothing awaits it in a hook trust",
    "def rule(terms, low): return None": "cannot be called as rule(terms)",
    "def rule(terms): return terms.ratio": "returned Tensor; return terms.surrogate",
    "def rule(terms): return terms.surrogate(terms.ratio.mean())": "objective of shape []",
    "def rule(terms): return terms.surrogate(terms.ratio.detach())": "without gradient",
    "def rule(terms): return terms.surrogate(terms.ratio * 0)": "gradient is 0",
    "def rule(terms): return terms.surrogate(terms.ratio / 0)": "not finite",
    "def rule(terms): return terms.surrogate(terms.ratio, terms.ratio)": "returned low as torch.float64",
    "def rule(terms): return terms.surrogate(terms.nothing)": "raised AttributeError",
}


@pytest.mark.parametrize("code", RULES)
def test_a_wrong_trust_rule_is_refused_in_a_sentence(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(code)
    assert main(["check", f"{file}:rule", "--hook", "trust"]) == 2
    assert RULES[code] in capsys.readouterr().err


SINKS = {
    "async def sink(run): ...": "is `async def`, and nothing awaits it in a hook sink",
    "class sink:\n    def __init__(self, run): ...\n    async def write(self, step, row): ...": "write is `async def`",
    "class Own:\n    async def write(self, step, row): ...\ndef sink(run): return Own()": "it is `async def`; write",
    "sink = 3": "is a int; name a class or function that takes a SinkRun",
    "def sink(): ...": "is called with one SinkRun",
    "class sink:\n    def __init__(self, run): ...\n    def write(self, step, row): ...": "has no method close",
    "class sink:\n    def __init__(self, run): ...\n    def close(self): ...": "has no method write",
    "def sink(run): return None": "write(1, {'loss': 0.5, 'experts/load_entropy': 1.0}) raised AttributeError",
    "def sink(run): raise SystemExit(3)": "making it raised SystemExit: 3",
}


@pytest.mark.parametrize("code", SINKS)
def test_a_wrong_sink_is_refused_in_a_sentence(code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(code)
    assert main(["check", f"{file}:sink", "--hook", "sink"]) == 2
    assert SINKS[code] in capsys.readouterr().err


def test_a_function_that_makes_a_sink_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "class Rows:\n    def write(self, step, row): ...\n    def close(self): ...\ndef rows(run): return Rows()"
    )
    assert main(["check", f"{file}:rows"]) == 0
    assert "fits the hook sink: set metrics.sinks=" in capsys.readouterr().out


def test_a_field_that_the_sample_line_lacks_is_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(problem, response): return len(problem['tests'])")
    assert main(["check", f"{file}:score"]) == 0
    assert "reads problem['tests'], which the sample line lacks: give a recipe" in capsys.readouterr().out


def test_a_reward_is_tried_with_the_data_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, file = tmp_path / "data.jsonl", tmp_path / "mine.py"
    data.write_text("".join(f'{{"prompt": "p{i}", "tests": [{i}]}}\n' for i in range(9)))
    recipe = [str(ROOT / "recipes/tiny_moe.yaml"), "data.source=jsonl", "data.task=null", "data.options={}"]
    recipe += [f"data.path={data}", "data.held_out=2", f"reward.name={file}:score", "reward.answer_marker=null"]
    file.write_text("def score(problem, response): return len(problem['tests'])")
    assert main(["check", f"{file}:score", *recipe]) == 0
    assert "scored 15 sample responses from 1 to 1" in capsys.readouterr().out
    parts = tmp_path / "parts.py"
    parts.write_text("def score(problem, response): return {'right': 0.5, '_length': 300}")
    weighs = [*recipe, f"reward.name={parts}:score"]
    assert main(["check", f"{parts}:score", *weighs, "reward.weights={right: 4}", "reward.bounds=[0, 2]"]) == 0
    said = capsys.readouterr().out
    assert "from 2 to 2" in said and "parts: right; " in said and "measured, not rewarded: _length" in said
    assert "are clipped" not in said
    assert main(["check", f"{parts}:score", *weighs, "reward.weights={other: 1}"]) == 2
    assert "reward.weights names other, the reward returned right" in capsys.readouterr().err
    chance = tmp_path / "chance.py"
    chance.write_text("calls = []\ndef score(problem, response): calls.append(1); return len(calls) % 2")
    assert main(["check", f"{chance}:score", *recipe, f"reward.name={chance}:score"]) == 0
    assert "scored one response twice, and differently" in capsys.readouterr().out
    measures = tmp_path / "measures.py"
    measures.write_text("def score(problem, response): return {'_length': 300}")
    assert main(["check", f"{measures}:score", *recipe, f"reward.name={measures}:score"]) == 2
    assert "returned only parts that are measured" in capsys.readouterr().err
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def score(problem, response): return problem['answer']")
    assert main(["check", f"{wrong}:score", *recipe]) == 2
    assert "reads problem['answer']; the lines of the data have prompt, tests" in capsys.readouterr().err


def test_an_object_that_can_be_called_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Own:\n    def __call__(self, problem, response): return 1\nscore = Own()")
    assert main(["check", f"{file}:score"]) == 0
    assert "fits the hook reward" in capsys.readouterr().out


def test_what_a_reward_prints_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("print('import')\ndef score(problem, response): print('call'); return 1")
    assert main(["check", f"{file}:score"]) == 0
    said = capsys.readouterr()
    assert "import\ncall\n" in said.err and "import" not in said.out and "call" not in said.out


def test_an_object_of_no_kind_is_refused_with_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def step(): return 1")
    assert main(["check", f"{file}:step"]) == 2
    assert "is none of the hooks: reward (score(problem, response)" in capsys.readouterr().err


def test_an_objective_of_another_type_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text("MINE = {'trust': 'clip'}")
    assert main(["check", f"{file}:MINE", "--hook", "objective"]) == 2
    assert "is a dict; name an ObjectiveSpec" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)", "sys.exit('no')"])
@pytest.mark.parametrize(
    ("hook", "head"),
    [
        ("reward", "def f(problem, response):"), ("rendering", "def f(line, chat):"),
        ("source", "def f(split, seed, start):"), ("trust", "def f(terms):"), ("sink", "def f(run):"),
        ("environment", "class f:\n  def step(self, state, turn): pass\n  def reset(self, line):"),
    ],
)  # fmt: skip
def test_code_that_ends_python_is_a_fault_of_every_hook(
    hook: str, head: str, end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the end of the command, with the exit code of somebody else's."""
    (tmp_path / "mine.py").write_text(f"import os, sys\n\n{head}\n    {end}\n")
    assert main(["check", f"{tmp_path}/mine.py:f", "--hook", hook]) == 2
    assert "SystemExit" in capsys.readouterr().err
