"""Spans of what a session does: runs, turns and tools.

One `SessionSpans` is made per call on a session, in the caller's thread and before anything happens
elsewhere: that is where the parent span is found. Then, in whatever thread (`TurnRunner.loop` and
`turn`, and what runs one tool of a round):

    with spans.run(max_turns) as run:           # invoke_agent, around the whole loop
        with spans.turn(given) as turn:         # chat, around one turn
            turn.see(step)                      # the first Step; later ones change nothing
            turn.see(TurnEnd(reply))
        with spans.tool(call) as tool:          # execute_tool, where the tool's function runs
            tool.see(result)                    # or tool.failed(error)
        run.see(TurnEnd(reply))                 # each one that the loop yields

Runs and turns may be paused between events. They are generators, and who drives them closes them
where a step or an errand fails: `spans.note_failure(error)` before that tells an error from a
reader who stops. A tool's span is the current one of its thread or task, so that spans of the
tool's own lie inside. Without OpenTelemetry the same calls do nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfi_agent.observe import span_names as names
from sfi_agent.observe.telemetry import Attributes, OperationSpan, Telemetry, error_type
from sfi_agent.session.events import Event, Step, ToolCall, ToolResult, TurnEnd
from sfi_agent.session.reply import Reply, sum_replies
from sfi_agent.session.telemetry import span_content as content
from sfi_agent.session.telemetry.span_facts import (
    model_name,
    request_attributes,
    state_attributes,
    usage_attributes,
)

if TYPE_CHECKING:
    from types import TracebackType

    from opentelemetry.context import Context
    from typing_extensions import Self

    from sfi_agent.session.chat import Chat
    from sfi_agent.session.token_core import TokenCore
    from sfi_agent.session.user_input import UserInput

__all__ = ["EventSpan", "SessionSpans"]


class EventSpan:
    """A span that learns from events. This one is for when nobody asks: it does nothing."""

    def see(self, event: Event) -> None:
        """Take from an event what belongs to the span."""

    def failed(self, error: BaseException) -> None:
        """Say what went wrong, where it is no exception that leaves the span."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


class SessionSpans:
    """The spans of one call on a session.

    Args:
        core: Ids, policy and engine of the session.
        chat: Its messages and tools; only looked at where content is asked for.
        telemetry: The engine's; None for spans that do nothing.

    Attributes:
        failure: What ends runs and turns that are closed; None where nobody reads on.
    """

    def __init__(self, core: TokenCore, chat: Chat | None, telemetry: Telemetry | None) -> None:
        self._core, self._chat, self._telemetry = core, chat, telemetry
        self._parent: Context | None = telemetry.caller() if telemetry is not None else None
        self.failure: BaseException | None = None

    def note_failure(self, error: BaseException) -> None:
        """Whoever drives the turns is about to close them because of this error."""
        if not isinstance(error, GeneratorExit):
            self.failure = error

    def run(self, max_turns: int) -> EventSpan:
        """Around a tool loop. It sees every event of the loop."""
        span = self._span(names.INVOKE_AGENT, "", {names.SFI_MAX_TURNS: max_turns})
        return EventSpan() if span is None else _RunSpan(span, self)

    def turn(self, given: UserInput) -> EventSpan:
        """Around one assistant turn. It sees every event of the turn.

        Args:
            given: The new messages of the turn.
        """
        span = self._span(names.CHAT, model_name(self._core), request_attributes(self._core))
        return EventSpan() if span is None else _TurnSpan(span, self, given)

    def tool(self, call: ToolCall) -> EventSpan:
        """Around one tool, where it runs. It sees the tool's result."""
        attributes: Attributes = {
            names.TOOL_NAME: call.name,
            names.TOOL_CALL_ID: call.id,
            names.TOOL_TYPE: "function",
        }
        span = self._span(names.EXECUTE_TOOL, call.name, attributes, current=True)
        return EventSpan() if span is None else _ToolSpan(span, self, call)

    @property
    def shows_content(self) -> bool:
        """Whether spans hold what was said."""
        return self._telemetry is not None and self._telemetry.content

    def start_attributes(self, given: UserInput) -> Attributes:
        """What was said before the model answers; at the beginning also what it was told first."""
        said: dict[str, str | None] = {names.INPUT_MESSAGES: content.input_messages(given)}
        if self._chat is not None and not self._core.ids:
            said[names.SYSTEM_INSTRUCTIONS] = content.system_instructions(self._chat.messages)
            said[names.TOOL_DEFINITIONS] = content.tool_definitions(self._chat.tools.schemas)
        return said

    def state_attributes(self) -> Attributes:
        """What the session holds now."""
        return state_attributes(self._core)

    def nest(self, parent: Context | None) -> Context | None:
        """Put later spans under another one; what they were under before."""
        before, self._parent = self._parent, parent
        return before

    def _span(
        self, operation: str, subject: str, attributes: Attributes, *, current: bool = False
    ) -> OperationSpan | None:
        if self._telemetry is None or self._parent is None:
            return None
        common: Attributes = {
            names.PROVIDER_NAME: names.PROVIDER,
            names.REQUEST_MODEL: model_name(self._core),
            names.CONVERSATION_ID: self._core.id,
        }
        return self._telemetry.span(
            operation, subject, self._parent, {**common, **attributes}, current=current
        )


class _LiveSpan(EventSpan):
    """A span that somebody may see."""

    def __init__(self, span: OperationSpan, spans: SessionSpans) -> None:
        self._span, self._spans = span, spans

    def failed(self, error: BaseException) -> None:
        self._span.fail(error_type(type(error)))

    def __enter__(self) -> Self:
        self._span.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._span.__exit__(kind, error, traceback)

    def _take_failure(self, kind: type[BaseException] | None) -> bool:
        """Whether an error is why the generator around the span is closed; then it is noted."""
        failure = self._spans.failure
        if kind is not GeneratorExit or failure is None:
            return False
        self.failed(failure)
        return True


class _RunSpan(_LiveSpan):
    def __init__(self, span: OperationSpan, spans: SessionSpans) -> None:
        super().__init__(span, spans)
        self._replies: list[Reply] = []
        self._before: Context | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        self._before = self._spans.nest(self._span.context)
        return self

    def see(self, event: Event) -> None:
        if isinstance(event, TurnEnd):
            self._replies.append(event.reply)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._spans.nest(self._before)
        self._take_failure(kind)
        if self._span.recording and self._replies:
            whole = sum_replies(self._replies)
            self._span.set({**usage_attributes(whole), names.SFI_TURNS: len(self._replies)})
        super().__exit__(kind, error, traceback)


class _TurnSpan(_LiveSpan):
    def __init__(self, span: OperationSpan, spans: SessionSpans, given: UserInput) -> None:
        super().__init__(span, spans)
        self._given = given
        self._ended = False

    def __enter__(self) -> Self:
        super().__enter__()
        if self._span.recording and self._spans.shows_content:
            self._span.set(self._spans.start_attributes(self._given))
        return self

    def see(self, event: Event) -> None:
        if isinstance(event, Step):
            self._span.first_chunk()
        elif isinstance(event, TurnEnd):
            self._ended = True
            usage = event.reply.usage
            self._span.count_tokens(usage.prompt_tokens, usage.output_tokens)
            if self._span.recording:
                self._span.set({**usage_attributes(event.reply), **self._spans.state_attributes()})
                if self._spans.shows_content:
                    self._span.set({names.OUTPUT_MESSAGES: content.output_messages(event.reply)})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._take_failure(kind) and not self._ended and kind is GeneratorExit:
            # Nobody reads on: there is no reply, and no error either.
            self._span.set({names.RESPONSE_FINISH_REASONS: ["cancelled"]})
        super().__exit__(kind, error, traceback)


class _ToolSpan(_LiveSpan):
    def __init__(self, span: OperationSpan, spans: SessionSpans, call: ToolCall) -> None:
        super().__init__(span, spans)
        self._call = call

    def __enter__(self) -> Self:
        super().__enter__()
        if self._span.recording and self._spans.shows_content:
            self._span.set({names.TOOL_CALL_ARGUMENTS: content.as_json(dict(self._call.arguments))})
        return self

    def see(self, event: Event) -> None:
        if not isinstance(event, ToolResult):
            return
        if event.is_error:
            self._span.fail("tool_error")
        if self._span.recording and self._spans.shows_content:
            self._span.set({names.TOOL_CALL_RESULT: event.content})
