"""The contestants, and the one number they are held to: tokens kept per layer and KV head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfi_agent.config import SessionConfig
from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.peers.exchange import Arm
from sfi_agent.presets import PRESETS

__all__ = [
    "DENSE_ARM",
    "Contest",
    "WORKER_ARMS",
    "arm_names",
    "choose_arms",
    "memory_tokens",
]

DENSE_ARM = "dense_generate"
"""The arm that agreement is measured against: transformers alone, in this environment."""
DENSE_SESSION = "dense_session"
_SINK_TOKENS, _RECENT_TOKENS = 4, 256
_DECODING_INTERVAL_TOKENS = 32


def _evicting(name: str, press: str, **options: int) -> tuple[Arm, Arm]:
    """A press that evicts after the prefill, played the right way and the way users write."""
    title = f"kvpress {press}"
    return (
        Arm(name, title, "kvpress", "explicit", press, "prefill", options),
        Arm(
            f"{name}_generate",
            f"{title}, generate",
            "kvpress",
            "generate",
            press,
            "prefill",
            options,
        ),
    )


_DECODING = {"compression_interval": _DECODING_INTERVAL_TOKENS}
WORKER_ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(DENSE_ARM, "dense, transformers generate", "ours", "generate"),
        Arm("dense_peer", "dense, transformers of kvpress", "kvpress", "generate"),
        *_evicting("snapkv", "SnapKVPress", window_size=64, kernel_size=5),
        *_evicting("expected_attention", "ExpectedAttentionPress"),
        *_evicting("knorm", "KnormPress"),
        *_evicting("streaming_llm", "StreamingLLMPress", n_sink=4),
        Arm(
            "decoding_knorm",
            "kvpress DecodingPress(Knorm)",
            "kvpress",
            "explicit",
            "KnormPress",
            "decoding",
            _DECODING,
        ),
        Arm(
            "decoding_knorm_generate",
            "kvpress DecodingPress(Knorm), generate",
            "kvpress",
            "generate",
            "KnormPress",
            "decoding",
            _DECODING,
        ),
    )
}
"""Options are the presses' own defaults, written out where they decide what is kept.

DecodingPress evicts every 32 steps here, about as often as the presets take a slow step; its
default of 512 steps would not evict once within answers of this length.
"""


@dataclass(frozen=True, slots=True)
class Contest:
    """Who plays.

    Attributes:
        worker_arms: Played by the worker script, in one of the two environments.
        policies: Played by sessions, by name; mode dense is among them if it was chosen.
        titles: Every arm's name in words, in the order of the tables.
        kept_tokens: Tokens that every sparse arm may keep or see, per layer and KV head.
    """

    worker_arms: tuple[Arm, ...]
    policies: Mapping[str, SessionConfig]
    titles: Mapping[str, str]
    kept_tokens: int

    @property
    def needs_kvpress(self) -> bool:
        """Whether any arm runs in the peer's environment."""
        return any(arm.environment == "kvpress" for arm in self.worker_arms)


def memory_tokens(budget: int) -> int:
    """Tokens of a memory with this budget, 4 sink and 256 recent tokens; all arms keep as many."""
    return budget + _SINK_TOKENS + _RECENT_TOKENS


def arm_names() -> tuple[str, ...]:
    """Every arm, in the order of the tables."""
    worker = [name for name in WORKER_ARMS if name != DENSE_ARM]
    return (DENSE_ARM, DENSE_SESSION, *PRESETS, *worker)


def choose_arms(budget: int, names: Sequence[str] = ()) -> Contest:
    """The arms of these names, held to one size.

    Args:
        budget: Selected tokens of a preset with 4 sink and 256 recent tokens, at least 0. A
            preset with another sink or recent selects so many more or fewer that its memory has
            the same size.
        names: From `arm_names()`; none means all. `dense_generate`, which the others are
            compared with, always plays.

    Raises:
        InputError: A name is unknown, or the budget is too small for a preset.
        ConfigError: A chosen preset cannot run.
    """
    unknown = [name for name in names if name not in arm_names()]
    if unknown or budget < 0:
        raise InputError(
            explain(
                "Side by side",
                got=f"arms {unknown}" if unknown else f"budget {budget}",
                allowed=", ".join(arm_names()) if unknown else "0 or more",
            )
        )
    chosen = [name for name in arm_names() if not names or name in names or name == DENSE_ARM]
    kept = memory_tokens(budget)
    policies = {name: _policy(name, kept) for name in chosen if name not in WORKER_ARMS}
    titles = {
        name: WORKER_ARMS[name].title if name in WORKER_ARMS else _session_title(name)
        for name in chosen
    }
    workers = tuple(WORKER_ARMS[name] for name in chosen if name in WORKER_ARMS)
    return Contest(workers, policies, titles, kept)


def _session_title(name: str) -> str:
    return "dense, session" if name == DENSE_SESSION else f"sfi-agent {name}"


def _policy(name: str, kept_tokens: int) -> SessionConfig:
    if name == DENSE_SESSION:
        return SessionConfig(mode="dense")
    memory = SessionConfig.preset(name).memory
    selected = kept_tokens - memory.sink_tokens - memory.recent_tokens
    if selected < 0:
        raise InputError(
            explain(
                f"Side by side: a memory of {kept_tokens} tokens for the preset {name!r}",
                got=f"{memory.sink_tokens} sink and {memory.recent_tokens} recent tokens",
                remedy="Give a larger budget",
            )
        )
    return SessionConfig.preset(name, memory={"selected_tokens": selected})
