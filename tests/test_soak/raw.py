"""Raw ids: decoded on one session, on many together, and twice from the same place."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sfi_agent import ContextOverflowError, NothingPendingError
from tests.test_soak.plants import CONTEXT_TOKENS
from tests.test_soak.replay import drawn_as_expected, expected_logits
from tests.test_soak.talk import CALM, Disturbance, Passes, StepFailed
from tests.test_soak.watched import Watched

__all__ = ["decode", "decode_again", "decode_batch"]


def decode(
    watched: Watched, new_ids: Sequence[int], count: int, disturbance: Disturbance = CALM
) -> None:
    """Append ids and decode so many more; what cannot be is refused before anything happens."""
    session, before = watched.session, watched.seen
    if _refused(watched, new_ids, count):
        watched.check_untouched()
        return
    got: list[int] | None = None
    chosen = disturbance.for_way("send")
    with Passes(watched, chosen).disturbed():
        try:
            got = session.decode(new_ids, max_new_tokens=count)
        except StepFailed:
            assert chosen.kind == "fail_pass"
    ids, start = session.token_ids, len(before.ids) + len(new_ids)
    assert ids[:start] == [*before.ids, *new_ids]
    if got is not None:
        assert ids[start:] == got and len(got) <= count
    if chosen.harmless:
        assert len(ids) == start + count
    # With a count of 0 all but the last id are processed.
    watched.backlog = start == len(ids) and not chosen.harmless
    watched.lost = False
    _note_raw(watched, new_ids, len(ids) - start)
    watched.settle(range(start, len(ids)))


def _refused(watched: Watched, new_ids: Sequence[int], count: int) -> bool:
    """Try what must be refused."""
    session, present = watched.session, watched.tokens
    if not present and not new_ids:
        with pytest.raises(NothingPendingError):
            session.decode(new_ids, max_new_tokens=count)
        return True
    if present + len(new_ids) + count > CONTEXT_TOKENS:
        with pytest.raises(ContextOverflowError):
            session.decode(new_ids, max_new_tokens=count)
        return True
    return False


def _note_raw(watched: Watched, new_ids: Sequence[int], generated: int) -> None:
    """Ids without a message, or an answer that goes on behind its end."""
    before = len(watched.seen.ids)
    if new_ids:
        assert watched.session.messages == watched.seen.messages
        if watched.raw_from is None:
            watched.raw_from = before
    elif generated:
        watched.calls = {}
        if watched.odd_from is None:
            watched.odd_from = max(0, before - 1)


def decode_batch(group: Sequence[Watched], count: int) -> None:
    """Decode on many sessions together, each from its pending token."""
    engine, sessions = group[0].plant.engine, [watched.session for watched in group]
    if any(watched.tokens + count > CONTEXT_TOKENS for watched in group):
        with pytest.raises(ContextOverflowError):
            engine.decode_batch(sessions, max_new_tokens=count)
        for watched in group:
            watched.check_untouched()
        return
    rows = engine.decode_batch(sessions, max_new_tokens=count)
    for watched, row in zip(group, rows, strict=True):
        before = watched.seen.ids
        assert watched.session.token_ids == [*before, *row] and len(row) == count
        watched.backlog = watched.backlog and not count
        watched.lost = False
        _note_raw(watched, [], count)
        watched.settle(range(len(before), len(before) + count))


def decode_again(watched: Watched, count: int) -> None:
    """What follows is the same after a rewind and in a fork, and for some policies in a session
    that is given all ids at once; afterwards everything is as if nothing had happened."""
    session, before = watched.session, watched.seen
    if not before.ids or watched.tokens + count > CONTEXT_TOKENS:
        return
    mark = session.mark()
    with session.fork() as child:
        found = []
        for _ in range(2):
            found.append(session.decode([], max_new_tokens=count))
            session.rewind(mark)
            assert (session.token_ids, session.trace) == (before.ids, before.trace)
        assert found[0] == found[1] == child.decode([], max_new_tokens=count)
    watched.refreshes.clear()
    watched.calls, watched.lost = dict(before.calls), False
    watched.settle()
    if watched.config.mode == "dense" and not watched.fast_rows:
        with watched.plant.engine.session(watched.config) as fresh:
            fresh.decode(before.ids, max_new_tokens=count)
            ids = fresh.token_ids
        if ids != [*before.ids, *found[0]]:
            expected = expected_logits(watched.plant.twin, ids, {}, watched.rules)
            drawn_as_expected(ids, range(len(before.ids), len(ids)), expected, watched.config)
