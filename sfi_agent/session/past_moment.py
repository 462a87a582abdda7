"""A session before a turn, to come back to if the turn comes to nothing."""

from __future__ import annotations

from dataclasses import dataclass

from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.chat import Chat
from sfi_agent.session.token_core import TokenCore
from sfi_agent.session.transcript import Transcript

__all__ = ["PastMoment"]


@dataclass(frozen=True, slots=True)
class PastMoment:
    """What a turn that fails or is cancelled in its prefill leaves behind: nothing.

    Attributes:
        transcript: The conversation (a copy).
        trace: One record per generated token.
        history_tokens: Length of the history.
        prompt_start: See `DecodingState`.
    """

    transcript: Transcript
    trace: tuple[StepRecord, ...]
    history_tokens: int
    prompt_start: int

    @classmethod
    def of(cls, core: TokenCore, chat: Chat) -> PastMoment:
        """The moment that is now."""
        start = core.state().prompt_start
        return cls(chat.transcript.copy(), tuple(core.trace), core.processed_tokens, start)

    def restore(self, core: TokenCore, chat: Chat, kept_tokens: int) -> None:
        """As if the message had not been sent.

        Ids behind the first `kept_tokens` had been given up. They come back, to be processed again
        by the next turn, which does not take them for news.
        """
        # Cut, not forgotten: the prefill has processed what was pending before.
        core.cut(kept_tokens, self.history_tokens)
        given_up = self.transcript.token_ids[kept_tokens:]
        if given_up:
            core.append(given_up, 0)
            core.trace.extend(self.trace[len(core.trace) :])
            core.state().prompt_start = self.prompt_start
        chat.transcript = self.transcript
