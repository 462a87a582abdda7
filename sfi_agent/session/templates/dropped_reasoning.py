"""Reasoning that a chat template leaves out of earlier turns, and where the ids change by that.

What a template does with earlier reasoning is found by rendering the chat with a random word in
place of each reasoning: the words that are missing then stand for reasoning that is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sfi_agent.session.templates.chat_template import (
    ChatTemplate,
    Message,
    RenderFailure,
    probe_text,
)
from sfi_agent.session.templates.history_match import common_prefix, describe_difference
from sfi_agent.session.transcript import Transcript

__all__ = ["RewrittenChat", "dropped_reasoning", "rewrite_chat", "without_reasoning"]

_REASONING = "reasoning_content"


@dataclass(frozen=True, slots=True)
class RewrittenChat:
    """A chat without the reasoning that its template leaves out.

    Attributes:
        kept_tokens: Ids of the history that stay.
        new_ids: Ids behind them, at least one, up to where the model goes on.
        dropped: Messages that lost their reasoning, by index.
        detail: One line for a log.
    """

    kept_tokens: int
    new_ids: tuple[int, ...]
    dropped: tuple[int, ...]
    detail: str


def dropped_reasoning(template: ChatTemplate, messages: Sequence[Message]) -> tuple[int, ...]:
    """Indices of the messages whose reasoning the template leaves out of this chat.

    Raises:
        TemplateError: The template cannot render it.
    """
    probes = {i: probe_text() for i, message in enumerate(messages) if message.get(_REASONING)}
    if not probes:
        return ()
    chat = [
        {**message, _REASONING: probes[index]} if index in probes else message
        for index, message in enumerate(messages)
    ]
    text = template.prompt_text(chat)
    return tuple(index for index, probe in probes.items() if probe not in text)


def without_reasoning(
    messages: Sequence[dict[str, Any]], indices: Sequence[int]
) -> list[dict[str, Any]]:
    """The messages, some of them without their reasoning (copies)."""
    kept = [dict(message) for message in messages]
    for index in indices:
        kept[index].pop(_REASONING, None)
    return kept


def rewrite_chat(
    template: ChatTemplate, transcript: Transcript, new_messages: Sequence[Message]
) -> RewrittenChat | None:
    """The chat with new messages, without the reasoning that the template leaves out of it.

    Ids before the first such reasoning stay, whatever the model wrote there; the rest is rendered
    again.

    Returns:
        None where no reasoning is left out that the history holds.

    Raises:
        TemplateError: The template cannot render the chat.
    """
    whole = [*transcript.messages, *new_messages]
    holds = set(_messages_with_reasoning(template, transcript))
    if not holds:
        return None
    dropped = dropped_reasoning(template, whole)
    first = min((index for index in dropped if index in holds), default=None)
    if first is None:
        return None
    kept, new_ids = _place(template, transcript, whole, first)
    ids = transcript.token_ids
    difference = describe_difference(template.tokenizer, ids, (*ids[:kept], *new_ids))
    detail = f"earlier reasoning is left out, as the chat template does; {difference}"
    return RewrittenChat(kept, new_ids, dropped, detail)


def _messages_with_reasoning(template: ChatTemplate, transcript: Transcript) -> Iterator[int]:
    """Messages whose reasoning stands in the ids, by index."""
    index = 0
    for span in transcript.spans:
        for message in span.messages:
            reasoning = str(message.get(_REASONING) or "").strip()
            if reasoning and span.kind == "output":
                yield index
            elif reasoning:
                ids = list(transcript.token_ids[span.start : span.end])
                if reasoning in str(template.tokenizer.decode(ids)):
                    yield index
            index += 1


def _place(
    template: ChatTemplate, transcript: Transcript, whole: Sequence[Message], first: int
) -> tuple[int, tuple[int, ...]]:
    """How many ids stay when message `first` loses its reasoning, and the ids behind them.

    The rendering is taken up at the last output, at or before that message, whose prompt both
    renderings end with in the same way: with and without what comes later.
    """
    tokens, ids = template.control_tokens, transcript.token_ids
    rendered = template.render(whole, generation_prompt=True)
    for index, start in reversed([*_outputs(transcript, first)]):
        try:
            before = template.render(whole[:index], generation_prompt=True)
        except RenderFailure:
            continue
        shared = tokens.shared(before, rendered)
        begins = [place for place, _ in tokens.spans(before[:shared])]
        if not begins:
            continue
        opening = template.encode(before[begins[-1] :])
        kept = start - len(opening)
        if kept >= 0 and list(ids[kept:start]) == opening:
            return _joined(ids, kept, template.encode(rendered[begins[-1] :]))
    return _joined(ids, 0, template.encode(rendered))


def _outputs(transcript: Transcript, last: int) -> Iterator[tuple[int, int]]:
    """Index of the message and position of the first id of each output up to message `last`."""
    index = 0
    for span in transcript.spans:
        if span.kind == "output" and index <= last:
            yield index, span.start
        index += len(span.messages)


def _joined(ids: Sequence[int], kept: int, new: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The same, with what the new ids have in common with the old ones kept as well."""
    more = min(common_prefix(ids[kept:], new), len(new) - 1)
    return kept + more, tuple(new[more:])
