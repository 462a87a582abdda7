"""`sfi-agent bench decode`: whole decodings and their steps, timed on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sfi_agent.cli.bench_table import print_decode
from sfi_agent.cli.choices import (
    Color,
    Compile,
    ConfigFile,
    Device,
    EarlyLaunch,
    Json,
    PresetName,
    check_output_file,
    choose_config,
)
from sfi_agent.cli.machine import command_line, machine_facts
from sfi_agent.cli.output import Progress, make_console, print_json
from sfi_agent.errors import ConfigError, explain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sfi_agent.config import SessionConfig
    from sfi_agent.evaluation.decode_benchmark import DecodeBenchmark, DecodeOptions

__all__ = ["decode"]

_ARM_NAMES = "generate, dense, slow, fast, observe, rectify, verify, selection, kernels"

Shape = Annotated[
    str, typer.Option(metavar="NAME", help="Published model shape, with random weights.")
]
Context = Annotated[
    int,
    typer.Option(metavar="TOKENS", min=1, help="Tokens of each history, filled at random."),
]
WeightDtype = Annotated[str, typer.Option(metavar="NAME", help="bfloat16, float32 or float16.")]
Batch = Annotated[
    int, typer.Option(metavar="NUMBER", min=1, help="Sequences that decode together.")
]
Segment = Annotated[
    int,
    typer.Option(
        metavar="TOKENS", min=1, help="Fast tokens between two slow steps of observe and rectify."
    ),
]
VerifySegment = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        min=1,
        help="Drafts per verifying step; else their number adapts, up to 32.",
        show_default=False,
    ),
]
Acceptance = Annotated[
    float,
    typer.Option(
        metavar="PROBABILITY",
        min=0.0,
        max=1.0,
        help="How probable it is that a drafted token stands.",
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        min=0,
        help="Selected tokens per layer and KV head; else what the policy says.",
        show_default=False,
    ),
]
HistoryDevice = Annotated[
    Literal["same", "cpu"] | None,
    typer.Option(
        metavar="NAME",
        help="Where histories are kept: same (with the model) or cpu; else what the policy says.",
        show_default=False,
    ),
]
Arms = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help=f"Arms to time, with commas: {_ARM_NAMES}. Else all but the last.",
        show_default=False,
    ),
]
Rounds = Annotated[int, typer.Option(metavar="NUMBER", min=2, help="Timed samples of each arm.")]
Cycles = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        min=1,
        help="Segments in a sample of observe, rectify and verify; else 3 on CUDA and 1 on a CPU.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the JSON document here.")
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also draw the times, as an .svg file.")
]


def decode(
    shape: Shape = "qwen3-0.6b",
    context: Context = 32768,
    batch: Batch = 1,
    segment: Segment = 32,
    verify_segment: VerifySegment = None,
    acceptance: Acceptance = 0.95,
    budget: Budget = None,
    history_device: HistoryDevice = None,
    arms: Arms = None,
    dtype: WeightDtype = "bfloat16",
    device: Device = "auto",
    rounds: Rounds = 5,
    cycles: Cycles = None,
    compile: Compile = True,
    early_launch: EarlyLaunch = True,
    config_file: ConfigFile = None,
    preset: PresetName = None,
    out: Out = None,
    plot: Plot = None,
    as_json: Json = False,
    color: Color = True,
) -> None:
    """Time decodings of several policies over one long history, in one run, beside their roof.

    The arms: generate of transformers; dense decoding; slow and fast steps alone; observe, rectify
    and verify as sessions run them; selection alone; kernels alone.
    """
    from sfi_agent.evaluation.decode_benchmark import DEFAULT_ARMS, DecodeOptions

    config = choose_config(config_file, preset)
    if budget is not None:
        config = config.replace(memory={"selected_tokens": budget})
    if history_device is not None:
        config = config.replace(history={"device": history_device})
    check_output_file("--out", out)
    check_output_file("--plot", plot, suffix=".svg")
    chosen = _chosen_arms(arms, DEFAULT_ARMS)
    sizes = (batch, segment, verify_segment, acceptance, chosen, cycles)
    options = DecodeOptions(*sizes, compiled=compile, early_launch=early_launch)
    with Progress(color=color) as progress:
        progress.stage(f"Decode benchmark of {shape} at {context:,} tokens x {batch}")
        result = _measure(shape, context, dtype, device, rounds, config, options, progress)
    document = {
        "shape": shape,
        "command": command_line(),
        "machine": machine_facts(result.device, result.threads),
        "config": config.resolved(),
        **result.as_json(),
    }
    if out is not None:
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        from sfi_agent.evaluation.decode_benchmark import plot_svg

        plot.write_text(plot_svg(document), encoding="utf-8")
    if as_json:
        print_json(document)
    else:
        print_decode(make_console(color=color), shape, result, document["machine"])


def _chosen_arms(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """Names between commas, each once; unknown ones are refused later, with all that exist."""
    if text is None:
        return default
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _measure(
    shape: str,
    context_tokens: int,
    dtype: str,
    device: str,
    rounds: int,
    config: SessionConfig,
    options: DecodeOptions,
    progress: Progress,
) -> DecodeBenchmark:
    from sfi_agent.evaluation.decode_benchmark import (
        ModelSizes,
        benchmark_decode,
        position_room,
    )
    from sfi_agent.evaluation.random_models import build_random_model, outline_model
    from sfi_agent.session.checkpoint import find_device, find_dtype

    options.check()
    place, number_type = find_device(device), find_dtype(dtype)
    if isinstance(number_type, str):
        raise ConfigError(
            explain(
                "benchmarked a model of random weights",
                got=f"dtype {dtype!r}",
                allowed="float32, bfloat16, float16: there is no checkpoint to take it from",
            )
        )
    limit = context_tokens + position_room(options)

    def make_model() -> PreTrainedModel:
        return build_random_model(shape, device=place, dtype=number_type, context_tokens=limit)

    outline = outline_model(shape, dtype=number_type, context_tokens=limit)
    return benchmark_decode(
        make_model,
        context_tokens,
        config,
        rounds=rounds,
        options=options,
        planned=(ModelSizes.of(outline), place),
        on_stage=progress.stage,
        on_progress=progress.detail,
    )
