"""Batches of training documents, made by worker processes while the network trains.

Every batch follows from (seed, phase, batch index), and batches are handed out in the order of
their index whatever the number of workers, so a run can be repeated document by document.
"""

from __future__ import annotations

import multiprocessing
import queue
import random
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from sfi_agent.embedded.documents import Document, FragmentTable, make_document

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from numpy.typing import NDArray

__all__ = ["ENTROPY_ROWS", "Batch", "BatchStream", "make_batch"]

ENTROPY_ROWS = 48
"""Query rows per document whose attention entropy is measured, most of them in answers."""
_ANYWHERE_ROWS = 8
_QUEUE_BATCHES = 6


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents of one length.

    Attributes:
        ids: `[documents, tokens]` uint16.
        answered: `[documents, tokens]` bool, tokens that the assistant writes.
        rows: `[documents, ENTROPY_ROWS]` int64, sampled query positions.
        turns: Per document (kind, start, end) of each final answer.
    """

    ids: NDArray[np.uint16]
    answered: NDArray[np.bool_]
    rows: NDArray[np.int64]
    turns: list[list[tuple[str, int, int]]]


def make_batch(key: str, length_tokens: int, documents: int, table: FragmentTable) -> Batch:
    """The batch of this name: `documents` documents of exactly `length_tokens` tokens."""
    ids = np.empty((documents, length_tokens), dtype=np.uint16)
    answered = np.zeros((documents, length_tokens), dtype=np.bool_)
    rows = np.empty((documents, ENTROPY_ROWS), dtype=np.int64)
    turns = []
    for index in range(documents):
        document = make_document(f"{key}:{length_tokens}:{index}", length_tokens, table)
        ids[index] = np.frombuffer(document.ids, dtype=np.uint16)
        for start, end in document.answers:
            answered[index, start:end] = True
        rows[index] = _sample_rows(document, random.Random(f"rows:{key}:{index}"))
        turns.append(document.turns)
    return Batch(ids, answered, rows, turns)


def _sample_rows(document: Document, rng: random.Random) -> list[int]:
    """Positions whose next token the assistant writes, and a few positions anywhere."""
    inside = [position for start, end in document.answers for position in range(start - 1, end - 1)]
    anywhere = ENTROPY_ROWS if not inside else _ANYWHERE_ROWS
    rows = [rng.randrange(len(document.ids)) for _ in range(anywhere)]
    return rows + [rng.choice(inside) for _ in range(ENTROPY_ROWS - anywhere)]


def _work(
    worker: int,
    workers: int,
    plan: dict[str, Any],
    tokenizer_file: str,
    ready: Queue[Batch],
) -> None:
    table = FragmentTable.from_file(Path(tokenizer_file))
    index = plan["first_batch"] + worker
    while True:
        length = plan["lengths"][index % len(plan["lengths"])]
        documents = max(1, plan["batch_tokens"] // length)
        ready.put(make_batch(f"{plan['key']}:{index}", length, documents, table))
        index += workers


class BatchStream:
    """An endless stream of batches from worker processes; use it as a context manager.

    Args:
        key: Name of the stream, such as "7:long" (seed and phase).
        lengths: Document lengths in tokens, one batch of each in turn.
        batch_tokens: Tokens per batch.
        first_batch: Index of the first batch, above 0 when a phase is resumed.
        tokenizer_file: The saved `tokenizer.json`.
        workers: Number of processes.
    """

    def __init__(
        self,
        key: str,
        lengths: tuple[int, ...],
        batch_tokens: int,
        first_batch: int,
        tokenizer_file: Path,
        workers: int,
    ) -> None:
        plan = {
            "key": key,
            "lengths": lengths,
            "batch_tokens": batch_tokens,
            "first_batch": first_batch,
        }
        context = multiprocessing.get_context("spawn")
        self._queues: list[Queue[Batch]] = [context.Queue(_QUEUE_BATCHES) for _ in range(workers)]
        self._processes = [
            context.Process(
                target=_work, args=(worker, workers, plan, str(tokenizer_file), ready), daemon=True
            )
            for worker, ready in enumerate(self._queues)
        ]
        self._next = 0

    def __enter__(self) -> BatchStream:
        for process in self._processes:
            process.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        for ready in self._queues:
            ready.cancel_join_thread()
            ready.close()

    def take(self) -> Batch:
        """The next batch; waits for it.

        Raises:
            RuntimeError: The worker that should make it has died.
        """
        worker = self._next % len(self._queues)
        self._next += 1
        while True:
            try:
                return self._queues[worker].get(timeout=5.0)
            except queue.Empty:
                if not self._processes[worker].is_alive():
                    raise RuntimeError(f"data worker {worker} died") from None
