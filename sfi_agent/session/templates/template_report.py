"""What a checkpoint's chat template can do for a session, found out by rendering probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import TemplateError
from sfi_agent.session.events import ToolCall
from sfi_agent.session.output.call_styles import CallFormat, call_style
from sfi_agent.session.templates.chat_delta import ChatDelta, DeltaRefused
from sfi_agent.session.templates.chat_template import ChatTemplate, RenderFailure, probe_tool
from sfi_agent.session.templates.dropped_reasoning import dropped_reasoning
from sfi_agent.session.templates.stop_ids import stop_ids
from sfi_agent.session.templates.template_turns import TurnContinuation, turn_continuations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TemplateReport", "check_template"]

_NO_STOP = -1


@dataclass(frozen=True, slots=True)
class TemplateReport:
    """What works with this chat template. True is better everywhere.

    Attributes:
        system: System messages are rendered.
        tools: Tool definitions and tool results are rendered.
        stable: Rendering a longer chat keeps the text of the shorter one (no tools, no reasoning).
        stable_with_tools: The same over two tool rounds; False where tools do not work.
        stable_with_reasoning: The same with the reasoning passed back.
        continues_user_turns: User messages are appended as a delta, without rendering history.
        continues_tool_turns: The same for tool results; False where tools do not work.
        call_format: How calls are written, by the template.
        problems: One sentence for everything that does not work.
        continuations: How each kind of turn continues, tried on a small conversation.
        drops_reasoning: The reasoning of an answer is left out when the user speaks again: what
            `history.reasoning` "template" follows. Neither value is better.
        several_calls: The template shows several calls of one turn. Where it does not and the model
            makes several all the same, their results follow one another, which is logged.
    """

    system: bool
    tools: bool
    stable: bool
    stable_with_tools: bool
    stable_with_reasoning: bool
    continues_user_turns: bool
    continues_tool_turns: bool
    call_format: CallFormat
    problems: tuple[str, ...]
    continuations: tuple[TurnContinuation, ...] = ()
    drops_reasoning: bool = False
    several_calls: bool = True

    def __str__(self) -> str:
        rows = [
            ("system messages", self.system),
            ("tools", self.tools),
            ("stable history", self.stable),
            ("stable history with tools", self.stable_with_tools),
            ("stable history with reasoning passed back", self.stable_with_reasoning),
            ("user turns appended without re-rendering", self.continues_user_turns),
            ("tool results appended without re-rendering", self.continues_tool_turns),
            ("several calls in one turn", self.tools and self.several_calls),
        ]
        lines = [f"{name}: {'yes' if works else 'no'}" for name, works in rows]
        lines.append(f"earlier reasoning: {'left out' if self.drops_reasoning else 'kept'}")
        lines += [str(continuation) for continuation in self.continuations]
        return "\n".join([*lines, f"tool-call format: {self.call_format}", *self.problems])


def check_template(
    tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None
) -> TemplateReport:
    """Try the tokenizer's chat template on probes.

    Args:
        tokenizer: One with a chat template.
        options: Template variables that sessions will use, such as `{"enable_thinking": False}`.

    Raises:
        TemplateError: There is no chat template.
    """
    plain = ChatTemplate(tokenizer, options=options)
    with_tools = ChatTemplate(tokenizer, [probe_tool("probe")], options)
    problems: list[str] = []
    system = _passes(plain.require_system, problems)
    tools = _passes(with_tools.require_tools, problems)
    stops = stop_ids(tokenizer)
    user = {"role": "user", "content": "again"}
    call = ToolCall("call_0", "probe", {"text": "t"}, "")
    result = {"role": "tool", "name": "probe", "tool_call_id": "call_0", "content": "r"}
    return TemplateReport(
        system=system,
        tools=tools,
        stable=_is_stable(plain, tools=False, reasoning=False, problems=problems),
        stable_with_tools=tools
        and _is_stable(with_tools, tools=True, reasoning=False, problems=problems),
        stable_with_reasoning=_is_stable(
            with_tools if tools else plain, tools=tools, reasoning=True, problems=problems
        ),
        continues_user_turns=_continues(ChatDelta(plain, stops), [user], [], problems),
        continues_tool_turns=tools
        and _continues(ChatDelta(with_tools, stops), [result], [call], problems),
        call_format=call_style(with_tools.source, lambda: with_tools)[0],
        problems=tuple(problems),
        continuations=turn_continuations(plain, with_tools, stops),
        drops_reasoning=_drops_reasoning(plain),
        several_calls=not with_tools.form.one_call_per_turn,
    )


def _drops_reasoning(template: ChatTemplate) -> bool:
    user = {"role": "user", "content": "u"}
    thoughtful = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    try:
        return bool(dropped_reasoning(template, [*template.opening, user, thoughtful, user]))
    except TemplateError:
        return False


def _passes(require: Callable[[], None], problems: list[str]) -> bool:
    try:
        require()
    except TemplateError as error:
        problems.append(str(error))
        return False
    return True


def _continues(
    delta: ChatDelta,
    messages: Sequence[Mapping[str, Any]],
    calls: Sequence[ToolCall],
    problems: list[str],
) -> bool:
    try:
        delta.delta(messages, calls, [_NO_STOP])
    except DeltaRefused as refusal:
        kind = messages[0]["role"]
        problems.append(f"A {kind} turn cannot be appended: {refusal.requirement}: {refusal}.")
        return False
    return True


def _is_stable(
    template: ChatTemplate, *, tools: bool, reasoning: bool, problems: list[str]
) -> bool:
    kind = f"{' with tools' if tools else ''}{' with reasoning passed back' if reasoning else ''}"
    previous = ""
    for chat in _growing_chat(tools, reasoning):
        try:
            text = template.render([*template.opening, *chat], generation_prompt=True)
        except RenderFailure as failure:
            problems.append(f"A longer chat{kind} is refused: {failure}.")
            return False
        if not text.startswith(previous):
            problems.append(f"History{kind} is rewritten at a {chat[-1]['role']} turn.")
            return False
        previous = text
    return True


def _growing_chat(tools: bool, reasoning: bool) -> Iterator[list[dict[str, Any]]]:
    """The chat at each point where the model is asked: two tool rounds, then user turns."""
    thought = {"reasoning_content": "I think."} if reasoning else {}
    chat: list[dict[str, Any]] = [{"role": "user", "content": "first"}]
    yield list(chat)
    for number in range(2 if tools else 0):
        function = {"name": "probe", "arguments": {"text": "t"}}
        call = {"id": f"call_{number}", "type": "function", "function": function}
        chat.append({"role": "assistant", "content": "", "tool_calls": [call], **thought})
        chat.append(
            {"role": "tool", "name": "probe", "tool_call_id": call["id"], "content": "result"}
        )
        yield list(chat)
    for number in range(2):
        chat.append({"role": "assistant", "content": f"answer {number}", **thought})
        chat.append({"role": "user", "content": f"more {number}"})
        yield list(chat)
