"""Arguments become what the function's hints ask for, or are named in words a model can act on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from transformers.utils.chat_template_utils import get_json_schema

from sfi_agent.session.tool_use.call_arguments import hints_of, validate_arguments
from sfi_agent.session.tool_use.signature_schema import parameters_of_signature


class Color(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Point:
    x: int
    y: int = 0


class Person(BaseModel):
    name: str
    age: int | None = None
    friends: list[Person] = []


class Opaque:
    pass


def paint(color: Color, where: Point, who: Person | None = None, day: date | None = None) -> str:
    """Paint.

    Args:
        color: Which.
        where: A place.
        who: Somebody.
        day: When.
    """
    return f"{color} {where} {who} {day}"


def plain(
    text: str,
    count: int = 1,
    ratio: float = 0.5,
    really: bool = False,
    words: list[str] = [],  # noqa: B006
    pair: tuple[int, str] = (1, "a"),
    table: dict[str, int] = {},  # noqa: B006
    choice: Literal["a", "b"] = "a",
    either: Union[int, list[int]] = 1,  # noqa: UP007
    maybe: Optional[int] = None,  # noqa: UP045
) -> str:
    """Do it.

    Args:
        text: A text.
        count: A count.
        ratio: A ratio.
        really: Whether.
        words: Words.
        pair: A pair.
        table: A table.
        choice: A choice.
        either: One or many.
        maybe: A number.
    """
    return text


PLAIN = get_json_schema(plain)["function"]["parameters"]
PAINT = parameters_of_signature(paint)


def check(**arguments: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    return validate_arguments(plain, PLAIN, {"text": "x", **arguments})


values = st.fixed_dictionaries(
    {"text": st.text()},
    optional={
        "count": st.integers(),
        "ratio": st.floats(allow_nan=False),
        "really": st.booleans(),
        "words": st.lists(st.text()),
        "table": st.dictionaries(st.text(), st.integers()),
        "choice": st.sampled_from(["a", "b"]),
        "either": st.one_of(st.integers(), st.lists(st.integers())),
        "maybe": st.one_of(st.none(), st.integers()),
    },
)


@given(arguments=values)
def test_what_fits_passes_unchanged(arguments: dict[str, Any]) -> None:
    ready, problems = validate_arguments(plain, PLAIN, arguments)
    assert problems == ()
    assert ready == arguments
    assert {name: type(value) for name, value in ready.items()} == {
        name: type(value) for name, value in arguments.items()
    }


@given(count=st.integers(-(10**12), 10**12), numbers=st.lists(st.integers()))
def test_numbers_that_came_as_text_are_numbers(count: int, numbers: list[int]) -> None:
    ready, problems = check(count=str(count), maybe=f" {count} ", ratio=str(count))
    assert problems == ()
    assert (ready["count"], ready["maybe"], ready["ratio"]) == (count, count, float(count))
    assert isinstance(ready["ratio"], float)
    ready, problems = check(table={str(n): str(n) for n in numbers}, pair=["3", "z"])
    assert problems == () and ready["pair"] == (3, "z")
    assert ready["table"] == {str(n): n for n in numbers}
    ready, _ = check(count=2.0, really="true")
    assert ready["count"] == 2 and isinstance(ready["count"], int) and ready["really"] is True


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"text": 3}, "Argument text must be of type string, not 3."),
        ({"count": "three"}, 'Argument count must be of type integer, not "three".'),
        ({"count": 1.5}, "Argument count must be of type integer, not 1.5."),
        ({"count": True}, "Argument count must be of type integer, not true."),
        ({"ratio": False}, "Argument ratio must be of type number, not false."),
        ({"maybe": True}, "Argument maybe must be of type integer, not true."),
        ({"count": None}, "Argument count must be of type integer, not null."),
        ({"words": ["a", 1]}, "Argument words[1] must be of type string, not 1."),
        ({"words": "a"}, 'Argument words must be of type array, not "a".'),
        ({"table": {"a": "x"}}, 'Argument table.a must be of type integer, not "x".'),
        ({"table": {"a": True}}, "Argument table.a must be of type integer, not true."),
        ({"choice": "c"}, 'Argument choice must be one of "a", "b", not "c".'),
        ({"either": {}}, "Argument either must be of type integer or array, not {}."),
        ({"either": [1, "x"]}, 'Argument either[1] must be of type integer, not "x".'),
        ({"top": 1}, "Unknown argument top; known arguments: text, count"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, Any], problem: str) -> None:
    ready, problems = check(**arguments)
    assert ready == {}
    assert any(line.startswith(problem) for line in problems), problems


def test_what_is_missing_is_named_with_its_type() -> None:
    _, problems = validate_arguments(plain, PLAIN, {"count": "x"})
    assert problems == (
        'Argument count must be of type integer, not "x".',
        "Missing argument text (string).",
    )


def test_the_function_gets_the_types_of_its_hints() -> None:
    given_arguments = {
        "color": "blue",
        "where": {"x": "3"},
        "who": {"name": "Ada", "friends": [{"name": "Bo", "age": "4"}]},
        "day": "2020-02-03",
    }
    ready, problems = validate_arguments(paint, PAINT, given_arguments)
    assert problems == ()
    assert ready == {
        "color": Color.BLUE,
        "where": Point(3, 0),
        "who": Person(name="Ada", friends=[Person(name="Bo", age=4)]),
        "day": date(2020, 2, 3),
    }
    assert "Color.BLUE Point(x=3, y=0)" in paint(**ready)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"color": "green"}, 'Argument color must be one of "red", "blue", not "green".'),
        ({"where": {}}, "Missing argument where.x."),
        ({"where": "here"}, 'Argument where must be of type object, not "here".'),
        ({"where": {"x": 1, "z": 2}}, "Unknown argument where.z; known arguments: x, y."),
        (
            {"who": {"name": "A", "friends": [{"name": "B", "nick": "C"}]}},
            "Unknown argument who.friends[0].nick; known arguments: name, age, friends.",
        ),
        ({"who": {"name": 3}}, "Argument who.name must be of type string, not 3."),
        ({"who": {"name": "A", "friends": [{}]}}, "Missing argument who.friends[0].name."),
        ({"day": "today"}, "Argument day must be a valid date"),
    ],
)
def test_nested_problems_are_named_by_their_place(arguments: dict[str, Any], problem: str) -> None:
    whole = {"color": "red", "where": {"x": 1}, **arguments}
    ready, problems = validate_arguments(paint, PAINT, whole)
    assert ready == {} and len(problems) == 1
    assert problems[0].startswith(problem), problems


def test_choices_of_the_schema_alone_count_too() -> None:
    def pick(size: int, shade: str = "light") -> str:
        """Pick.

        Args:
            size: How large. (choices: [1, 2])
            shade: Which. (choices: ["light", "dark"])
        """
        return f"{size} {shade}"

    schema = get_json_schema(pick)["function"]["parameters"]
    assert validate_arguments(pick, schema, {"size": "2"}) == ({"size": 2}, ())
    _, problems = validate_arguments(pick, schema, {"size": "3", "shade": "grey"})
    assert problems == (
        "Argument size must be one of 1, 2, not 3.",
        'Argument shade must be one of "light", "dark", not "grey".',
    )


def test_hints_with_limits_and_checks_of_their_own() -> None:
    def take(count: Annotated[int, Field(ge=1, le=3)], path: Path) -> None: ...

    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer"}, "path": {"type": "string"}},
        "required": ["count", "path"],
    }
    ready, _ = validate_arguments(take, schema, {"count": 2, "path": "/a"})
    assert ready == {"count": 2, "path": Path("/a")}
    _, problems = validate_arguments(take, schema, {"count": 9, "path": "/a"})
    assert problems == ("Argument count must be less than or equal to 3, not 9.",)


class Notebook:
    def read(self, number: int) -> str:
        return str(number)

    def __call__(self, number: int) -> str:
        return str(number)


NUMBER = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}


@pytest.mark.parametrize(
    "function",
    [
        Notebook().read,
        Notebook(),
        functools.partial(lambda number, more: number, more=1),
        functools.partial(functools.partial(Notebook().read)),
        lambda number: number,
        lambda **arguments: arguments,
        max,
    ],
)
def test_anything_callable_can_be_checked(function: Any) -> None:
    assert validate_arguments(function, NUMBER, {"number": 3}) == ({"number": 3}, ())
    assert validate_arguments(function, NUMBER, {"number": "x"})[1] == (
        'Argument number must be of type integer, not "x".',
    )
    # Only hints turn text into a number; a schema alone takes what it says.
    ready, problems = validate_arguments(function, NUMBER, {"number": "3"})
    assert (ready, problems) == ({"number": 3}, ()) if hints_of(function) else problems


def test_hints_that_nobody_knows_leave_it_to_the_schema() -> None:
    def use(it: Opaque, number: int) -> None: ...

    def broken(number: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    schema = {"type": "object", "properties": {"it": {}, "number": {"type": "integer"}}}
    assert validate_arguments(use, schema, {"it": {"a": 1}, "number": "3"}) == (
        {"it": {"a": 1}, "number": 3},
        (),
    )
    assert hints_of(broken) == {}
    assert validate_arguments(broken, NUMBER, {"number": "3"})[1]


# ---------------------------------------------------------------- schemas of signatures


def test_a_schema_of_any_hints_in_the_form_of_templates() -> None:
    assert PAINT["required"] == ["color", "where"]
    color, where, who, day = (
        PAINT["properties"][name] for name in ("color", "where", "who", "day")
    )
    assert color == {"enum": ["red", "blue"], "type": "string", "description": "Which."}
    assert where["properties"] == {"x": {"type": "integer"}, "y": {"type": "integer"}}
    assert where["required"] == ["x"] and where["description"] == "A place."
    assert who["nullable"] and who["properties"]["age"] == {"type": "integer", "nullable": True}
    assert day == {"format": "date", "type": "string", "nullable": True, "description": "When."}
    assert "$ref" not in str(where)


def test_what_cannot_be_described_is_said() -> None:
    def unhinted(a, b: int) -> None:  # type: ignore[no-untyped-def]
        """Do.

        Args:
            a: A.
            b: B.
        """

    def undescribed(a: int) -> None:
        """Do."""

    def opaque(a: Opaque) -> None:
        """Do.

        Args:
            a: A.
        """

    for function, says in (
        (unhinted, "'a' has no type hint"),
        (undescribed, "does not describe the argument 'a'"),
        (opaque, "'a' cannot be described"),
    ):
        with pytest.raises(ValueError, match=says):
            parameters_of_signature(function)


def test_plain_hints_are_described_as_transformers_does() -> None:
    mine, theirs = parameters_of_signature(plain), PLAIN
    assert mine["required"] == theirs["required"] == ["text"]
    for name in ("text", "count", "ratio", "really", "words", "table", "maybe"):
        assert mine["properties"][name] == theirs["properties"][name]
