"""A policy of an ablation, and the set of them that a grid stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sfi_agent.config import SessionConfig
from sfi_agent.evaluation.ablation.entries import entry_label

__all__ = ["DENSE", "Policy", "PolicySet", "Skipped"]

DENSE = "dense"
"""Name of the reference policy, which is always played."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy of an ablation.

    Attributes:
        name: Unique in the grid; made of the values of the axes that vary.
        config: What sessions run with; `sampling.seed` is set when a case is played.
        preset: The preset it starts from; None without.
        boundaries: Name of its set of detectors.
        settings: Values of the dotted axes.
    """

    name: str
    config: SessionConfig
    preset: str | None = None
    boundaries: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def with_seed(self, seed: int) -> SessionConfig:
        """The configuration for the cases of one seed."""
        return self.config.replace(sampling={"seed": seed})

    def parts(self) -> dict[str, Any]:
        """The policy in columns, for tables; None where mode dense has no such thing."""
        config = self.config
        sparse = config.mode == "slow_fast"
        memory, refresh = config.memory, config.refresh
        columns = {
            "boundaries": self.boundaries,
            "selector": entry_label(config.selector),
            "slow_step": config.slow_step,
            "sink_tokens": memory.sink_tokens,
            "selected_tokens": memory.selected_tokens,
            "recent_tokens": memory.recent_tokens,
            "dense_layers": list(memory.dense_layers),
            "min_segment_tokens": refresh.min_segment_tokens,
            "max_segment_tokens": refresh.max_segment_tokens,
        }
        return {
            "name": self.name,
            "preset": self.preset,
            "mode": config.mode,
            **{key: value if sparse else None for key, value in columns.items()},
            "settings": dict(self.settings),
        }


@dataclass(frozen=True, slots=True)
class Skipped:
    """A combination of the grid that is not run.

    Attributes:
        policy: The name it would have had.
        reason: Why not, as a sentence.
    """

    policy: str
    reason: str


@dataclass(frozen=True, slots=True)
class PolicySet:
    """What a grid multiplies out to.

    Attributes:
        dense: The reference; it samples as the base does.
        policies: In the order of the grid, without dense.
        skipped: Combinations left out, with reasons.
    """

    dense: Policy
    policies: tuple[Policy, ...]
    skipped: tuple[Skipped, ...]

    @property
    def with_dense(self) -> tuple[Policy, ...]:
        """Dense first, then the policies."""
        return (self.dense, *self.policies)
