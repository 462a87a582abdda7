"""Whatever a model writes for a call, the conversation goes on and can be kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfi_agent import ToolCall, ToolResult
from sfi_agent.session.events import TextDelta
from tests.test_session.conversations import DENSE, SPARSE, chat_engine, require_whole, says

ENGINE = chat_engine()


def note(text: str = "", count: int = 0, table: dict[str, Any] | None = None) -> str:
    """Note something.

    Args:
        text: A text.
        count: A number.
        table: Anything.
    """
    return f"noted {text!r}"


def arguments(text: str) -> str:
    return f'{{"name": "note", "arguments": {text}}}'


HOSTILE = {
    "trailing comma": arguments('{"text": "a",}'),
    "not a number": arguments('{"table": {"a": NaN}}'),
    "too large, wrong type": arguments('{"text": 1e999}'),
    "key twice": arguments('{"text": "a", "text": "b"}'),
    "half a character, wrong type": arguments(r'{"count": "\ud83d"}'),
    "half a character, unknown": arguments(r'{"\ud83d": 1}'),
    "half a character, name": r'{"name": "\ud83d", "arguments": {}}',
    "no name": '{"name": "", "arguments": {}}',
    "name with a line break": '{"name": "no\\nte", "arguments": {}}',
    "unknown tool": '{"name": "other", "arguments": {}}',
    "unknown key": '{"name": "note", "args": {"text": "a"}}',
    "arguments are broken text": arguments('"{"'),
    "nothing": "",
    "fenced": f"```json\n{arguments('{}')}\n```",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_malformed_call_is_answered_and_the_session_lives_on(kind: str, tmp_path: Path) -> None:
    output = f"<tool_call>\n{HOSTILE[kind]}\n</tool_call><|im_end|>"
    good = "<tool_call>" + arguments('{"count": 2}') + "</tool_call><|im_end|>"
    config = SPARSE if kind == "nothing" else DENSE
    with ENGINE.session(config, system="S", tools=[note]) as session:
        with says(ENGINE, output, good, "Fine.<|im_end|>"):
            events = list(session.stream("Go.", max_turns=4))
        calls = [item for item in events if isinstance(item, ToolCall)]
        first, second = [item for item in events if isinstance(item, ToolResult)]
        assert len(calls) == 2 and first.is_error and not second.is_error
        assert first.content and first.call_id == calls[0].id
        assert "".join(item.text for item in events if isinstance(item, TextDelta)) == "Fine."
        # What was said is text, here and wherever it is written down.
        assert json.loads(json.dumps(session.messages, allow_nan=False)) == session.messages
        session.messages.__repr__().encode()
        session.save(tmp_path / "saved")
        with ENGINE.load_session(tmp_path / "saved", tools=[note]) as loaded:
            assert loaded.messages == session.messages
        require_whole(session, exact=config is DENSE)
        with says(ENGINE, "Yes.<|im_end|>"):
            assert session.send("More?").text == "Yes."
    # The whole conversation can be told to another session.
    with ENGINE.session(DENSE, tools=[note]) as other, says(ENGINE, "Yes.<|im_end|>"):
        reply = other.send([*session.messages[1:], {"role": "user", "content": "?"}])
        assert reply.text == "Yes."


@pytest.mark.parametrize("depth", [50, 400, 3000])
def test_deep_arguments_are_refused_or_run(depth: int) -> None:
    from sfi_agent.session.output.json_bodies import json_calls
    from sfi_agent.session.tool_use.tools import ToolSet

    deep = '{"a": ' * depth + "1" + "}" * depth
    for text in (arguments(f'{{"table": {deep}}}'), arguments(f'{{"text": {deep}}}')):
        (call,) = json_calls(text, True, {})
        made = ToolCall("call_0", call.name, call.arguments, text, error=call.error)
        result = ToolSet([note]).run(made)
        assert result.call_id == "call_0" and result.content
