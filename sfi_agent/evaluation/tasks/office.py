"""Tasks of the office world, which the embedded model knows: reports, chains, facts, tools.

Logs and questions come from `sfi_agent.embedded`; another model can be asked the same, in English
that it has not been trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfi_agent.embedded import (
    DEFAULT_SYSTEM,
    make_case,
    make_conversation,
    make_tools,
)
from sfi_agent.embedded import Case as OfficeCase
from sfi_agent.embedded.world import MAX_LOG_TOKENS, VARIANTS
from sfi_agent.evaluation.tasks.fitting import answer_tokens, check_arguments, fit_case
from sfi_agent.evaluation.tasks.scoring import calls_said, sentences_said, tool_calls_in
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, ToolExchange, Turn

__all__ = ["OFFICE_TASKS", "OfficeLong", "OfficeQuestion", "office_case"]

_MIN_LOG_TOKENS = 160
_NEW_TOKENS = 256
_LOG_SHARE = 4


@dataclass(frozen=True, slots=True)
class OfficeQuestion:
    """One question over one log; a tool question takes two turns, calls and answer.

    Attributes:
        name, summary: See `Task`.
        kind: "report", "chain", "attribute" or "tool".
        variant: "easy" (all facts of an entry in one line), "hard" (scattered), or "" for both,
            easy at even seeds.
    """

    name: str
    summary: str
    kind: str
    variant: str = ""

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`. Logs longer than some 9,000 words cannot be made."""
        check_arguments(context_tokens, seed)
        variant = self.variant or VARIANTS[seed % len(VARIANTS)]

        def build(log_tokens: int) -> Case:
            case = make_case(seed, kind=self.kind, variant=variant, log_tokens=log_tokens)
            return office_case(case, self.name, count_tokens)

        return fit_case(
            build,
            context_tokens=context_tokens,
            count_tokens=count_tokens,
            smallest=_MIN_LOG_TOKENS,
            largest=MAX_LOG_TOKENS,
            even=False,
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Sentences that the output has word for word, or calls that it makes."""
        return _parts(turn, output)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the sentences, or of the calls; exact where nothing else is said."""
        return _score(turn, output)


@dataclass(frozen=True, slots=True)
class OfficeLong:
    """Reports over one log, one after the other, until the length is used up.

    A quarter of the length is the log; of the rest, four fifths are answers. Every answer becomes
    part of the history that the next one is read from.
    """

    name: str = "office_long"
    summary: str = "Write report after report over one office log, thousands of tokens in all."

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`. Logs are easy at even seeds and hard at odd ones."""
        check_arguments(context_tokens, seed)
        variant = VARIANTS[seed % len(VARIANTS)]
        smallest_log = make_case(seed, variant=variant, log_tokens=_MIN_LOG_TOKENS).log
        tokens_per_word = count_tokens(smallest_log) / _MIN_LOG_TOKENS
        wished = int(context_tokens / _LOG_SHARE / tokens_per_word)
        log_tokens = min(max(wished, _MIN_LOG_TOKENS), MAX_LOG_TOKENS)

        def build(turns: int) -> Case:
            talk = make_conversation(
                seed, log_tokens=log_tokens, turns=turns, variant=variant, kinds=("report",)
            )
            asked = (_turn(case, count_tokens, at_least=0) for case in talk.turns)
            return Case(self.name, seed, DEFAULT_SYSTEM, talk.log, tuple(asked))

        return fit_case(build, context_tokens=context_tokens, count_tokens=count_tokens)

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Sentences that the output has word for word."""
        return _parts(turn, output)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the sentences; exact where nothing else is said."""
        return _score(turn, output)


def office_case(case: OfficeCase, task: str, count_tokens: TokenCounter) -> Case:
    """A case of the embedded model as a case of a task."""
    answer = _turn(case, count_tokens, at_least=_NEW_TOKENS)
    if not case.calls:
        return Case(task, case.seed, DEFAULT_SYSTEM, case.log, (answer,))
    exchanges = tuple(ToolExchange(use.name, use.arguments, use.result) for use in case.calls)
    references = tuple(exchange.call_json for exchange in exchanges)
    limit = answer_tokens("\n".join(references), count_tokens, _NEW_TOKENS)
    calls = Turn(case.question, "", references, limit, calls=exchanges)
    final = Turn("", "", answer.references, answer.max_new_tokens, answer.answer, exchanges)
    tools = tuple(make_tools(case.log))
    return Case(task, case.seed, DEFAULT_SYSTEM, case.log, (calls, final), tools)


def _turn(case: OfficeCase, count_tokens: TokenCounter, at_least: int) -> Turn:
    limit = answer_tokens(case.expected, count_tokens, at_least)
    return Turn(case.question, "", case.sentences, limit, case.expected)


def _parts(turn: Turn, output: str) -> tuple[bool, ...]:
    if turn.calls:
        return calls_said(turn.references, output)
    return sentences_said(turn.references, output)


def _score(turn: Turn, output: str) -> Score:
    parts = _parts(turn, output)
    if turn.calls:
        exact = all(parts) and len(tool_calls_in(output)) == len(parts)
    else:
        exact = output.strip() == turn.reference_answer
    return Score(sum(parts), len(parts), exact)


OFFICE_TASKS: tuple[OfficeQuestion, ...] = (
    OfficeQuestion(
        "office_report_easy",
        "Report facts of several people whose facts stand in one line each.",
        "report",
        "easy",
    ),
    OfficeQuestion(
        "office_report_hard",
        "Report facts of several people whose facts are scattered over the log.",
        "report",
        "hard",
    ),
    OfficeQuestion("office_chain", "Follow links from person to person to one fact.", "chain"),
    OfficeQuestion("office_attribute", "Say one fact of one person or project.", "attribute"),
    OfficeQuestion("office_tool", "Call tools with numbers out of the log and report.", "tool"),
)
