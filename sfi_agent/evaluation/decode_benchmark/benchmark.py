"""Time whole decodings of several policies, and their steps, over one history, in one run.

The history is filled with random keys and values, since a real prefill of that size would take
far longer than the measurement. Arms take turns, so that drift of the machine hits all alike;
medians and quartiles are reported, and conclusions are ratios within the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.decode_benchmark.memory_use import begin_peak, give_back
from sfi_agent.evaluation.decode_benchmark.needs import (
    free_bytes,
    host_bytes,
    needed_bytes,
    refuse_without_room,
)
from sfi_agent.evaluation.decode_benchmark.options import DecodeOptions
from sfi_agent.evaluation.decode_benchmark.records import DecodeBenchmark
from sfi_agent.evaluation.decode_benchmark.rounds import Measured, StepRun
from sfi_agent.evaluation.decode_benchmark.setting import Setting
from sfi_agent.evaluation.decode_benchmark.sizes import ModelSizes
from sfi_agent.evaluation.decode_benchmark.summary import summarize
from sfi_agent.evaluation.kernel_benchmark import (
    KernelShape,
    benchmark_kernels,
    refuse_without_kernels,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sfi_agent.config import SessionConfig
    from sfi_agent.engine.programs.choice import Execution

__all__ = ["benchmark_decode"]

Say = Callable[[str], None]


def _silent(_: str) -> None:
    return None


def benchmark_decode(
    make_model: Callable[[], PreTrainedModel],
    context_tokens: int,
    config: SessionConfig,
    *,
    rounds: int = 5,
    options: DecodeOptions | None = None,
    planned: tuple[ModelSizes, torch.device] | None = None,
    execution: Execution = "auto",
    on_stage: Say = _silent,
    on_progress: Say = _silent,
) -> DecodeBenchmark:
    """Time decodings and steps over histories of random keys and values.

    Args:
        make_model: Builds the model, with `position_room` positions behind the context; called
            here so that its memory is counted.
        context_tokens: Length of each history.
        config: Sizes of the memory, selector and sampling; detectors are left out.
        rounds: Samples per arm, at least 2, after one that is not counted.
        options: What is timed; None takes the defaults.
        planned: Sizes and device of the model that will be built, so that what does not fit is
            refused before.
        execution: See `Runner`.
        on_stage: Told what begins.
        on_progress: Told how far it is.

    Raises:
        InputError: Numbers without meaning, a context too short for the memory to be smaller than
            it, or not enough memory.
    """
    options = options or DecodeOptions()
    options.check()
    if rounds < 2:
        got = f"{rounds} rounds"
        raise InputError(explain("benchmarked decoding", got=got, allowed="2 or more"))
    start_bytes = begin_peak(torch.device("cpu"))
    model = make_model() if planned is None else None
    if model is not None:
        planned = ModelSizes.of(model), model.device
    assert planned is not None
    setting = Setting(planned[0], _numbered(planned[1]), context_tokens, config, options)
    _check(setting, built=model is not None)
    if setting.device.type == "cuda":
        start_bytes = 0
        begin_peak(setting.device)
    on_stage("Building the model")
    run = StepRun(model or make_model(), setting, execution, on_stage, on_progress)
    model = None
    measured = run.measure(rounds)
    del run
    kernels = _kernels(setting, rounds, measured, on_stage, on_progress)
    return summarize(measured, setting, start_bytes, kernels)


def _numbered(device: torch.device) -> torch.device:
    """The device with its number, which the model's own has too."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _check(setting: Setting, *, built: bool) -> None:
    """Refuse what has no meaning or no room; `built` says that the weights are there already."""
    setting.check()
    options = setting.options
    if options.arms == ("kernels",):
        raise InputError(
            explain(
                "benchmarked decoding",
                got="the arm kernels alone",
                allowed="kernels beside other arms",
                remedy="`sfi-agent bench kernels` times them alone",
            )
        )
    if "kernels" in options.arms:
        refuse_without_kernels(setting.device, _kernel_shape(setting))
    parts = needed_bytes(setting)
    if built:
        parts.pop("weights")
    what = f"{setting.context_tokens:,} tokens x {options.batch}"
    refuse_without_room(parts, free_bytes(setting.device), what)
    if setting.on_host:
        free = free_bytes(torch.device("cpu"))
        refuse_without_room(host_bytes(setting), free, f"{what} in host memory")


def _kernel_shape(setting: Setting) -> KernelShape:
    sizes, memory = setting.sizes, setting.config.memory
    return KernelShape(
        query_heads=sizes.query_heads,
        kv_heads=sizes.kv_heads,
        head_size=sizes.head_size,
        layers=sizes.layers,
        dtype=sizes.dtype,
        memory_tokens=memory.sink_tokens + memory.selected_tokens + memory.recent_tokens,
        sink_tokens=memory.sink_tokens,
        recent_tokens=memory.recent_tokens,
    )


def _kernels(
    setting: Setting, rounds: int, measured: Measured, on_stage: Say, on_progress: Say
) -> dict[str, Any] | None:
    """The kernel benchmark behind the steps, whose memory is free again; None if it is not wanted
    or finds no room."""
    if "kernels" not in setting.options.arms:
        return None
    give_back(setting.device)
    try:
        return benchmark_kernels(
            _kernel_shape(setting),
            [setting.context_tokens],
            [setting.options.batch],
            setting.device,
            rounds=rounds,
            on_stage=on_stage,
            on_progress=on_progress,
        ).as_json()
    except InputError as error:
        # The steps have been timed: their numbers are not thrown away for this.
        measured.left_out["kernels"] = str(error)
        return None
