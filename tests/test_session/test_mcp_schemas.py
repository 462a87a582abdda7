"""Schemas and results of MCP servers in the form that templates, the check and models read."""

from __future__ import annotations

import json
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import mcp_types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from sfi_agent.session.mcp.results import result_text
from sfi_agent.session.mcp.schemas import MAX_SCHEMA_NODES, canonical_parameters
from sfi_agent.session.tool_use.json_schema import check_arguments

NAMES = ("a", "b", "c")
SIMPLE: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "string"},
        {"type": ["boolean", "null"]},
        {"type": "array", "items": {"type": "integer"}},
        {"enum": ["x", None]},
        {"const": "x"},
        {},
        True,
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["x", "y"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """Schemas of arguments whose definitions refer to those behind them, and some to all."""
    count, circular = draw(st.integers(0, 4)), draw(st.integers(0, 3)) == 0

    def schemas(after: int) -> st.SearchStrategy[Any]:
        names = [f"d{index}" for index in range(0 if circular else after, count)]
        refer = [{"$ref": f"#/$defs/{name}"} for name in names]
        plain = SIMPLE if not refer else SIMPLE | st.sampled_from(refer)
        described = [{**item, "description": "One."} for item in refer] or [{"type": "string"}]
        optional = plain.map(lambda schema: {"anyOf": [schema, {"type": "null"}]})
        return plain | optional | st.sampled_from(described)

    def objects(after: int) -> st.SearchStrategy[dict[str, Any]]:
        properties = st.dictionaries(st.sampled_from(NAMES), schemas(after), min_size=1)
        required = st.lists(st.sampled_from(NAMES), unique=True, max_size=1)
        return st.builds(
            lambda p, r: {"type": "object", "properties": p, "required": r}, properties, required
        )

    definitions = {f"d{i}": draw(objects(i + 1) | schemas(i + 1)) for i in range(count)}
    return {**draw(objects(0)), "$defs": definitions}


def refers_in_a_circle(document: dict[str, Any]) -> bool:
    def reachable(name: str, seen: tuple[str, ...]) -> bool:
        if name in seen:
            return True
        text = json.dumps(document["$defs"][name])
        inner = [other for other in document["$defs"] if f'"#/$defs/{other}"' in text]
        return any(reachable(other, (*seen, name)) for other in inner)

    return any(reachable(name, ()) for name in document["$defs"])


@settings(max_examples=100, deadline=None)
@given(documents(), st.data())
def test_the_check_agrees_with_the_servers_own_schema(
    document: dict[str, Any], data: st.DataObject
) -> None:
    before = deepcopy(document)
    found = canonical_parameters(document)
    assert document == before
    names = st.sampled_from(sorted(found["properties"]))
    arguments = data.draw(st.dictionaries(names, VALUES))
    _, problems = check_arguments(arguments, found)
    if refers_in_a_circle(document):
        return  # What goes round in circles is not followed: the check may only be too lenient.
    assert "$ref" not in json.dumps(found) and "$defs" not in found
    assert (not problems) == Draft202012Validator(document).is_valid(arguments)


class Place(BaseModel):
    name: str
    floor: int | None = None


class Node(BaseModel):
    value: int
    next: Node | None = None


class Arguments(BaseModel):
    place: Place
    other: Place | None = None
    node: Node
    mixed: int | str | None = None


def test_what_pydantic_writes_becomes_what_templates_read() -> None:
    found = canonical_parameters(Arguments.model_json_schema())
    properties = found["properties"]
    assert properties["place"]["properties"]["floor"]["type"] == "integer"
    assert properties["place"]["properties"]["floor"]["nullable"] is True
    assert (properties["other"]["type"], properties["other"]["nullable"]) == ("object", True)
    assert [choice["type"] for choice in properties["mixed"]["anyOf"]] == [
        *["integer", "string", "null"]
    ]
    # A circle stays a reference, with its definitions.
    assert {"$ref": "#/$defs/Node"} in properties["node"]["properties"]["next"]["anyOf"]
    assert "Node" in found["$defs"]
    good = {"place": {"name": "x"}, "other": None, "node": {"value": 1, "next": {"value": 2}}}
    assert check_arguments(good, found)[1] == ()
    bad = {"place": {"name": "x", "floor": "y"}, "node": {}}
    assert len(check_arguments(bad, found)[1]) == 2


def test_references_that_stand_for_astronomically_much_stay() -> None:
    inner = {
        f"d{i}": {"properties": dict.fromkeys("ab", {"$ref": f"#/$defs/d{i + 1}"})}
        for i in range(60)
    }
    document = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/d0"}, "y": True},
        "$defs": {**inner, "d60": {"type": "integer"}},
    }
    found = canonical_parameters(document)
    assert len(json.dumps(found)) < MAX_SCHEMA_NODES
    assert found["properties"] == {"x": {"$ref": "#/$defs/d0"}, "y": {}}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"type": "array"}, "of type 'array'"),
        ({"type": "object", "properties": {"x": {"type": 5}}}, "not valid at properties/x/type"),
        ({"type": "object", "required": "x"}, "not valid at required"),
        (
            {"type": "object", "properties": {"x": {"enum": "abc"}}},
            "not valid at properties/x/enum",
        ),
        ({"$schema": "http://json-schema.org/draft-03/schema#", "required": True}, "not valid"),
    ],
)
def test_what_is_no_schema_of_arguments_is_refused(document: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        canonical_parameters(document)


def test_small_things_about_schemas() -> None:
    assert canonical_parameters({}) == {"type": "object", "properties": {}}
    odd: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "$ref": {"type": "string"},
            "enum": {"$ref": "#/properties/%24ref"},
            "far": {"$ref": "https://example.org/x.json"},
            "slash": {"$ref": "#/definitions/a~1b"},
            "bad": {"type": "string", "description": "\ud800"},
        },
        "definitions": {"a/b": {"type": "integer"}},
    }
    found = canonical_parameters(odd)
    assert found["properties"]["enum"] == {"type": "string"}
    assert found["properties"]["far"] == odd["properties"]["far"]
    assert found["properties"]["slash"] == {"type": "integer"}
    assert found["properties"]["bad"]["description"] == "?"
    assert "$schema" not in found and "definitions" not in found


# ---------------------------------------------------------------- results


def result(*blocks: Any, structured: Any = None) -> Any:
    return mcp_types.CallToolResult(content=list(blocks), structured_content=structured)


def words(text: str) -> mcp_types.TextContent:
    return mcp_types.TextContent(text=text)


@given(st.lists(st.text(), max_size=4), st.none() | st.dictionaries(st.text(), st.integers()))
def test_text_is_joined_and_data_only_stands_in_for_it(texts: list[str], data: Any) -> None:
    found = result_text(result(*map(words, texts), structured=data))
    if any(texts):
        assert found == "\n".join(text for text in texts if text)
    elif data is not None:
        assert json.loads(found) == data
    else:
        assert found == "(The tool returned nothing.)"


@given(st.binary(max_size=40))
def test_what_is_no_text_is_named_with_its_size(data: bytes) -> None:
    import base64

    encoded = base64.b64encode(data).decode()
    image = mcp_types.ImageContent(data=encoded, mime_type="image/png")
    audio = mcp_types.AudioContent(data=encoded, mime_type="audio/wav")
    blob = mcp_types.EmbeddedResource(
        resource=mcp_types.BlobResourceContents(uri="file:///b.bin", blob=encoded)
    )
    assert result_text(result(image, words("and"), audio, blob)).splitlines() == [
        f"[image, image/png, {len(data)} bytes: not shown]",
        "and",
        f"[audio, audio/wav, {len(data)} bytes: not shown]",
        f"[resource, file:///b.bin, {len(data)} bytes: not shown]",
    ]


def test_resources_are_shown_or_named() -> None:
    shown = mcp_types.EmbeddedResource(
        resource=mcp_types.TextResourceContents(uri="note:1", mime_type="text/plain", text="Hi.")
    )
    link = mcp_types.ResourceLink(name="log", uri="file:///l.txt", size=7, description="The log")
    bare = mcp_types.ResourceLink(name="log", uri="file:///l.txt")
    assert result_text(result(shown)) == "[resource, text/plain, note:1]\nHi."
    assert result_text(result(link)) == "[link to log, 7 bytes, file:///l.txt: The log]"
    assert result_text(result(bare, structured={"a": 1})).splitlines() == [
        "[link to log, file:///l.txt]",
        '{"a": 1}',
    ]
    unknown = SimpleNamespace(content=[SimpleNamespace(type="smell")], structured_content=None)
    assert result_text(unknown) == "[content of the unknown kind 'smell': not shown]"
