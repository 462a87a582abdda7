"""The benchmark of the step kernels: every arm on small shapes, through the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfi_agent.engine.kernels import SelectionScratch
from sfi_agent.errors import InputError, SfiError
from sfi_agent.evaluation.kernel_benchmark import (
    KernelShape,
    LinearSizes,
    Workload,
    arms,
    benchmark,
    benchmark_kernels,
    check_kernels,
    refuse_without_kernels,
    stopwatch,
)
from sfi_agent.evaluation.kernel_benchmark.arms import make_arms
from sfi_agent.evaluation.kernel_benchmark.buffers import Buffers
from sfi_agent.evaluation.kernel_benchmark.stopwatch import Arm, Stopwatch

CPU = torch.device("cpu")
SHAPE = KernelShape(
    query_heads=6,
    kv_heads=2,
    head_size=16,
    layers=3,
    dtype=torch.float32,
    memory_tokens=24,
    sink_tokens=2,
    recent_tokens=6,
    block_queries=(2, 5),
    linear=LinearSizes(24, 40, 50),
)
ARMS = [
    "copy",
    "fast",
    "fast_torch",
    "dense",
    "dense_evidence",
    "dense_torch",
    "block_2",
    "block_2_evidence",
    "block_2_torch",
    "block_5",
    "block_5_evidence",
    "block_5_torch",
    "rank",
    "rank_float16",
    "select",
    "gather",
    *(
        f"linear_{layer}{suffix}"
        for layer in ("qkv", "out", "gated", "down", "head")
        for suffix in ("", "_torch")
    ),
]
MEBIBYTE = 1 << 20


def workload(shape: KernelShape = SHAPE, context_tokens: int = 100, batch: int = 2) -> Workload:
    return Workload(shape, context_tokens, batch, cache_bytes=0, copy_bytes=MEBIBYTE)


# ---------------------------------------------------------------- a whole run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_arm_is_checked_and_timed(dtype: torch.dtype) -> None:
    stages: list[str] = []
    result = benchmark_kernels(
        replace(SHAPE, dtype=dtype),
        (60, 100),
        (1, 2),
        CPU,
        rounds=2,
        copy_bytes=MEBIBYTE,
        on_stage=stages.append,
    )
    assert list(result.checked) == ARMS
    assert [(timing.context_tokens, timing.batch, timing.arm) for timing in result.timings] == [
        (context, batch, arm) for context in (60, 100) for batch in (1, 2) for arm in ARMS
    ]
    assert stages[:2] == [
        "Compiling and checking kernels for 60 tokens x 1",
        "Timing kernels for 60 tokens x 1",
    ]
    assert len(stages) == 8
    for timing in result.timings:
        low, high = timing.quartile_microseconds
        assert 0 < low <= timing.median_microseconds <= high and timing.rounds == 2
        assert timing.moved_bytes > 0 and timing.copy_share > 0 and not timing.cached
    assert result.left_out == ()


def test_shares_are_of_the_copy_and_ratios_of_torch_in_the_same_rounds() -> None:
    result = benchmark_kernels(SHAPE, (60, 90), (1,), CPU, rounds=2, copy_bytes=MEBIBYTE)
    for context in (60, 90):
        found = {one.arm: one for one in result.timings if one.context_tokens == context}
        copy = found["copy"]
        assert copy.copy_share == 1.0 and copy.moved_bytes == 2 * MEBIBYTE
        for arm, timing in found.items():
            speed = timing.moved_bytes / timing.median_microseconds
            share = speed / (copy.moved_bytes / copy.median_microseconds)
            assert timing.copy_share == pytest.approx(share)
            baseline = found.get(f"{arm.removesuffix('_evidence')}_torch")
            if baseline is None or arm.endswith("_torch"):
                assert timing.torch_ratio is None
            else:
                ratio = timing.median_microseconds / baseline.median_microseconds
                assert timing.torch_ratio == pytest.approx(ratio)


def test_the_document_says_what_ran_where() -> None:
    result = benchmark_kernels(SHAPE, (60,), (1,), CPU, rounds=2, copy_bytes=MEBIBYTE)
    document = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert set(document) == {"shape", "machine", "checked", "timings", "left_out"}
    assert document["shape"]["dtype"] == "float32" and document["shape"]["selected_tokens"] == 16
    assert document["shape"]["block_queries"] == [2, 5]
    assert document["shape"]["linear"] == {
        "hidden_size": 24,
        "intermediate_size": 40,
        "vocabulary_tokens": 50,
    }
    machine = document["machine"]
    assert machine["kernels"] == "reference" and machine["device"] == "cpu"
    assert machine["torch"] == torch.__version__ and "triton" in machine and "cuda" in machine
    methods = {one["arm"]: one["method"] for one in document["timings"]}
    assert methods["dense"] == "reference" and methods["dense_torch"] == "torch SDPA"
    assert methods["copy"] == "clone"
    assert methods["linear_qkv"] == "reference" and methods["linear_qkv_torch"] == "torch linear"
    units = {one["arm"]: one["unit"] for one in document["timings"]}
    assert units["block_5"] == "layer" and units["gather"] == units["select"] == "all layers"


# ---------------------------------------------------------------- bytes


def test_bytes_that_move() -> None:
    """Counted from the tensors themselves."""
    one = workload()
    buffers = Buffers(one, CPU)
    moved = {arm.name: arm.moved_bytes for arm in make_arms(buffers, one)}

    def pool_bytes(keys: Tensor, tokens: int) -> int:
        return 2 * keys[0][:, :, :tokens].numel() * 4

    for name, pool, queries in (
        ("fast", buffers.memory, 1),
        ("dense", buffers.history, 1),
        ("block_5", buffers.history, 5),
    ):
        step = buffers.step(queries)
        read = pool_bytes(pool.keys, pool.tokens) + step.query.nbytes
        new = step.keys.nbytes + step.values.nbytes
        assert moved[name] == read + 2 * new + step.query.nbytes
        assert moved[f"{name}_torch"] == read + new + step.query.nbytes
    evidence = buffers.logits[torch.float32][0][..., :100].nbytes
    assert moved["dense_evidence"] - moved["dense"] == evidence
    assert moved["block_2_evidence"] - moved["block_2"] == evidence
    rows = buffers.counts.numel()
    # Short histories have a peak per token.
    assert moved["rank"] == 3 * evidence + rows * 100 * (4 + 4)
    assert moved["rank_float16"] == 3 * evidence // 2 + rows * 100 * (4 + 4)
    assert moved["select"] == rows * (100 * 4 + 16 * 4) + buffers.positions.nbytes
    memories = 3 * pool_bytes(buffers.memory.keys, 24)
    assert moved["gather"] == 2 * memories + buffers.positions.nbytes


def test_bytes_of_a_published_shape() -> None:
    """Qwen3-4B: 4 KiB per token and layer, and peaks of 16 tokens at 131,072."""
    one = Workload(KernelShape(), 131072, 4, cache_bytes=60 * MEBIBYTE, copy_bytes=1 << 30)
    assert one.shape.token_bytes == 4096 and one.shape.selected_tokens == 2048
    keys = one.extent_bytes(131072)
    assert keys == 1 << 31
    assert keys < one.attention_bytes(131072, 1) < keys * 1.001
    assert one.attention_bytes(131072, 1, evidence=True) - one.attention_bytes(131072, 1) == 1 << 26
    assert one.select_bytes(16) == 36 * 4 * 8 * (131072 // 16 * 4 + 2048 * 16 * 4 + 2048 * 8)
    assert one.gather_bytes == 36 * 4 * (2 * 2308 * 4096 + 8 * 2048 * 8)


def test_layers_lie_apart_until_they_overflow_the_cache() -> None:
    one = Workload(KernelShape(), 8192, 1, cache_bytes=60_000_000, copy_bytes=1 << 30)
    assert one.layers_apart(480_000_000) == 1 and one.layers_apart(479_999_999) == 2
    assert one.layers_apart(1000) == 36 and one.is_cached(1000)
    assert not one.is_cached(10_000_000) and not one.is_cached(200_000_000)


@pytest.mark.parametrize("cache_bytes", [0, 2 * MEBIBYTE])
@pytest.mark.parametrize("context", [5_000, 30_000])
def test_needed_bytes_cover_what_is_allocated(cache_bytes: int, context: int) -> None:
    shape = replace(SHAPE, memory_tokens=1000)
    one = Workload(shape, context, 2, cache_bytes, copy_bytes=MEBIBYTE)
    buffers = Buffers(one, CPU)
    held = {
        "history": buffers.history.keys.nbytes + buffers.history.values.nbytes,
        "memory": buffers.memory.keys.nbytes + buffers.memory.values.nbytes,
        "evidence": sum(logits.nbytes for logits in buffers.logits.values()),
        "ranking": sum(
            part.nbytes
            for part in (buffers.scratch.keys, buffers.scratch.peaks, buffers.scratch.indices)
        ),
        "positions": 3 * buffers.positions.nbytes,
        "linear layers": sum(
            one.layers_apart(one.linear_weight_bytes(layer)) * one.linear_weight_bytes(layer)
            for layer in one.linear_layers.values()
        ),
        "copy": 2 * MEBIBYTE,
    }
    needed = one.needed_bytes()
    assert set(needed) == set(held)
    for part, size in held.items():
        assert 0.75 * needed[part] <= size <= needed[part], part
    assert buffers.history.buffers == (
        1 if cache_bytes == 0 else min(3, -(-16 // (context // 2500)))
    )


# ---------------------------------------------------------------- refusals


def no_buffers(*_: Any) -> None:
    pytest.fail("something was allocated")


def test_what_does_not_fit_is_refused_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("Buffers", "make_copy"):
        monkeypatch.setattr(benchmark, name, no_buffers)
    monkeypatch.setattr(benchmark, "_free_bytes", lambda _: 150_000_000_000)
    with pytest.raises(InputError) as caught:
        benchmark_kernels(KernelShape(), (131072,), (1, 512), CPU)
    message = str(caught.value)
    assert "at 131,072 tokens x 512" in message and "150,000,000,000 bytes" in message
    large = Workload(KernelShape(), 131072, 512, 0, copy_bytes=1 << 28)
    needed = large.needed_bytes()
    assert f"{sum(needed.values()) + (1 << 30):,} bytes needed" in message
    assert f"history {needed['history']:,}" in message and needed["history"] > 1 << 38


def test_the_copy_shrinks_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    one = workload()
    others = sum(replace(one, copy_bytes=0).needed_bytes().values()) + (1 << 30)
    copies: list[int] = []

    def note(found: Workload, *_: Any) -> tuple[str, ...]:
        copies.append(found.copy_bytes)
        return ()

    monkeypatch.setattr(benchmark, "check_kernels", note)
    monkeypatch.setattr(benchmark, "_time", lambda *_: [])
    for spare in (4 << 30, 1 << 30, 1 << 29):
        monkeypatch.setattr(benchmark, "_free_bytes", lambda _, spare=spare: others + spare)
        benchmark_kernels(SHAPE, (100,), (2,), CPU)
    assert copies == [1 << 30, 1 << 29, 1 << 28]
    monkeypatch.setattr(benchmark, "_free_bytes", lambda _: others + (1 << 29) - 2)
    with pytest.raises(InputError, match="copy 536,870,912"):
        benchmark_kernels(SHAPE, (100,), (2,), CPU)


@pytest.mark.parametrize(
    ("changes", "contexts", "batches", "said"),
    [
        ({"kv_heads": 4}, (100,), (1,), "6 heads with 4 KV heads"),
        ({"head_size": 20}, (100,), (1,), "head size 20"),
        ({"head_size": 264}, (100,), (1,), "head size 264"),
        ({"layers": 0}, (100,), (1,), "layers: 0"),
        ({"memory_tokens": 8}, (100,), (1,), "more than sink \\+ recent = 8"),
        ({"block_queries": (0,)}, (100,), (1,), "block of 0 queries"),
        ({"block_queries": (2, 2)}, (100,), (1,), "each number once"),
        ({}, (24,), (1,), "more than the memory of 24"),
        ({}, (1 << 24,), (1,), "at most 16,777,195"),
        ({"head_size": 256}, (1 << 23,), (1,), "at most 8,388,587"),
        ({}, (100,), (0,), "batch 0"),
        ({"linear": LinearSizes(0, 40, 50)}, (100,), (1,), "hidden size: 0"),
        ({"linear": LinearSizes(24, -1, 50)}, (100,), (1,), "intermediate size: -1"),
        ({"linear": LinearSizes(24, 40, 0)}, (100,), (1,), "vocabulary: 0"),
        ({}, (100, 100), (1,), "contexts \\[100, 100\\]"),
    ],
)
def test_numbers_without_meaning_are_refused(
    changes: dict[str, Any],
    contexts: tuple[int, ...],
    batches: tuple[int, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark, "Buffers", no_buffers)
    with pytest.raises(InputError, match=said):
        benchmark_kernels(replace(SHAPE, **changes), contexts, batches, CPU)


def test_one_round_has_no_quartiles() -> None:
    with pytest.raises(InputError, match="1 rounds; allowed: 2 or more"):
        benchmark_kernels(SHAPE, (100,), (1,), CPU, rounds=1)


def test_the_reference_is_not_passed_off_as_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no CUDA device.*bench decode"):
        refuse_without_kernels(CPU, SHAPE)
    asked: list[tuple[Any, ...]] = []

    def problem(*values: Any) -> str | None:
        asked.append(values)
        return "Triton is not installed" if len(asked) == 1 else None

    monkeypatch.setattr(benchmark, "kernel_problem", problem)
    card = torch.device("cuda", 0)
    with pytest.raises(InputError, match="Triton is not installed"):
        refuse_without_kernels(card, SHAPE)
    refuse_without_kernels(card, SHAPE)
    assert asked == [(card, torch.float32, 16, 16)] * 2


# ---------------------------------------------------------------- wrong kernels


def spoiled(name: str) -> Callable[..., Any]:
    """An operation as it is, with one thing wrong."""
    original = getattr(arms, name.partition(":")[0])
    flaw = name.partition(":")[2]

    def wrong(*inputs: Any, **options: Any) -> Any:
        if flaw == "not appended":
            inputs = (*inputs[:8], replace(inputs[8], append=False), *inputs[9:])
        if flaw == "one token less":
            inputs = (*inputs[:4], inputs[4] + 1, *inputs[5:])
        result = original(*inputs, **options)
        if flaw == "output":
            return result[0] * 1.01, result[1]
        if flaw == "log-sum-exp":
            return result[0], result[1] + 0.01
        if flaw == "evidence" and inputs[9] is not None:
            inputs[9].logits[0, 0, 0, 50] += 0.01
        if flaw == "rest mass" and inputs[9] is not None:
            inputs[9].rest_mass[0, 0, 0] += 0.01
        if flaw == "counters":
            inputs[6][0] = 1
        if flaw == "keys":
            inputs[3].keys[0, 0, 20] ^= 1 << 12
        if flaw == "positions":
            result[0][-1, -1, -1, 3] += 1
        if flaw == "counts":
            result[1][0, 0, 0] -= 1
        if flaw == "memory":
            keys = inputs[1].layer(1).places[0][0].keys
            keys[0, 5] = keys[0, 6]
        if flaw == "starts":
            inputs[5][0, 0, 0] = 3
        return result

    return wrong


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("attend:output", "fast"),
        ("attend:log-sum-exp", "fast"),
        ("attend:not appended", "fast"),
        ("attend:one token less", "fast"),
        ("attend:counters", "fast"),
        ("attend:evidence", "dense_evidence"),
        ("attend:rest mass", "dense_evidence"),
        ("rank:keys", "rank"),
        ("select:positions", "select"),
        ("select:counts", "select"),
        ("gather:memory", "gather"),
        ("gather:starts", "gather"),
    ],
)
def test_a_wrong_kernel_is_named_and_nothing_is_timed(
    name: str, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, name.partition(":")[0], spoiled(name))
    monkeypatch.setattr(benchmark, "_time", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(SfiError, match=f"checked {arm} \\(reference\\) before timing") as caught:
        benchmark_kernels(SHAPE, (100,), (2,), CPU, copy_bytes=MEBIBYTE)
    assert "differs from its reference" in str(caught.value)


def test_the_check_takes_the_plans_and_capacity_that_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers are fewer and histories shorter, kernels are the same."""
    seen: dict[str, set[Any]] = {}
    for name in ("attend", "rank"):
        original = getattr(arms, name)

        def note(*inputs: Any, name: str = name, original: Any = original) -> Any:
            if name == "attend":
                seen.setdefault(name, set()).add((inputs[0].shape[1], inputs[7]))
            else:
                scratch: SelectionScratch = inputs[3]
                seen.setdefault(name, set()).add((scratch.keys.shape[-1], scratch.peak_tokens))
            return original(*inputs)

        monkeypatch.setattr(arms, name, note)
    large = workload(context_tokens=20_000, batch=1)
    check_kernels(large, CPU)
    checked, seen = seen, {}
    for arm in make_arms(Buffers(large, CPU), large):
        if arm.prepare is not None:
            arm.prepare()
        arm.run()
    assert checked == seen and len(checked["attend"]) == 4
    assert checked["rank"] == {(20_480, 2)}


# ---------------------------------------------------------------- the stopwatch


def test_what_prepares_a_pass_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    happened: list[str] = []

    def take(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += seconds
            happened.append(name)

        return run

    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now))
    arm = Arm(
        "select", take("run", 6.0), lambda: None, 3, 1, "layer", prepare=take("prepare", 100.0)
    )
    watch = Stopwatch(arm, CPU)
    assert happened == ["prepare", "run"]
    assert watch.seconds() == pytest.approx(2.0) and watch.seconds() == pytest.approx(2.0)
    assert happened == ["prepare", "run"] * 3


class Device:
    """Plays a CUDA device: work takes its time when it runs or is replayed, not when captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.capturing: list[tuple[str, float]] | None = None
        self.happened: list[str] = []
        device = self

        class Graph:
            def __init__(self) -> None:
                self.work: list[tuple[str, float]] = []

            def replay(self) -> None:
                for name, seconds in self.work:
                    device.take(f"replayed {name}", seconds)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * 1000.0

        @contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            device.capturing = graph.work
            yield
            device.capturing = None

        for name, stand_in in (
            ("CUDAGraph", Graph),
            ("Event", Event),
            ("graph", capture),
            ("synchronize", lambda: None),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def take(self, name: str, seconds: float) -> None:
        if self.capturing is not None:
            self.capturing.append((name, seconds))
            return
        self.now += seconds
        self.happened.append(name)


def test_on_a_device_graphs_are_replayed_for_some_milliseconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, cuda = Device(monkeypatch), torch.device("cuda")

    def run() -> None:
        device.take("run", 0.001)

    watch = Stopwatch(Arm("dense", run, lambda: None, 4, 1, "layer"), cuda)
    assert device.happened == ["run", *["replayed run"] * 3]
    assert watch.seconds() == pytest.approx(0.001 / 4)
    assert device.happened[4:] == ["replayed run"] * 8
    device.happened.clear()
    copy = Stopwatch(Arm("copy", run, lambda: None, 1, 1, "buffer", captured=False), cuda)
    assert copy.seconds() == pytest.approx(0.001) and set(device.happened) == {"run"}


def test_on_a_device_every_replay_finds_its_input_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    arm = Arm(
        "select",
        lambda: device.take("select", 0.004),
        lambda: None,
        1,
        1,
        "all layers",
        prepare=lambda: device.take("rank", 0.5),
    )
    watch = Stopwatch(arm, torch.device("cuda"))
    assert device.happened[:2] == ["rank", "select"]
    assert watch.seconds() == pytest.approx(0.004)
    assert device.happened[2:] == ["replayed rank", "replayed select"] * (3 + 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_kernels_are_checked_captured_and_timed_on_a_device() -> None:
    device = torch.device("cuda")
    shape = replace(SHAPE, head_size=64, dtype=torch.bfloat16, memory_tokens=300)
    refuse_without_kernels(device, shape)
    result = benchmark_kernels(shape, (3000,), (1, 3), device, rounds=3)
    assert result.facts.kernels == "triton" and list(result.checked) == ARMS
    assert all(0 < timing.median_microseconds < 1e5 for timing in result.timings)
