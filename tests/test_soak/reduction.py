"""From a sequence of operations that fails to the shortest that still does.

A state machine writes down what it is told to do; played again on a new machine, the sequence
fails again, since everything in it comes from seeds. Then it is cut: to what the failing operation
can depend on, then by ever smaller pieces; and plainer arguments are tried.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest
from hypothesis.stateful import multiple

__all__ = ["Recorder", "Step", "Told", "recorded", "shortest", "shown"]

_FOLDER = str(Path(__file__).parent)
_PATIENCE_SECONDS = 600.0
_NOTHING: type[Any] = type(multiple())
"""What operations give back that make nothing."""

Function = TypeVar("Function", bound=Callable[..., Any])
Cause = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Made:
    """Stands for what an operation gave back.

    Attributes:
        number: Of the operation.
    """

    number: int


@dataclass(frozen=True, slots=True)
class Step:
    """One operation.

    Attributes:
        number: Names it, whatever is left of those before it.
        name: Of the method.
        arguments: By name; sessions by the operation that made them.
    """

    number: int
    name: str
    arguments: Mapping[str, Any]

    @property
    def needs(self) -> set[int]:
        """The operations that made what this one is given."""
        return {value.number for value in self.arguments.values() if isinstance(value, _Made)}


Failing = Callable[[Sequence[Step]], "list[Step] | None"]
"""What of a sequence is needed to fail as the given one does: it, or its beginning; None if it does
not."""


class Recorder:
    """Writes operations down; a machine has one."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._made: list[tuple[Any, int]] = []

    def begin(self, name: str, arguments: Mapping[str, Any]) -> int:
        """An operation is about to be done; its number."""
        told = {key: self._told(value) for key, value in arguments.items()}
        self.steps.append(Step(len(self.steps), name, told))
        return len(self.steps) - 1

    def gave(self, number: int, value: Any) -> None:
        """What an operation gave back may be an argument of others."""
        if value is not None and not isinstance(value, _NOTHING):
            self._made.append((value, number))

    def _told(self, value: Any) -> Any:
        for made, number in self._made:
            if made is value:
                return _Made(number)
        return value


class Told(Protocol):
    """What is told to do things, and can be thrown away."""

    recorder: Recorder

    def teardown(self) -> None: ...


def recorded(function: Function) -> Function:
    """An operation that is written down when it is done."""

    @wraps(function)
    def run(self: Told, **arguments: Any) -> Any:
        number = self.recorder.begin(function.__name__, arguments)
        value = function(self, **arguments)
        self.recorder.gave(number, value)
        return value

    wrapped: Any = run
    return wrapped  # type: ignore[no-any-return]


def shortest(make: Callable[[], Told], steps: Sequence[Step]) -> list[Step]:
    """The shortest sequence that fails as the given one does, as far as it is found in ten minutes.

    Args:
        make: A new machine.
        steps: The last one fails.

    Returns:
        The given ones where they do not fail again.
    """
    cause, _ = _played(make, steps)
    if cause is None:
        return list(steps)
    end = time.monotonic() + _PATIENCE_SECONDS

    def failing(candidate: Sequence[Step]) -> list[Step] | None:
        if time.monotonic() >= end:
            return None
        found, done = _played(make, candidate)
        return list(candidate[:done]) if found == cause else None

    kept = list(steps)
    for candidate in (_related(kept), _ancestors(kept)):
        if len(candidate) < len(kept):
            kept = failing(candidate) or kept
    while True:
        shorter = _fewer_sessions(_without_pieces(kept, failing), failing)
        if shorter == kept:
            return _plainer(kept, failing)
        kept = shorter


def shown(steps: Sequence[Step]) -> str:
    """A sequence as lines of a program."""
    lines = []
    used = set[int]().union(*(step.needs for step in steps))
    for step in steps:
        arguments = ", ".join(
            f"{key}=session_{value.number}" if isinstance(value, _Made) else f"{key}={value!r}"
            for key, value in step.arguments.items()
        )
        target = f"session_{step.number} = " if step.number in used else ""
        lines.append(f"{target}{step.name}({arguments})")
    return "\n".join(lines)


def _played(make: Callable[[], Told], steps: Sequence[Step]) -> tuple[Cause | None, int]:
    """What goes wrong first and where, if anything does, and how many steps it took."""
    machine, made = make(), dict[int, Any]()
    try:
        for done, step in enumerate(steps, 1):
            arguments = {
                key: made.get(value.number) if isinstance(value, _Made) else value
                for key, value in step.arguments.items()
            }
            if any(made.get(number) is None for number in step.needs):
                continue
            try:
                value = getattr(machine, step.name)(**arguments)
            except (Exception, pytest.fail.Exception) as error:
                return _place(error), done
            made[step.number] = None if isinstance(value, _NOTHING) else value
            if step.name == "close":
                # Nothing can be done with it any more.
                for number in step.needs:
                    made.pop(number)
    finally:
        machine.teardown()
    return None, len(steps)


def _place(error: BaseException) -> Cause:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(_FOLDER)]
    return type(error).__name__, f"{own[-1].name}:{own[-1].lineno}" if own else ""


def _ancestors(steps: Sequence[Step]) -> list[Step]:
    """The last step, what made its sessions, and what was done with those."""
    needed = set(steps[-1].needs)
    for step in reversed(steps):
        if step.number in needed:
            needed |= step.needs
    return [s for s in steps if s is steps[-1] or s.number in needed or s.needs & needed]


def _related(steps: Sequence[Step]) -> list[Step]:
    """The same, and everything that is done with several sessions at once."""
    close = {step.number for step in _ancestors(steps)}
    return [step for step in steps if step.number in close or not step.needs]


def _without_pieces(steps: list[Step], failing: Failing) -> list[Step]:
    """Leave out pieces that are not needed, from the end, in ever smaller sizes."""
    size = len(steps) // 2
    while size:
        stop = len(steps) - 1
        while stop > 0:
            start = max(0, stop - size)
            steps = failing([*steps[:start], *steps[stop:]]) or steps
            stop = min(start, len(steps) - 1)
        size //= 2
    return steps


def _fewer_sessions(steps: list[Step], failing: Failing) -> list[Step]:
    """Do with an earlier session what was done with a later one."""
    used = sorted(set[int]().union(*(step.needs for step in steps)))
    for later in reversed(used):
        for earlier in used[: used.index(later)]:
            found = failing([_with(step, later, earlier) for step in steps])
            if found is not None:
                steps = found
                break
    return steps


def _with(step: Step, later: int, earlier: int) -> Step:
    other = {key: _Made(earlier) for key, value in step.arguments.items() if value == _Made(later)}
    return replace(step, arguments={**step.arguments, **other}) if other else step


def _plainer(steps: list[Step], failing: Failing) -> list[Step]:
    """Try plainer arguments, one after the other."""
    for index in range(len(steps)):
        for key in list(steps[index].arguments) if index < len(steps) else ():
            for value in _plainer_values(steps[index].arguments[key]):
                changed = replace(steps[index], arguments={**steps[index].arguments, key: value})
                found = failing([*steps[:index], changed, *steps[index + 1 :]])
                if found is not None and len(found) > index:
                    steps = found
                    break
    return steps


def _plainer_values(value: Any) -> Iterator[Any]:
    """Plainer ones than this, the plainest first."""
    if isinstance(value, list) and value:
        yield []
        if len(value) > 1:
            yield from ([item] for item in value)
    elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
        yield from (1, value // 2)
    elif value is True:
        yield False
