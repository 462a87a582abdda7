"""Tiny random models with the call formats of many families, a nudge into and out of calls, and
tools with schemas of any kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from hypothesis import strategies as st

from sfi_agent import Engine, Session, SessionConfig, Tool
from sfi_agent.engine.runner import Runner
from tests import chat_templates
from tests.call_templates import CALL_TEMPLATES
from tests.families import FAMILIES, build_model
from tests.test_session.helpers import FAMILIES as TEMPLATES
from tests.tiny_tokenizers import HERMES_RESPONSE_TEMPLATE, chatml_tokenizer

__all__ = [
    "HELD_FORMATS",
    "Nudge",
    "OPENINGS",
    "argument_schemas",
    "call_engine",
    "calls_of",
    "recording_tool",
    "short_policy",
]

OPENINGS: dict[str, str] = {
    "CHATML": "<tool_call>",
    "CHATML_THINKING": "<tool_call>",
    "response template": "<tool_call>",
    "LLAMA": '{"name":',
    "MISTRAL": "[TOOL_CALLS]",
    "qwen_xml": "<tool_call>",
    "qwen_xml, inner": "<function=",
    "glm": "<tool_call>",
    "kimi": "<|tool_call_begin|>",
    "deepseek 3.1": "<｜tool▁call▁begin｜>",
    "deepseek 3.2": "<｜DSML｜invoke name=",
    "minimax": "<invoke name=",
    "mistral, named": "[TOOL_CALLS]",
    "mistral, list": "[TOOL_CALLS]",
    "braces": "<|tool_call>",
    "Python": "<|tool_call_start|>",
    "JSON behind a tag": "<|tool_call|>",
    "JSON between tags": "<function_call>",
    "harmony": "<|channel|>commentary to=",
}
"""With what a call opens, by format."""

HELD_FORMATS = tuple(OPENINGS)
_PADDING_TOKENS = 11
"""The model's vocabulary is larger than the tokenizer's."""

_CALLS_IN_XML = (
    "<tool_call>\n<function={{ call.function.name }}>"
    "{%- for key, value in call.function.arguments.items() %}"
    "\n<parameter={{ key }}>\n{{ value }}\n</parameter>{% endfor %}\n</function>\n</tool_call>"
)
_CALLS_IN_KEYS = (
    "<tool_call>{{ call.function.name }}"
    "{%- for key, value in call.function.arguments.items() %}"
    "\n<arg_key>{{ key }}</arg_key>\n<arg_value>{{ value }}</arg_value>{% endfor %}\n</tool_call>"
)


def _tokenizer_of(name: str) -> Any:
    if name in ("qwen_xml", "qwen_xml, inner", "glm"):
        calls = _CALLS_IN_KEYS if name == "glm" else _CALLS_IN_XML
        source = chat_templates.CHATML.replace(
            '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
            "{{ call.function.arguments | tojson }}}\n</tool_call>",
            calls,
        )
        assert calls in source
        return chatml_tokenizer(source)
    if name in CALL_TEMPLATES:
        template = CALL_TEMPLATES[name]
        return chatml_tokenizer(
            template.source, special_tokens=template.special, markup_tokens=template.markup
        )
    if name == "harmony":
        marks = "{# <|channel|>commentary to=functions.f<|message|> #}"
        tags = ("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>")
        return chatml_tokenizer(chat_templates.CHATML + marks, special_tokens=tags)
    template_name = "CHATML" if name == "response template" else name
    special, eos, bos = TEMPLATES[template_name]
    return chatml_tokenizer(
        getattr(chat_templates, template_name),
        special_tokens=special,
        eos_token=eos,
        bos_token=bos,
        response_template=HERMES_RESPONSE_TEMPLATE if name == "response template" else None,
    )


@lru_cache
def call_engine(name: str, family: str = "qwen2", *, programs: bool = False) -> Engine:
    """An engine whose template writes calls in a format. Shared: leave it as it is.

    Args:
        name: In `OPENINGS`.
        family: Name in `tests.families`.
        programs: Whether steps are the programs of captured steps, uncaptured.
    """
    tokenizer = _tokenizer_of(name)
    model = build_model(
        next(item for item in FAMILIES if item.name == family),
        vocab_size=len(tokenizer) + _PADDING_TOKENS,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    engine = Engine(model, tokenizer)
    if programs:
        engine.runner = Runner(model, engine.shape, execution="uncaptured")
    return engine


def short_policy(**overrides: Any) -> SessionConfig:
    """Short segments, and calls held to their schemas."""
    values: dict[str, Any] = {
        "memory": {"sink_tokens": 2, "selected_tokens": 16, "recent_tokens": 8},
        "refresh": {"min_segment_tokens": 2, "max_segment_tokens": 6},
        "sampling": {"temperature": 1.0, "max_new_tokens": 600},
        "tools": {"constrain_calls": True},
    }
    for key, value in overrides.items():
        values[key] = {**values[key], **value} if key in values else value
    return SessionConfig(**values)


class Nudge:
    """Makes a model open a call as the first thing of every turn and stop as soon as it may.

    Everything between is the model's own. Not for `rectify`, whose slow steps look like prefills.

    Args:
        engine: Its model is nudged while the context is entered.
        opening: Text of the opening.
        strength: Added to the logit of its tokens.
    """

    def __init__(self, engine: Engine, opening: str, strength: float = 1e4) -> None:
        assert engine.tokenizer is not None
        self._model: Any = engine.model
        self._opening = engine.tokenizer.encode(opening, add_special_tokens=False)
        self._stop = engine.tokenizer.eos_token_id
        self._strength = strength
        self._first = 0
        self._handle: Any = None

    def __enter__(self) -> Nudge:
        self._handle = self._model.register_forward_hook(self._push, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _push(self, module: Any, args: Any, kwargs: Any, result: Any) -> Any:
        positions, logits = kwargs["position_ids"][0].tolist(), result.logits.clone()
        if len(positions) > 1 and logits.shape[1] == 1:
            self._first = positions[-1] + 1
        for row, position in enumerate(positions[-logits.shape[1] :]):
            place = position + 1 - self._first
            opening = 0 <= place < len(self._opening)
            logits[0, row, self._opening[place] if opening else self._stop] += self._strength
        result.logits = logits
        return result


def recording_tool(name: str, schema: Mapping[str, Any]) -> tuple[Tool, list[dict[str, Any]]]:
    """A tool of this schema, and what it is called with."""
    received: list[dict[str, Any]] = []

    def function(**arguments: Any) -> str:
        received.append(arguments)
        return "done"

    parameters = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None)
        for key in schema["properties"]
    ]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return Tool(function, name=name, description="Does it.", parameters=schema), received


def calls_of(session: Session, start: int) -> Sequence[Any]:
    """The calls in the output that begins at a position."""
    from sfi_agent.session.output.output_reader import parse_output

    assert session._chat is not None and session.engine.tokenizer is not None
    ids = session.token_ids[start:]
    return parse_output(session._chat.output_format, session.engine.tokenizer, ids).calls


_keys = st.text("abcdexyz_", min_size=1, max_size=5).filter(str.isidentifier)
_words = st.text("abc xyzé€", max_size=4)
_bounds = st.tuples(st.integers(-40, 400), st.integers(0, 60))


def _bounded_text(least: int, more: int) -> dict[str, Any]:
    return {"type": "string", "minLength": least, "maxLength": least + more}


_scalars: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "string", "maxLength": 8}),
    st.builds(_bounded_text, st.integers(0, 3), st.integers(0, 4)),
    st.builds(lambda words: {"type": "string", "enum": words}, st.lists(_words, min_size=1)),
    st.builds(lambda words: {"enum": words}, st.lists(_words.filter(bool), min_size=1)),
    st.just({"type": "integer"}),
    st.builds(
        lambda bound: {"type": "integer", "minimum": bound[0], "maximum": sum(bound)}, _bounds
    ),
    st.just({"type": "number"}),
    st.just({"type": "boolean"}),
    st.just({"type": ["integer", "null"]}),
    st.just({"anyOf": [{"type": "integer"}, {"type": "boolean"}]}),
    st.builds(lambda value: {"const": value}, st.integers(0, 99)),
    st.just({"type": "string", "pattern": "^[a-c]{2,4}$"}),
)


def _objects(values: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], required: list[bool]) -> dict[str, Any]:
        needed = [key for key, need in zip(properties, required, strict=False) if need]
        found = {"type": "object", "properties": properties}
        return {**found, "required": needed} if needed else found

    flags = st.lists(st.booleans(), min_size=4, max_size=4)
    return st.builds(build, st.dictionaries(_keys, values, max_size=4), flags)


def _arrays(values: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda items, least, more: {
            "type": "array",
            "items": items,
            "minItems": least,
            "maxItems": least + more,
        },
        values,
        st.integers(0, 2),
        st.integers(0, 2),
    )


_values = st.one_of(_scalars, _arrays(_scalars), _objects(_scalars), _arrays(_objects(_scalars)))
argument_schemas: st.SearchStrategy[dict[str, Any]] = _objects(_values)
"""Arguments of a tool: strings, numbers, enums, arrays and objects in each other, some optional."""
