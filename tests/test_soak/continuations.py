"""Several continuations of one session, against a fork that goes on by itself."""

from __future__ import annotations

from typing import Any

import pytest

from sfi_agent import ContextOverflowError, NothingPendingError, Session
from tests.test_guarantees.play import close
from tests.test_soak.plants import CONTEXT_TOKENS
from tests.test_soak.policies import follows_dense
from tests.test_soak.watched import Watched, common_tokens, generated_from

__all__ = ["branch"]


def branch(watched: Watched, count: int, question: str | None) -> None:
    """Let the model answer a few times at once, and close what came of it.

    Args:
        watched: Left as it is.
        count: Of branches.
        question: None goes on from the pending token.
    """
    session, chat = watched.session, watched.session._chat
    assert chat is not None
    if question is None and not watched.tokens:
        with pytest.raises(NothingPendingError):
            session.branch(count)
        return
    most = watched.config.sampling.max_new_tokens
    if question is None and watched.tokens + most > CONTEXT_TOKENS:
        with pytest.raises(ContextOverflowError):
            session.branch(count)
        return
    try:
        children = session.branch(count, question)
    except ContextOverflowError:
        assert question is not None
        watched.check_untouched()
        return
    watched.check_untouched()
    with session.fork() as twin:
        if question is None:
            twin.decode([], stop_ids=chat.stop_ids)
        elif not watched.shortens:
            twin.send(question)
        # The first branch goes on as the session itself would.
        if question is None or not watched.shortens:
            check_same(children[0], twin)
    first = watched.config.sampling.seed
    assert [child.config.sampling.seed for child in children] == [*range(first, first + count)]
    for child in children:
        check_branch(watched, child)
        child.close()


def check_same(child: Session, twin: Session) -> None:
    """Two sessions that have the same past and did the same thing."""
    assert child.token_ids == twin.token_ids and child.messages == twin.messages
    kinds: list[Any] = [[(step.kind, step.reason) for step in s.trace] for s in (child, twin)]
    assert kinds[0] == kinds[1]
    assert close(child.next_logits(), twin.next_logits())


def check_branch(parent: Watched, child: Session) -> None:
    """A branch is what its ids say; under observe, where nobody knows what its steps saw, its past
    and its counts are looked at alone."""
    watched = Watched(child, parent.plant, parent.tools, talks=True, backlog=True)
    ids, before = child.token_ids, parent.seen.ids
    start = generated_from(child.trace, len(ids))
    kept = common_tokens(before, ids)
    assert kept == len(before) or parent.seen.renders_again or kept == len(before) - 1
    watched.fast_rows = {row: f for row, f in parent.fast_rows.items() if row < kept - 1}
    if follows_dense(parent.config):
        watched.settle(range(max(start, kept), len(ids)))
    reply = child.last_reply
    if reply is not None and reply.steps and reply.steps[-1].position == len(ids) - 1:
        usage = reply.usage
        assert usage.prompt_tokens + usage.output_tokens == len(ids)
        assert usage.cached_tokens + usage.prefilled_tokens == usage.prompt_tokens
