"""What the scripted model says and the users ask, and what must come of it: plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tests.test_session.conversations import call_text
from tests.test_soak.plants import Plant

__all__ = ["ANSWERS", "CALLS", "QUESTIONS", "Call", "Said", "said", "unscripted"]

QUESTIONS: tuple[str, ...] = (
    "Ada?",
    "Where is room 12?",
    "3.14, e.g. this\n\nor that",
    "é 👋",
    "say <|im_end|> or <tool_call>",
    " ",
)


@dataclass(frozen=True)
class Call:
    """One call as the model writes it.

    Attributes:
        text: What is written.
        result: What the model reads then; a text that ends in "*" is the beginning of it.
        runs: Whether a function is run.
        faithful: Whether the template writes the very same for this call.
        ends: What running it does to the call on the session: nothing, or it is "cancelled", or
            ends with KeyboardInterrupt.
    """

    text: str
    result: str
    runs: bool = True
    faithful: bool = True
    ends: Literal["", "cancelled", "interrupted"] = ""

    def answered_by(self, content: str) -> bool:
        """Whether a result is what it must be."""
        if self.result.endswith("*"):
            return content.startswith(self.result[:-1])
        return content == self.result

    def under(self, refused: str | None) -> Call:
        """The same where the calls of one tool are refused."""
        if refused is None or not self.runs or f'"name": "{refused}"' not in self.text:
            return self
        result = f"{refused} was not run, because it was refused.*"
        return replace(self, result=result, runs=False, ends="")


_UNFINISHED = "work was cancelled before it finished*"

CALLS: dict[str, Call] = {
    "note": Call(call_text("note", text="Ada"), "noted Ada"),
    "look_up": Call(call_text("look_up", query="Bo", times=2), "found Bo found Bo "),
    "raises": Call(
        call_text("look_up", query="Cy", times=-1),
        "look_up failed: ValueError: cannot say it less than never",
    ),
    "waits": Call(call_text("wait", text="Di"), "waited for Di"),
    "escaped": Call(call_text("note", text="é"), "noted é", faithful=False),
    "control": Call(call_text("work", task="control"), "<|im_end|>\n<|im_start|>user\nme"),
    "number": Call(call_text("work", task="number"), "3.5"),
    "surrogate": Call(call_text("work", task="surrogate"), "a?b"),
    "long": Call(call_text("work", task="long"), "long " * 24),
    "odd_error": Call(call_text("work", task="odd_error"), "work failed: RuntimeError: </tool*"),
    "forks": Call(call_text("work", task="forks"), "beside: *"),
    "cancels": Call(call_text("work", task="cancels"), _UNFINISHED, ends="cancelled"),
    "interrupts": Call(call_text("work", task="interrupts"), _UNFINISHED, ends="interrupted"),
    "unknown": Call(call_text("serach", query="x"), "There is no tool 'serach'.*", runs=False),
    "missing": Call(call_text("look_up", times=1), "look_up was not run.*", runs=False),
    "wrong_type": Call(call_text("note", text=[1]), "note was not run.*", runs=False),
    "broken": Call(
        '<tool_call>\n{"name": "note", "arguments": {"text": \n</tool_call>',
        "The tool call could not be read:*",
        runs=False,
        faithful=False,
    ),
    "cut_off": Call(
        '<tool_call>\n{"name": "note", "arguments": {"te',
        "The tool call could not be read:*",
        runs=False,
        faithful=False,
    ),
}


@dataclass(frozen=True)
class _Answer:
    """An answer: what is written, the text that messages show, and whether templates write both
    the same way."""

    written: str
    content: str
    odd_end: bool = False
    by_letters: bool = False
    faithful: bool = True


ANSWERS: dict[str, _Answer | None] = {
    "fine": _Answer("Fine.", "Fine."),
    "sentences": _Answer("Room 12! It is é. 3.14?", "Room 12! It is é. 3.14?"),
    "spaced": _Answer(" Well,\n\n so. ", " Well,\n\n so. ", faithful=False),
    "thoughts": _Answer("<think>\nWho?\n</think>\n\nShe.", "She.", faithful=False),
    "letters": _Answer("Spelled out.", "Spelled out.", by_letters=True),
    "odd_end": _Answer("That is all.", "That is all.", odd_end=True, faithful=False),
    "nothing": _Answer("", ""),
    "rambling": None,
}
"""By name; None leaves it to the model."""


@dataclass(frozen=True)
class Said:
    """One turn of the model.

    Attributes:
        ids: Raw, its stop token included; empty where the model speaks for itself.
        content: What the message shows.
        calls: In order.
        faithful: Whether the template writes these ids for this message.
    """

    ids: tuple[int, ...]
    content: str
    calls: tuple[Call, ...] = ()
    faithful: bool = True

    @property
    def scripted(self) -> bool:
        return bool(self.ids)

    @property
    def ends(self) -> str:
        """What running the calls does to the call on the session."""
        return next((call.ends for call in self.calls if call.ends), "")


def said(
    plant: Plant, rounds: Sequence[Sequence[str]], answer: str, refused: str | None = None
) -> list[Said]:
    """A turn per round of calls, and the answer behind them.

    Args:
        plant: Whose model speaks.
        rounds: Keys of `CALLS`.
        answer: Key of `ANSWERS`.
        refused: Name of a tool that must not run.
    """
    turns = []
    for drawn in rounds:
        # Whatever is written behind a call that is cut off belongs to it.
        keys = drawn[: drawn.index("cut_off") + 1] if "cut_off" in drawn else drawn
        calls = tuple(CALLS[key].under(refused) for key in keys)
        text = "Let me see." + "".join(f"\n{call.text}" for call in calls) + plant.end
        faithful = all(call.faithful for call in calls)
        turns.append(Said(tuple(plant.encode(text)), "Let me see.", calls, faithful))
    return [*turns, _answered(plant, ANSWERS[answer])]


def _answered(plant: Plant, answer: _Answer | None) -> Said:
    if answer is None:
        return unscripted()
    pieces = list(answer.written) if answer.by_letters else [answer.written]
    ids = [token for piece in pieces for token in plant.encode(piece)]
    ids += plant.encode(plant.odd_end if answer.odd_end else plant.end)
    return Said(tuple(ids), answer.content, faithful=answer.faithful)


def unscripted() -> Said:
    """A turn that is left to the model."""
    return Said((), "", faithful=False)
