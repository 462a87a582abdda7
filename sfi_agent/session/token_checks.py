"""What a session refuses before any compute: unusable ids, nothing to go on from, no room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfi_agent.errors import ContextOverflowError, InputError, NothingPendingError, explain

__all__ = ["check_pending", "check_room", "checked_ids"]


def checked_ids(ids: Sequence[int], vocabulary_size: int) -> list[int]:
    """Token ids as plain integers.

    Args:
        ids: Anything that lists them, a tensor too.
        vocabulary_size: Of the model.

    Raises:
        InputError: An id is not an integer of the vocabulary.
    """
    allowed = f"a flat sequence of integers from 0 to {vocabulary_size - 1}"
    # Empty texts and mappings list nothing, and are no ids all the same.
    listed: Any = None if isinstance(ids, (str, bytes, Mapping)) else ids
    try:
        values = list(listed.tolist() if hasattr(listed, "tolist") else listed)
    except TypeError as error:
        raise InputError(explain("gave token ids", got=repr(ids), allowed=allowed)) from error
    for index, value in enumerate(values):
        integer = isinstance(value, int) and not isinstance(value, bool)
        if not integer or not 0 <= value < vocabulary_size:
            raise InputError(
                explain(
                    f"gave token ids of which number {index} is unusable",
                    got=repr(value),
                    allowed=allowed,
                )
            )
    return values


def check_pending(kept_tokens: int, processed_tokens: int) -> None:
    """Refuse to go on without new ids where every id that stays has been processed.

    Raises:
        NothingPendingError: Nothing would be there to process.
    """
    if kept_tokens <= processed_tokens:
        raise NothingPendingError(
            explain(
                "asked to continue where no token waits to be processed",
                got=f"no new ids and a history of {processed_tokens} tokens",
                remedy="give at least one new id",
            )
        )


def check_room(present: int, new: int, room_tokens: int, limit_tokens: int) -> None:
    """Refuse a sequence that the model does not take.

    Args:
        present: Ids that stay.
        new: Ids behind them.
        room_tokens: Tokens to generate behind those.
        limit_tokens: Longest sequence of the model.

    Raises:
        ContextOverflowError: It would be longer.
    """
    needed = present + new + room_tokens
    if needed > limit_tokens:
        raise ContextOverflowError(
            explain(
                f"asked for a sequence of {needed} tokens ({present} present, {new} new, "
                f"{room_tokens} to generate)",
                allowed=f"{limit_tokens} tokens in this model",
                remedy="shorten the input, lower max_new_tokens or start a new session",
            ),
            needed_tokens=needed,
            limit_tokens=limit_tokens,
        )
