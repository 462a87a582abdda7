"""An open session out of everything that was read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfi_agent.config import SessionConfig
from sfi_agent.engine.memory_parts import typed_memory_errors
from sfi_agent.engine.saved_history import HistoryForm, SavedPart, restore_history
from sfi_agent.errors import ConfigError, StoreError, TemplateError, explain
from sfi_agent.session.chat import Chat, make_chat
from sfi_agent.session.overflow import OverflowPolicy
from sfi_agent.session.session import Session
from sfi_agent.session.store.directory import StoreDirectory
from sfi_agent.session.store.manifest_file import damaged
from sfi_agent.session.store.mismatches import Mismatches
from sfi_agent.session.store.understanding import Understood
from sfi_agent.session.token_core import TokenCore
from sfi_agent.session.transcript import Transcript, TranscriptSpan

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine

__all__ = ["rebuild"]


def rebuild(
    engine: Engine,
    found: Understood,
    parts: Sequence[Sequence[SavedPart]],
    mismatches: Mismatches,
    config: SessionConfig,
    overflow: OverflowPolicy,
    store: StoreDirectory,
) -> Session:
    """An open session out of what was read.

    Args:
        engine, config, overflow: What it is opened with (see `Engine.session`).
        found, store: The session, and where it comes from.
        parts: Its keys and values by layer; none where `mismatches` forbid their use.

    Raises:
        StoreError: What was read makes no session on this engine.
        StoreMismatchError: Its ids are needed and mean nothing here.
    """
    if mismatches.ids_mean_the_same:
        found.check_ids(engine, store.path)
    chat = _chat(engine, found, config, mismatches, store)
    try:
        engine.check_config(config)
        core = TokenCore(engine, config)
    except ConfigError as error:
        raise StoreError(explain(f"loaded the session in {store.path}", got=str(error))) from error
    core.id = found.saved.session_id
    try:
        # Nobody parks it before it is whole; and others may have to make room for it.
        with core.owner.held_for("load"):
            core.open()
            if mismatches.ids_mean_the_same:
                _fill(core, found, parts)
            engine.parking.begin(core)
        core.lineage.note_saved(store.key, found.saved.save_id, core.processed_tokens)
        if chat is not None:
            chat = chat.fork(config.history.reasoning)
        return Session(engine, core, chat, overflow)
    except BaseException:
        core.close()
        raise


def _fill(core: TokenCore, found: Understood, parts: Sequence[Sequence[SavedPart]]) -> None:
    saved, state = found.saved, core.state()
    state.ids.extend(saved.token_ids)
    state.prompt_start = saved.prompt_start
    core.trace = list(found.trace)
    if parts:
        form = HistoryForm(saved.history.extents, saved.history.continues_last)
        runner = core.engine.runner
        with typed_memory_errors(runner, [state.sequence]):
            restore_history(state.sequence, parts, form, runner.shape.device)


def _chat(
    engine: Engine,
    found: Understood,
    config: SessionConfig,
    mismatches: Mismatches,
    store: StoreDirectory,
) -> Chat | None:
    saved, reasoning = found.saved, config.history.reasoning
    generation_config = getattr(engine.model, "generation_config", None)
    try:
        chat = make_chat(engine.tokenizer, generation_config, saved.system, found.tools, reasoning)
    except TemplateError as error:
        if mismatches.found:
            raise
        raise damaged(store.path, str(error)) from error
    if mismatches.ids_mean_the_same:
        if (chat is None) != (found.spans is None):
            raise damaged(store.path, "messages without a chat, or a chat without messages")
        if chat is not None and found.spans is not None:
            _resume(chat, Transcript.of(saved.token_ids, found.spans), found, mismatches)
        return chat
    spans = found.spans or ()
    if (saved.token_ids and found.spans is None) or any(span.kind == "raw" for span in spans):
        remedy = "ids that no message brought cannot be written anew for another tokenizer, "
        raise mismatches.error(store.path, f"{remedy}template or set of tools")
    if chat is None:
        if spans:
            raise mismatches.error(store.path, "give the engine a tokenizer with a chat template")
        return None
    _resume(chat, _without_ids(spans), found, mismatches)
    return chat


def _resume(chat: Chat, transcript: Transcript, found: Understood, mismatches: Mismatches) -> None:
    conversation = found.saved.conversation
    reason = conversation.reuse_lost_reason if conversation is not None else None
    if mismatches.found and found.saved.processed_tokens:
        reason = mismatches.reason
    chat.resume(transcript, found.results, reason)


def _without_ids(spans: Sequence[TranscriptSpan]) -> Transcript:
    """The messages, and calls that wait for results, over no ids: the next turn renders them."""
    messages = tuple(message for span in spans for message in span.messages)
    if not messages:
        return Transcript()
    return Transcript.of((), [TranscriptSpan("prompt", 0, 0, messages, spans[-1].calls)])
