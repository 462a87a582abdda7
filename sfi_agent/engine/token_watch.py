"""Somebody who follows the tokens of a decoding and knows where they must be exact, or restricted.

The engine does not know why: the session layer says so of tool calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

__all__ = ["UNWATCHED", "TokenWatch"]


class TokenWatch(Protocol):
    """Told every chosen token once; what it says is about the token behind the last one told.

    Tokens that are taken back are forgotten by `restore`.

    Attributes:
        exact: Whether the next token must be the one that dense decoding over the present history
            chooses.
        reason: Why, as it stands in a trace, such as "tool_call"; always the same.
    """

    @property
    def exact(self) -> bool: ...

    @property
    def reason(self) -> str: ...

    def start(self, ids: Sequence[int]) -> None:
        """A decoding begins behind these ids: all of the sequence."""
        ...

    def note(self, token_id: int) -> None:
        """This token was chosen."""
        ...

    def allowed(self) -> Tensor | None:
        """Which tokens may come next: `[vocabulary]` bool on the model's device, at least one of
        them true; None where all may. Cheap to ask twice."""
        ...

    def snapshot(self) -> Any:
        """The present state, as a value that later tokens do not change."""
        ...

    def restore(self, state: Any) -> None:
        """Return to a state that `snapshot` gave since the last start."""
        ...


class _Unwatched:
    """Nothing is exact and everything is allowed."""

    exact = False
    reason = ""

    def start(self, ids: Sequence[int]) -> None:
        pass

    def note(self, token_id: int) -> None:
        pass

    def allowed(self) -> Tensor | None:
        return None

    def snapshot(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        pass


UNWATCHED: TokenWatch = _Unwatched()
"""For decodings that nobody follows."""
