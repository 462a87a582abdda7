"""`random`: boundaries by chance, seeded. The control in an ablation of where boundaries fall."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from pydantic import Field

from sfi_agent import Boundary, Settings, StepEvent, TokenEvent

__all__ = ["Random", "RandomConfig"]

_DEFAULT_SEED = 0  # The default of `sampling.seed`, for a detector built outside a session.


class RandomConfig(Settings):
    """Options of `random`."""

    probability: float = Field(
        default=0.05,
        ge=0.0,
        le=1.0,
        description="Probability that a token is a boundary.",
        json_schema_extra={"unit": "probability"},
    )
    seed: int | None = Field(
        default=None,
        description="Seed of the draws; null takes the session's sampling.seed.",
        json_schema_extra={"unit": "seed"},
    )


class Random:
    """Reports each token as a boundary with a fixed probability.

    The draw of a token is a hash of (seed, absolute position) and of nothing else: a rewind, a
    fork or another order of calls gives the same boundaries at the same positions. Compare a
    detector with this one at the same slow share to see whether *where* it reports matters.
    `random_periodic` in the ablations of Slow-Fast Inference (arXiv 2603.12038), there with a
    generator whose state depends on the history of calls.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: RandomConfig, tokenizer: Any = None) -> None:
        seed = _DEFAULT_SEED if config.seed is None else config.seed
        # The seed keys the hash as text, so that seeds of any size stay distinct.
        self._key = blake2b(str(seed).encode(), digest_size=32).digest()
        self._limit = round(config.probability * 2**64)

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        """There is nothing to forget."""

    def after_step(self, event: StepEvent) -> Boundary | None:
        """No boundary: tokens are drawn, not steps."""
        return None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        """A boundary with the configured probability, decided by seed and position."""
        counter = event.position.to_bytes(16, "little", signed=True)
        draw = blake2b(counter, key=self._key, digest_size=8).digest()
        if int.from_bytes(draw, "little") >= self._limit:
            return None
        return Boundary("random: drawn")

    def snapshot(self) -> None:
        """There is no state."""
        return None

    def restore(self, state: None) -> None:
        """There is no state."""
