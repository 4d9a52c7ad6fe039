"""Whatever stands in a place that the package writes to: it is ours, or it stays as it was."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron import own_directory
from gspo_megatron.cli import main
from gspo_megatron.commands import train_run
from gspo_megatron.commands.train_run import prepare_run
from gspo_megatron.config import RecipeError
from gspo_megatron.models import load_recipe
from gspo_megatron.own_directory import (
    HUGGING_FACE,
    LAYOUT,
    MARK,
    RUN,
    DirectoryKind,
    claim_directory,
    directory_fault,
    hold_directory,
    replace_directory,
)
from gspo_megatron.run_dir import RunDir
from tests.checkpoints import write_checkpoint

CASES = settings(max_examples=int(os.environ.get("GSPO_FUZZ", "1000")) // 10, deadline=None, print_blob=True)
RECIPE = "recipes/tiny_moe.yaml"
KINDS = (RUN, HUGGING_FACE, LAYOUT)
OURS = (
    "config.json", "model.safetensors.index.json", "model-00001.safetensors", "state.json", "recipe.resolved.yaml",
    "rank_00000.safetensors", "objective.txt", "metrics.jsonl", "DONE", "checkpoints/step_000002/COMPLETE",
)  # fmt: skip
THEIRS = (
    "notes.txt", "model/config.json", "model-00001-of-00002.safetensors", "model.safetensors", ".hidden", "a/b/c",
    "tokenizer.json", "rank_0.safetensors", "lost+found/x", "checkpoints/final/config.json",
)  # fmt: skip
marks = st.sampled_from(
    [
        "", "{", "[]", "null", "{}", '{"kind": null}', '{"kind": "other"}', '{"kind": ["run"]}', "\0",
        '{"kind": "layout", "names": 7}', *(json.dumps({"kind": kind.name, "names": []}) for kind in KINDS),
    ]
)  # fmt: skip
trees = st.tuples(
    st.sets(st.sampled_from(OURS), max_size=5), st.sets(st.sampled_from(THEIRS), max_size=3), st.none() | marks
)


def grow(root: Path, tree: tuple[set[str], set[str], str | None]) -> None:
    for name in (*tree[0], *tree[1]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"of somebody: {name}")
    if tree[2] is not None:
        root.mkdir(parents=True, exist_ok=True)
        (root / MARK).write_text(tree[2])


def content(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() if path.is_file() else "" for path in root.rglob("*")}


def write(place: Path, kind: DirectoryKind) -> None:
    if kind is RUN:
        return claim_directory(place, kind, "run.directory")
    with replace_directory(place, kind, "OUT") as fresh:
        (fresh / "written").write_text("ours")
    return None


@CASES
@given(tree=trees, kind=st.sampled_from(KINDS))
def test_a_tree_of_somebody_stays_as_it_was(tree: tuple[set[str], set[str], str | None], kind: DirectoryKind) -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "a" / "place"
        grow(place, tree)
        before = content(place)
        ours = tree[2] is not None and tree[2].startswith("{") and f'"{kind.name}"' in tree[2]
        earlier = tree[2] is None and {*kind.needed} <= {*before}
        try:
            write(place, kind)
        except RecipeError as error:
            assert "directory-not-ours" in str(error) and str(place) in str(error)
            assert content(Path(directory)) == {"a": "", "a/place": ""} | {f"a/place/{k}": v for k, v in before.items()}
            assert before
        else:
            assert not before or ours or earlier
            if kind is not RUN and before:
                assert not tree[1], "names that we did not write were deleted"
            assert directory_fault(place, kind) is None
            assert [path.name for path in place.parent.iterdir()] == ["place"]


@CASES
@given(kind=st.sampled_from(KINDS), added=st.sampled_from(THEIRS))
def test_our_own_is_written_again_until_somebody_adds_to_it(kind: DirectoryKind, added: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "place"
        place.mkdir()  # empty
        for _ in range(2):
            write(place, kind)
        grow(place, (set(), {added}, None))
        before = content(place)
        if kind is RUN:
            write(place, kind)  # what a user keeps in a run directory is left alone
        else:
            with pytest.raises(RecipeError, match="but also holds"):
                write(place, kind)
        assert content(place) == before


EDITS: dict[str, Callable[[Path], object]] = {
    "a byte": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "the last byte": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "shorter": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "replaced": lambda file: file.write_bytes(bytes(byte ^ 3 for byte in file.read_bytes())),
    "a link": lambda file: (file.unlink(), file.symlink_to(__file__)),
    "a broken link": lambda file: (file.unlink(), file.symlink_to("/nowhere/at/all")),
}
SAME: dict[str, Callable[[Path], object]] = {
    "nothing": lambda file: None,
    "touched": lambda file: os.utime(file, (1, 1)),
    "read": lambda file: file.read_bytes(),
    "written again": lambda file: file.write_bytes(file.read_bytes()),
    "mode": lambda file: file.chmod(0o600),
    "deleted": lambda file: file.unlink(),
}
"""What leaves nothing of somebody's in a file."""
names = st.sampled_from(["config.json", "README.md", "model-00001.safetensors", "tokenizer/chat_template.jinja"])


@CASES
@given(
    kind=st.sampled_from([HUGGING_FACE, LAYOUT]),
    files=st.dictionaries(names, st.binary(min_size=2, max_size=64), min_size=1),
    edits=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([*EDITS, *SAME])), max_size=3),
    copied=st.booleans(),
)
def test_a_file_of_ours_that_somebody_edited_is_somebodys(
    kind: DirectoryKind, files: dict[str, bytes], edits: list[tuple[int, str]], copied: bool
) -> None:
    """Under one of our names too; a copy of what we wrote, touched or not, is still ours."""
    # Above 16 bytes a file counts as a large one, of which blocks are read.
    with (
        tempfile.TemporaryDirectory() as directory,
        patch.multiple(own_directory, WHOLE=16, BLOCKS=4, BLOCK=4),
    ):
        place = Path(directory) / "place"
        with replace_directory(place, kind, "OUT") as fresh:
            for name, data in files.items():
                (fresh / name).parent.mkdir(exist_ok=True)
                (fresh / name).write_bytes(data)
        if copied:
            place = Path(shutil.copytree(place, Path(directory) / "copy"))
        changed: set[str] = set()
        for index, edit in edits:
            name = sorted(files)[index % len(files)]
            # Never through a link.
            if not (place / name).is_symlink() and (place / name).is_file() and (place / name).stat().st_size:
                ({**EDITS, **SAME}[edit])(place / name)
                changed.add(name)
        gone = {name for name in changed if not os.path.lexists(place / name)}
        changed = {name for name in changed - gone if links_or_differs(place / name, files[name])}
        before = raw_content(place)
        if changed:
            with pytest.raises(RecipeError) as refusal:
                write(place, kind)
            (finding,) = refusal.value.findings
            assert "edited since" in finding.message and sorted(changed)[0] in finding.message
            assert "move it elsewhere" in finding.fix and raw_content(place) == before
        else:
            write(place, kind)
            assert (place / "written").is_file()


def links_or_differs(file: Path, data: bytes) -> bool:
    return not file.is_file() or file.read_bytes() != data


def raw_content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_directory_in_the_place_of_a_file_is_somebodys(tmp_path: Path) -> None:
    write(tmp_path / "out", HUGGING_FACE)
    (tmp_path / "out" / "written").unlink()
    grow(tmp_path / "out", (set(), {"written/config.json"}, None))
    with pytest.raises(RecipeError, match=r"but also holds written/config\.json"):
        write(tmp_path / "out", HUGGING_FACE)


def test_a_directory_of_an_earlier_version_has_no_digests_and_is_ours(tmp_path: Path) -> None:
    write(tmp_path / "out", HUGGING_FACE)
    (tmp_path / "out" / MARK).write_text(json.dumps({"kind": HUGGING_FACE.name, "names": ["written"]}))
    write(tmp_path / "out", HUGGING_FACE)
    assert json.loads((tmp_path / "out" / MARK).read_text())["digests"].keys() == {"written"}


@pytest.mark.parametrize("kind", [HUGGING_FACE, LAYOUT], ids=lambda kind: kind.name)
def test_a_fault_leaves_the_older_directory_and_no_rest(tmp_path: Path, kind: DirectoryKind) -> None:
    write(tmp_path / "out", kind)
    before = content(tmp_path)
    with pytest.raises(RuntimeError), replace_directory(tmp_path / "out", kind, "OUT") as fresh:
        (fresh / "half").touch()
        raise RuntimeError
    assert content(tmp_path) == before
    with pytest.raises(FileNotFoundError), replace_directory(tmp_path / "out", kind, "OUT"):
        (tmp_path / "a file that is read").read_text()
    with pytest.raises(RecipeError, match=r"cannot-write.*No space"), replace_directory(tmp_path / "out", kind, "OUT"):
        raise OSError(28, "No space left on device")
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("place", ["/proc/x/y", "/dev/null/x", "/dev/null", "/", "/sys/x"])
def test_a_place_that_cannot_be_written_is_a_sentence(place: str, kind: DirectoryKind) -> None:
    with pytest.raises(RecipeError) as refusal:
        write(Path(place), kind)
    (finding,) = refusal.value.findings
    assert place in finding.message and finding.code in ("cannot-write", "directory-not-ours")


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_directory_in_a_file_is_refused(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").touch()
    place = tmp_path / "notes.txt" / "runs" / "one"
    assert main([command, RECIPE, "placement.gpu=cpu", f"run.directory={place}"]) == 2
    said = capsys.readouterr()
    assert f"run.directory: {place} lies in {tmp_path / 'notes.txt'}, which is not a directory" in said.err + said.out


def test_a_link_is_followed_and_a_loop_of_links_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    for _ in range(2):
        write(tmp_path / "out", HUGGING_FACE)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "big" / "written").is_file()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for kind in KINDS:
        with pytest.raises(RecipeError):
            write(tmp_path / "loop", kind)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_run_refuses_a_directory_of_somebody(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    grow(tmp_path / "d", (set(), {"model/config.json"}, None))
    (tmp_path / "d" / "DONE").touch()
    before = content(tmp_path)
    assert main([command, RECIPE, "placement.gpu=cpu", f"run.directory={tmp_path / 'd'}"]) == 2
    said = capsys.readouterr()
    assert f"{tmp_path / 'd'} holds DONE, model, and nothing marks it as a run directory" in said.err + said.out
    assert content(tmp_path) == before


def test_a_directory_that_another_process_writes_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_run, "read_contents", lambda *_, **__: [])
    run = tmp_path / "run"
    claim_directory(run, RUN, "run.directory")
    command = ["train", RECIPE, "placement.gpu=cpu", f"run.directory={run}"]
    with hold_directory(run, "run.directory"):
        assert main(command) == 2
    assert f"run.directory: another process of gspo writes {run} now" in capsys.readouterr().err
    assert [file.name for file in run.iterdir()] == [MARK]
    with hold_directory(run, "run.directory"), pytest.raises(RecipeError, match="directory-in-use"):
        hold_directory(run, "run.directory").__enter__()


def test_a_run_goes_on_in_its_own_directory_and_in_one_of_an_earlier_version(tmp_path: Path) -> None:
    recipe = load_recipe(Path(RECIPE), [f"run.directory={tmp_path / 'run'}"])
    prepare_run(recipe)
    assert (tmp_path / "run" / MARK).is_file()
    (tmp_path / "run" / "my notes").touch()
    prepare_run(recipe)
    (tmp_path / "run" / MARK).unlink()
    prepare_run(recipe)


def test_an_export_that_somebody_put_in_a_run_directory_is_said_before_the_run(tmp_path: Path) -> None:
    recipe = load_recipe(Path(RECIPE), [f"run.directory={tmp_path / 'run'}"])
    prepare_run(recipe)
    for place in (RunDir(tmp_path / "run").final, RunDir(tmp_path / "run").export(2)):
        place.mkdir(parents=True)
        (place / "adapter.bin").touch()
        with pytest.raises(RecipeError, match=r"adapter\.bin"):
            prepare_run(recipe)
        (place / "adapter.bin").unlink()


def test_an_edited_export_is_said_before_the_run_that_would_write_it_again(tmp_path: Path) -> None:
    """A finished run stays finished; an export of a step that is behind the run is nobody's concern."""
    recipe = load_recipe(Path(RECIPE), [f"run.directory={tmp_path / 'run'}"])
    prepare_run(recipe)
    run = RunDir(tmp_path / "run")
    run.done.touch()
    write_checkpoint(run.checkpoint(3).path)
    for place, refused in ((run.export(2), False), (run.export(3), False), (run.export(4), True), (run.final, True)):
        with replace_directory(place, HUGGING_FACE, "OUT") as fresh:
            (fresh / "config.json").write_text('{"vocab_size": 1}')
        (place / "config.json").write_text('{"vocab_size": 2}')
        if refused:
            with pytest.raises(RecipeError, match=r"config\.json was edited since"):
                prepare_run(recipe)
            assert run.done.is_file()
            shutil.rmtree(place)
        else:
            prepare_run(recipe)
            assert (place / "config.json").read_text() == '{"vocab_size": 2}'
            run.done.touch()
