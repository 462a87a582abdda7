"""How much of a report each preset gets right: retrieval on the office logs, dense beside it.

Run: python -m sfi_agent.evaluation.office [--model DIR] [--log-tokens 4096] [--cases 40]
         [--selected-tokens 512] [--presets NAME ...] [--json FILE]

One log is prefilled once per case; every policy goes on from that history, so all see the same
prompt. A policy prefills the last tokens of the prompt itself, more of them than it takes
evidence rows from, so its first selection is the one that a session of its own would make.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfi_agent.config import SessionConfig
from sfi_agent.embedded import DEFAULT_SYSTEM, Case, checkpoint_path, make_case, score
from sfi_agent.embedded.intervals import wilson_interval
from sfi_agent.embedded.world import VARIANTS
from sfi_agent.errors import InputError, explain
from sfi_agent.session.engine import Engine

if TYPE_CHECKING:
    from sfi_agent.session.session import Session

__all__ = ["PRESETS", "PolicyResult", "evaluate_presets", "main", "office_table"]

PRESETS = ("published", "fast", "balanced", "faithful")
"""Presets that run; mode dense is measured beside them under the name "dense"."""
FIRST_SEED = 200_000
_OWN_PREFILL_TOKENS = 32
_ANSWER_TOKENS = 256


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

    @property
    def slow_share(self) -> float:
        """Dense passes per generated token, 0 to 1; lower is cheaper."""
        return self.dense_passes / self.tokens if self.tokens else 0.0

    def as_json(self) -> dict[str, Any]:
        """All fields, with shares and their 95 % intervals."""
        return {
            **asdict(self),
            "slow_share": round(self.slow_share, 4),
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
    policies: dict[str, SessionConfig] = {"dense": SessionConfig(mode="dense")}
    for name in presets:
        policies[name] = SessionConfig.preset(name, memory={"selected_tokens": selected_tokens})
    results = []
    for variant in variants:
        tallies = {name: _Tally() for name in policies}
        for seed in range(FIRST_SEED, FIRST_SEED + cases):
            case = make_case(seed, kind="report", variant=variant, log_tokens=log_tokens)
            _run_case(engine, case, policies, tallies)
        for name, tally in tallies.items():
            budget = None if name == "dense" else selected_tokens
            results.append(PolicyResult(name, variant, log_tokens, budget, cases, **asdict(tally)))
    return results


def office_table(results: Iterable[PolicyResult]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| policy | set | sentences right | 95 % interval | whole answers | slow share | retries |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        low, high = wilson_interval(result.sentences_right, result.sentences)
        lines.append(
            f"| {result.policy} | {result.variant} "
            f"| {result.sentences_right} of {result.sentences} "
            f"({result.sentences_right / max(1, result.sentences):.3f}) "
            f"| {low:.3f} to {high:.3f} | {result.answers_right} of {result.cases} "
            f"| {result.slow_share:.3f} | {result.retries} |"
        )
    return "\n".join(lines)


def _run_case(
    engine: Engine, case: Case, policies: dict[str, SessionConfig], tallies: dict[str, _Tally]
) -> None:
    prompt = _prompt_ids(engine, case)
    with engine.session(policies["dense"]) as base:
        base.decode(prompt[:-_OWN_PREFILL_TOKENS], max_new_tokens=0)
        for name, config in policies.items():
            with base.fork(config) as session:
                _answer(session, case, prompt[-_OWN_PREFILL_TOKENS:], tallies[name])


def _answer(session: Session, case: Case, prompt_end: list[int], tally: _Tally) -> None:
    tokenizer: Any = session.engine.tokenizer
    ids = session.decode(
        prompt_end, max_new_tokens=_ANSWER_TOKENS, stop_ids=[tokenizer.eos_token_id]
    )
    found = score(case, str(tokenizer.decode(ids, skip_special_tokens=True)))
    steps = session.trace[-len(ids) :]
    tally.sentences += found.sentences
    tally.sentences_right += found.sentences_right
    tally.answers_right += found.exact
    tally.tokens += len(ids)
    tally.retries += sum(step.kind == "retry" for step in steps)
    tally.dense_passes += sum(step.kind != "fast" and step.reason != "prefill" for step in steps)


def _prompt_ids(engine: Engine, case: Case) -> list[int]:
    tokenizer: Any = engine.tokenizer
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InputError(
            explain(
                "Evaluate presets",
                got="an engine without a chat template",
                remedy="Use the embedded model, or a checkpoint trained on the office world",
            )
        )
    messages = [
        {"role": "system", "content": DEFAULT_SYSTEM},
        {"role": "user", "content": case.prompt},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(bound, 4) for bound in interval]


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module text."""
    parser = argparse.ArgumentParser(description="Presets on the reports of office logs.")
    parser.add_argument("--model", type=Path, default=None, help="default: the shipped checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--log-tokens", type=int, default=4096, help="length of each log")
    parser.add_argument("--cases", type=int, default=40, help="reports per variant")
    parser.add_argument("--selected-tokens", type=int, default=512, help="budget per KV head")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="presets to measure")
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    options = parser.parse_args(arguments)
    engine = Engine.from_pretrained(options.model or checkpoint_path(), device=options.device)
    results = evaluate_presets(
        engine,
        log_tokens=options.log_tokens,
        cases=options.cases,
        selected_tokens=options.selected_tokens,
        presets=options.presets,
    )
    print(office_table(results))
    if options.json:
        report = [result.as_json() for result in results]
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
