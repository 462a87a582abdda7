"""Every exception of sfi-agent.

    SfiError
    ├── ConfigError (ValueError)          a setting is wrong; nothing was built
    ├── PluginError                       a plugin failed to load, clashes, or broke its contract
    ├── InputError (ValueError)           ids, messages or arguments are wrong; nothing ran
    │   └── NothingPendingError           decode([]) where no token waits to be processed
    ├── ContextOverflowError              the ids would not fit the model; nothing ran
    ├── ToolDefinitionError (ValueError)  a tool given to a session cannot be described or called
    ├── TemplateError                     the chat template is missing or cannot do what was asked
    ├── SessionStateError (RuntimeError)  a closed session was used, or a mark is no longer valid
    │   └── SessionBusy                   another thread is using this session
    ├── UnsupportedModelError             the model cannot be decoded slow-fast, with the reason
    ├── OutOfDeviceMemoryError            the device has no room for weights, histories or scratch
    ├── NumericsError (ArithmeticError)   a step met numbers that are not finite (debug mode)
    ├── CheckpointError                   a model or tokenizer could not be loaded
    ├── ModelInUseError (RuntimeError)    the model was called from outside while sessions are open
    ├── StoreError                        a saved session cannot be written, read or trusted
    │   ├── StoreMismatchError            it belongs to another model, tokenizer, policy or tools
    │   └── StoreConflictError            the directory holds a state this session does not know
    ├── ToolServerError                   a server of tools cannot be started, reached or used
    └── MissingExtraError (ImportError)   something needs an extra of the package not installed here

Messages say what was attempted, what was got, what is allowed and what to do (`explain`). User
errors raise one of these; `assert` is kept for invariants of our own.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContextOverflowError",
    "InputError",
    "MissingExtraError",
    "ModelInUseError",
    "NothingPendingError",
    "NumericsError",
    "OutOfDeviceMemoryError",
    "PluginError",
    "SessionBusy",
    "SessionStateError",
    "SfiError",
    "StoreConflictError",
    "StoreError",
    "StoreMismatchError",
    "TemplateError",
    "ToolDefinitionError",
    "ToolServerError",
    "UnsupportedModelError",
    "explain",
]


def explain(attempted: str, *, got: str = "", allowed: str = "", remedy: str = "") -> str:
    """One message in the order every error of this package keeps: attempted, got, allowed, remedy.

    Args:
        attempted: What was tried, as a sentence without its full stop.
        got: What was found instead (use `!r` on values).
        allowed: What would have been accepted.
        remedy: What the reader can do now.
    """
    parts = [attempted]
    if got:
        parts.append(f"got {got}")
    if allowed:
        parts.append(f"allowed: {allowed}")
    message = "; ".join(parts) + "."
    return f"{message} {remedy.rstrip('.')}." if remedy else message


class SfiError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(SfiError, ValueError):
    """A setting is out of range, unknown, or not built yet. Raised before anything is created."""


class PluginError(SfiError):
    """A plugin cannot be loaded, clashes with another one, or returned what its contract forbids.

    Attributes:
        plugin: Name under which the plugin is known (entry point, detector or selector name).
        distribution: The distribution it came from, with its version; "built-in" for our own.
    """

    def __init__(self, message: str, *, plugin: str = "", distribution: str = "") -> None:
        super().__init__(message)
        self.plugin = plugin
        self.distribution = distribution


class InputError(SfiError, ValueError):
    """Token ids, messages or arguments of a call are not usable. Nothing ran, nothing changed."""


class NothingPendingError(InputError):
    """`decode([])` was asked to go on where no sampled token waits to be processed."""


class ContextOverflowError(SfiError):
    """The ids would exceed what the model was built for. Raised before any compute.

    Attributes:
        needed_tokens: Length of the sequence that was asked for.
        limit_tokens: Longest sequence this model takes.
    """

    def __init__(self, message: str, *, needed_tokens: int, limit_tokens: int) -> None:
        super().__init__(message)
        self.needed_tokens = needed_tokens
        self.limit_tokens = limit_tokens


class ToolDefinitionError(SfiError, ValueError):
    """A tool has no usable name, schema or signature. Raised when the session is made."""


class TemplateError(SfiError):
    """The tokenizer has no chat template, or the template cannot render what was asked."""


class SessionStateError(SfiError, RuntimeError):
    """The session is closed, or a mark points to something that no longer exists."""


class SessionBusy(SessionStateError):
    """A second thread used a session that has one owner at a time."""


class UnsupportedModelError(SfiError):
    """The model cannot be decoded slow-fast: layer kind, attention keyword or device, by name."""


class OutOfDeviceMemoryError(SfiError):
    """The device has no room left; ids and history are as they were before the step.

    Attributes:
        parts: Bytes by what holds them, such as "weights" and "histories".
    """

    def __init__(self, message: str, *, parts: dict[str, int]) -> None:
        super().__init__(message)
        self.parts = parts


class NumericsError(SfiError, ArithmeticError):
    """A step met numbers that are not finite; only looked for in debug mode.

    Attributes:
        layer: Index of the first layer where it happened; None where it was behind all of them.
    """

    def __init__(self, message: str, *, layer: int | None) -> None:
        super().__init__(message)
        self.layer = layer


class CheckpointError(SfiError):
    """A model or tokenizer could not be loaded from where it was asked for."""


class ModelInUseError(SfiError, RuntimeError):
    """The model was called directly while slow-fast sessions have its attention switched."""


class StoreError(SfiError):
    """A session cannot be saved or loaded: the disk, damage, made-up files, a newer format."""


class StoreMismatchError(StoreError):
    """A saved session does not belong to what it is loaded into. Nothing was built.

    Attributes:
        mismatches: What differs: "model", "weights", "dtype", "tokenizer", "chat_template",
            "tools" or "policy".
    """

    def __init__(self, message: str, *, mismatches: tuple[str, ...]) -> None:
        super().__init__(message)
        self.mismatches = mismatches


class StoreConflictError(StoreError):
    """A directory holds a state that the session to be saved does not know. Nothing was written."""


class ToolServerError(SfiError):
    """A server of tools cannot be started or reached, or offers tools that cannot be used.

    While a session runs, the same trouble is a tool result that the model reads.
    """


class MissingExtraError(SfiError, ImportError):
    """Something needs packages that come with an extra of this one, such as `sfi-agent[mcp]`.

    Attributes:
        extra: Name of the extra.
    """

    def __init__(self, attempted: str, *, extra: str) -> None:
        command = f"pip install 'sfi-agent[{extra}]'"
        super().__init__(
            explain(attempted, got=f"no extra {extra!r} installed", remedy=f"Run: {command}")
        )
        self.extra = extra
