"""What a saved session was made with, beside what it is loaded into."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfi_agent.config import SessionConfig
from sfi_agent.errors import StoreMismatchError, explain
from sfi_agent.session.reply import ReuseLostReason
from sfi_agent.session.store.fingerprints import fingerprint_model, fingerprint_tokenizer
from sfi_agent.session.store.manifest import SavedSession
from sfi_agent.session.tool_use.tools import ToolSet

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine

__all__ = ["Mismatches", "find_mismatches"]


@dataclass(frozen=True, slots=True)
class Mismatches:
    """What differs, by name, with words for a message.

    Attributes:
        found: Name and description of each: "model", "weights", "dtype", "tokenizer",
            "chat_template", "tools" or "policy".
    """

    found: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.found)

    @property
    def words(self) -> str:
        return "; ".join(words for _, words in self.found)

    @property
    def ids_mean_the_same(self) -> bool:
        """Whether the ids can stay: tokenizer, template and tools are those that made them."""
        return not {"tokenizer", "chat_template", "tools"} & set(self.names)

    @property
    def reason(self) -> ReuseLostReason:
        """Why the history is lost, for `Usage`."""
        return "tools_changed" if "tools" in self.names else "model_changed"

    def error(self, path: object, remedy: str) -> StoreMismatchError:
        """The refusal that lists all of them."""
        message = explain(f"loaded the session in {path}", got=self.words, remedy=remedy)
        return StoreMismatchError(message, mismatches=self.names)


def find_mismatches(
    engine: Engine,
    saved: SavedSession,
    saved_tools: tuple[str, ...],
    policy: SessionConfig,
    tools: ToolSet | None,
    config: SessionConfig | None,
) -> Mismatches:
    """Compare everything, so that one message can say all.

    Args:
        engine: What the session is to be loaded into.
        saved: The session.
        saved_tools: Its tools as `ToolSet.canonical_json` has them.
        policy: Its policy.
        tools: The tools given; None takes the saved ones.
        config: The policy given; None takes the saved one.
    """
    model, text = fingerprint_model(engine.model), fingerprint_tokenizer(engine.tokenizer)
    was, found = saved.model, list[tuple[str, str]]()
    if model.class_name != was.class_name:
        found.append(("model", f"a {was.class_name}, this engine has a {model.class_name}"))
    elif model.config != was.config:
        found.append(("model", f"another configuration of {was.class_name}"))
    if model.dtype != was.dtype:
        found.append(("dtype", f"numbers in {was.dtype}, this model has {model.dtype}"))
    elif model.weights != was.weights:
        found.append(("weights", f"weights {was.weights[:8]}, this model has {model.weights[:8]}"))
    if text.tokenizer != saved.tokenizer:
        found.append(("tokenizer", _difference("tokenizer", saved.tokenizer, text.tokenizer)))
    if text.chat_template != saved.chat_template:
        words = _difference("chat template", saved.chat_template, text.chat_template)
        found.append(("chat_template", words))
    if tools is not None and tools.canonical_json != saved_tools:
        found.append(("tools", _tool_difference(saved_tools, tools.canonical_json)))
    if config is not None and config != policy:
        found.append(("policy", f"another policy ({_differing(policy, config)})"))
    return Mismatches(tuple(found))


def _difference(name: str, saved: str | None, present: str | None) -> str:
    if saved is None:
        return f"no {name}, this engine has one"
    return f"a {name}, this engine has none" if present is None else f"another {name}"


def _tool_difference(saved: tuple[str, ...], given: tuple[str, ...]) -> str:
    before, now = (
        {json.loads(text)["function"]["name"]: text for text in texts} for texts in (saved, given)
    )
    names = {
        "gone": sorted(set(before) - set(now)),
        "new": sorted(set(now) - set(before)),
        "changed": sorted(name for name in set(now) & set(before) if now[name] != before[name]),
    }
    words = [f"{kind}: {', '.join(which)}" for kind, which in names.items() if which]
    return f"other tools ({'; '.join(words)})"


def _differing(policy: SessionConfig, config: SessionConfig) -> str:
    keys = [
        key for key in SessionConfig.model_fields if getattr(policy, key) != getattr(config, key)
    ]
    return ", ".join(keys)
