"""The policies that sessions of the soak test are drawn from."""

from __future__ import annotations

from typing import Any

from sfi_agent import SessionConfig
from tests.test_soak.plants import CONTEXT_TOKENS

__all__ = ["POLICY_NAMES", "follows_dense", "make_policy", "predicts_tokens"]

_BASE: dict[str, Any] = {
    "memory": {"sink_tokens": 2, "selected_tokens": 12, "recent_tokens": 6},
    "refresh": {"min_segment_tokens": 2, "max_segment_tokens": 6},
    "sampling": {"max_new_tokens": 96},
}
_CHANGES: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "dense_sampled": {"mode": "dense", "sampling": {"temperature": 0.9, "top_k": 40, "seed": 5}},
    "full": {"memory": {"selected_tokens": CONTEXT_TOKENS}},
    "full_sampled": {
        "boundaries": [{"name": "entropy", "threshold_nats": 3.0}, {"name": "interval"}],
        "selector": {"name": "span"},
        "memory": {"selected_tokens": CONTEXT_TOKENS, "dense_layers": [1]},
        "sampling": {"temperature": 0.8, "top_p": 0.9, "seed": 7},
    },
    "observe": {
        "boundaries": [{"name": "punctuation"}, {"name": "structure"}],
        "tools": {"decode_calls": "as_session"},
    },
    "observe_exact_calls": {"boundaries": [{"name": "answer_start"}], "refresh": {"lag": 1}},
    "observe_retry": {
        "boundaries": [{"name": "entropy", "threshold_nats": 2.5}, {"name": "structure"}],
        "selector": {"name": "cumulative_mass", "mass": 0.5},
        "refresh": {"min_segment_tokens": 1, "max_segment_tokens": 24},
        "history": {"reserve_tokens": 64},
    },
    "observe_sampled": {
        "boundaries": [{"name": "random", "probability": 0.3, "seed": 5}],
        "selector": {"name": "kl_fusion"},
        "refresh": {"max_segment_tokens": 30},
        "memory": {"dense_layers": [0]},
        "sampling": {"temperature": 1.1, "seed": 3},
    },
    "rectify": {"slow_step": "rectify", "boundaries": [{"name": "interval", "every_tokens": 5}]},
    "rectify_sampled": {
        "slow_step": "rectify",
        "boundaries": [{"name": "drift", "minimum_mass": 0.3}],
        "selector": {"name": "page", "page_tokens": 4},
        "refresh": {"evidence_queries": 3},
        "sampling": {"temperature": 0.7, "seed": 4},
    },
    "verify": {"slow_step": "verify", "boundaries": [{"name": "punctuation"}]},
    "verify_sampled": {
        "slow_step": "verify",
        "boundaries": [{"name": "never"}],
        "sampling": {"temperature": 1.0, "top_k": 9, "seed": 2},
    },
    "verify_misled": {
        "slow_step": "verify",
        "boundaries": [{"name": "alternating"}],
        "selector": {"name": "worst_first"},
    },
    "forgets_thoughts": {"mode": "dense", "history": {"reasoning": "template"}},
    "observe_forgets_thoughts": {"history": {"reasoning": "template"}},
    "cut_short": {"slow_step": "rectify", "sampling": {"max_new_tokens": 7}},
    "cut_short_observe": {"sampling": {"max_new_tokens": 9}},
}
POLICY_NAMES: tuple[str, ...] = tuple(_CHANGES)


def make_policy(name: str) -> SessionConfig:
    """The policy of a name. Some name adversaries: `adversaries()` must be around it."""
    values = dict(_BASE)
    for key, change in _CHANGES[name].items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    return SessionConfig(**values)


def follows_dense(config: SessionConfig) -> bool:
    """Whether the history that this policy leaves behind is the one of dense processing."""
    exact = config.mode == "dense" or config.slow_step != "observe"
    return exact or config.memory.selected_tokens >= CONTEXT_TOKENS


def predicts_tokens(config: SessionConfig) -> bool:
    """Whether the history left behind tells what every token was drawn from.

    Not under rectify: it computes the keys and values of fast steps again.
    """
    return config.mode == "dense" or config.slow_step != "rectify"
