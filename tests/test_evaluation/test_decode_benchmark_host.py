"""The decode benchmark with histories in host memory: streamed on the CPU, as to a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from sfi_agent.config import SessionConfig
from sfi_agent.engine.host_access import HostAccess
from sfi_agent.engine.host_gather import HostGather
from sfi_agent.errors import InputError
from sfi_agent.evaluation.decode_benchmark import DecodeOptions, ModelSizes, benchmark
from sfi_agent.evaluation.decode_benchmark.histories import Histories
from sfi_agent.evaluation.decode_benchmark.needs import host_bytes, needed_bytes
from sfi_agent.evaluation.decode_benchmark.records import DraftCounts
from sfi_agent.evaluation.decode_benchmark.roof import Roof
from sfi_agent.evaluation.decode_benchmark.setting import Setting
from sfi_agent.evaluation.random_models import MODEL_SHAPES, outline_model
from tests.test_engine.host_cases import CPU, HostWays
from tests.test_evaluation.test_decode_benchmark import CONFIG, CONTEXT, OPTIONS, TINY, run

ON_HOST = CONFIG.replace(history={"device": "cpu"})
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def streamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that has host memory beside its own."""
    ways = HostWays(room_bytes=20_000, chunk_bytes=30_000)
    access = HostAccess(ways.store(), ways.stream(), HostGather(CPU))
    monkeypatch.setitem(MODEL_SHAPES, "tiny", TINY)
    monkeypatch.setattr(HostAccess, "of", classmethod(lambda cls, device: access))
    away = property(lambda setting: setting.config.history.device == "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setting, "on_host", away)
        yield


@pytest.mark.parametrize("execution", ["eager", "uncaptured"])
def test_every_arm_but_generate_streams_and_leaves_the_histories(
    execution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Histories] = []
    before: list[torch.Tensor] = []
    fill = Histories.fill

    def filled(self: Histories, on_progress: Any) -> None:
        fill(self, on_progress)
        seen.append(self)
        before.extend(held(self))

    monkeypatch.setattr(Histories, "fill", filled)
    result = run(OPTIONS, ON_HOST, execution=execution)
    names = ("dense", "slow", "fast", "observe", "rectify", "verify", "selection")
    assert tuple(result.arms) == names
    assert "host memory" in result.left_out["generate"]
    assert result.bus is not None and result.bus.bytes_per_second > 0
    assert result.host_bytes == result.history_bytes > 0
    for name, arm in result.arms.items():
        assert (arm.bus_bytes == 0) == (name == "fast")
        times = (
            arm.roof_bytes / result.copy.bytes_per_second,
            arm.bus_bytes / result.bus.bytes_per_second,
        )
        assert arm.roof_seconds == max(times) > 0
    (histories,) = seen
    histories.check()
    assert all(map(torch.equal, before, held(histories)))
    document = result.as_json()
    assert document["bus"]["bytes_per_second"] > 0
    assert document["host_bytes"] == result.host_bytes


def held(histories: Histories) -> list[torch.Tensor]:
    """All keys and values of the context, copied."""
    return [
        tensor.clone()
        for state in (*histories.sparse, *histories.dense)
        for layer in state.sequence.layers
        for piece in layer.history.pieces(0, CONTEXT)
        for tensor in (piece.keys, piece.values)
    ]


def test_dense_layers_stay() -> None:
    options = replace(OPTIONS, arms=("dense", "fast"))
    result = run(options, ON_HOST.replace(memory={"dense_layers": [0]}))
    assert 0 < result.host_bytes < result.history_bytes
    assert result.arms["dense"].bus_bytes * 2 == run(options, ON_HOST).arms["dense"].bus_bytes


def test_ordinary_histories_bring_nothing() -> None:
    result = run(replace(OPTIONS, arms=("dense", "fast")))
    assert result.bus is None and result.host_bytes == 0
    assert {arm.bus_bytes for arm in result.arms.values()} == {0}


def test_the_roof_of_the_bus() -> None:
    sizes = ModelSizes.of(outline_model("qwen3-4b", dtype=torch.bfloat16, context_tokens=1000))
    token = sizes.token_bytes
    roof = Roof(sizes, 4, 131072, 2324.0, 2308, streamed_layers=36)
    dense, slow, fast = (roof.bus_bytes_of(name, 32, None) for name in ("dense", "slow", "fast"))
    assert (dense, slow, fast) == (4 * 131072 * token, 4 * (131072 + 2308) * token, 0)
    assert roof.bus_bytes_of("observe", 32, None) == pytest.approx(slow / 33, abs=1)
    assert roof.bus_bytes_of("selection", 32, None) == 4 * (131072 // 2 + 2308) * token
    counts = DraftCounts(judged=80, accepted=70, verifications=10, drafted=80)
    verify = roof.bus_bytes_of("verify", 32, counts)
    assert verify == pytest.approx(4 * (131072 * 1.5 + 2308) * token / 8, abs=1)
    assert replace(roof, streamed_layers=18).bus_bytes_of("dense", 32, None) * 2 == dense


def test_what_is_on_the_host_does_not_need_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ModelSizes.of(outline_model("qwen3-4b", dtype=torch.bfloat16, context_tokens=1000))
    options = DecodeOptions(batch=4)
    ordinary = Setting(sizes, CUDA, 131072, SessionConfig(), options)
    setting = replace(ordinary, config=ordinary.config.replace(history={"device": "cpu"}))
    there, here = needed_bytes(ordinary), needed_bytes(setting)
    name = "4 histories of 131,072 tokens"
    assert here[name] == 0 and there[name] > 77e9
    assert host_bytes(setting)[name] == there[name] and host_bytes(ordinary) == {}
    assert sum(here.values()) < 20e9
    free = {"cpu": 10**6, "cuda": 10**12}
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: free[device.type])
    with pytest.raises(InputError, match="in host memory.*4 histories of 131,072 tokens 77"):
        benchmark.benchmark_decode(
            lambda: pytest.fail("it was built"),
            131072,
            setting.config,
            options=replace(options, arms=("fast",)),
            planned=(sizes, torch.device("cuda", 0)),
        )
