"""A watch over token ids alone, and what must hold of the exact stretches that it asks for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfi_agent import Session
from sfi_agent.engine.instruments import Instruments
from sfi_agent.observe.trace import StepRecord
from tests.families import VOCABULARY
from tests.test_guarantees.play import LOGITS_TOLERANCE, choice_lead, close

__all__ = ["SpanWatch", "Spans", "check_spans", "stretches", "watch_with"]


@dataclass(frozen=True)
class Spans:
    """Which tokens begin and end a stretch, and whether tokens in it are restricted.

    Attributes:
        opens: A stretch begins behind one of these.
        closes: And ends with one of these.
        exact: Whether the tokens of a stretch must be exact.
        restricted: Whether a third of the vocabulary, another one at every place, may not be
            chosen in a stretch.
    """

    opens: frozenset[int]
    closes: frozenset[int]
    exact: bool = True
    restricted: bool = False


class SpanWatch:
    """See `TokenWatch`. Remembers all that it was told and not made to forget.

    Args:
        spans: Its rules.
        first_position: Where the answer begins: tokens from there on were chosen.
    """

    reason = "span"

    def __init__(self, spans: Spans, first_position: int) -> None:
        self.spans = spans
        self.first_position = first_position
        self.told: list[int] = []
        self.inside = False
        self.restored = 0

    @property
    def exact(self) -> bool:
        return self.spans.exact and self.inside

    def start(self, ids: Sequence[int]) -> None:
        self.told, self.inside = [], False
        for token_id in ids[self.first_position :]:
            self.note(token_id)

    def note(self, token_id: int) -> None:
        self.told.append(token_id)
        self.inside = token_id not in self.spans.closes if self.inside else self._opens(token_id)

    def allowed(self) -> Tensor | None:
        if not self.inside or not self.spans.restricted:
            return None
        # Depends on every token since the beginning: a wrong state shows at once.
        shift = (31 * len(self.told) + sum(self.told)) % 3
        return (torch.arange(VOCABULARY) + shift) % 3 != 0

    def snapshot(self) -> Any:
        return tuple(self.told), self.inside

    def restore(self, state: Any) -> None:
        told, self.inside = state
        self.told = list(told)
        self.restored += 1

    def _opens(self, token_id: int) -> bool:
        return token_id in self.spans.opens


def watch_with(session: Session, spans: Spans, first_position: int) -> list[SpanWatch]:
    """Let every later decoding of a session be watched; yields the watches, newest last."""
    made: list[SpanWatch] = []

    def make(trace: Sequence[StepRecord]) -> SpanWatch:
        made.append(SpanWatch(spans, first_position))
        return made[-1]

    session._core.make_watch = make
    return made


def stretches(ids: Sequence[int], first: int, spans: Spans) -> Iterator[tuple[int, int]]:
    """The exact stretches among chosen tokens: position of the first token, and behind the last."""
    start: int | None = None
    for position in range(first, len(ids)):
        if start is None and ids[position] in spans.opens:
            start = position + 1
        elif start is not None and ids[position] in spans.closes:
            yield start, position + 1
            start = None
    if start is not None and start < len(ids):
        yield start, len(ids)


def check_spans(
    session: Session, spans: Spans, first_position: int, not_chosen: Collection[int] = ()
) -> int:
    """Every chosen token of an exact stretch is the one that dense decoding chooses there, over
    the history as it is, from the tokens that were allowed.

    Args:
        session: Between two decodings.
        spans: Rules of its watches.
        first_position: Of the first token that they were told.
        not_chosen: Positions of tokens that were given.

    Returns:
        How many tokens were compared.
    """
    compared, ids = 0, session.token_ids
    sampler = session._core._decoder._sampler
    for start, end in stretches(ids, first_position, spans):
        logits = _dense_logits(session, start, end)
        twin = SpanWatch(spans, first_position)
        for position in range(start, end):
            if position in not_chosen:
                continue
            compared += 1
            twin.start(ids[:position])
            row, allowed = logits[position], twin.allowed()
            if allowed is not None:
                assert bool(allowed[ids[position]])
                row = row.masked_fill(~allowed, -1e4)
            if int(sampler.choose(row, position)) != ids[position]:
                lead = choice_lead(row, session.config, position)
                least = LOGITS_TOLERANCE * float(logits[position].abs().max())
                assert lead <= least, f"position {position}: led by {lead:.3g}"
    return compared


def _dense_logits(session: Session, start: int, end: int) -> dict[int, Tensor]:
    """By position what dense decoding draws from, over the session's own history before `start`.

    The history of the stretch itself must be that of dense steps as well.
    """
    logits: dict[int, Tensor] = {}
    with session.fork(session.config.replace(mode="dense")) as child:
        child._core.make_watch = None
        child.rewind(child.mark(start))
        child.attach(Instruments(on_logits=logits.__setitem__))
        child.follow(session.token_ids[start:end])
        _same_keys(session, child, min(end - 1, session._core.processed_tokens))
    return logits


def _same_keys(session: Session, child: Session, tokens: int) -> None:
    """The stretch's keys and values are those of dense steps."""
    states = [one._core._opened().sequence.layers for one in (session, child)]
    for mine, theirs in zip(*states, strict=True):
        got, expected = mine.history.joined(0, tokens), theirs.history.joined(0, tokens)
        assert close(got.keys, expected.keys) and close(got.values, expected.values)
