"""A reward that runs the tests of a problem on the Python code of a response, in a sandbox.

gspo train RECIPE reward.name=recipes/rewards/unit_tests.py:score data.path=problems.jsonl

A line of the data: {"prompt": "Write a function add(a, b).", "answer": "", "tests": ["assert add(1, 2) == 3"]}

Code and tests share a process: a response that was trained to look for the tests can forge a result. Compare the
output of programs instead where that matters.
"""

import json
import re
import secrets

from gspo_megatron.rewards.sandbox import Limits, run_code

LIMITS = Limits(seconds=5, wall_seconds=30, memory_bytes=1 << 30)
RUNNER = """
import json
code, tests, mark = json.loads({given!r})
space = {{"__name__": "response"}}
exec(compile(code, "response.py", "exec"), space)
for number, test in enumerate(tests):
    try:
        exec(test, dict(space))
    except Exception:
        continue
    print(mark, number, flush=True)
"""


def score(problem, response):
    """The share of the tests that pass, and whether the code ended by itself."""
    code = find_code(response.answer)
    tests = list(problem["tests"])
    mark = secrets.token_hex(16)
    outcome = run_code(RUNNER.format(given=json.dumps([code, tests, mark])), LIMITS)
    passed = {line.removeprefix(mark) for line in outcome.output.splitlines() if line.startswith(mark)}
    return {"passed": len(passed) / max(len(tests), 1), "_ended": float(not outcome.stopped and outcome.code >= 0)}


def find_code(answer):
    """The last block of Python, or the whole answer."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", answer, flags=re.DOTALL)
    return blocks[-1] if blocks else answer
