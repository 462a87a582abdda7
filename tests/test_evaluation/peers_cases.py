"""Planned cases and a stand-in for kvpress, shared by the tests of the comparison with peers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from sfi_agent.evaluation.peers.exchange import Arm, PlannedCase, PlannedTurn, Protocol, plan_json
from sfi_agent.evaluation.peers.worker import cache_keyword

__all__ = ["STOP_ID", "evicting_arm", "fake_kvpress", "planned_case", "plan_for"]

STOP_ID = 100
"""The last id of the tiny models' vocabulary; prompts do not hold it."""


def planned_case(
    protocol: Protocol = "dense_question",
    *,
    turns: int = 1,
    seed: int = 4,
    new_tokens: int = 12,
    context_tokens: int = 50,
) -> PlannedCase:
    """Random ids; questions have 9 tokens.

    With this seed no answer of three turns ends by itself on the tiny Qwen3 model.
    """
    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, STOP_ID) for _ in range(count))

    return PlannedCase(
        name=f"task/{protocol}/{seed}",
        task="task",
        seed=seed,
        protocol=protocol,
        context_ids=ids(context_tokens),
        turns=tuple(PlannedTurn(ids(9), new_tokens) for _ in range(turns)),
        closing_ids=(STOP_ID,),
        stop_ids=(STOP_ID,),
    )


def plan_for(case: PlannedCase, *arms: Arm, kept_tokens: int = 20) -> dict[str, Any]:
    """The plan of one case; its model is loaded by the test."""
    return plan_json(arms, [case], model="none", kept_tokens=kept_tokens)


def evicting_arm(evicts: Any = "prefill", way: Any = "explicit", press: str = "LastPress") -> Arm:
    """An arm that plays a press of `fake_kvpress`."""
    options = {"compression_interval": 4} if evicts == "decoding" else {}
    return Arm("evicting", "evicting", "kvpress", way, press, evicts, options)


class LastPress:
    """Keeps the last tokens of a prompt, on every layer, as presses of kvpress do after a
    prefill: once, when the pass holds all tokens that the cache has."""

    def __init__(self, compression_ratio: float = 0.0) -> None:
        self.compression_ratio = compression_ratio

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        handle = model.model.register_forward_hook(self._after_pass, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _after_pass(
        self, module: Any, arguments: Any, keywords: dict[str, Any], output: Any
    ) -> None:
        cache = keywords[cache_keyword(module)]
        fed = output[0].shape[1]
        if cache.get_seq_length() == fed:
            self.crop(cache, int(fed * (1 - self.compression_ratio)))

    @staticmethod
    def crop(cache: Any, kept: int) -> None:
        for layer in cache.layers:
            layer.keys = layer.keys[:, :, -kept:].contiguous()
            layer.values = layer.values[:, :, -kept:].contiguous()


class WrongPress(LastPress):
    """Keeps one token less than it was asked for."""

    @staticmethod
    def crop(cache: Any, kept: int) -> None:
        LastPress.crop(cache, kept - 1)


class RaisingPress(LastPress):
    """Fails in the middle of a pass, as a press does on a prompt it was not made for."""

    def _after_pass(self, _: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        raise AssertionError("prompt too short")


class DecodingPress(LastPress):
    """Keeps the last tokens after every few passes that are no prefill."""

    def __init__(self, base_press: Any, compression_interval: int, target_size: int) -> None:
        super().__init__()
        assert isinstance(base_press, LastPress)
        self.interval, self.target_size, self.passes = compression_interval, target_size, 0

    def _after_pass(
        self, module: Any, arguments: Any, keywords: dict[str, Any], output: Any
    ) -> None:
        cache = keywords[cache_keyword(module)]
        if cache.get_seq_length() == output[0].shape[1]:
            return
        self.passes += 1
        if self.passes % self.interval == 0:
            self.crop(cache, self.target_size)


def fake_kvpress() -> Any:
    """A module that stands in for kvpress."""
    return SimpleNamespace(
        LastPress=LastPress,
        WrongPress=WrongPress,
        RaisingPress=RaisingPress,
        DecodingPress=DecodingPress,
    )
