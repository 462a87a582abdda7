"""The ids of a chat and, as a view of them, its messages.

Ids are the truth. The transcript is a row of spans: prompts (new messages with everything the
template writes around them), outputs (the model's raw ids), and raw ids that somebody appended
without any message. Nothing here tokenizes or renders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from sfi_agent.errors import InputError, explain
from sfi_agent.session.events import ToolCall

__all__ = ["Reread", "SpanKind", "Transcript", "TranscriptSpan", "next_call_number"]

_CALL_ID = re.compile(r"call_(\d{1,9})")

SpanKind = Literal["prompt", "output", "raw"]
Reread: TypeAlias = Callable[[Sequence[int]], tuple[Mapping[str, Any], Sequence[ToolCall]]]
"""Message and calls of an output's ids."""


@dataclass(frozen=True, slots=True)
class TranscriptSpan:
    """Consecutive ids and the messages they carry.

    Attributes:
        kind: "prompt" (messages and the template's text around them, up to where the model goes
            on), "output" (one assistant message, its raw ids), or "raw" (ids without a message).
        start: Position of the first id.
        end: Position behind the last id.
        messages: The messages, one for an output, none for raw ids.
        calls: Calls of an output.
        complete: False where the span was cut inside: its messages are then more than its ids.
    """

    kind: SpanKind
    start: int
    end: int
    messages: tuple[Mapping[str, Any], ...] = ()
    calls: tuple[ToolCall, ...] = ()
    complete: bool = True


class Transcript:
    """Grows at its end, can be cut back to any id count, and copied.

    The template's text between two messages belongs to the prompt that brought it, and several
    messages of one prompt share its ids. An output that was cut inside is read again when somebody
    asks: a cut takes no longer for long outputs.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._spans: list[TranscriptSpan] = []
        self._unread: Reread | None = None
        """Reads the last span, an output, whose message is still that of more ids."""

    @classmethod
    def of(cls, ids: Sequence[int], spans: Sequence[TranscriptSpan]) -> Transcript:
        """One that was there before.

        Args:
            ids: All of them.
            spans: Together they cover the ids. A first one without any ids holds messages that no
                ids have brought yet.
        """
        made = cls()
        made._ids, made._spans = list(ids), list(spans)
        return made

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All ids."""
        return tuple(self._ids)

    @property
    def last_id(self) -> int | None:
        """The last id, None at the very beginning."""
        return self._ids[-1] if self._ids else None

    @property
    def spans(self) -> tuple[TranscriptSpan, ...]:
        """Spans in order; together they cover all ids."""
        return tuple(self._read_spans())

    def spans_before(self, position: int) -> tuple[TranscriptSpan, ...]:
        """Spans that end at a position or before it; reads nothing."""
        return tuple(span for span in self._spans if span.end <= position)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat as messages: a copy, which may be changed without effect."""
        return [deepcopy(dict(message)) for span in self._read_spans() for message in span.messages]

    @property
    def message_starts(self) -> tuple[int, ...]:
        """For each message, the position of the first id of its span."""
        return tuple(span.start for span in self._read_spans() for _ in span.messages)

    @property
    def calls_seen(self) -> int:
        """The number of the next call's id. A cut takes calls back, so that going on from there is
        the same as never having been further."""
        return next_call_number(m for span in self._read_spans() for m in span.messages)

    @property
    def open_calls(self) -> tuple[ToolCall, ...]:
        """Calls of the last output that nothing has answered yet."""
        spans = self._read_spans()
        return spans[-1].calls if spans else ()

    @property
    def ends_with_output(self) -> bool:
        """Whether a delta may continue: the last ids are an output of the model."""
        return bool(self._spans) and self._spans[-1].kind == "output"

    def append_prompt(self, messages: Sequence[Mapping[str, Any]], ids: Sequence[int]) -> None:
        """New messages with the ids that brought them."""
        self._append("prompt", ids, tuple(deepcopy(dict(message)) for message in messages))

    def append_output(
        self, ids: Sequence[int], message: Mapping[str, Any], calls: Sequence[ToolCall] = ()
    ) -> None:
        """The model's raw ids with their view, see `ParsedOutput.as_message`."""
        self._append("output", ids, (deepcopy(dict(message)),), tuple(calls))

    def append_raw(self, ids: Sequence[int]) -> None:
        """Ids that carry no message."""
        if ids:
            self._append("raw", ids, ())

    def replace_from(
        self, kept_tokens: int, new_ids: Sequence[int], messages: Sequence[Mapping[str, Any]]
    ) -> None:
        """The whole chat was rendered again: keep the first ids, take the new ones behind them.

        Spans whose ids are all kept stay as they are. The other messages then belong to one prompt:
        where each of them lies is not known any more.
        """
        self._check_count(kept_tokens)
        spans = [span for span in self._read_spans() if span.end <= kept_tokens]
        start = spans[-1].end if spans else 0
        known = sum(len(span.messages) for span in spans)
        ids = [*self._ids[start:kept_tokens], *new_ids]
        self._ids, self._spans = self._ids[:start], spans
        self.append_prompt(messages[known:], ids)

    def start_of(self, token_count: int) -> int:
        """Where the span begins that holds the last of the first ids; reads nothing."""
        return max((span.start for span in self._spans if span.start < token_count), default=0)

    def cut(self, token_count: int, reread: Reread) -> None:
        """Keep the first ids.

        Args:
            token_count: How many ids stay, 0 to all.
            reread: Makes message and calls of an output that is cut inside from its remaining
                ids, later, and whatever has become of this transcript by then. A prompt that is cut
                inside keeps its messages and is marked incomplete.

        Raises:
            InputError: `token_count` is out of range.
        """
        self._check_count(token_count)
        kept = [span for span in self._spans if span.start < token_count or not span.end]
        if len(kept) < len(self._spans):
            self._unread = None
        if kept and kept[-1].end > token_count:
            is_output = kept[-1].kind == "output"
            kept[-1] = replace(kept[-1], end=token_count, complete=is_output)
            self._unread = reread if is_output else None
        self._ids, self._spans = self._ids[:token_count], kept

    def copy(self) -> Transcript:
        """An independent transcript of the same chat."""
        other = Transcript()
        other._ids, other._spans = list(self._ids), list(self._spans)
        other._unread = self._unread
        return other

    def _read_spans(self) -> list[TranscriptSpan]:
        if self._unread is not None:
            reread, self._unread = self._unread, None
            last = self._spans[-1]
            message, calls = reread(self._ids[last.start :])
            self._spans[-1] = replace(last, messages=(dict(message),), calls=tuple(calls))
        return self._spans

    def _append(
        self,
        kind: SpanKind,
        ids: Sequence[int],
        messages: tuple[Mapping[str, Any], ...],
        calls: tuple[ToolCall, ...] = (),
    ) -> None:
        start = len(self._ids)
        self._read_spans()
        self._ids.extend(ids)
        self._spans.append(TranscriptSpan(kind, start, len(self._ids), messages, calls))

    def _check_count(self, token_count: int) -> None:
        if not 0 <= token_count <= len(self._ids):
            raise InputError(
                explain(
                    "Cut the transcript",
                    got=f"{token_count} tokens to keep",
                    allowed=f"0 to {len(self._ids)}",
                )
            )


def next_call_number(messages: Iterable[Mapping[str, Any]]) -> int:
    """A number that no call of these messages has in its id: how many there are, unless numbers
    from elsewhere are in the way."""
    ids = [str(call["id"]) for message in messages for call in message.get("tool_calls", ())]
    numbers = [int(found[1]) for found in map(_CALL_ID.fullmatch, ids) if found]
    return max([len(ids), *(number + 1 for number in numbers)])
