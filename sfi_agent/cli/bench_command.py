"""`sfi-agent bench decode`: what dense, slow and fast steps cost on this machine."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfi_agent.cli.choices import (
    Color,
    ConfigFile,
    Device,
    Json,
    PresetName,
    choose_config,
)
from sfi_agent.cli.output import Progress, make_console, print_json
from sfi_agent.cli.quantities import bytes_text, count_text, seconds_text
from sfi_agent.errors import ConfigError, explain

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from sfi_agent.config import SessionConfig
    from sfi_agent.evaluation.decode_benchmark import DecodeBenchmark

__all__ = ["decode"]

_ROOM_TOKENS = 64


Shape = Annotated[
    str, typer.Option(metavar="NAME", help="Published model shape, with random weights.")
]
Context = Annotated[
    int, typer.Option(metavar="TOKENS", min=1, help="Tokens of history, filled at random.")
]
WeightDtype = Annotated[str, typer.Option(metavar="NAME", help="bfloat16, float32 or float16.")]
Rounds = Annotated[
    int,
    typer.Option(
        metavar="NUMBER", min=2, help="Timed rounds of one dense, one slow and one fast step."
    ),
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the JSON document here.")
]


def decode(
    shape: Shape = "qwen3-0.6b",
    context: Context = 32768,
    dtype: WeightDtype = "bfloat16",
    device: Device = "auto",
    rounds: Rounds = 15,
    config_file: ConfigFile = None,
    preset: PresetName = None,
    out: Out = None,
    as_json: Json = False,
    color: Color = True,
) -> None:
    """Time dense, slow and fast steps over a long history, in one run, and print the table."""
    config = choose_config(config_file, preset)
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        # Found out before the measurement, not after it.
        raise ConfigError(
            explain("set --out", got=str(out), allowed="a file in a folder that exists")
        )
    with Progress(color=color) as progress:
        progress.stage(f"Decode benchmark of {shape} at {context:,} tokens")
        result = _measure(shape, context, dtype, device, rounds, config, progress)
    document = {
        "shape": shape,
        "machine": _machine(result),
        "config": config.resolved(),
        **result.as_json(),
    }
    if out is not None:
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(document)
    else:
        _print(make_console(color=color), shape, result, document["machine"])


def _measure(
    shape: str,
    context_tokens: int,
    dtype: str,
    device: str,
    rounds: int,
    config: SessionConfig,
    progress: Progress,
) -> DecodeBenchmark:
    from sfi_agent.evaluation.decode_benchmark import benchmark_decode
    from sfi_agent.evaluation.random_models import build_random_model
    from sfi_agent.session.checkpoint import find_device, find_dtype

    place, number_type = find_device(device), find_dtype(dtype)
    if isinstance(number_type, str):
        raise ConfigError(
            explain(
                "benchmarked a model of random weights",
                got=f"dtype {dtype!r}",
                allowed="float32, bfloat16, float16: there is no checkpoint to take it from",
            )
        )

    def make_model() -> PreTrainedModel:
        # A few tokens are appended behind the context while steps are timed.
        limit = context_tokens + _ROOM_TOKENS
        return build_random_model(shape, device=place, dtype=number_type, context_tokens=limit)

    return benchmark_decode(
        make_model, context_tokens, config, rounds=rounds, on_progress=progress.detail
    )


def _machine(result: DecodeBenchmark) -> dict[str, Any]:
    import torch

    on_cuda = result.device.startswith("cuda")
    return {
        "device": result.device,
        "device_name": torch.cuda.get_device_name(result.device) if on_cuda else _processor(),
        "threads": result.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _print(console: Console, shape: str, result: DecodeBenchmark, machine: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(
        f"{shape}, {result.dtype}, history of {result.context_tokens:,} tokens, fast steps read "
        f"{result.memory_tokens:,}",
        style="bold",
    )
    console.print(
        f"{machine['device_name']}, {machine['device']}, "
        f"{count_text(machine['threads'], 'thread')}, "
        f"torch {machine['torch']}, Python {machine['python']}",
        style="dim",
    )
    table = Table(box=SIMPLE_HEAD)
    for name in ("step", "median", "quartiles", "rounds", "against dense"):
        table.add_column(name, justify="left" if name == "step" else "right", no_wrap=True)
    dense = result.arms["dense"].median_seconds
    for name, arm in result.arms.items():
        low, high = arm.quartile_seconds
        table.add_row(
            name,
            seconds_text(arm.median_seconds),
            f"{seconds_text(low)} - {seconds_text(high)}",
            str(arm.rounds),
            f"{arm.median_seconds / dense:.2f} x",
        )
    console.print(table)
    console.print(f"A fast step is {result.dense_over_fast:.1f} times as fast as a dense one.")
    console.print(
        f"Bytes: weights {bytes_text(result.weight_bytes)}, history "
        f"{bytes_text(result.history_bytes)}, memory {bytes_text(result.memory_bytes)}; "
        f"peak {result.peak_over_needed:.2f} times their sum."
    )
