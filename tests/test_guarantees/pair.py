"""A dense session and a verifying one that are given the same things to do, and must agree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from sfi_agent import Session, SessionConfig
from sfi_agent.engine.decoding_state import DecodeLimits
from sfi_agent.engine.instruments import Instruments
from tests.test_guarantees.play import LOGITS_TOLERANCE, choice_lead, close

__all__ = ["Pair", "Planned", "RoundingDecides", "raising_at"]


class RoundingDecides(Exception):
    """The two differ at a token whose lead is within rounding: what follows cannot be compared."""


class Planned(Exception):
    """Raised by a test in the middle of a decoding."""


class Pair:
    """Both sessions, always with the same ids.

    Args:
        dense: Of mode dense.
        verifying: Of `slow_step: verify` with the same sampling and the same ids.
    """

    def __init__(self, dense: Session, verifying: Session) -> None:
        self.dense = dense
        self.verifying = verifying
        self._logits: dict[int, Tensor] = {}
        dense.attach(Instruments(on_logits=self._logits.__setitem__))

    @property
    def config(self) -> SessionConfig:
        return self.dense.config

    def decode(
        self, ids: Sequence[int], new_tokens: int, stop_ids: Collection[int] = ()
    ) -> list[int]:
        """Decode on both; they must return the same."""
        before = len(self.dense.token_ids) + len(ids)
        expected = self.dense.decode(ids, max_new_tokens=new_tokens, stop_ids=stop_ids)
        got = self.verifying.decode(ids, max_new_tokens=new_tokens, stop_ids=stop_ids)
        self._compare(got, expected, before)
        assert len(got) == len(expected)
        self.check()
        return got

    def break_off(self, ids: Sequence[int], decode: Callable[[list[int]], Any]) -> None:
        """A decoding on the verifying one that ends early: what it kept must be right.

        Args:
            ids: New ids of the turn.
            decode: Decodes these ids on the verifying session, and breaks off.
        """
        before = len(self.verifying.token_ids) + len(ids)
        decode(list(ids))
        got = self.verifying.token_ids[before:]
        expected = self.dense.decode(ids, max_new_tokens=len(got))
        self._compare(got, expected, before)
        self.check(whole=bool(got))

    def leave(self, ids: list[int], kept: int) -> None:
        """Ask the verifying session for some records, then stop listening."""
        core = self.verifying._core
        core.append(ids, 20)
        steps: Any = core.steps(DecodeLimits(20))
        for _ in range(kept):
            next(steps)
            assert core.trace[-1].position == len(core.ids) - 1
        steps.close()

    def rewind(self, tokens: int) -> None:
        for session in (self.dense, self.verifying):
            session.rewind(session.mark(tokens))
        self.check()

    def check(self, *, whole: bool = True) -> None:
        """Ids agree, keys and values are all there, and the next logits are the same."""
        session = self.verifying
        ids = session.token_ids
        assert ids == self.dense.token_ids
        assert [record.position for record in session.trace] == [
            record.position for record in self.dense.trace
        ]
        assert all(ids[record.position] == record.token_id for record in session.trace)
        processed = session.stats.history_tokens
        # Before the first token of a turn a failure or a cancellation leaves more than one id.
        assert processed == len(ids) - 1 or (not whole and processed < len(ids))
        for layer in session._core._opened().sequence.layers:
            assert layer.history.tokens == processed
        assert close(session.next_logits(), self.dense.next_logits())

    def _compare(self, got: list[int], expected: list[int], start: int) -> None:
        for index, (one, other) in enumerate(zip(got, expected, strict=False)):
            if one == other:
                continue
            logits = self._logits[start + index]
            lead = choice_lead(logits, self.config, start + index)
            allowed = LOGITS_TOLERANCE * float(logits.abs().max())
            assert lead <= allowed, f"{index} of {got} against {expected}: led by {lead:.3g}"
            raise RoundingDecides


def raising_at(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, raising `Planned` in its n-th call, before or after its work in turns."""
    left = call

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and call % 2:
            raise Planned
        result = function(*arguments, **keywords)
        if left == 0:
            raise Planned
        return result

    return wrapped
