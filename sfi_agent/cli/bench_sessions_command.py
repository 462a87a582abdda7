"""`sfi-agent bench sessions`: what it costs to keep sessions on this machine."""

from __future__ import annotations

import json
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfi_agent.cli.bench_sessions_table import print_sessions
from sfi_agent.cli.choices import (
    Color,
    ConfigFile,
    Device,
    Json,
    PresetName,
    check_output_file,
    choose_config,
)
from sfi_agent.cli.machine import command_line, machine_facts
from sfi_agent.cli.models import EMBEDDED, EMBEDDED_THREADS, cpu_threads, load_engine
from sfi_agent.cli.output import Progress, make_console, print_json
from sfi_agent.errors import ConfigError, explain

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sfi_agent.config import SessionConfig
    from sfi_agent.evaluation.session_benchmark import (
        LongPart,
        SessionBenchmark,
        SessionOptions,
        TurnPart,
    )
    from sfi_agent.session.engine import Engine

__all__ = ["sessions"]

_ARM_NAMES = "fork, rewind, mark, save, turn"
_OTHER_PRESETS = ("exact", "balanced")
"""The policy of the arm fork_policy: the first, or the second where sessions have the first."""

Shape = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Published shape of the long session's model, with random weights."
    ),
]
Context = Annotated[
    int,
    typer.Option(
        metavar="TOKENS", min=1, help="Tokens of the long session, keys and values at random."
    ),
]
AnswerTokens = Annotated[
    int,
    typer.Option(
        metavar="TOKENS", min=1, help="Tokens of each long generated answer in that session."
    ),
]
Nested = Annotated[
    int,
    typer.Option(metavar="NUMBER", min=1, help="Forks above the one that fork_nested forks."),
]
MoreTokens = Annotated[
    int,
    typer.Option(metavar="TOKENS", min=1, help="Tokens generated between two saves."),
]
SaveDirectory = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where to save, in a temporary folder that is removed; else the system's.",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Option(metavar="MODEL", help=f"Model of turn 2: a directory, a Hub id, or '{EMBEDDED}'."),
]
TurnContext = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        min=1,
        help="Tokens of the first prompt before turn 2; else 32768, or what the model takes.",
        show_default=False,
    ),
]
TurnTokens = Annotated[
    int,
    typer.Option(metavar="TOKENS", min=1, help="Most tokens of an answer in turns 1 and 2."),
]
Arms = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help=f"Arms to measure, with commas: {_ARM_NAMES}. Else all.",
        show_default=False,
    ),
]
WeightDtype = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Of the long session: bfloat16, float32 or float16. See --model-dtype."
    ),
]
ModelDtype = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Of turn 2: auto (the checkpoint's own), float32, bfloat16, float16."
    ),
]
Rounds = Annotated[
    int, typer.Option(metavar="NUMBER", min=2, help="Samples of forks, rewinds and marks.")
]
SaveRounds = Annotated[
    int, typer.Option(metavar="NUMBER", min=2, help="Samples of saves and loads.")
]
TurnRounds = Annotated[int, typer.Option(metavar="NUMBER", min=2, help="Samples of turn 2.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the JSON document here.")
]


def sessions(
    shape: Shape = "qwen3-0.6b",
    context: Context = 100_000,
    answer_tokens: AnswerTokens = 8192,
    nested_forks: Nested = 8,
    more_tokens: MoreTokens = 16,
    directory: SaveDirectory = None,
    model: Model = EMBEDDED,
    turn_context: TurnContext = None,
    turn_tokens: TurnTokens = 32,
    arms: Arms = None,
    dtype: WeightDtype = "bfloat16",
    model_dtype: ModelDtype = "auto",
    device: Device = "auto",
    rounds: Rounds = 15,
    save_rounds: SaveRounds = 4,
    turn_rounds: TurnRounds = 3,
    config_file: ConfigFile = None,
    preset: PresetName = None,
    out: Out = None,
    as_json: Json = False,
    color: Color = True,
) -> None:
    """Measure what keeping sessions costs: forks, rewinds, marks, saves, loads, and a second turn.

    All but the second turn on one long session with random keys and values, the second turn on a
    model that computes what it reads. Saves are beside plain writes of the same bytes.
    """
    config = choose_config(config_file, preset)
    check_output_file("--out", out)
    folder = _folder(directory)
    from sfi_agent.evaluation.session_benchmark import ARMS, SessionOptions

    options = SessionOptions(
        arms=ARMS if arms is None else tuple(dict.fromkeys(map(str.strip, arms.split(",")))),
        rounds=rounds,
        save_rounds=save_rounds,
        turn_rounds=turn_rounds,
        answer_tokens=answer_tokens,
        nested_forks=nested_forks,
        more_tokens=more_tokens,
        turn_tokens=turn_tokens,
        turn_context_tokens=turn_context,
    )
    options.check()
    with Progress(color=color) as progress:
        progress.stage("Session benchmark: sizes and room")
        result = _measure(
            options, (shape, context, dtype, folder), (model, model_dtype), device, config, progress
        )
    document = _document(result, shape, config)
    if out is not None:
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(document)
    else:
        print_sessions(make_console(color=color), shape, result, document["machine"])


def _document(result: SessionBenchmark, shape: str, config: SessionConfig) -> dict[str, Any]:
    return {
        "shape": shape if result.long is not None else None,
        "command": command_line(),
        "machine": machine_facts(result.device, result.threads),
        "config": config.resolved(),
        **result.as_json(),
    }


def _folder(directory: Path | None) -> Path:
    if directory is None:
        return Path(tempfile.gettempdir())
    if not directory.is_dir():
        raise ConfigError(
            explain("set --directory", got=str(directory), allowed="a folder that exists")
        )
    return directory


def _measure(
    options: SessionOptions,
    long: tuple[str, int, str, Path],
    second: tuple[str, str],
    device: str,
    config: SessionConfig,
    progress: Progress,
) -> SessionBenchmark:
    from sfi_agent.evaluation.session_benchmark import benchmark_sessions
    from sfi_agent.session.checkpoint import find_device

    place = find_device(device)
    return benchmark_sessions(
        place,
        _long_part(*long, place, config, options) if options.has_history else None,
        _turn_part(*second, device, config) if "turn" in options.arms else None,
        options,
        on_stage=progress.stage,
        on_progress=progress.detail,
    )


def _long_part(
    shape: str,
    context: int,
    dtype: str,
    folder: Path,
    place: torch.device,
    config: SessionConfig,
    options: SessionOptions,
) -> LongPart:
    from sfi_agent.config import SessionConfig
    from sfi_agent.embedded import checkpoint_path
    from sfi_agent.evaluation.decode_benchmark import ModelSizes
    from sfi_agent.evaluation.random_models import build_random_model, outline_model
    from sfi_agent.evaluation.session_benchmark import LongPart, position_room
    from sfi_agent.session.checkpoint import find_dtype, load_tokenizer

    number_type = find_dtype(dtype)
    if isinstance(number_type, str):
        raise ConfigError(
            explain(
                "benchmarked a model of random weights",
                got=f"dtype {dtype!r}",
                allowed="float32, bfloat16, float16: there is no checkpoint to take it from",
            )
        )
    limit = context + position_room(options)

    def make_model() -> PreTrainedModel:
        return build_random_model(shape, device=place, dtype=number_type, context_tokens=limit)

    outline = outline_model(shape, dtype=number_type, context_tokens=limit)
    tokenizer = load_tokenizer(checkpoint_path())
    assert tokenizer is not None, "the embedded checkpoint has one"
    others = [SessionConfig.preset(name) for name in _OTHER_PRESETS]
    return LongPart(
        make_model=make_model,
        tokenizer=tokenizer,
        sizes=ModelSizes.of(outline),
        context_tokens=context,
        config=config,
        other_config=next(other for other in others if other != config),
        directory=folder,
    )


def _turn_part(model: str, dtype: str, device: str, config: SessionConfig) -> TurnPart:
    from sfi_agent.embedded import checkpoint_path
    from sfi_agent.evaluation.decode_benchmark import ModelSizes
    from sfi_agent.evaluation.session_benchmark import TurnPart, outline_checkpoint
    from sfi_agent.session.checkpoint import find_dtype

    source = checkpoint_path() if model == EMBEDDED else model
    outline = outline_checkpoint(source, find_dtype(dtype))

    def threads() -> AbstractContextManager[None]:
        return cpu_threads(EMBEDDED_THREADS if model == EMBEDDED else None)

    def make_engine() -> Engine:
        return load_engine(model, device=device, dtype=dtype)

    return TurnPart(
        model=model,
        make_engine=make_engine,
        sizes=ModelSizes.of(outline),
        limit_tokens=int(outline.config.get_text_config().max_position_embeddings),
        config=config,
        threads=threads,
    )
