"""Builds what is timed and takes samples of all arms in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sfi_agent.engine.runner import Runner
from sfi_agent.engine.switch import AttentionSwitch
from sfi_agent.engine.warmup import WarmUpReport, prepare
from sfi_agent.evaluation.decode_benchmark.clock import BusProbe, CopyProbe
from sfi_agent.evaluation.decode_benchmark.generate import GenerateArm, no_room_for_generate
from sfi_agent.evaluation.decode_benchmark.histories import Histories
from sfi_agent.evaluation.decode_benchmark.loops import DecodingArm
from sfi_agent.evaluation.decode_benchmark.memory_use import give_back, peak_bytes
from sfi_agent.evaluation.decode_benchmark.options import (
    DEFAULT_ARMS,
    LONGEST_FREE_SEGMENT,
    LOOPS,
    DecodeOptions,
    arm_config,
)
from sfi_agent.evaluation.decode_benchmark.records import WarmUpTimes
from sfi_agent.evaluation.decode_benchmark.sample import Sample, TimedArm
from sfi_agent.evaluation.decode_benchmark.single_steps import (
    FastSteps,
    SelectionAlone,
    SlowSteps,
)
from sfi_agent.session.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sfi_agent.engine.programs.choice import Execution
    from sfi_agent.evaluation.decode_benchmark.setting import Setting

__all__ = ["Measured", "StepRun"]

_STEPS = {
    "generate": {"cuda": 8, "cpu": 2},
    "dense": {"cuda": 16, "cpu": 2},
    "slow": {"cuda": 4, "cpu": 1},
    "fast": {"cuda": 32, "cpu": 4},
}
"""Steps per sample: enough that reading the clock does not count."""

_BLOCK_STEP = 8
"""Captured blocks come in sizes of so many tokens."""


@dataclass(slots=True)
class Measured:
    """What was measured, before anything is computed from it.

    Attributes:
        samples: By arm.
        copies: Bytes per second of a copy, one per round.
        copy_buffer_bytes: Size of what was copied.
        bus_copies: Bytes per second from host memory, where histories are there.
        left_out: Arms that could not run, with the reason.
        warmup: What was prepared.
        peak_bytes: See `DecodeBenchmark`, like the following.
        history_bytes: Of all histories.
        host_bytes: How many of them are in host memory.
        memory_bytes: Of all memories.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    copies: list[float] = field(default_factory=list)
    copy_buffer_bytes: int = 0
    bus_copies: list[float] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    warmup: WarmUpTimes = field(default_factory=WarmUpTimes)
    peak_bytes: int = 0
    history_bytes: int = 0
    host_bytes: int = 0
    memory_bytes: int = 0


class StepRun:
    """See the module text.

    Args:
        model: In eval mode.
        setting: What is benchmarked.
        execution, on_stage, on_progress: See `benchmark_decode`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        setting: Setting,
        execution: Execution,
        on_stage: Callable[[str], None],
        on_progress: Callable[[str], None],
    ) -> None:
        self._model = model
        self._setting = setting
        self._options = setting.options
        self._on_stage, self._on_progress = on_stage, on_progress
        self._engine = Engine(model)
        if execution != "auto":
            self._engine.runner = Runner(model, self._engine.shape, execution=execution)
        self._measured = Measured()

    def measure(self, rounds: int) -> Measured:
        """Fill the histories, warm up, and take samples."""
        measured, options = self._measured, self._options
        device = self._engine.shape.device
        tokens = self._setting.context_tokens
        self._on_stage(f"Filling {options.batch} x {tokens:,} tokens of history at random")
        store = self._engine.runner.host.store if self._setting.on_host else None
        histories = Histories(self._engine.shape, self._setting, store)
        histories.fill(self._on_progress)
        wanted = [name for name in DEFAULT_ARMS if name in options.arms]
        arms = {name: self._arm(name, histories) for name in wanted}
        own = {name: arm for name, arm in arms.items() if arm.own_attention}
        report = self._warm_up(own, histories)
        started = time.perf_counter()
        self._on_stage("Running every arm once")
        self._first_pass(own)
        measured.peak_bytes = peak_bytes(device)
        measured.history_bytes = histories.history_bytes
        measured.host_bytes = histories.host_bytes
        measured.memory_bytes = histories.memory_bytes
        give_back(device)
        probe = CopyProbe(device, options.copy_bytes)
        measured.copy_buffer_bytes = probe.buffer_bytes
        bus = BusProbe(device, options.copy_bytes) if self._setting.on_host else None
        self._first_generate(arms, histories)
        seconds = time.perf_counter() - started
        self._rounds(rounds, arms, probe, bus)
        histories.check()
        measured.warmup = self._warm_up_times(report, seconds)
        return measured

    def _rounds(
        self, rounds: int, arms: dict[str, TimedArm], probe: CopyProbe, bus: BusProbe | None
    ) -> None:
        self._on_stage(f"Timing {', '.join(arms)}")
        self._measured.samples = {name: [] for name in arms}
        for one in (probe, bus):
            if one is not None:
                one.sample()
        for index in range(rounds):
            self._measured.copies.append(probe.sample())
            if bus is not None:
                self._measured.bus_copies.append(bus.sample())
            for name, arm in arms.items():
                self._on_progress(f"round {index + 1} of {rounds}, {name}")
                self._measured.samples[name].append(self._sample(arm))

    def _first_pass(self, arms: dict[str, TimedArm]) -> None:
        for name, arm in arms.items():
            self._on_progress(name)
            self._sample(arm)

    def _first_generate(self, arms: dict[str, TimedArm], histories: Histories) -> None:
        """Its copy of the histories comes last, and only where it finds room."""
        if "generate" not in arms:
            return
        reason = no_room_for_generate(histories, self._engine.shape.device)
        if reason is None:
            self._first_pass({"generate": arms["generate"]})
        else:
            del arms["generate"]
            self._measured.left_out["generate"] = reason

    def _sample(self, arm: TimedArm) -> Sample:
        switch = AttentionSwitch.of(self._model)
        with switch.switched_on(self._model) if arm.own_attention else nullcontext():
            return arm.sample()

    def _warm_up(self, arms: dict[str, TimedArm], histories: Histories) -> WarmUpReport:
        """Compile and capture what the arms need, by running them: what `Engine.warmup` does, on
        the benchmark's own sequences and for no other batch."""

        def play() -> None:
            self._first_pass(arms)
            options = self._options
            if "verify" in arms and options.verify_tokens is None:
                # Their number adapts: blocks of every size have to be there.
                for drafts in _block_drafts(LONGEST_FREE_SEGMENT):
                    fixed = replace(options, verify_tokens=drafts, acceptance=1.0)
                    self._first_pass({"verify": self._loop("verify", histories, fixed, drafts + 1)})

        self._on_stage("Compiling and capturing steps")
        return prepare(
            self._engine.runner,
            self._setting.context_tokens + self._setting.room_tokens,
            play,
            self._on_progress,
            compiled=self._options.compiled,
            early_launch=self._options.early_launch,
        )

    def _warm_up_times(self, report: WarmUpReport, first_pass_seconds: float) -> WarmUpTimes:
        """The report, as things stand when everything has been timed."""
        programs = self._engine.runner.programs
        if programs is None:
            return WarmUpTimes(report.seconds, first_pass_seconds, reason=report.reason)
        return WarmUpTimes(
            report.seconds,
            first_pass_seconds,
            programs.compiles,
            programs.captures,
            programs.reason,
        )

    def _arm(self, name: str, histories: Histories) -> TimedArm:
        options, runner = self._options, self._engine.runner
        kind = runner.shape.device.type
        steps = _STEPS.get(name, {}).get(kind, 1)
        if name == "generate":
            return GenerateArm(self._model, histories, steps)
        config = arm_config(self._setting.config, name, options)
        if name in LOOPS:
            tokens = steps if name == "dense" else options.sample_tokens(kind)
            return self._loop(name, histories, options, tokens)
        if name == "selection":
            block = options.segment_tokens + 1
            return SelectionAlone(runner, histories, config, block, options.longest_segment())
        steps = min(steps, options.segment_tokens) if name == "fast" else steps
        made = SlowSteps if name == "slow" else FastSteps
        return made(runner, histories, config, steps, options.longest_segment())

    def _loop(
        self, name: str, histories: Histories, options: DecodeOptions, tokens: int
    ) -> TimedArm:
        config = arm_config(self._setting.config, name, options)
        runner = self._engine.runner
        return DecodingArm(runner, histories, config, tokens, options.acceptance, options.seed)


def _block_drafts(longest: int) -> list[int]:
    """Numbers of drafts that bring a block of every size up to the longest."""
    return sorted({min(size, longest) for size in range(_BLOCK_STEP - 1, longest + 8, _BLOCK_STEP)})
