"""Builds the long session and takes all samples on it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sfi_agent.evaluation.decode_benchmark.memory_use import give_back
from sfi_agent.evaluation.session_benchmark.quick_arms import QuickArms
from sfi_agent.evaluation.session_benchmark.records import (
    ForkCost,
    LoadCost,
    LongSessionFacts,
    SaveCost,
    Timing,
    TurnCost,
)
from sfi_agent.evaluation.session_benchmark.saving import DiskRun
from sfi_agent.evaluation.session_benchmark.setting import position_room
from sfi_agent.evaluation.session_benchmark.stopwatch import Stopwatch
from sfi_agent.evaluation.session_benchmark.synthetic_chat import LongSession, open_long_session
from sfi_agent.evaluation.session_benchmark.turn_clock import turn_cost
from sfi_agent.session.engine import Engine

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig
    from sfi_agent.evaluation.session_benchmark.options import SessionOptions
    from sfi_agent.evaluation.session_benchmark.setting import LongPart

__all__ = ["LongMeasured", "LongRun"]

_FOLDER_PREFIX = "sfi-agent-bench-"


@dataclass(slots=True)
class LongMeasured:
    """What was measured on the long session; see `SessionBenchmark`."""

    times: dict[str, Timing] = field(default_factory=dict)
    forks: dict[str, ForkCost] = field(default_factory=dict)
    facts: LongSessionFacts | None = None
    turn: TurnCost | None = None
    save: SaveCost | None = None
    load: LoadCost | None = None

    def add(self, samples: Mapping[str, list[float]]) -> None:
        """The samples of some arms are complete."""
        self.times |= {arm: Timing.of(seconds) for arm, seconds in samples.items()}


class LongRun:
    """See the module text.

    Args:
        part: What is measured.
        options: How often.
        on_stage, on_progress: See `benchmark_sessions`.
    """

    def __init__(
        self,
        part: LongPart,
        options: SessionOptions,
        on_stage: Callable[[str], None],
        on_progress: Callable[[str], None],
    ) -> None:
        self._part = part
        self._options = options
        self._on_stage, self._on_progress = on_stage, on_progress
        self._found = LongMeasured()

    def measure(self) -> LongMeasured:
        """Take all samples; nothing stays in memory or on the disk."""
        if "save" not in self._options.arms:
            self._measure(None)
            return self._found
        with tempfile.TemporaryDirectory(prefix=_FOLDER_PREFIX, dir=self._part.directory) as folder:
            self._measure(Path(folder))
        return self._found

    def _measure(self, folder: Path | None) -> None:
        options = self._options
        self._on_stage("Building the model")
        engine = Engine(self._part.make_model(), self._part.tokenizer)
        watch = Stopwatch(engine.shape.device)
        long = self._open(engine)
        disk = None
        with long.session:
            if {"fork", "rewind", "mark"} & set(options.arms):
                self._quick(long, watch)
            if folder is not None:
                expected = self._part.context_tokens * self._part.sizes.token_bytes
                disk = DiskRun(folder, expected, watch, self._on_progress)
                self._on_stage("Saving, in turns with plain files of the same size")
                disk.save(long.session, options.save_rounds)
        if disk is not None:
            # The one that is loaded takes the place of the one that was saved.
            give_back(engine.shape.device)
            self._on_stage("Loading, in turns with plain reads")
            self._found.load = disk.load(engine, options.save_rounds)
            self._found.save, self._found.turn = disk.save_cost(), turn_cost(disk.turns)
            self._found.add(disk.samples)

    def _open(self, engine: Engine) -> LongSession:
        part, options, sizes = self._part, self._options, self._part.sizes
        self._on_stage(f"Filling {part.context_tokens:,} tokens of history at random")
        layout = part.layout(options)
        long = open_long_session(
            engine, self._config(), layout, sizes, options.seed, self._on_progress
        )
        self._found.facts = LongSessionFacts(
            context_tokens=part.context_tokens,
            generated_tokens=long.generated_tokens,
            long_answer_tokens=long.long_answer_tokens,
            history_bytes=part.context_tokens * sizes.token_bytes,
            weight_bytes=sizes.weight_bytes,
            dtype=str(sizes.dtype).removeprefix("torch."),
            nested_forks=options.nested_forks,
            rewinds={},
        )
        return long

    def _config(self) -> SessionConfig:
        part, options = self._part, self._options
        return part.config.replace(
            # A session of known length, so that nothing is moved while it is filled.
            history={"reserve_tokens": part.context_tokens + position_room(options)},
            sampling={"max_new_tokens": options.more_tokens},
        )

    def _quick(self, long: LongSession, watch: Stopwatch) -> None:
        options, found = self._options, self._found
        quick = QuickArms(long, self._part.other_config, options.nested_forks, watch)
        try:
            self._on_stage("Running every arm once")
            if "fork" in options.arms:
                found.forks = {name: quick.fork_cost(fork) for name, fork in quick.forks().items()}
            samplers = quick.samplers(options.arms)
            for sample in samplers.values():
                sample()
            self._on_stage(f"Timing {', '.join(samplers)}")
            samples: dict[str, list[float]] = {name: [] for name in samplers}
            for index in range(options.rounds):
                for name, sample in samplers.items():
                    self._on_progress(f"round {index + 1} of {options.rounds}, {name}")
                    samples[name].append(sample())
            found.add(samples)
        finally:
            quick.close()
        if "rewind" in options.arms and found.facts is not None:
            present = len(long.session.token_ids)
            for name, ids in quick.rewinds().items():
                found.facts.rewinds[name] = (present, ids)
