"""The named starting points of `SessionConfig.preset`.

The numbers are starting values; those of `published` are the ones printed with the method (SFI,
arXiv 2603.12038). Two presets are meant for the slow step kind `rectify`, which is not built yet:
they run with `observe` and log `preset_runs_with_observe`. `exact` promises what only `verify`
can keep, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sfi_agent.errors import ConfigError, explain

__all__ = ["PRESETS", "Preset", "log_runs_with_observe", "preset_named"]


@dataclass(frozen=True, slots=True)
class Preset:
    """A named starting point.

    Attributes:
        name: What users say.
        summary: What it is for, as a sentence.
        slow_step: The slow step kind it is meant for.
        settings: Everything else, as a configuration would write it.
    """

    name: str
    summary: str
    slow_step: Literal["observe", "rectify", "verify"]
    settings: Mapping[str, Any]

    @property
    def runs_with_observe(self) -> bool:
        """Whether this preset is meant for `rectify` and runs with `observe` until it is built."""
        return self.slow_step == "rectify"

    @property
    def can_run(self) -> bool:
        """False for a preset whose promise only `verify` can keep, until that is built."""
        return self.slow_step != "verify"


def _settings(
    boundaries: list[dict[str, Any]],
    selector: str,
    memory: tuple[int, int, int],
    segment: tuple[int, int],
    dense_layers: tuple[int, ...] = (),
) -> dict[str, Any]:
    return {
        "boundaries": boundaries,
        "selector": {"name": selector},
        "memory": {
            "sink_tokens": memory[0],
            "selected_tokens": memory[1],
            "recent_tokens": memory[2],
            "dense_layers": list(dense_layers),
        },
        "refresh": {"min_segment_tokens": segment[0], "max_segment_tokens": segment[1]},
    }


def _text_boundaries(*more: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": "punctuation"}, {"name": "structure"}, *more]


def _entropy(threshold_nats: float, when: str) -> dict[str, Any]:
    return {"name": "entropy", "threshold_nats": threshold_nats, "when": when}


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "published",
            "The method with the settings it was published with.",
            "observe",
            _settings([{"name": "punctuation"}], "kl_fusion", (4, 4096, 256), (16, 96)),
        ),
        Preset(
            "fast",
            "Few slow steps and a small memory, for long texts that need little of the past.",
            "observe",
            _settings(_text_boundaries(), "per_head", (4, 1024, 128), (16, 128)),
        ),
        Preset(
            "balanced",
            "Retries the uncertain steps densely; meant for most agents.",
            "rectify",
            _settings(_text_boundaries(_entropy(0.3, "now")), "per_head", (4, 2048, 256), (16, 96)),
        ),
        Preset(
            "faithful",
            "Retries already at slight uncertainty and keeps two layers dense; for exact recall.",
            "rectify",
            _settings(
                _text_boundaries(_entropy(0.02, "now")),
                "per_head",
                (4, 2048, 256),
                (8, 64),
                dense_layers=(0, 1),
            ),
        ),
        Preset(
            "exact",
            "The output of dense decoding, drafted by fast steps and verified by slow ones.",
            "verify",
            _settings(_text_boundaries(_entropy(0.3, "next")), "per_head", (4, 2048, 256), (4, 32)),
        ),
    )
}


def preset_named(name: str) -> Preset:
    """The preset of that name, if it can run.

    Raises:
        ConfigError: The name is unknown, or the preset needs what is not built yet.
    """
    runnable = ", ".join(known for known, preset in PRESETS.items() if preset.can_run)
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise ConfigError(explain("no preset has this name", got=repr(name), allowed=runnable))
    if not preset.can_run:
        raise ConfigError(
            explain(
                f"the preset {name!r} cannot run",
                got=f"slow_step {preset.slow_step!r}, which is not built yet",
                allowed=runnable,
                remedy="Use mode='dense' for the output of dense decoding",
            )
        )
    return preset


def log_runs_with_observe(preset: Preset) -> None:
    """Warn in the log that this preset runs with another slow step kind than it is meant for."""
    # Imported here because most configurations log nothing.
    from sfi_agent.observe.log import log_event

    log_event(
        "warning",
        "preset_runs_with_observe",
        preset=preset.name,
        meant_for=preset.slow_step,
        runs_with="observe",
        reason=f"slow_step {preset.slow_step} is not built yet",
    )
