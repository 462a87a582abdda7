"""Loading a session: read, compare, verify, and only then build.

Nothing is opened on the model before everything has been compared, and nothing that a file says
is used before it has been checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sfi_agent.config import SessionConfig
from sfi_agent.engine.saved_history import SavedPart, model_layers
from sfi_agent.errors import InputError, StoreError, explain
from sfi_agent.observe.log import log_event
from sfi_agent.session.overflow import OverflowPolicy, checked_policy
from sfi_agent.session.store.directory import MANIFEST_NAME, StoreDirectory, directory_path
from sfi_agent.session.store.manifest import SavedLayer, SavedSession
from sfi_agent.session.store.manifest_file import damaged, parse_manifest, read_manifest
from sfi_agent.session.store.mismatches import Mismatches, find_mismatches
from sfi_agent.session.store.rebuilding import rebuild
from sfi_agent.session.store.shard_reading import map_layers, open_shards, verify_shards
from sfi_agent.session.store.understanding import Understood, understand
from sfi_agent.session.tool_use.tools import Tool, ToolSet

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine
    from sfi_agent.session.session import Session

__all__ = ["Check", "OnMismatch", "load_session"]

OnMismatch = Literal["error", "reprefill"]
Check = Literal["full", "sizes"]

_TRIES = 3


def load_session(
    engine: Engine,
    directory: str | os.PathLike[str],
    tools: Sequence[Callable[..., Any] | Tool] | None,
    config: SessionConfig | None,
    overflow: OverflowPolicy,
    on_mismatch: OnMismatch,
    check: Check,
) -> Session:
    """See `Engine.load_session`."""
    _check_choice("on_mismatch", on_mismatch, get_args(OnMismatch))
    _check_choice("check", check, get_args(Check))
    path, overflow = directory_path(directory), checked_policy(overflow)
    if config is not None:
        engine.check_config(config)
    given = ToolSet(tools) if tools is not None else None
    with _typed_errors(path), StoreDirectory.opened(path) as store:
        found, parts, mismatches = _read(engine, store, given, config, on_mismatch, check)
        chosen = config or found.policy
        session = rebuild(engine, found, parts, mismatches, chosen, overflow, store)
    _log(found.saved, mismatches, path, bool(parts))
    return session


def _read(
    engine: Engine,
    store: StoreDirectory,
    given: ToolSet | None,
    config: SessionConfig | None,
    on_mismatch: OnMismatch,
    check: Check,
) -> tuple[Understood, list[list[SavedPart]], Mismatches]:
    """The session as it stands in the files, its keys and values by layer (none where they are
    not used), and what does not fit."""
    for tries_left in reversed(range(_TRIES)):
        data = read_manifest(store)
        saved = parse_manifest(data, store.path)
        found = understand(engine, saved, store.path, given)
        mismatches = find_mismatches(
            engine, saved, found.compared_tools, found.policy, given, config
        )
        if mismatches.found and on_mismatch == "error":
            raise mismatches.error(store.path, "load it with what it was saved with")
        if mismatches.found:
            return found, [], mismatches
        found.check_ids(engine, store.path)
        try:
            return found, _history(engine, store, saved, check), mismatches
        except FileNotFoundError as error:
            # Somebody may have saved meanwhile and removed what the older state named.
            if not tries_left or read_manifest(store) == data:
                raise damaged(store.path, f"no file {error.filename}") from error
    raise AssertionError("the last try returns or raises")


def _history(
    engine: Engine, store: StoreDirectory, saved: SavedSession, check: Check
) -> list[list[SavedPart]]:
    if not saved.history.stretches:
        return []
    layers = model_layers(engine.runner)
    expected = tuple(
        SavedLayer(
            kv_heads=sizes.kv_heads,
            key_dim=sizes.key_dim,
            value_dim=sizes.value_dim,
            window=window,
        )
        for sizes, window in zip(layers, engine.shape.windows, strict=True)
    )
    if saved.history.layers != expected:
        raise damaged(store.path / MANIFEST_NAME, "layers that this model does not have")
    with open_shards(store, saved.history, layers) as stretches:
        if check == "full":
            verify_shards(stretches)
        return map_layers(stretches, len(layers))


def _check_choice(name: str, given: object, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed)
        raise InputError(explain("loaded a session", got=f"{name}={given!r}", allowed=choices))


def _log(saved: SavedSession, mismatches: Mismatches, path: Path, with_history: bool) -> None:
    if mismatches.found:
        log_event(
            "warning",
            "saved_history_unused",
            session=saved.session_id,
            directory=str(path),
            mismatches=mismatches.names,
            reason=mismatches.words,
            processed_tokens=saved.processed_tokens,
        )
    log_event(
        "info",
        "session_loaded",
        session=saved.session_id,
        directory=str(path),
        revision=saved.revision,
        tokens=len(saved.token_ids),
        history_tokens=saved.processed_tokens if with_history else 0,
    )


@contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            explain(
                f"loaded the session in {path}",
                got=f"no {MANIFEST_NAME} there",
                allowed="a directory that session.save wrote",
            )
        ) from error
    except OSError as error:
        raise StoreError(explain(f"loaded the session in {path}", got=str(error))) from error
