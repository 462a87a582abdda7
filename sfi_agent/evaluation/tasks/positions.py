"""Where in a long answer it goes wrong: right and expected parts by thousand expected tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.tasks.task import Case, Task, TokenCounter, Turn

__all__ = ["PositionScore", "scores_by_position"]


@dataclass(frozen=True, slots=True)
class PositionScore:
    """One stretch of the expected answers.

    Attributes:
        first_token: Where it begins, in tokens of the answers.
        right: References in it that the outputs have right; higher is better.
        parts: References in it, at least 1.
        output_tokens: Tokens generated for the answers that begin in it; policies that lose their
            way write more or fewer than dense decoding.
    """

    first_token: int
    right: int
    parts: int
    output_tokens: int

    @property
    def share(self) -> float:
        """`right / parts`, 0 to 1, higher is better."""
        return self.right / self.parts


def scores_by_position(
    task: Task,
    case: Case,
    outputs: Sequence[str],
    count_tokens: TokenCounter,
    *,
    bucket_tokens: int = 1000,
) -> tuple[PositionScore, ...]:
    """Right and expected parts by the place where the part belongs.

    A part belongs where a right answer has it, counted in tokens of all right answers of the case
    one behind the other; that place is known also when an output lost its way. An answer of one
    turn that spans several stretches counts its output tokens in the first of them.

    Args:
        task: Judges the parts.
        case: Its turns, whose references lie in the order of the answer.
        outputs: What was answered, one per turn.
        count_tokens: How the model's tokenizer counts.
        bucket_tokens: Length of a stretch.

    Returns:
        Stretches that hold parts, in order.

    Raises:
        InputError: The outputs are not as many as the turns, or `bucket_tokens` is below 1.
    """
    if len(outputs) != len(case.turns) or bucket_tokens < 1:
        raise InputError(
            explain(
                "scored a case by position",
                got=f"{len(outputs)} outputs for {len(case.turns)} turns, "
                f"bucket_tokens={bucket_tokens!r}",
                allowed="one output per turn, and stretches of at least 1 token",
            )
        )
    buckets: dict[int, list[PositionScore]] = {}
    start = 0
    for turn, output in zip(case.turns, outputs, strict=True):
        tokens = count_tokens(turn.reference_answer)
        first = start // bucket_tokens
        spoken = PositionScore(first * bucket_tokens, 0, 0, count_tokens(output))
        buckets.setdefault(first, []).append(spoken)
        results = task.part_results(turn, output)
        for share, right in zip(_places(turn), results, strict=True):
            index = int(start + share * tokens) // bucket_tokens
            part = PositionScore(index * bucket_tokens, int(right), 1, 0)
            buckets.setdefault(index, []).append(part)
        start += tokens
    sums = (_sum(buckets[index]) for index in sorted(buckets))
    return tuple(total for total in sums if total.parts)


def _places(turn: Turn) -> list[float]:
    """Where each reference begins in the right answer, as a share of its characters.

    Characters stand in for tokens inside one answer: counting the tokens of every beginning would
    take time that grows with the square of its length.
    """
    answer, place, places = turn.reference_answer, 0, []
    for reference in turn.references:
        place = max(place, answer.find(reference, place))
        places.append(place / max(1, len(answer)))
        place += len(reference)
    return places


def _sum(scores: Sequence[PositionScore]) -> PositionScore:
    return PositionScore(
        scores[0].first_token,
        sum(score.right for score in scores),
        sum(score.parts for score in scores),
        sum(score.output_tokens for score in scores),
    )
