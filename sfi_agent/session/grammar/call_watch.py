"""Follows a turn's tokens while they are decoded, and knows when the model is writing a tool call.

The same splitter that reads the turn's output says so, so that both agree on what a call is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.grammar.held_calls import HeldCall, HeldCalls
from sfi_agent.session.output.output_pieces import OutputSplitter
from sfi_agent.session.output.output_reader import OutputFormat
from sfi_agent.session.output.text_stream import TextStream, TextStreamState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CallWatch"]

_PROMPT_TOKENS = 256
"""Of the end of the prompt: enough to see how the template begins the model's message."""
_TAIL_CHARACTERS = 128


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a watch stands; see its attributes of the same names."""

    stream: TextStreamState
    splitter: OutputSplitter
    in_call: bool
    tail: str
    held: HeldCall | None


class CallWatch:
    """A `TokenWatch` for tool calls.

    Args:
        tokenizer: Turns ids into text.
        output_format: How the model writes its turns.
        trace: Records of all generated tokens of the sequence: an answer that an earlier decoding
            left unfinished goes on, be it in the middle of a call.
        exact: Whether the tokens of calls must be exact.
        held_calls: Restricts the tokens of calls; None leaves them free.
    """

    reason = "tool_call"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        output_format: OutputFormat,
        trace: Sequence[StepRecord],
        *,
        exact: bool,
        held_calls: HeldCalls | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._format = output_format
        self._trace = trace
        self._wants_exact = exact
        self._held_calls = held_calls
        self._held: HeldCall | None = None
        self._known: tuple[Tensor | None] | None = None
        self._in_call = False
        self._tail = ""
        self._begin("")

    @property
    def exact(self) -> bool:
        """See `TokenWatch`."""
        return self._wants_exact and self._in_call

    @property
    def holds(self) -> bool:
        """Whether a call is under way whose tokens are restricted."""
        return self._held is not None and self._held.matcher is not None

    def start(self, ids: Sequence[int]) -> None:
        """See `TokenWatch`."""
        first = len(ids)
        for record in reversed(self._trace):
            if record.position != first - 1:
                break
            first -= 1
        prompt = list(ids[max(0, first - _PROMPT_TOKENS) : first])
        self._begin(str(self._tokenizer.decode(prompt, skip_special_tokens=False)))
        for token_id in ids[first:]:
            self.note(token_id)

    def note(self, token_id: int) -> None:
        """See `TokenWatch`."""
        piece = self._stream.push(token_id)
        if token_id in self._format.hidden_ids:
            piece = ""
        before = self._in_call
        if piece:
            self._splitter.feed(piece)
            self._in_call = self._splitter.in_call
            self._tail = (self._tail + piece)[-_TAIL_CHARACTERS:]
        if self._held_calls is None:
            return
        self._known = None
        if not self._in_call:
            self._held = None
        elif not before:
            self._held = self._held_calls.opened(self._tail, piece)
        elif self._held is not None:
            self._held = self._held_calls.advanced(self._held, token_id, piece)

    def allowed(self) -> Tensor | None:
        """See `TokenWatch`."""
        if self._held_calls is None:
            return None
        known = self._known
        if known is None:
            known = self._known = (self._ask(self._held_calls),)
        return known[0]

    def snapshot(self) -> object:
        """See `TokenWatch`."""
        return _Place(
            self._stream.snapshot(), self._splitter.copy(), self._in_call, self._tail, self._held
        )

    def restore(self, state: object) -> None:
        """See `TokenWatch`."""
        assert isinstance(state, _Place)
        self._stream.restore(state.stream)
        # A copy again: the same place may be returned to twice.
        self._splitter = state.splitter.copy()
        self._in_call, self._tail, self._held = state.in_call, state.tail, state.held
        self._known = None

    def _begin(self, prompt_text: str) -> None:
        self._stream = TextStream(self._tokenizer)
        self._splitter = self._format.splitter(prompt_text)
        self._in_call = self._splitter.in_call
        self._tail = ""
        self._held = None
        self._known = None

    def _ask(self, held_calls: HeldCalls) -> Tensor | None:
        if self._held is not None:
            return held_calls.allowed(self._held)
        # A call that has gone wrong, by tokens that were given, is nobody's to repair.
        return held_calls.guard(self._tail) if self._splitter.may_open_call else None
