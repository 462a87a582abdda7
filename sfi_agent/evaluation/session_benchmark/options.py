"""What is measured, how often, and how the measured session is laid out."""

from __future__ import annotations

from dataclasses import dataclass

from sfi_agent.errors import InputError, explain

__all__ = ["ARMS", "ChatLayout", "SessionOptions"]

ARMS = ("fork", "rewind", "mark", "save", "turn")
"""In the order in which they are shown; see docs/performance.md."""

_LEAST_ROUNDS = 2
"""Quartiles of fewer samples have no meaning."""
_SHORT_TURN_TOKENS = 256
"""The last turn of the session, which a rewind near the end takes back."""
_LEAST_PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """See the module text.

    Attributes:
        arms: Names out of `ARMS`, in any order.
        rounds: Samples of every fork, rewind and mark.
        save_rounds: Samples of every save and load.
        turn_rounds: Samples of turn 2.
        answer_tokens: Tokens of each long answer in the history.
        nested_forks: How many forks, each of the one before, lie above the deepest.
        more_tokens: Tokens generated between a save and the next one.
        turn_tokens: Most tokens of the answers in the turns that are timed.
        turn_context_tokens: Tokens of the first prompt before turn 2; None takes 32,768, or what
            the model takes.
        seed: Of history and texts.
    """

    arms: tuple[str, ...] = ARMS
    rounds: int = 15
    save_rounds: int = 4
    turn_rounds: int = 3
    answer_tokens: int = 8192
    nested_forks: int = 8
    more_tokens: int = 16
    turn_tokens: int = 32
    turn_context_tokens: int | None = None
    seed: int = 1

    @property
    def has_history(self) -> bool:
        """Whether any arm needs the session of random keys and values."""
        return bool({"fork", "rewind", "mark", "save"} & set(self.arms))

    def check(self) -> None:
        """Refuse what has no meaning.

        Raises:
            InputError: Naming it and what is allowed.
        """
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            got = ", ".join(map(repr, unknown)) or "no arm"
            raise InputError(explain("chose arms to time", got=got, allowed=", ".join(ARMS)))
        for name, number, least in (
            ("rounds", self.rounds, _LEAST_ROUNDS),
            ("save rounds", self.save_rounds, _LEAST_ROUNDS),
            ("turn rounds", self.turn_rounds, _LEAST_ROUNDS),
            ("answer tokens", self.answer_tokens, _LEAST_PROMPT_TOKENS),
            ("nested forks", self.nested_forks, 1),
            ("more tokens", self.more_tokens, 1),
            ("turn tokens", self.turn_tokens, 1),
        ):
            if number < least:
                allowed = f"{least} or more"
                raise InputError(
                    explain("benchmarked sessions", got=f"{name} {number}", allowed=allowed)
                )


@dataclass(frozen=True, slots=True)
class ChatLayout:
    """A chat of long turns and one short one at the end, as an agent's session might be.

    Half of a long turn is a prompt (a question, a tool's result), the other half a generated
    answer, which is never shorter than the answers that were asked for.

    Attributes:
        ids: Of the whole session, the pending last one included.
        long_turns: How many long turns there are.
        turn_ids: Ids of each of them.
        answer_ids: About how many of them are the answer's.
    """

    ids: int
    long_turns: int
    turn_ids: int
    answer_ids: int

    @classmethod
    def of(cls, context_tokens: int, answer_tokens: int) -> ChatLayout:
        """The layout of a session with so many processed tokens.

        Raises:
            InputError: Not even one long turn fits.
        """
        ids = context_tokens + 1
        least = answer_tokens + _LEAST_PROMPT_TOKENS + _SHORT_TURN_TOKENS
        if ids < least:
            raise InputError(
                explain(
                    "benchmarked sessions",
                    got=f"a context of {context_tokens:,} tokens with answers of {answer_tokens:,}",
                    allowed=f"{least - 1:,} tokens or more for one such answer",
                    remedy="lower --answer-tokens or raise --context",
                )
            )
        for_turns = ids - _SHORT_TURN_TOKENS
        turns = max(1, for_turns // (2 * answer_tokens))
        return cls(ids, turns, for_turns // turns, answer_tokens)
