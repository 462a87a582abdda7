"""A decoding step on a CPU allocates nothing that grows with the history."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sfi_agent import build_selector
from sfi_agent.engine import refresh
from sfi_agent.engine.memory import MemoryLayout
from sfi_agent.engine.refresh import refresh_memory
from sfi_agent.engine.runner import Runner
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.engine.switch import AttentionSwitch
from tests.families import tiny_engine

SHORT, LONG = 8_000, 32_000


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that are short beside both histories, so that only what is not cut in pieces grows."""
    import sfi_selectors._evidence as scores

    monkeypatch.setattr(scores, "PIECE_NUMBERS", 1 << 12)
    monkeypatch.setattr(refresh, "_SUM_CHUNK_NUMBERS", 1 << 12)
    monkeypatch.setitem(refresh._EVIDENCE_CHUNK_TOKENS, "cpu", 256)


def largest_allocation(step: Callable[[], object]) -> int:
    """Bytes that the most demanding operation of a step kept or returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    return max(int(event.self_cpu_memory_usage) for event in seen.events() or [])


def allocations(selector: str, dtype: torch.dtype, tokens: int) -> dict[str, int]:
    engine = tiny_engine("qwen3")
    model = copy.deepcopy(engine.model)
    torch.nn.Module.to(model, dtype)
    runner = Runner(model, engine.shape)
    layout = MemoryLayout(4, 64, 32, engine.shape.device)
    sequence = SequenceState(engine.shape.windows, layout, frozenset(), tokens + 64)
    config = model.config
    for layer in sequence.layers:
        size = (config.num_key_value_heads, tokens, config.head_dim)
        keys = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
        layer.history.append(keys, keys)
    sequence.processed_tokens = tokens
    chooser = build_selector({"name": selector})

    def slow() -> None:
        runner.dense(sequence, [7], evidence_rows=1)
        refresh_memory(sequence, chooser, segment_capacity=32)

    def fast() -> None:
        int(runner.fast(sequence, 7).logits.argmax())

    with AttentionSwitch.of(model).switched_on(model), torch.no_grad():
        slow()
        sequence.flush_segment()
        found = {
            "dense": largest_allocation(lambda: runner.dense(sequence, [7])),
            "slow": largest_allocation(slow),
            "fast": largest_allocation(fast),
        }
        fast()
        found["flush"] = largest_allocation(sequence.flush_segment)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selector", ["per_head", "question"])
def test_four_times_the_history_allocates_no_more(selector: str, dtype: torch.dtype) -> None:
    short = allocations(selector, dtype, SHORT)
    long = allocations(selector, dtype, LONG)
    for step, bytes_ in long.items():
        assert bytes_ <= 1.05 * short[step], step
        assert bytes_ < LONG * 4, step


def test_evidence_room_is_kept_and_grows_like_the_history() -> None:
    layout = MemoryLayout(4, 64, 32, torch.device("cpu"))
    first = layout.evidence_logits(2, 4, 1000)
    assert first.shape == (2, 4, 1000) and first.dtype == torch.float32
    again = layout.evidence_logits(2, 4, 1100)
    assert again.data_ptr() == first.data_ptr()
    room = layout.evidence_scratch.numel()
    assert layout.evidence_logits(2, 4, 1200).shape == (2, 4, 1200)
    assert room < layout.evidence_scratch.numel() < 2 * room
