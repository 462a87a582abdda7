"""Guarantee 2 (observe equals a replay) and 4 (nothing visible disappears within a segment)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfi_agent import Engine, Evidence, SessionConfig
from sfi_agent.engine.sampling import Sampler
from tests.families import FULL_ATTENTION, tiny_engine
from tests.reference import ReferenceRun, Refresh, VisibilityRules, dense_logits
from tests.test_guarantees.play import Played, close, play, replay, rules_of
from tests.test_guarantees.policies import (
    FAMILY_NAMES,
    chunk_sizes,
    for_each,
    sparse_policies,
    turns_of_ids,
)

NEW_TOKENS = 9


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_session_equals_a_plain_forward_with_the_same_steps(family: str) -> None:
    @for_each(family, 5, config=sparse_policies(), turns=turns_of_ids, chunk=chunk_sizes)
    def check(config: SessionConfig, turns: list[list[int]], chunk: int | None) -> None:
        engine = tiny_engine(family, chunk)
        played = play(engine, config, turns, new_tokens=NEW_TOKENS, look=True)
        check_replay(engine, config, played, turns)


def check_replay(
    engine: Engine, config: SessionConfig, played: Played, turns: list[list[int]]
) -> None:
    """Everything a session computed, against the plain forward with the same steps."""
    run, masks = replay(engine, config, played)
    check_logits(played, run)
    check_draws(config, played)
    check_visibility(played, masks)
    check_evidence(config, played, run, rules_of(engine, config), turns)


def check_logits(played: Played, run: ReferenceRun) -> None:
    """Every step that counted computed what the reference computes for its row."""
    for row, logits in played.row_logits.items():
        assert close(logits, run.logits[row]), f"row {row}"
    assert close(played.next_logits, run.logits[-1])


def check_draws(config: SessionConfig, played: Played) -> None:
    """Every token was drawn from the logits of the step before it, with the noise of its place."""
    sampling = config.sampling
    sampler = Sampler(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)
    for record in played.trace:
        logits = played.row_logits[record.position - 1]
        assert int(sampler.choose(logits, record.position)) == record.token_id


def check_visibility(played: Played, masks: list[Tensor]) -> None:
    """The memory held exactly what the rules say, and within a segment it only grew."""
    for row, layers in played.seen.items():
        before = played.seen.get(row - 1)
        for index, heads in enumerate(layers):
            if heads is None:
                continue
            for head, positions in enumerate(heads):
                assert positions == set(masks[index][head, row].nonzero().flatten().tolist())
                if before is not None:
                    assert positions == before[index][head] | {row}  # type: ignore[index]


def check_evidence(
    config: SessionConfig,
    played: Played,
    run: ReferenceRun,
    rules: VisibilityRules,
    turns: list[list[int]],
) -> None:
    """What selectors saw is what the queries and keys of the reference say."""
    seen = iter(played.evidences)
    counts = _query_counts(config, played, turns)
    for refresh, queries in zip(played.refreshes, counts, strict=True):
        candidates = refresh.tokens - rules.recent_tokens - rules.sink_tokens
        budget = min(config.memory.selected_tokens, candidates)
        for index, selection in enumerate(refresh.selections):
            sparse = rules.windows[index] is None and index not in rules.dense_layers
            assert (selection is not None) == (sparse and budget > 0)
            if selection is not None:
                got_budget, evidence = next(seen)
                assert got_budget == budget
                _compare(evidence, _expected(run, rules, refresh, index, queries))
    assert next(seen, None) is None


def _query_counts(config: SessionConfig, played: Played, turns: list[list[int]]) -> list[int]:
    """Evidence queries of each refresh: one on slow steps, several after a prefill."""
    pending = iter([len(turns[0]), *(len(turn) + 1 for turn in turns[1:])])
    wanted = config.refresh.prefill_evidence_queries
    return [
        min(wanted, next(pending)) if record.reason == "prefill" else 1
        for record in played.trace
        if record.kind != "fast"
    ]


def _mass(by_query: Tensor, sinks: Tensor | None) -> Tensor:
    """Of tokens, `[kv_heads, queries x group, tokens]`."""
    if sinks is None:
        return by_query.softmax(-1)
    heads, rows, tokens = by_query.shape
    own = (
        sinks.view(heads, 1, -1).expand(-1, rows * heads // len(sinks), -1).reshape(heads, rows, 1)
    )
    return torch.cat([by_query, own], dim=-1).softmax(-1)[..., :tokens]


def _expected(
    run: ReferenceRun, rules: VisibilityRules, refresh: Refresh, layer: int, queries: int
) -> Evidence:
    tokens, keys = refresh.tokens, run.keys[layer][:, : refresh.tokens]
    rows = run.queries[layer][:, tokens - queries : tokens]
    group = rows.shape[0] // rules.kv_heads
    logits = torch.einsum("hqd,hkd->hqk", rows, keys.repeat_interleave(group, 0))
    future = torch.arange(tokens)[None] > torch.arange(tokens - queries, tokens)[:, None]
    logits = logits * run.scales[layer]
    if softcap := run.softcaps[layer]:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(future, float("-inf"))
    by_query = logits.reshape(rules.kv_heads, group, queries, tokens).transpose(1, 2)
    by_query = by_query.reshape(rules.kv_heads, queries * group, tokens)
    chosen = slice(rules.sink_tokens, tokens - rules.recent_tokens)
    return Evidence(
        logits=by_query[..., chosen][None],
        key_norms=keys[:, chosen].norm(dim=-1)[None],
        rest_mass=1.0 - _mass(by_query, run.sinks[layer])[..., chosen].sum(-1)[None],
        candidate_start=rules.sink_tokens,
    )


def _compare(got: Evidence, expected: Evidence) -> None:
    assert got.candidate_start == expected.candidate_start
    assert got.logits.dtype == got.rest_mass.dtype == torch.float32
    for name in ("logits", "rest_mass", "key_norms"):
        tensor = getattr(got, name)
        if tensor is not None:
            wanted = getattr(expected, name)
            torch.testing.assert_close(tensor.cpu(), wanted, rtol=1e-3, atol=1e-3)


def test_the_examples_meet_what_they_are_meant_to_meet() -> None:
    """Retries, deferred boundaries of text detectors and ragged counts do occur."""
    config = SessionConfig(
        boundaries=[{"name": "structure"}],
        selector={"name": "cumulative_mass", "mass": 0.5},
        memory={"sink_tokens": 1, "selected_tokens": 40, "recent_tokens": 4},
        refresh={"min_segment_tokens": 2, "max_segment_tokens": 12},
        sampling={"temperature": 1.5},
    )
    uncertain = config.replace(boundaries=[{"name": "entropy", "threshold_sigmas": 1.5}])
    kinds, reasons, counts = set(), set(), []
    sentences = config.replace(boundaries=[{"name": "punctuation"}])
    for policy in (config, sentences, uncertain):
        played = play(tiny_engine("qwen3"), policy, [list(range(5, 60))], new_tokens=80)
        kinds |= {record.kind for record in played.trace}
        reasons |= {record.reason.split(":")[0] for record in played.trace}
        counts += [s.counts for r in played.refreshes for s in r.selections if s is not None]
    assert kinds == {"fast", "slow", "retry"}
    assert {"prefill", "max_segment", "punctuation", "structure", "entropy"} <= reasons
    assert any(len(set(count.flatten().tolist())) > 1 for count in counts)


def test_fast_steps_of_every_family_differ_from_dense_ones() -> None:
    """Else equality with the reference would say little: attention could be flat."""
    config = SessionConfig(
        boundaries=[{"name": "never"}],
        selector={"name": "window"},
        memory={"sink_tokens": 1, "selected_tokens": 0, "recent_tokens": 4},
    )
    for family in FULL_ATTENTION:
        engine = tiny_engine(family.name)
        played = play(engine, config, [list(range(40))], new_tokens=3)
        row = next(record.position - 1 for record in played.trace if record.kind == "fast")
        dense = dense_logits(engine.model, played.ids)[row]
        assert not close(played.row_logits[row], dense, tolerance=0.02), family.name
