"""How each kind of turn continues under a chat template, tried on a small conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sfi_agent.errors import TemplateError
from sfi_agent.session.events import ToolCall
from sfi_agent.session.reply import ReuseLostReason
from sfi_agent.session.templates.chat_delta import ChatDelta, DeltaRefused
from sfi_agent.session.templates.chat_template import ChatTemplate, RenderFailure

__all__ = ["TurnContinuation", "TurnKind", "turn_continuations"]

TurnKind = Literal[
    "user", "user_after_reasoning", "user_after_cut_turn", "tool", "tool_after_reasoning"
]

_NAMES: dict[TurnKind, str] = {
    "user": "user message",
    "user_after_reasoning": "user message after reasoning",
    "user_after_cut_turn": "user message after a turn that was cut short",
    "tool": "tool results",
    "tool_after_reasoning": "tool results after reasoning",
}
_REASONING = "First I look at the question, then I say what I found."
_ANSWER = "The report of Monday lists three names and two rooms."
_CALL = ToolCall("call_0", "probe", {"text": "t"}, "")
_NO_ID = -1


@dataclass(frozen=True, slots=True)
class TurnContinuation:
    """How one kind of turn continues a history that ends with the model's own output.

    Attributes:
        turn: What the new messages are, and what the model's turn before them was.
        method: "delta" appends; "rerender" renders the whole chat and keeps the common prefix of
            ids; "impossible" where the template does not show such messages at all.
        processed_again_share: Share of the history (from 0 to 1) that is processed again.
        reuse_lost_reason: What `usage.reuse_lost_reason` says; None if nothing is lost.
        detail: Why it is not a delta, with the first token that differs; "" for a delta.
    """

    turn: TurnKind
    method: Literal["delta", "rerender", "impossible"]
    processed_again_share: float = 0.0
    reuse_lost_reason: ReuseLostReason | None = None
    detail: str = ""

    def __str__(self) -> str:
        name = _NAMES[self.turn]
        if self.method == "delta":
            return f"{name}: appended"
        if self.method == "impossible":
            return f"{name}: impossible ({self.detail})"
        share = f"{self.processed_again_share:.0%}"
        return f"{name}: rendered again, {share} of the history processed again"


def turn_continuations(
    plain: ChatTemplate, with_tools: ChatTemplate, stop_ids: frozenset[int]
) -> tuple[TurnContinuation, ...]:
    """Try every kind of turn.

    Args:
        plain: The template without tools.
        with_tools: The template with a tool named "probe".
        stop_ids: Tokens that end the model's turn.
    """
    trials = [_Trial(plain, stop_ids), _Trial(with_tools, stop_ids)]
    return tuple(_each_turn(*trials))


def _each_turn(plain: _Trial, with_tools: _Trial) -> Iterator[TurnContinuation]:
    user = {"role": "user", "content": "And what does Tuesday say?"}
    answer = {"role": "assistant", "content": _ANSWER}
    thoughtful = {**answer, "reasoning_content": _REASONING}
    yield plain.continuation("user", answer, user)
    yield plain.continuation("user_after_reasoning", thoughtful, user)
    yield plain.continuation("user_after_cut_turn", answer, user, cut=True)
    function = {"name": _CALL.name, "arguments": dict(_CALL.arguments)}
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": _CALL.id, "type": "function", "function": function}],
    }
    reasoned = {**called, "reasoning_content": _REASONING}
    result = {"role": "tool", "name": "probe", "tool_call_id": "call_0", "content": "It is 3."}
    problem = with_tools.template.tool_results_problem()
    for turn, made in _tool_turns(called, reasoned):
        if problem is None:
            yield with_tools.continuation(turn, made, result, calls=[_CALL])
        else:
            yield TurnContinuation(turn, "impossible", detail=problem)


def _tool_turns(
    called: Mapping[str, Any], reasoned: Mapping[str, Any]
) -> Iterator[tuple[TurnKind, Mapping[str, Any]]]:
    yield "tool", called
    yield "tool_after_reasoning", reasoned


class _Trial:
    """A short history as the template would write it, and what comes behind it."""

    def __init__(self, template: ChatTemplate, stop_ids: frozenset[int]) -> None:
        self.template = template
        self._stop_ids = stop_ids
        self._delta = ChatDelta(template, stop_ids)
        question = {"role": "user", "content": "What does the report of Monday say?"}
        self._begun: list[Mapping[str, Any]] = [*template.opening, question]

    def continuation(
        self,
        turn: TurnKind,
        answer: Mapping[str, Any],
        new: Mapping[str, Any],
        *,
        calls: Sequence[ToolCall] = (),
        cut: bool = False,
    ) -> TurnContinuation:
        try:
            history = self._history(answer, new, calls, cut)
            found = self._delta.continue_chat(history, [*self._begun, answer], [new], calls)
        except (TemplateError, RenderFailure) as error:
            return TurnContinuation(turn, "impossible", detail=str(error))
        processed = len(history) - 1
        again = max(0, processed - found.kept_tokens) / processed
        method: Literal["delta", "rerender"] = "rerender" if found.detail else "delta"
        return TurnContinuation(turn, method, again, found.reuse_lost_reason, found.detail)

    def _history(
        self,
        answer: Mapping[str, Any],
        new: Mapping[str, Any],
        calls: Sequence[ToolCall],
        cut: bool,
    ) -> list[int]:
        prompt = self.template.render(self._begun, generation_prompt=True)
        output, stop = self._output(prompt, answer)
        ids = self.template.encode(output)
        if cut:
            ids = ids[: len(ids) // 2 + 1]
        else:
            ids.append(self._stop(new, calls) if stop is None else stop)
        return [*self.template.encode(prompt), *ids]

    def _output(self, prompt: str, answer: Mapping[str, Any]) -> tuple[str, int | None]:
        """What the model would write, by the template, and the stop token behind it."""
        whole = self.template.render([*self._begun, answer], generation_prompt=False)
        shared = self.template.control_tokens.shared(prompt, whole)
        output, stop = whole[shared:], None
        tokens = self.template.control_tokens
        for start, text in tokens.spans(output):
            if tokens.ids[text] in self._stop_ids:
                output, stop = output[:start], tokens.ids[text]
                break
        reasoning = answer.get("reasoning_content", "")
        if reasoning and reasoning not in output:
            opened = prompt.rstrip().endswith("<think>")
            output = f"{'' if opened else '<think>'}\n{reasoning}\n</think>\n\n{output}"
        return output, stop

    def _stop(self, new: Mapping[str, Any], calls: Sequence[ToolCall]) -> int:
        """Where the template writes no stop token, the next role's token ends the turn."""
        try:
            first = self._delta.delta([new], calls, [_NO_ID]).ids[0]
        except DeltaRefused:
            first = _NO_ID
        return first if first in self._stop_ids else min(self._stop_ids)
