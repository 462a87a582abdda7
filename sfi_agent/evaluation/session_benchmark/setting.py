"""What a session benchmark is given, and what of it is refused before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.decode_benchmark import ModelSizes
from sfi_agent.evaluation.session_benchmark.disk import MEMORY_FILE_SYSTEMS, disk_facts
from sfi_agent.evaluation.session_benchmark.needs import (
    Workload,
    disk_bytes,
    refuse_without_memory,
    refuse_without_room,
)
from sfi_agent.evaluation.session_benchmark.options import ChatLayout, SessionOptions
from sfi_agent.evaluation.session_benchmark.records import DiskFacts
from sfi_agent.evaluation.session_benchmark.second_turn import TurnPlan, plan_turn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sfi_agent.config import SessionConfig
    from sfi_agent.session.engine import Engine

__all__ = ["LongPart", "TurnPart", "position_room"]

_MESSAGE_ROOM_TOKENS = 256
"""For the message of a turn behind the history, what the template writes around it, and what
nested forks append."""


def position_room(options: SessionOptions) -> int:
    """Positions that a model and its history need behind the context."""
    return _MESSAGE_ROOM_TOKENS + options.more_tokens


@dataclass(frozen=True, slots=True)
class LongPart:
    """The arms that need a long session of random keys and values.

    Attributes:
        make_model: Builds the model, with `position_room` positions behind the context.
        tokenizer: With a chat template; its ids are among the model's.
        sizes: Of the model that will be built.
        context_tokens: Tokens of the history.
        config: The policy.
        other_config: The policy of the arm "fork_policy".
        directory: Where a temporary folder is made to save into.
    """

    make_model: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    sizes: ModelSizes
    context_tokens: int
    config: SessionConfig
    other_config: SessionConfig
    directory: Path

    def layout(self, options: SessionOptions) -> ChatLayout:
        """See `ChatLayout`."""
        return ChatLayout.of(self.context_tokens, options.answer_tokens)

    def check(self, device: torch.device, options: SessionOptions) -> DiskFacts | None:
        """Refuse what has no meaning or no room; what is known about the disk, if it is needed.

        Raises:
            InputError: With sizes by part.
        """
        self.layout(options)
        if self.sizes.vocabulary_size < len(self.tokenizer):
            raise InputError(
                explain(
                    "benchmarked sessions",
                    got=f"a model with a vocabulary of {self.sizes.vocabulary_size:,}",
                    allowed=f"{len(self.tokenizer):,} or more, which its tokenizer has",
                )
            )
        tokens = self.context_tokens + position_room(options)
        facts, on_disk, in_memory = None, dict[str, int](), dict[str, int]()
        if "save" in options.arms:
            facts, on_disk = disk_facts(self.directory), disk_bytes(self.sizes, tokens)
            if (kind := facts.file_system) in MEMORY_FILE_SYSTEMS:
                in_memory = {f"{name} ({kind})": size for name, size in on_disk.items()}
        refuse_without_memory(
            Workload(self.sizes, device, tokens, self.config),
            what=f"a session of {self.context_tokens:,} tokens",
            remedy="lower --context, or take a smaller --shape",
            files=in_memory,
        )
        refuse_without_room(
            on_disk,
            None if facts is None else facts.free_bytes,
            what=f"saving a session of {self.context_tokens:,} tokens",
            where=f"in {self.directory}",
            remedy="name another disk with --directory, or lower --context",
        )
        return facts


@dataclass(frozen=True, slots=True)
class TurnPart:
    """The arm "turn".

    Attributes:
        model: What users call the model.
        make_engine: Loads it.
        sizes: Of the model that will be loaded.
        limit_tokens: Positions that it takes.
        config: The policy.
        threads: Sets the number of threads while turns are played.
    """

    model: str
    make_engine: Callable[[], Engine]
    sizes: ModelSizes
    limit_tokens: int
    config: SessionConfig
    threads: Callable[[], AbstractContextManager[object]] = nullcontext

    def check(self, device: torch.device, options: SessionOptions) -> TurnPlan:
        """Refuse what has no meaning or no room; how long the first prompt will be.

        Raises:
            InputError: With sizes by part.
        """
        plan = plan_turn(options.turn_context_tokens, self.limit_tokens, options.turn_tokens)
        tokens = min(self.limit_tokens, plan.prompt_tokens + _MESSAGE_ROOM_TOKENS)
        refuse_without_memory(
            # The session of turn 1, and the one that processes everything anew.
            Workload(self.sizes, device, tokens, self.config, sessions=2),
            what=f"turn 2 behind a prompt of {plan.prompt_tokens:,} tokens",
            remedy="lower --turn-context, or take a smaller --model",
        )
        return plan
