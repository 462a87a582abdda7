"""Many decodings stepped together: who steps when, and nothing of how a step is taken.

Every decoding is a generator of requests, so a tick is: take the requests of all of them, execute
those that should run now in one go, send the outcomes back. What a decoding asks for and gets does
not depend on the others; only when it gets it does.

Two rules say who waits. Slow steps of single tokens are staggered: no more than a share of the
sequences takes one in the same step, so that steps stay of even length and slow rows find fast
rows to share the weights with; sequences that were held back once are out of step from then on.
Blocks of rectify and verify are gathered: they are worth a pass of their own, so they wait until
half of the sequences that take blocks have one, or one of them has waited for a number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from sfi_agent.engine.decoder import DecodeMoves
from sfi_agent.engine.requests import BlockStep, DenseStep, StepOutcome, StepRequest
from sfi_agent.observe.trace import StepRecord

__all__ = ["BatchDecoding", "Waiting", "chosen_lanes"]

_SLOW_SHARE = 4
"""One sequence in so many may take a slow step at once, at least one."""
_LONGEST_WAIT_TICKS = 16
"""A block that found no company by then runs alone."""


class Execute(Protocol):
    """`Runner.execute`."""

    def __call__(
        self, requests: Sequence[StepRequest], batch: int, waiting: int
    ) -> list[StepOutcome]: ...


class Waiting(Protocol):
    """A decoding and the request it waits with, since which tick; and whether blocks may be
    expected of it."""

    request: StepRequest | None
    asked_at: int
    takes_blocks: bool


Waits = TypeVar("Waits", bound=Waiting)


class _Lane:
    """One decoding and the request it waits with."""

    def __init__(self, moves: DecodeMoves) -> None:
        self.moves = moves
        self.request: StepRequest | None = None
        self.asked_at = 0
        self.takes_blocks = True

    def advance(self, outcome: StepOutcome | None, tick: int) -> None:
        """Go on to the next request; without one the decoding is over."""
        self.request, self.asked_at = None, tick
        try:
            move = self.moves.send(outcome)
            while isinstance(move, StepRecord):
                move = self.moves.send(None)
        except StopIteration:
            return
        self.request = move


class BatchDecoding:
    """Runs decodings to their ends, in the same steps where that pays.

    Args:
        decodings: From `Decoder.moves`, or a wrapper of it that keeps the records.
        execute: Executes the requests of a tick.
    """

    def __init__(self, decodings: Sequence[DecodeMoves], execute: Execute) -> None:
        self._lanes = [_Lane(moves) for moves in decodings]
        self._execute = execute

    def run(self) -> None:
        """Decode everything. What one of them raises ends all, each between two of its steps."""
        try:
            tick = 0
            for lane in self._lanes:
                lane.advance(None, tick)
            while live := [lane for lane in self._lanes if lane.request is not None]:
                tick += 1
                chosen = chosen_lanes(live, tick)
                requests = [lane.request for lane in chosen if lane.request is not None]
                # Always the slots of the whole batch: a shorter one would be other programs.
                outcomes = self._execute(requests, len(self._lanes), len(live) - len(chosen))
                for lane, outcome in zip(chosen, outcomes, strict=True):
                    lane.advance(outcome, tick)
        finally:
            for lane in self._lanes:
                lane.moves.close()


def chosen_lanes(live: Sequence[Waits], tick: int) -> list[Waits]:
    """Those whose requests run now, in the order of the batch; at least one."""
    blocks = [lane for lane in live if _is_block(lane.request)]
    slow = [lane for lane in live if _is_staggered(lane.request)]
    held: list[Waits] = []
    waited = max((tick - lane.asked_at for lane in blocks), default=0)
    company = sum(lane.takes_blocks for lane in live)
    if 2 * len(blocks) < company and waited <= _LONGEST_WAIT_TICKS:
        held += blocks
    most_slow = max(1, -(-len(live) // _SLOW_SHARE))
    # The longest wait goes first; of equals the first of the batch.
    held += sorted(slow, key=lambda lane: lane.asked_at)[most_slow:]
    return [lane for lane in live if lane not in held] or list(live)


def _is_staggered(request: StepRequest | None) -> bool:
    """A slow step of one token; prefills and steps of mode dense are not held back."""
    if not isinstance(request, DenseStep) or len(request.ids) > 1:
        return False
    return request.refresh is not None and request.interrupted is None


def _is_block(request: StepRequest | None) -> bool:
    if isinstance(request, DenseStep):
        # Rectify processes a segment again; a prefill can be interrupted, a slow step cannot.
        return len(request.ids) > 1 and request.interrupted is None
    return isinstance(request, BlockStep)
