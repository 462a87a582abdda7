"""Linear layers in the benchmark of the step kernels: sizes, copies, checks, what is left out."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfi_agent.engine.kernels import linear
from sfi_agent.errors import SfiError
from sfi_agent.evaluation.kernel_benchmark import (
    KernelShape,
    LinearSizes,
    Workload,
    benchmark,
    benchmark_kernels,
    checks,
    linear_arms,
)
from sfi_agent.evaluation.kernel_benchmark.linear_arms import make_linear_arms
from sfi_agent.evaluation.kernel_benchmark.stopwatch import Arm

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
    block_queries=(2,),
    linear=LinearSizes(24, 40, 50),
)
QWEN3_4B = KernelShape(linear=LinearSizes())
MEBIBYTE = 1 << 20
LAYERS = ["linear_qkv", "linear_out", "linear_gated", "linear_down", "linear_head"]


def workload(
    shape: KernelShape = SHAPE, batch: int = 2, cache_bytes: int = 0, context: int = 100
) -> Workload:
    return Workload(shape, context, batch, cache_bytes, copy_bytes=MEBIBYTE)


def weights_read(monkeypatch: pytest.MonkeyPatch, arm: Arm) -> list[tuple[Tensor, list[Tensor]]]:
    """Input and weights of every step of one pass, seen where the operations are called."""
    seen: list[tuple[Tensor, list[Tensor]]] = []

    def note(x: Tensor, *weights: Any) -> Any:
        together = list(weights[0]) if isinstance(weights[0], list) else list(weights)
        seen.append((x, together))
        return [x]

    with monkeypatch.context() as patch:
        patch.setattr(linear_arms, "skinny_linear", note)
        patch.setattr(linear_arms, "skinny_gated", note)
        arm.run()
    return seen


# ---------------------------------------------------------------- sizes and bytes


def test_layers_of_a_published_shape() -> None:
    """Qwen3-4B: weights in bfloat16 as its config.json has them."""
    one = workload(QWEN3_4B, batch=4, context=4096)
    sizes = {name: (layer.width, layer.outputs) for name, layer in one.linear_layers.items()}
    assert sizes == {
        "qkv": (2560, (4096, 1024, 1024)),
        "out": (4096, (2560,)),
        "gated": (2560, (9728, 9728)),
        "down": (9728, (2560,)),
        "head": (2560, (151936,)),
    }
    moved = {name: one.linear_bytes(layer) for name, layer in one.linear_layers.items()}
    assert moved["qkv"] == 2 * (2560 * 6144 + 4 * (2560 + 6144))
    assert moved["gated"] == 2 * (2 * 2560 * 9728 + 4 * (2560 + 9728))
    assert moved["head"] == 2 * (2560 * 151936 + 4 * (2560 + 151936))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_bytes_are_those_of_the_tensors(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {arm.name: arm for arm in make_linear_arms(workload(batch=batch), CPU)}
    assert list(arms) == [name + suffix for name in LAYERS for suffix in ("", "_torch")]
    for name in LAYERS:
        arm, baseline = arms[name], arms[f"{name}_torch"]
        x, weights = weights_read(monkeypatch, arm)[0]
        outs = linear_arms._torch(x, weights, name == "linear_gated")
        assert x.shape[0] == batch
        assert arm.moved_bytes == sum(part.nbytes for part in (x, *weights, *outs))
        assert baseline.moved_bytes == arm.moved_bytes
        assert (arm.baseline, baseline.baseline, arm.unit) == (baseline.name, "", "layer")


def test_copies_of_the_weights_overflow_the_cache_and_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = replace(SHAPE, layers=100)
    one = workload(shape, cache_bytes=10_000)
    allocated = 0
    for arm in make_linear_arms(one, CPU):
        if arm.name.endswith("_torch"):
            continue
        read = weights_read(monkeypatch, arm)
        copies = {weights[0].data_ptr(): weights for _, weights in read}
        size = sum(weight.nbytes for weight in read[0][1])
        assert len(copies) == one.layers_apart(size) and len(copies) * size >= 8 * 10_000
        assert arm.operations == len(read) >= 4 and len(read) % len(copies) == 0
        order = [weights[0].data_ptr() for _, weights in read]
        assert order == list(copies) * (len(read) // len(copies))
        assert not arm.cached
        allocated += len(copies) * size
    assert one.needed_bytes()["linear layers"] == allocated
    # Three layers of small weights cannot leave the cache.
    few = workload(SHAPE, cache_bytes=MEBIBYTE)
    assert all(arm.cached for arm in make_linear_arms(few, CPU))
    for arm in make_linear_arms(one, CPU, most_copies=2):
        assert arm.operations == 4


# ---------------------------------------------------------------- left out


def test_more_rows_than_the_kernels_take_are_left_out_with_the_reason() -> None:
    result = benchmark_kernels(SHAPE, (60, 90), (16, 17), CPU, rounds=2, copy_bytes=MEBIBYTE)
    timed = {one.batch for one in result.timings if one.arm.startswith("linear")}
    assert timed == {16} and "linear_head" in result.checked
    (one,) = result.left_out
    assert (one.arms, one.batch) == ("linear", 17) and "up to 16 rows" in one.reason
    assert result.as_json()["left_out"][0]["reason"] == one.reason
    assert workload(batch=17).needed_bytes()["linear layers"] == 0


def test_a_shape_without_their_sizes_leaves_them_out() -> None:
    shape = replace(SHAPE, linear=None)
    result = benchmark_kernels(shape, (60,), (1,), CPU, rounds=2, copy_bytes=MEBIBYTE)
    assert not any(one.arm.startswith("linear") for one in result.timings)
    assert [one.reason for one in result.left_out] == ["their sizes are not given"]
    assert result.as_json()["shape"]["linear"] is None


# ---------------------------------------------------------------- checks


def spoiled(name: str, flaw: str) -> Callable[..., Any]:
    """An operation as it is, with one thing wrong."""
    original = getattr(linear_arms, name)
    first: list[Tensor] = []

    def wrong(x: Tensor, *weights: Any) -> Any:
        if flaw == "other weights":
            # Those of the copy before: a step that does not follow the rotation.
            first.extend(weights[0] if not first else ())
            return original(x, first)
        result = original(x, *weights)
        outs = result if isinstance(result, list) else [result]
        if flaw == "a row":
            outs[-1][-1] = outs[-1][0]
        if flaw == "scaled":
            outs[-1] *= 1.01
        if flaw == "a number":
            outs[0][0, -1] += 0.1
        return outs[:-1] if flaw == "one less" else result

    return wrong


@pytest.mark.parametrize(
    ("name", "flaw", "arm"),
    [
        ("skinny_linear", "a row", "linear_qkv"),
        ("skinny_linear", "scaled", "linear_qkv"),
        ("skinny_linear", "a number", "linear_qkv"),
        ("skinny_linear", "one less", "linear_qkv"),
        ("skinny_linear", "other weights", "linear_qkv"),
        ("skinny_gated", "a row", "linear_gated"),
        ("skinny_gated", "scaled", "linear_gated"),
    ],
)
def test_a_wrong_linear_layer_is_named_and_nothing_is_timed(
    name: str, flaw: str, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_arms, name, spoiled(name, flaw))
    monkeypatch.setattr(benchmark, "_time", lambda *_: pytest.fail("it was timed"))
    monkeypatch.setattr(benchmark, "_facts", facts_with_a_cache(benchmark._facts))
    with pytest.raises(SfiError, match=f"checked {arm} \\(reference\\) before timing") as caught:
        benchmark_kernels(SHAPE, (100,), (2,), CPU, copy_bytes=MEBIBYTE)
    assert "differs from its reference" in str(caught.value)


def facts_with_a_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    """So that weights have copies."""
    return lambda *inputs: replace(original(*inputs), cache_bytes=MEBIBYTE)


def test_what_is_not_written_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves outputs as they lay there is not right because they lay there."""
    results: dict[int, Tensor] = {}
    original = linear.skinny_linear

    def lazy(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        key = weights[0].data_ptr()
        if key not in results:
            results[key] = original(x, weights)[0]
        return [results[key]]

    monkeypatch.setattr(linear_arms, "skinny_linear", lazy)
    arms = {arm.name: arm for arm in make_linear_arms(workload(), CPU)}
    with pytest.raises(AssertionError, match="nan"):
        arms["linear_down"].check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_references_take_parts_of_large_weights(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_EXACT_ELEMENTS", 100)
    one = workload(replace(SHAPE, dtype=dtype), batch=16)
    for arm in make_linear_arms(one, CPU):
        arm.check()


def test_the_check_takes_the_rows_and_sizes_that_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: set[tuple[Any, ...]] = set()
    for name in ("skinny_linear", "skinny_gated"):
        original = getattr(linear_arms, name)

        def note(x: Tensor, *weights: Any, original: Any = original) -> Any:
            together = weights[0] if isinstance(weights[0], list) else weights
            seen.add((x.shape, tuple(weight.shape for weight in together)))
            return original(x, *weights)

        monkeypatch.setattr(linear_arms, name, note)
    large = workload(batch=16)
    benchmark.check_kernels(large, CPU)
    checked = set(seen)
    seen.clear()
    for arm in make_linear_arms(large, CPU):
        arm.run()
    assert checked == seen and len(checked) == 5


# ---------------------------------------------------------------- quartiles


def test_quartiles_lie_among_the_samples() -> None:
    """Extrapolated ones of two rounds may be negative."""
    arm = Arm("linear_out", lambda: None, lambda: None, 1, 100, "layer")
    copy = replace(arm, name="copy")
    samples = {"linear_out": [1.0, 9.0], "copy": [1.0, 1.0]}
    timing = benchmark._timing(arm, workload(), samples, copy)
    assert timing.quartile_microseconds == (3e6, 7e6) and timing.median_microseconds == 5e6
    assert statistics.quantiles([1.0, 9.0], n=4)[0] < 0
