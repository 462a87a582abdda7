"""Turns the cases of a task into token ids, once for all arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import InputError, TemplateError, explain
from sfi_agent.evaluation.peers.exchange import PlannedCase, PlannedTurn, Protocol
from sfi_agent.session.templates.stop_ids import stop_ids

if TYPE_CHECKING:
    from sfi_agent.evaluation.tasks.task import Case
    from sfi_agent.session.engine import Engine

__all__ = ["CaseRenderer"]

_ANSWER = "theanswer"


@dataclass(frozen=True, slots=True)
class _Texts:
    """A case as text: what precedes the first question, and what follows, turn by turn."""

    context: str
    questions: tuple[str, ...]


class CaseRenderer:
    """Renders cases with an engine's tokenizer and chat template.

    Context and question are tokenised apart, so that both protocols feed the same ids. Without a
    chat template the parts stand one after another as plain text, a blank line between them.

    Args:
        engine: Its tokenizer renders, its limits are checked.

    Raises:
        InputError: The engine has no tokenizer, or nothing that could end an answer.
    """

    def __init__(self, engine: Engine) -> None:
        tokenizer: Any = engine.tokenizer
        if tokenizer is None:
            raise InputError(
                explain(
                    "Side by side",
                    got="an engine without a tokenizer",
                    remedy="Give the checkpoint's folder its tokenizer files",
                )
            )
        self.tokenizer = tokenizer
        self._stop_ids = tuple(sorted(stop_ids(tokenizer, engine.model.generation_config)))
        self._limit = engine.shape.context_limit_tokens
        if not self._stop_ids:
            raise InputError(
                explain(
                    "Side by side",
                    got="a tokenizer and model without an end-of-sequence id",
                    remedy="Set eos_token_id in the checkpoint's generation_config.json",
                )
            )

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, special ones not added."""
        return len(self._encode(text))

    def render(self, case: Case, protocol: Protocol) -> PlannedCase:
        """A case as ids.

        Raises:
            InputError: The case has tools or nothing before its question, or prompts and longest
                answers do not fit the model.
            TemplateError: The chat template changes the context.
        """
        _check_has_no_tools(case)
        texts = self._chat(case) if self._has_template else self._plain(case)
        context = self._begin() + self._encode(texts.context)
        questions = [self._encode(text) for text in texts.questions]
        closing: list[int] = []
        # What the template puts behind an answer begins with the stop id that the model writes.
        if len(questions) > 1 and questions[1][0] in self._stop_ids:
            closing = questions[1][:1]
            questions[1:] = [ids[1:] for ids in questions[1:]]
        turns = tuple(
            PlannedTurn(tuple(ids), turn.max_new_tokens)
            for ids, turn in zip(questions, case.turns, strict=True)
        )
        self._check_fits(case, len(context), turns)
        name = f"{case.task}/{protocol}/{case.seed}"
        return PlannedCase(
            name,
            case.task,
            case.seed,
            protocol,
            tuple(context),
            turns,
            tuple(closing),
            self._stop_ids,
        )

    def _check_fits(self, case: Case, context_tokens: int, turns: Sequence[PlannedTurn]) -> None:
        if context_tokens < 2:
            raise InputError(
                explain(
                    f"Side by side: case {case.seed} of {case.task}",
                    got="nothing before the first question",
                    remedy="Use a task with a context, or a tokenizer with a chat template",
                )
            )
        needed = context_tokens + sum(len(turn.ids) + turn.max_new_tokens + 1 for turn in turns)
        if needed > self._limit:
            raise InputError(
                explain(
                    f"Side by side: case {case.seed} of {case.task}",
                    got=f"{needed} tokens with the longest answers",
                    allowed=f"{self._limit} tokens in this model",
                    remedy="Ask for fewer context tokens",
                )
            )

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _begin(self) -> list[int]:
        """The BOS id where plain text gets one; a template writes its own."""
        tokenizer = self.tokenizer
        if self._has_template or tokenizer.bos_token_id is None:
            return []
        return (
            [tokenizer.bos_token_id] if tokenizer.encode("a")[0] == tokenizer.bos_token_id else []
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _plain(self, case: Case) -> _Texts:
        system = f"{case.system}\n\n" if case.system else ""
        questions = [f"\n\n{turn.question}\n{turn.answer_prefix}" for turn in case.turns]
        if not case.context:
            questions[0] = questions[0].lstrip("\n")
        return _Texts(system + case.context, tuple(questions))

    def _chat(self, case: Case) -> _Texts:
        system = [{"role": "system", "content": case.system}] if case.system else []
        first = case.turns[0]
        user = {"role": "user", "content": case.opening}
        before, found, after = self._template([*system, user]).rpartition(case.opening)
        if not found:
            raise TemplateError(
                explain(
                    f"Side by side: case {case.seed} of {case.task}",
                    got="a chat template that changes the text of the first message",
                    remedy="Use a tokenizer whose template keeps messages as they are",
                )
            )
        asked_first = case.opening.removeprefix(case.context)
        questions = [asked_first + after + first.answer_prefix]
        short = {"role": "user", "content": "u"}
        answer = {"role": "assistant", "content": _ANSWER}
        for turn in case.turns[1:]:
            asked = {"role": "user", "content": turn.question}
            text = self._template([*system, short, answer, asked])
            questions.append(text.rpartition(_ANSWER)[2] + turn.answer_prefix)
        return _Texts(before + case.context, tuple(questions))

    def _template(self, messages: list[dict[str, str]]) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return text


def _check_has_no_tools(case: Case) -> None:
    if case.tools or any(turn.exchanges or turn.calls for turn in case.turns):
        raise InputError(
            explain(
                f"Side by side: case {case.seed} of {case.task}",
                got="a case with tools, which the other contestants have no loop for",
                allowed="cases whose turns are questions",
            )
        )
