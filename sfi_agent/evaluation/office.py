"""How much of a report each preset gets right: retrieval on the office logs, dense beside it.

Run: python -m sfi_agent.evaluation.office [--model DIR] [--log-tokens 4096] [--cases 40]
         [--selected-tokens 512] [--presets NAME ...] [--json FILE]

One log is prefilled once per case and every policy goes on from that history, see
`sfi_agent.evaluation.play`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfi_agent.config import SessionConfig
from sfi_agent.embedded import checkpoint_path, make_case
from sfi_agent.embedded.intervals import wilson_interval
from sfi_agent.embedded.world import VARIANTS
from sfi_agent.errors import InputError, SfiError, explain
from sfi_agent.evaluation.dialogue import token_counter
from sfi_agent.evaluation.play import DENSE, TurnRun, play_case
from sfi_agent.evaluation.tasks.office import office_case
from sfi_agent.session.engine import Engine

__all__ = ["PRESETS", "PolicyResult", "evaluate_presets", "main", "office_table"]

PRESETS = ("published", "fast", "balanced", "faithful", "exact")
"""Presets that run; mode dense is measured beside them under the name "dense"."""
FIRST_SEED = 200_000


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """What one policy did on the cases of one variant.

    Attributes:
        policy: Name of the preset, or "dense".
        variant: "easy" or "hard".
        log_tokens: Length of the logs, as asked for.
        selected_tokens: Budget per KV head; None in mode dense.
        cases: Number of reports.
        sentences, sentences_right: Sentences expected, and those written word for word.
        answers_right: Reports right as a whole.
        tokens: Generated tokens.
        dense_passes: Dense steps over the history: slow steps and retries, not prefills.
        retries: Dense steps that replaced a fast one.
        drafted_tokens, accepted_tokens: Tokens that verification looked at, and those that stood.
    """

    policy: str
    variant: str
    log_tokens: int
    selected_tokens: int | None
    cases: int
    sentences: int
    sentences_right: int
    answers_right: int
    tokens: int
    dense_passes: int
    retries: int
    drafted_tokens: int
    accepted_tokens: int

    @property
    def slow_share(self) -> float:
        """Dense passes per generated token, 0 to 1; lower is cheaper."""
        return self.dense_passes / self.tokens if self.tokens else 0.0

    @property
    def acceptance(self) -> float | None:
        """Share of the verified tokens that stood; higher is cheaper. None without verify."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    def as_json(self) -> dict[str, Any]:
        """All fields, with shares and their 95 % intervals."""
        return {
            **asdict(self),
            "slow_share": round(self.slow_share, 4),
            "acceptance": None if self.acceptance is None else round(self.acceptance, 4),
            "sentence_share": round(self.sentences_right / max(1, self.sentences), 4),
            "sentence_interval_95": _rounded(wilson_interval(self.sentences_right, self.sentences)),
            "answer_share": round(self.answers_right / max(1, self.cases), 4),
            "answer_interval_95": _rounded(wilson_interval(self.answers_right, self.cases)),
        }


@dataclass
class _Tally:
    sentences: int = 0
    sentences_right: int = 0
    answers_right: int = 0
    tokens: int = 0
    dense_passes: int = 0
    retries: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, turn: TurnRun) -> None:
        self.sentences += turn.score.parts
        self.sentences_right += turn.score.right
        self.answers_right += turn.score.exact
        self.tokens += len(turn.output_ids)
        self.dense_passes += turn.dense_passes
        self.retries += sum(step.kind == "retry" for step in turn.steps)
        self.drafted_tokens += turn.drafted_tokens
        self.accepted_tokens += turn.accepted_tokens


def evaluate_presets(
    engine: Engine,
    *,
    log_tokens: int = 4096,
    cases: int = 40,
    selected_tokens: int = 512,
    presets: Sequence[str] = PRESETS,
    variants: Sequence[str] = VARIANTS,
) -> list[PolicyResult]:
    """Measure mode dense and the presets on held-out report cases.

    Args:
        engine: The embedded model, or another one trained on the office world.
        log_tokens: Length of each log.
        cases: Reports per variant.
        selected_tokens: Budget given to every preset in place of its own.
        presets: Names of presets.
        variants: "easy", "hard" or both.

    Raises:
        InputError: `cases` is below 1, or the engine has no tokenizer with a chat template.
        ConfigError: A preset is unknown or cannot run.
    """
    if cases < 1:
        raise InputError(explain("Evaluate presets", got=f"cases {cases!r}", allowed="1 or more"))
    _check_chat_template(engine)
    policies: dict[str, SessionConfig] = {DENSE: SessionConfig(mode="dense")}
    for name in presets:
        policies[name] = SessionConfig.preset(name, memory={"selected_tokens": selected_tokens})
    count_tokens = token_counter(engine.tokenizer)
    results = []
    for variant in variants:
        tallies = {name: _Tally() for name in policies}
        for seed in range(FIRST_SEED, FIRST_SEED + cases):
            report = make_case(seed, kind="report", variant=variant, log_tokens=log_tokens)
            case = office_case(report, f"office_report_{variant}", count_tokens)
            for name, run in play_case(engine, case, policies).items():
                for turn in run.turns:
                    tallies[name].add(turn)
        for name, tally in tallies.items():
            budget = None if name == DENSE else selected_tokens
            results.append(PolicyResult(name, variant, log_tokens, budget, cases, **asdict(tally)))
    return results


def office_table(results: Iterable[PolicyResult]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| policy | set | sentences right | 95 % interval | whole answers | slow share | retries "
        "| acceptance |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        low, high = wilson_interval(result.sentences_right, result.sentences)
        acceptance = "" if result.acceptance is None else f"{result.acceptance:.3f}"
        lines.append(
            f"| {result.policy} | {result.variant} "
            f"| {result.sentences_right} of {result.sentences} "
            f"({result.sentences_right / max(1, result.sentences):.3f}) "
            f"| {low:.3f} to {high:.3f} | {result.answers_right} of {result.cases} "
            f"| {result.slow_share:.3f} | {result.retries} | {acceptance} |"
        )
    return "\n".join(lines)


def _check_chat_template(engine: Engine) -> None:
    if not getattr(engine.tokenizer, "chat_template", None):
        raise InputError(
            explain(
                "Evaluate presets",
                got="an engine without a chat template",
                remedy="Use the embedded model, or a checkpoint trained on the office world",
            )
        )


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(bound, 4) for bound in interval]


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module text."""
    parser = argparse.ArgumentParser(
        prog="python -m sfi_agent.evaluation.office",
        description="Presets on the reports of office logs.",
    )
    parser.add_argument("--model", type=Path, default=None, help="default: the shipped checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--log-tokens", type=int, default=4096, help="length of each log")
    parser.add_argument("--cases", type=int, default=40, help="reports per variant")
    parser.add_argument("--selected-tokens", type=int, default=512, help="budget per KV head")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="presets to measure")
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    options = parser.parse_args(arguments)
    try:
        engine = Engine.from_pretrained(options.model or checkpoint_path(), device=options.device)
        results = evaluate_presets(
            engine,
            log_tokens=options.log_tokens,
            cases=options.cases,
            selected_tokens=options.selected_tokens,
            presets=options.presets,
        )
    except SfiError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(office_table(results))
    if options.json:
        report = [result.as_json() for result in results]
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
