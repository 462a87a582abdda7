"""`entropy`: the fast step does not know what comes next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

from pydantic import Field, model_validator

from sfi_agent import Boundary, InputError, Settings, StepEvent, TokenEvent

__all__ = ["Entropy", "EntropyConfig"]

_DEFAULT_THRESHOLD_NATS = 0.3
_WARM_UP_STEPS = 8  # Fewer values do not make a standard deviation worth the name.
_MEMORY_STEPS = 64  # Values weigh equally up to here, then older ones fade exponentially.
_LEAST_DEVIATION_NATS = 0.01  # Keeps the rounding of a flat stretch from counting as a spike.


class EntropyConfig(Settings):
    """Options of `entropy`. Exactly one of the two thresholds is in force."""

    threshold_nats: float | None = Field(
        default=_DEFAULT_THRESHOLD_NATS,
        ge=0.0,
        description="Entropy above which a fast step is reported; null when threshold_sigmas is "
        "in force.",
        json_schema_extra={"unit": "nats"},
    )
    threshold_sigmas: float | None = Field(
        default=None,
        gt=0.0,
        description="Height of a spike over the running mean above which a fast step is "
        "reported, in running standard deviations; null when threshold_nats is in force.",
        json_schema_extra={"unit": "standard deviations"},
    )
    when: Literal["now", "next"] = Field(
        default="now",
        description="Moment of the dense step: now runs the reported token again densely before "
        "anything is drawn from it, next makes the following step slow.",
        json_schema_extra={"unit": "choice"},
    )

    @model_validator(mode="before")
    @classmethod
    def _sigmas_replace_the_default(cls, data: Any) -> Any:
        """A spike threshold given alone puts the default absolute threshold out of force."""
        if not isinstance(data, Mapping) or data.get("threshold_sigmas") is None:
            return data
        return {"threshold_nats": None, **data}

    @model_validator(mode="after")
    def _one_threshold(self) -> EntropyConfig:
        given = {"threshold_nats": self.threshold_nats, "threshold_sigmas": self.threshold_sigmas}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(
                "exactly one of threshold_nats and threshold_sigmas is in force; got "
                + ", ".join(f"{name}={value!r}" for name, value in given.items())
                + "; give one of the two"
            )
        return self


@dataclass(frozen=True, slots=True)
class _Running:
    """Running mean and variance of the entropies of fast steps, in nats."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def deviation(self) -> float:
        return max(sqrt(self.variance), _LEAST_DEVIATION_NATS)

    def with_value(self, value: float) -> _Running:
        """Welford's update while values weigh equally, its exponential form afterwards."""
        steps = min(self.steps + 1, _MEMORY_STEPS)
        difference = value - self.mean
        share = difference / steps
        variance = (1 - 1 / steps) * (self.variance + difference * share)
        return _Running(steps, self.mean + share, variance)


class Entropy:
    """Reports a fast step whose next-token distribution is uncertain.

    The entropy is that of the fast step's softmax at temperature 1 without filters, in nats;
    lower is more certain. With `threshold_nats` a step above that entropy is reported, with
    `threshold_sigmas` a step that lies more than so many running standard deviations above the
    running mean of the fast steps before it (about the last 64; the first 8 only teach the
    mean; a deviation below 0.01 nat counts as 0.01).

    `when="now"` retries the same token densely: a fast step that lacks its support is uncertain,
    and the dense run both mends it and selects that support for the tokens after it.
    `when="next"` keeps the token and makes the following step slow. The entropy-gated retry is
    this project's own.

    Raises:
        InputError: From `after_step`, if the event carries no `entropy_nats`.
    """

    needs: frozenset[str] = frozenset({"entropy"})

    def __init__(self, config: EntropyConfig, tokenizer: Any = None) -> None:
        self._config = config
        self._running = _Running()
        limit = (
            f"{config.threshold_nats:g} nats"
            if config.threshold_sigmas is None
            else f"the running mean by {config.threshold_sigmas:g} sigmas"
        )
        self._boundary = Boundary(f"entropy: above {limit}", config.when)

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        """Forget the running mean."""
        self._running = _Running()

    def after_step(self, event: StepEvent) -> Boundary | None:
        """A boundary when the entropy of this fast step is above the threshold in force."""
        entropy_nats = event.entropy_nats
        if entropy_nats is None:
            raise InputError(
                "entropy judged a fast step; got an event without entropy_nats; allowed: events "
                "that carry what `needs` names. Pass StepEvent(..., entropy_nats=...)."
            )
        if self._config.threshold_nats is not None:
            return self._boundary if entropy_nats > self._config.threshold_nats else None
        spike = self._is_spike(entropy_nats)
        self._running = self._running.with_value(entropy_nats)
        return self._boundary if spike else None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        """No boundary: uncertainty is seen in steps, before a token is drawn."""
        return None

    def snapshot(self) -> _Running:
        """The running mean and variance."""
        return self._running

    def restore(self, state: _Running) -> None:
        """Set the running mean and variance."""
        self._running = state

    def _is_spike(self, entropy_nats: float) -> bool:
        sigmas = self._config.threshold_sigmas
        running = self._running
        if sigmas is None or running.steps < _WARM_UP_STEPS:
            return False
        return entropy_nats > running.mean + sigmas * running.deviation
