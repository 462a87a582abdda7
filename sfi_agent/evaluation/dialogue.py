"""A case as token ids: prompts, follow-up questions, tool results and reference answers.

With a chat template the ids are those that a session of messages would have: the first prompt is
rendered, what follows is appended behind the model's own raw ids. Without one, the case is plain
text, questions and answers separated by blank lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import InputError, TemplateError, explain
from sfi_agent.session.events import ToolCall
from sfi_agent.session.output.output_reader import OutputFormat, parse_output
from sfi_agent.session.templates.chat_delta import ChatDelta
from sfi_agent.session.templates.chat_template import ChatTemplate, RenderFailure
from sfi_agent.session.templates.history_match import common_prefix
from sfi_agent.session.templates.stop_ids import stop_ids
from sfi_agent.session.tool_use.tools import ToolSet

if TYPE_CHECKING:
    from sfi_agent.evaluation.tasks import Case, TokenCounter, Turn
    from sfi_agent.session.engine import Engine

__all__ = ["Answer", "Dialogue", "Prompt", "token_counter"]

_PLAIN_PREFIX = "Answer:"
_STAND_IN = ({"role": "user", "content": "u"},)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a turn starts from.

    Attributes:
        ids: Every id up to where the model goes on, the answer's prefix included.
        question_start: Where the question begins; what lies before is context, or the past.
    """

    ids: tuple[int, ...]
    question_start: int

    def prefilled(self, dense_question: bool) -> int:
        """How many of the ids come before the policy's own steps."""
        return len(self.ids) if dense_question else self.question_start


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered in a turn.

    Attributes:
        ids: The ids behind the prefix, a stop id at the end included.
        text: What they say, without control tokens and without reasoning.
        message: The answer as a message, prefix included.
        calls: The tool calls in it, malformed ones included.
    """

    ids: tuple[int, ...]
    text: str
    message: Mapping[str, Any]
    calls: tuple[ToolCall, ...]

    @property
    def calls_json(self) -> str:
        """The readable calls as JSON, one per line."""
        readable = [call for call in self.calls if call.error is None]
        return "\n".join(
            json.dumps({"name": call.name, "arguments": dict(call.arguments)}) for call in readable
        )


def token_counter(tokenizer: Any) -> TokenCounter:
    """How a tokenizer of transformers counts the tokens of a text."""

    def count(text: str) -> int:
        # Quiet: tasks try lengths beyond the model's on their way to the right one.
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return count


class Dialogue:
    """One case for one tokenizer. It holds no state of a conversation.

    Args:
        engine: Its tokenizer; without a chat template the case becomes plain text.
        case: Its tools are described to the model.

    Attributes:
        first_prompt: Context and first question.
        tools: What the case lets the model call.
        stop_ids: Tokens that end an answer.

    Raises:
        InputError: The engine has no tokenizer, or the case has no turn.
        TemplateError: The case has tools or a system prompt and the template takes none, or there
            are tools and no template.
    """

    def __init__(self, engine: Engine, case: Case) -> None:
        tokenizer: Any = engine.tokenizer
        if tokenizer is None or not case.turns:
            got = "a case without turns" if tokenizer is not None else "an engine without tokenizer"
            raise InputError(explain(f"played a case of {case.task}", got=got))
        self._tokenizer = tokenizer
        self._case = case
        self.tools = ToolSet(case.tools)
        self.stop_ids = stop_ids(tokenizer, getattr(engine.model, "generation_config", None))
        self._template = self._make_template()
        if self._template is not None:
            self._delta = ChatDelta(self._template, self.stop_ids)
        source = self._template.source if self._template is not None else ""
        self._format = OutputFormat(tokenizer, source, self.tools.schemas, self.stop_ids)
        self.first_prompt = self._first_prompt()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of the case."""
        return self._case.turns

    @property
    def opening_messages(self) -> list[dict[str, Any]]:
        """System prompt, and context with the first question."""
        return self._messages(self._case.opening)

    def next_prompt(
        self,
        history_ids: Sequence[int],
        messages: Sequence[Mapping[str, Any]],
        turn: Turn,
        results: Sequence[Mapping[str, Any]],
        calls: Sequence[ToolCall],
    ) -> Prompt:
        """A later turn behind the raw ids of the earlier ones.

        Args:
            history_ids: Everything so far; ends with the last answer.
            messages: The same as messages.
            turn: What comes.
            results: Tool messages that answer `calls`, where the turn begins with them.
            calls: Calls of the last answer that `results` answer.

        Raises:
            TemplateError: The template cannot render the messages.
        """
        prefix = self.prefix_ids(turn)
        if self._template is None:
            kept = len(history_ids) - (history_ids[-1] in self.stop_ids)
            new = self._encode(f"\n\n{turn.question}\n")
        else:
            added = results or [{"role": "user", "content": turn.question}]
            found = self._delta.continue_chat(history_ids, messages, added, calls)
            kept, new = found.kept_tokens, list(found.new_ids)
        return Prompt((*history_ids[:kept], *new, *prefix), kept)

    def prefix_ids(self, turn: Turn) -> list[int]:
        """Ids of what the answer begins with."""
        prefix = turn.answer_prefix
        if self._template is None:
            prefix = prefix or _PLAIN_PREFIX
        return self._encode(prefix) if prefix else []

    def read(self, turn: Turn, ids: Sequence[int], prompt: Prompt, calls_seen: int) -> Answer:
        """Understand what the model wrote behind a prompt.

        Args:
            turn: What was asked.
            ids: The model's raw output.
            prompt: What it went on from.
            calls_seen: Tool calls of earlier turns, to number these.
        """
        prefix = self.prefix_ids(turn)
        asked = prompt.ids[prompt.question_start : len(prompt.ids) - len(prefix)]
        parsed = parse_output(
            self._format,
            self._tokenizer,
            [*prefix, *ids],
            prompt_text=str(self._tokenizer.decode(list(asked), skip_special_tokens=False)),
            first_call_number=calls_seen,
        )
        said = [index for index in ids if index not in self.stop_ids]
        text = str(self._tokenizer.decode(said, skip_special_tokens=True))
        if parsed.reasoning:
            text = parsed.text
        return Answer(tuple(ids), text, parsed.as_message(), parsed.calls)

    def reference_ids(self, turn: Turn) -> tuple[int, ...]:
        """A right answer behind the prefix, as the template writes it, its stop id included."""
        answer = turn.reference_answer
        if self._template is None:
            return (*self._encode(f" {answer}"), *self._plain_stop())
        message: dict[str, Any] = {"role": "assistant", "content": answer}
        if turn.calls:
            calls = [
                {
                    "id": f"call_{number}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for number, call in enumerate(turn.calls)
            ]
            message = {"role": "assistant", "content": "", "tool_calls": calls}
        written, closed = self._written(message)
        if turn.answer_prefix:
            written = f" {answer}"
        return (*self._template.encode(written), *closed)

    def _first_prompt(self) -> Prompt:
        whole = self._opening_ids(self._case.opening)
        # What stays when the question is taken away is what every question would share.
        bare = self._opening_ids(self._case.context)
        start = common_prefix(whole, bare)
        return Prompt((*whole, *self.prefix_ids(self._case.turns[0])), start)

    def _written(self, message: Mapping[str, Any]) -> tuple[str, list[int]]:
        """An assistant message as the template writes it behind a generation prompt, and the stop
        id that ends it (none where the template has none)."""
        assert self._template is not None
        try:
            before = self._template.render(_STAND_IN, generation_prompt=True)
            after = self._template.render([*_STAND_IN, message], generation_prompt=False)
        except RenderFailure as failure:
            raise TemplateError(
                explain("rendered a reference answer", got=f"a template that refuses it: {failure}")
            ) from failure
        if not after.startswith(before):
            # Templates that open a think block in the prompt show finished answers without it.
            after = after[len(commonprefix((before, after))) :].lstrip()
        else:
            after = after[len(before) :]
        stops = {
            text: index
            for text, index in self._template.control_tokens.ids.items()
            if index in self.stop_ids and text in after
        }
        if not stops:
            return after.rstrip("\n"), []
        text = min(stops, key=after.index)
        return after.partition(text)[0], [stops[text]]

    def _plain_stop(self) -> list[int]:
        stop = self._tokenizer.eos_token_id
        return [] if stop is None else [int(stop)]

    def _make_template(self) -> ChatTemplate | None:
        if not getattr(self._tokenizer, "chat_template", None):
            if self._case.tools:
                raise TemplateError(
                    explain(
                        f"played a case of {self._case.task}, which has tools",
                        got="a tokenizer without a chat template",
                        remedy="choose a task without tools, or set tokenizer.chat_template",
                    )
                )
            return None
        template = ChatTemplate(self._tokenizer, self.tools.schemas)
        if self._case.system:
            template.require_system()
        if len(self.tools):
            template.require_tools()
        return template

    def _messages(self, content: str) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self._case.system}] if self._case.system else []
        return [*system, {"role": "user", "content": content}]

    def _opening_ids(self, content: str) -> list[int]:
        if self._template is not None:
            return list(self._template.first_prompt(self._messages(content)))
        text = f"{self._case.system}\n\n{content}" if self._case.system else content
        begins: list[int] = self._tokenizer.encode("a")
        starts_with_bos = bool(begins) and begins[0] == self._tokenizer.bos_token_id
        return [*begins[: int(starts_with_bos)], *self._encode(f"{text}\n")]

    def _encode(self, text: str) -> list[int]:
        if self._template is not None:
            return self._template.encode(text)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
