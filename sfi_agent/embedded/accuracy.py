"""Dense greedy accuracy of the embedded model: whole answers, word for word, on held-out cases.

Run: python -m sfi_agent.embedded.accuracy [--model DIR] [--lengths 1024 2048 4096 8192]
         [--cases 200] [--device auto] [--dtype float32] [--json FILE]

Plain transformers generation in batches padded on the left; no part of the slow-fast engine is
involved. Cases alternate between the easy and the hard variant and go round the kinds; every
second case that needs no tool is offered the tools all the same. A tool case is right when its
calls are right and, given their results, its answer is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfi_agent.embedded import checkpoint_path
from sfi_agent.embedded.cases import Case, make_case, score
from sfi_agent.embedded.chat_format import CALL_CLOSE, CALL_OPEN
from sfi_agent.embedded.documents import DEFAULT_SYSTEM
from sfi_agent.embedded.intervals import wilson_interval
from sfi_agent.embedded.office_tools import make_tools
from sfi_agent.embedded.questions import KINDS
from sfi_agent.embedded.world import VARIANTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

__all__ = ["Outcome", "evaluate", "held_out_cases", "main", "summarise"]

FIRST_SEED = 100_000
"""Seeds of the evaluation start here; examples and tests of the package use smaller ones."""
_LONGEST_ANSWER_TOKENS = 400
_BATCH_TOKENS = {"cuda": 450_000, "cpu": 8_000}
"""Tokens per batch of generation. On a CPU a batch of one, without padding, is fastest for long
prompts: it needs no mask."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case: where it belongs, what was said, whether it was right."""

    log_tokens: int
    kind: str
    variant: str
    seed: int
    exact: bool
    sentences_right: int
    sentences: int
    said: str


def held_out_cases(log_tokens: int, number: int) -> list[Case]:
    """The evaluation cases of one length: variants in turn, kinds in turn."""
    return [
        make_case(
            FIRST_SEED + index,
            kind=KINDS[index // len(VARIANTS) % len(KINDS)],
            variant=VARIANTS[index % len(VARIANTS)],
            log_tokens=log_tokens,
        )
        for index in range(number)
    ]


def evaluate(
    network: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    cases: Sequence[Case],
    log_tokens: int,
) -> list[Outcome]:
    """Answer every case and compare; `log_tokens` is only noted in the outcomes."""
    chats = [_first_messages(case) for case in cases]
    offered = [bool(case.calls) or index % 2 == 0 for index, case in enumerate(cases)]
    said = _generate(network, tokenizer, _render(tokenizer, cases, chats, offered))
    again, called = [], [not case.calls for case in cases]
    for index, case in enumerate(cases):
        if case.calls and said[index] == _expected_calls(case):
            chats[index] += _call_messages(case)
            again.append(index)
            called[index] = True
    prompts = _render(
        tokenizer,
        [cases[index] for index in again],
        [chats[index] for index in again],
        [True] * len(again),
    )
    for index, text in zip(again, _generate(network, tokenizer, prompts), strict=True):
        said[index] = text
    outcomes = []
    for case, text, calls_right in zip(cases, said, called, strict=True):
        result = score(case, text)
        outcomes.append(
            Outcome(
                log_tokens,
                case.kind,
                case.variant,
                case.seed,
                calls_right and result.exact,
                result.sentences_right if calls_right else 0,
                result.sentences,
                text,
            )
        )
    return outcomes


def summarise(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Rows of the accuracy table: per length pooled, per variant and per kind."""
    rows = []
    for length in sorted({outcome.log_tokens for outcome in outcomes}):
        here = [outcome for outcome in outcomes if outcome.log_tokens == length]
        groups: dict[str, list[Outcome]] = {"all": here}
        for variant in VARIANTS:
            groups[variant] = [outcome for outcome in here if outcome.variant == variant]
        for kind in KINDS:
            groups[kind] = [outcome for outcome in here if outcome.kind == kind]
        for name, members in groups.items():
            if members:
                right = sum(outcome.exact for outcome in members)
                low, high = wilson_interval(right, len(members))
                rows.append(
                    {
                        "log_tokens": length,
                        "group": name,
                        "cases": len(members),
                        "right": right,
                        "accuracy": right / len(members),
                        "interval_95": [round(low, 4), round(high, 4)],
                    }
                )
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| log tokens | group | cases | right | accuracy | 95 % interval |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["interval_95"]
        lines.append(
            f"| {row['log_tokens']} | {row['group']} | {row['cases']} | {row['right']} "
            f"| {row['accuracy']:.3f} | {low:.3f} to {high:.3f} |"
        )
    return "\n".join(lines)


def _first_messages(case: Case) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": DEFAULT_SYSTEM},
        {"role": "user", "content": case.prompt},
    ]


def _call_messages(case: Case) -> list[dict[str, Any]]:
    calls = [
        {"type": "function", "function": {"name": use.name, "arguments": dict(use.arguments)}}
        for use in case.calls
    ]
    results = [{"role": "tool", "name": use.name, "content": use.result} for use in case.calls]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *results]


def _expected_calls(case: Case) -> str:
    return "\n".join(f"{CALL_OPEN}\n{use.call_json}\n{CALL_CLOSE}" for use in case.calls)


def _render(
    tokenizer: PreTrainedTokenizerFast,
    cases: Sequence[Case],
    chats: Sequence[list[dict[str, Any]]],
    offered: Sequence[bool],
) -> list[str]:
    prompts = []
    for case, chat, with_tools in zip(cases, chats, offered, strict=True):
        tools: list[Any] | None = [*make_tools(case.log)] if with_tools else None
        prompt = tokenizer.apply_chat_template(
            chat, tools=tools, add_generation_prompt=True, tokenize=False
        )
        prompts.append(str(prompt))
    return prompts


def _generate(
    network: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[str]:
    """Greedy answers; prompts of similar length share a batch, padded on the left."""
    import torch

    encoded = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    answers = [""] * len(prompts)
    model: Any = network
    while order:
        size = max(
            1, _BATCH_TOKENS[model.device.type] // (len(encoded[order[0]]) + _LONGEST_ANSWER_TOKENS)
        )
        members, order = order[:size], order[size:]
        inputs = tokenizer.pad(
            {"input_ids": [encoded[index] for index in members]},
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=_LONGEST_ANSWER_TOKENS, do_sample=False
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        for index, ids in zip(members, new.tolist(), strict=True):
            answers[index] = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return answers


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="Dense greedy accuracy of the embedded model.")
    parser.add_argument("--model", type=Path, default=None, help="default: the shipped checkpoint")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--cases", type=int, default=200, help="cases per length")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=Path, default=None, help="write rows and misses here")
    options = parser.parse_args(arguments)
    folder = options.model or checkpoint_path()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    network.to(device).eval()
    outcomes: list[Outcome] = []
    for length in options.lengths:
        cases = held_out_cases(length, options.cases)
        found = evaluate(network, tokenizer, cases, length)
        outcomes.extend(found)
        print(f"{length}: {sum(o.exact for o in found)} of {len(found)} right", flush=True)
    rows = summarise(outcomes)
    print(format_table(rows))
    if options.json:
        expected = {
            (length, case.seed): case.expected
            for length in options.lengths
            for case in held_out_cases(length, options.cases)
        }
        misses = [
            {
                "log_tokens": o.log_tokens,
                "kind": o.kind,
                "variant": o.variant,
                "seed": o.seed,
                "said": o.said,
                "expected": expected[o.log_tokens, o.seed],
            }
            for o in outcomes
            if not o.exact
        ]
        report = {"dtype": options.dtype, "device": device, "rows": rows, "misses": misses}
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
