"""The accuracy command: intervals, batching, and what it counts as right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sfi_agent.embedded import accuracy
from sfi_agent.embedded.cases import Case
from sfi_agent.embedded.intervals import wilson_interval
from sfi_agent.embedded.network import build_network
from sfi_agent.embedded.questions import KINDS


def test_wilson_interval_reference_values() -> None:
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    low, high = wilson_interval(200, 200)
    assert high == pytest.approx(1.0) and low == pytest.approx(0.98115, abs=1e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_held_out_cases_cover_kinds_and_variants_evenly() -> None:
    cases = accuracy.held_out_cases(200, 16)
    pairs = [(case.kind, case.variant) for case in cases]
    assert len(set(pairs)) == 8 and all(pairs.count(pair) == 2 for pair in set(pairs))
    assert min(case.seed for case in cases) >= accuracy.FIRST_SEED


class _Oracle:
    """Answers cases correctly unless told to spoil one, in place of generation."""

    def __init__(self, cases: Sequence[Case], spoilt: int) -> None:
        self.rounds = 0
        self._cases, self._spoilt = cases, spoilt

    def __call__(self, network: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        self.rounds += 1
        if self.rounds == 1:
            return [self._first(index) for index in range(len(self._cases))]
        with_calls = [c for i, c in enumerate(self._cases) if c.calls and i != self._spoilt]
        assert len(prompts) == len(with_calls)
        for prompt, case in zip(prompts, with_calls, strict=True):
            assert all(use.result in prompt for use in case.calls)
        return [case.expected for case in with_calls]

    def _first(self, index: int) -> str:
        case = self._cases[index]
        if index == self._spoilt:
            return case.expected if case.calls else case.expected[:-2]
        if not case.calls:
            return case.expected
        parsed = [f"<tool_call>\n{use.call_json}\n</tool_call>" for use in case.calls]
        return "\n".join(parsed)


@pytest.mark.parametrize("spoilt", [0, 6])
def test_a_case_is_right_only_with_its_calls_and_its_whole_answer(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, spoilt: int
) -> None:
    cases = accuracy.held_out_cases(200, 8)
    assert bool(cases[spoilt].calls) == (spoilt == 6)
    monkeypatch.setattr(accuracy, "_generate", _Oracle(cases, spoilt))
    outcomes = accuracy.evaluate(None, tokenizer, cases, 200)  # type: ignore[arg-type]
    assert [outcome.exact for outcome in outcomes] == [i != spoilt for i in range(8)]
    rows = accuracy.summarise(outcomes)
    assert rows[0]["group"] == "all" and rows[0]["right"] == 7
    assert {row["group"] for row in rows} == {"all", "easy", "hard", *KINDS}
    assert "| 200 | all | 8 | 7 | 0.875 |" in accuracy.format_table(rows)


def test_batched_generation_equals_one_at_a_time(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build_network(
        len(tokenizer),
        seed=5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ).eval()
    network.generation_config.pad_token_id = 0
    network.generation_config.eos_token_id = 2
    monkeypatch.setattr(accuracy, "_LONGEST_ANSWER_TOKENS", 4)
    prompts = ["The lift", "The lift was repaired before lunch.", "Mara works in finance"]
    together = accuracy._generate(network, tokenizer, prompts)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = tokenizer.encode(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            alone = network.generate(ids, max_new_tokens=4, do_sample=False)
        text = str(tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)).strip()
        assert answer == text


def test_checkpoint_path_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sfi_agent import embedded
    from sfi_agent.errors import CheckpointError

    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        embedded.checkpoint_path()
