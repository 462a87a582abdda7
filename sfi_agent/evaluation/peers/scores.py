"""Scores what the arms wrote, and sums it up per task, protocol, turn and arm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfi_agent.embedded.intervals import wilson_interval
from sfi_agent.evaluation.peers.exchange import ArmRun, PeerTurn, PlannedCase
from sfi_agent.evaluation.tasks.task import Score
from sfi_agent.session.templates.history_match import common_prefix

__all__ = ["ArmSummary", "ScoredTurn", "score_runs", "summarise"]


@dataclass(frozen=True, slots=True)
class ScoredTurn:
    """One turn of one arm on one case, judged.

    Attributes:
        arm, case, task, protocol: Which.
        turn: Number of the turn, from 1.
        right, parts, exact: The score; a turn that raised, or came after one, has none right.
        same_as_dense: Whether ids are those of the dense arm on this turn.
        agreed_tokens: Length of the common prefix with them.
        dense_tokens: Their number.
        text: The answer.
        what: What the arm reports about the turn.
    """

    arm: str
    case: str
    task: str
    protocol: str
    turn: int
    right: int
    parts: int
    exact: bool
    same_as_dense: bool
    agreed_tokens: int
    dense_tokens: int
    text: str
    what: PeerTurn


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """The turns of one arm on one task and protocol, summed.

    Attributes:
        arm, task, protocol: Which.
        turn: Number of the turn, from 1; 0 for all turns together.
        answers, answers_right: Turns, and those right as a whole; higher is better.
        parts, parts_right: Parts expected, and those right; higher is better.
        same_as_dense: Turns whose ids are those of the dense arm.
        agreed_tokens, dense_tokens: Common prefix with the dense ids, and their number, summed.
        generated_tokens: Tokens of all answers.
        new_prompt_tokens, fed_tokens, fed_again_tokens, wrong_positions, read_tokens,
            decode_seconds, drafted_tokens, accepted_tokens: As in `PeerTurn`, summed.
        kept_tokens: As in `PeerTurn`, averaged.
        dense_passes: As in `PeerTurn`, summed; None where nothing counts them.
        errors: What turns raised, each text once, with how often.
    """

    arm: str
    task: str
    protocol: str
    turn: int
    answers: int
    answers_right: int
    parts: int
    parts_right: int
    same_as_dense: int
    agreed_tokens: int
    dense_tokens: int
    generated_tokens: int
    new_prompt_tokens: int
    fed_tokens: int
    fed_again_tokens: int
    wrong_positions: int
    read_tokens: float
    decode_seconds: float
    drafted_tokens: int
    accepted_tokens: int
    kept_tokens: float
    dense_passes: int | None
    errors: Mapping[str, int]

    @property
    def slow_share(self) -> float | None:
        """Dense passes per generated token, 0 to 1; None where nothing counts them."""
        if self.dense_passes is None or not self.generated_tokens:
            return None
        return self.dense_passes / self.generated_tokens

    @property
    def acceptance(self) -> float | None:
        """Share of drafts that stood, 0 to 1; None without verification."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def answer_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the share of whole answers."""
        return wilson_interval(self.answers_right, self.answers)

    @property
    def part_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the share of parts, as if parts were independent."""
        return wilson_interval(self.parts_right, self.parts)

    @property
    def read_per_token(self) -> float:
        """Tokens attended to per generated token, averaged over layers; lower is cheaper."""
        return self.read_tokens / self.generated_tokens if self.generated_tokens else 0.0

    @property
    def milliseconds_per_token(self) -> float:
        """Decode time per generated token; for orientation only."""
        return 1000 * self.decode_seconds / self.generated_tokens if self.generated_tokens else 0.0


def score_runs(
    runs: Iterable[ArmRun],
    cases: Sequence[PlannedCase],
    judge: Callable[[str, int, str], Score],
    decode: Callable[[Sequence[int]], str],
    dense_arm: str,
) -> list[ScoredTurn]:
    """Judge every turn.

    Args:
        runs: Of all arms; `dense_arm` has played every case.
        cases: What was played.
        judge: Score of an answer, from the case's name, the turn's index and the text.
        decode: Text of ids, without special tokens.
        dense_arm: Whose ids the others are compared with.
    """
    by_arm_and_case = {(run.arm, run.case): run for run in runs}
    planned = {case.name: case for case in cases}
    scored = []
    for (_, name), run in by_arm_and_case.items():
        case, dense = planned[name], by_arm_and_case[dense_arm, name]
        for index in range(len(case.turns)):
            turn = run.turns[index] if index < len(run.turns) else PeerTurn(error="not reached")
            text = "" if turn.error else decode(turn.output_ids)
            score = judge(name, index, text)
            scored.append(
                _scored(run.arm, case, index, turn, dense.turns[index].output_ids, text, score)
            )
    return scored


def _scored(
    arm: str,
    case: PlannedCase,
    index: int,
    turn: PeerTurn,
    dense_ids: Sequence[int],
    text: str,
    score: Score,
) -> ScoredTurn:
    finished = not turn.error
    return ScoredTurn(
        arm=arm,
        case=case.name,
        task=case.task,
        protocol=case.protocol,
        turn=index + 1,
        right=score.right if finished else 0,
        parts=score.parts,
        exact=score.exact and finished,
        same_as_dense=finished and turn.output_ids == dense_ids,
        agreed_tokens=common_prefix(turn.output_ids, dense_ids),
        dense_tokens=len(dense_ids),
        text=text,
        what=turn,
    )


def summarise(turns: Sequence[ScoredTurn]) -> list[ArmSummary]:
    """Sums per arm, task and protocol: all turns (turn 0), and each one where there are several."""
    groups: dict[tuple[str, str, str, int], list[ScoredTurn]] = {}
    several = {turn.task for turn in turns if turn.turn > 1}
    for turn in turns:
        for number in (0, turn.turn) if turn.task in several else (0,):
            groups.setdefault((turn.task, turn.protocol, turn.arm, number), []).append(turn)
    return [
        _summary(arm, task, protocol, number, group)
        for (task, protocol, arm, number), group in groups.items()
    ]


def _summary(
    arm: str, task: str, protocol: str, number: int, group: Sequence[ScoredTurn]
) -> ArmSummary:
    def total(name: str) -> Any:
        return sum(getattr(turn.what, name) for turn in group)

    passes = [turn.what.dense_passes for turn in group if turn.what.dense_passes is not None]
    errors: dict[str, int] = {}
    for turn in group:
        if turn.what.error:
            errors[turn.what.error] = errors.get(turn.what.error, 0) + 1
    played = [turn for turn in group if not turn.what.error]
    return ArmSummary(
        arm=arm,
        task=task,
        protocol=protocol,
        turn=number,
        answers=len(group),
        answers_right=sum(turn.exact for turn in group),
        parts=sum(turn.parts for turn in group),
        parts_right=sum(turn.right for turn in group),
        same_as_dense=sum(turn.same_as_dense for turn in group),
        agreed_tokens=sum(turn.agreed_tokens for turn in group),
        dense_tokens=sum(turn.dense_tokens for turn in group),
        generated_tokens=sum(len(turn.what.output_ids) for turn in group),
        new_prompt_tokens=total("new_prompt_tokens"),
        fed_tokens=total("fed_tokens"),
        fed_again_tokens=total("fed_again_tokens"),
        wrong_positions=total("wrong_positions"),
        read_tokens=total("read_tokens"),
        decode_seconds=total("decode_seconds"),
        drafted_tokens=total("drafted_tokens"),
        accepted_tokens=total("accepted_tokens"),
        kept_tokens=total("kept_tokens") / max(1, len(played)),
        dense_passes=sum(passes) if passes else None,
        errors=errors,
    )
