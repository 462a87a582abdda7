"""Which tokens end an assistant turn of a chat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import TemplateError
from sfi_agent.session.templates.chat_template import (
    ChatTemplate,
    Message,
    RenderFailure,
    probe_text,
    probe_tool,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

__all__ = ["stop_ids"]


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Ids after which a chat turn is over.

    These are the end-of-sequence ids of the generation configuration and of the tokenizer, and the
    special tokens with which the chat template itself ends an assistant's turn: behind a text
    (such as `<|im_end|>`, `<|eot_id|>` or `<end_of_turn>`), behind tool calls (`<|call|>`), and, in
    templates that write nothing there, the tokens that begin the next message (`<|observation|>`).

    Args:
        tokenizer: With or without a chat template.
        generation_config: The model's; its `eos_token_id` may be an id, a list or None.
    """
    found = set(_as_ids(getattr(generation_config, "eos_token_id", None)))
    found.update(_as_ids(tokenizer.eos_token_id))
    if getattr(tokenizer, "chat_template", None):
        found.update(_template_stops(tokenizer))
    return frozenset(found)


def _as_ids(value: Any) -> Iterable[int]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else (int(item) for item in value)


def _template_stops(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    try:
        template = ChatTemplate(tokenizer, [probe_tool("probe")])
    except TemplateError:
        # What a template cannot do is reported where it is asked for; here it has nothing to add.
        return
    tokens = template.control_tokens
    for text in (_close_of_text(template), _close_of_calls(template)):
        if text in tokens.special_texts:
            yield tokens.ids[text]


def _close_of_text(template: ChatTemplate) -> str | None:
    """The token behind an answer, or else the one that the next message begins with."""
    marker, user = probe_text(), {"role": "user", "content": "u"}
    answered = [user, {"role": "assistant", "content": marker}]
    tail = _behind(template, marker, answered)
    if tail == "":
        tail = _behind(template, marker, [*answered, user])
    return template.control_tokens.first(tail or "")


def _close_of_calls(template: ChatTemplate) -> str | None:
    """The token behind all calls of a turn, or else the one that their results begin with."""
    markers = [probe_text()] if template.form.one_call_per_turn else [probe_text(), probe_text()]
    calls = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": "probe", "arguments": {"text": marker}},
        }
        for number, marker in enumerate(markers)
    ]
    chat: list[Message] = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    results: list[Message] = [
        {"role": "tool", "name": "probe", "tool_call_id": call["id"], "content": "r"}
        for call in calls
    ]
    tail = _behind(template, markers[-1], chat)
    if tail is None:
        return None
    last = next((text for text in template.control_tokens.special_texts if tail.endswith(text)), "")
    if last:
        # A token that ends each call ends no turn.
        turn = _behind(template, markers[0], chat) or ""
        return last if turn.count(last) == 1 else None
    longer = _behind(template, markers[-1], [*chat, *results]) or ""
    return template.control_tokens.first(longer.removeprefix(tail).lstrip())


def _behind(template: ChatTemplate, marker: str, chat: Sequence[Message]) -> str | None:
    """What is rendered behind the marker, without white space around; None if it is not shown."""
    try:
        text = template.render([*template.opening, *chat], generation_prompt=False)
    except RenderFailure:
        return None
    _, found, tail = text.rpartition(marker)
    return tail.strip() if found else None
