"""A results folder as an ablation writes it, made up from a seed: for tests of the page."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

__all__ = ["HOSTILE_TOKENS", "ReportFolder", "wilson"]

HOSTILE_TOKENS = (
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 2'>",
    "<!--",
    "]]>",
    "&amp;",
    '"quoted"',
    "\u2028",
    "\u202edesrever",
    "\u05e9\u05dc\u05d5\u05dd",
    "\U0001f9ed",
    "\x00",
    "\x1b[31m",
    "\r",
    "\t",
    "\ud83d",
    "",
    "{{script}}",
    "\u200b",
)
"""Texts that a page which does not escape would trip over."""

QUERY_HEADS, KV_HEADS, LAYERS = 4, 2, 4
_WORDS = (
    "the report of Mara names room 214 and her manager Tov in the city of Lin since "
    "Monday the archive moved to floor seven and nobody told the office about it"
).split()


def wilson(right: int, total: int) -> tuple[float, float]:
    """The bounds that an ablation stores beside a share."""
    z = 1.959963984540054
    mean, scale = right / total, 1 + z * z / total
    center = (mean + z * z / (2 * total)) / scale
    half = z / scale * (mean * (1 - mean) / total + z * z / (4 * total * total)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)


@dataclass
class ReportFolder:
    """Writes a folder of made-up results.

    Attributes:
        seed: Where the numbers come from.
        budgets, selectors, slow_steps, tasks, lengths: The grid.
        prompt_tokens: Length of the traced prompts.
        answer_tokens: Length of the traced answers.
        stretches: Thousands of tokens of the right answers; None leaves them out, as folders of
            earlier versions do.
        hostile: Whether tokens, names and messages are such that they must be escaped.
    """

    seed: int = 0
    budgets: tuple[int, ...] = (128, 512)
    selectors: tuple[str, ...] = ("per_head", "kl_fusion")
    slow_steps: tuple[str, ...] = ("observe", "verify")
    tasks: tuple[str, ...] = ("office_report",)
    lengths: tuple[int, ...] = (1024, 4096)
    prompt_tokens: int = 400
    answer_tokens: int = 60
    stretches: int | None = 1
    hostile: bool = False
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def write(self, directory: Path) -> Path:
        """Write every file the page reads; the folder itself."""
        results = self.results()
        (directory / "traces").mkdir(parents=True)
        save(directory / "results.json", results)
        save(directory / "recall.json", self.recall(results["policies"]))
        for number, policy in enumerate(results["policies"][:6]):
            save(directory / "traces" / f"{number:02d}.json", self.trace(policy, number))
        return directory

    def results(self) -> dict[str, Any]:
        """`results.json`."""
        policies = [self.policy(), *self.grid()]
        rows = [
            self.row(policy, task, length)
            for policy, task, length in product(policies, self.tasks, self.lengths)
        ]
        failed = {
            "policy": policies[-1]["name"],
            "task": self.tasks[0],
            "context_tokens": self.lengths[0],
            "protocol": "dense_question",
            "answers": "own",
            "seed": 0,
            "case": 3,
            "error": "ContextOverflowError",
            "message": "<b>too long</b> " + (HOSTILE_TOKENS[0] if self.hostile else ""),
            "run": "runs/one.json",
        }
        return {
            "format": 1,
            "created": "2026-01-02T03:04:05+00:00",
            "command": "sfi-agent ablate grid.yaml --out results",
            "title": f"Selectors {HOSTILE_TOKENS[0]}" if self.hostile else "Selectors at a budget",
            "model": {
                "name": "embedded",
                "class": "Qwen3ForCausalLM",
                "layers": LAYERS,
                "query_heads": QUERY_HEADS,
                "kv_heads": KV_HEADS,
                "head_dim": 32,
                "parameters": 1_800_000,
                "dtype": "float32",
                "device": "cpu",
            },
            "versions": {"sfi_agent": "0.1.0", "torch": "2.13.0"},
            "workers": 1,
            "planned_runs": 241,
            "finished_runs": 240,
            "failed_runs": 1,
            "complete": True,
            "seconds": 61.2,
            "policies": policies,
            "skipped": [{"policy": "never / span / 64", "reason": "exclude rule 1"}],
            "failed": [failed],
            "notes": ["One damaged file was written again."],
            **({} if self.stretches is None else {"stretch_tokens": 1000}),
            "rows": rows,
        }

    def grid(self) -> list[dict[str, Any]]:
        """The slow-fast policies, in the order of the axes."""
        return [
            self.policy(selector=selector, slow_step=step, selected_tokens=budget)
            for step, selector, budget in product(self.slow_steps, self.selectors, self.budgets)
        ]

    def policy(self, **parts: Any) -> dict[str, Any]:
        """One entry of `policies`; dense without parts."""
        name = " / ".join(str(part) for part in parts.values()) or "dense"
        if self.hostile and parts:
            name += " <i>&"
        sparse = bool(parts)
        return {
            "name": name,
            "preset": None,
            "mode": "slow_fast" if sparse else "dense",
            "boundaries": "sentences" if sparse else None,
            "selector": None,
            "slow_step": None,
            "sink_tokens": 4 if sparse else None,
            "selected_tokens": None,
            "recent_tokens": 32 if sparse else None,
            "dense_layers": [0] if sparse else None,
            "min_segment_tokens": 8 if sparse else None,
            "max_segment_tokens": 64 if sparse else None,
            "settings": {},
            "config": {},
            **parts,
        }

    def row(self, policy: dict[str, Any], task: str, length: int) -> dict[str, Any]:
        """One row: larger budgets and verify are more accurate, on the whole."""
        dense = policy["mode"] == "dense"
        budget = policy["selected_tokens"] or 0
        chance = 0.995 if dense or policy["slow_step"] == "verify" else 1 - 9 / (budget + 24)
        parts, answers, tokens = 80, 20, 1_600
        right = sum(self.random.random() < chance for _ in range(parts))
        exact = min(answers, max(0, answers - (parts - right)))
        slow = tokens - answers if dense else int(tokens * self.random.uniform(0.03, 0.12))
        retries = 0 if dense else self.random.randrange(20)
        return {
            "policy": policy["name"],
            "task": task,
            "context_tokens": length,
            "protocol": "dense_question",
            "answers": "own",
            "cases": answers,
            "seeds": 1,
            "failed": 0,
            "right": right,
            "parts": parts,
            "share": right / parts,
            "share_low": wilson(right, parts)[0],
            "share_high": wilson(right, parts)[1],
            "exact": exact,
            "exact_share": exact / answers,
            "exact_low": wilson(exact, answers)[0],
            "exact_high": wilson(exact, answers)[1],
            "answers_given": answers,
            "slow_share": slow / tokens,
            "acceptance": 0.9 if policy["slow_step"] == "verify" else None,
            "retries": retries,
            "generated_tokens": tokens,
            "fast_tokens": tokens - slow - answers,
            "slow_tokens": slow + answers - retries,
            "retry_tokens": retries,
            "dense_passes": slow,
            "drafted_tokens": 100 if policy["slow_step"] == "verify" else 0,
            "accepted_tokens": 90 if policy["slow_step"] == "verify" else 0,
            "selected_tokens": policy["selected_tokens"],
            "memory_tokens_mean": None if dense else budget + 40.5,
            "agreed_tokens_median": 80.0,
            "agreed_share": right / parts,
            "seconds_per_token": 0.011,
            "reasons": {"prefill": answers, "mode dense": slow}
            if dense
            else {
                "prefill": answers,
                "punctuation: sentence start": slow - retries,
                "entropy 0.41 > 0.30 nat": retries,
            },
            **({} if self.stretches is None else {"stretches": self.drift(right, dense)}),
        }

    def drift(self, right: int, dense: bool) -> list[dict[str, Any]]:
        """Stretches of 16 parts that get worse and longer along the answer; dense does not."""
        assert self.stretches is not None
        found = []
        for index in range(self.stretches):
            good = 16 if dense else max(0, 16 - (80 - right) * index // 8)
            low, high = wilson(good, 16)
            found.append(
                {
                    "first_token": 1000 * index,
                    "right": good,
                    "parts": 16,
                    "share": good / 16,
                    "share_low": low,
                    "share_high": high,
                    "output_tokens": 1000 + (0 if dense else (80 - right) * 3 * index),
                    "dense_output_tokens": 1000,
                }
            )
        return found

    def recall(self, policies: list[dict[str, Any]]) -> dict[str, Any]:
        """`recall.json`: layer 0 is dense, and the last policy was not measured."""
        entries: dict[str, Any] = {}
        for policy in policies[1:-1]:
            floor = 1 - 20 / ((policy["selected_tokens"] or 0) + 40)
            layers: list[list[float] | None] = [
                [self.random.uniform(floor, 1.0) for _ in range(QUERY_HEADS)] for _ in range(LAYERS)
            ]
            layers[0] = None
            values = [value for heads in layers if heads for value in heads]
            mean = sum(values) / len(values)
            entries[policy["name"]] = {"fast_steps": 64, "layers": layers, "mean": mean}
        entries[policies[-1]["name"]] = {
            "fast_steps": 0,
            "layers": None,
            "mean": None,
            "reason": "no fast step",
        }
        return {
            "format": 1,
            "task": self.tasks[0],
            "context_tokens": self.lengths[0],
            "seed": 0,
            "case": 0,
            "case_seed": 200_000,
            "policies": entries,
        }

    def trace(self, policy: dict[str, Any], number: int) -> dict[str, Any]:
        """One file of `traces/`."""
        dense = policy["mode"] == "dense"
        tokens = [self.token(position) for position in range(self.prompt_tokens)]
        tokens += [self.token(position) for position in range(self.answer_tokens)]
        steps = [self.step(policy, index) for index in range(self.answer_tokens)]
        slow = [index for index, step in enumerate(steps) if step["kind"] != "fast"]
        return {
            "format": 1,
            "id": f"trace-{number}",
            "policy": policy["name"],
            "task": self.tasks[0],
            "context_tokens": self.lengths[0],
            "protocol": "dense_question",
            "answers": "own",
            "seed": 0,
            "case": 0,
            "case_seed": 200_000,
            "question": "Report the room of Mara." + (HOSTILE_TOKENS[1] if self.hostile else ""),
            "references": ["Mara sits in room 214."],
            "output": "".join(tokens[self.prompt_tokens :]),
            "right": 4,
            "parts": 5,
            "exact": False,
            "num_layers": LAYERS,
            "kv_heads": KV_HEADS,
            "dense_layers": [] if dense else [0],
            "sink_tokens": policy["sink_tokens"],
            "recent_tokens": policy["recent_tokens"],
            "selected_tokens": policy["selected_tokens"],
            "prompt_tokens": self.prompt_tokens,
            "tokens": tokens,
            "steps": steps,
            "slow_steps_total": 0 if dense else len(slow),
            "refreshes": []
            if dense
            else [self.refresh(policy, steps[index]["position"], index) for index in slow[:24]],
        }

    def token(self, position: int) -> str:
        """The text of a token: words, with a line break now and then."""
        if self.hostile and position % 5 == 2:
            return HOSTILE_TOKENS[position // 5 % len(HOSTILE_TOKENS)]
        return ".\n" if position % 17 == 16 else f" {self.random.choice(_WORDS)}"

    def step(self, policy: dict[str, Any], index: int) -> dict[str, Any]:
        """One generated token: prefill, then a boundary every eleven and a retry every 23."""
        dense, verify = policy["mode"] == "dense", policy["slow_step"] == "verify"
        kind, reason = "fast", ""
        if dense or index % 11 == 0:
            kind, reason = "slow", "punctuation: sentence start" if index else "prefill"
        elif index % 23 == 0:
            kind, reason = "retry", "entropy 0.41 > 0.30 nat"
        drafted = 10 if verify and kind == "slow" and index else 0
        return {
            "position": self.prompt_tokens + index,
            "kind": kind,
            "slow_step": None if kind == "fast" or dense else policy["slow_step"],
            "reason": reason,
            "memory_tokens": self.prompt_tokens + index
            if dense
            else min(self.prompt_tokens, 36 + (policy["selected_tokens"] or 0)) + index % 11,
            "segment_tokens": index % 11 + 1,
            "seconds": 0.01,
            "drafted_tokens": drafted,
            "accepted_tokens": drafted - (index % 2) * 4 if drafted else 0,
        }

    def refresh(self, policy: dict[str, Any], history: int, step: int) -> dict[str, Any]:
        """What one slow step selected: a few stretches per sparse layer."""
        layers: dict[str, list[list[int]]] = {}
        counts: dict[int, int] = {}
        for layer in range(1, LAYERS):
            chosen: dict[int, int] = {}
            for _ in range(6):
                start = self.random.randrange(4, history - 40)
                for position in range(start, start + self.random.randrange(1, 9)):
                    chosen[position] = self.random.randrange(1, KV_HEADS + 1)
            for position, times in chosen.items():
                counts[position] = counts.get(position, 0) + times
            layers[str(layer)] = runs(chosen)
        return {
            "history_tokens": history,
            "step": step,
            "selected_heads_total": (LAYERS - 1) * KV_HEADS,
            "union": runs(counts),
            "layers": layers,
            "layers_total": LAYERS - 1,
        }


def runs(counts: dict[int, int]) -> list[list[int]]:
    """Positions with counts as runs of equal counts."""
    found: list[list[int]] = []
    for position, times in sorted(counts.items()):
        if found and found[-1][0] + found[-1][1] == position and found[-1][2] == times:
            found[-1][1] += 1
        else:
            found.append([position, 1, times])
    return found


def save(path: Path, data: object) -> None:
    """Write one file."""
    path.write_text(json.dumps(data), encoding="utf-8")
