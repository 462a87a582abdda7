"""Marks: places a session can be rewound to, and how long they stay valid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sfi_agent.errors import InputError, SessionStateError, explain

__all__ = ["Mark", "MarkKeeper"]


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in one session; give it back to `session.rewind`. Its fields are not contract.

    Attributes:
        token_count: How many of the session's ids lie before it.
    """

    token_count: int
    _keeper: MarkKeeper = field(repr=False, compare=False)
    _time: int = field(repr=False)
    _history_tokens: int = field(repr=False, compare=False)


class MarkKeeper:
    """Knows which marks still point at what they were set on.

    A mark is valid until the session is cut to fewer ids than lie before the mark: earlier marks
    survive a rewind, later ones do not come back even if the session grows again.
    """

    def __init__(self) -> None:
        self._time = 0
        self._cuts: list[tuple[int, int]] = []

    def mark(self, token_count: int, present_tokens: int, history_at: Callable[[int], int]) -> Mark:
        """A mark behind the first `token_count` ids.

        Args:
            token_count: 0 to all of them.
            present_tokens: How many there are.
            history_at: How many keys and values a session has that ended behind so many ids.

        Raises:
            InputError: There are fewer, or it is no count.
        """
        is_count = isinstance(token_count, int) and not isinstance(token_count, bool)
        if not is_count or not 0 <= token_count <= present_tokens:
            raise InputError(
                explain(
                    "set a mark",
                    got=f"token_count={token_count!r}",
                    allowed=f"0 to {present_tokens}, the ids the session has",
                )
            )
        return Mark(token_count, self, self._time, history_at(token_count))

    def note_cut(self, tokens: int) -> None:
        """The session keeps only its first `tokens` ids from now on."""
        self._time += 1
        # A later, deeper cut makes shallower ones irrelevant to every mark that both touch.
        while self._cuts and self._cuts[-1][1] >= tokens:
            self._cuts.pop()
        self._cuts.append((self._time, tokens))

    def check(self, mark: Mark) -> int:
        """Make sure that a mark may be used.

        Returns:
            How many keys and values a session has that never went further.

        Raises:
            InputError: It belongs to another session, or is no mark.
            SessionStateError: What it points to was removed by an earlier rewind.
        """
        is_mark = isinstance(mark, Mark)
        if not is_mark or mark._keeper is not self:
            raise InputError(
                explain(
                    "rewound to a mark",
                    got="a mark of another session" if is_mark else repr(mark),
                    remedy="marks belong to the session that made them, forks make their own",
                )
            )
        for time, tokens in self._cuts:
            if time > mark._time and tokens < mark.token_count:
                raise SessionStateError(
                    explain(
                        "rewound to a mark that is no longer valid",
                        got=f"a mark at {mark.token_count} tokens; "
                        f"the session was cut to {tokens} since",
                        allowed="marks set before the place of every later rewind",
                    )
                )
        return mark._history_tokens
