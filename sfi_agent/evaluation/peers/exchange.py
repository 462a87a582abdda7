"""What goes to another Python and what comes back: the plan file and the results file.

The plan is one JSON object, `{"model", "dtype", "device", "threads", "arms", "cases"}`; the
results are JSON lines, one per arm and case, and `{"done": true}` at the end. Prompts are token
ids, rendered once, so that every arm gets the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = [
    "Arm",
    "ArmRun",
    "PeerTurn",
    "PlannedCase",
    "PlannedTurn",
    "Protocol",
    "plan_json",
    "run_from_json",
]

Protocol = Literal["dense_question", "sparse_question"]


@dataclass(frozen=True, slots=True)
class PlannedTurn:
    """One turn of a case, as ids.

    Attributes:
        ids: What stands behind the conversation before the model answers: question, generation
            prompt and answer prefix.
        max_new_tokens: How many tokens the answer may have.
    """

    ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class PlannedCase:
    """One case as ids, the same for every arm.

    Attributes:
        name: Task, protocol and seed; names the case in files.
        task, seed: What it was made from.
        protocol: Whether the question is part of the dense prefill, or comes after the policy
            has begun: a press has evicted, a session decodes the question's tokens.
        context_ids: System prompt and context; the first turn's ids follow.
        turns: At least one.
        closing_ids: Put behind an answer that no stop id has ended, before the next turn.
        stop_ids: Ids that end an answer.
    """

    name: str
    task: str
    seed: int
    protocol: Protocol
    context_ids: tuple[int, ...]
    turns: tuple[PlannedTurn, ...]
    closing_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """One contestant that the worker plays.

    Attributes:
        name: Names the arm in tables.
        title: The same in words.
        environment: "ours", or "kvpress" for the environment with the peer's pins.
        way: "generate" or "explicit"; see `worker.py`.
        press: Class name in kvpress; None for dense attention.
        evicts: When the press evicts: "prefill", "decoding", or "never".
        options: Arguments of the press; for "decoding" those of DecodingPress.
    """

    name: str
    title: str
    environment: Literal["ours", "kvpress"]
    way: Literal["generate", "explicit"]
    press: str | None = None
    evicts: Literal["prefill", "decoding", "never"] = "never"
    options: Mapping[str, int] = field(default_factory=dict)

    def plays(self, case: PlannedCase) -> bool:
        """Whether this arm is meant for a case.

        `generate` takes context and question together, so a press that is played that way has no
        part in the protocol that puts them apart.
        """
        if self.press is not None and self.way == "generate":
            return len(case.turns) > 1 and case.protocol == "dense_question"
        return True


@dataclass(frozen=True, slots=True)
class PeerTurn:
    """What an arm did in one turn.

    Attributes:
        output_ids: The answer, with the stop id that ended it.
        prompt_tokens: Tokens of the conversation before the answer.
        new_prompt_tokens: Those of them that no pass had processed before the turn.
        fed_tokens: Tokens that the passes over the prompt processed.
        fed_again_tokens: Those of them that had been processed before.
        wrong_positions: Tokens fed at another position than their index in the conversation.
        read_tokens: Tokens attended to by decode steps, summed over steps, averaged over layers.
        kept_tokens: Tokens whose keys and values exist after the turn, averaged over layers.
        seconds: Wall-clock time of the turn.
        decode_seconds: The part of it after the first token.
        dense_passes: Passes over the whole history besides prefills; None where nothing counts
            them.
        drafted_tokens, accepted_tokens: Fast tokens that verification looked at, and those that
            stood; 0 without it.
        error: What the turn raised, as text; "" for none. Everything else is then 0.
    """

    output_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    new_prompt_tokens: int = 0
    fed_tokens: int = 0
    fed_again_tokens: int = 0
    wrong_positions: int = 0
    read_tokens: float = 0.0
    kept_tokens: float = 0.0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    dense_passes: int | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One arm on one case; a turn that raised is the last one."""

    arm: str
    case: str
    turns: tuple[PeerTurn, ...]


def plan_json(
    arms: Sequence[Arm],
    cases: Sequence[PlannedCase],
    *,
    model: str,
    kept_tokens: int,
    device: str = "cpu",
    dtype: str = "auto",
    threads: int = 1,
) -> dict[str, Any]:
    """The plan file's content.

    Args:
        arms: Contestants of one environment.
        cases: All cases; each arm names those that it plays.
        model: Folder of the checkpoint.
        kept_tokens: Tokens per layer and KV head that every press is held to.
        device, dtype, threads: Where and how the worker computes.
    """
    return {
        "model": model,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "arms": [
            {
                **asdict(arm),
                "kept_tokens": kept_tokens,
                "cases": [case.name for case in cases if arm.plays(case)],
            }
            for arm in arms
        ],
        "cases": [asdict(case) for case in cases],
    }


def run_from_json(record: Mapping[str, Any]) -> ArmRun:
    """One line of a results file.

    Raises:
        KeyError, TypeError: It is not what a worker writes.
    """
    turns = tuple(
        PeerTurn(**{**turn, "output_ids": tuple(turn.get("output_ids", ()))})
        for turn in record["turns"]
    )
    return ArmRun(record["arm"], record["case"], turns)
