"""Hypothesis strategies: families, detectors, selectors, budgets and prompts, spread widely."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from sfi_agent import SessionConfig
from tests.families import FAMILIES, VOCABULARY
from tests.test_guarantees.adversaries import ADVERSARIAL_DETECTORS, ADVERSARIAL_SELECTORS

__all__ = [
    "DETECTORS",
    "FILLING_SELECTORS",
    "SELECTORS",
    "FAMILY_NAMES",
    "LAYOUT_NAMES",
    "block_policies",
    "boundaries",
    "chunk_sizes",
    "dense_twin",
    "few",
    "for_each",
    "memories",
    "prompts",
    "refreshes",
    "samplings",
    "sparse_policies",
    "turns_of_ids",
]

FAMILY_NAMES: tuple[str, ...] = tuple(family.name for family in FAMILIES)

LAYOUT_NAMES: tuple[str, ...] = (
    "llama",
    "llama_multi_query",
    "mistral_sliding",
    "gemma3",
    "qwen3_moe",
)
"""One family per arrangement of layers and heads, and one whose rows share experts. What is kept of
a sequence (histories, memories, drafts, marks, forks) depends on nothing else of a model: tests of
that meet each of these in more ways instead of every family in few."""

FILLING_SELECTORS: tuple[dict[str, Any], ...] = (
    {"name": "top_k"},
    {"name": "per_head"},
    {"name": "cumulative_mass", "mass": 1.0},
    {"name": "kl_fusion"},
    {"name": "kl_fusion", "alpha": 0.0, "nms_window": 4},
    {"name": "span"},
    {"name": "span", "radius_tokens": 2},
    {"name": "page"},
    {"name": "page", "page_tokens": 4},
    {"name": "random", "seed": 3},
    {"name": "question", "question_tokens": 3},
)
"""Selectors that use their whole budget, so that full budget means everything."""

SELECTORS: tuple[dict[str, Any], ...] = (
    *FILLING_SELECTORS,
    {"name": "cumulative_mass", "mass": 0.5},
    {"name": "cumulative_mass", "mass": 0.9},
    {"name": "window"},
)

DETECTORS: tuple[dict[str, Any], ...] = (
    {"name": "punctuation"},
    {"name": "structure"},
    {"name": "never"},
    {"name": "interval", "every_tokens": 2},
    {"name": "interval", "every_tokens": 5},
    {"name": "random", "probability": 0.3, "seed": 5},
    {"name": "entropy", "threshold_nats": 2.4, "when": "now"},
    {"name": "entropy", "threshold_nats": 2.4, "when": "next"},
    {"name": "entropy", "threshold_sigmas": 0.5, "when": "now"},
    {"name": "drift", "minimum_mass": 0.3},
    {"name": "answer_start"},
    # Not where the engine is tested alone, as on a GPU machine without the text packages.
    *([{"name": "spacy"}] if find_spec("spacy") else []),
)


def few(examples: int) -> settings:
    """Settings of every property test here: a fixed sequence of examples, no deadline.

    Nothing is shrunk: an example decodes dozens of tokens, and shrinking would take minutes.
    """
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def for_each(name: str, examples: int, **strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Run the decorated check at once on examples of its own for every name.

    A parametrised property test would meet the same examples under each of its parameters.
    """

    def run(check: Callable[..., None]) -> None:
        seed(zlib.crc32(name.encode()))(few(examples)(given(**strategies)(check)))()

    return run


boundaries: st.SearchStrategy[list[dict[str, Any]]] = st.lists(
    st.sampled_from(DETECTORS), max_size=3, unique_by=lambda entry: entry["name"]
)

prompts: st.SearchStrategy[list[int]] = st.integers(1, 60).flatmap(
    lambda size: st.lists(st.integers(0, VOCABULARY - 1), min_size=size, max_size=size)
)

turns_of_ids: st.SearchStrategy[list[list[int]]] = st.tuples(
    prompts, st.lists(st.one_of(prompts, st.just([])), max_size=2)
).map(lambda drawn: [drawn[0], *drawn[1]])

chunk_sizes: st.SearchStrategy[int | None] = st.sampled_from([None, 1, 5, 16])

memories: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "sink_tokens": st.sampled_from([0, 1, 4]),
        "selected_tokens": st.sampled_from([0, 1, 3, 8, 1000]),
        "recent_tokens": st.sampled_from([1, 2, 8, 200]),
        "dense_layers": st.sampled_from([(), (0,), (1,), (0, 1)]),
    }
)

refreshes: st.SearchStrategy[dict[str, Any]] = st.tuples(
    st.integers(1, 6), st.integers(0, 8), st.sampled_from([1, 3, 16, 64])
).map(
    lambda drawn: {
        "min_segment_tokens": drawn[0],
        "max_segment_tokens": drawn[0] + drawn[1],
        "prefill_evidence_queries": drawn[2],
    }
)

samplings: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"temperature": 0.0}),
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.5, 1.0, 1.7]),
            "top_p": st.sampled_from([1.0, 0.8]),
            "top_k": st.sampled_from([0, 12]),
            "seed": st.integers(0, 2**63 - 1),
        }
    ),
)

_any_boundaries: st.SearchStrategy[list[dict[str, Any]]] = st.lists(
    st.sampled_from([*DETECTORS, *({"name": name} for name in ADVERSARIAL_DETECTORS)]),
    max_size=3,
    unique_by=lambda entry: entry["name"],
)

_any_selector: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [*SELECTORS, *({"name": name} for name in ADVERSARIAL_SELECTORS)]
)

_any_refreshes: st.SearchStrategy[dict[str, Any]] = st.tuples(
    st.sampled_from([1, 1, 2, 4, 17, 40]),
    st.integers(0, 12),
    st.integers(1, 20),
    st.integers(1, 64),
).map(
    lambda drawn: {
        "min_segment_tokens": drawn[0],
        "max_segment_tokens": drawn[0] + drawn[1],
        "evidence_queries": drawn[2],
        "prefill_evidence_queries": drawn[3],
    }
)


@st.composite
def sparse_policies(draw: st.DrawFn, *, full_budget: bool = False) -> SessionConfig:
    """Any slow-fast policy over any detectors.

    With `full_budget` the memory has room for everything and the selector fills it.
    """
    memory = draw(memories)
    if full_budget:
        memory = {**memory, "selected_tokens": 1000}
    return SessionConfig(
        boundaries=draw(boundaries),
        selector=draw(st.sampled_from(FILLING_SELECTORS if full_budget else SELECTORS)),
        memory=memory,
        refresh=draw(refreshes),
        sampling=draw(samplings),
    )


@st.composite
def block_policies(draw: st.DrawFn, /, slow_step: str, **fixed: Any) -> SessionConfig:
    """Any rectify or verify policy, over adversarial detectors and selectors too.

    Needs `adversaries()` around it.
    """
    values: dict[str, Any] = {
        "slow_step": slow_step,
        "boundaries": draw(_any_boundaries),
        "selector": draw(_any_selector),
        "memory": {**draw(memories), "selected_tokens": draw(st.sampled_from([0, 3, 8, 24, 60]))},
        "refresh": draw(_any_refreshes),
        "sampling": draw(samplings),
    }
    return SessionConfig(**{**values, **fixed})


def dense_twin(config: SessionConfig) -> SessionConfig:
    """Mode dense with the same sampling."""
    return SessionConfig(mode="dense", sampling=config.sampling)
