"""The chat side of a session: template, tools, transcript, and how a turn's ids are found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sfi_agent.errors import InputError, TemplateError, explain
from sfi_agent.session.events import ToolCall, ToolResult
from sfi_agent.session.output.output_reader import (
    OutputFormat,
    OutputReader,
    ParsedOutput,
    parse_output,
)
from sfi_agent.session.reply import ReuseLostReason
from sfi_agent.session.templates.chat_delta import ChatDelta
from sfi_agent.session.templates.chat_template import ChatTemplate
from sfi_agent.session.templates.dropped_reasoning import without_reasoning
from sfi_agent.session.templates.stop_ids import stop_ids
from sfi_agent.session.tool_use.tools import Tool, ToolSet
from sfi_agent.session.transcript import Reread, Transcript, next_call_number
from sfi_agent.session.turn_plan import TurnPlan
from sfi_agent.session.turn_planner import TurnPlanner
from sfi_agent.session.user_input import (
    UserInput,
    checked_text,
    normalise_messages,
    refuse_repeated,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

__all__ = ["Chat", "TurnPlan", "make_chat"]

ReasoningHistory: TypeAlias = Literal["keep", "template"]
_NOT_RUN = "The call was not run: the conversation went on without it."


class Chat:
    """One conversation as messages over ids.

    Args:
        tokenizer: With a chat template.
        generation_config: The model's, for its end-of-sequence ids.
        system: System prompt, None for none.
        tools: Functions or `Tool`s, or tools as they were described before.
        reasoning: What becomes of earlier reasoning, see `HistorySettings`.

    Attributes:
        reuse_lost_reason: Why a history that was saved could not be used; None once a turn has
            processed it again, and everywhere else.

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
        tools: Sequence[Callable[..., Any] | Tool] | ToolSet,
        reasoning: ReasoningHistory = "keep",
    ) -> None:
        self._reasoning = reasoning
        self.tools = tools if isinstance(tools, ToolSet) else ToolSet(tools)
        self.transcript = Transcript()
        self.reuse_lost_reason: ReuseLostReason | None = None
        self.stop_ids = stop_ids(tokenizer, generation_config)
        self._tokenizer = tokenizer
        self._system = system
        self._unsent_results: dict[str, ToolResult] = {}
        self._clocks_are_told = False
        self._joined_calls_are_told = False
        self._template = ChatTemplate(tokenizer, self.tools.schemas)
        if system is not None:
            self._template.require_system()
        if len(self.tools):
            self._template.require_tools(beside_system=system is not None)
        self._planner = TurnPlanner(
            tokenizer,
            self._template,
            ChatDelta(self._template, self.stop_ids),
            () if system is None else ({"role": "system", "content": system},),
            with_tools=len(self.tools) > 0,
        )
        self._format = OutputFormat(
            tokenizer, self._template.source, self.tools.schemas, self.stop_ids
        )

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as messages (a copy)."""
        return self.transcript.messages or [dict(item) for item in self._planner.system_messages]

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self._system

    @property
    def unsent_results(self) -> tuple[ToolResult, ...]:
        """Results of tools that no message has carried yet."""
        return tuple(self._unsent_results.values())

    @property
    def output_format(self) -> OutputFormat:
        """How the model writes its turns."""
        return self._format

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
        _refuse_raw_ids(transcript)
        refuse_repeated(messages, transcript.messages)
        if not transcript.spans:
            return self._planner.first(messages, clocks_are_told=self._clocks_are_told)
        if open_calls and messages[0]["role"] != "tool":
            messages = (*map(self._answer, open_calls), *messages)
        answered = open_calls if messages[0]["role"] == "tool" else ()
        plan = self._planner.next(
            transcript, messages, answered, drops_reasoning=self._reasoning == "template"
        )
        if self._joined_calls_are_told:
            plan = replace(plan, joined_calls=0)
        return self._with_reason(plan)

    def plan_anew(self, messages: Sequence[dict[str, Any]]) -> TurnPlan:
        """Find the ids for another conversation in place of this one. Changes nothing.

        Args:
            messages: All of it, up to what the model answers; checked already.

        Raises:
            TemplateError: The template cannot render them.
        """
        return self._with_reason(self._planner.anew(self.transcript.token_ids, messages))

    def tokens_of(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """Length of a prompt that is rendered as a whole."""
        return len(self._template.first_prompt(messages))

    def _with_reason(self, plan: TurnPlan) -> TurnPlan:
        return replace(plan, reuse_lost_reason=self.reuse_lost_reason or plan.reuse_lost_reason)

    def begin(self, plan: TurnPlan) -> None:
        """The plan's ids are in the sequence now: note the messages that they carry."""
        transcript = self.transcript
        self._clocks_are_told = True
        self._joined_calls_are_told |= plan.joined_calls > 0
        if plan.replaces:
            kept_ids = transcript.token_ids[: plan.kept_tokens]
            self.transcript = Transcript()
            self.transcript.append_prompt(plan.messages, [*kept_ids, *plan.new_ids])
            return
        if plan.rerendered or self._says_less(plan.kept_tokens):
            messages = without_reasoning([*transcript.messages, *plan.messages], plan.dropped)
            transcript.replace_from(plan.kept_tokens, plan.new_ids, messages)
            return
        self._cut(plan.kept_tokens)
        transcript.append_prompt(plan.messages, plan.new_ids)

    def _says_less(self, kept_tokens: int) -> bool:
        """Whether the ids that stay hold less than the messages, which then have come with the new
        ids: more than the stop token behind a text gives way."""
        transcript = self.transcript
        if kept_tokens >= len(transcript):
            return False
        only_a_stop = transcript.last_id in self.stop_ids
        return not only_a_stop or transcript.spans[-1].start == kept_tokens

    def reader(self, plan: TurnPlan) -> OutputReader:
        """Reads the output of the turn that the plan began."""
        return self._format.reader(plan.prompt_text, self.transcript.calls_seen)

    def end(self, ids: Sequence[int], parsed: ParsedOutput) -> None:
        """The model's raw output of the turn, whole or cut short."""
        self._unsent_results = {}
        self.reuse_lost_reason = None
        self.transcript.append_output(ids, parsed.as_message(), parsed.calls)

    def note_result(self, result: ToolResult) -> None:
        """A call of the last turn was run. Its result is sent with the next message, whoever
        sends it: what a tool has done must not be told to the model as not done."""
        self._unsent_results[result.call_id] = result

    def append_raw(self, new_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
        """Ids of `decode()`. Generated behind a prompt or an unfinished answer, without new ids
        in between, they belong to the answer."""
        transcript = self.transcript
        self.reuse_lost_reason = None
        last = transcript.spans[-1] if transcript.spans else None
        if new_ids or last is None or last.kind == "raw" or not last.complete:
            transcript.append_raw([*new_ids, *generated_ids])
        elif generated_ids:
            start = last.start if last.kind == "output" else last.end
            ids = [*transcript.token_ids[start:], *generated_ids]
            message, calls = self._rereader(start)(ids)
            self.cut(start)
            transcript.append_output(ids, message, calls)

    def cut(self, tokens: int) -> None:
        """Keep the first ids and what they carry."""
        if tokens < len(self.transcript):
            self._unsent_results = {}
            self._cut(tokens)

    def resume(
        self,
        transcript: Transcript,
        unsent_results: Sequence[ToolResult],
        reuse_lost_reason: ReuseLostReason | None,
    ) -> None:
        """Go on from a conversation that was saved; nothing was said yet in this one."""
        self.transcript = transcript
        self._unsent_results = {result.call_id: result for result in unsent_results}
        self.reuse_lost_reason = reuse_lost_reason

    def fork(self, reasoning: ReasoningHistory | None = None) -> Chat:
        """An independent chat with the same past; None keeps what becomes of reasoning."""
        child = object.__new__(Chat)
        child.__dict__.update(self.__dict__)
        child._reasoning = reasoning or self._reasoning
        child.transcript = self.transcript.copy()
        child._unsent_results = dict(self._unsent_results)
        return child

    def result_messages(self, results: Sequence[ToolResult]) -> list[dict[str, Any]]:
        """Tool results as messages, in the order of the calls."""
        return [_result_message(result) for result in results]

    def _answer(self, call: ToolCall) -> dict[str, Any]:
        not_run = ToolResult(call.id, call.name, call.error or _NOT_RUN, is_error=True)
        return _result_message(self._unsent_results.get(call.id, not_run))

    def _cut(self, tokens: int) -> None:
        self.transcript.cut(tokens, self._rereader(self.transcript.start_of(tokens)))

    def _rereader(self, start: int) -> Reread:
        """Reads outputs that begin at position `start` as they were read first: behind the same
        prompt, calls numbered from the same number."""
        before = self.transcript.spans_before(start)
        messages = [message for span in before for message in span.messages]
        prompt_ids = self.transcript.token_ids[before[-1].start : start] if before else ()
        number = next_call_number(messages)
        return partial(_read_output, self._format, self._tokenizer, prompt_ids, number)


def _read_output(
    output_format: OutputFormat,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    first_call_number: int,
    ids: Sequence[int],
) -> tuple[dict[str, Any], tuple[ToolCall, ...]]:
    parsed = parse_output(
        output_format,
        tokenizer,
        ids,
        prompt_text=str(tokenizer.decode(list(prompt_ids), skip_special_tokens=False)),
        first_call_number=first_call_number,
    )
    return parsed.as_message(), parsed.calls


def make_chat(
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: GenerationConfig | None,
    system: str | None,
    tools: Sequence[Callable[..., Any] | Tool] | ToolSet,
    reasoning: ReasoningHistory = "keep",
) -> Chat | None:
    """A chat, or None where the tokenizer allows none and none was asked for.

    Raises:
        InputError: The system prompt is no text.
        TemplateError: System prompt or tools are given and no chat template is there.
        ToolDefinitionError: A tool cannot be described or called.
    """
    given = tools if isinstance(tools, ToolSet) else ToolSet(tools)
    if system is not None:
        checked_text(system, "opened a session with a system prompt")
    asked = system is not None or len(given) > 0
    if tokenizer is not None and (asked or getattr(tokenizer, "chat_template", None)):
        return Chat(tokenizer, generation_config, system, given, reasoning)
    if asked:
        raise TemplateError(
            explain(
                "opened a session with a system prompt or tools",
                got="an engine without a tokenizer",
                remedy="give Engine a tokenizer with a chat template",
            )
        )
    return None


def _refuse_raw_ids(transcript: Transcript) -> None:
    if any(span.kind == "raw" for span in transcript.spans):
        raise InputError(
            explain(
                "sent a message into a session that holds ids without messages",
                got="ids appended by decode()",
                remedy="use a session either for messages or for decode() with new ids; "
                "rewind to a mark before the ids, or open another session",
            )
        )


def _result_message(result: ToolResult) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": result.call_id,
        "name": result.name,
        "content": result.content,
    }
