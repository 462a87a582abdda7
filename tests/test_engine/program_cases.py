"""Engines whose steps are programs, uncaptured on the CPU, and what their sessions are held to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import strategies as st
from torch import Tensor

from sfi_agent import Engine, Selection, Session, SessionConfig
from sfi_agent.engine.instruments import Instruments
from sfi_agent.engine.programs.executor import ProgramSteps
from sfi_agent.engine.requests import StepOutcome, StepRequest
from sfi_agent.engine.runner import Runner
from sfi_agent.observe.trace import StepRecord
from tests.families import model_of, tiny_engine, word_tokenizer
from tests.test_guarantees.play import LOGITS_TOLERANCE, choice_lead
from tests.test_guarantees.policies import block_policies

__all__ = [
    "POLICY",
    "Told",
    "agree",
    "counted_requests",
    "eager_engine",
    "fresh_program_engine",
    "program_engine",
    "program_policies",
    "records_of",
    "tell",
    "told",
    "valid_positions",
]

POLICY = SessionConfig(
    boundaries=[{"name": "never"}],
    selector={"name": "per_head"},
    memory={"sink_tokens": 2, "selected_tokens": 8, "recent_tokens": 4},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 6},
)
"""Greedy segments of six tokens whatever is written."""


def eager_engine(name: str, chunk: int | None = None) -> Engine:
    """The shared engine of a family whose steps are plain forward passes."""
    return tiny_engine(name, chunk)


def fresh_program_engine(name: str, chunk: int | None = None) -> Engine:
    """An engine on the family's shared model that runs programs and has made none yet."""
    engine = Engine(model_of(name), word_tokenizer(), prefill_chunk_tokens=chunk)
    engine.runner = Runner(engine.model, engine.shape, chunk, execution="uncaptured")
    return engine


@lru_cache
def program_engine(name: str, chunk: int | None = None) -> Engine:
    """The shared one: its cohorts see the sequences of many tests, as a long-lived engine's do."""
    return fresh_program_engine(name, chunk)


@contextmanager
def counted_requests() -> Iterator[Counter[str]]:
    """How many requests of each kind programs executed inside this block."""
    counts: Counter[str] = Counter()
    execute = ProgramSteps.execute

    def counting(
        steps: ProgramSteps, requests: Sequence[StepRequest], *options: int
    ) -> list[StepOutcome]:
        outcomes: list[StepOutcome] = execute(steps, requests, *options)
        counts.update(type(request).__name__ for request in requests)
        return outcomes

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ProgramSteps, "execute", counting)
        yield counts


@dataclass
class Told:
    """What a session told of its decoding.

    Attributes:
        records: Of every kept token, without times.
        logits: By position what the token was drawn from, where that was asked for.
        refreshes: History length and valid positions per layer and head.
    """

    records: list[StepRecord] = field(default_factory=list)
    logits: dict[int, Tensor] = field(default_factory=dict)
    refreshes: list[tuple[int, Any]] = field(default_factory=list)


def told(session: Session, *, logits: bool, refreshes: bool = False) -> Told:
    """Let a session tell; programs begin nothing ahead where somebody wants logits."""
    found = Told()
    session.attach(
        Instruments(
            on_logits=found.logits.__setitem__ if logits else None,
            on_refresh=(
                lambda tokens, chosen: found.refreshes.append((tokens, valid_positions(chosen)))
            )
            if refreshes
            else None,
        )
    )
    return found


def valid_positions(chosen: Sequence[Selection | None]) -> list[list[list[int]] | None]:
    """Selected positions per layer and head; None on layers without a selection."""
    return [
        None
        if selection is None
        else [
            row[:count]
            for row, count in zip(
                selection.positions[0].tolist(), selection.counts[0].tolist(), strict=True
            )
        ]
        for selection in chosen
    ]


def records_of(session: Session) -> list[StepRecord]:
    """The trace without times."""
    return [replace(record, seconds=0.0) for record in session.trace]


def tell(
    engine: Engine, config: SessionConfig, act: Callable[[Session], None], *, logits: bool
) -> Told:
    """A session on which something is done."""
    with engine.session(config) as session:
        found = told(session, logits=logits, refreshes=True)
        act(session)
        found.records = records_of(session)
    return found


def agree(
    expected: Told, got: Told, config: SessionConfig, tolerance: float = LOGITS_TOLERANCE
) -> bool:
    """Whether two decodings are one; false where rounding let them part.

    Args:
        expected: With logits.
        got: Of the same policy and ids.
        config: The policy.
        tolerance: By what share of the largest logit a draw may lead where they part.

    Raises:
        AssertionError: They part where rounding cannot be the reason.
    """
    compared = _swapped_at(expected, got)
    for one, other in zip(expected.records, got.records, strict=False):
        if compared is not None and one.position > compared:
            return False
        if one.token_id != other.token_id:
            assert one.position == other.position
            logits = expected.logits[one.position]
            lead = choice_lead(logits, config, one.position)
            assert lead <= tolerance * float(logits.abs().max()), f"{one} against {other}"
            return False
        assert one == other
    assert compared is None and len(expected.records) == len(got.records)
    return True


def _swapped_at(expected: Told, got: Told) -> int | None:
    """The history length at the first refresh that differs in one place of one head.

    A head that looks at sink and recent tokens with nearly all of its mass leaves differences of
    the size of a rounding to the candidates, so that one may take the place of another. Where more
    than that differs, and no token did before, something is wrong.
    """
    for (tokens, one), (others, other) in zip(expected.refreshes, got.refreshes, strict=False):
        if one == other and tokens == others:
            continue
        before = [[r.token_id for r in t.records if r.position <= tokens] for t in (expected, got)]
        if before[0] != before[1]:
            return None  # It is the tokens that parted.
        swaps = [
            set(left) ^ set(right)
            for layer, twin in zip(one, other, strict=True)
            for left, right in zip(layer or [], twin or [], strict=True)
        ]
        assert tokens == others and sum(map(len, swaps)) == 2, f"{one} against {other}"
        return tokens
    return None


@st.composite
def program_policies(draw: st.DrawFn, /, slow_step: str = "") -> SessionConfig:
    """Any policy over any plugins; needs `adversaries()` around it.

    Mostly one evidence query, because programs leave other slow steps to eager ones.
    """
    slow_step = slow_step or draw(st.sampled_from(["observe", "rectify", "verify"]))
    config = draw(block_policies(slow_step, refresh={}))
    shortest = draw(st.integers(1, 6))
    one = slow_step == "observe" or draw(st.integers(0, 3)) > 0
    return config.replace(
        mode=draw(st.sampled_from(["slow_fast"] * 7 + ["dense"])),
        refresh={
            "min_segment_tokens": shortest,
            "max_segment_tokens": shortest + draw(st.integers(0, 12)),
            "evidence_queries": 1 if one else draw(st.integers(2, 5)),
            "prefill_evidence_queries": draw(st.sampled_from([1, 3, 16])),
            "lag": draw(st.sampled_from([0, 1])),
        },
    )
