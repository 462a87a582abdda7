"""What a saved session is, apart from the numbers in its shards: strict, frozen, checked.

Texts that came from outside (messages, calls, results, tool schemas) are kept as JSON text inside
the JSON, because they may hold what JSON between programs may not: a NaN that a model wrote as an
argument, half a character, keys in an order that matters.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from sfi_agent.session.reply import ReuseLostReason
from sfi_agent.session.store.directory import SHARD_NAME
from sfi_agent.session.transcript import SpanKind

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "SavedConversation",
    "SavedHistory",
    "SavedLayer",
    "SavedModel",
    "SavedSession",
    "SavedShard",
    "SavedSpan",
    "SavedStretch",
    "SavedTexts",
    "SavedTrace",
]

Count = Annotated[int, Field(ge=0, le=2**40)]
Positive = Annotated[int, Field(ge=1, le=2**40)]
Size = Annotated[int, Field(ge=1, le=2**20)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")]
Quick = Field(fail_fast=True)
"""Of what may be long: the first error is told, and a million of them would take a gigabyte."""
DTypeName = Literal["float64", "float32", "bfloat16", "float16"]


class Record(BaseModel):
    """Base of everything in a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SavedModel(Record):
    """The model that computed the history, to be compared.

    Attributes:
        class_name: Of the model.
        config: Digest of its configuration.
        weights: Digest of all its parameters, bit by bit.
        dtype: Of weights, keys and values.
    """

    class_name: Annotated[str, Field(min_length=1, max_length=400)]
    config: Digest
    weights: Digest
    dtype: DTypeName


class SavedLayer(Record):
    """Shape of the keys and values of one layer, and its sliding window in tokens, if any."""

    kv_heads: Size
    key_dim: Size
    value_dim: Size
    window: Positive | None


class SavedShard(Record):
    """A file with the tokens of some layers.

    Attributes:
        name: Of the file.
        first_layer: Index of the first layer.
        layers: How many there are.
        bytes: Length of the file.
        digest: Of the whole file, see `shards.py`.
    """

    name: Annotated[str, Field(pattern=SHARD_NAME)]
    first_layer: Count
    layers: Positive
    bytes: Positive
    digest: Digest


class SavedStretch(Record):
    """Consecutive tokens that were written together.

    Attributes:
        tokens: How many of them the session has.
        held_tokens: How many are in the files; a rewind makes the session have fewer.
        shards: Files that together hold all layers, in order.
    """

    tokens: Positive
    held_tokens: Positive
    shards: Annotated[tuple[SavedShard, ...], Field(min_length=1, max_length=2**16), Quick]

    @model_validator(mode="after")
    def _holds_what_is_used(self) -> Self:
        if self.tokens > self.held_tokens:
            raise ValueError(f"{self.tokens} tokens of a stretch that holds {self.held_tokens}")
        return self


class SavedHistory(Record):
    """Keys and values of the processed tokens.

    Attributes:
        layers: Shapes; none where no token was processed.
        extents: Tokens of each extent, see `HistoryForm`.
        continues_last: Likewise.
        stretches: Where the tokens lie, in order.
    """

    layers: Annotated[tuple[SavedLayer, ...], Field(max_length=2**16), Quick]
    extents: Annotated[tuple[Positive, ...], Field(max_length=2**20), Quick]
    continues_last: bool
    stretches: Annotated[tuple[SavedStretch, ...], Field(max_length=2**16), Quick]

    @property
    def tokens(self) -> int:
        return sum(self.extents)

    @property
    def shards(self) -> tuple[SavedShard, ...]:
        return tuple(shard for stretch in self.stretches for shard in stretch.shards)

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        held = sum(stretch.tokens for stretch in self.stretches)
        if held != self.tokens:
            raise ValueError(f"stretches of {held} tokens for extents of {self.tokens}")
        if bool(self.layers) != bool(self.stretches):
            raise ValueError(f"{len(self.layers)} layers in {len(self.stretches)} stretches")
        for stretch in self.stretches:
            end = 0
            for shard in stretch.shards:
                if shard.first_layer != end:
                    raise ValueError(f"a shard begins at layer {shard.first_layer}, not {end}")
                end += shard.layers
            if end != len(self.layers):
                raise ValueError(f"shards of {end} layers, of {len(self.layers)}")
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("one file for two shards")
        return self


class SavedSpan(Record):
    """A span of the transcript (see `TranscriptSpan`), messages and calls as JSON texts."""

    kind: SpanKind
    start: Count
    end: Count
    messages: Annotated[tuple[str, ...], Quick]
    calls: Annotated[tuple[str, ...], Quick]
    complete: bool


class SavedConversation(Record):
    """The chat over the ids.

    Attributes:
        spans: Of the transcript; together they cover all ids.
        unsent_results: Results of tools that no message has carried yet, as JSON texts.
        reuse_lost_reason: Why the next turn processes again what was processed before, if so.
    """

    spans: Annotated[tuple[SavedSpan, ...], Quick]
    unsent_results: Annotated[tuple[str, ...], Quick]
    reuse_lost_reason: ReuseLostReason | None

    @model_validator(mode="after")
    def _spans_follow_each_other(self) -> Self:
        edges = [0, *(span.end for span in self.spans)]
        if any(span.start != edge for span, edge in zip(self.spans, edges, strict=False)):
            raise ValueError("spans with gaps between them, or over each other")
        if any(low > high for low, high in pairwise(edges)):
            raise ValueError("a span that ends before it begins")
        if any(span.start == span.end for span in self.spans[1:]):
            raise ValueError("a span without ids")
        return self


class SavedTexts(Record):
    """A column of texts: each distinct one once, and which of them every row has."""

    texts: Annotated[tuple[str | None, ...], Quick]
    rows: Annotated[tuple[Count, ...], Quick]


class SavedTrace(Record):
    """Step records, field by field; ids are found at their positions.

    Attributes:
        columns: By field of `StepRecord`, each as long as the others.
    """

    columns: dict[str, SavedTexts | Annotated[tuple[int | float | bool, ...], Quick]]


class SavedSession(Record):
    """Everything about a session but the numbers of its keys and values.

    Attributes:
        revision: Number of the state in its directory.
        save_id: Names this very state.
        session_id: See `Session.id`.
        model, tokenizer, chat_template: Digests of what the session needs; None for what was not
            there.
        tools: Schemas of the tools as JSON texts, in the order the model saw.
        system: The system prompt.
        policy: The whole configuration.
        token_ids: Every id.
        prompt_start: See `DecodingState`.
        history: Keys and values of the first ids.
        conversation: The chat; None without a chat template.
        trace: How the generated tokens came to be.
    """

    revision: Positive
    save_id: Name
    session_id: Name
    model: SavedModel
    tokenizer: Digest | None
    chat_template: Digest | None
    tools: Annotated[tuple[str, ...], Quick]
    system: str | None
    policy: dict[str, JsonValue]
    token_ids: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Quick]
    prompt_start: Count
    processed_tokens: Count
    history: SavedHistory
    conversation: SavedConversation | None
    trace: SavedTrace

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        ids = len(self.token_ids)
        if self.history.tokens != self.processed_tokens:
            got = f"{self.history.tokens} tokens of history, {self.processed_tokens} processed"
            raise ValueError(got)
        if self.processed_tokens > max(0, ids - 1) or self.prompt_start > ids:
            raise ValueError(f"more processed tokens, or a later prompt, than {ids} ids allow")
        if self.conversation is not None:
            spans = self.conversation.spans
            end = spans[-1].end if spans else 0
            if end != ids:
                raise ValueError(f"spans of {end} ids, of {ids}")
        return self


def as_data(saved: SavedSession) -> dict[str, Any]:
    """The same as plain data for JSON."""
    return saved.model_dump(mode="json")
