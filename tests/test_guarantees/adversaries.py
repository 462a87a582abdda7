"""Detectors and selectors that try to make `verify` wrong, and helpers to put them in place."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sfi_agent import Boundary, Evidence, Selection, StepEvent, TokenEvent
from sfi_agent.plugins import temporary_plugins
from tests.fakes import FakeConfig, FakeDetector, detector_plugin, selector_plugin

__all__ = [
    "ADVERSARIAL_DETECTORS",
    "ADVERSARIAL_SELECTORS",
    "WatchingDetector",
    "adversaries",
    "watching_detectors",
]


class _WorstFirst:
    """Selects what the queries attended to least."""

    needs: frozenset[str] = frozenset()

    def __init__(self, config: Any) -> None:
        self.config = config

    def select(self, evidence: Evidence, budget: int) -> Selection:
        worst = evidence.logits.logsumexp(2).topk(budget, largest=False).indices
        return _chosen(evidence, worst.sort(-1).values)


class _Empty(_WorstFirst):
    """Selects nothing, though it may."""

    def select(self, evidence: Evidence, budget: int) -> Selection:
        heads = evidence.logits.shape[:2]
        counts = torch.zeros(heads, dtype=torch.int64, device=evidence.logits.device)
        return Selection(counts[..., None].expand(*heads, budget) - 1, counts)


class _SameAlways(_WorstFirst):
    """Selects the oldest candidates whatever the evidence says."""

    def select(self, evidence: Evidence, budget: int) -> Selection:
        oldest = torch.arange(budget, device=evidence.logits.device)
        return _chosen(evidence, oldest.expand(*evidence.logits.shape[:2], budget))


class _Moody(_WorstFirst):
    """Selects at random, another number for every head, and never the same twice."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.generator = torch.Generator().manual_seed(5)

    def select(self, evidence: Evidence, budget: int) -> Selection:
        device, heads = evidence.logits.device, evidence.logits.shape[:2]
        noise = torch.rand(
            evidence.logits.shape[:2] + evidence.logits.shape[3:], generator=self.generator
        )
        places = noise.topk(budget).indices.sort(-1).values.to(device)
        counts = torch.randint(0, budget + 1, heads, generator=self.generator).to(device)
        valid = torch.arange(budget, device=device) < counts[..., None]
        positions = torch.where(valid, places + evidence.candidate_start, -1)
        return Selection(positions, counts)


def _chosen(evidence: Evidence, places: Tensor) -> Selection:
    """All these candidates, for every head."""
    heads, budget = places.shape[:2], places.shape[-1]
    counts = torch.full(heads, budget, dtype=torch.int64, device=places.device)
    return Selection((places + evidence.candidate_start).contiguous(), counts)


class _AlwaysNow(FakeDetector):
    """Retries every fast step: there is never a draft."""

    def after_step(self, event: StepEvent) -> Boundary | None:
        return Boundary("again", "now")


class _AlwaysNext(FakeDetector):
    """Reports at every token and every step."""

    def after_step(self, event: StepEvent) -> Boundary | None:
        return Boundary("step")

    def after_token(self, event: TokenEvent) -> Boundary | None:
        return Boundary("token")


class _Alternating(FakeDetector):
    """Answers now, next and nothing in turns; what comes next depends on all it has seen."""

    needs = frozenset({"entropy"})

    def __init__(self, config: Any, tokenizer: Any = None) -> None:
        super().__init__(config, tokenizer)
        self.seen = 0

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        self.seen = len(prompt_ids)

    def after_step(self, event: StepEvent) -> Boundary | None:
        self.seen += 1 + int(10 * (event.entropy_nats or 0.0))
        return Boundary("now", "now") if self.seen % 4 == 0 else None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        self.seen += event.token_id
        return Boundary("next") if self.seen % 5 == 0 else None

    def snapshot(self) -> Any:
        return self.seen

    def restore(self, state: Any) -> None:
        self.seen = state


class _Forgetful(FakeDetector):
    """Draws lots, and breaks its contract: nothing is put back by `restore`."""

    needs = frozenset({"text", "attention_drift"})

    def __init__(self, config: Any, tokenizer: Any = None) -> None:
        super().__init__(config, tokenizer)
        self.lots = random.Random(3)

    def after_step(self, event: StepEvent) -> Boundary | None:
        lot = self.lots.random()
        return Boundary("lot", "now" if lot < 0.1 else "next") if lot < 0.2 else None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        return Boundary("lot") if self.lots.random() < 0.1 else None


ADVERSARIAL_SELECTORS: tuple[str, ...] = ("worst_first", "empty", "same_always", "moody")
ADVERSARIAL_DETECTORS: tuple[str, ...] = ("always_now", "always_next", "alternating", "forgetful")

_SELECTORS = (_WorstFirst, _Empty, _SameAlways, _Moody)
_DETECTORS = (_AlwaysNow, _AlwaysNext, _Alternating, _Forgetful)


@contextmanager
def adversaries() -> Iterator[None]:
    """All of them can be named in configurations inside this block."""
    plugins: dict[str, object] = {}
    for name, selector in zip(ADVERSARIAL_SELECTORS, _SELECTORS, strict=True):
        plugins[name] = selector_plugin(name, FakeConfig, selector)
    for name, detector in zip(ADVERSARIAL_DETECTORS, _DETECTORS, strict=True):
        plugins[name] = detector_plugin(name, FakeConfig, detector)
    with temporary_plugins(**plugins):
        yield


class WatchingDetector(FakeDetector):
    """Its state is the list of all events since the prompt; it reports by a rule of its own.

    Attributes:
        events: What it was told since the last reset and not taken back.
        handed_out: One copy of `events` per `after_token`, never taken back.
    """

    needs = frozenset({"text", "entropy", "attention_drift"})

    def __init__(self, config: Any, tokenizer: Any = None) -> None:
        super().__init__(config, tokenizer)
        self.events: list[Any] = []
        self.restored = 0

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        self.events = [("reset", tuple(prompt_ids), prompt_text)]

    def after_step(self, event: StepEvent) -> Boundary | None:
        self.events.append(event)
        return Boundary("watched", "now") if event.position % 11 == 0 else None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        self.events.append(event)
        return Boundary("watched") if event.token_id % 13 == 0 else None

    def snapshot(self) -> Any:
        return tuple(self.events)

    def restore(self, state: Any) -> None:
        self.events = list(state)
        self.restored += 1


@contextmanager
def watching_detectors() -> Iterator[list[WatchingDetector]]:
    """Inside this block "watching" names a `WatchingDetector`; yields those that were built."""
    built: list[WatchingDetector] = []

    def factory(config: Any, tokenizer: Any) -> WatchingDetector:
        built.append(WatchingDetector(config, tokenizer))
        return built[-1]

    with temporary_plugins(watching=detector_plugin("watching", FakeConfig, factory)):
        yield built
