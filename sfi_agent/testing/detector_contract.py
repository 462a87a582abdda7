"""What every boundary detector must keep, as one function for built-ins and third parties alike.

Needs neither torch nor a model: the detector is shown made-up decodings.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sfi_agent.protocols import (
    DETECTOR_NEEDS,
    Boundary,
    BoundaryDetector,
    StepEvent,
    TokenEvent,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_detector"]

_TEXTS = (
    "Dr. Smith paid 3.14 euros, e.g. for tea. He left... Then it rained! \u201cWhy?\u201d she "
    "asked.\n\n1. First, open config.yaml.\n2. Then run it.\n```python\nx = 1\n```\nDone (all of "
    "it). Visit https://example.com/a?b=c. OK",
    "他来了。我们走吧！「好。」今天是3月5日。नमस्ते। आप कैसे हैं? هل أنت هنا؟ نعم. "
    "<think>\nSo 2 + 2 = 4.\n</think>\n\nThe answer\u2026 is 4. \U0001f389 Great.",
)
_PROMPT_TOKENS = 8
_RANDOM_TOKENS = 40
_RANDOM_VOCABULARY = 1000


@dataclass(frozen=True, slots=True)
class _Moment:
    """One generated token: the fast step before it, if that was fast, and the token itself."""

    step: StepEvent | None
    token: TokenEvent


@dataclass(frozen=True, slots=True)
class _Decoding:
    """A made-up decoding: the prompt and what follows."""

    label: str
    prompt_ids: tuple[int, ...]
    prompt_text: str
    moments: tuple[_Moment, ...]


_Answers = list[tuple[Boundary | None, Boundary | None]]


def check_detector(
    make: Callable[[], BoundaryDetector],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Sequence[str] = (),
) -> None:
    """Assert that a detector keeps the contract of `sfi_agent.BoundaryDetector`.

    Shows new detectors made-up decodings: sentences, lists, code, tags, several scripts and random
    ids if there is a tokenizer, random ids and pieces of text otherwise. Checked:

    - `needs` is a subset of "text", "entropy", "attention_drift", and does not change;
    - it works when events carry what it needs and nothing else, and answers the same when they
      carry more;
    - answers are None or a `Boundary` with a reason; `when="now"` never comes from `after_token`;
    - two detectors of one configuration answer alike;
    - `reset` forgets everything, whatever was seen before;
    - `snapshot` changes nothing, and `restore`, also of the same state twice and into another
      detector of the same configuration, gives the same answers to the same events again.

    Args:
        make: Returns a new detector of one fixed configuration, each time another object.
        tokenizer: A fast tokenizer, for detectors that read text or a vocabulary.
        texts: Further texts to decode, for a detector that waits for something particular.

    Raises:
        AssertionError: The contract is broken; the message says where and how.
    """
    detector = make()
    _check_object(detector)
    _require(make() is not detector, detector, "`make` must return a new object each time")
    _require(detector.needs == make().needs, detector, "`needs` must be the same for every object")
    decodings = _decodings(tokenizer, texts)
    expected = {entry.label: _answers(make(), entry, detector.needs) for entry in decodings}
    for decoding in decodings:
        answers = expected[decoding.label]
        _check_answers(detector, decoding, answers)
        _check_same_answers(make, decoding, answers)
        _check_snapshots(make, decoding, answers)
    _check_reset(make(), decodings, expected)


def _require(condition: bool, detector: object, what: str) -> None:
    """Raise an AssertionError that names the detector; not an `assert`, for `python -O`."""
    if not condition:
        raise AssertionError(f"{type(detector).__name__}: {what}")


def _check_object(detector: BoundaryDetector) -> None:
    _require(
        isinstance(detector, BoundaryDetector),
        detector,
        "is not a BoundaryDetector; it must have an attribute `needs` and the methods `reset`, "
        "`after_step`, `after_token`, `snapshot`, `restore`",
    )
    needs = detector.needs
    _require(
        isinstance(needs, (set, frozenset)) and needs <= DETECTOR_NEEDS,
        detector,
        f"`needs` must be a subset of {sorted(DETECTOR_NEEDS)}, got {needs!r}",
    )


def _check_answers(detector: object, decoding: _Decoding, answers: _Answers) -> None:
    for moment, pair in zip(decoding.moments, answers, strict=True):
        for method, answer in zip(("after_step", "after_token"), pair, strict=True):
            where = f"{method} at position {moment.token.position} ({decoding.label})"
            _require(
                answer is None or isinstance(answer, Boundary),
                detector,
                f"{where} must return None or a Boundary, got {answer!r}",
            )
            if answer is None:
                continue
            _require(
                isinstance(answer.reason, str) and bool(answer.reason.strip()),
                detector,
                f"{where} must give a reason for the trace, got {answer.reason!r}",
            )
            allowed = ("now", "next") if method == "after_step" else ("next",)
            _require(
                answer.when in allowed,
                detector,
                f"{where} may say when={' or '.join(map(repr, allowed))}, got {answer.when!r}: "
                "once a token is chosen, its step can no longer be run again",
            )


def _check_same_answers(
    make: Callable[[], BoundaryDetector], decoding: _Decoding, answers: _Answers
) -> None:
    detector = make()
    _require_equal(
        detector,
        _answers(detector, decoding, detector.needs),
        answers,
        f"two detectors must answer alike ({decoding.label})",
    )
    _require_equal(
        detector,
        _answers(make(), decoding, DETECTOR_NEEDS),
        answers,
        f"answers must depend only on what `needs` names ({decoding.label})",
    )


def _check_reset(
    detector: BoundaryDetector, decodings: Sequence[_Decoding], expected: dict[str, _Answers]
) -> None:
    for decoding in (*decodings, *reversed(decodings)):
        _require_equal(
            detector,
            _answers(detector, decoding, detector.needs),
            expected[decoding.label],
            f"`reset` must forget what was seen before ({decoding.label})",
        )


def _check_snapshots(
    make: Callable[[], BoundaryDetector], decoding: _Decoding, answers: _Answers
) -> None:
    detector, other = make(), make()
    events = _with_needs(decoding, detector.needs)
    detector.reset(events.prompt_ids, events.prompt_text)
    states = []
    for moment, answer in zip(events.moments, answers, strict=True):
        states.append(detector.snapshot())
        _require_equal(
            detector,
            [_answer(detector, moment)],
            [answer],
            f"`snapshot` must change nothing ({decoding.label})",
        )
    other.reset((), "")
    stride = max(len(states) // 12, 1)
    for start in range(len(states) - 1, -1, -stride):
        for restored in (detector, other, detector):
            restored.restore(states[start])
            _require_equal(
                detector,
                [_answer(restored, moment) for moment in events.moments[start:]],
                answers[start:],
                f"after `restore` of the snapshot taken before position "
                f"{events.moments[start].token.position} the answers must be the same as the "
                f"first time ({decoding.label})",
            )


def _require_equal(detector: object, got: _Answers, expected: _Answers, rule: str) -> None:
    for index, (one, two) in enumerate(zip(got, expected, strict=True)):
        _require(
            one == two,
            detector,
            f"{rule}; {index} tokens on, (after_step, after_token) gave {one!r} instead of {two!r}",
        )


def _answers(detector: BoundaryDetector, decoding: _Decoding, needs: Any) -> _Answers:
    events = _with_needs(decoding, needs)
    detector.reset(events.prompt_ids, events.prompt_text)
    return [_answer(detector, moment) for moment in events.moments]


def _answer(detector: BoundaryDetector, moment: _Moment) -> tuple[Boundary | None, Boundary | None]:
    step = None if moment.step is None else detector.after_step(moment.step)
    return step, detector.after_token(moment.token)


def _with_needs(decoding: _Decoding, needs: Any) -> _Decoding:
    """The same decoding with events that carry only what is needed."""
    moments = []
    for moment in decoding.moments:
        step, token = moment.step, moment.token
        if "text" not in needs:
            token = replace(token, text="")
        if "entropy" not in needs:
            token = replace(token, entropy_nats=None)
            step = step and replace(step, entropy_nats=None)
        if "attention_drift" not in needs:
            step = step and replace(step, selected_mass=None)
        moments.append(_Moment(step, token))
    text = decoding.prompt_text if "text" in needs else ""
    return replace(decoding, prompt_text=text, moments=tuple(moments))


def _decodings(
    tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str]
) -> tuple[_Decoding, ...]:
    generator = random.Random(0)
    if tokenizer is None:
        pieces = [piece for text in (*_TEXTS, *texts) for piece in _cut(text, generator)]
        streams = [[(generator.randrange(_RANDOM_VOCABULARY), piece) for piece in pieces]]
    else:
        streams = [
            _pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False))
            for text in (*_TEXTS, *texts)
        ]
        drawn = [generator.randrange(len(tokenizer)) for _ in range(_RANDOM_TOKENS)]
        streams.append(_pieces(tokenizer, drawn))
    return tuple(
        _decoding(f"decoding {number}", stream, generator) for number, stream in enumerate(streams)
    )


def _decoding(label: str, stream: Sequence[tuple[int, str]], generator: random.Random) -> _Decoding:
    start = min(_PROMPT_TOKENS, len(stream) // 2)
    moments = []
    for index, (token_id, text) in enumerate(stream[start:]):
        position = start + index
        entropy_nats = generator.expovariate(3.0)
        mass = generator.random() ** 2
        # The first token of a decoding and every slow step come without a fast step.
        fast = index > 0 and generator.random() < 0.8
        step = StepEvent(position - 1, entropy_nats, mass) if fast else None
        moments.append(_Moment(step, TokenEvent(token_id, position, text, entropy_nats)))
    prompt = stream[:start]
    prompt_ids = tuple(token_id for token_id, _ in prompt)
    return _Decoding(label, prompt_ids, "".join(text for _, text in prompt), tuple(moments))


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[tuple[int, str]]:
    from sfi_agent.session.output.text_stream import TextStream

    stream = TextStream(tokenizer, skip_special_tokens=True)
    return [(token_id, stream.push(token_id)) for token_id in ids]


def _cut(text: str, generator: random.Random) -> list[str]:
    pieces = []
    while text:
        length = generator.randrange(6)  # 0 is a token that completes no character.
        pieces.append(text[:length])
        text = text[length:]
    return pieces
