"""Saving a session: what is new goes into new files, then one rename makes it the state."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sfi_agent.engine.saved_history import form_of, layer_sizes
from sfi_agent.errors import StoreConflictError, StoreError, explain
from sfi_agent.observe.log import log_event
from sfi_agent.session.store.directory import MANIFEST_NAME, StoreDirectory, directory_path
from sfi_agent.session.store.fingerprints import fingerprint_model, fingerprint_tokenizer
from sfi_agent.session.store.manifest import (
    SavedConversation,
    SavedHistory,
    SavedLayer,
    SavedSession,
    SavedStretch,
)
from sfi_agent.session.store.manifest_file import manifest_bytes, parse_manifest, read_manifest
from sfi_agent.session.store.report import SaveReport
from sfi_agent.session.store.shard_form import DTYPE_NAMES, name_of_dtype
from sfi_agent.session.store.shard_writing import write_stretch
from sfi_agent.session.store.stretches import plan_stretches, used_part
from sfi_agent.session.store.trace_columns import columns_of
from sfi_agent.session.store.transcript_records import saved_spans, text_of

if TYPE_CHECKING:
    from sfi_agent.engine.sequence import SequenceState
    from sfi_agent.session.chat import Chat
    from sfi_agent.session.token_core import TokenCore

__all__ = ["save_session"]


def save_session(
    core: TokenCore, chat: Chat | None, directory: str | os.PathLike[str], *, overwrite: bool
) -> SaveReport:
    """See `Session.save`; the caller owns the session, which is open."""
    started = time.perf_counter()
    path = directory_path(directory)
    with _typed_errors(path), StoreDirectory.opened(path, create=True) as store, store.locked():
        present = _present(store, overwrite)
        kept_tokens = _kept_tokens(store, core, present, overwrite)
        saved, data, new_bytes = _write(store, core, chat, present, kept_tokens)
        core.lineage.note_saved(store.key, saved.save_id, saved.processed_tokens)
        store.remove_all_but({shard.name for shard in saved.history.shards})
    report = SaveReport(
        bytes_written=new_bytes + len(data),
        bytes_total=sum(shard.bytes for shard in saved.history.shards) + len(data),
        revision=saved.revision,
        seconds=time.perf_counter() - started,
    )
    log_event(
        "info",
        "session_saved",
        session=core.id,
        directory=str(path),
        tokens=len(saved.token_ids),
        revision=report.revision,
        bytes_written=report.bytes_written,
        bytes_total=report.bytes_total,
        seconds=round(report.seconds, 6),
    )
    return report


def _present(store: StoreDirectory, overwrite: bool) -> SavedSession | None:
    """What the directory holds now."""
    try:
        return parse_manifest(read_manifest(store), store.path)
    except FileNotFoundError:
        return None
    except StoreError as error:
        if overwrite:
            return None
        raise StoreConflictError(
            explain(
                f"saved a session to {store.path}",
                got=f"a saved session there that cannot be read ({error})",
                allowed="a directory without a session, or with one that can be read",
                remedy="save to another directory, or pass overwrite=True to give up what is there",
            )
        ) from error


def _kept_tokens(
    store: StoreDirectory, core: TokenCore, present: SavedSession | None, overwrite: bool
) -> int:
    """How many of the keys and values in the directory are still those of the session.

    Raises:
        StoreConflictError: What is there came after what the session knows of.
    """
    if present is None:
        return 0
    kept = core.lineage.kept_tokens(present.save_id)
    if kept is not None:
        return kept
    if core.lineage.knows(store.key) or present.session_id == core.id:
        if overwrite:
            return 0
        raise StoreConflictError(
            explain(
                f"saved session {core.id} to {store.path}",
                got=f"revision {present.revision} of session {present.session_id} there, which "
                "was saved since this session saved or loaded there",
                allowed="the revision that this session knows",
                remedy="load it and go on from there, save to another directory, or pass "
                "overwrite=True to give up what is there",
            )
        )
    log_event(
        "warning",
        "session_replaced",
        session=core.id,
        directory=str(store.path),
        replaced_session=present.session_id,
        replaced_tokens=len(present.token_ids),
    )
    return 0


def _write(
    store: StoreDirectory,
    core: TokenCore,
    chat: Chat | None,
    present: SavedSession | None,
    kept_tokens: int,
) -> tuple[SavedSession, bytes, int]:
    """Write the files; the manifest's content, and the bytes of new shards, come back too."""
    draft = _draft(core, chat, present.revision + 1 if present is not None else 1)
    sequence = core.state().sequence
    layers = _layers(sequence)
    kept: list[SavedStretch] = []
    if present is not None and present.history.layers == layers:
        kept = _undamaged(store, used_part(present.history.stretches, kept_tokens))
    tokens = sequence.processed_tokens
    stretches, start = plan_stretches(kept, tokens)
    new: SavedStretch | None = None
    try:
        if start < tokens:
            new = write_stretch(store, sequence, start, tokens)
            stretches.append(new)
        form = form_of(sequence)
        history = SavedHistory(
            layers=layers,
            extents=form.extent_tokens,
            continues_last=form.continues_last,
            stretches=tuple(stretches),
        )
        saved = draft(processed_tokens=tokens, history=history)
        data = manifest_bytes(saved)
        store.replace_manifest(data)
    except BaseException:
        _remove_unnamed(store, new)
        raise
    return saved, data, sum(shard.bytes for shard in new.shards) if new is not None else 0


def _draft(core: TokenCore, chat: Chat | None, revision: int) -> Callable[..., SavedSession]:
    """A saved session that lacks its history.

    Raises:
        StoreError: A message holds something that cannot be written.
    """
    state, text = core.state(), fingerprint_tokenizer(core.engine.tokenizer)
    schemas = chat.tools.schemas if chat is not None else ()
    try:
        conversation = _conversation(chat) if chat is not None else None
        tools = tuple(text_of(schema) for schema in schemas)
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(
            explain(
                f"saved session {core.id}",
                got=f"a message, call or result that is no plain JSON data ({error})",
                allowed="texts, numbers, lists and mappings",
            )
        ) from error
    return partial(
        SavedSession,
        revision=revision,
        save_id=secrets.token_hex(16),
        session_id=core.id,
        model=fingerprint_model(core.engine.model),
        tokenizer=text.tokenizer,
        chat_template=text.chat_template,
        tools=tools,
        system=chat.system if chat is not None else None,
        policy=core.config.model_dump(mode="json"),
        token_ids=tuple(state.ids),
        prompt_start=state.prompt_start,
        conversation=conversation,
        trace=columns_of(core.trace),
    )


def _conversation(chat: Chat) -> SavedConversation:
    return SavedConversation(
        spans=saved_spans(chat.transcript.spans),
        unsent_results=tuple(text_of(result) for result in chat.unsent_results),
        reuse_lost_reason=chat.reuse_lost_reason,
    )


def _layers(sequence: SequenceState) -> tuple[SavedLayer, ...]:
    if not sequence.processed_tokens:
        return ()
    layers = []
    for layer in sequence.layers:
        sizes = layer_sizes(layer.history)
        if name_of_dtype(sizes.dtype) not in DTYPE_NAMES:
            got, allowed = f"keys in {sizes.dtype}", ", ".join(DTYPE_NAMES)
            raise StoreError(explain("saved a history", got=got, allowed=allowed))
        layers.append(
            SavedLayer(
                kv_heads=sizes.kv_heads,
                key_dim=sizes.key_dim,
                value_dim=sizes.value_dim,
                window=layer.window,
            )
        )
    return tuple(layers)


def _undamaged(store: StoreDirectory, stretches: list[SavedStretch]) -> list[SavedStretch]:
    """Those before the first whose files are gone or of another length; the rest is written
    again from memory."""
    for index, stretch in enumerate(stretches):
        if any(store.size(shard.name) != shard.bytes for shard in stretch.shards):
            return stretches[:index]
    return stretches


def _remove_unnamed(store: StoreDirectory, new: SavedStretch | None) -> None:
    """After a failure: remove new files, unless the failure came when they had a manifest."""
    try:
        named = {s.name for s in parse_manifest(read_manifest(store), store.path).history.shards}
    except FileNotFoundError:
        named = set()
    except (OSError, StoreError):
        return
    for shard in new.shards if new is not None else ():
        if shard.name not in named:
            store.remove(shard.name)


@contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            explain(
                f"saved a session to {path}",
                got=str(error),
                allowed="a directory that can be made and written to",
                remedy=f"the session is unchanged, and {MANIFEST_NAME} there, if there was one, "
                "names the state before",
            )
        ) from error
