"""Tools of every signature: a schema that takes what fits and values as the hints ask, or an error
when the tool is described."""

from __future__ import annotations

import datetime
import enum
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter
from typing_extensions import TypedDict

from sfi_agent import Tool, ToolDefinitionError
from sfi_agent.session.events import ToolCall
from sfi_agent.session.tool_use.json_schema import check_arguments
from sfi_agent.session.tool_use.tools import ToolSet


class Shade(enum.Enum):
    LIGHT = "light"
    DARK = 2


@dataclass
class Place:
    x: int
    tags: list[str] = field(default_factory=list)


class Person(BaseModel):
    name: str
    age: Annotated[int, Field(ge=0)] = 0
    place: Place | None = None


class Row(TypedDict):
    key: str
    value: int


class Pair(NamedTuple):
    left: int
    right: str


HINTS: list[Any] = [
    *(int, str, bool, float, Any),
    *(int | None, int | str, list[int] | None, int | list[int] | None, Literal["a", 1, None]),
    *(Shade, Place, Person, Row, Pair, list[Person], dict[str, Place], Row | None),
    *(list[list[int]], dict[str, list[int]], tuple[int, str], tuple[int, ...], set[str]),
    *(frozenset[int], Sequence[int], Mapping[str, int]),
    *(datetime.date, datetime.datetime, datetime.timedelta, UUID, Path),
    *(Annotated[int, Field(ge=1, le=5)], list[Annotated[str, Field(min_length=1, max_length=3)]]),
    *(Annotated[str, Field(pattern="^[a-c]+$")] | None, Annotated[list[int], Field(max_length=2)]),
]
PROPER = st.text(st.characters(codec="utf-8"), max_size=5)
MADE: dict[Any, st.SearchStrategy[Any]] = {
    Any: st.recursive(st.none() | st.integers() | PROPER, lambda inner: st.lists(inner)),
    float: st.floats(allow_nan=False, allow_infinity=False),
    Path: st.builds(Path, st.text("ab/", min_size=1, max_size=4)),
    Sequence[int]: st.lists(st.integers()),
    Mapping[str, int]: st.dictionaries(PROPER, st.integers()),
    HINTS[-4]: st.integers(1, 5),
    HINTS[-3]: st.lists(st.text("xyz", min_size=1, max_size=3)),
    HINTS[-2]: st.none() | st.text("abc", min_size=1),
    HINTS[-1]: st.lists(st.integers(), max_size=2),
}
"""Values of hints for which hypothesis makes none, or others."""


@lru_cache
def tool_of(hint: Any) -> tuple[ToolSet, list[Any]]:
    got: list[Any] = []

    def take(it: Any) -> str:
        """Take it.

        Args:
            it: What is taken.
        """
        got.append(it)
        return "taken"

    take.__annotations__["it"] = hint
    return ToolSet([take]), got


@pytest.mark.parametrize("hint", HINTS, ids=str)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_a_hint_allows_fits_the_schema_and_reaches_the_function(
    hint: Any, data: st.DataObject
) -> None:
    value = data.draw(MADE[hint] if hint in MADE else st.from_type(hint))
    adapter = TypeAdapter(hint)
    written = json.loads(json.dumps(adapter.dump_python(value, mode="json", exclude_none=True)))
    tools, got = tool_of(hint)
    parameters = tools.schemas[0]["function"]["parameters"]
    assert check_arguments({"it": written}, parameters)[1] == ()
    result = tools.run(ToolCall("call_0", "take", {"it": written}, ""))
    assert result.content == "taken"
    assert got[-1] == adapter.validate_python(written)
    assert type(got.pop()) is type(adapter.validate_python(written))


@pytest.mark.parametrize(
    ("hint", "limits"),
    [
        (Annotated[int, Field(ge=1, le=5)], {"minimum": 1, "maximum": 5}),
        (Annotated[str, Field(min_length=2)] | None, {"minLength": 2, "nullable": True}),
        (list[Annotated[int, Field(gt=0)]], {"items": {"type": "integer", "exclusiveMinimum": 0}}),
        (tuple[int, str], {"minItems": 2, "maxItems": 2}),
    ],
)
def test_models_are_told_the_limits_of_a_hint(hint: Any, limits: dict[str, Any]) -> None:
    schema = tool_of(hint)[0].schemas[0]["function"]["parameters"]["properties"]["it"]
    assert {key: schema[key] for key in limits} == limits
    assert schema["description"] == "What is taken."


def test_choices_of_a_docstring_stay_beside_limits() -> None:
    def pick(size: Annotated[int, Field(ge=1)]) -> str:
        """Pick.

        Args:
            size: How large. (choices: [1, 2])
        """
        return str(size)

    schema = ToolSet([pick]).schemas[0]["function"]["parameters"]["properties"]["size"]
    assert schema == {"type": "integer", "minimum": 1, "enum": [1, 2], "description": "How large."}


def test_fields_that_a_typed_dict_lacks_are_named() -> None:
    tools, got = tool_of(Row)
    result = tools.run(ToolCall("c", "take", {"it": {"key": "a", "value": 1, "more": 2}}, ""))
    assert result.is_error and not got
    assert result.content == "take was not run. Unknown argument it.more."
    tools, got = tool_of(dict[int, int])
    assert not tools.run(ToolCall("c", "take", {"it": {"1": 2, "01": 3}}, "")).is_error
    assert got == [{1: 3}]


# ---------------------------------------------------------------- refused when described


class Notebook:
    def read(self, it: int) -> str:
        """Read.

        Args:
            it: Which.
        """
        return str(it)


def with_field_default(it: int = Field(3, ge=1)) -> str:
    """Do.

    Args:
        it: It.
    """
    return str(it)


def yielding(it: int) -> Iterator[int]:
    """Do.

    Args:
        it: It.
    """
    yield it


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (Notebook.read, "'self'"),
        (with_field_default, "Annotated"),
        (yielding, "generator"),
        (lambda it: it, "no usable name"),
    ],
)
def test_what_could_never_be_called_well_is_refused(
    function: Callable[..., Any], says: str
) -> None:
    with pytest.raises(ToolDefinitionError, match=says):
        ToolSet([function])


def described(**one: Any) -> Tool:
    parameters = {"type": "object", "properties": {"it": {"type": "integer"}}, **one}
    return Tool(lambda it=None, other=None: "done", "take", "Take it.", parameters)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (3, "no schema"),
        ({"type": 7}, r"it\.type=7"),
        ({"type": ["integer", 3]}, r"it\.type"),
        ({"enum": "ab"}, r"it\.enum"),
        ({"anyOf": {"type": "integer"}}, r"it\.anyOf"),
        ({"allOf": [{"minLength": "3"}]}, r"it\.allOf\[0\]\.minLength"),
        ({"items": 1}, r"it\.items=1"),
        ({"properties": ["a"]}, r"it\.properties"),
        ({"properties": {"a": None}}, r"it\.properties\.a=None"),
        ({"required": "a"}, r"it\.required"),
        ({"minimum": "1"}, r"it\.minimum"),
        ({"minimum": float("nan")}, "JSON"),
        ({"maxItems": -1}, r"it\.maxItems"),
        ({"pattern": 3}, r"it\.pattern"),
        ({"additionalProperties": "no"}, r"it\.additionalProperties"),
    ],
)
def test_what_is_no_schema_is_refused_when_it_is_given(schema: Any, says: str) -> None:
    with pytest.raises(ToolDefinitionError, match=says):
        ToolSet([described(properties={"it": schema})])


def test_what_servers_write_for_nothing_is_taken_for_nothing() -> None:
    lists: dict[str, Any] = dict.fromkeys(["anyOf", "oneOf", "allOf", "prefixItems", "items"])
    schema = {"type": "array", "required": None, "properties": None, **lists}
    tools = ToolSet([described(properties={"it": schema, "other": {"required": True}})])
    assert tools.run(ToolCall("c", "take", {"it": [1]}, "")).content == "done"
    assert tools.run(ToolCall("c", "take", {"it": 1}, "")).is_error


_any_json = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.sampled_from(["integer", "string", "a"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["type", "enum", "const", "anyOf", "oneOf", "allOf", "items", "prefixItems"]
                + ["properties", "required", "additionalProperties", "minimum", "maximum"]
                + ["minLength", "maxItems", "pattern", "nullable", "$ref", "$defs", "multipleOf"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(schema=_any_json, more=_any_json, value=_any_json)
def test_whatever_is_given_for_a_schema_it_is_refused_or_checks(
    schema: Any, more: Any, value: Any
) -> None:
    try:
        tools = ToolSet([described(properties={"it": schema}, **{"$defs": {"d": more}})])
    except ToolDefinitionError:
        return
    for arguments in ({"it": value}, {}, {"other": value}):
        result = tools.run(ToolCall("c", "take", arguments, ""))
        assert result.content == "done" or (result.is_error and "was not run" in result.content)
