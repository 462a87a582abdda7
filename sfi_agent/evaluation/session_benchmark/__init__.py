"""What it costs to keep sessions: forks, marks, rewinds, saves, loads, and a turn that goes on."""

from __future__ import annotations

from sfi_agent.evaluation.session_benchmark.benchmark import benchmark_sessions
from sfi_agent.evaluation.session_benchmark.checkpoint_outline import outline_checkpoint
from sfi_agent.evaluation.session_benchmark.options import ARMS, SessionOptions
from sfi_agent.evaluation.session_benchmark.records import (
    SecondTurn,
    SessionBenchmark,
    Target,
    Timing,
    TurnCost,
)
from sfi_agent.evaluation.session_benchmark.setting import LongPart, TurnPart, position_room

__all__ = [
    "ARMS",
    "LongPart",
    "SecondTurn",
    "SessionBenchmark",
    "SessionOptions",
    "Target",
    "Timing",
    "TurnCost",
    "TurnPart",
    "benchmark_sessions",
    "outline_checkpoint",
    "position_room",
]
