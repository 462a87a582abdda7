"""Measure what keeping sessions costs: forks, rewinds, marks, saves, loads, and a second turn.

Everything happens in one run. What is compared takes turns, so that drift of the machine hits all
alike; medians and quartiles are reported.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sfi_agent.evaluation.decode_benchmark.memory_use import give_back
from sfi_agent.evaluation.session_benchmark.long_run import LongMeasured, LongRun
from sfi_agent.evaluation.session_benchmark.options import SessionOptions
from sfi_agent.evaluation.session_benchmark.records import SecondTurn, SessionBenchmark
from sfi_agent.evaluation.session_benchmark.second_turn import (
    TurnPlan,
    measure_second_turn,
    plan_turn,
)
from sfi_agent.evaluation.session_benchmark.setting import LongPart, TurnPart
from sfi_agent.evaluation.session_benchmark.targets import targets_of

__all__ = ["benchmark_sessions"]

Say = Callable[[str], None]


def _silent(_: str) -> None:
    return None


def benchmark_sessions(
    device: torch.device,
    long: LongPart | None,
    turn: TurnPart | None,
    options: SessionOptions | None = None,
    *,
    on_stage: Say = _silent,
    on_progress: Say = _silent,
) -> SessionBenchmark:
    """Measure the wanted arms.

    Args:
        device: Where models are.
        long: What forks, rewinds, marks and saves are measured on; None where none of them is
            wanted.
        turn: What turn 2 is measured on; None where it is not wanted.
        options: What is timed, and how often; None takes the defaults.
        on_stage: Told what begins.
        on_progress: Told how far it is.

    Raises:
        InputError: Numbers without meaning, or not enough memory or disk: nothing was built.
        StoreError: The session cannot be saved or loaded.
        TemplateError: A tokenizer has no chat template.
    """
    options = options or SessionOptions()
    options.check()
    disk = long.check(device, options) if long is not None else None
    plan = turn.check(device, options) if turn is not None else None
    found = LongMeasured()
    if long is not None:
        found = LongRun(long, options, on_stage, on_progress).measure()
        give_back(device)
    second = None
    if turn is not None and plan is not None:
        second = _second_turn(turn, plan, options, on_stage, on_progress)
    return SessionBenchmark(
        device=str(device),
        threads=torch.get_num_threads(),
        times=found.times,
        forks=found.forks,
        long=found.facts,
        long_turn=found.turn,
        save=found.save,
        load=found.load,
        second_turn=second,
        disk=disk,
        targets=targets_of(found.times, found.save, found.turn, second),
    )


def _second_turn(
    part: TurnPart, plan: TurnPlan, options: SessionOptions, on_stage: Say, on_progress: Say
) -> SecondTurn:
    on_stage(f"Turn 2 of {part.model} behind {plan.prompt_tokens:,} tokens")
    with part.threads():
        engine = part.make_engine()
        # Some models take less than their configuration says at first sight.
        limit = min(part.limit_tokens, engine.shape.context_limit_tokens)
        plan = plan_turn(options.turn_context_tokens, limit, options.turn_tokens)
        return measure_second_turn(
            engine,
            part.model,
            part.config,
            plan,
            rounds=options.turn_rounds,
            turn_tokens=options.turn_tokens,
            seed=options.seed,
            on_progress=on_progress,
        )
