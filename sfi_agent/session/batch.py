"""Decoding on many sessions together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from sfi_agent.engine.batch import BatchDecoding
from sfi_agent.errors import InputError, explain
from sfi_agent.session.arguments import one_each
from sfi_agent.session.session import Session

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine

__all__ = ["decode_batch"]


def decode_batch(
    engine: Engine,
    sessions: Sequence[Session],
    token_ids: Sequence[Sequence[int]] | None,
    max_new_tokens: int | Sequence[int | None] | None,
    stop_ids: Collection[int],
) -> list[list[int]]:
    """See `Engine.decode_batch`."""
    _check_sessions(engine, sessions)
    count = len(sessions)
    nothing: Sequence[int] = ()
    new_ids = [nothing] * count
    if token_ids is not None:
        new_ids = one_each("token_ids to decode_batch", token_ids, count, "sessions")
    most = (
        [max_new_tokens] * count
        if max_new_tokens is None or isinstance(max_new_tokens, int)
        else one_each("max_new_tokens to decode_batch", max_new_tokens, count, "sessions")
    )
    with ExitStack() as owned:
        raws = [owned.enter_context(session._raw_decoding("decode_batch")) for session in sessions]
        limits = [raw.limits(number, stop_ids, ()) for raw, number in zip(raws, most, strict=True)]
        for raw, ids, limit in zip(raws, new_ids, limits, strict=True):
            # All of them before any: what is refused leaves every session as it was.
            raw.core.check(ids, limit.max_new_tokens)
        decodings = []
        for raw, ids, limit in zip(raws, new_ids, limits, strict=True):
            owned.callback(raw.tell_chat, raw.append(ids, limit))
            if limit.max_new_tokens:
                decodings.append(raw.core.moves(limit, raw.records))
        for raw, limit in zip(raws, limits, strict=True):
            if not limit.max_new_tokens:
                raw.core.prefill()
        BatchDecoding(decodings, engine.runner.execute).run()
    return [[record.token_id for record in raw.records] for raw in raws]


def _check_sessions(engine: Engine, sessions: Sequence[Session]) -> None:
    attempted, remedy = "called engine.decode_batch", "give a list of open sessions of this engine"
    allowed = "distinct sessions of this engine"
    if not isinstance(sessions, Sequence) or not all(isinstance(s, Session) for s in sessions):
        raise InputError(explain(attempted, got=repr(sessions), allowed=allowed, remedy=remedy))
    if any(session.engine.model is not engine.model for session in sessions):
        got = "a session of another model"
        raise InputError(explain(attempted, got=got, allowed=allowed, remedy=remedy))
    if len({id(session) for session in sessions}) < len(sessions):
        got = "the same session twice"
        raise InputError(explain(attempted, got=got, allowed=allowed, remedy="fork it first"))
