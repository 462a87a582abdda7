"""Prefills in pieces are the chunks that the runner would have taken in one go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sfi_agent.engine.runner import _chunks
from sfi_agent.session.asynchronous.prefill_pieces import piece_tokens


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 60))
def test_pieces_are_the_runners_chunks(total: int, size: int, evidence_rows: int) -> None:
    rows = min(evidence_rows, total)
    pieces, left = [], total
    while tokens := piece_tokens(left, size, rows):
        pieces.append(tokens)
        left -= tokens
    # What is left is executed whole, in chunks again.
    pieces += [end - start for start, end in _chunks(left, size, rows)]
    assert pieces == [end - start for start, end in _chunks(total, size, rows)]
