"""Histories in host memory on a CUDA device: equal sessions, no races, more tokens than memory.

Run with `python -m pytest -m gpu`. The times are printed; `sfi-agent bench decode --history-device
cpu` measures them on a model of a real size.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from sfi_agent import Engine, OutOfDeviceMemoryError, Session, SessionConfig
from sfi_agent.engine.history import LayerHistory
from sfi_agent.engine.history_stream import HistoryStream
from sfi_agent.engine.host_access import HostAccess
from sfi_agent.engine.host_gather import HostGather
from sfi_agent.engine.host_history import HostStore
from sfi_agent.evaluation.decode_benchmark.clock import BusProbe
from sfi_agent.observe.trace import SlowStepKind
from tests.families import FAMILIES, VOCABULARY, build_model, word_tokenizer
from tests.test_engine.host_cases import contents, on_host, sequence_of
from tests.test_engine.program_cases import (
    Told,
    agree,
    counted_requests,
    records_of,
    tell,
    told,
)
from tests.test_engine.test_programs_gpu import (
    HELD,
    PROMPT,
    SEGMENTS,
    all_captured,
    decoding,
    eager_engine,
    model_on_device,
)
from tests.test_guarantees.play import close

DEVICE = torch.device("cuda", 0)
MEBIBYTE = 1 << 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
over_slow_steps = pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])


def access(device: torch.device, *, by_device: bool = True, room_bytes: int = 30_000) -> HostAccess:
    """Small rooms and chunks, so that pieces end anywhere."""
    return HostAccess(
        HostStore(device, largest_chunk_bytes=1 << 14),
        HistoryStream(device, room_bytes=room_bytes),
        HostGather(device, by_device=by_device),
    )


@lru_cache
def host_engine(name: str, by_device: bool = True) -> Engine:
    """A captured engine of a family whose histories may be in host memory."""
    engine = Engine(model_on_device(name, torch.float32), word_tokenizer())
    engine.runner.host = access(engine.shape.device, by_device=by_device)
    return engine


# ---------------------------------------------------------------- sessions


@over_slow_steps
@pytest.mark.parametrize("by_device", [True, False])
def test_sessions_equal_ordinary_ones(slow_step: SlowStepKind, by_device: bool) -> None:
    """Fast steps are captured, the others eager; it is the same who gathers."""
    config, whole = SEGMENTS.replace(slow_step=slow_step), 0
    for family in HELD:
        engine = host_engine(family, by_device)
        expected = tell(eager_engine(family), config, decoding(150), logits=True)
        with capture_logs() as logs, counted_requests() as counts:
            got = tell(engine, on_host(config), decoding(150), logits=False)
        whole += agree(expected, got, config)
        assert len(got.records) == 150 and set(counts) == {"FastStep"}
        assert counts["FastStep"] > 80 and all_captured(engine)
        events = {entry["event"] for entry in logs}
        assert "pinned_memory_missing" not in events
        assert not (by_device and "history_gathered_on_host" in events)
    assert whole >= 2, "rounding decided too often"


def test_the_device_gathers_where_it_can() -> None:
    engine = Engine(model_on_device("qwen3", torch.float32), word_tokenizer())
    with capture_logs() as logs, engine.session(on_host(SEGMENTS)) as session:
        session.decode(PROMPT, max_new_tokens=20)
        for layer in sequence_of(session).layers:
            for extent in layer.history.extents:
                assert extent.buffer.keys.is_pinned() and extent.buffer.values.is_pinned()
    assert not [entry for entry in logs if entry["event"] == "history_gathered_on_host"]


@over_slow_steps
def test_forks_rewinds_and_a_mixed_batch_equal_ordinary_sessions(slow_step: SlowStepKind) -> None:
    config = SEGMENTS.replace(slow_step=slow_step)

    def act(engine: Engine, places: list[bool], *, batch: bool) -> list[Any]:
        configs = [on_host(config) if place else config for place in places]
        with ExitStack() as stack:
            parent = stack.enter_context(engine.session(configs[0]))
            parent.decode(PROMPT, max_new_tokens=20)
            sessions = [parent]
            sessions += [stack.enter_context(parent.fork(one)) for one in configs[1:]]
            parent.rewind(parent.mark(50))
            found = [told(session, logits=not batch, refreshes=True) for session in sessions]
            turns = [[7], [8, 9], [], [3]]
            if batch:
                engine.decode_batch(sessions, turns, max_new_tokens=60)
            else:
                for session, turn in zip(sessions, turns, strict=True):
                    session.decode(turn, max_new_tokens=60)
            for one, session in zip(found, sessions, strict=True):
                one.records = records_of(session)
            return [(one, contents(s)) for one, s in zip(found, sessions, strict=True)]

    whole = 0
    for family in HELD:
        expected = act(eager_engine(family), [False] * 4, batch=False)
        for places in ([True, True, False, True], [False, True, True, False]):
            got = act(host_engine(family), places, batch=True)
            for (one, kept), (other, found) in zip(expected, got, strict=True):
                if agree(one, other, config):
                    whole += 1
                    assert all(map(close, found, kept))
    assert whole >= 18, "rounding decided too often"


# ---------------------------------------------------------------- copies and waits


def test_copies_wait_for_the_computation_and_the_computation_for_copies() -> None:
    """The device is kept busy, so that whoever does not wait reads or writes too early."""
    busy = 30_000_000
    store = HostStore(DEVICE, largest_chunk_bytes=4 * MEBIBYTE)
    stream = HistoryStream(DEVICE, room_bytes=3 * MEBIBYTE + 500)
    layers = [LayerHistory(store=store) for _ in range(3)]
    expected: list[list[Tensor]] = [[] for _ in layers]
    generator = torch.Generator(DEVICE).manual_seed(1)
    for size in (3000, 1, 1, 2500, 1, 700):
        with stream.reading(layers):
            for layer, kept in zip(layers, expected, strict=True):
                past = layer.tokens
                source = torch.zeros(4, size, 64, device=DEVICE)
                torch.cuda._sleep(busy)
                source.normal_(generator=generator)
                kept.append(source.clone())
                layer.append(source, -source)
                # Written again at once, when the copy has hardly begun.
                source.fill_(float("nan"))
                sums = []
                for piece in stream.pieces(layer, past):
                    torch.cuda._sleep(busy // 10)
                    sums.append((piece.start, piece.keys.clone(), piece.values.clone()))
                for start, keys, values in sums:
                    whole = torch.cat(kept, dim=1)[:, start : start + keys.shape[1]]
                    assert torch.equal(keys, whole) and torch.equal(values, -whole)
                assert sum(keys.shape[1] for _, keys, _ in sums) == past
    for layer, kept in zip(layers, expected, strict=True):
        held = layer.joined(0, layer.tokens)
        assert torch.equal(held.keys, torch.cat(kept, dim=1).cpu())


# ---------------------------------------------------------------- more tokens than memory

LONG = SessionConfig(
    boundaries=[{"name": "interval", "every_tokens": 16}],
    memory={"sink_tokens": 4, "selected_tokens": 1024, "recent_tokens": 64},
    refresh={"min_segment_tokens": 8, "max_segment_tokens": 32, "prefill_evidence_queries": 1},
)
LONG_TOKENS = 65_536
LONG_IDS = [(index * 7 + index // 97) % VOCABULARY for index in range(LONG_TOKENS)]


@lru_cache
def long_model() -> Any:
    """Small layers with many and large heads: 64 KiB of history per token."""
    family = next(family for family in FAMILIES if family.name == "llama")
    return build_model(
        family,
        device="cuda",
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        hidden_size=256,
        initializer_range=0.05,
        max_position_embeddings=2 * LONG_TOKENS,
    )


@contextmanager
def at_most(free_bytes: int) -> Iterator[None]:
    """Let this process allocate only so much more."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    allowed = torch.cuda.memory_reserved() + free_bytes
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def long_decoding(session: Session) -> None:
    session.decode(LONG_IDS, max_new_tokens=120)


def tell_tokens(engine: Engine, config: SessionConfig, *, logits: bool) -> tuple[Told, list[int]]:
    """What was decoded, and the bytes of history, host and device behind it.

    Selections are left out: of so many candidates some are so near each other that rounding lets
    them change places, which changes no token.
    """
    with engine.session(config) as session:
        found = told(session, logits=logits)
        long_decoding(session)
        found.records = records_of(session)
        sequence = sequence_of(session)
        return found, [sequence.history_bytes, sequence.host_bytes, sequence.processed_tokens]


@pytest.mark.timeout(400)
def test_a_session_longer_than_the_memory_decodes_what_an_ordinary_one_does() -> None:
    engine = Engine(long_model(), word_tokenizer())
    expected, _ = tell_tokens(engine, LONG, logits=True)
    limited = Engine(long_model(), word_tokenizer())
    limit = 2048 * MEBIBYTE
    with at_most(limit):
        with counted_requests() as counts:
            got, (history, host, tokens) = tell_tokens(limited, on_host(LONG), logits=False)
        peak = torch.cuda.max_memory_allocated()
        with pytest.raises(OutOfDeviceMemoryError), limited.session(LONG) as session:
            long_decoding(session)
    assert history == host > limit and tokens > LONG_TOKENS and peak < history
    agree(expected, got, LONG)
    first, second = ([record.token_id for record in one.records] for one in (expected, got))
    # The rules of `agree` would accept an early difference.
    assert first[:40] == second[:40]
    assert counts["FastStep"] > 80 and set(counts) == {"FastStep"} and all_captured(limited)


@pytest.mark.timeout(400)
def test_fast_steps_take_no_longer_and_slow_ones_about_as_long_as_the_bus(
    capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
) -> None:
    if hasattr(pytestconfig, "workerinput"):
        pytest.skip("times are measured where no other process uses the device: run it alone")
    engine = Engine(long_model(), word_tokenizer())
    config = LONG.replace(history={"reserve_tokens": LONG_TOKENS + 2000})
    with engine.session(config) as one, engine.session(on_host(config)) as other:
        seconds = []
        for session in (one, other):
            session.decode(LONG_IDS, max_new_tokens=50)
        for _ in range(3):
            for session in (one, other):
                session.decode([], max_new_tokens=150)
        for session in (one, other):
            late = session.trace[60:]
            seconds.append(
                {
                    kind: statistics.median(r.seconds for r in late if r.kind == kind)
                    for kind in ("fast", "slow")
                }
            )
            assert sum(record.kind == "fast" for record in late) > 300
        history = sequence_of(other).layers
        streamed = sum(layer.history.tokens for layer in history) * 2 * 8 * 128 * 4
    assert all_captured(engine)
    probe = BusProbe(DEVICE, 1 << 28)
    probe.sample()
    bandwidth = statistics.median(probe.sample() for _ in range(5))
    same, away = seconds
    ratio, share = away["fast"] / same["fast"], streamed / bandwidth / away["slow"]
    with capsys.disabled():
        print(
            f"\nfast step: {same['fast'] * 1e3:.3f} ms on the device, {away['fast'] * 1e3:.3f} ms "
            f"with the history in host memory (x {ratio:.2f}); slow step: "
            f"{same['slow'] * 1e3:.1f} and {away['slow'] * 1e3:.1f} ms, of which the copy of "
            f"{streamed / 1e9:.2f} GB at {bandwidth / 1e9:.1f} GB/s is {100 * share:.0f} %"
        )
    assert ratio <= 1.1
    assert share >= 0.6
