"""What one step costs: dense, slow (dense, evidence, selection, gather) and fast, in one run.

The history is filled with random keys and values, since a real prefill of that size would take
far longer than the measurement. Arms alternate, so that drift of the machine hits all alike;
medians and quartiles are reported, and conclusions are ratios within the run.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.config import SessionConfig
from sfi_agent.engine.memory import MemoryLayout
from sfi_agent.engine.model_shape import ModelShape, inspect_model
from sfi_agent.engine.refresh import refresh_memory
from sfi_agent.engine.runner import Runner
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.engine.switch import AttentionSwitch
from sfi_agent.errors import InputError, explain
from sfi_agent.plugins import build_selector

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sfi_agent.protocols import Selector

__all__ = ["ArmTiming", "DecodeBenchmark", "benchmark_decode"]

_FILL_CHUNK_TOKENS = 2048
_PROCESS_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class ArmTiming:
    """Seconds of one kind of step.

    Attributes:
        median_seconds: Median over the rounds; lower is better.
        quartile_seconds: First and third quartile.
        rounds: How many steps were timed.
    """

    median_seconds: float
    quartile_seconds: tuple[float, float]
    rounds: int


@dataclass(frozen=True, slots=True)
class DecodeBenchmark:
    """Result of `benchmark_decode`; JSON by `as_json()`.

    Attributes:
        context_tokens: Length of the history.
        memory_tokens: What a fast step attends to.
        arms: Timing by arm: "dense", "slow", "fast".
        dense_over_fast: Ratio of the medians; higher is better.
        slow_over_dense: Ratio of the medians; 1 is a refresh for free.
        weight_bytes: Of the model.
        history_bytes: Of keys and values of the history.
        memory_bytes: Of the memory buffers.
        peak_bytes: Peak resident memory of the process (CPU) or allocated memory (CUDA).
        start_bytes: The same before the model was built (interpreter and libraries).
    """

    context_tokens: int
    memory_tokens: int
    device: str
    dtype: str
    threads: int
    arms: dict[str, ArmTiming]
    dense_over_fast: float
    slow_over_dense: float
    weight_bytes: int
    history_bytes: int
    memory_bytes: int
    peak_bytes: int
    start_bytes: int

    @property
    def peak_over_needed(self) -> float:
        """Peak memory without the start, over weights, history and memory; 1 is the least."""
        needed = self.weight_bytes + self.history_bytes + self.memory_bytes
        return (self.peak_bytes - self.start_bytes) / needed

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak_over_needed": self.peak_over_needed}


def benchmark_decode(
    make_model: Callable[[], PreTrainedModel],
    context_tokens: int,
    config: SessionConfig,
    *,
    rounds: int = 15,
    on_progress: Callable[[str], None] = lambda _: None,
) -> DecodeBenchmark:
    """Time dense, slow and fast steps over a history of random keys and values.

    Args:
        make_model: Builds the model; called here so that its memory is counted.
        context_tokens: Length of the history.
        config: Sizes of the memory and the selector.
        rounds: Rounds of one step per arm, after two that are not counted.
        on_progress: Told what is happening.

    Raises:
        InputError: The context is too short for the memory to be smaller than it.
    """
    memory = config.memory
    if context_tokens <= memory.sink_tokens + memory.recent_tokens:
        raise InputError(
            explain(
                "benchmarked decoding",
                got=f"a context of {context_tokens} tokens",
                allowed=f"more than sink + recent = {memory.sink_tokens + memory.recent_tokens}",
            )
        )
    start_bytes = _resident_bytes()
    on_progress("building the model")
    model = make_model()
    shape = inspect_model(model)
    with AttentionSwitch.of(model).switched_on(model):
        bench = _Steps(model, shape, config, context_tokens, rounds)
        on_progress(f"filling a history of {context_tokens} tokens")
        bench.fill()
        times = bench.run(on_progress)
    arms = {name: _timing(values) for name, values in times.items()}
    sequence = bench.sequence
    return DecodeBenchmark(
        context_tokens=context_tokens,
        memory_tokens=bench.memory_tokens,
        device=str(shape.device),
        dtype=str(shape.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        arms=arms,
        dense_over_fast=arms["dense"].median_seconds / arms["fast"].median_seconds,
        slow_over_dense=arms["slow"].median_seconds / arms["dense"].median_seconds,
        weight_bytes=sum(item.nbytes for item in model.parameters()),
        history_bytes=sequence.history_bytes,
        memory_bytes=sequence.memory_bytes,
        peak_bytes=_peak_bytes(shape.device),
        start_bytes=start_bytes if shape.device.type == "cpu" else 0,
    )


class _Steps:
    """The sequence that is stepped, and the arms."""

    def __init__(
        self,
        model: PreTrainedModel,
        shape: ModelShape,
        config: SessionConfig,
        context_tokens: int,
        rounds: int,
    ) -> None:
        self.model, self.shape = model, shape
        self.context_tokens, self.rounds = context_tokens, rounds
        self.runner = Runner(model, shape)
        self.selector: Selector = build_selector(config.selector)
        memory = config.memory
        layout = MemoryLayout(
            memory.sink_tokens, memory.selected_tokens, memory.recent_tokens, shape.device
        )
        dense = frozenset(memory.dense_layers)
        # Room for the tokens the arms append, so that nothing moves while it is timed.
        self.sequence = SequenceState(shape.windows, layout, dense, context_tokens + 8)
        self.memory_tokens = 0
        self.token = 11

    def fill(self) -> None:
        config = self.model.config.get_text_config()
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        generator = torch.Generator(self.shape.device).manual_seed(1)
        for layer in self.sequence.layers:
            for start in range(0, self.context_tokens, _FILL_CHUNK_TOKENS):
                tokens = min(_FILL_CHUNK_TOKENS, self.context_tokens - start)
                size = (heads, tokens, dim)
                keys, values = (
                    torch.randn(
                        size, generator=generator, device=self.shape.device, dtype=self.shape.dtype
                    )
                    for _ in range(2)
                )
                layer.history.append(keys, values)
        self.sequence.processed_tokens = self.context_tokens

    def run(self, on_progress: Callable[[str], None]) -> dict[str, list[float]]:
        arms = {"dense": self._dense, "slow": self._slow, "fast": self._fast}
        times: dict[str, list[float]] = {name: [] for name in arms}
        self._slow()
        for index in range(self.rounds + 2):
            on_progress(f"round {max(0, index - 1)} of {self.rounds}")
            for name, step in arms.items():
                self._synchronize()
                started = time.perf_counter()
                step()
                self._synchronize()
                if index >= 2:
                    times[name].append(time.perf_counter() - started)
                self._undo(name)
        return times

    def _dense(self) -> None:
        self.runner.dense(self.sequence, [self.token])

    def _slow(self) -> None:
        self.runner.dense(self.sequence, [self.token], evidence_rows=1)
        refresh_memory(self.sequence, self.selector, segment_capacity=32)

    def _fast(self) -> None:
        output = self.runner.fast(self.sequence, self.token)
        int(output.logits.argmax())

    def _undo(self, name: str) -> None:
        """Every step starts from the same history; the memory stays ready for the next."""
        layout = self.sequence.layout
        assert layout is not None
        self.memory_tokens = max(self.memory_tokens, layout.visible_tokens)
        if name == "fast":
            self.sequence.discard_fast_token()
        for layer in self.sequence.layers:
            layer.history.cut(self.context_tokens)
        self.sequence.processed_tokens = self.context_tokens

    def _synchronize(self) -> None:
        if self.shape.device.type == "cuda":
            torch.cuda.synchronize()


def _timing(seconds: list[float]) -> ArmTiming:
    first, median, third = statistics.quantiles(seconds, n=4)
    return ArmTiming(median, (first, third), len(seconds))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _PROCESS_STATUS.exists():
        line = next(
            line for line in _PROCESS_STATUS.read_text().splitlines() if line.startswith("VmHWM:")
        )
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident_bytes() -> int:
    """Resident memory now, from where the peak counts; elsewhere than on Linux the peak so far."""
    # 5 sets the peak back to what is resident (proc(5)); a container may forbid it.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes(torch.device("cpu"))
