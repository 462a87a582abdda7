"""`sfi-agent bench kernels`: what the step kernels cost alone, as a share of a plain copy."""

from __future__ import annotations

import json
import platform
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfi_agent.cli.bench_table import print_columns
from sfi_agent.cli.choices import Color, Device, Json, check_output_file
from sfi_agent.cli.output import Progress, make_console, print_json
from sfi_agent.cli.quantities import bytes_text, count_text
from sfi_agent.errors import ConfigError, explain

if TYPE_CHECKING:
    from rich.console import Console

    from sfi_agent.evaluation.kernel_benchmark import KernelBenchmark, KernelShape, KernelTiming

__all__ = ["kernels"]

_DTYPES = ("bfloat16", "float16", "float32")
_CACHED_MARK = "*"

Heads = Annotated[int, typer.Option(metavar="NUMBER", help="Query heads of a layer.")]
KvHeads = Annotated[int, typer.Option(metavar="NUMBER", help="KV heads of a layer.")]
HeadSize = Annotated[int, typer.Option(metavar="ELEMENTS", help="Size of a key and of a value.")]
Layers = Annotated[int, typer.Option(metavar="NUMBER", help="Layers, for what runs over all.")]
HiddenSize = Annotated[
    int, typer.Option(metavar="ELEMENTS", help="Size of the states between layers.")
]
IntermediateSize = Annotated[int, typer.Option(metavar="ELEMENTS", help="Size of gate and up.")]
Vocabulary = Annotated[int, typer.Option(metavar="TOKENS", help="Outputs of the head.")]
NumberType = Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(_DTYPES)}.")]
Contexts = Annotated[
    list[int] | None,
    typer.Option(
        "--context",
        metavar="TOKENS",
        show_default=False,
        help="Tokens of each history; may be repeated. Default: 131072.",
    ),
]
Batches = Annotated[
    list[int] | None,
    typer.Option(
        "--batch",
        metavar="SEQUENCES",
        show_default=False,
        help="Sequences of a step; may be repeated. Default: 1 and 4.",
    ),
]
MemoryTokens = Annotated[
    int, typer.Option(metavar="TOKENS", help="What a fast step reads: sink, selected and recent.")
]
Queries = Annotated[
    list[int] | None,
    typer.Option(
        "--queries",
        metavar="NUMBER",
        show_default=False,
        help="Queries of a block; may be repeated. Default: 16 and 32.",
    ),
]
Rounds = Annotated[
    int, typer.Option(metavar="NUMBER", min=2, help="Timed rounds of every arm in turn.")
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the JSON document here.")
]


def kernels(
    heads: Heads = 32,
    kv_heads: KvHeads = 8,
    head_size: HeadSize = 128,
    layers: Layers = 36,
    hidden_size: HiddenSize = 2560,
    intermediate_size: IntermediateSize = 9728,
    vocabulary: Vocabulary = 151936,
    dtype: NumberType = "bfloat16",
    contexts: Contexts = None,
    batches: Batches = None,
    memory_tokens: MemoryTokens = 2308,
    queries: Queries = None,
    device: Device = "auto",
    rounds: Rounds = 15,
    out: Out = None,
    as_json: Json = False,
    color: Color = True,
) -> None:
    """Time the step kernels alone, beside torch and a plain copy, in one run.

    Needs an NVIDIA device. Every kernel is compiled and compared with its reference before
    anything is timed; a wrong one is reported instead of its time.
    """
    check_output_file("--out", out)
    shape = _shape(
        dtype,
        (hidden_size, intermediate_size, vocabulary),
        query_heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        layers=layers,
        memory_tokens=memory_tokens,
        block_queries=tuple(queries or (16, 32)),
    )
    with Progress(color=color) as progress:
        result = _measure(shape, contexts or [131072], batches or [1, 4], device, rounds, progress)
    _write(result, out, as_json, color)


def _write(result: KernelBenchmark, out: Path | None, as_json: bool, color: bool) -> None:
    document = _document(result)
    if out is not None:
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(document)
    else:
        _print(make_console(color=color), result)


def _shape(dtype: str, linear: tuple[int, int, int], **numbers: Any) -> KernelShape:
    if dtype not in _DTYPES:
        raise ConfigError(explain("set --dtype", got=repr(dtype), allowed=", ".join(_DTYPES)))
    import torch

    from sfi_agent.evaluation.kernel_benchmark import KernelShape, LinearSizes

    return KernelShape(dtype=getattr(torch, dtype), linear=LinearSizes(*linear), **numbers)


def _measure(
    shape: KernelShape,
    contexts: list[int],
    batches: list[int],
    device: str,
    rounds: int,
    progress: Progress,
) -> KernelBenchmark:
    from sfi_agent.evaluation.kernel_benchmark import benchmark_kernels, refuse_without_kernels
    from sfi_agent.session.checkpoint import find_device

    shape.check(tuple(contexts), tuple(batches))
    place = find_device(device)
    refuse_without_kernels(place, shape)
    return benchmark_kernels(
        shape,
        contexts,
        batches,
        place,
        rounds=rounds,
        on_stage=progress.stage,
        on_progress=progress.detail,
    )


def _document(result: KernelBenchmark) -> dict[str, Any]:
    document = result.as_json()
    document["machine"] = {
        **document["machine"],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return document


def _print(console: Console, result: KernelBenchmark) -> None:
    shape, facts = result.shape, result.facts
    console.print(
        f"{shape.query_heads} heads on {shape.kv_heads} KV heads of {shape.head_size}, "
        f"{shape.dtype_name}, {count_text(shape.layers, 'layer')}, fast steps read "
        f"{shape.memory_tokens:,} tokens",
        style="bold",
    )
    if (linear := shape.linear) is not None:
        console.print(
            f"linear layers of {linear.hidden_size:,} and {linear.intermediate_size:,} elements, "
            f"{linear.vocabulary_tokens:,} tokens in the vocabulary",
            style="bold",
        )
    console.print(
        f"{facts.device_name}, {facts.device}, torch {facts.torch}, Triton {facts.triton}, "
        f"CUDA {facts.cuda}, Python {platform.python_version()}",
        style="dim",
    )
    for (context, batch), timings in groupby(
        result.timings, key=lambda timing: (timing.context_tokens, timing.batch)
    ):
        _print_workload(console, context, batch, list(timings))
    console.print(f"{count_text(len(result.checked), 'arm')} equal to the reference before timing.")
    for one in result.left_out:
        where = count_text(one.batch, "sequence")
        console.print(f"{one.arms}_... left out with {where}: {one.reason}.")
    if any(timing.cached for timing in result.timings):
        console.print(f"{_CACHED_MARK} inputs so small that they may come from the cache.")


def _print_workload(
    console: Console, context: int, batch: int, timings: list[KernelTiming]
) -> None:
    copy = timings[0]
    speed = copy.moved_bytes / copy.median_microseconds / 1e6
    console.print(
        f"\n{context:,} tokens x {count_text(batch, 'sequence')}; a copy of "
        f"{bytes_text(copy.moved_bytes / 2)} runs at {speed:.2f} TB/s"
    )
    names = ("arm", "of", "median us", "quartiles us", "bytes", "of copy", "of torch")
    print_columns(console, names, [_cells(timing) for timing in timings], left=("of",))


def _cells(timing: KernelTiming) -> tuple[str, ...]:
    low, high = timing.quartile_microseconds
    mark = _CACHED_MARK if timing.cached else ""
    return (
        timing.arm,
        timing.unit,
        f"{timing.median_microseconds:,.1f}",
        f"{low:,.1f} - {high:,.1f}",
        bytes_text(timing.moved_bytes),
        f"{timing.copy_share:.2f}{mark}",
        "" if timing.torch_ratio is None else f"{timing.torch_ratio:.2f} x",
    )
