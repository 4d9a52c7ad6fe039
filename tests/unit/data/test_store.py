"""The sample store: what is written is read, what is damaged is named."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gspo_megatron.data.samples import pad_routes
from gspo_megatron.data.store import HEADER, DamagedSample, SampleStore
from gspo_megatron.run_dir import NumberedName
from gspo_megatron.types import Problem, Prompt, Response, SampleRef, Segment

PROMPT = Prompt(12, Problem("p", "q", {}), (5, 6, 7))


def make_response(length: int) -> Response:
    logprobs = np.linspace(-3, -0.1, length, dtype=np.float32)
    segments = (Segment(2, 0, length),) if length else ()
    return Response(12, 3, np.arange(10, 10 + length, dtype=np.int32), logprobs, segments, "stop")


@pytest.fixture
def stored(tmp_path: Path) -> tuple[SampleStore, SampleRef, Path]:
    store = SampleStore(tmp_path / "samples")
    ref = store.write(PROMPT, make_response(4), 0.5)
    assert ref.path == "written_000001.bin@0"
    return store, ref, store.directory / "written_000001.bin"


@pytest.mark.parametrize("length", [0, 1, 1000])
def test_a_sample_comes_back_as_it_was(tmp_path: Path, length: int) -> None:
    store = SampleStore(tmp_path)
    answer = make_response(length)
    ref = store.write(PROMPT, answer, 0.25)
    token_ids, answer_start, logprobs = store.read(ref)
    assert token_ids.dtype == np.int32 and logprobs.dtype == np.float32 and answer_start == 3
    assert token_ids.tolist() == [5, 6, 7, *answer.token_ids.tolist()]
    assert np.array_equal(logprobs, answer.logprobs)
    assert (ref.prompt_index, ref.sample_index, ref.prompt_length, ref.answer_length) == (12, 3, 3, length)
    assert (ref.reward, ref.stop_reason, ref.segments) == (0.25, "stop", answer.segments)
    with pytest.raises(ValueError, match="read-only"):
        token_ids[0] = 1


def test_records_follow_each_other_in_one_file(stored: tuple[SampleStore, SampleRef, Path]) -> None:
    store, first, file = stored
    routes = np.arange(7 * 3, dtype=np.uint8).reshape(7, 3, 1)
    refs = [first, *(store.write(PROMPT, replace(make_response(4), routes=routes), 0.5) for _ in range(3))]
    places = [int(ref.path.partition("@")[2]) for ref in refs]
    assert places == sorted(set(places)) and all(place % 4 == 0 for place in places)
    assert [path.name for path in store.directory.iterdir()] == [file.name]
    for ref in refs:
        assert store.read(ref)[0].tolist() == [5, 6, 7, 10, 11, 12, 13]


def test_threads_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    lengths = list(range(1, 200))
    with ThreadPoolExecutor(8) as pool:
        refs = list(pool.map(lambda length: store.write(PROMPT, make_response(length), 0.5), lengths))
    assert [len(store.read(ref)[2]) for ref in refs] == lengths
    assert len({ref.path for ref in refs}) == len(refs)


def test_what_a_killed_process_left_half_written_is_passed_over(stored: tuple[SampleStore, SampleRef, Path]) -> None:
    store, ref, file = stored
    content = file.read_bytes()
    with file.open("ab") as opened:
        opened.write(content[:37])
    other = SampleStore(store.directory)  # the next attempt
    later = other.write(PROMPT, make_response(9), 0.5)
    assert later.path == "written_000002.bin@0"
    assert store.read(ref)[0].tolist() == [5, 6, 7, 10, 11, 12, 13] and len(other.read(later)[2]) == 9


def test_a_write_that_fails_leaves_no_hole(
    stored: tuple[SampleStore, SampleRef, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ref, _ = stored
    write = os.pwrite

    def full(file: int, content: bytes, offset: int) -> int:
        if offset > 100:
            raise OSError(28, "No space left on device")
        return write(file, content[:9], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        store.write(PROMPT, make_response(90), 0.5)
    monkeypatch.setattr(os, "pwrite", lambda file, content, offset: write(file, content[:9], offset))
    later = store.write(PROMPT, make_response(5), 0.5)
    assert store.read(ref)[0].tolist() == [5, 6, 7, 10, 11, 12, 13] and len(store.read(later)[2]) == 5


def test_a_file_of_an_earlier_version_is_read(stored: tuple[SampleStore, SampleRef, Path]) -> None:
    store, ref, file = stored
    file.rename(store.directory / "00000012-0003-v2-2.sample")
    earlier = replace(ref, path="00000012-0003-v2-2.sample")
    assert store.holds(earlier) and store.read(earlier)[0].tolist() == [5, 6, 7, 10, 11, 12, 13]


@pytest.mark.parametrize("routed", [False, True])
def test_a_teacher_s_log_probs_come_back_beside_the_sampler_s(tmp_path: Path, routed: bool) -> None:
    store, plain = SampleStore(tmp_path), make_response(4)
    said = np.array([-0.5, -7.25, 0.0, -1.0], np.float32)
    routes = np.arange(6 * 2 * 2, dtype=np.uint8).reshape(6, 2, 2) if routed else None
    ref = store.write(PROMPT, replace(plain, teacher_logprobs=said, routes=routes), 0.5)
    without = store.write(PROMPT, replace(plain, routes=routes), 0.5)
    for one, teacher in ((ref, said.tolist()), (without, None)):
        ids, _, logprobs = store.read(one)
        assert ids.tolist() == [5, 6, 7, 10, 11, 12, 13] and np.array_equal(logprobs, plain.logprobs)
        found, rows = store.read_teacher(one), store.read_routes(one)
        assert (None if found is None else found.tolist()) == teacher
        assert (None if rows is None else rows.tolist()) == (None if routes is None else routes.tolist())
    with pytest.raises(ValueError, match="3 log-probs for 4 tokens"):
        store.write(PROMPT, replace(plain, teacher_logprobs=said[:3]), 0.5)


def test_a_record_that_names_no_rows_has_one(stored: tuple[SampleStore, SampleRef, Path]) -> None:
    store, ref, file = stored
    content = bytearray(file.read_bytes())
    content[HEADER.size - 3] = 0  # as earlier versions wrote it
    file.write_bytes(content)
    assert store.read(ref)[0].tolist() == [5, 6, 7, 10, 11, 12, 13] and store.read_teacher(ref) is None


@pytest.mark.parametrize("path", ["", "../written_000001.bin@0", "written_000001.bin@-4", "a@b", "/etc/passwd@0"])
def test_a_place_that_is_none_is_refused(stored: tuple[SampleStore, SampleRef, Path], path: str) -> None:
    store, ref, _ = stored
    with pytest.raises(DamagedSample):
        store.read(replace(ref, path=path))
    assert not store.holds(replace(ref, path=path))


def test_every_changed_byte_is_noticed(stored: tuple[SampleStore, SampleRef, Path]) -> None:
    store, ref, file = stored
    content = file.read_bytes()
    # The header's last 4 bytes are padding.
    for place in [*range(HEADER.size - 4), *range(HEADER.size, len(content))]:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedSample, match=file.name):
            store.read(ref)


@pytest.mark.parametrize("length", [0, 31, 32, 59])
def test_a_cut_file_is_refused_by_name(stored: tuple[SampleStore, SampleRef, Path], length: int) -> None:
    store, ref, file = stored
    os.truncate(file, length)
    with pytest.raises(DamagedSample, match=file.name):
        store.read(ref)


def test_a_missing_file_is_refused_by_name(stored: tuple[SampleStore, SampleRef, Path]) -> None:
    store, ref, file = stored
    file.unlink()
    with pytest.raises(DamagedSample, match=r"sample .* does not exist"):
        store.read(ref)


def test_metadata_of_another_sample_is_refused(stored: tuple[SampleStore, SampleRef, Path]) -> None:
    store, ref, _ = stored
    with pytest.raises(DamagedSample, match=r"holds 3 \+ 4 tokens, its metadata says 3 \+ 5"):
        store.read(replace(ref, answer_length=5))


def test_every_token_has_a_log_prob(tmp_path: Path) -> None:
    wrong = replace(make_response(4), logprobs=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="3 log-probs for 4 tokens"):
        SampleStore(tmp_path).write(PROMPT, wrong, 0.0)


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize(("kind", "largest"), [(np.uint8, 255), (np.uint16, 511)])
def test_routes_come_back_and_what_is_missing_of_them_is_absent(
    tmp_path: Path, missing: int, kind: type[np.unsignedinteger], largest: int
) -> None:
    store = SampleStore(tmp_path)
    routes = np.random.default_rng(0).integers(0, largest + 1, (7, 2, 3)).astype(kind)
    routes[0, 0, 0] = largest
    ref = store.write(PROMPT, replace(make_response(4), routes=routes[: 7 - missing]), 0.5)
    found = store.read_routes(ref)
    assert found is not None and found.dtype == kind and np.array_equal(found, routes[: 7 - missing])
    padded = pad_routes(found, 7)
    assert padded is not None and padded.dtype == np.int16
    assert np.array_equal(padded[: 7 - missing], found) and (padded[7 - missing :] == -1).all()
    assert np.array_equal(store.read(ref)[2], make_response(4).logprobs)
    written = store.directory / "written_000001.bin"
    plain = HEADER.size + 4 * (7 + 4)
    assert written.stat().st_size == plain + routes[: 7 - missing].nbytes, "one byte a choice up to 256 experts"
    assert store.read_routes(store.write(PROMPT, make_response(5), 0.5)) is None


def test_old_stores_are_removed_and_what_a_user_copied_stays(tmp_path: Path) -> None:
    names = NumberedName("in_flight", 8)
    for name in (*(names.name(number) for number in (8, 64, 100_000_000)), "in_flight_00000008_best", "in_flight_8"):
        (tmp_path / name).mkdir()
    SampleStore(tmp_path / "samples").prune(names, 2)
    left = {path.name for path in tmp_path.iterdir()} - {"samples"}
    assert left == {"in_flight_00000064", "in_flight_100000000", "in_flight_00000008_best", "in_flight_8"}
