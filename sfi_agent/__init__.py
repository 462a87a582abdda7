"""Slow-fast sparse decoding for agent loops on Hugging Face checkpoints.

Importing this package imports neither torch nor transformers: names that need them are resolved
on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sfi_agent.config import SessionConfig
from sfi_agent.errors import (
    CheckpointError,
    ConfigError,
    ContextOverflowError,
    InputError,
    MissingExtraError,
    ModelInUseError,
    NothingPendingError,
    NumericsError,
    OutOfDeviceMemoryError,
    PluginError,
    SessionBusy,
    SessionStateError,
    SfiError,
    StoreConflictError,
    StoreError,
    StoreMismatchError,
    TemplateError,
    ToolDefinitionError,
    ToolServerError,
    UnsupportedModelError,
)
from sfi_agent.hookspecs import hookimpl
from sfi_agent.plugins import build_detector, build_selector, load_plugins
from sfi_agent.protocols import (
    Boundary,
    BoundaryDetector,
    Evidence,
    Ranking,
    Selection,
    Selector,
    StepEvent,
    TokenEvent,
)
from sfi_agent.settings import Settings

if TYPE_CHECKING:
    from sfi_agent.engine.instruments import FastAttention, Instruments
    from sfi_agent.engine.warmup import WarmUpReport
    from sfi_agent.observe.telemetry import Telemetry
    from sfi_agent.observe.trace import StepRecord
    from sfi_agent.session.asynchronous.event_stream import EventStream
    from sfi_agent.session.engine import Engine
    from sfi_agent.session.event_json import event_to_json
    from sfi_agent.session.events import (
        ReasoningDelta,
        Step,
        TextDelta,
        ToolCall,
        ToolResult,
        ToolStart,
        TurnEnd,
    )
    from sfi_agent.session.marks import Mark
    from sfi_agent.session.mcp.offer import ToolAnnotations
    from sfi_agent.session.mcp.tools import McpTools
    from sfi_agent.session.overflow import Overflow, drop_oldest_turns
    from sfi_agent.session.parking import ParkingLimits
    from sfi_agent.session.reply import Reply, Usage
    from sfi_agent.session.session import Session
    from sfi_agent.session.stats import SessionStats
    from sfi_agent.session.store.report import SaveReport
    from sfi_agent.session.templates.template_report import TemplateReport
    from sfi_agent.session.tool_use.tools import Tool

__all__ = [
    "Boundary",
    "BoundaryDetector",
    "CheckpointError",
    "ConfigError",
    "ContextOverflowError",
    "Engine",
    "EventStream",
    "Evidence",
    "FastAttention",
    "InputError",
    "Instruments",
    "Mark",
    "McpTools",
    "MissingExtraError",
    "ModelInUseError",
    "NothingPendingError",
    "NumericsError",
    "OutOfDeviceMemoryError",
    "Overflow",
    "ParkingLimits",
    "PluginError",
    "Ranking",
    "ReasoningDelta",
    "Reply",
    "SaveReport",
    "Selection",
    "Selector",
    "Session",
    "SessionBusy",
    "SessionConfig",
    "SessionStateError",
    "SessionStats",
    "Settings",
    "SfiError",
    "Step",
    "StepEvent",
    "StepRecord",
    "StoreConflictError",
    "StoreError",
    "StoreMismatchError",
    "Telemetry",
    "TemplateError",
    "TemplateReport",
    "TextDelta",
    "TokenEvent",
    "Tool",
    "ToolAnnotations",
    "ToolCall",
    "ToolDefinitionError",
    "ToolResult",
    "ToolServerError",
    "ToolStart",
    "TurnEnd",
    "UnsupportedModelError",
    "Usage",
    "WarmUpReport",
    "build_detector",
    "build_selector",
    "drop_oldest_turns",
    "event_to_json",
    "hookimpl",
    "load_plugins",
]

_RESOLVED_ON_FIRST_USE = {
    "Engine": "sfi_agent.session.engine",
    "EventStream": "sfi_agent.session.asynchronous.event_stream",
    "FastAttention": "sfi_agent.engine.instruments",
    "Instruments": "sfi_agent.engine.instruments",
    "Mark": "sfi_agent.session.marks",
    "Overflow": "sfi_agent.session.overflow",
    "McpTools": "sfi_agent.session.mcp.tools",
    "ReasoningDelta": "sfi_agent.session.events",
    "ParkingLimits": "sfi_agent.session.parking",
    "Reply": "sfi_agent.session.reply",
    "SaveReport": "sfi_agent.session.store.report",
    "Session": "sfi_agent.session.session",
    "SessionStats": "sfi_agent.session.stats",
    "Step": "sfi_agent.session.events",
    "StepRecord": "sfi_agent.observe.trace",
    "Telemetry": "sfi_agent.observe.telemetry",
    "TemplateReport": "sfi_agent.session.templates.template_report",
    "WarmUpReport": "sfi_agent.engine.warmup",
    "TextDelta": "sfi_agent.session.events",
    "Tool": "sfi_agent.session.tool_use.tools",
    "ToolAnnotations": "sfi_agent.session.mcp.offer",
    "ToolCall": "sfi_agent.session.events",
    "ToolResult": "sfi_agent.session.events",
    "ToolStart": "sfi_agent.session.events",
    "TurnEnd": "sfi_agent.session.events",
    "Usage": "sfi_agent.session.reply",
    "drop_oldest_turns": "sfi_agent.session.overflow",
    "event_to_json": "sfi_agent.session.event_json",
}


def _show_public_path(value: Any) -> Any:
    """Let an object name this package as its home, in tracebacks and documentation.

    Classes with annotations of their own (settings, records) keep their module: pydantic and
    `typing.get_type_hints` read those annotations with the names of that module.
    """
    is_class = isinstance(value, type)
    if is_class and vars(value).get("__annotations__"):
        return value
    if is_class or callable(value):
        value.__module__ = __name__
    return value


for _name in __all__:
    if _name not in _RESOLVED_ON_FIRST_USE and _name != "hookimpl":
        _show_public_path(globals()[_name])
del _name


def __getattr__(name: str) -> Any:
    if name not in _RESOLVED_ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_RESOLVED_ON_FIRST_USE[name]), name)
    globals()[name] = _show_public_path(value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
