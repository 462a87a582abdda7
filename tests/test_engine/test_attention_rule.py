"""Soft-caps and sinks: tiles against the formula, and every way that attention is computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor

from sfi_agent.engine import attention_rule, sdpa
from sfi_agent.engine.attention_rule import AttentionRule, tiled_attention
from sfi_agent.engine.cpu_rows import row_kernels
from sfi_agent.engine.history import LayerHistory, Piece
from sfi_agent.engine.kernels import EvidenceBuffers, merge_parts
from sfi_agent.engine.memory import LayerMemory, MemoryLayout
from sfi_agent.engine.programs.sinks import evidence_with_sinks, sink_part
from sfi_agent.engine.refresh import layer_evidence
from sfi_agent.engine.sdpa import attend_history, attend_passing, attend_rows
from sfi_agent.engine.sequence import LayerState

SINKS = torch.tensor([9.0, 2.0, 11.0, 7.5])
RULES = {
    "softcap": AttentionRule(0.3, 2.0),
    "sinks": AttentionRule(0.3, sinks=SINKS),
    "both": AttentionRule(0.3, 2.0, SINKS),
}


def by_the_book(
    query: Tensor, keys: Tensor, rule: AttentionRule, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of tokens and log-sum-exps with sinks, in float64, all heads apart."""
    logits = query.double() @ keys.double().mT * rule.scale
    if rule.softcap:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.double()[:, None, None].expand(-1, logits.shape[1], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    return logits.softmax(-1)[..., : keys.shape[1]], logits.logsumexp(-1)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("tile", [3, 4096])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    more=st.integers(0, 20),
    softcap=st.sampled_from([0.0, 0.05, 2.0, 500.0]),
    view=st.sampled_from(["everything", "causal", "window"]),
)
def test_tiles_are_the_formula(
    tile: int, seed: int, rows: int, more: int, softcap: float, view: str
) -> None:
    tokens = rows if view == "causal" else rows + more
    query, keys = drawn(seed, 2, rows, 8), 3.0 * drawn(seed + 1, 2, tokens, 8)
    values, rule = drawn(seed + 2, 2, tokens, 5), AttentionRule(0.7, softcap)
    row, column = torch.arange(rows)[:, None] + tokens - rows, torch.arange(tokens)
    visible = {
        "everything": torch.ones(rows, tokens, dtype=torch.bool),
        "causal": column <= row,
        "window": (column <= row) & (column > row - 3),
    }[view]
    mask = visible if view == "window" else None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention_rule, "_TILE_TOKENS", tile)
        out, lse = tiled_attention(query, keys, values, rule, causal=view == "causal", visible=mask)
    weights, expected_lse = by_the_book(query, keys, rule, visible)
    torch.testing.assert_close(out.double(), weights @ values.double(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [40, 700])
@pytest.mark.parametrize("name", RULES)
def test_every_way_to_a_history_follows_the_rule(
    name: str, tokens: int, dtype: torch.dtype
) -> None:
    """Whole, in pieces, streamed in any order, and by the compiled rows of a CPU."""
    rule, query = RULES[name], drawn(1, 4, 1, 64, dtype=dtype)
    keys, values = drawn(2, 2, tokens, 64, dtype=dtype), drawn(3, 2, tokens, 64, dtype=dtype)
    cuts = (0, tokens // 3, tokens - 1, tokens)
    pieces = [Piece(a, keys[:, a:b], values[:, a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    weights, _ = by_the_book(query, keys.repeat_interleave(2, 0), rule, torch.tensor(True))
    expected = weights @ values.repeat_interleave(2, 0).double()
    plain = attend_rows(query, keys, values, AttentionRule(0.3))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    whole = [Piece(0, keys, values)]
    for out in (
        attend_rows(query, keys, values, rule),
        attend_history(query, whole, rule),
        attend_history(query, whole, rule, compiled_rows=True),
        attend_history(query, pieces, rule),
        attend_passing(query, reversed(pieces[:-1]), pieces[-1], rule),
    ):
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(out.float(), plain.float(), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_memory_and_its_selected_mass_follow_the_rule(name: str, ragged: bool) -> None:
    rule, query = RULES[name], 3.0 * drawn(1, 4, 1, 16)
    layout, history = MemoryLayout(1, 6, 3, torch.device("cpu")), LayerHistory()
    history.append(drawn(2, 2, 30, 16), drawn(3, 2, 30, 16))
    plan = layout.plan(30)
    layout.begin_segment(plan, 2)
    memory = LayerMemory(layout)
    counts = torch.tensor([6, 2 if ragged else 6])
    memory.refresh(history, plan, torch.arange(5, 11).expand(2, -1), counts)
    memory.common_start = None if ragged else 0
    memory.append(drawn(4, 2, 1, 16), drawn(5, 2, 1, 16))
    keys, values = (part.repeat_interleave(2, 0) for part in (memory.keys, memory.values))
    visible = memory.visible().repeat_interleave(2, 0)[:, None]
    weights, _ = by_the_book(query, keys, rule, visible)
    out = memory.attend(query, rule)
    torch.testing.assert_close(out.double(), weights @ values.double(), rtol=1e-5, atol=1e-5)
    mass = weights[..., : layout.selected_capacity].sum(-1).mean()
    torch.testing.assert_close(memory.selected_mass(query, rule).double(), mass, rtol=1e-5, atol=0)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_evidence_follows_the_rule(name: str, queries: int) -> None:
    """Logits are under the cap; what sinks take is mass outside the candidates."""
    rule, query, history = RULES[name], 3.0 * drawn(1, 4, queries, 16), LayerHistory()
    history.append(drawn(2, 2, 30, 16), drawn(3, 2, 30, 16))
    layout = MemoryLayout(2, 8, 5, torch.device("cpu"))
    layer = LayerState(history, None, LayerMemory(layout), query, rule)
    evidence = layer_evidence(layer, layout.plan(30), with_norms=False)
    keys = history.joined(0, 30).keys.repeat_interleave(2, 0)
    row = torch.arange(30 - queries, 30)[:, None]
    weights, lse = by_the_book(query, keys, rule, torch.arange(30) <= row)
    by_row = weights.view(2, 2, queries, 30).transpose(1, 2).flatten(1, 2)
    rest = 1.0 - by_row[..., 2:25].sum(-1)
    torch.testing.assert_close(evidence.rest_mass[0].double(), rest, rtol=1e-5, atol=1e-6)
    totals = lse.view(2, 2, queries).transpose(1, 2).flatten(1, 2)[..., None]
    found = (evidence.logits[0].double() - totals).exp()
    torch.testing.assert_close(found, by_row[..., 2:25], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", [1, 2])
def test_sinks_behind_the_step_kernels(asked: int) -> None:
    """As a part without a value, and in the mass outside the candidates."""
    batch, queries, heads, tokens = 3, 2, 4, 9
    logits = 4.0 * drawn(1, batch, heads, queries, tokens)
    values, rule = drawn(2, batch, heads, tokens, 5), RULES["sinks"]
    lse = logits.logsumexp(-1)
    out = (logits.softmax(-1) @ values).transpose(1, 2)
    sinks = SINKS[:, None, None].expand(batch, -1, queries, 1)
    weights = torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :tokens]
    merged = merge_parts([(out, lse), *sink_part(rule, out, lse)])
    torch.testing.assert_close(merged, (weights @ values).transpose(1, 2))
    rest = logits.softmax(-1)[..., :3].sum(-1)[..., -asked:]

    def by_row(numbers: Tensor) -> Tensor:
        return numbers.view(batch, 2, 2, asked).transpose(2, 3).flatten(2, 3)

    buffers = EvidenceBuffers(torch.empty(0), by_row(rest).clone(), 0, 0, asked)
    total = evidence_with_sinks(rule, buffers, lse)
    torch.testing.assert_close(total, torch.cat([logits, sinks], dim=-1).logsumexp(-1))
    expected = 1.0 - weights[..., 3:].sum(-1)[..., -asked:]
    torch.testing.assert_close(buffers.rest_mass, by_row(expected))
    assert sink_part(RULES["softcap"], out, lse) == []
    assert evidence_with_sinks(RULES["softcap"], buffers, lse) is lse


@pytest.mark.parametrize(("name", "said"), [("softcap", "a soft-cap"), ("sinks", "compiled rows")])
def test_what_is_not_used_is_told_once(name: str, said: str) -> None:
    """The fast path of plain rows is left for a reason that is in the log."""
    attention_rule._tell.cache_clear()
    sdpa._tell_sinks.cache_clear()
    keys = drawn(2, 2, 700, 64, dtype=torch.bfloat16)
    if row_kernels(drawn(1, 2, 2, 64, dtype=torch.bfloat16), keys, keys) is None:
        pytest.skip("no C compiler on this machine")
    float_keys = keys if name == "sinks" else keys.float()
    with capture_logs() as logs:
        for _ in range(2):
            query = drawn(1, 4, 1, 64, dtype=float_keys.dtype)
            attend_rows(query, float_keys, float_keys, RULES[name])
    reasons = [entry["reason"] for entry in logs if entry["event"] == "attention_kernel_chosen"]
    assert sum(said in reason for reason in reasons) == 1
