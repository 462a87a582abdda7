"""The configuration of a session: what YAML, JSON and Python callers write, validated.

Plain data. Knows the names of plugins only through what they registered; imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from pydantic import Field, model_validator

from sfi_agent.config_files import read_mapping, to_yaml, write_mapping
from sfi_agent.config_model import ConfigModel, merge_deeply
from sfi_agent.config_sections import (
    HistorySettings,
    MemorySettings,
    RefreshSettings,
    SamplingSettings,
    ToolSettings,
)
from sfi_agent.errors import ConfigError
from sfi_agent.plugin_options import BoundaryEntry, SelectorEntry
from sfi_agent.presets import preset_named
from sfi_agent.problems import Problem, problems_error

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = [
    "HistorySettings",
    "MemorySettings",
    "RefreshSettings",
    "SamplingSettings",
    "SessionConfig",
    "SessionKeys",
    "ToolSettings",
]

_PUNCTUATION_ALONE: Any = ({"name": "punctuation"},)
_PER_HEAD: Any = {"name": "per_head"}


class SessionKeys(TypedDict, total=False):
    """The keys of a SessionConfig, in the forms in which Python callers may give them."""

    mode: Literal["slow_fast", "dense"]
    slow_step: Literal["observe", "rectify", "verify"]
    boundaries: Iterable[Mapping[str, Any] | BoundaryEntry]
    selector: Mapping[str, Any] | SelectorEntry
    memory: Mapping[str, Any] | MemorySettings
    refresh: Mapping[str, Any] | RefreshSettings
    sampling: Mapping[str, Any] | SamplingSettings
    tools: Mapping[str, Any] | ToolSettings
    history: Mapping[str, Any] | HistorySettings


class SessionConfig(ConfigModel):
    """Everything that decides how a session decodes. Frozen, hashable plain data.

    `SessionConfig(memory={"selected_tokens": 512}, selector={"name": "kl_fusion", "alpha": 0.3})`.
    With mode dense nothing is fast, so boundaries, selector, memory and refresh have no effect;
    they are still validated.

    Raises:
        ConfigError: A key is unknown, a value out of range or not built yet, a plugin unknown.
        PluginError: An installed plugin is broken.
    """

    mode: Literal["slow_fast", "dense"] = Field(
        default="slow_fast",
        description="slow_fast decodes with fast steps between slow ones; dense reads the whole "
        "history for every token.",
        json_schema_extra={"unit": "choice"},
    )
    slow_step: Literal["observe", "rectify", "verify"] = Field(
        default="observe",
        description="What a slow step does with the segment before it: observe keeps it; rectify "
        "computes its keys and values again densely; verify also keeps only those tokens that "
        "dense decoding chooses.",
        json_schema_extra={"unit": "choice"},
    )
    boundaries: tuple[BoundaryEntry, ...] = Field(
        default=_PUNCTUATION_ALONE,
        strict=False,
        description="Boundary detectors; any of them opens a slow step.",
        json_schema_extra={"unit": "entries"},
    )
    selector: SelectorEntry = Field(
        default=_PER_HEAD,
        description="The selector that chooses the selected tokens.",
        json_schema_extra={"unit": "entries"},
    )
    memory: MemorySettings = Field(
        default=MemorySettings(),
        description="What a fast step may attend to.",
        json_schema_extra={"unit": "entries"},
    )
    refresh: RefreshSettings = Field(
        default=RefreshSettings(),
        description="When the memory is refreshed, and from how many queries.",
        json_schema_extra={"unit": "entries"},
    )
    sampling: SamplingSettings = Field(
        default=SamplingSettings(),
        description="How a token is drawn from the logits.",
        json_schema_extra={"unit": "entries"},
    )
    tools: ToolSettings = Field(
        default=ToolSettings(),
        description="How tool calls are decoded and run.",
        json_schema_extra={"unit": "entries"},
    )
    history: HistorySettings = Field(
        default=HistorySettings(),
        description="Where the keys and values of the sequence are kept.",
        json_schema_extra={"unit": "entries"},
    )

    if TYPE_CHECKING:
        # Sections may be given as mappings, which the annotations of the fields do not say.
        def __init__(self, /, **keys: Unpack[SessionKeys]) -> None: ...

    @model_validator(mode="after")
    def _several_queries_need_a_block(self) -> Self:
        queries = self.refresh.evidence_queries
        if queries > 1 and self.slow_step == "observe":
            problem = Problem(
                "refresh.evidence_queries, slow_step",
                got=f"{queries} and observe, whose slow step has one dense query",
                allowed="1 with observe; more with rectify or verify",
            )
            raise problems_error([problem])
        return self

    @classmethod
    def preset(cls, name: str, **overrides: Unpack[SessionKeys]) -> SessionConfig:
        """A named starting point, with changes merged into it.

        Sections are merged key by key; `boundaries` and `selector` are replaced.

        Args:
            name: published, fast, balanced, faithful or exact.
            overrides: Keys of a configuration, such as `memory={"selected_tokens": 512}`.

        Raises:
            ConfigError: The preset is unknown, or an override is not valid.
        """
        preset = preset_named(name)
        base = {"slow_step": preset.slow_step, **preset.settings}
        return cls.model_validate(merge_deeply(base, overrides))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SessionConfig:
        """Read a .yaml, .yml or .json file.

        Raises:
            ConfigError: The file cannot be read, or what it says is not valid.
        """
        source = Path(path)
        try:
            return cls.model_validate(read_mapping(source))
        except ConfigError as error:
            if str(source) in str(error):
                raise
            raise ConfigError(f"In {source}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a .yaml, .yml or .json file that `load` reads back equal.

        Raises:
            ConfigError: The suffix is unknown, or the file cannot be written.
        """
        target = Path(path)
        write_mapping(target, self.model_dump(mode="json"))
        return target

    def to_yaml(self) -> str:
        """The configuration as YAML: every core key, and the plugin options that were given."""
        return to_yaml(self.model_dump(mode="json"))

    def resolved(self) -> dict[str, Any]:
        """The configuration with every plugin option, defaults included; for reports."""
        data = self.model_dump(mode="json")
        data["boundaries"] = [entry.resolved() for entry in self.boundaries]
        data["selector"] = self.selector.resolved()
        return data

    def replace(self, **changes: Unpack[SessionKeys]) -> SessionConfig:
        """A validated copy with changes merged as in `preset`.

        Raises:
            ConfigError: A change is not valid.
        """
        return type(self).model_validate(merge_deeply(self.model_dump(), changes))
