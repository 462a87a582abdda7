"""Preparing steps before they are needed: compiling, capturing, and saying what is going on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sfi_agent.engine.compile_backend import early_step_backend, step_backend
from sfi_agent.engine.runner import Runner

__all__ = ["WarmUpReport", "prepare"]


@dataclass(frozen=True, slots=True)
class WarmUpReport:
    """What a warm-up did.

    Attributes:
        seconds: How long it took.
        compiled: Whether the model's layers are compiled in captured steps.
        captured: Whether single tokens and blocks run as captured steps.
        reason: Why not, where something was not prepared; "" otherwise.
    """

    seconds: float
    compiled: bool
    captured: bool
    reason: str = ""


def prepare(
    runner: Runner,
    context_tokens: int,
    play: Callable[[], None],
    on_progress: Callable[[str], None],
    *,
    compiled: bool,
    early_launch: bool = True,
) -> WarmUpReport:
    """Let a decoding of every kind of step happen once, compiled.

    Args:
        runner: Whose steps are prepared.
        context_tokens: Longest history they are made for.
        play: Takes every kind of step that is wanted, on short sequences.
        on_progress: Told what is compiled and captured.
        compiled: Whether to compile the model's layers, which takes most of the time.
        early_launch: See `StepBackend`.
    """
    started = time.perf_counter()
    programs = runner.programs
    if programs is None:
        return WarmUpReport(0.0, False, False, "steps are eager on this device or by choice")
    programs.least_capacity_tokens = max(programs.least_capacity_tokens, context_tokens)
    programs.on_progress = on_progress
    try:
        if compiled:
            programs.compile_with(early_step_backend if early_launch else step_backend)
        play()
    finally:
        programs.on_progress = lambda _: None
    return WarmUpReport(
        time.perf_counter() - started, programs.compiles, programs.captures, programs.reason
    )
