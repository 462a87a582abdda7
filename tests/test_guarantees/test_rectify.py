"""Guarantees 2 and 3 for `rectify`, and what its and verify's slow steps show to selectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any, Literal

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sfi_agent import Engine, Session, SessionConfig
from sfi_agent.engine.instruments import Instruments
from tests.families import VOCABULARY, tiny_engine
from tests.reference import ReferenceRun, dense_logits, masked_run, visibility_masks
from tests.test_guarantees.adversaries import adversaries, watching_detectors
from tests.test_guarantees.play import Played, close, play, record_into, rules_of
from tests.test_guarantees.policies import (
    FAMILY_NAMES,
    LAYOUT_NAMES,
    block_policies,
    chunk_sizes,
    for_each,
    prompts,
    turns_of_ids,
)
from tests.test_guarantees.test_replay import _compare, _expected

NEW_TOKENS = 9
PROMPT = [(5 * index * index + 11) % VOCABULARY for index in range(40)]
RECTIFY = SessionConfig(
    slow_step="rectify",
    boundaries=[{"name": "never"}],
    memory={"sink_tokens": 1, "selected_tokens": 6, "recent_tokens": 4},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 4},
)
Snapshot = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True, scope="module")
def _named_adversaries() -> Iterator[None]:
    with adversaries():
        yield


def history_of(session: Session) -> Snapshot:
    """Copies of every key and value, per layer."""
    state: Any = session._core._state
    pieces = [layer.history.joined(0, layer.history.tokens) for layer in state.sequence.layers]
    return [(piece.keys.clone(), piece.values.clone()) for piece in pieces]


def watch_histories(session: Session) -> dict[int, Snapshot]:
    """Filled with the history behind every refresh, by its length."""
    found: dict[int, Snapshot] = {}

    def note(tokens: int, selections: Any) -> None:
        found[tokens] = history_of(session)

    session.attach(Instruments(on_refresh=note))
    return found


@torch.no_grad()
def dense_history(engine: Engine, ids: Sequence[int]) -> Snapshot:
    """Keys and values that transformers' own cache and attention give. No session may be open."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    tokens = torch.tensor([list(ids)], device=engine.model.device)
    # transformers 5.24 gave the argument a new name.
    names = signature(type(engine.model).forward).parameters
    given = {"cache" if "cache" in names else "past_key_values": cache}
    engine.model(input_ids=tokens, use_cache=True, **given)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def same_history(got: Snapshot, expected: Snapshot) -> None:
    for layer, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        for one, other in zip(mine, theirs, strict=True):
            assert close(one, other[:, : one.shape[1]]), f"layer {layer}"


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("slow_step", ["rectify", "verify"])
def test_after_each_slow_step_the_history_is_that_of_a_dense_run(
    family: str, slow_step: str
) -> None:
    @for_each(
        family + slow_step,
        1,
        config=block_policies(slow_step),
        turns=turns_of_ids,
        chunk=chunk_sizes,
    )
    def check(config: SessionConfig, turns: list[list[int]], chunk: int | None) -> None:
        engine = tiny_engine(family, chunk)
        with engine.session(config) as session:
            found = watch_histories(session)
            for turn in turns:
                session.decode(turn, max_new_tokens=NEW_TOKENS)
                # Also what stays between turns, to be marked, forked and saved.
                found[session.stats.history_tokens] = history_of(session)
                assert session.stats.history_tokens < len(session.token_ids)
            ids, logits = session.token_ids, session.next_logits()
        slow = [record for record in session.trace if record.kind != "fast"]
        assert len(found) >= len(slow) > 0
        expected = dense_history(engine, ids)
        for tokens, snapshot in found.items():
            assert {keys.shape[1] for keys, _ in snapshot} == {tokens}
            same_history(snapshot, expected)
        assert close(logits, dense_logits(engine.model, ids)[-1])


def test_observe_does_keep_inexact_keys() -> None:
    """Else the tests above would say little."""
    engine = tiny_engine("llama")
    with engine.session(RECTIFY.replace(slow_step="observe")) as session:
        session.decode(PROMPT, max_new_tokens=12)
        ids, got = session.token_ids, history_of(session)
    expected = dense_history(engine, ids)
    assert not all(
        close(keys, theirs[:, : keys.shape[1]], 0.02)
        for (keys, _), (theirs, _) in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_turn_n_under_rectify_equals_a_recompute(family: str) -> None:
    """The next turn starts from the same logits as a session that is given all ids at once."""

    @for_each(
        family,
        4,
        config=block_policies("rectify"),
        turns=st.lists(prompts, min_size=2, max_size=2),
        chunk=chunk_sizes,
    )
    def check(config: SessionConfig, turns: list[list[int]], chunk: int | None) -> None:
        engine = tiny_engine(family, chunk)
        with engine.session(config) as session, engine.session(config) as fresh:
            session.decode(turns[0], max_new_tokens=NEW_TOKENS)
            given = [*session.token_ids, *turns[1]]
            fresh.decode(given, max_new_tokens=0)
            session.decode(turns[1], max_new_tokens=0)
            assert session.token_ids == fresh.token_ids == given
            assert close(session.next_logits(), fresh.next_logits())
            with session.fork(SessionConfig(mode="dense")) as child:
                assert close(child.next_logits(), fresh.next_logits())


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_fast_steps_under_rectify_see_an_exact_past(family: str) -> None:
    """A fast step equals a plain forward in which nothing before its segment was ever sparse."""

    @for_each(family, 4, config=block_policies("rectify"), prompt=prompts)
    def check(config: SessionConfig, prompt: list[int]) -> None:
        engine = tiny_engine(family)
        played = play(engine, config, [prompt], new_tokens=NEW_TOKENS)
        rules, total = rules_of(engine, config), len(played.ids)
        starts = [refresh.tokens for refresh in played.refreshes]
        for start, end in zip(starts, [*starts[1:], total], strict=True):
            segment = [
                record
                for record in played.trace
                if record.kind == "fast" and start < record.position <= end
            ]
            masks = visibility_masks(rules, total, segment, played.refreshes)
            run = masked_run(engine.model, played.ids, masks)
            for record in segment:
                row = record.position - 1
                assert close(played.row_logits[row], run.logits[row]), f"row {row}"


@pytest.mark.parametrize("family", LAYOUT_NAMES)
@pytest.mark.parametrize("slow_step", ["rectify", "verify"])
def test_selectors_see_the_last_queries_that_stand(family: str, slow_step: str) -> None:
    """Exactly the last `evidence_queries` of what a slow step processed and kept."""

    @for_each(
        family + slow_step,
        3,
        config=block_policies(slow_step),
        turns=turns_of_ids,
        chunk=chunk_sizes,
    )
    def check(config: SessionConfig, turns: list[list[int]], chunk: int | None) -> None:
        engine = tiny_engine(family, chunk)
        played = play(engine, config, turns, new_tokens=NEW_TOKENS)
        rules = rules_of(engine, config)
        run = dense_run(engine, config, played)
        seen = iter(played.evidences)
        for refresh, queries in zip(
            played.refreshes, query_counts(config, played, turns), strict=True
        ):
            for layer, selection in enumerate(refresh.selections):
                if selection is not None:
                    _, evidence = next(seen)
                    _compare(evidence, _expected(run, rules, refresh, layer, queries))
        assert next(seen, None) is None


def dense_run(engine: Engine, config: SessionConfig, played: Played) -> ReferenceRun:
    """Queries and keys of all ids when every step is dense."""
    masks = visibility_masks(rules_of(engine, config), len(played.ids), [], [])
    return masked_run(engine.model, played.ids, masks)


def query_counts(config: SessionConfig, played: Played, turns: list[list[int]]) -> list[int]:
    """Per refresh: of a prefill's prompt, or of the block since the refresh before."""
    slow = {record.position: record for record in played.trace if record.kind != "fast"}
    prompts_left = iter([len(turns[0]), *(len(turn) + 1 for turn in turns[1:])])
    counts, before = [], 0
    for refresh in played.refreshes:
        if slow[refresh.tokens].reason == "prefill":
            counts.append(min(config.refresh.prefill_evidence_queries, next(prompts_left)))
        else:
            counts.append(min(config.refresh.evidence_queries, refresh.tokens - before))
        before = refresh.tokens
    return counts


@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])
@pytest.mark.parametrize("kept", range(1, NEW_TOKENS))
def test_the_next_turn_is_selected_for_as_if_nothing_had_been_rewound(
    slow_step: Literal["observe", "rectify", "verify"], kept: int
) -> None:
    """Whatever part of a dropped segment is processed again, prompt and evidence are the same."""
    engine = tiny_engine("qwen3", 16)
    with watching_detectors() as built:
        config = RECTIFY.replace(slow_step=slow_step, boundaries=[{"name": "watching"}])
        with engine.session(config) as twin, engine.session(config) as session:
            twin.decode(PROMPT, max_new_tokens=kept)
            session.decode(PROMPT, max_new_tokens=NEW_TOKENS)
            session.decode([9, 8, 7], max_new_tokens=5)
            session.rewind(session.mark(len(PROMPT) + kept))
            assert session.token_ids == twin.token_ids
            assert close(session.next_logits(), twin.next_logits())
            found, pending = [], twin.token_ids[-1]
            for one in (twin, session):
                played = Played()
                record_into(played, one, look=False)
                one.decode([50, 51, 52], max_new_tokens=1)
                found.append(played)
    prompts_seen = [detector.events[0][1] for detector in built]
    assert prompts_seen == [(pending, 50, 51, 52)] * 2
    for (budget, seen), (twin_budget, expected) in zip(
        found[1].evidences, found[0].evidences, strict=True
    ):
        assert budget == twin_budget
        _compare(seen, expected)


@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])
@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_a_prefill_that_was_cancelled_goes_on_as_if_it_had_not_been(
    slow_step: Literal["observe", "rectify", "verify"], chunks: int
) -> None:
    """The ids that are left are still a prompt: detectors read them, and evidence comes from
    their last queries."""
    engine = tiny_engine("qwen2", 16)
    with watching_detectors() as built:
        config = RECTIFY.replace(slow_step=slow_step, boundaries=[{"name": "watching"}])
        with engine.session(config) as session:
            asked = iter([False] * chunks)
            session._cancelled.is_set = lambda: next(asked, True)  # type: ignore[method-assign]
            assert session.decode(PROMPT, max_new_tokens=5) == []
            del session._cancelled.is_set
            assert session.token_ids == PROMPT
            processed = session.stats.history_tokens
            assert bool(processed) == bool(chunks) and processed < len(PROMPT)
            played = Played()
            record_into(played, session, look=False)
            session.decode([], max_new_tokens=1)
    left = PROMPT[processed:]
    assert built[0].events[0][1] == tuple(left)
    group = 2
    queries = min(config.refresh.prefill_evidence_queries, len(left))
    assert {evidence.logits.shape[2] for _, evidence in played.evidences} == {queries * group}
