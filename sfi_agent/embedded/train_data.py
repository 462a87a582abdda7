"""Batches of training documents, with stretched positions and the targets of the supervision.

Every batch follows from its name alone, so a run can be repeated document by document.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from sfi_agent.embedded.documents import Document, make_document
from sfi_agent.embedded.sources import MAX_TARGETS, ROLES
from sfi_agent.embedded.writer import FragmentTable

__all__ = ["Batch", "make_batch"]

_ROWS = {"bind": 112, "plan": 128, "name": 64, "value": 112, "spread": 24, "missing": 24}
"""Rows per document whose attention is supervised; more are sampled down to this many."""
_BACK_ROWS = 24


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents of one length.

    Attributes:
        ids: `[documents, tokens]` int64.
        answered: `[documents, tokens]` bool, tokens that the assistant writes.
        positions: `[documents, tokens]` int64, with gaps where a document is stretched.
        sources: Role to rows `[documents, rows]` and targets `[documents, rows, targets]`, both
            int64, targets -1 where there is none.
        turns: Per document (kind, start, end) of each final answer.
    """

    ids: torch.Tensor
    answered: torch.Tensor
    positions: torch.Tensor
    sources: dict[str, tuple[torch.Tensor, torch.Tensor]]
    turns: list[list[tuple[str, int, int]]]


def make_batch(
    name: str,
    length_tokens: int,
    documents: int,
    table: FragmentTable,
    *,
    last_position: int = 0,
    log_share: tuple[float, float] = (0.3, 0.9),
    missing_share: float = 0.0,
) -> Batch:
    """The batch of this name.

    Args:
        name: Name of its random stream.
        length_tokens: Tokens per document.
        documents: Documents per batch.
        table: Token ids of fragments.
        last_position: Two documents of three have gaps between log lines and between turns, up
            to this last position; none has if it is below the length.
        log_share, missing_share: See `make_document`.
    """
    made = [
        make_document(
            f"{name}:{length_tokens}:{index}",
            length_tokens,
            table,
            log_share=log_share,
            missing_share=missing_share,
        )
        for index in range(documents)
    ]
    ids = np.stack([np.frombuffer(document.ids, dtype=np.uint16) for document in made])
    answered = np.zeros(ids.shape, dtype=np.bool_)
    positions = np.tile(np.arange(length_tokens, dtype=np.int64), (documents, 1))
    for index, document in enumerate(made):
        rng = random.Random(f"positions:{name}:{index}")
        for start, end in document.answers:
            answered[index, start:end] = True
        if rng.random() < 2 / 3 and last_position > length_tokens:
            positions[index] += _gaps(document, last_position - length_tokens, rng)
    return Batch(
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(answered),
        torch.from_numpy(positions),
        _sources(made, random.Random(f"rows:{name}")),
        [document.turns for document in made],
    )


def _gaps(document: Document, room: int, rng: random.Random) -> np.ndarray:
    """What to add to each position: random gaps at some of the document's breaks."""
    total = rng.uniform(0, room)
    share = rng.choice((0.1, 0.5, 1.0))
    weights = np.zeros(len(document.ids))
    for place in (0, *document.breaks):
        if rng.random() < share:
            weights[place] = rng.expovariate(1.0) ** 2
    steps = np.cumsum(weights)
    if steps[-1] == 0:
        return np.zeros(len(document.ids), dtype=np.int64)
    return np.asarray(np.floor(steps / steps[-1] * total), dtype=np.int64)


def _sources(
    documents: list[Document], rng: random.Random
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    sources = {}
    for role in ROLES:
        notes = [
            rng.sample(document.sources[role], min(_ROWS[role], len(document.sources[role])))
            for document in documents
        ]
        sources[role] = _as_tensors(notes)
    length = len(documents[0].ids)
    for back in (1, 2, 3):
        chosen = [[rng.randrange(back, length) for _ in range(_BACK_ROWS)] for _ in documents]
        notes = [[(row, (row - back,)) for row in rows] for rows in chosen]
        sources[f"back{back}"] = _as_tensors(notes)
    return sources


def _as_tensors(
    notes: list[list[tuple[int, tuple[int, ...]]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    most = max(1, max(map(len, notes)))
    widest = max((len(targets) for rows in notes for _, targets in rows), default=1)
    assert widest <= MAX_TARGETS
    rows = torch.zeros(len(notes), most, dtype=torch.int64)
    targets = torch.full((len(notes), most, widest), -1)
    for document, marks in enumerate(notes):
        for index, (row, wanted) in enumerate(marks):
            rows[document, index] = row
            targets[document, index, : len(wanted)] = torch.tensor(wanted)
    return rows, targets
