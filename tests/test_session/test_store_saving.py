"""Saving again and again: what is written, what is kept, whose directory it is."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from sfi_agent import (
    InputError,
    Session,
    SessionBusy,
    SessionConfig,
    SessionStateError,
    StoreConflictError,
    StoreError,
)
from sfi_agent.session.store import shard_writing
from sfi_agent.session.store.directory import MANIFEST_NAME
from sfi_agent.session.store.lineage import Lineage
from sfi_agent.session.store.manifest import SavedSession, SavedShard, SavedStretch
from sfi_agent.session.store.manifest_file import parse_manifest
from sfi_agent.session.store.stretches import plan_stretches, used_part
from tests.families import VOCABULARY, tiny_engine
from tests.test_guarantees.test_save_load import history_of, same_bits

DENSE = SessionConfig(mode="dense")
OBSERVE = SessionConfig(
    boundaries=[{"name": "interval", "every_tokens": 4}],
    memory={"sink_tokens": 1, "selected_tokens": 2, "recent_tokens": 2},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 6},
)


@pytest.fixture
def session() -> Any:
    with tiny_engine("llama").session(OBSERVE) as opened:
        yield opened


def manifest(folder: Path) -> SavedSession:
    return parse_manifest((folder / MANIFEST_NAME).read_bytes(), folder)


def shard_names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def require_equal(folder: Path, session: Session) -> None:
    with session.engine.load_session(folder) as loaded:
        assert loaded.token_ids == session.token_ids
        assert same_bits(history_of(loaded), history_of(session))
        assert torch.equal(loaded.next_logits(), session.next_logits())


def ids(count: int, start: int = 0) -> list[int]:
    return [(start + 7 * index) % VOCABULARY for index in range(count)]


# ---------------------------------------------------------------- what is written


def test_a_report_has_the_numbers(tmp_path: Path, session: Session) -> None:
    session.decode(ids(40), max_new_tokens=5)
    with capture_logs() as logs:
        first = session.save(tmp_path / "a" / "b")
    assert first.revision == 1 and first.seconds > 0
    assert first.bytes_written == first.bytes_total == bytes_in(tmp_path / "a" / "b")
    (event,) = [entry for entry in logs if entry["event"] == "session_saved"]
    assert (event["revision"], event["bytes_written"]) == (1, first.bytes_written)
    session.decode(ids(3), max_new_tokens=2)
    second = session.save(str(tmp_path / "a" / "b"))
    assert second.revision == 2 and second.bytes_total == bytes_in(tmp_path / "a" / "b")
    assert second.bytes_written < second.bytes_total


def test_shards_are_never_changed_and_only_what_is_new_is_written(
    tmp_path: Path, session: Session
) -> None:
    session.decode(ids(60), max_new_tokens=4)
    session.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    session.decode(ids(5), max_new_tokens=4)
    session.save(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert set(before) < set(after)
    assert all(after[name] == data for name, data in before.items())
    assert [stretch.tokens for stretch in manifest(tmp_path).history.stretches] == [63, 9]
    require_equal(tmp_path, session)
    unchanged = session.save(tmp_path)
    assert unchanged.bytes_written == (tmp_path / MANIFEST_NAME).stat().st_size
    assert shard_names(tmp_path) == set(after)


def test_a_rewind_shortens_what_is_used(tmp_path: Path, session: Session) -> None:
    session.decode(ids(60), max_new_tokens=4)
    session.save(tmp_path)
    names = shard_names(tmp_path)
    session.rewind(session.mark(50))
    session.save(tmp_path)
    (stretch,) = manifest(tmp_path).history.stretches
    assert (stretch.tokens, stretch.held_tokens) == (49, 63)
    assert shard_names(tmp_path) == names
    require_equal(tmp_path, session)
    # Of less than half of a file the rest would be waste: it is taken in with the next save.
    session.rewind(session.mark(20))
    session.decode(ids(2, start=5), max_new_tokens=2)
    session.save(tmp_path)
    (stretch,) = manifest(tmp_path).history.stretches
    assert stretch.tokens == stretch.held_tokens == 23
    assert not shard_names(tmp_path) & names
    require_equal(tmp_path, session)


@given(
    moves=st.lists(
        st.one_of(
            st.tuples(st.just("decode"), st.integers(1, 12)),
            st.tuples(st.just("rewind"), st.floats(0, 1)),
            st.tuples(st.just("fork"), st.just(0)),
            st.tuples(st.just("load"), st.just(0)),
        ),
        min_size=2,
        max_size=7,
    )
)
@settings(
    max_examples=12,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_after_any_moves_the_directory_holds_the_session(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, Any]]
) -> None:
    """Saved after every move: keys of one turn must never be taken for those of another."""
    folder, engine = tmp_path_factory.mktemp("moves"), tiny_engine("llama_multi_query")
    session = engine.session(OBSERVE)
    opened = [session]
    session.decode(ids(20), max_new_tokens=4)
    for number, (kind, value) in enumerate(moves):
        if kind == "decode":
            session.decode(ids(1 + value % 3, start=number), max_new_tokens=value)
        elif kind == "rewind" and session.token_ids:
            session.rewind(session.mark(int(value * len(session.token_ids))))
        elif kind == "fork":
            session = session.fork()
            opened.append(session)
        elif kind == "load" and number:
            session = engine.load_session(folder)
            opened.append(session)
        if not session.token_ids:
            session.decode(ids(3), max_new_tokens=0)
        session.save(folder)
        with engine.load_session(folder) as loaded:
            assert loaded.token_ids == session.token_ids
            assert same_bits(history_of(loaded), history_of(session))
    for item in opened:
        item.close()


def test_equal_ids_are_no_proof_of_equal_keys(tmp_path: Path, session: Session) -> None:
    """The same ids again, after a rewind, by other steps: under observe they have other keys."""
    session.decode(ids(40), max_new_tokens=20)
    session.save(tmp_path)
    whole, before = session.token_ids, history_of(session)
    session.rewind(session.mark(41))
    session.decode(whole[41:], max_new_tokens=0)
    assert session.token_ids == whole
    assert not same_bits(history_of(session), before), "the test shows nothing"
    session.save(tmp_path)
    require_equal(tmp_path, session)


def test_large_layers_get_files_of_their_own(
    tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writing, "LARGEST_SHARD_BYTES", 1)
    session.decode(ids(30), max_new_tokens=2)
    session.save(tmp_path)
    assert len(shard_names(tmp_path)) == session.engine.shape.num_layers
    require_equal(tmp_path, session)


def test_a_session_without_any_token_is_saved_too(tmp_path: Path) -> None:
    with tiny_engine("llama").session(DENSE) as empty:
        empty.save(tmp_path)
        assert shard_names(tmp_path) == set()
        with empty.engine.load_session(tmp_path) as loaded:
            assert loaded.status == "open" and loaded.token_ids == [] and loaded.config == DENSE
            assert loaded.decode([1, 2], max_new_tokens=3) == empty.decode([1, 2], max_new_tokens=3)


# ---------------------------------------------------------------- how much is written


def stretch_of(tokens: int, held: int | None = None) -> SavedStretch:
    shard = SavedShard(
        name=f"sfi-history-{tokens:032x}.safetensors",
        first_layer=0,
        layers=1,
        bytes=1,
        digest="0" * 64,
    )
    return SavedStretch(tokens=tokens, held_tokens=held or tokens, shards=(shard,))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=120))
@settings(max_examples=60, deadline=None, database=None)
def test_many_saves_stay_few_stretches_and_rewrite_little(news: list[int]) -> None:
    written: list[SavedStretch] = []
    tokens = rewritten = 0
    for new in news:
        tokens += new
        kept, start = plan_stretches(written, tokens)
        assert sum(stretch.tokens for stretch in kept) == start < tokens
        assert kept == written[: len(kept)]
        rewritten += tokens - start
        written = [*kept, stretch_of(tokens - start)]
    logarithm = math.log2(max(2, tokens))
    assert len(written) <= logarithm + 1
    assert rewritten <= tokens * (logarithm + 1)
    sizes = [stretch.tokens for stretch in written]
    assert all(one > other for one, other in zip(sizes, sizes[1:], strict=False))


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=6),
    st.integers(0, 300),
)
@settings(max_examples=60, deadline=None, database=None)
def test_what_is_used_of_stretches(sizes: list[tuple[int, int]], tokens: int) -> None:
    stretches = [stretch_of(used, used + more) for used, more in sizes]
    found = used_part(stretches, tokens)
    total = sum(stretch.tokens for stretch in stretches)
    assert sum(stretch.tokens for stretch in found) == min(tokens, total)
    for one, other in zip(found, stretches, strict=False):
        assert (one.held_tokens, one.shards) == (other.held_tokens, other.shards)
    kept, start = plan_stretches(found, min(tokens, total))
    assert kept == found and start == min(tokens, total), "nothing new, so nothing is written"


# ---------------------------------------------------------------- whose directory it is


def test_a_directory_that_moved_on_is_a_conflict(tmp_path: Path, session: Session) -> None:
    session.decode(ids(20), max_new_tokens=4)
    session.save(tmp_path)
    with session.engine.load_session(tmp_path) as other:
        other.decode(ids(2), max_new_tokens=2)
        assert other.save(tmp_path).revision == 2
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(StoreConflictError, match="revision 2"):
            session.save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert session.save(tmp_path, overwrite=True).revision == 3
        require_equal(tmp_path, session)
        with pytest.raises(StoreConflictError, match="revision 3"):
            other.save(tmp_path)


def test_forks_know_where_their_parent_was_saved(tmp_path: Path, session: Session) -> None:
    session.decode(ids(40), max_new_tokens=4)
    whole = session.save(tmp_path)
    with session.fork() as child:
        child.decode(ids(2), max_new_tokens=2)
        report = child.save(tmp_path)
        assert report.revision == 2 and report.bytes_written < whole.bytes_written
        require_equal(tmp_path, child)
        with pytest.raises(StoreConflictError):
            session.save(tmp_path)
    with session.fork() as late:
        # It knows the first revision alone.
        with pytest.raises(StoreConflictError):
            late.save(tmp_path)


def test_directories_are_known_by_what_they_hold(tmp_path: Path, session: Session) -> None:
    """A directory may be renamed, copied, and reached by a link."""
    session.decode(ids(40), max_new_tokens=4)
    whole = session.save(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "two", target_is_directory=True)
    session.decode(ids(2), max_new_tokens=2)
    report = session.save(tmp_path / "link")
    assert report.revision == 2 and report.bytes_written < whole.bytes_written
    assert session.save(tmp_path / "two").revision == 3
    require_equal(tmp_path / "two", session)
    # The copy stayed behind at a state that the session was in, and takes what came since.
    report = session.save(tmp_path / "copy")
    assert report.revision == 2 and report.bytes_written < whole.bytes_written
    require_equal(tmp_path / "copy", session)


def test_another_session_is_replaced_as_a_whole_and_said(tmp_path: Path, session: Session) -> None:
    with session.engine.session(DENSE) as other:
        other.decode(ids(30), max_new_tokens=2)
        other.save(tmp_path)
        names = shard_names(tmp_path)
        session.decode(ids(20), max_new_tokens=4)
        with capture_logs() as logs:
            report = session.save(tmp_path)
        (event,) = [entry for entry in logs if entry["event"] == "session_replaced"]
        assert event["log_level"] == "warning"
        assert (event["session"], event["replaced_session"]) == (session.id, other.id)
        assert report.revision == 2 and not shard_names(tmp_path) & names
        require_equal(tmp_path, session)
        with pytest.raises(StoreConflictError):
            other.save(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format_version": 99}', b"\xff\x00"])
def test_what_cannot_be_read_is_not_given_up_unasked(
    tmp_path: Path, session: Session, content: bytes
) -> None:
    session.decode(ids(20), max_new_tokens=4)
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(StoreConflictError, match="cannot be read"):
        session.save(tmp_path)
    assert (tmp_path / MANIFEST_NAME).read_bytes() == content
    session.save(tmp_path, overwrite=True)
    require_equal(tmp_path, session)


def test_files_that_are_not_ours_stay(tmp_path: Path, session: Session) -> None:
    digits = "0" * 32
    foreign = {
        "notes.txt": b"mine",
        "model.safetensors": b"mine",
        f"sfi-history-{digits}.safetensors.bak": b"mine",
        f"sfi-history-{digits[:31]}.safetensors": b"mine",
        f"sfi-history-{digits.replace('0', 'A')}.safetensors": b"mine",
        "manifest.json": b"mine",
    }
    for name, data in foreign.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / f"sfi-history-{'1' * 32}.safetensors").mkdir()
    (tmp_path / f"sfi-history-{'2' * 32}.safetensors").symlink_to(tmp_path / "notes.txt")
    left_over = tmp_path / f"sfi-history-{'3' * 32}.safetensors"
    left_over.write_bytes(b"from a save that was interrupted")
    session.decode(ids(20), max_new_tokens=4)
    for _ in range(2):
        session.save(tmp_path)
        session.rewind(session.mark(10))
    for name, data in foreign.items():
        assert (tmp_path / name).read_bytes() == data
    assert (tmp_path / f"sfi-history-{'1' * 32}.safetensors").is_dir()
    assert (tmp_path / f"sfi-history-{'2' * 32}.safetensors").is_symlink()
    assert not left_over.exists()


@pytest.mark.parametrize("damage", ["removed", "shortened"])
def test_files_that_were_lost_are_written_again(
    tmp_path: Path, session: Session, damage: str
) -> None:
    session.decode(ids(60), max_new_tokens=4)
    session.save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    session.decode(ids(5), max_new_tokens=4)
    session.save(tmp_path)
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    session.save(tmp_path)
    require_equal(tmp_path, session)


# ---------------------------------------------------------------- what is refused


def test_only_one_save_at_a_time(tmp_path: Path, session: Session) -> None:
    session.decode(ids(20), max_new_tokens=4)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(StoreConflictError, match="under way"):
            session.save(tmp_path)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        session.save(tmp_path)
    finally:
        os.close(descriptor)


def test_a_closed_session_cannot_be_saved(tmp_path: Path) -> None:
    session = tiny_engine("llama").session(DENSE)
    session.close()
    with pytest.raises(SessionStateError, match="closed"):
        session.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_session_at_work_cannot_be_saved(tmp_path: Path, session: Session) -> None:
    session.decode(ids(20), max_new_tokens=2)
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with session._raw_decoding("decode"):
            inside.set()
            go_on.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(SessionBusy, match=r"session\.save"):
            session.save(tmp_path)
    finally:
        go_on.set()
        thread.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [None, 3, "", b"folder", "a\0b", "\ud800", object()])
def test_what_is_no_path_is_refused(session: Session, given: Any) -> None:
    with pytest.raises(InputError, match="directory"):
        session.save(given)
    with pytest.raises(InputError, match="directory"):
        session.engine.load_session(given)


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.decode(ids(20), max_new_tokens=4)
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="file"):
            session.save(folder)
    session.save(tmp_path / "session")
    before = {path.name: path.read_bytes() for path in (tmp_path / "session").iterdir()}
    session.decode(ids(20), max_new_tokens=4)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.fstat(descriptor).st_size == 0 or calls:
            raise OSError(28, "No space left on device")
        calls.append(descriptor)
        real(descriptor)

    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match="No space left"):
        session.save(tmp_path / "session")
    monkeypatch.undo()
    after = {path.name: path.read_bytes() for path in (tmp_path / "session").iterdir()}
    assert after == before
    session.save(tmp_path / "session")
    require_equal(tmp_path / "session", session)


def test_a_rename_that_cannot_be_made_durable_keeps_what_it_names(
    tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new manifest is in place when the last sync fails: its files must stay."""
    session.decode(ids(20), max_new_tokens=4)
    real, renamed = os.replace, []

    def replace(*arguments: Any, **keywords: Any) -> None:
        real(*arguments, **keywords)
        renamed.append(arguments)
        monkeypatch.setattr(os, "fsync", lambda descriptor: os.close(-1))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StoreError):
        session.save(tmp_path)
    monkeypatch.undo()
    assert renamed
    require_equal(tmp_path, session)


def test_lineage_follows_cuts() -> None:
    lineage = Lineage()
    assert not lineage.knows("/a") and lineage.kept_tokens("x") is None
    lineage.note_saved("/a", "x", 10)
    lineage.note_saved("/b", "x", 10)
    copy = lineage.copy()
    lineage.note_cut(12)
    assert lineage.kept_tokens("x") == 10
    lineage.note_cut(4)
    lineage.note_cut(7)
    assert (lineage.kept_tokens("x"), copy.kept_tokens("x")) == (4, 10)
    lineage.note_saved("/a", "y", 9)
    assert lineage.kept_tokens("y") == 9 and lineage.kept_tokens("x") == 4
    assert lineage.knows("/a") and lineage.knows("/b")
