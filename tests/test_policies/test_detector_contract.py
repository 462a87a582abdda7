"""The contract of detectors: every built-in keeps it, and each way to break it is noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import Boundary, BoundaryDetector, StepEvent, TokenEvent, build_detector
from sfi_agent.testing import check_detector
from tests.test_policies.script_tokenizers import TOKENIZER_NAMES, tokenizer_named
from tests.tiny_tokenizers import chatml_tokenizer

# Every built-in with two strengths where it has any.
MATRIX: tuple[dict[str, Any], ...] = (
    {"name": "punctuation"},
    {"name": "spacy"},
    {"name": "spacy", "language": "xx"},
    {"name": "entropy"},
    {"name": "entropy", "threshold_sigmas": 1.0, "when": "next"},
    {"name": "interval", "every_tokens": 1},
    {"name": "interval", "every_tokens": 7},
    {"name": "random", "probability": 0.05},
    {"name": "random", "probability": 0.5, "seed": 3},
    {"name": "structure"},
    {"name": "drift"},
    {"name": "drift", "minimum_mass": 0.5},
    {"name": "answer_start"},
    {"name": "never"},
)
WITHOUT_TOKENIZER = ("entropy", "interval", "random", "drift", "answer_start", "never")


def label(entry: dict[str, Any]) -> str:
    return " ".join(str(value) for value in entry.values())


@pytest.mark.parametrize("tokenizer_name", TOKENIZER_NAMES)
@pytest.mark.parametrize("entry", MATRIX, ids=label)
def test_built_ins_keep_the_contract(entry: dict[str, Any], tokenizer_name: str) -> None:
    tokenizer = tokenizer_named(tokenizer_name)
    check_detector(lambda: build_detector(entry, tokenizer), tokenizer=tokenizer)


@pytest.mark.parametrize("entry", [e for e in MATRIX if e["name"] in WITHOUT_TOKENIZER], ids=label)
def test_those_that_read_no_text_need_no_tokenizer(entry: dict[str, Any]) -> None:
    check_detector(lambda: build_detector(entry, None))


@lru_cache
def tokenizer() -> Any:
    return chatml_tokenizer()


moments = st.lists(
    st.tuples(
        st.integers(0, 420),
        st.sampled_from(
            ["", "a", ". ", ".\n\n", "\n", "- ", "B", "```", "<think>", "。", "1", " "]
        ),
        st.floats(0, 5),
        st.floats(0, 1),
    ),
    max_size=30,
)


@pytest.mark.parametrize("entry", MATRIX, ids=label)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(before=moments, after=moments, detour=moments)
def test_rewinding_gives_the_same_boundaries(
    entry: dict[str, Any], before: list[Any], after: list[Any], detour: list[Any]
) -> None:
    detector = build_detector(entry, tokenizer())

    def show(shown: list[Any], start: int) -> list[Any]:
        answers = []
        for number, (token_id, text, entropy_nats, mass) in enumerate(shown, start):
            answers.append(detector.after_step(StepEvent(number - 1, entropy_nats, mass)))
            answers.append(detector.after_token(TokenEvent(token_id, number, text, entropy_nats)))
        return answers

    detector.reset([5, 6], "ab")
    show(before, 2)
    state = detector.snapshot()
    expected = show(after, 2 + len(before))
    for _ in range(2):
        show(detour, 500)
        detector.restore(state)
        assert show(after, 2 + len(before)) == expected


class Sound:
    """A detector that keeps the contract; the ones below each break one rule."""

    needs: Any = frozenset({"text"})

    def __init__(self) -> None:
        self.seen: list[str] = []

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        self.seen = []

    def after_step(self, event: StepEvent) -> Any:
        return None

    def after_token(self, event: TokenEvent) -> Any:
        self.seen = [*self.seen, event.text]
        return Boundary("sound: third") if len("".join(self.seen)) % 3 == 0 else None

    def snapshot(self) -> Any:
        return tuple(self.seen)

    def restore(self, state: Any) -> None:
        self.seen = list(state)


class UnknownNeed(Sound):
    needs = frozenset({"hidden_states"})


class ReturnsTrue(Sound):
    def after_token(self, event: TokenEvent) -> Any:
        return True


class NowAfterToken(Sound):
    def after_token(self, event: TokenEvent) -> Any:
        return Boundary("late", "now")


class UnknownMoment(Sound):
    def after_step(self, event: StepEvent) -> Any:
        return Boundary("odd", "later")  # type: ignore[arg-type]


class NoReason(Sound):
    def after_token(self, event: TokenEvent) -> Any:
        return Boundary(" ")


class KeepsOldTokens(Sound):
    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        pass


class HandsOutItsList(Sound):
    def after_token(self, event: TokenEvent) -> Any:
        self.seen.append(event.text)
        return Boundary("third") if len(self.seen) % 3 == 0 else None

    def snapshot(self) -> Any:
        return self.seen

    def restore(self, state: Any) -> None:
        self.seen = state


class ForgetsOnRestore(Sound):
    def restore(self, state: Any) -> None:
        pass


class SnapshotChangesIt(Sound):
    def snapshot(self) -> Any:
        self.seen = self.seen[1:]
        return tuple(self.seen)


class ReadsWhatItDoesNotNeed(Sound):
    needs = frozenset()

    def after_token(self, event: TokenEvent) -> Any:
        return Boundary("text") if event.text else None


class CountsObjects(Sound):
    made = 0

    def __init__(self) -> None:
        super().__init__()
        CountsObjects.made += 1
        self.number = CountsObjects.made

    def after_token(self, event: TokenEvent) -> Any:
        return Boundary("mine") if (event.position + self.number) % 2 else None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (UnknownNeed, "`needs` must be a subset of"),
        (ReturnsTrue, "must return None or a Boundary, got True"),
        (NowAfterToken, "after_token at position .* may say when='next', got 'now'"),
        (UnknownMoment, "after_step .* may say when='now' or 'next', got 'later'"),
        (NoReason, "must give a reason"),
        (KeepsOldTokens, "`reset` must forget"),
        (HandsOutItsList, "after `restore` of the snapshot"),
        (ForgetsOnRestore, "after `restore` of the snapshot"),
        (SnapshotChangesIt, "`snapshot` must change nothing"),
        (ReadsWhatItDoesNotNeed, "depend only on what `needs` names"),
        (CountsObjects, "two detectors must answer alike"),
        (object, "is not a BoundaryDetector"),
    ],
)
def test_every_broken_rule_is_noticed(broken: Callable[[], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_detector(broken)


def test_the_sound_one_passes() -> None:
    check_detector(Sound)
    check_detector(Sound, tokenizer=tokenizer(), texts=("My own text.",))


def test_one_object_for_all_is_noticed() -> None:
    shared = Sound()
    with pytest.raises(AssertionError, match="a new object each time"):
        check_detector(lambda: shared)


def test_built_ins_are_detectors_by_type() -> None:
    detectors: list[BoundaryDetector] = [build_detector(entry, tokenizer()) for entry in MATRIX]
    assert all(isinstance(detector, BoundaryDetector) for detector in detectors)
