"""Marks under text: the right letter under the right character, at every width."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from sfi_agent import StepRecord
from sfi_agent.cli.step_marks import Glyphs, ReasonMarks, ShownToken, marked_lines


def token(text: str, reason: str = "", retry: bool = False, control: bool = False) -> ShownToken:
    kind = "fast" if not reason else "retry" if retry else "slow"
    record = StepRecord(kind, None if not reason else "observe", reason, 8, 1, 0.001, 0, 0)  # type: ignore[arg-type]
    return ShownToken(record, text, control)


def lines(tokens: list[ShownToken], width: int = 40, marks: ReasonMarks | None = None) -> list[str]:
    shown = marked_lines(tokens, marks or ReasonMarks(), width, Glyphs())
    return [line.plain for line in shown]


def test_marks_stand_under_the_first_visible_character() -> None:
    tokens = [
        token(" Ada", "prefill"),
        token(" sits"),
        token(" in", "entropy: above 0.3 nats", retry=True),
        token(" Lyon"),
        token("."),
        token(" Bo", "punctuation: sentence start"),
        token("<end>", control=True),
    ]
    assert lines(tokens) == ["Ada sits in Lyon. Bo■", "P        e        S"]


def test_newlines_and_control_tokens_have_a_place() -> None:
    tokens = [
        token("a"),
        token("\n", "max_segment"),
        token("<|x|>", "structure: tag", control=True),
    ]
    assert lines(tokens) == ["a↵■", " MT"]


def test_wide_characters_keep_the_columns() -> None:
    tokens = [token("日本", "prefill"), token("語", "punctuation: sentence start")]
    assert lines(tokens) == ["日本語", "P   S"]


def test_text_without_slow_steps_has_no_row_of_marks() -> None:
    assert lines([token("all"), token(" fast")]) == ["all fast"]


def test_a_character_of_several_tokens_takes_the_mark_with_its_last_one() -> None:
    assert lines([token("", "prefill"), token("é")]) == ["é", "P"]


def test_unknown_detectors_get_free_letters_and_keep_them() -> None:
    marks = ReasonMarks()
    letters = [marks.letter(name) for name in ("keyword", "kernel", "pepper", "keyword", "ÄÖ")]
    assert letters == ["K", "N", "B", "K", "C"]
    for number in range(40):
        marks.letter(f"detector{number}")
    assert marks.letter("yet another") == "X"


def test_reasons_are_counted_for_the_legend() -> None:
    marks = ReasonMarks()
    retry = token("x", "entropy: above 0.3 nats", retry=True)
    lines([token("a", "prefill"), retry, retry, token("b")], marks=marks)
    assert marks.legend() == [
        ("e", "entropy: above 0.3 nats; the fast step was run again densely", 2),
        ("P", "first token of a turn, drawn from the prefill", 1),
    ]


def test_stand_ins_where_the_encoding_knows_ascii_only() -> None:
    assert Glyphs.for_encoding("utf-8") == Glyphs()
    for encoding in ("ascii", "no-such-encoding"):
        glyphs = Glyphs.for_encoding(encoding)
        "".join((glyphs.newline, glyphs.control, glyphs.filled, glyphs.arrow)).encode("ascii")


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    pieces=st.lists(
        st.tuples(
            st.text(alphabet=" abcdefg日é", min_size=1, max_size=12),
            st.sampled_from(["", "prefill", "entropy: x", "max_segment"]),
        ),
        min_size=1,
        max_size=30,
    ),
    width=st.integers(8, 60),
)
def test_nothing_is_lost_and_nothing_is_wider_than_the_width(
    pieces: list[tuple[str, str]], width: int
) -> None:
    marks = ReasonMarks()
    tokens = [token(text, reason) for text, reason in pieces]
    shown = list(marked_lines(tokens, marks, width, Glyphs()))
    assert all(cell_len(line.plain) <= width for line in shown)
    assert sum(marks.counts.values()) == sum(bool(reason) for _, reason in pieces)
    letters = {"P", "E", "M"}
    text = "".join(line.plain for line in shown if not set(line.plain) <= letters | {" "})
    wanted = "".join(piece for piece, _ in pieces)
    assert text.replace(" ", "") == wanted.replace(" ", "")
