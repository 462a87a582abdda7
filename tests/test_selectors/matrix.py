"""Every built-in selector with two strengths. A new selector is a new pair of rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sfi_agent import Selector, Settings
from sfi_selectors import plugin


@dataclass(frozen=True)
class Row:
    """A selector's name, its options, and whether it promises to fill its budget."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    fills_budget: bool = True

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def build(self) -> Selector:
        return build(self.name, **self.options)


MATRIX = [
    Row("top_k"),
    Row("per_head"),
    Row("cumulative_mass", fills_budget=False),
    Row("cumulative_mass", {"mass": 0.3}, fills_budget=False),
    Row("cumulative_mass", {"mass": 1.0}),
    Row("kl_fusion"),
    Row("kl_fusion", {"alpha": 0.0, "nms_window": 0, "cross_head_alpha": 0.0}),
    Row("kl_fusion", {"alpha": 1.0, "nms_window": 4, "fusion_limit_multi": 1.0}),
    Row("span"),
    Row("span", {"radius_tokens": 2}),
    Row("page"),
    Row("page", {"page_tokens": 5}),
    Row("question"),
    Row("question", {"question_tokens": 3}),
    Row("window", fills_budget=False),
    Row("random"),
    Row("random", {"seed": 7}),
]


def registered() -> dict[str, tuple[type[Settings], Any]]:
    """What the package's hook implementation offers: name -> (Config, factory)."""
    found: dict[str, tuple[type[Settings], Any]] = {}

    def register(name: str, config: type[Settings], factory: Any) -> None:
        assert name not in found
        found[name] = (config, factory)

    plugin.sfi_register_selectors(register)
    return found


def build(name: str, **options: Any) -> Selector:
    config, factory = registered()[name]
    selector = factory(config(**options))
    assert isinstance(selector, Selector)
    return selector
