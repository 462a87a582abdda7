"""A manifest turned into what sessions are made of, every text in it read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfi_agent.config import SessionConfig
from sfi_agent.errors import ConfigError, PluginError, StoreError, explain
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.events import ToolResult
from sfi_agent.session.store import strict_json
from sfi_agent.session.store.manifest import SavedSession
from sfi_agent.session.store.manifest_file import damaged
from sfi_agent.session.store.trace_columns import records_of
from sfi_agent.session.store.transcript_records import read_schema, results_of, spans_of
from sfi_agent.session.tool_use.tools import ToolSet
from sfi_agent.session.transcript import TranscriptSpan

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine

__all__ = ["Understood", "understand"]


@dataclass(frozen=True, slots=True)
class Understood:
    """A saved session whose every part has been read.

    Attributes:
        saved: As it was written.
        policy: The saved policy.
        tools: Those given to load it with, or the saved ones without their functions.
        compared_tools: The saved ones as `ToolSet.canonical_json` has them.
        spans: Of the transcript; None without a chat.
        results: Of tools, that no message has carried yet.
        trace: One record per generated token.
    """

    saved: SavedSession
    policy: SessionConfig
    tools: ToolSet
    compared_tools: tuple[str, ...]
    spans: tuple[TranscriptSpan, ...] | None
    results: tuple[ToolResult, ...]
    trace: tuple[StepRecord, ...]

    def check_ids(self, engine: Engine, path: Path) -> None:
        """Refuse ids that the model does not know, or more than it takes, also in files.

        Raises:
            StoreError: There are some.
        """
        ids, shape = self.saved.token_ids, engine.shape
        if ids and max(ids) >= shape.vocabulary_size:
            got = f"the id {max(ids)} for a vocabulary of {shape.vocabulary_size}"
            raise damaged(path, got)
        if len(ids) > shape.context_limit_tokens:
            got = f"{len(ids)} ids for a model that takes {shape.context_limit_tokens}"
            raise damaged(path, got)
        # A file with holes may seem to be of any length, and would be read to its end.
        held = max((stretch.held_tokens for stretch in self.saved.history.stretches), default=0)
        if held > shape.context_limit_tokens:
            got = f"files of {held} tokens for a model that takes {shape.context_limit_tokens}"
            raise damaged(path, got)


def understand(
    engine: Engine, saved: SavedSession, path: Path, given_tools: ToolSet | None
) -> Understood:
    """Read every text of a saved session.

    Raises:
        StoreError: One is damaged, or the policy is none that can be used here.
    """
    conversation = saved.conversation
    try:
        schemas = [read_schema(text) for text in saved.tools]
        names = [schema["function"]["name"] for schema in schemas]
        if names != sorted(set(names)):
            raise ValueError("tools out of order")
        return Understood(
            saved=saved,
            policy=_policy(engine, saved, path),
            tools=given_tools if given_tools is not None else ToolSet.of_schemas(schemas),
            compared_tools=tuple(strict_json.canonical(schema) for schema in schemas),
            spans=tuple(spans_of(conversation)) if conversation is not None else None,
            results=tuple(results_of(conversation)) if conversation is not None else (),
            trace=tuple(records_of(saved.trace, saved.token_ids)),
        )
    except ValueError as error:
        raise damaged(path, str(error)) from error


def _policy(engine: Engine, saved: SavedSession, path: Path) -> SessionConfig:
    try:
        return SessionConfig.model_validate(saved.policy)
    except (ConfigError, PluginError, RecursionError) as error:
        raise StoreError(
            explain(
                f"loaded the session in {path}",
                got=f"a policy that cannot be used here: {error}",
                remedy="install the plugins that it names",
            )
        ) from error
