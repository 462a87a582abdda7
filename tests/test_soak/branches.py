"""Marks, rewinds, forks, closing and parking."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sfi_agent import InputError, SessionConfig, SessionStateError, Tool, drop_oldest_turns
from tests.test_soak.memory import buffers_of
from tests.test_soak.plants import Plant
from tests.test_soak.policies import follows_dense
from tests.test_soak.replay import new_fast_rows
from tests.test_soak.tools import ToolFork
from tests.test_soak.watched import SetMark, Watched

__all__ = [
    "check_tool_fork",
    "close",
    "fork",
    "open_watched",
    "overflow_of",
    "park",
    "rewind",
    "rewind_to",
    "set_mark",
]

_PATIENCE_SECONDS = 5.0


def open_watched(
    plant: Plant,
    config: SessionConfig,
    tools: list[Callable[..., Any] | Tool],
    *,
    talks: bool = True,
    shortens: bool = False,
) -> Watched:
    """A new session, open and empty; with tools it has a system prompt too."""
    session = plant.engine.session(
        config,
        system="Be kind." if tools else None,
        tools=tools,
        overflow=overflow_of(shortens),
    )
    watched = Watched(session, plant, bool(tools), talks, shortens)
    assert session.status == "open" and session.token_ids == []
    watched.settle()
    return watched


def overflow_of(shortens: bool) -> Any:
    """What a session does about an overflow."""
    return drop_oldest_turns(keep_turns=3) if shortens else "error"


def set_mark(watched: Watched, percent: int) -> SetMark:
    """A mark behind so many per cent of the ids; at 100 it stands at the end."""
    total = watched.tokens
    for count in (-1, total + 1):
        with pytest.raises(InputError):
            watched.session.mark(count)
    return watched.set_mark(total * percent // 100)


def rewind(watched: Watched, item: SetMark) -> None:
    """Go back to a mark: everything is as it was when it was set, or the mark is refused."""
    session, before = watched.session, watched.seen
    if not item.valid:
        with pytest.raises(SessionStateError, match="no longer valid"):
            session.rewind(item.mark)
        watched.check_untouched()
        return
    session.rewind(item.mark)
    tokens, moment = item.tokens, item.moment
    assert session.token_ids == before.ids[:tokens]
    assert session.trace == [record for record in before.trace if record.position < tokens]
    whole = min(before.processed_tokens, max(0, tokens - 1))
    if moment is not None:
        assert session.stats.history_tokens == min(whole, moment.processed_tokens)
    elif watched.config.slow_step == "rectify":
        # What a segment held that was open there is not history, although it was closed since.
        assert session.stats.history_tokens <= whole
    else:
        assert session.stats.history_tokens == whole
    if moment is None:
        watched.calls = {}
        if watched.odd_from is None and tokens:
            watched.odd_from = tokens - 1
    else:
        assert (session.token_ids, session.trace) == (moment.ids, moment.trace)
        assert session.messages == moment.messages
        watched.calls = dict(moment.calls)
        # What a fork inherited unprocessed is unprocessed again.
        watched.backlog = watched.backlog or session.stats.history_tokens < tokens - 1
    watched.settle()


def rewind_to(watched: Watched, tokens: int) -> None:
    """Go back to a place that nobody had marked before."""
    rewind(watched, watched.set_mark(tokens))


def fork(watched: Watched, config: SessionConfig | None, seed: int | None) -> Watched:
    """A child with the same past; its parent stays bit for bit as it was."""
    parent = watched.session
    child = parent.fork(config, seed=seed)
    assert child.stats.history_bytes == 0 and child.id != parent.id
    assert child.config.mode == (config or parent.config).mode
    if seed is not None:
        assert child.config.sampling.seed == seed
    branched = watched.branch(child)
    watched.check_untouched()
    if watched.marks:
        with pytest.raises(InputError, match="another session"):
            child.rewind(watched.marks[-1].mark)
    branched.settle()
    if watched.logits is not None and branched.logits is not None:
        # Not bit for bit: the child attends in two pieces what the parent attends in one.
        torch.testing.assert_close(branched.logits, watched.logits, rtol=1e-4, atol=1e-4)
    return branched


def check_tool_fork(parent: Watched, made: ToolFork) -> None:
    """A fork that a tool made and talked to is what its ids say; it is closed then.

    Args:
        parent: After the call that ran the tool.
        made: What the tool made.
    """
    child, ids = made.session, made.session.token_ids
    shared = [row for row in parent.fast_rows if row < made.tokens - 1]
    assert ids[: made.tokens] == parent.session.token_ids[: made.tokens] or parent.shortens
    if parent.session.token_ids[: made.tokens] == ids[: made.tokens]:
        watched = Watched(child, parent.plant, parent.tools, talks=True, backlog=True)
        watched.fast_rows = {row: parent.fast_rows[row] for row in shared}
        records = [record for record in child.trace if record.position >= made.tokens]
        if not follows_dense(parent.config):
            processed = child.stats.history_tokens
            watched.fast_rows |= new_fast_rows(
                parent.rules, records, made.refreshes, processed, lambda position: False
            )
        watched.settle()
    child.close()


def park(watched: Watched, place: Any, directory: Any) -> None:
    """Move an idle session out of the way; looking does not bring it back, working does."""
    session, before = watched.session, watched.seen
    on_disk = session.parked == "disk"
    watched.plant.engine.park(session, place, directory=directory)
    assert session.parked in (("disk",) if on_disk or place == "disk" else ("host", "disk"))
    assert (session.token_ids, session.messages, session.trace) == (
        before.ids,
        before.messages,
        before.trace,
    )
    assert session.stats.memory_bytes == 0


def close(watched: Watched, others: list[Watched]) -> None:
    """Close a session: nothing works any more, and what only it read is gone."""
    session = watched.session
    mark = watched.set_mark(watched.tokens).mark
    shared = {id(item.buffer) for other in others for item in buffers_of(other.session)}
    own = [weakref.ref(i.buffer) for i in buffers_of(session) if id(i.buffer) not in shared]
    session.close()
    session.close()
    assert (session.status, session.token_ids, session.stats.history_bytes) == ("closed", [], 0)
    end = time.monotonic() + _PATIENCE_SECONDS
    while any(reference() is not None for reference in own) and time.monotonic() < end:
        # An error that was caught holds on to the frames that it passed, and the engine's thread
        # may still be on its way out of the last step.
        gc.collect()
    assert [reference for reference in own if reference() is not None] == []
    actions: list[Callable[[], Any]] = [
        lambda: session.send("x"),
        lambda: session.run("x"),
        lambda: next(iter(session.stream("x"))),
        lambda: session.decode([1]),
        lambda: session.next_logits(),
        lambda: session.mark(),
        lambda: session.rewind(mark),
        lambda: session.fork(),
        lambda: session.save("nowhere"),
        lambda: session.engine.park(session),
        lambda: session.__enter__(),
    ]
    for action in actions:
        with pytest.raises(SessionStateError, match="closed"):
            action()
