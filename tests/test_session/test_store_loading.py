"""What loading costs, and what happens to the files under a session that was loaded."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from structlog.testing import capture_logs

from sfi_agent import Engine, Session, SessionConfig, SessionStateError, StoreError
from sfi_agent.engine.saved_history import SavedBuffer
from sfi_agent.engine.switch import AttentionSwitch
from sfi_agent.session.store import loading
from tests.families import FAMILIES, build_model, tiny_engine
from tests.source_tree import ROOT
from tests.test_guarantees.test_save_load import history_of, same_bits

DENSE = SessionConfig(mode="dense")
LONG_TOKENS = 12_000


def resident_bytes() -> int:
    """Memory of this process that is in use now; what was freed is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@lru_cache
def roomy_engine() -> Engine:
    family = next(item for item in FAMILIES if item.name == "qwen3")
    return Engine(build_model(family, max_position_embeddings=1 << 15))


def long_session() -> Session:
    """A session over numbers that no model computed: only their size matters."""
    session = roomy_engine().session(DENSE)
    state = session._core.state()
    for layer in state.sequence.layers:
        layer.history.append(torch.randn(2, LONG_TOKENS, 64), torch.randn(2, LONG_TOKENS, 64))
    state.ids.extend([index % 97 for index in range(LONG_TOKENS + 1)])
    state.sequence.processed_tokens = LONG_TOKENS
    return session


@pytest.mark.skipif(
    not (Path("/proc/self/statm").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="reads Linux's process table, and asks glibc to give memory back",
)
def test_loading_takes_no_memory_until_it_is_used(tmp_path: Path) -> None:
    with long_session() as session:
        history_bytes = session.stats.history_bytes
        session.save(tmp_path)
        expected = session.next_logits()
    assert history_bytes > 40e6
    warm = roomy_engine().load_session(tmp_path)
    warm.close()
    del session, warm
    before = resident_bytes()
    loaded = roomy_engine().load_session(tmp_path, check="full")
    assert resident_bytes() - before < history_bytes / 4
    assert loaded.stats.history_bytes == 0
    assert torch.equal(loaded.next_logits(), expected)
    assert resident_bytes() - before > history_bytes / 2, "the measure shows nothing"
    assert loaded.stats.history_bytes >= history_bytes
    loaded.close()


class AskedFor(mmap.mmap):
    """A map that notes which of its bytes the system was asked for."""

    noted: ClassVar[list[tuple[int, int]]] = []

    def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
        assert option == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
        self.noted.append((start, start + length))
        super().madvise(option, start, length)

    @classmethod
    def covered(cls) -> int:
        """Bytes that were asked for, each counted once."""
        whole, end = 0, 0
        for start, stop in sorted(cls.noted):
            whole += max(0, stop - max(start, end))
            end = max(end, stop)
        return whole


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="the system cannot be asked")
@pytest.mark.parametrize("forked", [False, True])
def test_what_is_about_to_be_read_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: bool
) -> None:
    """Not before somebody reads, once, layer by layer, and no more than is used."""
    with long_session() as session:
        session.save(tmp_path)
        session.rewind(session.mark(LONG_TOKENS // 4 + 1))
        session.save(tmp_path)
        expected = session.next_logits()
        used = session._core.state().sequence.layers[0].history.pieces()
        layers = len(session._core.state().sequence.layers)
        layer_bytes = sum(piece.keys.nbytes + piece.values.nbytes for piece in used)
    monkeypatch.setattr(mmap, "mmap", AskedFor)
    monkeypatch.setattr(AskedFor, "noted", [])
    with roomy_engine().load_session(tmp_path, check="sizes") as loaded, ExitStack() as opened:
        if forked:  # It reads the files where they are.
            loaded = opened.enter_context(loaded.fork())
        assert AskedFor.noted == []
        first = loaded._core.state().sequence.layers[0].history.extents[0].buffer
        assert first.keys.shape[1] > 0
        assert 2 * layer_bytes <= AskedFor.covered() < 2.1 * layer_bytes
        assert torch.equal(loaded.next_logits(), expected) or forked
        assert layers * layer_bytes <= AskedFor.covered() < 1.1 * layers * layer_bytes
        done = len(AskedFor.noted)
        loaded.decode([1], max_new_tokens=2)
        assert len(AskedFor.noted) == done


def test_a_file_that_became_shorter_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at its length and the moment it is mapped."""
    engine = tiny_engine("llama")
    with engine.session(DENSE) as session:
        session.decode([1, 2, 3], max_new_tokens=5)
        session.save(tmp_path)

    def cut(_: object) -> None:
        for file in tmp_path.glob("*.safetensors"):
            os.truncate(file, 100)

    monkeypatch.setattr(loading, "verify_shards", cut)
    with pytest.raises(StoreError, match="safetensors"):
        engine.load_session(tmp_path)


def test_another_process_goes_on(tmp_path: Path, child_python: Callable[..., str]) -> None:
    engine = tiny_engine("qwen3")
    with engine.session(DENSE) as session:
        session.decode([5, 6, 7, 8], max_new_tokens=3)
        session.save(tmp_path)
        expected = session.decode([1, 2], max_new_tokens=5)
    program = f"""
        import torch
        from tests.families import tiny_engine
        torch.set_num_threads(1)
        session = tiny_engine("qwen3").load_session({str(tmp_path)!r})
        print(session.decode([1, 2], max_new_tokens=5))
    """
    assert child_python(program, ROOT) == str(expected)


def test_a_look_at_sizes_reads_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine("llama")
    with engine.session(DENSE) as session:
        session.decode([1, 2, 3], max_new_tokens=5)
        session.save(tmp_path)

    def refuse(*arguments: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(loading, "verify_shards", refuse)
    engine.load_session(tmp_path, check="sizes").close()
    with pytest.raises(AssertionError, match="it was read"):
        engine.load_session(tmp_path)
    assert AttentionSwitch.of(engine.model).users == 0


def test_many_files_are_one_run_for_those_who_read(tmp_path: Path) -> None:
    """However often it was saved, what is decoded is as fast as before: extents stay what they
    were, and only the first who reads joins them."""
    engine = tiny_engine("llama")
    with engine.session(DENSE) as session:
        session.decode([index % 97 for index in range(64)], max_new_tokens=0)
        for size in (40, 20, 10, 5, 1):
            session.save(tmp_path)
            session.decode([index % 89 for index in range(size)], max_new_tokens=0)
        session.save(tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        loaded = engine.load_session(tmp_path)
        (extent,) = loaded._core.state().sequence.layers[0].history.extents
        assert isinstance(extent.buffer, SavedBuffer)
        with loaded.fork() as one, loaded.fork() as other:
            pieces = [
                list(child._core.state().sequence.layers[0].history.pieces())
                for child in (one, other)
            ]
            assert len(pieces[0]) == 1
            assert pieces[0][0].keys.data_ptr() == pieces[1][0].keys.data_ptr()
        assert torch.equal(loaded.next_logits(), session.next_logits())
        loaded.close()


def test_files_may_be_replaced_under_a_loaded_session(tmp_path: Path) -> None:
    engine = tiny_engine("llama")
    with engine.session(DENSE) as session:
        session.decode([index % 97 for index in range(50)], max_new_tokens=0)
        session.save(tmp_path)
        first, second = engine.load_session(tmp_path), engine.load_session(tmp_path)
        second.rewind(second.mark(10))
        second.decode([1, 2, 3], max_new_tokens=4)
        second.save(tmp_path)
        # Its files are gone from the directory, and still under its feet.
        assert same_bits(history_of(first), history_of(session))
        assert torch.equal(first.next_logits(), session.next_logits())
        third = engine.load_session(tmp_path)
        assert third.token_ids == second.token_ids
        for opened in (first, second, third):
            opened.close()


def test_two_loaded_sessions_know_nothing_of_each_other(tmp_path: Path) -> None:
    engine = tiny_engine("llama")
    with engine.session(DENSE) as session:
        session.decode([5, 6, 7, 8], max_new_tokens=3)
        session.save(tmp_path)
    with engine.load_session(tmp_path) as one, engine.load_session(tmp_path) as other:
        one.decode([1], max_new_tokens=3)
        before = other.token_ids
        other.rewind(other.mark(3))
        other.decode([9, 9], max_new_tokens=3)
        assert other.token_ids[:3] == before[:3] != one.token_ids[:0]
        with engine.load_session(tmp_path) as again:
            assert again.token_ids == before


def test_what_is_loaded_is_open_and_closes_as_others_do(tmp_path: Path) -> None:
    engine = tiny_engine("llama")
    with engine.session(DENSE) as session:
        session.decode([5, 6, 7, 8], max_new_tokens=3)
        session.save(tmp_path)
    model = engine.model
    assert AttentionSwitch.of(model).users == 0
    with capture_logs() as logs:
        loaded = engine.load_session(tmp_path)
    (event,) = [entry for entry in logs if entry["event"] == "session_loaded"]
    assert (event["session"], event["revision"]) == (loaded.id, 1)
    assert loaded.status == "open" and AttentionSwitch.of(model).users == 1
    loaded.close()
    assert AttentionSwitch.of(model).users == 0
    with pytest.raises(SessionStateError):
        loaded.save(tmp_path)
    loaded = engine.load_session(tmp_path)
    del loaded
    gc.collect()
    assert AttentionSwitch.of(model).users == 0


def test_a_load_that_fails_late_leaves_the_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine("llama")
    with engine.session(DENSE) as session:
        session.decode([5, 6, 7, 8], max_new_tokens=3)
        session.save(tmp_path)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(mmap, "mmap", fail)
    with pytest.raises(StoreError, match="Input/output"):
        engine.load_session(tmp_path)
    monkeypatch.undo()

    from sfi_agent.session.store import rebuilding

    monkeypatch.setattr(rebuilding, "restore_history", fail)
    with pytest.raises(StoreError, match="Input/output"):
        engine.load_session(tmp_path)
    assert AttentionSwitch.of(engine.model).users == 0
