"""How much history is left of a session that goes back: as much as if it had never gone on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import strategies as st

from sfi_agent import Session, SessionConfig
from tests.families import tiny_engine
from tests.test_guarantees.adversaries import adversaries
from tests.test_guarantees.play import close
from tests.test_guarantees.policies import block_policies, chunk_sizes, for_each, prompts
from tests.test_guarantees.test_fork_rewind import history_of, same_bits
from tests.test_session.conversations import call_text, chat_engine, policy, says

NEW_TOKENS = 12
KINDS: tuple[dict[str, Any], ...] = (
    {"mode": "dense"},
    *({"slow_step": kind} for kind in ("observe", "rectify", "verify")),
)


@pytest.fixture(autouse=True, scope="module")
def _named_adversaries() -> Iterator[None]:
    with adversaries():
        yield


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_rewind_under_rectify_equals_never_having_gone_there(family: str) -> None:
    """Also into generated text: the twin stops generating where the other is rewound to."""

    @for_each(
        family,
        4,
        config=block_policies("rectify"),
        turns=st.lists(prompts, min_size=3, max_size=3),
        kept=st.integers(1, NEW_TOKENS),
        early=st.booleans(),
        chunk=chunk_sizes,
    )
    def check(
        config: SessionConfig,
        turns: list[list[int]],
        kept: int,
        early: bool,
        chunk: int | None,
    ) -> None:
        engine = tiny_engine(family, chunk)
        with engine.session(config) as twin, engine.session(config) as session:
            twin.decode(turns[0], max_new_tokens=kept)
            session.decode(turns[0], max_new_tokens=kept if early else NEW_TOKENS)
            mark = session.mark(len(turns[0]) + kept)
            for _ in range(2):
                session.decode(turns[1], max_new_tokens=NEW_TOKENS)
                session.rewind(mark)
                assert session.token_ids == twin.token_ids
                assert session.stats.history_tokens == twin.stats.history_tokens
                if twin.stats.history_tokens:
                    assert same_bits(history_of(session), history_of(twin))
            for one in (twin, session):
                one.decode(turns[2], max_new_tokens=NEW_TOKENS)
            assert session.token_ids == twin.token_ids
            # Not bit for bit: buffers of other lengths may be read by another kernel.
            assert close(session.next_logits(), twin.next_logits())


def note(text: str) -> str:
    """Takes a note.

    Args:
        text: What to note.
    """
    return f"noted {text}"


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_turn_after_a_rewind_costs_what_it_would_have_cost(kind: dict[str, Any]) -> None:
    engine = chat_engine()
    outputs = (f"One two three. {call_text('note', text='Ada')} four five<|im_end|>", "Six. Seven")
    with (
        engine.session(policy(**kind), tools=[note]) as session,
        engine.session(policy(**kind), tools=[note]) as twin,
    ):
        for one in (session, twin):
            with says(engine, *outputs):
                one.run("Go.")
        mark = session.mark()
        with says(engine, "A detour."):
            session.send("And then?")
        session.rewind(mark)
        found = []
        for one in (session, twin):
            with says(engine, "Well."):
                found.append(one.send("Or rather?").usage)
        assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_turn_after_one_that_failed_costs_what_it_would_have_cost(kind: dict[str, Any]) -> None:
    engine = chat_engine(prefill_chunk_tokens=8)

    def talk(session: Session, *, fails: bool) -> Any:
        session.send("Hello there.")
        if fails:
            with pytest.MonkeyPatch.context() as patched:
                break_second_pass(engine, patched)
                with pytest.raises(RuntimeError, match="no more"):
                    session.send("word " * 30)
        return session.send("Third?").usage

    with (
        engine.session(policy(**kind, sampling={"max_new_tokens": 11})) as session,
        engine.session(policy(**kind, sampling={"max_new_tokens": 11})) as twin,
    ):
        assert talk(session, fails=True) == talk(twin, fails=False)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=repr)
def test_what_a_failed_turn_gave_up_is_no_news(kind: dict[str, Any]) -> None:
    """A turn that renders all again gives ids up; they come back and are processed once more, but
    detectors and selector see the next turn alone."""
    engine = chat_engine("CHANGES_THE_CLOSE", prefill_chunk_tokens=8)
    config = policy(**kind, selector={"name": "per_head"}, sampling={"max_new_tokens": 14})
    with engine.session(config) as session, engine.session(config) as twin:
        for one in (session, twin):
            one.send("Hello. There")
            one.send("More, please.")
        before = session.token_ids
        with pytest.MonkeyPatch.context() as patched:
            break_second_pass(engine, patched)
            with pytest.raises(RuntimeError, match="no more"):
                session.send("word " * 30)
        assert session.token_ids == before
        assert session.stats.history_tokens < twin.stats.history_tokens
        for one in (session, twin):
            one.decode([], max_new_tokens=14)
        assert session.token_ids == twin.token_ids
        assert [(r.kind, r.reason, r.memory_tokens) for r in session.trace] == [
            (r.kind, r.reason, r.memory_tokens) for r in twin.trace
        ]


def break_second_pass(engine: Any, patched: pytest.MonkeyPatch) -> None:
    """The model raises in its second pass from now on."""
    forward, passes = engine.model.forward, []

    def failing(*given: Any, **keywords: Any) -> Any:
        passes.append(0)
        if len(passes) > 1:
            raise RuntimeError("no more")
        return forward(*given, **keywords)

    patched.setattr(engine.model, "forward", failing)


def test_what_a_parent_under_observe_wrote_stays() -> None:
    """Its fast steps' keys are history: a child under rectify that goes back there keeps them."""
    engine = tiny_engine("llama")
    observe = policy(refresh={"min_segment_tokens": 6, "max_segment_tokens": 6})
    with engine.session(observe.replace(boundaries=[{"name": "never"}])) as parent:
        parent.decode(range(40), max_new_tokens=10)
        assert parent.trace[4].kind == "fast"
        with parent.fork(parent.config.replace(slow_step="rectify")) as child:
            child.rewind(child.mark(45))
            assert child.stats.history_tokens == 44
            parent.rewind(parent.mark(45))
            assert same_bits(history_of(child), history_of(parent))
