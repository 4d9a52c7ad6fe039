"""Files that another node replaces."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gspo_megatron.cluster import shared_files
from gspo_megatron.cluster.attempts import newest_checkpoint, read_attempt, read_bad_nodes
from gspo_megatron.cluster.shared_files import read_shared, replace_text, retry_stale
from tests.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_files, "PAUSE_SECONDS", 0.0)


class Once:
    """A question that fails so often before it is answered."""

    def __init__(self, times: int, number: int = errno.ESTALE) -> None:
        self.left, self.number = times, number

    def __call__(self) -> str:
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        return "answer"


def test_stale_is_asked_again_a_few_times_and_other_errors_never() -> None:
    assert retry_stale(Once(1)) == "answer" and retry_stale(Once(4)) == "answer"
    with pytest.raises(OSError, match="Stale file handle"):
        retry_stale(Once(5))
    other = Once(1, errno.EACCES)
    with pytest.raises(PermissionError):
        retry_stale(other)
    assert other.left == 0


def test_readers_of_a_run_directory_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_text(tmp_path / "attempt", "2 7\n")
    write_checkpoint(tmp_path / "checkpoints" / "step_000003")
    for name in ("read_text", "iterdir", "is_file"):
        real, once = getattr(Path, name), Once(1)

        def stale(path: Path, *words: str, real=real, once=once, **more: str):  # type: ignore[no-untyped-def]
            once()
            return real(path, *words, **more)

        monkeypatch.setattr(Path, name, stale)
    attempt = read_attempt(tmp_path)
    assert attempt is not None and (attempt.number, attempt.job) == (2, "7")
    assert newest_checkpoint(tmp_path) == 3
    assert os.listdir(tmp_path / "checkpoints") == ["step_000003"]


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path)])
def test_an_attempt_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "attempt")
    with pytest.raises(ValueError, match=r"attempt cannot be read \(.*\); remove it"):
        read_attempt(tmp_path)


def test_bad_nodes_are_read_strictly(tmp_path: Path) -> None:
    assert read_bad_nodes(tmp_path) == []
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "bad_nodes").write_text(
        "n2 broken (attempt 1)\n\n; rm\nn2 again\nn-3.a x\n$(reboot) y\nn4\n# n7\nn[5-6],n8\tx\n"
    )
    assert read_bad_nodes(tmp_path) == ["n2", "n-3.a", "n4", "n[5-6],n8"]
    assert read_shared(tmp_path / "logs" / "bad_nodes").startswith("n2")
