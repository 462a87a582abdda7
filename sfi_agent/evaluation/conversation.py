"""The course of a case: which ids and messages there are so far, and what the next turn adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import TemplateError, explain
from sfi_agent.evaluation.dialogue import Answer, Dialogue, Prompt

if TYPE_CHECKING:
    from sfi_agent.evaluation.tasks import Turn
    from sfi_agent.session.events import ToolCall

__all__ = ["Conversation", "longest_conversation_tokens"]


class Conversation:
    """One case under way. It computes nothing; somebody else decodes between its methods.

    Args:
        dialogue: The case as ids.
    """

    def __init__(self, dialogue: Dialogue) -> None:
        self._dialogue = dialogue
        self._messages: list[Mapping[str, Any]] = list(dialogue.opening_messages)
        self._last: tuple[Prompt, Answer] | None = None
        self._calls_seen = 0

    def ask(self, turn: Turn) -> Prompt | None:
        """The prompt of the next turn; None where it begins with tool results and no tool was
        called. Tools run here."""
        if self._last is None:
            return self._dialogue.first_prompt
        prompt, answer = self._last
        results = [self._run(call) for call in answer.calls] if turn.exchanges else []
        if turn.exchanges and not results:
            return None
        calls = answer.calls if turn.exchanges else ()
        history = (*prompt.ids, *answer.ids)
        asked = self._dialogue.next_prompt(history, self._messages, turn, results, calls)
        self._messages += results or [{"role": "user", "content": turn.question}]
        return asked

    def read(self, turn: Turn, prompt: Prompt, ids: Sequence[int]) -> Answer:
        """What the model wrote behind a prompt."""
        return self._dialogue.read(turn, ids, prompt, self._calls_seen)

    def reference(self, turn: Turn, prompt: Prompt) -> Answer:
        """The right answer behind a prompt.

        Raises:
            TemplateError: The tool calls in it cannot be read back.
        """
        answer = self.read(turn, prompt, self._dialogue.reference_ids(turn))
        if len(answer.calls) != len(turn.calls):
            raise TemplateError(
                explain(
                    "wrote the tool calls of a right answer and read them back",
                    got=f"{len(answer.calls)} of {len(turn.calls)} calls",
                    remedy="this chat template cannot play tasks with tools",
                )
            )
        return answer

    def settle(self, prompt: Prompt, answer: Answer) -> None:
        """What comes next goes on from this answer."""
        self._last = prompt, answer
        self._messages.append(answer.message)
        self._calls_seen += len(answer.calls)

    def _run(self, call: ToolCall) -> dict[str, Any]:
        result = self._dialogue.tools.run(call)
        return {
            "role": "tool",
            "name": result.name,
            "tool_call_id": result.call_id,
            "content": result.content,
        }


def longest_conversation_tokens(dialogue: Dialogue) -> int:
    """Tokens of a case with right answers in the history, each as long as it may be.

    Raises:
        TemplateError: The template cannot render the case.
    """
    course, length, spare = Conversation(dialogue), 0, 0
    for turn in dialogue.turns:
        prompt = course.ask(turn)
        assert prompt is not None, "a turn of tool results needs a turn of calls before it"
        answer = course.reference(turn, prompt)
        course.settle(prompt, answer)
        length = len(prompt.ids) + len(answer.ids)
        spare += max(0, turn.max_new_tokens - len(answer.ids))
    return length + spare
