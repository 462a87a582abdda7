"""Selectors can stand inside a compiled graph: one graph, no break, the same answer."""

from __future__ import annotations

import pytest
import torch

from sfi_agent.testing import make_evidence
from tests.test_selectors.matrix import build


@pytest.mark.parametrize(
    "name", ["top_k", "cumulative_mass", "kl_fusion", "span", "page", "random"]
)
def test_traces_as_one_graph(name: str) -> None:
    evidence = make_evidence(kv_heads=4, rows=5, candidates=77, masked_share=0.1)
    selector = build(name)
    compiled = torch.compile(selector.select, backend="eager", fullgraph=True)
    assert torch.equal(compiled(evidence, 20).positions, selector.select(evidence, 20).positions)
