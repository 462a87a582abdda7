"""The named starting points of `SessionConfig.preset`.

The numbers of `published` are the ones printed with the method (SFI, arXiv 2603.12038); those of
the others follow from measurements (docs/policy_study.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sfi_agent.errors import ConfigError, explain

__all__ = ["PRESETS", "Preset", "preset_named"]


@dataclass(frozen=True, slots=True)
class Preset:
    """A named starting point.

    Attributes:
        name: What users say.
        summary: What it is for, as a sentence.
        slow_step: The kind of its slow steps.
        settings: Everything else, as a configuration would write it.
    """

    name: str
    summary: str
    slow_step: Literal["observe", "rectify", "verify"]
    settings: Mapping[str, Any]


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


_TEXT_BOUNDARIES: list[dict[str, Any]] = [{"name": "punctuation"}, {"name": "structure"}]
_ANSWER_START: dict[str, Any] = {"name": "answer_start"}


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
            _settings([*_TEXT_BOUNDARIES, _ANSWER_START], "question", (4, 1024, 256), (4, 128)),
        ),
        Preset(
            "balanced",
            "Retries the uncertain steps densely; meant for most agents.",
            "rectify",
            _settings(
                [*_TEXT_BOUNDARIES, _ANSWER_START, _entropy(0.3, "now")],
                "question",
                (4, 2048, 256),
                (4, 96),
            ),
        ),
        Preset(
            "faithful",
            "Retries already at slight uncertainty and keeps two layers dense; for exact recall.",
            "rectify",
            _settings(
                [*_TEXT_BOUNDARIES, _ANSWER_START, _entropy(0.05, "now")],
                "question",
                (4, 2048, 256),
                (4, 64),
                dense_layers=(0, 1),
            ),
        ),
        Preset(
            "exact",
            "The output of dense decoding, drafted by fast steps and verified by slow ones.",
            "verify",
            _settings(
                [*_TEXT_BOUNDARIES, _entropy(0.3, "now")], "question", (4, 2048, 256), (4, 32)
            ),
        ),
    )
}


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: The name is unknown.
    """
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        allowed = ", ".join(PRESETS)
        raise ConfigError(explain("no preset has this name", got=repr(name), allowed=allowed))
    return preset
