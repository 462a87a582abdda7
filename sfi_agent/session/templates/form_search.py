"""Which form of messages a chat template takes, found by rendering probes.

Every form is tried without and, for templates that refuse a chat without one, behind a system
message. A form is right when what it was given is shown.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from sfi_agent.session.templates.message_form import (
    CALL_FORMS,
    REASONING_KEYS,
    Message,
    MessageForm,
)

__all__ = ["FormSearch", "probe_text", "tool_round", "user_message"]

TryRender: TypeAlias = Callable[[MessageForm, Sequence[Message], bool], "str | None"]
"""Renders a chat in a form, with or without a generation prompt; None where the template raises."""

_SYSTEM: Message = {"role": "system", "content": "s"}


def probe_text() -> str:
    """A random word that no chat contains and that survives strip, escape and JSON encoding."""
    return f"sfi{secrets.token_hex(12)}sfi"


def user_message(content: str) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": content}


def tool_round(arguments: Sequence[str], results: Sequence[str]) -> list[dict[str, Any]]:
    """A question, calls with one argument each, and the results of the first calls."""
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": "f", "arguments": value}}
        for number, value in enumerate({"text": argument} for argument in arguments)
    ]
    return [
        user_message("u"),
        {"role": "assistant", "content": "", "tool_calls": calls},
        *(
            {"role": "tool", "name": "f", "tool_call_id": f"call_{number}", "content": result}
            for number, result in enumerate(results)
        ),
    ]


class FormSearch:
    """Finds the form of one template.

    Args:
        try_render: Renders with the session's tools and options.

    Attributes:
        form: The form.
        opening: What probes must begin with: a system message where the template refuses to do
            without, else nothing.
    """

    def __init__(self, try_render: TryRender) -> None:
        self._try_render = try_render
        self.form, self.opening = self._with_text_form()
        self.form = self._with_reasoning_form(self._with_call_form(self.form))

    def _with_text_form(self) -> tuple[MessageForm, tuple[Message, ...]]:
        for as_parts in (False, True):
            form = MessageForm(content_as_parts=as_parts)
            for opening in ((), (_SYSTEM,)):
                probe = probe_text()
                text = self._try_render(form, [*opening, user_message(probe)], True)
                # A template that knows no parts may print the list as it stands.
                if text is not None and probe in text and f"'text': '{probe}'" not in text:
                    return form, opening
        return MessageForm(), ()

    def _with_call_form(self, form: MessageForm) -> MessageForm:
        # The right form shows two calls and their results. Where no form shows the results, tools
        # are unusable anyway and `require_tools` says so.
        calls, results = (probe_text(), probe_text()), (probe_text(), probe_text())
        second_best = None
        for as_text, nine, single in CALL_FORMS:
            tried = replace(
                form,
                arguments_as_text=as_text,
                nine_character_ids=nine,
                one_call_per_turn=single,
            )
            text = self._try_render(tried, [*self.opening, *tool_round(calls, results)], True)
            if text is None or not all(probe in text for probe in results):
                continue
            if all(probe in text for probe in calls):
                return tried
            second_best = second_best or tried
        return second_best or form

    def _with_reasoning_form(self, form: MessageForm) -> MessageForm:
        for key in REASONING_KEYS:
            tried = replace(form, reasoning_key=key)
            beside_text = self._shows_reasoning(tried, calls=False, content="t")
            beside_calls = self._shows_reasoning(tried, calls=True, content="")
            if beside_text or beside_calls:
                both = self._shows_reasoning(tried, calls=True, content="t")
                # None is a template that raises; one that only leaves reasoning out may have both.
                return replace(tried, text_or_reasoning=bool(beside_calls) and both is None)
        return form

    def _shows_reasoning(self, form: MessageForm, *, calls: bool, content: str) -> bool | None:
        """Whether the last message's reasoning is rendered; None if the template raises."""
        probe = probe_text()
        chat = tool_round(("t",), ()) if calls else [user_message("u"), {"role": "assistant"}]
        chat[-1] = {**chat[-1], "content": content, REASONING_KEYS[0]: probe}
        text = self._try_render(form, [*self.opening, *chat], False)
        return None if text is None else probe in text
