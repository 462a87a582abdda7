"""All built-ins: the shipped contract, ties, the names and options that configurations rely on."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from sfi_agent import Evidence, InputError
from sfi_agent.testing import check_selector, make_evidence
from tests.test_selectors.matrix import MATRIX, Row, build, registered

OPTIONS = {
    "top_k": {},
    "per_head": {},
    "cumulative_mass": {"mass": 0.95},
    "kl_fusion": {
        "alpha": 0.5,
        "gamma": 0.5,
        "norm_weight": 1.0,
        "position_weight": 0.7,
        "position_power": 1.8,
        "position_eta": 0.4,
        "position_theta": 0.6,
        "position_p": 0.9,
        "fusion_limit_single": 0.35,
        "fusion_limit_multi": 0.25,
        "nms_window": 32,
        "soft_alpha": 1.0,
        "cross_head_alpha": 0.85,
        "cross_head_temperature": 2.0,
    },
    "span": {"radius_tokens": 16},
    "page": {"page_tokens": 16},
    "question": {"question_tokens": 64},
    "window": {},
    "random": {"seed": None},
}

WRONG_OPTIONS = [
    ("top_k", {"k": 3}),
    ("cumulative_mass", {"mass": 0.0}),
    ("cumulative_mass", {"mass": 1.01}),
    ("cumulative_mass", {"mass": math.nan}),
    ("kl_fusion", {"alpha": -0.1}),
    ("kl_fusion", {"fusion_limit_multi": 1.5}),
    ("kl_fusion", {"position_power": 0.5}),
    ("kl_fusion", {"cross_head_temperature": 0.0}),
    ("span", {"radius_tokens": -1}),
    ("span", {"radius": 4}),
    ("page", {"page_tokens": 0}),
    ("random", {"seed": 1.5}),
]


def test_names_options_and_defaults_are_the_documented_ones() -> None:
    assert {name: config().model_dump() for name, (config, _) in registered().items()} == OPTIONS


def test_every_selector_is_in_the_matrix() -> None:
    assert {row.name for row in MATRIX} == set(registered())


@pytest.mark.parametrize(("name", "options"), WRONG_OPTIONS)
def test_wrong_options_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        build(name, **options)


def test_every_option_has_a_sentence_and_a_unit() -> None:
    for name, (config, _) in registered().items():
        for field, info in config.model_fields.items():
            assert info.description and info.description.endswith("."), (name, field)
            assert isinstance(info.json_schema_extra, dict), (name, field)
            assert info.json_schema_extra["unit"] in {"tokens", "number", "fraction"}, (name, field)


@pytest.mark.parametrize("row", MATRIX, ids=str)
def test_contract(row: Row) -> None:
    check_selector(row.build(), fills_budget=row.fills_budget)


@pytest.mark.parametrize("row", MATRIX, ids=str)
def test_more_budget_than_candidates_pads_with_minus_one(row: Row) -> None:
    selection = row.build().select(make_evidence(candidates=9, candidate_start=5), 12)
    assert selection.positions.shape == (1, 2, 12)
    assert (selection.positions[..., 9:] == -1).all()
    if row.fills_budget:
        assert selection.positions[0, 0, :9].tolist() == list(range(5, 14))


@pytest.mark.parametrize("row", MATRIX, ids=str)
def test_a_budget_below_one_is_a_typed_error(row: Row) -> None:
    with pytest.raises(InputError, match="budget of 0; allowed: at least 1"):
        row.build().select(make_evidence(), 0)


TIED = [row for row in MATRIX if row.name not in {"window", "random", "kl_fusion"}]
TIED += [
    Row("kl_fusion", {"position_weight": 0.0}),
    Row("kl_fusion", {"position_weight": 0.0, "alpha": 0.0}),
    Row("kl_fusion", {"position_weight": 0.0, "alpha": 1.0}),
]


@pytest.mark.parametrize("row", TIED, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 21])
def test_ties_go_to_the_lower_position(row: Row, rows: int) -> None:
    """Odd sizes on purpose: loops of the CPU treat the last candidates of a tensor differently."""
    heads = 3
    selector = row.build()
    row_logits = torch.randn((1, heads, rows, 1), generator=torch.Generator().manual_seed(rows))
    for candidates in (2, 7, 16, 33, 61, 100):
        evidence = Evidence(
            logits=row_logits.expand(-1, -1, -1, candidates).contiguous(),
            key_norms=torch.full((1, heads, candidates), 1.7),
            rest_mass=torch.linspace(0.1, 0.9, heads * rows).reshape(1, heads, rows),
            candidate_start=3,
        )
        budget = (candidates + 1) // 2
        selection = selector.select(evidence, budget)
        for head in range(heads):
            count = int(selection.counts[0, head])
            assert count >= 1
            assert selection.positions[0, head, :count].tolist() == list(range(3, 3 + count))


@pytest.mark.parametrize("row", MATRIX, ids=str)
def test_half_precision_evidence_is_scored_in_float32(row: Row) -> None:
    """Upcasting is exact, so bfloat16 logits must choose as the same numbers in float32 do."""
    rounded = make_evidence(candidates=50)
    rounded = replace(rounded, logits=rounded.logits.bfloat16())
    exact = replace(rounded, logits=rounded.logits.float())
    selector = row.build()
    assert torch.equal(selector.select(rounded, 20).positions, selector.select(exact, 20).positions)


def test_importing_the_selectors_does_not_import_torch() -> None:
    code = (
        "import sys, sfi_selectors, sfi_selectors.plugin; "
        "sfi_selectors.KlFusion(sfi_selectors.KlFusionConfig()); "
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    roots = [str(Path(path).resolve()) for path in sys.path if path]
    script = f"import sys; sys.path[:0] = {roots!r}; {code}"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
