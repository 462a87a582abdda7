"""`sfi-agent eval`: how far slow-fast decoding is from dense, on any checkpoint and text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfi_agent.cli.choices import Color, Device, Dtype, Json, check_output_file
from sfi_agent.cli.models import EMBEDDED, EMBEDDED_THREADS, cpu_threads, is_local, load_engine
from sfi_agent.cli.output import Progress, make_console, print_json
from sfi_agent.config import SessionConfig
from sfi_agent.errors import ConfigError, explain
from sfi_agent.presets import PRESETS

if TYPE_CHECKING:
    from rich.console import Console

    from sfi_agent.evaluation.fidelity import PolicyFidelity, Window, WindowSizes
    from sfi_agent.session.engine import Engine

__all__ = ["evaluate"]

_SOURCES = ("stdlib", "logs")

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=f"Directory or Hub id of a checkpoint, or '{EMBEDDED}'."),
]
Configs = Annotated[
    list[Path] | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="A policy as .yaml, .yml or .json file; may be repeated.",
        show_default=False,
    ),
]
Presets = Annotated[
    list[str] | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help=f"A named policy, may be repeated: {', '.join(PRESETS)}. Without --config and "
        "--preset: all of them.",
        show_default=False,
    ),
]
SelectedTokens = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        min=0,
        help="Budget per KV head, in place of each policy's own.",
        show_default=False,
    ),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text", metavar="FILE", help="Measure on this text (UTF-8).", show_default=False
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Text without a file: stdlib (source of the Python standard library) or logs "
        "(generated office logs with a question). Default: stdlib, for the embedded model logs.",
        show_default=False,
    ),
]
PromptTokens = Annotated[
    int, typer.Option(metavar="TOKENS", min=2, help="History of a window; logs: about so much.")
]
ContinuationTokens = Annotated[
    int, typer.Option(metavar="TOKENS", min=1, help="Tokens behind it that are compared.")
]
Samples = Annotated[int, typer.Option(metavar="NUMBER", min=1, help="Windows.")]
ProbeEvery = Annotated[
    int,
    typer.Option(
        metavar="STEPS",
        min=1,
        help="Probe attention in every n-th fast step; a probed step costs about a dense one.",
    ),
]
Seed = Annotated[
    int, typer.Option(metavar="NUMBER", min=0, help="Which modules or logs; no effect on --text.")
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the JSON document here.")
]


def evaluate(
    model: Model,
    config_files: Configs = None,
    presets: Presets = None,
    selected_tokens: SelectedTokens = None,
    text: TextFile = None,
    source: Source = None,
    prompt_tokens: PromptTokens = 8192,
    continuation_tokens: ContinuationTokens = 128,
    samples: Samples = 4,
    probe_every: ProbeEvery = 4,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
    as_json: Json = False,
    color: Color = True,
) -> None:
    """Measure how far policies are from dense decoding on a checkpoint, without any labels.

    Each window's history is prefilled once and forked per policy. On the same ids: KL and top-1
    agreement of next-token distributions, attention mass recalled per layer and head, error of the
    attention output. Freely: how long greedy output stays that of dense. Ends with a verdict per
    policy and what to change.
    """
    from sfi_agent.evaluation.fidelity import WindowSizes

    # Everything that can be wrong is found out before the measurement, not after it.
    policies = _policies(config_files or [], presets or [], selected_tokens)
    chosen = _source(model, text, source)
    sizes = WindowSizes(prompt_tokens, continuation_tokens, samples)
    check_output_file("--out", out)
    threads = EMBEDDED_THREADS if model == EMBEDDED else None
    with Progress(color=color) as progress, cpu_threads(threads):
        if is_local(model):
            progress.stage(f"Loading {model}")
        engine = load_engine(model, device=device, dtype=dtype)
        progress.stage("Cutting text into windows")
        windows, text_json = _windows(engine, text, chosen, sizes, seed)
        found = _measure(engine, windows, policies, sizes, probe_every, progress)
    document = {
        "model": _model(model, engine),
        "source": text_json,
        "settings": {
            **asdict(sizes),
            "selected_tokens": selected_tokens,
            "probe_every_steps": probe_every,
        },
        "thresholds": _thresholds(),
        "policies": {item.policy: item.as_json() for item in found},
    }
    _deliver(document, found, out, None if as_json else make_console(color=color))


def _deliver(
    document: dict[str, Any],
    found: list[PolicyFidelity],
    out: Path | None,
    console: Console | None,
) -> None:
    """Write the document, and print it or, where there is a console, the screen."""
    if out is not None:
        text = json.dumps(document, indent=2, allow_nan=False)
        out.write_text(text + "\n", encoding="utf-8")
    if console is None:
        print_json(document)
        return
    from sfi_agent.cli.eval_screen import EvalScreen

    EvalScreen(console, document, found).show()


def _policies(
    files: list[Path], presets: list[str], selected_tokens: int | None
) -> dict[str, SessionConfig]:
    """The policies by the names they are shown under."""
    named = [(file.stem, SessionConfig.load(file)) for file in files]
    chosen = presets if presets or files else list(PRESETS)
    named += [(name, SessionConfig.preset(name)) for name in chosen]
    policies: dict[str, SessionConfig] = {}
    for name, config in named:
        if name in policies:
            raise ConfigError(
                explain(
                    "named the policies to measure",
                    got=f"{name!r} twice",
                    allowed="each preset once, and files whose names differ",
                )
            )
        if selected_tokens is not None:
            config = config.replace(memory={"selected_tokens": selected_tokens})
        policies[name] = config
    return policies


def _source(model: str, text: Path | None, source: str | None) -> str:
    """Which generated text is used; checked, also where a file makes it unused."""
    if text is not None and source is not None:
        raise ConfigError(
            explain(
                "chose the text twice",
                got=f"--text {text} and --source {source}",
                allowed="one of the two",
            )
        )
    if source is None:
        return "logs" if model == EMBEDDED else "stdlib"
    if source not in _SOURCES:
        raise ConfigError(explain("set --source", got=repr(source), allowed=", ".join(_SOURCES)))
    return source


def _windows(
    engine: Engine, text: Path | None, source: str, sizes: WindowSizes, seed: int
) -> tuple[list[Window], dict[str, Any]]:
    """The windows, and what the document says about their text."""
    from sfi_agent.evaluation import fidelity

    if text is not None:
        windows, name = fidelity.file_windows(engine, text, sizes), str(text)
    elif source == "logs":
        windows, name = fidelity.log_windows(engine, sizes, seed=seed), "generated office logs"
    else:
        windows = fidelity.standard_library_windows(engine, sizes, seed=seed)
        name = fidelity.standard_library_name()
    shown = [
        {
            "origin": window.origin,
            "prompt_tokens": len(window.prompt_ids),
            "text_tokens": len(window.text_ids),
        }
        for window in windows
    ]
    return windows, {"name": name, "seed": None if text is not None else seed, "windows": shown}


def _measure(
    engine: Engine,
    windows: list[Window],
    policies: dict[str, SessionConfig],
    sizes: WindowSizes,
    probe_every: int,
    progress: Progress,
) -> list[PolicyFidelity]:
    from sfi_agent.evaluation.fidelity import measure_fidelity

    shown = ""

    def report(text: str) -> None:
        nonlocal shown
        window, _, what = text.partition(": ")
        if window != shown:
            shown = window
            progress.stage(f"Measuring {window}")
        progress.detail(what)

    return measure_fidelity(
        engine,
        windows,
        policies,
        continuation_tokens=sizes.continuation_tokens,
        probe_every_steps=probe_every,
        on_progress=report,
    )


def _model(name: str, engine: Engine) -> dict[str, Any]:
    return {
        "name": name,
        "class": type(engine.model).__name__,
        "parameters": sum(item.numel() for item in engine.model.parameters()),
        "layers": engine.shape.num_layers,
        "dtype": str(engine.shape.dtype).removeprefix("torch."),
        "device": str(engine.shape.device),
    }


def _thresholds() -> dict[str, float]:
    from sfi_agent.evaluation.fidelity import verdict

    return {
        "safe_agreement": verdict.SAFE_AGREEMENT,
        "safe_kl_p99_nats": verdict.SAFE_KL_P99_NATS,
        "caution_agreement": verdict.CAUTION_AGREEMENT,
        "caution_kl_mean_nats": verdict.CAUTION_KL_MEAN_NATS,
        "minimum_tokens": verdict.MINIMUM_TOKENS,
        "whole_history_share": verdict.WHOLE_HISTORY_SHARE,
    }
