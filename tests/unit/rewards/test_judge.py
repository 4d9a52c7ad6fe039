"""The judge of a reward against a server on loopback: what it answers, refuses, delays and garbles; what is counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gspo_megatron import model_requests
from gspo_megatron.cli import main
from gspo_megatron.config.judge_section import JudgeSection
from gspo_megatron.config.loading import RecipeError
from gspo_megatron.controller.loop_pool import LoopPool
from gspo_megatron.controller.process_pool import describe_error
from gspo_megatron.controller.scoring import make_scoring_pool
from gspo_megatron.models import load_recipe
from gspo_megatron.plan.run_plan import check
from gspo_megatron.rewards import AsyncScorer, judge, make_scorer
from gspo_megatron.rewards.judge import Inquiry, Judge, JudgeFailed
from gspo_megatron.rewards.reward_input import RewardInput
from gspo_megatron.types import Problem
from tests.places import ROOT

KEY = "sk-test-0123456789"
MESSAGES = [{"role": "user", "content": "How good?"}]
Reply = web.Response | Callable[[web.Request], Awaitable[web.Response]]


def completion(text: object, usage: object = (7, 3)) -> web.Response:
    counts = (
        dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True)) if isinstance(usage, tuple) else usage
    )
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return web.json_response({"choices": [choice], **({"usage": counts} if counts else {})})


@dataclass
class Server:
    """Gives its replies in order, the last one for ever."""

    replies: list[Reply]
    seen: list[tuple[dict[str, Any], str | None]] = field(default_factory=list)
    now: int = 0
    most: int = 0

    async def serve(self, request: web.Request) -> web.StreamResponse:
        assert request.path == "/v1/chat/completions"
        self.seen.append((await request.json(), request.headers.get("Authorization")))
        self.now += 1
        self.most = max(self.most, self.now)
        reply = self.replies[min(len(self.seen), len(self.replies)) - 1]
        try:
            # A response object can be sent once.
            return await reply(request) if callable(reply) else web.Response(
                body=reply.body, status=reply.status, headers=reply.headers
            )  # fmt: skip
        finally:
            self.now -= 1

    async def run(self, work: Callable[[str], Awaitable[Any]]) -> Any:
        application = web.Application()
        application.router.add_post("/{path:.*}", self.serve)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            return await work(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
        finally:
            await runner.cleanup()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited between attempts."""
    made: list[float] = []

    async def note(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr(model_requests, "_pause", note)
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    return made


def ask(
    server: Server, work: Callable[[Inquiry], Awaitable[Any]] | None = None, **section: Any
) -> tuple[Any, dict[str, float]]:
    """The result of one inquiry, and what it used."""

    async def go(url: str) -> tuple[Any, dict[str, float]]:
        made = Judge(JudgeSection(url=url, model="m", key_variable="TEST_JUDGE_KEY", **section))
        async with made.open() as inquiry:
            result = await (work(inquiry) if work else inquiry.grade(MESSAGES, 0, 10))
        return result, {name.removeprefix("_judge_"): value for name, value in inquiry.parts()}

    return asyncio.run(server.run(go))


def test_a_request_holds_what_the_recipe_says_and_the_key_is_sent(pauses: list[float]) -> None:
    server = Server([completion("Score: 7")])
    grade, used = ask(server, options={"temperature": 0}, prompt_price=2.0, answer_price=10.0)
    assert (grade, pauses) == (7.0, [])
    assert server.seen == [({"model": "m", "messages": MESSAGES, "temperature": 0}, f"Bearer {KEY}")]
    assert used == {"requests": 1, "retries": 0, "prompt_tokens": 7, "answer_tokens": 3, "unmetered": 0,
                    "cost": (7 * 2 + 3 * 10) / 1e6}  # fmt: skip


GRADES = {
    "Score: 7": 7.0,
    "score : 7.5.": 7.5,
    '{"score": 7, "why": "fine"}': 7.0,
    "Score: 3. No, on second thought:\n**Score:** 8": 8.0,
    "<think>Score: 1</think>Score: 9/10": 9.0,
    "Grade = 0": 0.0,
    "Rating: **4**": 4.0,
    " 6\n": 6.0,
    "6/10": 6.0,
}


@pytest.mark.parametrize("text", GRADES)
def test_a_grade_is_read(text: str, pauses: list[float]) -> None:
    assert ask(Server([completion(text)]))[0] == GRADES[text]


WRONG_GRADES = {
    "Score: 11": "the grade Score: 11 is outside 0 to 10",
    "Score: -1": "is outside 0 to 10",
    "Score: 7/100": "the grade Score: 7/100 is outside",
    "Score: 7,5": "holds no grade",
    "Score: high": "holds no grade: Score: high",
    "I like it, 10 of 10": "holds no grade",
    "<think>Score: 7": "holds no grade",
    "nan": "holds no grade",
}


@pytest.mark.parametrize("text", WRONG_GRADES)
def test_another_grade_is_no_score_and_is_not_asked_for_again(text: str, pauses: list[float]) -> None:
    server = Server([completion(text)])
    with pytest.raises(JudgeFailed) as failed:
        ask(server)
    assert WRONG_GRADES[text] in str(failed.value) and len(server.seen) == 1


BUSY = {
    "429": web.Response(status=429, headers={"Retry-After": "7"}),
    "503": web.Response(status=503, text="loading"),
    "half a JSON": web.Response(text='{"choices": ['),
    "a page": web.Response(text="<html>"),
    "no choice": web.json_response({"choices": []}),
    "deep": web.Response(text="[" * 100_000),
}


@pytest.mark.parametrize("name", BUSY)
def test_a_busy_server_is_asked_again(name: str, pauses: list[float]) -> None:
    grade, used = ask(Server([BUSY[name], BUSY[name], completion("Score: 7")]))
    assert (grade, used["requests"], used["retries"]) == (7.0, 3, 2)
    if name == "429":
        assert pauses == [7.0, 7.0], "what the server asks for"
    else:
        assert 0.5 <= pauses[0] <= 1.5 and 1.0 <= pauses[1] <= 3.0, "longer and longer"


def test_errors_for_ever_end(pauses: list[float]) -> None:
    server = Server([web.Response(status=500, text=f"out of memory\n{KEY}")])
    with pytest.raises(JudgeFailed, match=r"gave no answer in 4 attempts; the last: HTTP 500 out of memory \*\*\*$"):
        ask(server)
    assert len(server.seen) == 4 and len(pauses) == 3


@pytest.mark.parametrize("status", [301, 400, 401, 404])
def test_a_refusal_is_not_repeated_and_no_redirection_followed(status: int, pauses: list[float]) -> None:
    server = Server(
        [web.Response(status=status, text=f"wrong key {KEY}", headers={"Location": "/v1/chat/completions"})]
    )
    with pytest.raises(JudgeFailed, match=rf"answered HTTP {status} wrong key \*\*\*"):
        ask(server)
    assert len(server.seen) == 1


def test_a_server_that_hangs_is_left(pauses: list[float]) -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(JudgeFailed, match=r"gave no answer in 2 attempts; the last: no reply within 0\.2 s"):
        ask(Server([hang]), request_seconds=0.2, attempts=2)


def test_no_server_is_a_sentence(pauses: list[float]) -> None:
    async def go() -> None:
        # The discard port: nothing listens there.
        async with Judge(JudgeSection(url="http://127.0.0.1:9/v1", model="m", attempts=2)).open() as inquiry:
            await inquiry.answer(MESSAGES)

    with pytest.raises(JudgeFailed, match="attempts; the last: ClientConnectorError"):
        asyncio.run(go())


def test_a_flood_ends(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "MOST_BYTES", 1 << 20)
    with pytest.raises(JudgeFailed, match="more than 1 MiB"):
        ask(Server([web.Response(body=b" " * (2 << 20))]), attempts=1)


@pytest.mark.parametrize("text", [None, "", " "])
def test_an_answer_without_text_is_a_sentence(text: object, pauses: list[float]) -> None:
    with pytest.raises(JudgeFailed, match=r"without text \(finish_reason=stop\)"):
        ask(Server([completion(text)]))


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": "7"}, {"prompt_tokens": -1, "completion_tokens": 2}, [1]])
def test_tokens_that_are_not_reported_are_counted_as_such(usage: object, pauses: list[float]) -> None:
    _, used = ask(Server([completion("Score: 7", usage)]))
    assert (used["unmetered"], used["prompt_tokens"], used["answer_tokens"]) == (1, 0, 0)


def test_no_more_requests_at_a_time_than_the_recipe_allows(pauses: list[float]) -> None:
    arrived = asyncio.Event()

    async def wait_for_another(request: web.Request) -> web.Response:
        if server.now == 3:
            arrived.set()
        await arrived.wait()
        return completion("Score: 7")

    async def many(inquiry: Inquiry) -> list[float]:
        return await asyncio.gather(*(inquiry.grade(MESSAGES, 0, 10) for _ in range(20)))

    server = Server([wait_for_another])
    grades, used = ask(server, many, at_once=3)
    assert (grades, server.most, used["requests"]) == ([7.0] * 20, 3, 20)


def test_the_key_is_in_no_trace(pauses: list[float]) -> None:
    made = Judge(JudgeSection(url="http://h/v1", model="m", key_variable="TEST_JUDGE_KEY"))
    assert KEY not in repr(made) + str(made)
    lost = describe_error(RuntimeError(f"Authorization: Bearer {KEY}"))
    assert KEY not in lost.why + lost.trace and "***" in lost.why


OWN = {"name": f"{ROOT}/recipes/rewards/judge.py:score"}
PROBLEM = Problem("id", "What is 1 + 1?", {"prompt": "What is 1 + 1?", "answer": "2"}, "2")


def recipe(url: str, **judged: Any) -> Any:
    judged = {"url": url, "model": "m", **judged}
    overrides = [f"reward.name={OWN['name']}", f"reward.judge={json.dumps(judged)}", "reward.exact=false"]
    return load_recipe(ROOT / "recipes/tiny_moe.yaml", overrides)


def test_the_example_scores_and_what_failed_is_paid_by_the_next(pauses: list[float]) -> None:
    async def go(url: str) -> tuple[float, dict[str, float]]:
        scorer = make_scorer(recipe(url, prompt_price=1e6))
        assert isinstance(scorer, AsyncScorer)
        response = RewardInput("It is 2.", "It is 2.", (5, 2), "stop")
        with pytest.raises(JudgeFailed):
            await scorer(PROBLEM, response)
        verdict = await scorer(PROBLEM, response)
        return verdict.score, dict(verdict.parts)

    server = Server([completion("I cannot."), completion("Score: 7")])
    score, parts = asyncio.run(server.run(go))
    assert (score, parts["grade"]) == (0.7, 0.7)
    assert (parts["_judge_requests"], parts["_judge_cost"]) == (2, 14)
    sent = server.seen[1][0]["messages"][0]["content"]
    assert "What is 1 + 1?" in sent and "It is 2." in sent


def test_a_key_that_is_not_set_ends_the_controller_before_a_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", " ")
    with pytest.raises(RecipeError, match="the environment variable TEST_JUDGE_KEY is not set where responses are"):
        make_scoring_pool(recipe("http://h/v1", key_variable="TEST_JUDGE_KEY"), 2)


def test_the_pool_of_a_judge_holds_as_many_responses_and_waits_for_it() -> None:
    pool = make_scoring_pool(recipe("http://h/v1", at_once=3, request_seconds=900, attempts=2), 2)
    assert isinstance(pool, LoopPool) and (pool._at_once, pool._wall > 1800) == (3, True)


@pytest.mark.parametrize(
    ("judged", "fault"),
    [
        ({"url": "judge:8000"}, "url is no address"),
        ({"url": "ftp://h/v1"}, "url is no address"),
        ({"url": "http:///v1"}, "url is no address"),
        ({"url": "http://h:99999/v1"}, "url is no address"),
        ({"url": "http://[/v1"}, "url is no address"),
        ({"url": "http://me:secret@h/v1"}, "url holds credentials"),
        ({"url": "http://h/v1/chat/completions"}, "leave that out"),
        ({"key_variable": "sk-0123"}, "names no environment variable for a key"),
        ({"key_variable": "JUDGE"}, "holds KEY, TOKEN, SECRET"),
        ({"options": {"model": "n"}}, "options holds model"),
        ({"attempts": 0}, "greater than or equal to 1"),
    ],
)
def test_a_wrong_section_is_refused(judged: dict[str, Any], fault: str) -> None:
    with pytest.raises(RecipeError, match=r"reward\.judge") as refused:
        recipe(**{"url": "http://h/v1", **judged})
    assert fault in str(refused.value)


def test_a_judge_that_nothing_asks_and_one_that_is_missing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faults(made: Any, ranks: int | None = None) -> dict[str, str]:
        return {found.code: found.severity for found in check(made, ranks) if found.key.startswith("reward.judge")}

    plain = tmp_path / "plain.py"
    plain.write_text("async def score(problem, response): return 1")
    tiny, judged = ROOT / "recipes/tiny_moe.yaml", 'reward.judge={"url": "http://h/v1", "model": "m"}'
    assert faults(load_recipe(tiny, [f"reward.name={plain}:score", judged])) == {"judge-mismatch": "error"}
    assert faults(load_recipe(tiny, [f"reward.name={OWN['name']}"])) == {"judge-mismatch": "error"}
    assert faults(recipe("http://h/v1")) == {}
    monkeypatch.delenv("TEST_JUDGE_KEY", raising=False)
    keyed = recipe("http://h/v1", key_variable="TEST_JUDGE_KEY")
    assert faults(keyed) == {"judge-key-missing": "warning"}
    assert faults(keyed, 2) == {"judge-key-missing": "error"}
    with pytest.raises(RecipeError, match="judge is asked by a reward of your own"):
        load_recipe(tiny, [judged])


def test_gspo_check_tries_the_judge_of_a_recipe(pauses: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    async def go(url: str) -> Any:
        judged = f'reward.judge={{"url": "{url}", "model": "m", "key_variable": "TEST_JUDGE_KEY"}}'
        command = ["check", OWN["name"], str(ROOT / "recipes/tiny_moe.yaml"), f"reward.name={OWN['name']}", judged]
        return await asyncio.to_thread(run_in_process, command)

    assert main(["check", OWN["name"]]) == 0
    assert "asks a judge: give a recipe with reward.judge" in capsys.readouterr().out
    server = Server([completion("Score: 7")])
    done = asyncio.run(server.run(go))
    assert done.returncode == 0, done.stderr
    # The empty sample is not sent.
    assert "scored 3 sample responses from 0 to 0.7" in done.stdout
    assert "the judge took 2 requests, 14 + 6 tokens" in done.stdout
    assert KEY not in done.stdout + done.stderr


def run_in_process(command: list[str]) -> Any:
    import subprocess
    import sys

    return subprocess.run([sys.executable, "-m", "gspo_megatron.cli", *command], capture_output=True, text=True)
