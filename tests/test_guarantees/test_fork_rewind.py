"""Guarantee 6: forks leave their parent alone, a rewind leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sfi_agent import Session, SessionConfig
from tests.families import tiny_engine
from tests.reference import dense_logits
from tests.test_guarantees.play import close, play
from tests.test_guarantees.policies import (
    LAYOUT_NAMES,
    chunk_sizes,
    for_each,
    prompts,
    sparse_policies,
)

NEW_TOKENS = 7


def history_of(session: Session) -> list[Tensor]:
    """Copies of every key and value of a session."""
    state: Any = session._core._state
    pieces = [layer.history.joined(0, layer.history.tokens) for layer in state.sequence.layers]
    return [tensor.clone() for piece in pieces for tensor in (piece.keys, piece.values)]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_a_parent_is_bit_identical_after_its_forks_ran(family: str) -> None:
    @for_each(
        family,
        5,
        config=sparse_policies(),
        other=sparse_policies(),
        turns=st.lists(prompts, min_size=4, max_size=4),
        chunk=chunk_sizes,
    )
    def check(
        config: SessionConfig, other: SessionConfig, turns: list[list[int]], chunk: int | None
    ) -> None:
        engine = tiny_engine(family, chunk)
        alone = play(engine, config, [turns[0], turns[1]], new_tokens=NEW_TOKENS)

        def have_forks(parent: Session) -> None:
            before, logits = history_of(parent), parent.next_logits()
            with parent.fork(other) as child:
                child.decode(turns[2], max_new_tokens=NEW_TOKENS)
                with child.fork(config) as grandchild:
                    grandchild.decode(turns[3], max_new_tokens=NEW_TOKENS)
                    child.rewind(child.mark(1))
                    child.decode(turns[3], max_new_tokens=2)
                    grandchild.decode([], max_new_tokens=2)
            assert same_bits(before, history_of(parent))
            assert torch.equal(logits, parent.next_logits())

        forked = play(engine, config, turns[:2], new_tokens=NEW_TOKENS, between=have_forks)
        assert forked.ids == alone.ids
        assert torch.equal(forked.next_logits, alone.next_logits)


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_forks_are_sessions_of_the_same_past(family: str) -> None:
    """A child, a grandchild and a parent that was cut below both: all equal dense recompute."""

    @for_each(
        family,
        5,
        config=sparse_policies(full_budget=True),
        turns=st.lists(prompts, min_size=3, max_size=3),
        cut=st.integers(1, 5),
    )
    def check(config: SessionConfig, turns: list[list[int]], cut: int) -> None:
        engine = tiny_engine(family)
        with engine.session(config) as parent:
            parent.decode(turns[0], max_new_tokens=NEW_TOKENS)
            child = parent.fork()
            child.decode(turns[1], max_new_tokens=NEW_TOKENS)
            grandchild = child.fork(config.replace(mode="dense"))
            parent.rewind(parent.mark(min(cut, len(turns[0]))))
            for session in (parent, grandchild, child):
                session.decode(turns[2], max_new_tokens=NEW_TOKENS)
            assert child.token_ids == grandchild.token_ids
            found = [(s.token_ids, s.next_logits()) for s in (parent, child, grandchild)]
            for session in (child, grandchild):
                session.close()
        for ids, logits in found:
            assert close(logits, dense_logits(engine.model, ids)[-1])


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_a_rewind_equals_never_having_gone_there(family: str) -> None:
    """Also into generated text: the twin stops generating where the other is rewound to."""

    @for_each(
        family,
        6,
        config=sparse_policies(),
        turns=st.lists(prompts, min_size=3, max_size=3),
        kept=st.integers(1, NEW_TOKENS),
        chunk=chunk_sizes,
    )
    def check(config: SessionConfig, turns: list[list[int]], kept: int, chunk: int | None) -> None:
        engine = tiny_engine(family, chunk)
        with engine.session(config) as twin, engine.session(config) as session:
            twin.decode(turns[0], max_new_tokens=kept)
            session.decode(turns[0], max_new_tokens=NEW_TOKENS)
            mark = session.mark(len(turns[0]) + kept)
            session.decode(turns[1], max_new_tokens=NEW_TOKENS)
            session.rewind(mark)
            assert session.token_ids == twin.token_ids
            assert [r.kind for r in session.trace] == [r.kind for r in twin.trace]
            assert same_bits(history_of(session), history_of(twin))
            assert torch.equal(session.next_logits(), twin.next_logits())
            for one in (twin, session):
                one.decode(turns[2], max_new_tokens=NEW_TOKENS)
            assert session.token_ids == twin.token_ids
            assert torch.equal(session.next_logits(), twin.next_logits())


def test_a_policy_comparison_shares_one_prefill() -> None:
    """Children with other policies read the parent's history; nothing of it is copied."""
    dense = SessionConfig(mode="dense")
    sparse = SessionConfig(boundaries=[{"name": "never"}], memory={"recent_tokens": 4})
    engine = tiny_engine("llama", 16)
    with engine.session(dense) as parent:
        parent.decode(list(range(100)), max_new_tokens=0)
        with parent.fork(sparse) as child:
            assert child.stats.history_bytes == 0
            assert child.config is sparse
            assert child.stats.history_tokens == parent.stats.history_tokens == 99
            first = child.decode([], max_new_tokens=1)
        assert parent.decode([], max_new_tokens=1) == first
