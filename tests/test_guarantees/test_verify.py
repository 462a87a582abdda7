"""Guarantee 3: under `verify` every token is the one that dense decoding chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import strategies as st

from sfi_agent import Session, SessionConfig
from tests.families import VOCABULARY, tiny_engine
from tests.test_guarantees.adversaries import (
    ADVERSARIAL_DETECTORS,
    ADVERSARIAL_SELECTORS,
    adversaries,
)
from tests.test_guarantees.pair import Pair, Planned, RoundingDecides, raising_at
from tests.test_guarantees.play import Played, close, play, same_tokens
from tests.test_guarantees.policies import (
    DETECTORS,
    FAMILY_NAMES,
    LAYOUT_NAMES,
    SELECTORS,
    block_policies,
    chunk_sizes,
    dense_twin,
    for_each,
    prompts,
)

ALL_DETECTORS = [*DETECTORS, *({"name": name} for name in ADVERSARIAL_DETECTORS)]
ALL_SELECTORS = [*SELECTORS, *({"name": name} for name in ADVERSARIAL_SELECTORS)]
PROMPT = [(7 * index * index + 3) % VOCABULARY for index in range(28)]
VERIFY = SessionConfig(
    slow_step="verify",
    boundaries=[{"name": "never"}],
    memory={"sink_tokens": 1, "selected_tokens": 14, "recent_tokens": 4},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 6},
)


@pytest.fixture(autouse=True, scope="module")
def _named_adversaries() -> Iterator[None]:
    with adversaries():
        yield


@lru_cache
def _dense(family: str, temperature: float) -> Played:
    config = VERIFY.replace(mode="dense", sampling={"temperature": temperature})
    return play(tiny_engine(family), config, [PROMPT], new_tokens=7)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_detector_and_selector(family: str) -> None:
    """Each family meets every detector and every selector; over all families, every pair."""
    number, families = FAMILY_NAMES.index(family), len(FAMILY_NAMES)
    for index, detector in enumerate(ALL_DETECTORS):
        for shift in range(number, len(ALL_SELECTORS), families):
            selector = ALL_SELECTORS[(index + shift) % len(ALL_SELECTORS)]
            temperature = 0.0 if index % 3 else 1.0
            config = VERIFY.replace(
                boundaries=[detector], selector=selector, sampling={"temperature": temperature}
            )
            dense = _dense(family, temperature)
            verified = play(tiny_engine(family), config, [PROMPT], new_tokens=7)
            if same_tokens(dense, verified, config):
                assert close(verified.next_logits, dense.next_logits)


_ids = st.integers(0, VOCABULARY - 1)
_few_ids = st.lists(_ids, max_size=6)
_PLACES = ("after_step", "after_token", "snapshot", "restore", "fast", "block", "select", "dense")
_operations: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just("turn"), prompts, st.integers(1, 12)),
    st.tuples(st.just("pieces"), st.lists(st.integers(1, 4), min_size=2, max_size=4)),
    st.tuples(st.just("stop"), _few_ids, st.sets(_ids, min_size=4, max_size=40)),
    st.tuples(st.just("cancel"), _few_ids, st.integers(1, 16)),
    st.tuples(st.just("leave"), _few_ids, st.integers(0, 8)),
    st.tuples(st.just("raise"), _few_ids, st.sampled_from(_PLACES), st.integers(1, 8)),
    st.tuples(st.just("rewind"), st.integers(1, 99)),
    st.tuples(st.just("fork"), _few_ids, st.integers(0, 2**63 - 1)),
)


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_whatever_is_done_with_a_session(family: str) -> None:
    """Turns, pieces, stops, limits, cancellations, failures, rewinds and forks, in any order."""

    @for_each(
        family,
        4,
        config=block_policies("verify"),
        prompt=prompts,
        operations=st.lists(_operations, min_size=3, max_size=5),
        chunk=chunk_sizes,
    )
    def check(
        config: SessionConfig,
        prompt: list[int],
        operations: list[tuple[Any, ...]],
        chunk: int | None,
    ) -> None:
        engine = tiny_engine(family, chunk)
        dense = dense_twin(config)
        with engine.session(dense) as plain, engine.session(config) as verifying:
            pair = Pair(plain, verifying)
            try:
                pair.decode(prompt, 5)
                for name, *arguments in operations:
                    _OPERATIONS[name](pair, *arguments)
            except RoundingDecides:
                return


def _turn(pair: Pair, ids: list[int], new_tokens: int) -> None:
    pair.decode(ids, new_tokens)


def _pieces(pair: Pair, sizes: list[int]) -> None:
    for size in sizes:
        assert len(pair.decode([], size)) == size


def _stop(pair: Pair, ids: list[int], stop_ids: set[int]) -> None:
    got = pair.decode(ids, 12, stop_ids)
    assert not stop_ids & set(got[:-1])


def _cancel(pair: Pair, ids: list[int], answers: int) -> None:
    def decode(given: list[int]) -> None:
        asked = iter([False] * answers)
        pair.verifying._cancelled.is_set = lambda: next(asked, True)  # type: ignore[method-assign]
        try:
            pair.verifying.decode(given, max_new_tokens=20)
        finally:
            del pair.verifying._cancelled.is_set

    before = len(pair.verifying.token_ids)
    decode(ids)
    got = pair.verifying.token_ids[before + len(ids) :]
    if not got:
        # Cancelled in the prefill: the ids stay, to be processed by the next decoding.
        pair.dense.decode(ids, max_new_tokens=0)
        pair.decode([], 2)
        return
    pair.verifying.rewind(pair.verifying.mark(before))
    pair.break_off(ids, decode)


def _leave(pair: Pair, ids: list[int], kept: int) -> None:
    pair.break_off(ids, lambda given: pair.leave(given, kept))


def _raise(pair: Pair, ids: list[int], place: str, call: int) -> None:
    decoder: Any = pair.verifying._core._decoder
    steps = decoder.steps
    owner = decoder.runner if place in ("fast", "block", "dense") else None
    owner = owner or (steps.selector if place == "select" else steps.monitor)
    original = getattr(owner, place)

    def decode(given: list[int]) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(owner, place, raising_at(original, call), raising=True)
            try:
                pair.verifying.decode(given, max_new_tokens=14)
            except Planned:
                pass

    pair.break_off(ids, decode)


def _rewind(pair: Pair, percent: int) -> None:
    pair.rewind(max(1, len(pair.dense.token_ids) * percent // 100))
    pair.decode([], 3)


def _fork(pair: Pair, ids: list[int], seed: int) -> None:
    with pair.dense.fork(seed=seed) as dense, pair.verifying.fork(seed=seed) as verifying:
        child = Pair(dense, verifying)
        child.check()
        child.decode(ids, 6)
        child.rewind(len(child.dense.token_ids) - 3)
        child.decode(ids, 4)
    pair.check()


_OPERATIONS: dict[str, Callable[..., None]] = {
    "turn": _turn,
    "pieces": _pieces,
    "stop": _stop,
    "cancel": _cancel,
    "leave": _leave,
    "raise": _raise,
    "rewind": _rewind,
    "fork": _fork,
}


def _fork_child(parent: Session, config: SessionConfig) -> tuple[list[int], Any]:
    with parent.fork(config) as child:
        got = [*child.decode([9, 8], max_new_tokens=8), *child.decode([], max_new_tokens=6)]
        return got, child.next_logits()


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "mistral_sliding"])
@pytest.mark.parametrize("past", ["observe", "rectify", "verify", "dense"])
def test_a_verifying_fork_equals_a_dense_fork_of_the_same_parent(family: str, past: str) -> None:
    """After `observe` the shared history is inexact; the child is exact relative to it."""
    changes: dict[str, Any] = {"mode": "dense"} if past == "dense" else {"slow_step": past}
    with tiny_engine(family).session(VERIFY.replace(**changes)) as parent:
        parent.decode(PROMPT, max_new_tokens=12)
        dense, dense_logits = _fork_child(parent, VERIFY.replace(mode="dense"))
        verified, logits = _fork_child(parent, VERIFY)
    assert verified == dense
    assert close(logits, dense_logits)


def test_the_examples_meet_what_they_are_meant_to_meet() -> None:
    """Whole segments stand, segments break in the middle and at the first draft, retries occur."""
    outcomes: set[str] = set()
    for family in ("gemma3", "olmo3", "qwen2"):
        for detector in ({"name": "never"}, {"name": "entropy", "threshold_nats": 2.4}):
            config = VERIFY.replace(boundaries=[detector])
            for record in play(tiny_engine(family), config, [PROMPT], new_tokens=40).trace:
                drafted, accepted = record.drafted_tokens, record.accepted_tokens
                if record.kind == "retry":
                    outcomes.add("retry")
                if drafted:
                    whole = "all" if accepted == drafted else "none" if not accepted else "some"
                    outcomes.add(whole)
    assert outcomes == {"all", "some", "none", "retry"}


@pytest.mark.parametrize("prompt_tokens", [1, 300])
def test_prompts_of_one_token_and_of_hundreds(prompt_tokens: int) -> None:
    prompt = [(7 * index * index + 3) % VOCABULARY for index in range(prompt_tokens)]
    for family in ("gemma3", "llama"):
        config = VERIFY.replace(boundaries=[{"name": "alternating"}])
        engine = tiny_engine(family, 64)
        dense = play(engine, dense_twin(config), [prompt, [], [5]], new_tokens=12)
        verified = play(engine, config, [prompt, [], [5]], new_tokens=12)
        if same_tokens(dense, verified, config):
            assert close(verified.next_logits, dense.next_logits)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 9, "seed": 3}], ids=str)
def test_long_generations_with_full_acceptance(sampling: dict[str, Any]) -> None:
    """At full budget nothing is rejected, and drafts grow to the longest segment."""
    config = VERIFY.replace(
        memory={"selected_tokens": 1000}, refresh={"max_segment_tokens": 40}, sampling=sampling
    )
    engine = tiny_engine("qwen2")
    dense = play(engine, dense_twin(config), [PROMPT], new_tokens=150)
    verified = play(engine, config, [PROMPT], new_tokens=150)
    assert same_tokens(dense, verified, config)
    drafts = [record.drafted_tokens for record in verified.trace if record.drafted_tokens]
    assert all(record.accepted_tokens == record.drafted_tokens for record in verified.trace)
    assert drafts[:-1] == sorted(drafts[:-1]) and max(drafts) > 20
