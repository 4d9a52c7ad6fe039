"""How far a run is, and which attempt may publish."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.cluster.attempts import (
    Attempt,
    find_checkpoint,
    newest_checkpoint,
    read_attempt,
    refuse_if_replaced,
    replacement,
)
from tests.checkpoints import write_checkpoint


def test_the_newest_checkpoint_is_the_largest_marked_one_of_our_names(tmp_path: Path) -> None:
    places = tmp_path / "checkpoints"
    for name in ("step_000010", "step_1000000", "step_000009", ".step_000012.0a1b2c3d.partial", "final", "step_9_x"):
        write_checkpoint(places / name)
    (places / "step_2000000").mkdir()
    assert newest_checkpoint(tmp_path) == 1000000 and newest_checkpoint(tmp_path / "none") == 0


TRUNCATED = '{"step": 12, "version": 3, "files": {"rank_000'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("state.json", "", "state.json is damaged (JSONDecodeError: Expecting value: line 1"),
        ("state.json", TRUNCATED, "state.json is damaged (JSONDecodeError: Unterminated string"),
        ("state.json", "\0" * 64, "state.json is damaged"),
        ("state.json", "[]", "state.json is damaged (TypeError"),
        ("state.json", "{}", "state.json is damaged (KeyError: 'step')"),
        ("state.json", '{"step": 12, "files": {"rank_00000.safetensors": 100}}', "it has no version"),
        ("state.json", '{"step": 12, "files": 7}', "state.json"),
        ("state.json", '{"step": 12, "files": {"rank_00000.safetensors": null}}', "it has no version"),
        ("state.json", "[" * 100_000, "state.json is damaged (RecursionError"),
        ("state.json", None, "state.json cannot be read (No such file or directory)"),
        ("rank_00000.safetensors", "short", "rank_00000.safetensors has 5 bytes, 100 were written"),
        ("rank_00000.safetensors", None, "rank_00000.safetensors cannot be read (No such file or directory)"),
    ],
)
def test_an_unreadable_checkpoint_is_passed_over_by_name(
    tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    places = tmp_path / "checkpoints"
    whole = write_checkpoint(places / "step_000010")
    write_checkpoint(places / "step_000008")
    broken = write_checkpoint(places / "step_000012")
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_text(content)
    found, faults = find_checkpoint(places)
    assert found == whole and faults.keys() == {broken} and said in faults[broken]
    assert newest_checkpoint(tmp_path) == 10
    assert (broken / "COMPLETE").is_file()  # nothing is deleted


def test_a_state_of_another_step_is_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints" / "step_000010").rename(tmp_path / "checkpoints" / "step_000020")
    assert "its step is 10" in find_checkpoint(tmp_path / "checkpoints")[1][tmp_path / "checkpoints" / "step_000020"]


def test_the_attempt_file(tmp_path: Path) -> None:
    assert read_attempt(tmp_path) is None
    (tmp_path / "attempt").write_text("12 4242\n")
    assert read_attempt(tmp_path) == Attempt(12, "4242")


@pytest.mark.parametrize("text", ["", "\n", "2", "two 7\n", "2 7 8\n", "-1 7\n", "\0\0\0\0"])
def test_a_broken_attempt_file_is_one_sentence_and_replaces_nothing(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "attempt").write_text(text)
    with pytest.raises(ValueError, match="not the number of an attempt and its job; remove the file"):
        read_attempt(tmp_path)
    monkeypatch.setenv("GSPO_ATTEMPT", "1")
    assert replacement(tmp_path) is None


def test_an_attempt_that_was_replaced_does_not_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GSPO_ATTEMPT", raising=False)
    refuse_if_replaced(tmp_path)  # one machine: no attempts
    (tmp_path / "attempt").write_text("2 4242\n")
    monkeypatch.setenv("GSPO_ATTEMPT", "2")
    refuse_if_replaced(tmp_path)
    monkeypatch.setenv("GSPO_ATTEMPT", "1")
    with pytest.raises(ValueError, match="attempt 1 was replaced by attempt 2"):
        refuse_if_replaced(tmp_path)
