"""Tools from functions: described once, refused early, run without exceptions."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, Optional

import pytest

from sfi_agent.errors import ToolDefinitionError
from sfi_agent.session.events import ToolCall
from sfi_agent.session.tool_use.tools import Tool, ToolSet


def search(query: str, limit: int = 5, order: Literal["new", "old"] = "new") -> list[str]:
    """Search the notes.

    Args:
        query: What to look for.
        limit: How many notes to return.
        order: Which notes come first.
    """
    return [f"{query}-{order}-{number}" for number in range(limit)]


def add(a: int, b: Optional[float] = None) -> float:  # noqa: UP045
    """Add numbers.

    Args:
        a: First.
        b: Second.
    """
    return a + (b or 0)


class Notebook:
    def __init__(self) -> None:
        self.notes = ["one"]

    def read(self, number: int) -> str:
        """Read a note.

        Args:
            number: Which one.
        """
        return self.notes[number]

    def __call__(self, number: int) -> str:
        return self.notes[number]


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall("call_3", name, arguments, json.dumps(arguments))


def test_schemas_are_sorted_by_name_and_independent_of_order() -> None:
    tools, other = ToolSet([search, add]), ToolSet([add, search])
    assert tools.names == other.names == ("add", "search")
    assert tools.canonical_json == other.canonical_json
    assert [schema["function"]["name"] for schema in tools.schemas] == ["add", "search"]
    parameters = tools.schemas[1]["function"]["parameters"]
    assert list(parameters["properties"]) == ["query", "limit", "order"]
    assert parameters["required"] == ["query"]
    assert parameters["properties"]["order"]["enum"] == ["new", "old"]
    # Copies: what a caller changes does not reach the next prompt.
    parameters["properties"].clear()
    assert tools.canonical_json == other.canonical_json
    assert len(tools) == 2


def test_a_call_runs_and_its_result_is_text() -> None:
    tools = ToolSet([search, add, Notebook().read])
    result = tools.run(call("search", query="é", limit=2))
    assert (result.call_id, result.name, result.is_error) == ("call_3", "search", False)
    assert result.content == '["é-new-0", "é-new-1"]'
    assert tools.run(call("read", number=0)).content == "one"
    assert tools.run(call("add", a=1, b=None)).content == "1"
    # JSON schema takes 2.0 for an integer; Python's range would not.
    assert json.loads(tools.run(call("search", query="q", limit=2.0)).content) == [
        "q-new-0",
        "q-new-1",
    ]


def returning(value: Any) -> Tool:
    return Tool(lambda: value, "give", "Give it.", {"type": "object", "properties": {}})


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("as is\n", "as is\n"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        (None, "null"),
        ({1, }, "{1}"),
        ("x" * 100_000, "x" * 100_000),
        ("bad \udc80 name", "bad ? name"),
    ],
)  # fmt: skip
def test_results_become_text(value: Any, content: str) -> None:
    result = ToolSet([returning(value)]).run(call("give"))
    assert result.content == content
    assert not result.is_error


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (call("serch", query="x"), ["no tool 'serch'", "add, search"]),
        (call("search"), ["was not run", "Missing argument query (string)"]),
        (call("search", query="x", top=3), ["Unknown argument top", "query, limit, order"]),
        (call("search", query=3), ["query must be of type string, not 3"]),
        (call("search", query="x", limit="three"), ['limit must be of type integer, not "three"']),
        (call("search", query="x", limit=True), ["limit must be of type integer, not true"]),
        (call("search", query="x", order="up"), ['order must be one of "new", "old", not "up"']),
        (ToolCall("call_3", "search", {}, "{", "its JSON is broken"), ["its JSON is broken"]),
    ],
)
def test_wrong_calls_are_answered_with_what_is_wrong(made: ToolCall, says: list[str]) -> None:
    result = ToolSet([search, add]).run(made)
    assert result.is_error
    assert result.call_id == "call_3"
    assert all(part in result.content for part in says)


def test_without_tools_the_answer_says_so() -> None:
    assert "no tools" in ToolSet().run(call("search")).content


def test_exceptions_are_results_without_a_traceback() -> None:
    result = ToolSet([Notebook().read]).run(call("read", number=9))
    assert result.is_error
    assert result.content == "read failed: IndexError: list index out of range"

    def stop() -> None:
        raise KeyboardInterrupt

    empty = {"type": "object", "properties": {}}
    with pytest.raises(KeyboardInterrupt):
        ToolSet([Tool(stop, "stop", "Stop.", empty)]).run(call("stop"))


def test_whatever_has_to_be_awaited_is() -> None:
    async def later(number: int = 1) -> int:
        """Gives a number.

        Args:
            number: The number.
        """
        await asyncio.sleep(0)
        return number

    class Waits:
        async def __call__(self) -> int:
            return await later(3)

    tools = ToolSet(
        [
            later,
            Tool(functools.partial(later, number=2), "bound"),
            Tool(Waits(), "object", "Gives three.", _EMPTY),
            Tool(lambda: later(4), "returned", "Gives four.", _EMPTY),
        ]
    )
    calls = [call("later", number=5), call("later"), *map(call, ("bound", "object", "returned"))]
    assert [tools.run(item).content for item in calls] == ["5", "1", "2", "3", "4"]

    async def inside_a_loop() -> str:
        return tools.run(call("later")).content

    assert asyncio.run(inside_a_loop()) == "1"


def test_what_a_coroutine_raises_is_a_result_too() -> None:
    async def fails(error: BaseException) -> None:
        raise error

    def tool(error: BaseException) -> ToolSet:
        return ToolSet([Tool(functools.partial(fails, error=error), "fails", "Fails.", _EMPTY)])

    assert tool(OSError("gone")).run(call("fails")).content == "fails failed: OSError: gone"
    assert "CancelledError" in tool(asyncio.CancelledError()).run(call("fails")).content
    with pytest.raises(KeyboardInterrupt):
        tool(KeyboardInterrupt()).run(call("fails"))


def test_an_exception_that_cannot_be_shown_is_named() -> None:
    class Shy(Exception):
        def __str__(self) -> str:
            raise ValueError

    def fails() -> None:
        raise Shy

    result = ToolSet([Tool(fails, "fails", "Fails.", _EMPTY)]).run(call("fails"))
    assert result.is_error and result.content == "fails failed: Shy"


_EMPTY = {"type": "object", "properties": {}}


def test_partials_hide_what_they_bind() -> None:
    tools = ToolSet([functools.partial(search, limit=1)])
    parameters = tools.schemas[0]["function"]["parameters"]
    assert list(parameters["properties"]) == ["query", "order"]
    assert tools.run(call("search", query="q")).content == '["q-new-0"]'
    assert "Unknown argument limit" in tools.run(call("search", query="q", limit=3)).content
    whole = ToolSet([functools.partial(functools.partial(search, limit=1), query="q")])
    assert "required" not in whole.schemas[0]["function"]["parameters"]
    assert whole.run(call("search")).content == '["q-new-0"]'


def test_explicit_tools_bring_their_own_description() -> None:
    parameters = {
        "required": ["number"],
        "properties": {"number": {"type": "integer", "description": "Which."}},
        "type": "object",
    }
    tools = ToolSet([Tool(Notebook(), "notes", "Read notes.", parameters)])
    assert tools.schemas[0]["function"]["description"] == "Read notes."
    assert list(tools.schemas[0]["function"]["parameters"]) == ["properties", "required", "type"]
    assert tools.run(call("notes", number=0)).content == "one"
    renamed = ToolSet([search, Tool(search, name="find", description="Find.")])
    assert renamed.names == ("find", "search")
    assert ToolSet([Tool(silent, description="One.")]).run(call("silent")).content == "1"


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ToolDefinitionError, match="'search'"):
        ToolSet([search, Tool(add, name="search")])


def undocumented(a: int) -> int:
    return a


def unhinted(a) -> int:  # type: ignore[no-untyped-def]
    """Do it.

    Args:
        a: Something.
    """
    return int(a)


def undescribed(a: int) -> int:
    """Do it."""
    return a


def silent() -> int:
    """
    Returns:
        One.
    """
    return 1


def unknown_hint(a: Nowhere) -> int:  # type: ignore[name-defined]  # noqa: F821
    """Do it.

    Args:
        a: Something.
    """
    return int(a)


def many(*values: int) -> int:
    """Do it.

    Args:
        values: Numbers.
    """
    return sum(values)


def positional(a: int, /) -> int:
    """Do it.

    Args:
        a: Something.
    """
    return a


async def yielding(a: int) -> AsyncIterator[int]:
    """Do it.

    Args:
        a: Something.
    """
    yield a


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        (undocumented, "no docstring"),
        (unhinted, "missing a type hint"),
        (undescribed, "no description for the argument 'a'"),
        (silent, "before Args"),
        (unknown_hint, "Nowhere"),
        (many, "values"),
        (positional, "positional-only"),
        (yielding, "async generator"),
        (functools.partial(yielding, a=1), "async generator"),
        (Tool(search, timeout_seconds=0), "timeout_seconds=0"),
        (Tool(search, timeout_seconds=True), "timeout_seconds=True"),
        (Tool(search, timeout_seconds="5"), "timeout_seconds='5'"),  # type: ignore[arg-type]
        (Tool(search, timeout_seconds=float("nan")), "timeout_seconds=nan"),
        (Tool(search, parallel=None), "parallel=None"),  # type: ignore[arg-type]
        (functools.partial(search, "q"), "by position"),
        (lambda a: a, "<lambda>"),
        (Notebook(), "usable name"),
        (Tool(Notebook(), "notes"), "Notebook objects"),
        (Tool(Notebook(), "notes", None, _EMPTY), "no description"),
        (Tool(search, "two words"), "two words"),
        (Tool(search, parameters={"type": "array"}), "parameters="),
        (Tool(search, parameters={"type": "object", "properties": {"x": {}}}), "does not take"),
        (Tool(search, parameters={"type": object, "properties": {}}), "JSON"),
        ("search", "not callable"),
    ],
)
def test_tools_that_cannot_be_described_are_refused(tool: Callable[..., Any], says: str) -> None:
    with pytest.raises(ToolDefinitionError, match=says):
        ToolSet([tool])
