"""Guarantee 6: a session that was saved and loaded is the session that was never saved."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sfi_agent import Engine, Session, SessionConfig, SessionStats
from tests.families import FAMILIES, VOCABULARY, build_model, tiny_engine, word_tokenizer
from tests.test_guarantees.play import close
from tests.test_guarantees.policies import (
    LAYOUT_NAMES,
    dense_twin,
    for_each,
    prompts,
    sparse_policies,
)

NEW_TOKENS = 7
SLOW_STEPS: tuple[Any, ...] = ("observe", "rectify", "verify")

Doing = tuple[str, Any]

things_to_do: st.SearchStrategy[list[Doing]] = st.lists(
    st.one_of(
        st.tuples(st.just("decode"), prompts),
        st.tuples(st.just("decode"), prompts),
        st.tuples(st.just("go on"), st.integers(1, NEW_TOKENS)),
        st.tuples(st.just("prefill"), prompts),
        st.tuples(st.just("rewind"), st.floats(0.3, 1)),
        st.tuples(st.just("fork"), st.booleans()),
    ),
    min_size=1,
    max_size=4,
)


class Pair:
    """Two sessions that do the same, one of which is saved and loaded on the way.

    Args:
        engine: Of both.
        config: Of both.
    """

    def __init__(self, engine: Engine, config: SessionConfig) -> None:
        self.engine = engine
        self.never_saved = engine.session(config)
        self.saved = engine.session(config)
        self._open = [self.never_saved, self.saved]
        self._forked_at = 0

    def do(self, doing: Doing) -> None:
        kind, value = doing
        done = [self._do(session, kind, value) for session in (self.never_saved, self.saved)]
        assert done[0] == done[1]
        if kind == "fork":
            # Go on with the children, or with the parents whose histories are read by others.
            if value:
                self.never_saved, self.saved = self._open[-2:]
            self._forked_at = len(self.saved.token_ids)

    def _do(self, session: Session, kind: str, value: Any) -> list[int]:
        if kind == "decode":
            return session.decode(value, max_new_tokens=NEW_TOKENS)
        if kind == "prefill":
            return session.decode(value, max_new_tokens=0)
        if kind == "go on":
            return session.decode([], max_new_tokens=value) if session.token_ids else []
        if kind == "rewind":
            # Not below what a fork reads: there the one begins an extent of its own, and the other
            # one, which nobody reads, does not. That is the same but for rounding.
            tokens = max(self._forked_at, int(value * len(session.token_ids)))
            session.rewind(session.mark(tokens))
            return []
        self._open.append(session.fork())
        return []

    def save_and_load(self, directory: Path) -> None:
        before = self.saved
        before.save(directory)
        self.saved = self.engine.load_session(directory)
        self._open.append(self.saved)
        self.check()
        # What was saved goes on as well, and the files do not change under the loaded one.
        before.close()

    def check(self) -> None:
        """Everything that can be seen of the two is equal, to the last bit."""
        one, other = self.never_saved, self.saved
        assert other.status == "open"
        assert other.token_ids == one.token_ids
        assert [kinds(record) for record in other.trace] == [kinds(record) for record in one.trace]
        assert counts(other.stats) == counts(one.stats)
        assert other.config == one.config
        assert same_bits(history_of(one), history_of(other))
        if one.token_ids:
            assert torch.equal(one.next_logits(), other.next_logits())

    def close(self) -> None:
        for session in self._open:
            session.close()


def kinds(record: Any) -> Any:
    """A record without the time it took."""
    return replace(record, seconds=0.0)


def counts(stats: SessionStats) -> tuple[Any, ...]:
    """Without bytes: how much room a buffer has is not part of what it holds."""
    return astuple(replace(stats, history_bytes=0, memory_bytes=0))


def history_of(session: Session) -> list[Tensor]:
    """Every key and value, joined over the places where they lie."""
    layers = session._core.state().sequence.layers
    pieces = [list(layer.history.pieces()) for layer in layers]
    return [
        torch.cat([getattr(piece, name) for piece in layer], dim=1)
        for layer in pieces
        for name in ("keys", "values")
        if layer
    ]


def same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def play(engine: Engine, config: SessionConfig, before: list[Doing], after: list[Doing]) -> None:
    """Do things, save and load, do more things, save and load again, and go on."""
    with TemporaryDirectory() as folder:
        pair = Pair(engine, config)
        try:
            for doing in before:
                pair.do(doing)
            pair.save_and_load(Path(folder, "session"))
            for doing in after:
                pair.do(doing)
            pair.check()
            pair.save_and_load(Path(folder, "session"))
            pair.do(("decode", [1, 2, 3]))
            pair.check()
        finally:
            pair.close()


@lru_cache
def engine_of(family: str, dtype: torch.dtype) -> Engine:
    """The shared engine of a family, in float32 or bfloat16."""
    if dtype is torch.float32:
        return tiny_engine(family, 16)
    found = next(item for item in FAMILIES if item.name == family)
    return Engine(build_model(found, dtype=dtype), word_tokenizer(), prefill_chunk_tokens=16)


@st.composite
def any_policy(draw: st.DrawFn) -> SessionConfig:
    """Every mode and slow step, over detectors and selectors that keep their contract."""
    config, kind = draw(sparse_policies()), draw(st.sampled_from([*SLOW_STEPS, "dense"]))
    return dense_twin(config) if kind == "dense" else config.replace(slow_step=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_loading_is_as_if_nothing_had_happened(family: str, dtype: torch.dtype) -> None:
    @for_each(f"{family} {dtype}", 2, config=any_policy(), before=things_to_do, after=things_to_do)
    def check(config: SessionConfig, before: list[Doing], after: list[Doing]) -> None:
        play(engine_of(family, dtype), config, before, after)


@pytest.mark.parametrize("slow_step", SLOW_STEPS)
def test_every_slow_step_goes_on_from_a_file(slow_step: Any) -> None:
    """Long enough that segments are closed, rectified and rejected on both sides of the file."""
    config = SessionConfig(
        slow_step=slow_step,
        boundaries=[{"name": "interval", "every_tokens": 5}, {"name": "entropy"}],
        memory={"sink_tokens": 1, "selected_tokens": 6, "recent_tokens": 3},
        refresh={"min_segment_tokens": 2, "max_segment_tokens": 9},
        sampling={"temperature": 0.8, "seed": 11},
    )
    long: Doing = ("decode", [(7 * index) % VOCABULARY for index in range(60)])
    before: list[Doing] = [long, ("go on", 20), ("fork", True), ("decode", [5, 6])]
    after: list[Doing] = [("go on", 20), ("rewind", 0.7), ("go on", 12)]
    play(engine_of("gemma3", torch.float32), config, before, after)


def test_below_what_a_fork_reads_only_rounding_differs(tmp_path: Path) -> None:
    engine = tiny_engine("llama")
    with engine.session(SessionConfig(mode="dense")) as session, ExitStack() as opened:
        session.decode([(7 * index) % VOCABULARY for index in range(60)], max_new_tokens=4)
        opened.enter_context(session.fork())
        session.save(tmp_path)
        loaded = opened.enter_context(engine.load_session(tmp_path))
        for one in (session, loaded):
            one.rewind(one.mark(30))
            one.decode([1, 2, 3], max_new_tokens=8)
        assert loaded.token_ids == session.token_ids
        assert close(loaded.next_logits(), session.next_logits())
