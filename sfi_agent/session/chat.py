"""The chat side of a session: template, tools, transcript, and how a turn's ids are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import InputError, TemplateError, explain
from sfi_agent.session.chat_delta import ChatDelta
from sfi_agent.session.chat_template import ChatTemplate
from sfi_agent.session.events import ToolCall, ToolResult
from sfi_agent.session.output_reader import OutputFormat, OutputReader, ParsedOutput, parse_output
from sfi_agent.session.reply import ReuseLostReason
from sfi_agent.session.stop_ids import stop_ids
from sfi_agent.session.tools import Tool, ToolSet
from sfi_agent.session.transcript import Transcript
from sfi_agent.session.user_input import UserInput, normalise_messages

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

__all__ = ["Chat", "TurnPlan", "make_chat"]

_NOT_RUN = "The call was not run: the conversation went on without it."


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """What a turn does to the ids; nothing has happened yet.

    Attributes:
        kept_tokens: Present ids that stay.
        new_ids: Ids behind them, at least one.
        messages: The new messages.
        prompt_text: End of the prompt as text, for the reader of the output.
        reuse_lost_reason: Why processed ids are given up, None if none are.
        detail: The same for the log.
    """

    kept_tokens: int
    new_ids: tuple[int, ...]
    messages: tuple[dict[str, Any], ...]
    prompt_text: str
    reuse_lost_reason: ReuseLostReason | None = None
    detail: str = ""


class Chat:
    """One conversation as messages over ids.

    Args:
        tokenizer: With a chat template.
        generation_config: The model's, for its end-of-sequence ids.
        system: System prompt, None for none.
        tools: Functions or `Tool`s.

    Raises:
        TemplateError: No chat template, or one that takes no system prompt or no tools though
            they are given.
        ToolDefinitionError: A tool cannot be described or called.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig | None,
        system: str | None,
        tools: Sequence[Callable[..., Any] | Tool],
    ) -> None:
        self.tools = ToolSet(tools)
        self.transcript = Transcript()
        self.stop_ids = stop_ids(tokenizer, generation_config)
        self._tokenizer = tokenizer
        self._system = system
        self._unsent_results: dict[str, ToolResult] = {}
        self._template = ChatTemplate(tokenizer, self.tools.schemas)
        if system is not None:
            self._template.require_system()
        if len(self.tools):
            self._template.require_tools()
        self._delta = ChatDelta(self._template, self.stop_ids)
        self._format = OutputFormat(
            tokenizer, self._template.source, self.tools.schemas, self.stop_ids
        )

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as messages (a copy)."""
        return self.transcript.messages or self._system_messages()

    def plan(self, given: UserInput) -> TurnPlan:
        """Find the ids that bring new messages. Changes nothing.

        Calls of the last turn that the messages do not answer get the result that `note_result`
        was given, or one that says that they were not run: templates and models expect every call
        to be followed by its result.

        Raises:
            InputError: The messages are unusable, or ids without messages are in the way.
            TemplateError: The template cannot render them.
        """
        transcript = self.transcript
        open_calls = transcript.open_calls
        messages = normalise_messages(
            given, first=not transcript.messages, open_call_ids=[call.id for call in open_calls]
        )
        if any(span.kind == "raw" for span in transcript.spans):
            raise InputError(
                explain(
                    "sent a message into a session that holds ids without messages",
                    got="ids appended by decode()",
                    remedy="use a session either for messages or for decode() with new ids; "
                    "rewind to a mark before the ids, or open another session",
                )
            )
        if not transcript.spans:
            return self._first(messages)
        if open_calls and messages[0]["role"] != "tool":
            messages = (*map(self._answer, open_calls), *messages)
        answered = open_calls if messages[0]["role"] == "tool" else ()
        edited: ReuseLostReason | None = None
        if not transcript.ends_with_output:
            # A rewind into a prompt left no assistant turn that a delta could continue.
            edited = "history_edited"
        found = self._delta.continue_chat(
            transcript.token_ids, transcript.messages, messages, answered, rerender_reason=edited
        )
        text = self._prompt_text(found.new_ids)
        return TurnPlan(
            found.kept_tokens, found.new_ids, messages, text, found.reuse_lost_reason, found.detail
        )

    def begin(self, plan: TurnPlan) -> None:
        """The plan's ids are in the sequence now: note the messages that they carry."""
        transcript = self.transcript
        if plan.reuse_lost_reason is not None:
            messages = [*transcript.messages, *plan.messages]
            transcript.replace_from(plan.kept_tokens, plan.new_ids, messages)
            return
        self._cut(plan.kept_tokens)
        transcript.append_prompt(plan.messages, plan.new_ids)

    def reader(self, plan: TurnPlan) -> OutputReader:
        """Reads the output of the turn that the plan began."""
        return self._format.reader(plan.prompt_text, self.transcript.calls_seen)

    def end(self, ids: Sequence[int], parsed: ParsedOutput) -> None:
        """The model's raw output of the turn, whole or cut short."""
        self._unsent_results = {}
        self.transcript.append_output(ids, parsed.as_message(), parsed.calls)

    def note_result(self, result: ToolResult) -> None:
        """A call of the last turn was run. Its result is sent with the next message, whoever
        sends it: what a tool has done must not be told to the model as not done."""
        self._unsent_results[result.call_id] = result

    def append_raw(self, new_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
        """Ids of `decode()`. Generated behind a prompt or an unfinished answer, without new ids
        in between, they belong to the answer."""
        transcript = self.transcript
        last = transcript.spans[-1] if transcript.spans else None
        if new_ids or last is None or last.kind == "raw" or not last.complete:
            transcript.append_raw([*new_ids, *generated_ids])
        elif generated_ids:
            start = last.start if last.kind == "output" else last.end
            ids = [*transcript.token_ids[start:], *generated_ids]
            message, calls = self._reread(ids, start=start)
            self.cut(start)
            transcript.append_output(ids, message, calls)

    def cut(self, tokens: int) -> None:
        """Keep the first ids and what they carry."""
        if tokens < len(self.transcript):
            self._unsent_results = {}
            self._cut(tokens)

    def fork(self) -> Chat:
        """An independent chat with the same past."""
        child = object.__new__(Chat)
        child.__dict__.update(self.__dict__)
        child.transcript = self.transcript.copy()
        child._unsent_results = dict(self._unsent_results)
        return child

    def result_messages(self, results: Sequence[ToolResult]) -> list[dict[str, Any]]:
        """Tool results as messages, in the order of the calls."""
        return [_result_message(result) for result in results]

    def _first(self, messages: tuple[dict[str, Any], ...]) -> TurnPlan:
        if self._system is not None and messages[0]["role"] == "system":
            raise InputError(
                explain(
                    "sent a system message into a session that has a system prompt",
                    remedy="give it either to engine.session(system=...) or as first message",
                )
            )
        if messages[0]["role"] == "system":
            self._template.require_system()
        whole = (*self._system_messages(), *messages)
        ids = self._template.first_prompt(whole)
        return TurnPlan(0, ids, whole, self._prompt_text(ids))

    def _system_messages(self) -> list[dict[str, Any]]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]

    def _prompt_text(self, new_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(new_ids), skip_special_tokens=False))

    def _answer(self, call: ToolCall) -> dict[str, Any]:
        not_run = ToolResult(call.id, call.name, call.error or _NOT_RUN, is_error=True)
        return _result_message(self._unsent_results.get(call.id, not_run))

    def _cut(self, tokens: int) -> None:
        starts = [span.start for span in self.transcript.spans if span.start < tokens]
        reread = partial(self._reread, start=max(starts, default=0))
        self.transcript.cut(tokens, reread)

    def _reread(
        self, ids: Sequence[int], *, start: int
    ) -> tuple[dict[str, Any], tuple[ToolCall, ...]]:
        """Message and calls of an output that begins at position `start`, read as they were first:
        behind the same prompt, calls numbered from the same number."""
        before = [span for span in self.transcript.spans if span.end <= start]
        messages = [message for span in before for message in span.messages]
        prompt_ids = self.transcript.token_ids[before[-1].start : start] if before else ()
        parsed = parse_output(
            self._format,
            self._tokenizer,
            ids,
            prompt_text=self._prompt_text(prompt_ids),
            first_call_number=sum(len(message.get("tool_calls", ())) for message in messages),
        )
        return parsed.as_message(), parsed.calls


def make_chat(
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: GenerationConfig | None,
    system: str | None,
    tools: Sequence[Callable[..., Any] | Tool],
) -> Chat | None:
    """A chat, or None where the tokenizer allows none and none was asked for.

    Raises:
        TemplateError: System prompt or tools are given and no chat template is there.
    """
    asked = system is not None or bool(tools)
    if tokenizer is not None and (asked or getattr(tokenizer, "chat_template", None)):
        return Chat(tokenizer, generation_config, system, tools)
    if asked:
        raise TemplateError(
            explain(
                "opened a session with a system prompt or tools",
                got="an engine without a tokenizer",
                remedy="give Engine a tokenizer with a chat template",
            )
        )
    return None


def _result_message(result: ToolResult) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": result.call_id,
        "name": result.name,
        "content": result.content,
    }
