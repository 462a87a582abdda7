"""Command line of the comparison.

python -m sfi_agent.evaluation.peers --make-environment DIR
python -m sfi_agent.evaluation.peers --model embedded --tasks office_report_easy
    --context-tokens 4096 --cases 20 --budget 512 --kvpress-python DIR/bin/python --out FILE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sfi_agent.errors import SfiError
from sfi_agent.evaluation.peers.arms import arm_names, choose_arms, memory_tokens
from sfi_agent.evaluation.peers.comparison import Comparison, compare
from sfi_agent.evaluation.peers.environment import PINS, check_environment, make_environment
from sfi_agent.evaluation.peers.questions import FIRST_SEED, PROTOCOLS, Questions, peer_task

__all__ = ["main"]

_TASKS = ("office_report_easy", "office_report_hard", "office_conversation_easy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; errors of ours are printed, and the exit status is then 2."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except SfiError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sfi_agent.evaluation.peers",
        description="Dense transformers, presses of kvpress and the presets, side by side.",
    )
    add = parser.add_argument
    add("--model", default="embedded", help="checkpoint folder; default: the embedded model")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--tasks", nargs="+", default=list(_TASKS), help="evaluation tasks, by name")
    add("--context-tokens", type=int, default=4096, help="tokens of a case in all")
    add("--cases", type=int, default=20, help="cases per task")
    add("--first-seed", type=int, default=FIRST_SEED, help="seed of the first case")
    add("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help="which to play")
    add(
        "--budget",
        type=int,
        default=512,
        help="selected tokens beside 4 sink and 256 recent ones; every sparse arm is held to "
        f"the sum (default {memory_tokens(512)})",
    )
    add(
        "--arms",
        nargs="+",
        default=[],
        metavar="ARM",
        help=f"default all: {', '.join(arm_names())}",
    )
    _add_environment_and_files(parser)
    return parser


def _add_environment_and_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--threads", type=int, default=1, help="CPU threads of every arm")
    add("--kvpress-python", type=Path, default=None, help="Python of an environment with kvpress")
    pins = ", ".join(f"{name} {version}" for name, version in PINS.items())
    add(
        "--make-environment",
        type=Path,
        default=None,
        metavar="DIR",
        help=f"make that environment first ({pins}; downloads them)",
    )
    add(
        "--earlier",
        type=Path,
        default=None,
        metavar="FILE",
        help="take what does not depend on sfi-agent from the JSON of an earlier comparison",
    )
    add("--out", type=Path, default=None, help="write JSON here, and the tables beside it as .md")


def _run(options: argparse.Namespace) -> int:
    python: Path | None = options.kvpress_python
    if options.make_environment is not None:
        python = make_environment(options.make_environment)
        found = check_environment(python)
        print(f"made {python}: {', '.join(f'{key} {value}' for key, value in found.items())}")
        if options.out is None:
            return 0
    comparison = _compare(options, python)
    print(comparison.markdown())
    if options.out is not None:
        for path in comparison.save(options.out):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _compare(options: argparse.Namespace, python: Path | None) -> Comparison:
    import torch

    from sfi_agent.embedded import checkpoint_path
    from sfi_agent.session.engine import Engine

    contest = choose_arms(options.budget, options.arms)
    if contest.needs_kvpress and options.earlier is None:
        # Before any weight is loaded: most likely this is what is missing.
        check_environment(python)
    tasks = tuple(peer_task(name) for name in options.tasks)
    questions = Questions(
        tasks,
        options.context_tokens,
        options.cases,
        tuple(options.protocols),
        options.first_seed,
    )
    torch.set_num_threads(options.threads)
    model = checkpoint_path() if options.model == "embedded" else Path(options.model)
    engine = Engine.from_pretrained(model, device=options.device, dtype=options.dtype)
    return compare(
        engine,
        model,
        contest,
        questions,
        kvpress_python=python,
        earlier_path=options.earlier,
        progress=_print_progress,
    )


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
