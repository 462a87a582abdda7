"""Decoding raw ids on one session, whoever steps it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from sfi_agent.engine.decoding_state import DecodeLimits
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.arguments import at_least, integers
from sfi_agent.session.cancellation import Cancellation
from sfi_agent.session.chat import Chat
from sfi_agent.session.driving import decode_here
from sfi_agent.session.token_core import TokenCore

__all__ = ["RawDecoding"]


@dataclass(frozen=True, slots=True)
class RawDecoding:
    """Raw ids in, raw ids out, on one session whose caller owns it.

    Attributes:
        core: Ids, history and policy.
        chat: Told what was appended, so that messages know; None without a chat template.
        cancelled: Set by `Session.cancel`.
        records: Of the tokens so far.
    """

    core: TokenCore
    chat: Chat | None
    cancelled: Cancellation
    records: list[StepRecord] = field(default_factory=list)

    def limits(
        self, max_new_tokens: int | None, stop_ids: Collection[int], given_ids: Sequence[int]
    ) -> DecodeLimits:
        """The limits of a call, its arguments checked (see `Session.decode`)."""
        default = self.core.config.sampling.max_new_tokens
        wanted = default if max_new_tokens is None else max_new_tokens
        most, stops = at_least("max_new_tokens", wanted, 0), integers("stop_ids", stop_ids)
        given = self.core.checked(given_ids)
        return DecodeLimits(most + len(given), stops, given, self.cancelled.is_set)

    def decode(self, new_ids: Sequence[int], limits: DecodeLimits) -> list[StepRecord]:
        """Append, follow what is given, choose behind it; the records of both."""
        appended = self.append(new_ids, limits)
        try:
            if limits.max_new_tokens == 0:
                self.core.prefill()
            else:
                decode_here(self.core.runner, self.core.moves(limits, self.records))
        finally:
            self.tell_chat(appended)
        return self.records

    def append(self, new_ids: Sequence[int], limits: DecodeLimits) -> list[int]:
        """Put new ids behind the present ones and forget an earlier cancellation."""
        self.cancelled.clear()
        return self.core.append(new_ids, limits.max_new_tokens)

    def tell_chat(self, appended: Sequence[int]) -> None:
        """Let the messages know of raw ids and of what came after them."""
        if self.chat is not None:
            self.chat.append_raw(appended, [record.token_id for record in self.records])
