"""Teacher forcing: the steps that a policy takes on a given text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sfi_agent import (
    ContextOverflowError,
    InputError,
    NothingPendingError,
    Session,
    SessionConfig,
    SessionStateError,
)
from sfi_agent.engine.instruments import Instruments
from sfi_agent.observe.trace import StepRecord
from tests.families import CONTEXT_TOKENS, VOCABULARY, tiny_engine
from tests.reference import dense_logits
from tests.test_guarantees.play import close
from tests.test_session.conversations import chat_engine, encode, require_whole

PROMPT = [(7 * index * index + 3) % VOCABULARY for index in range(40)]
TEXT = [(3 * index * index + 29) % VOCABULARY for index in range(25)]
OBSERVE = SessionConfig(
    boundaries=[{"name": "punctuation"}, {"name": "entropy", "threshold_sigmas": 1.5}],
    memory={"sink_tokens": 1, "selected_tokens": 20, "recent_tokens": 4},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 6},
)
CONFIGS = {
    "dense": OBSERVE.replace(mode="dense"),
    "observe": OBSERVE,
    "rectify": OBSERVE.replace(slow_step="rectify"),
    "verify": OBSERVE.replace(slow_step="verify"),
}
POLICIES = pytest.mark.parametrize("name", CONFIGS)


def timeless(records: list[StepRecord]) -> list[StepRecord]:
    return [replace(record, seconds=0.0) for record in records]


@POLICIES
@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_following_its_own_output_takes_the_same_steps(
    name: str, temperature: float, family: str
) -> None:
    """Kinds, reasons, sizes, acceptance: whatever a record says but the time."""
    config = CONFIGS[name].replace(sampling={"temperature": temperature, "seed": 4})
    engine = tiny_engine(family)
    with engine.session(config) as free, engine.session(config) as led:
        for session in (led, free):
            session.decode(PROMPT, max_new_tokens=0)
        for new_tokens in (17, 1, 9):
            told = free.decode([], max_new_tokens=new_tokens)
            records = led.follow(told)
            assert records == led.trace[-new_tokens:]
            assert timeless(led.trace) == timeless(free.trace)
            assert led.token_ids == free.token_ids
            assert torch.equal(led.next_logits(), free.next_logits())
        assert led.stats.slow_share == free.stats.slow_share
        assert led.stats.acceptance == free.stats.acceptance


@POLICIES
def test_a_text_that_the_model_would_not_write(name: str) -> None:
    """What was given is kept as it is; exact kinds of slow steps leave an exact history."""
    engine = tiny_engine("gemma3")
    with engine.session(CONFIGS[name]) as session:
        session.decode(PROMPT, max_new_tokens=0)
        records = session.follow(TEXT)
        assert session.token_ids == PROMPT + TEXT
        assert [record.token_id for record in records] == TEXT
        assert [record.position for record in records] == list(range(40, 65))
        assert records[0].reason == "prefill"
        logits = session.next_logits()
        if name == "verify":
            assert session.stats.acceptance == 0.0
            assert all(record.kind != "fast" for record in records)
        more = session.decode([], max_new_tokens=4)
        assert session.token_ids == [*PROMPT, *TEXT, *more]
    if name != "observe":
        assert close(logits, dense_logits(engine.model, PROMPT + TEXT)[-1])


@POLICIES
def test_in_pieces(name: str) -> None:
    """Each piece is a decoding of its own, as with `decode([])`."""
    engine = tiny_engine("qwen2")
    with engine.session(CONFIGS[name]) as session:
        session.decode(PROMPT, max_new_tokens=0)
        for start in range(0, 25, 5):
            records = session.follow(TEXT[start : start + 5])
            assert [record.reason == "prefill" for record in records] == [True] + [False] * 4
        assert session.token_ids == PROMPT + TEXT
        assert session.stats.history_tokens <= 64
        logits = session.next_logits()
    if name != "observe":
        assert close(logits, dense_logits(engine.model, PROMPT + TEXT)[-1])


def test_nothing_to_follow() -> None:
    with tiny_engine("qwen2").session(OBSERVE) as session:
        session.decode(PROMPT, max_new_tokens=0)
        assert session.follow([]) == []
        assert session.token_ids == PROMPT


def refused(session: Session, ids: Any, error: type[Exception], match: str) -> None:
    """An error by name, and nothing has changed."""
    before = session.token_ids, session.trace, session.stats
    with pytest.raises(error, match=match):
        session.follow(ids)
    assert (session.token_ids, session.trace, session.stats) == before


@POLICIES
def test_bad_input_is_refused_and_nothing_is_lost(name: str) -> None:
    with tiny_engine("qwen2").session(CONFIGS[name]) as session:
        refused(session, [3], NothingPendingError, "no new ids")
        session.decode(PROMPT, max_new_tokens=3)
        refused(session, [3, VOCABULARY], InputError, "number 1")
        refused(session, [3, -1], InputError, "number 1")
        refused(session, [True], InputError, "True")
        refused(session, [[3]], InputError, "number 0")
        refused(session, 3, InputError, "flat sequence")
        refused(session, "3", InputError, "flat sequence")
        too_many = [1] * (CONTEXT_TOKENS - 42)
        refused(session, too_many, ContextOverflowError, f"{CONTEXT_TOKENS} tokens")
        assert len(session.follow([3, 4])) == 2
    with pytest.raises(SessionStateError, match="closed"):
        session.follow([3])


def test_the_longest_text_that_fits() -> None:
    config = OBSERVE.replace(slow_step="verify", refresh={"max_segment_tokens": 96})
    with tiny_engine("llama_multi_query").session(config) as session:
        session.decode(list(range(100)) * 4 + PROMPT, max_new_tokens=0)
        assert len(session.follow([5] * (CONTEXT_TOKENS - 440))) == CONTEXT_TOKENS - 440
        assert len(session.token_ids) == CONTEXT_TOKENS


def test_cancelling_keeps_what_was_followed() -> None:
    with tiny_engine("qwen2").session(OBSERVE.replace(slow_step="rectify")) as session:
        session.decode(PROMPT, max_new_tokens=0)

        def cancel(position: int, logits: torch.Tensor) -> None:
            if position == 46:
                session.cancel()

        session.attach(Instruments(on_logits=cancel))
        records = session.follow(TEXT)
        assert [record.token_id for record in records] == TEXT[:7]
        session.attach(Instruments())
        session.follow(TEXT[7:])
        assert session.token_ids == PROMPT + TEXT


def test_a_conversation_knows_what_was_followed() -> None:
    engine = chat_engine()
    with engine.session(OBSERVE.replace(slow_step="verify")) as session:
        session.decode(encode(engine, "Some text to begin with."), max_new_tokens=0)
        records = session.follow(encode(engine, "And how it goes on."))
        assert records
        require_whole(session)
