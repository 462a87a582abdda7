"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sfi_agent.evaluation.peers.scores import ArmSummary

__all__ = ["comparison_tables"]

_PROTOCOLS = {
    "dense_question": "question in the dense prefill",
    "sparse_question": "question after compression",
}
_Column = tuple[str, Callable[[ArmSummary], str]]


def comparison_tables(summaries: Sequence[ArmSummary], titles: Mapping[str, str]) -> str:
    """One table per task and protocol, and for several turns one of the turns and one of feeds.

    Args:
        summaries: What `summarise` made.
        titles: Every arm's name in words, in the order of the rows.
    """
    sections = []
    for task, protocol in dict.fromkeys((item.task, item.protocol) for item in summaries):
        group = [item for item in summaries if (item.task, item.protocol) == (task, protocol)]
        whole = {item.arm: item for item in group if item.turn == 0}
        rows = [whole[arm] for arm in titles if arm in whole]
        sections.append(f"### {task}, {_PROTOCOLS[protocol]}")
        sections.append(_counts(group))
        sections.append(_table(rows, titles, _MAIN_COLUMNS))
        if _turn_count(group) > 1:
            sections.append("Parts right by turn:")
            sections.append(_turn_table(group, titles))
            sections.append("What later turns fed:")
            sections.append(_feed_table(group, titles))
        sections += _errors(rows, titles)
    return "\n\n".join(sections)


def _share_and_interval(right: int, total: int, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{right / max(1, total):.3f} ({low:.3f} to {high:.3f})"


def _slow_share(row: ArmSummary) -> str:
    if row.slow_share is None:
        return "n/a"
    accepted = "" if row.acceptance is None else f" ({row.acceptance:.2f} accepted)"
    return f"{row.slow_share:.3f}{accepted}"


_MAIN_COLUMNS: tuple[_Column, ...] = (
    (
        "parts right (95 %)",
        lambda row: _share_and_interval(row.parts_right, row.parts, row.part_interval),
    ),
    (
        "whole answers (95 %)",
        lambda row: _share_and_interval(row.answers_right, row.answers, row.answer_interval),
    ),
    ("same ids as dense", lambda row: f"{row.same_as_dense} of {row.answers}"),
    ("agreed prefix", lambda row: f"{row.agreed_tokens / max(1, row.dense_tokens):.3f}"),
    ("tokens kept", lambda row: f"{row.kept_tokens:.0f}"),
    ("tokens read per token", lambda row: f"{row.read_per_token:.0f}"),
    ("slow share", _slow_share),
    ("ms per token", lambda row: f"{row.milliseconds_per_token:.1f}"),
)


def _table(
    rows: Sequence[ArmSummary], titles: Mapping[str, str], columns: Sequence[_Column]
) -> str:
    cells = [[titles[row.arm], *(show(row) for _, show in columns)] for row in rows]
    return _markdown(["arm", *(head for head, _ in columns)], cells)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _turn_count(group: Sequence[ArmSummary]) -> int:
    return max(1, max(item.turn for item in group))


def _counts(group: Sequence[ArmSummary]) -> str:
    turns = _turn_count(group)
    if turns == 1:
        return f"{group[0].answers} cases."
    cases = next(item.answers for item in group if item.turn == 1)
    return f"{cases} conversations of {turns} turns, each arm with its own answers."


def _turn_table(group: Sequence[ArmSummary], titles: Mapping[str, str]) -> str:
    numbers = range(1, _turn_count(group) + 1)
    by_turn = {(item.arm, item.turn): item for item in group}
    rows = []
    for arm, title in titles.items():
        items = [by_turn[arm, number] for number in numbers if (arm, number) in by_turn]
        if items:
            rows.append(
                [
                    title,
                    *(
                        _share_and_interval(item.parts_right, item.parts, item.part_interval)
                        for item in items
                    ),
                ]
            )
    return _markdown(["arm", *(f"turn {number}" for number in numbers)], rows)


def _feed_table(group: Sequence[ArmSummary], titles: Mapping[str, str]) -> str:
    heads = ["arm", "new tokens", "fed tokens", "fed again", "wrong positions", "tokens kept"]
    rows = []
    for arm, title in titles.items():
        later = [item for item in group if item.arm == arm and item.turn > 1]
        turns = sum(item.answers for item in later)
        if later:
            rows.append(
                [
                    title,
                    *(
                        f"{sum(values) / turns:.0f}"
                        for values in (
                            [item.new_prompt_tokens for item in later],
                            [item.fed_tokens for item in later],
                            [item.fed_again_tokens for item in later],
                            [item.wrong_positions for item in later],
                            [item.kept_tokens * item.answers for item in later],
                        )
                    ),
                ]
            )
    return _markdown(heads, rows) + "\n\nMeans per later turn and case."


def _errors(rows: Sequence[ArmSummary], titles: Mapping[str, str]) -> list[str]:
    return [
        f"- {titles[row.arm]}: {count} turns raised `{text}`"
        for row in rows
        for text, count in row.errors.items()
    ]
