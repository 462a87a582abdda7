"""Plays one case under several policies: same history, same questions, dense beside them.

The context is prefilled once, densely, and every policy goes on from a fork of it. A policy
processes the last tokens of the prompt itself, more of them than it takes evidence rows from, so
its first selection is the one that a session of its own would make.

Protocols: with `dense_question` a question is part of the dense prefill, as in every session; with
`sparse_question` the question's tokens are steps of the policy, which has to find out what to read
without a dense look from the question.

Answers: with `own` every policy goes on from what it answered itself, as agents do; with
`reference` generated tokens are thrown away, and the right answer takes their place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from sfi_agent.config import SessionConfig
from sfi_agent.errors import ContextOverflowError, InputError, explain
from sfi_agent.evaluation.conversation import Conversation, longest_conversation_tokens
from sfi_agent.evaluation.dialogue import Dialogue, Prompt
from sfi_agent.evaluation.shared_prefill import shared_prefill_tokens
from sfi_agent.evaluation.tasks import Case, Score, Task, Turn, task_named
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.templates.history_match import common_prefix

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine
    from sfi_agent.session.session import Session

__all__ = ["ANSWERS", "DENSE", "PROTOCOLS", "CaseRun", "TurnRun", "play_case"]

DENSE = "dense"
"""Name of the policy that is always played, and that others are compared with."""
PROTOCOLS = ("dense_question", "sparse_question")
ANSWERS = ("own", "reference")


@dataclass(frozen=True, slots=True)
class TurnRun:
    """One answer of one policy.

    Attributes:
        output: The answer as text, without its prefix; in a turn that is to call tools, the calls
            as JSON lines.
        output_ids: The generated ids, a stop id at the end included; none for a turn of tool
            results that the turn before called no tool for.
        score: Against the references.
        steps: One record per generated token.
        dense_passes: Passes over the whole history for these tokens, prefills not counted.
        drafted_tokens: Tokens that verification looked at; 0 without verify.
        accepted_tokens: How many of them stood.
        seconds: Wall-clock time of prefilling the question and decoding the answer.
        agreed_tokens: Length of the common prefix with the ids of mode dense on this turn.
        question_steps: Records of the question's tokens under `sparse_question`; none in mode
            dense, which prefills them.
    """

    output: str
    output_ids: tuple[int, ...]
    score: Score
    steps: tuple[StepRecord, ...]
    dense_passes: int
    drafted_tokens: int
    accepted_tokens: int
    seconds: float
    agreed_tokens: int
    question_steps: tuple[StepRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class CaseRun:
    """What one policy did with one case, turn by turn."""

    policy: str
    turns: tuple[TurnRun, ...]


def play_case(
    engine: Engine,
    case: Case,
    policies: Mapping[str, SessionConfig],
    *,
    protocol: Literal["dense_question", "sparse_question"] = "dense_question",
    answers: Literal["own", "reference"] = "own",
    task: Task | None = None,
    on_session: Callable[[str, Session], None] | None = None,
    on_turn: Callable[[str, int, TurnRun], None] | None = None,
    on_run: Callable[[CaseRun], None] | None = None,
) -> dict[str, CaseRun]:
    """Play a case under mode dense and under every policy, one after the other.

    Args:
        engine: The model, with a tokenizer.
        case: What to ask.
        policies: Configurations by name. `max_new_tokens` comes from the case. "dense" is added
            where it is missing, with the sampling that all others share.
        protocol, answers: See the module.
        task: Judges the answers; None takes the built-in task that the case names.
        on_session: Told the policy and its session, which holds the context and nothing else,
            before anything runs in it.
        on_turn: Told the policy, the turn's index and what came of it.
        on_run: Told about every policy that is done; mode dense is the first.

    Returns:
        Runs by the name of the policy, "dense" first.

    Raises:
        InputError: A protocol, policy or task that cannot be played. Nothing ran.
        ContextOverflowError: Prompts and longest answers do not fit the model. Nothing ran.
        ConfigError: A policy does not fit the model. Nothing ran.
        TemplateError: The chat template cannot render the case. Nothing ran.
    """
    chosen = {DENSE: _dense_config(policies), **policies}
    judge, dialogue = task or task_named(case.task), Dialogue(engine, case)
    first = dialogue.first_prompt
    _check(engine, chosen, protocol, answers, first)
    _check_fits(engine, case, dialogue)
    dense_question = protocol == "dense_question"
    shared = shared_prefill_tokens(first.prefilled(dense_question), chosen.values())
    runs: dict[str, CaseRun] = {}
    with engine.session(chosen[DENSE]) as base:
        if shared:
            base.decode(first.ids[:shared], max_new_tokens=0)
        for name, config in chosen.items():
            with base.fork(config) as session:
                if on_session is not None:
                    on_session(name, session)
                player = _Player(session, dialogue, dense_question, answers == "reference")
                turns: list[TurnRun] = []
                for turn, dense in zip_longest(case.turns, runs[DENSE].turns if runs else ()):
                    turns.append(player.play(turn).as_run(judge, turn, dense))
                    if on_turn is not None:
                        on_turn(name, len(turns) - 1, turns[-1])
            runs[name] = CaseRun(name, tuple(turns))
            if on_run is not None:
                on_run(runs[name])
    return runs


@dataclass(frozen=True, slots=True)
class _Played:
    """A turn before it is judged."""

    text: str
    ids: tuple[int, ...]
    steps: tuple[StepRecord, ...] = ()
    question_steps: tuple[StepRecord, ...] = ()
    seconds: float = 0.0

    def as_run(self, judge: Task, turn: Turn, dense: TurnRun | None) -> TurnRun:
        return TurnRun(
            output=self.text,
            output_ids=self.ids,
            score=judge.score(turn, self.text),
            steps=self.steps,
            dense_passes=sum(step.dense_passes for step in self.steps),
            drafted_tokens=sum(step.drafted_tokens for step in self.steps),
            accepted_tokens=sum(step.accepted_tokens for step in self.steps),
            seconds=self.seconds,
            agreed_tokens=common_prefix(self.ids, self.ids if dense is None else dense.output_ids),
            question_steps=self.question_steps,
        )


class _Player:
    """One policy's conversation about one case."""

    def __init__(
        self, session: Session, dialogue: Dialogue, dense_question: bool, reference_answers: bool
    ) -> None:
        self._session = session
        self._stop_ids = dialogue.stop_ids
        self._course = Conversation(dialogue)
        self._dense_question = dense_question
        self._reference_answers = reference_answers

    def play(self, turn: Turn) -> _Played:
        """Ask, decode, and settle what the next turn goes on from."""
        session, prompt = self._session, self._course.ask(turn)
        if prompt is None:
            return _Played("", ())
        started = time.perf_counter()
        new, given = self._split(prompt)
        before = len(session.trace)
        ids = session.decode(
            new, given_ids=given, max_new_tokens=turn.max_new_tokens, stop_ids=self._stop_ids
        )
        seconds = time.perf_counter() - started
        records = session.trace[before:]
        question_steps, steps = records[: len(given)], records[len(given) :]
        answer = self._course.read(turn, prompt, ids)
        if self._reference_answers:
            # What was generated is thrown away; the right answer is appended with the next prompt.
            session.rewind(session.mark(len(prompt.ids)))
            self._course.settle(prompt, self._course.reference(turn, prompt))
        else:
            self._course.settle(prompt, answer)
        text = answer.calls_json if turn.calls else answer.text
        return _Played(text, tuple(ids), tuple(steps), tuple(question_steps), seconds)

    def _split(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Rewind to what the session shares with the prompt; what is left of it, as ids to prefill
        and ids whose steps the policy takes."""
        session = self._session
        present = session.token_ids
        kept = common_prefix(present, prompt.ids)
        if kept < len(present):
            session.rewind(session.mark(kept))
        new = list(prompt.ids[kept:])
        if self._dense_question or session.config.mode == "dense":
            # Mode dense sees the same either way; a prefill is faster than steps.
            return new, []
        past = max(0, prompt.question_start - kept)
        return new[:past], new[past:]


def _dense_config(policies: Mapping[str, SessionConfig]) -> SessionConfig:
    """The configuration of "dense": the given one, or one with the sampling of all others."""
    given = policies.get(DENSE)
    if given is not None:
        if given.mode != "dense":
            raise InputError(
                explain(
                    f"gave a policy the name {DENSE!r}", got=f"mode {given.mode!r}", allowed="dense"
                )
            )
        return given
    kinds = {
        json.dumps(config.sampling.model_dump(exclude={"max_new_tokens"}), sort_keys=True): config
        for config in policies.values()
    }
    if len(kinds) > 1:
        raise InputError(
            explain(
                "compared policies of different sampling with dense decoding",
                got=" and ".join(kinds),
                remedy=f"give the sampling of the comparison by a policy named {DENSE!r}",
            )
        )
    if not kinds:
        return SessionConfig(mode="dense")
    (config,) = kinds.values()
    return SessionConfig(mode="dense", sampling=config.sampling.model_dump())


def _check(
    engine: Engine,
    policies: Mapping[str, SessionConfig],
    protocol: str,
    answers: str,
    first: Prompt,
) -> None:
    for name, value, allowed in (
        ("protocol", protocol, PROTOCOLS),
        ("answers", answers, ANSWERS),
    ):
        if value not in allowed:
            raise InputError(
                explain("played a case", got=f"{name}={value!r}", allowed=" or ".join(allowed))
            )
    for config in policies.values():
        engine.check_config(config)
    if protocol == "sparse_question" and not first.question_start:
        raise InputError(
            explain(
                "played a case with sparse_question",
                got="nothing in front of the question that could be prefilled densely",
                remedy="choose a case with a context",
            )
        )


def _check_fits(engine: Engine, case: Case, dialogue: Dialogue) -> None:
    needed, limit = longest_conversation_tokens(dialogue), engine.shape.context_limit_tokens
    if needed > limit:
        raise ContextOverflowError(
            explain(
                f"played a case of {case.task} (seed {case.seed})",
                got=f"{needed} tokens with the longest answers",
                allowed=f"{limit} tokens in this model",
                remedy="make the case with fewer context_tokens",
            ),
            needed_tokens=needed,
            limit_tokens=limit,
        )
