"""Each metric against plain arithmetic on what the model itself computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfi_agent import InputError, Selection, SessionConfig, UnsupportedModelError
from sfi_agent.engine.instruments import FastAttention, Instruments
from sfi_agent.evaluation.fidelity import (
    AttentionProbe,
    AttentionSample,
    LogitComparison,
    LogitReference,
    Spread,
    attention_sample,
    kl_nats,
    summarize_layers,
)
from sfi_agent.evaluation.fidelity.spread import nearest_rank
from sfi_agent.observe.trace import SlowStepKind
from tests.families import FULL_ATTENTION, Family, build_model, tiny_engine

PROMPT_TOKENS, FOLLOWED_TOKENS = 60, 24
FAMILIES = [family.name for family in FULL_ATTENTION if family.name in ("llama", "gemma", "qwen3")]
SMALL: Any = {
    "memory": {"sink_tokens": 2, "selected_tokens": 6, "recent_tokens": 5},
    "boundaries": [{"name": "interval", "every_tokens": 7}],
    "refresh": {"min_segment_tokens": 1, "max_segment_tokens": 9},
}


def ids_of(seed: int, tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 101, (tokens,), generator=generator).tolist()


# ---------------------------------------------------------------- distributions


def test_kl_equals_a_hand_computation() -> None:
    dense, policy = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    expected = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5)
    # Logits are log-probabilities up to a constant.
    given_logits = [torch.tensor([math.log(x) for x in p]) for p in (dense, policy)]
    assert kl_nats(given_logits[0] + 3, given_logits[1] - 2) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(0.25 * math.log(2))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=12))
def test_kl_is_that_of_plain_arithmetic_and_never_negative(
    pairs: list[tuple[float, float]],
) -> None:
    dense, policy = ([math.exp(pair[side]) for pair in pairs] for side in (0, 1))
    p, q = ([value / math.fsum(given) for value in given] for given in (dense, policy))
    expected = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    rows = torch.tensor(pairs, dtype=torch.float64).T
    found = kl_nats(rows[0], rows[1])
    assert found >= 0
    assert found == pytest.approx(max(0.0, expected), rel=1e-9, abs=1e-12)


def test_a_token_impossible_for_dense_has_no_weight() -> None:
    dense = torch.tensor([0.0, 0.0, float("-inf")])
    assert kl_nats(dense, torch.tensor([1.0, 1.0, float("-inf")])) == 0
    assert kl_nats(dense, torch.tensor([1.0, 1.0, 1.0])) == pytest.approx(math.log(3 / 2))


def test_comparison_by_position() -> None:
    reference = LogitReference()
    reference(7, torch.tensor([1.0, 2.0, 0.0]))
    reference(8, torch.tensor([1.0, 2.0, 0.0]))
    comparison = LogitComparison(reference)
    comparison(7, torch.tensor([1.0, 2.0, 0.0]))
    comparison(8, torch.tensor([3.0, 2.0, 0.0]))
    assert comparison.steps[7].agrees and comparison.steps[7].kl_nats == 0
    assert not comparison.steps[8].agrees and comparison.steps[8].kl_nats > 0
    weights = [math.exp(value) for value in (3.0, 2.0, 0.0)]
    shares = [weight / sum(weights) for weight in weights]
    expected = -sum(share * math.log(share) for share in shares)
    assert comparison.steps[8].entropy_nats == pytest.approx(expected)


def test_the_reference_keeps_its_own_copy() -> None:
    reference, logits = LogitReference(), torch.tensor([1.0, 2.0])
    reference(0, logits)
    logits.zero_()
    assert reference[0].tolist() == [1.0, 2.0]


def test_logits_that_are_not_numbers_are_an_error() -> None:
    bad = torch.tensor([1.0, float("nan")])
    with pytest.raises(UnsupportedModelError, match="position 3.*not numbers"):
        LogitReference()(3, bad)
    reference = LogitReference()
    reference(4, torch.tensor([1.0, 2.0]))
    with pytest.raises(UnsupportedModelError, match="position 4"):
        LogitComparison(reference)(4, bad)


# ---------------------------------------------------------------- attention


class Watched:
    """Samples of a run, with what a reference needs: visible positions by layer and KV head."""

    def __init__(self, sink_tokens: int, recent_tokens: int) -> None:
        self.samples: list[AttentionSample] = []
        self.references: list[tuple[list[float], float]] = []
        self.visible: list[list[set[int]]] = []
        self._sink_tokens, self._recent_tokens = sink_tokens, recent_tokens
        self._selections: list[Selection | None] = []
        self._history_tokens = 0

    def refreshed(self, history_tokens: int, selections: list[Selection | None]) -> None:
        self._history_tokens, self._selections = history_tokens, selections

    def attended(self, attention: FastAttention) -> None:
        self.samples.append(attention_sample(attention))
        keys, values = attention.all_keys_values()
        tokens = keys.shape[1]
        assert tokens == attention.position + 1
        sets = [self._seen(attention.layer, head, tokens) for head in range(keys.shape[0])]
        self.visible.append(sets)
        self.references.append(plain_reference(attention, keys, values, sets))

    def _seen(self, layer: int, head: int, tokens: int) -> set[int]:
        recent = range(max(0, self._history_tokens - self._recent_tokens), tokens)
        selection = self._selections[layer]
        assert selection is not None
        count = int(selection.counts[0, head])
        chosen = selection.positions[0, head, :count].tolist()
        return {*range(self._sink_tokens), *recent, *chosen}


def plain_reference(
    attention: FastAttention, keys: Tensor, values: Tensor, sets: list[set[int]]
) -> tuple[list[float], float]:
    """Recall per query head and output error, by a loop over heads in float64."""
    query = attention.query.double()
    group = query.shape[0] // keys.shape[0]
    recall, dense_rows, fast_rows = [], [], []
    for head in range(query.shape[0]):
        kv_head = head // group
        logits = keys[kv_head].double() @ query[head, 0] * attention.scale
        weights = logits.softmax(0)
        seen = torch.tensor(sorted(sets[kv_head]))
        recall.append(float(weights[seen].sum()))
        dense_rows.append(weights @ values[kv_head].double())
        fast_rows.append(logits[seen].softmax(0) @ values[kv_head].double()[seen])
    dense, fast = torch.stack(dense_rows), torch.stack(fast_rows)
    return recall, float((fast - dense).norm() / dense.norm())


def watched_run(
    name: str, slow_step: SlowStepKind, selector: str, **options: Any
) -> tuple[Watched, list[int]]:
    config = SessionConfig(
        slow_step=slow_step,
        selector={"name": selector, **options},
        **SMALL,
    )
    ids = ids_of(3, PROMPT_TOKENS + FOLLOWED_TOKENS)
    watched = Watched(config.memory.sink_tokens, config.memory.recent_tokens)
    with tiny_engine(name).session(config) as session:
        session.decode(ids[:PROMPT_TOKENS], max_new_tokens=0)
        session.attach(
            Instruments(on_refresh=watched.refreshed, on_fast_attention=watched.attended)
        )
        session.follow(ids[PROMPT_TOKENS:])
    assert len(watched.samples) > FOLLOWED_TOKENS / 2
    return watched, ids


@pytest.mark.parametrize("slow_step", ["observe", "rectify"])
@pytest.mark.parametrize("name", FAMILIES)
def test_recall_and_error_equal_a_plain_reference(name: str, slow_step: SlowStepKind) -> None:
    watched, _ = watched_run(name, slow_step, "per_head")
    for sample, (recall, error) in zip(watched.samples, watched.references, strict=True):
        assert sample.recall == pytest.approx(recall, abs=1e-5)
        assert sample.output_error == pytest.approx(error, rel=1e-3, abs=1e-5)
    mean = torch.tensor([sample.recall for sample in watched.samples]).mean()
    assert 0.05 < float(mean) < 0.999, "the case leaves something out, and not everything"


def test_ragged_selections_are_seen_per_head() -> None:
    watched, _ = watched_run("llama", "observe", "cumulative_mass", mass=0.6)
    sizes = {len(seen) for sets in watched.visible for seen in sets}
    assert len(sizes) > 3
    for sample, (recall, _) in zip(watched.samples, watched.references, strict=True):
        assert sample.recall == pytest.approx(recall, abs=1e-5)


def test_recall_of_the_first_layer_is_that_of_the_models_own_attention_weights() -> None:
    """Keys of layer 0 depend on their token alone, so a dense run of transformers has the same."""
    watched, ids = watched_run("llama", "observe", "per_head")
    family = next(item for item in FULL_ATTENTION if item.name == "llama")
    weights = eager_attention_weights(family, ids)
    group = weights.shape[0] // len(watched.visible[0])
    checked = 0
    for sample, sets in zip(watched.samples, watched.visible, strict=True):
        if sample.layer:
            continue
        row = weights[:, sample.position]
        for head, recall in enumerate(sample.recall):
            expected = float(row[head, sorted(sets[head // group])].sum())
            assert recall == pytest.approx(expected, abs=1e-5)
            checked += 1
    assert checked > FOLLOWED_TOKENS


def eager_attention_weights(family: Family, ids: list[int]) -> Tensor:
    """`[query_heads, tokens, tokens]` of layer 0, as transformers computes them."""
    model = build_model(family, attn_implementation="eager")
    with torch.no_grad():
        result = model(torch.tensor([ids]), output_attentions=True, use_cache=False)
    return result.attentions[0][0]  # type: ignore[no-any-return]


def test_a_memory_that_holds_everything_recalls_everything() -> None:
    config = SessionConfig(
        selector={"name": "top_k"},
        memory={"sink_tokens": 2, "selected_tokens": 200, "recent_tokens": 5},
    )
    probe = AttentionProbe()
    ids = ids_of(5, 90)
    with tiny_engine("qwen3").session(config) as session:
        session.decode(ids[:60], max_new_tokens=0)
        session.attach(Instruments(on_fast_attention=probe))
        session.follow(ids[60:])
    samples = probe.samples()
    assert samples
    for sample in samples:
        assert sample.recall == pytest.approx([1.0] * 4, abs=1e-5)
        assert max(sample.recall) <= 1.0
        assert sample.output_error < 1e-5


def probed_positions(every_steps: int, discarded: tuple[int, ...] = ()) -> set[int]:
    probe = AttentionProbe(every_steps, first_position=40)
    ids = ids_of(6, 70)
    with tiny_engine("llama").session(SessionConfig(**SMALL)) as session:
        session.decode(ids[:40], max_new_tokens=0)
        session.attach(Instruments(on_fast_attention=probe))
        session.follow(ids[40:])
    return {sample.position for sample in probe.samples(discarded)}


def test_the_probe_takes_every_nth_position_and_leaves_discarded_ones_out() -> None:
    every = probed_positions(1)
    third = probed_positions(3)
    assert third == {position for position in every if (position - 40) % 3 == 0}
    assert 0 < len(third) < len(every)
    gone = tuple(sorted(every))[:2]
    assert probed_positions(1, gone) == every - set(gone)


@pytest.mark.parametrize("every_steps", [0, -1])
def test_a_probe_every_zero_steps_is_refused(every_steps: int) -> None:
    with pytest.raises(InputError, match="allowed: 1 or more"):
        AttentionProbe(every_steps)


def test_layers_are_summarized_over_steps_and_heads() -> None:
    layers = summarize_layers(
        [
            AttentionSample(1, 5, (1.0, 0.5), 0.25),
            AttentionSample(1, 6, (0.5, 0.0), 0.75),
        ],
        num_layers=2,
    )
    assert [layer.layer for layer in layers] == [0, 1]
    assert layers[0].recall_mean is None and layers[0].lost_mass == 0 and layers[0].steps == 0
    assert layers[1].recall_mean == 0.5 and layers[1].lost_mass == 0.5 and layers[1].steps == 2
    assert layers[1].head_recall == (0.75, 0.25)
    assert layers[1].recall_p1 == 0.0
    assert (layers[1].output_error_mean, layers[1].output_error_p99) == (0.5, 0.75)


# ---------------------------------------------------------------- spreads


def numbers() -> Iterator[float]:
    yield from (float(index) for index in range(200))


def test_a_spread_by_nearest_rank() -> None:
    assert Spread.of(list(numbers())) == Spread(99.5, 99.0, 197.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0.01, 1))
def test_a_nearest_rank_is_a_member_that_enough_values_reach(
    values: list[float], share: float
) -> None:
    found = nearest_rank(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values)
