"""Plugins that exist in memory only; they enter through the same hooks as real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sfi_agent import Boundary, Evidence, Selection, Settings, StepEvent, TokenEvent, hookimpl

__all__ = [
    "FakeConfig",
    "FakeDetector",
    "FakeSelector",
    "LooseConfig",
    "SeededConfig",
    "detector_plugin",
    "selector_plugin",
]


class FakeConfig(Settings):
    """Options of the fakes: one of each shape that options come in."""

    strength: float = Field(default=0.5, ge=0.0, le=1.0)
    window_tokens: int = Field(default=8, ge=1)
    words: tuple[str, ...] = Field(default=(), strict=False)
    when: Literal["now", "next"] = "next"
    label: str | None = None


class SeededConfig(Settings):
    """Options with a seed that a session fills in."""

    seed: int | None = Field(default=None, ge=0)


class LooseConfig(BaseModel):
    """Options as an author writes them who does not know `Settings`."""

    model_config = ConfigDict(extra="forbid")

    values: list[int] = [1, 2]


class FakeDetector:
    """Never reports anything; keeps what it was built from."""

    needs: frozenset[str] = frozenset()

    def __init__(self, config: Any, tokenizer: Any = None) -> None:
        self.config = config
        self.tokenizer = tokenizer

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None: ...

    def after_step(self, event: StepEvent) -> Boundary | None:
        return None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        return None

    def snapshot(self) -> None: ...

    def restore(self, state: None) -> None: ...


class FakeSelector:
    """Cannot select; keeps what it was built from."""

    needs: frozenset[str] = frozenset()

    def __init__(self, config: Any) -> None:
        self.config = config

    def select(self, evidence: Evidence, budget: int) -> Selection:
        raise NotImplementedError


def detector_plugin(
    name: str,
    config: type[BaseModel] = FakeConfig,
    factory: Callable[..., Any] = FakeDetector,
) -> object:
    """A plugin that registers one detector."""

    class Plugin:
        @hookimpl
        def sfi_register_boundary_detectors(self, register: Callable[..., Any]) -> None:
            register(name, config, factory)

    return Plugin()


def selector_plugin(
    name: str,
    config: type[BaseModel] = FakeConfig,
    factory: Callable[..., Any] = FakeSelector,
) -> object:
    """A plugin that registers one selector."""

    class Plugin:
        @hookimpl
        def sfi_register_selectors(self, register: Callable[..., Any]) -> None:
            register(name, config, factory)

    return Plugin()
