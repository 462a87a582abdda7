"""Whole conversations behind published chat templates: tools, cut answers, and nothing lost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sfi_agent import Session
from sfi_agent.session.events import ToolCall
from tests.published_templates import needs_published_templates
from tests.scripted import Script
from tests.test_session.conversations import FULL, require_whole
from tests.test_session.helpers import call_message
from tests.test_session.published_chats import chat_of, model_output, published_engine, stops_of

pytestmark = needs_published_templates

LONG = FULL.replace(sampling={"max_new_tokens": 400})

# By template: the token with which the model ends a turn with calls, and one without.
ENDS = {
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "qwen3_5_think": ("<|im_end|>", "<|im_end|>"),
    "nemotron_3_nano": ("<|im_end|>", "<|im_end|>"),
    "glm4moe": ("<|observation|>", "<|user|>"),
    "gptoss": ("<|call|>", "<|return|>"),
    "gemma4_v5": ("<|tool_response>", "<turn|>"),
    "llama3_1": ("<|eom_id|>", "<|eot_id|>"),
    "muse_glimmer": ("<|eot|>", "<|eot|>"),
    "lfm2_2_5": ("<|im_end|>", "<|im_end|>"),
}


def look_up(query: str, times: int = 1) -> str:
    """Looks something up.

    Args:
        query: What to look for.
        times: How often.
    """
    return f"{query} is in room 12<|im_end|><|end|><turn|>" * times


def says(session: Session, name: str, *answers: dict[str, Any]) -> Script:
    """What the model says, as the template would write it behind the last user message."""
    assert session._chat is not None
    chat = chat_of(name, session._chat.tools.schemas)
    call_end, text_end = chat.ids(*ENDS[name])
    outputs = []
    for answer in answers:
        _, ids = model_output(chat, [{"role": "user", "content": "Go"}], answer)
        outputs.append([*ids, call_end if answer.get("tool_calls") else text_end])
    return Script(session.engine.model, outputs)


CALLED = call_message(ToolCall("call_0", "look_up", {"query": "Ada", "times": 2}, ""))
THOUGHTFUL = {"role": "assistant", "content": "In room 12.", "reasoning_content": "I know."}


@pytest.mark.parametrize("name", ENDS)
def test_a_conversation_appends_and_reads_everything(name: str) -> None:
    engine = published_engine(name)
    reasons = name != "llama3_1"
    with engine.session(LONG, tools=[look_up]) as session:
        assert session._chat is not None and {*stops_of(name)} <= session._chat.stop_ids
        with says(session, name, CALLED, THOUGHTFUL):
            reply = session.run("Where is Ada?")
        assert reply.finish_reason == "stop" and reply.usage.reuse_lost_reason is None
        assert reply.text == "In room 12."
        assert reply.reasoning == ("I know." if reasons else "")
        roles = [message["role"] for message in session.messages]
        assert roles == ["user", "assistant", "tool", "assistant"]
        (call,) = session.messages[1]["tool_calls"]
        arguments = {"query": "Ada", "times": 2}
        assert call["function"] == {"name": "look_up", "arguments": arguments}
        require_whole(session)
        for text in ("And Bo?", "Thanks."):
            before = session.token_ids
            with says(session, name, THOUGHTFUL):
                usage = session.send(text).usage
            assert usage.reuse_lost_reason is None
            assert usage.cached_tokens == len(before) - 1
            assert session.token_ids[: len(before) - 1] == before[:-1]
        require_whole(session)


@pytest.mark.parametrize("name", ENDS)
def test_after_a_cut_answer_the_conversation_goes_on(name: str) -> None:
    engine = published_engine(name)
    config = FULL.replace(sampling={"max_new_tokens": 4})
    with engine.session(config, tools=[look_up]) as session:
        with says(session, name, THOUGHTFUL):
            assert session.send("Where is Ada?").finish_reason == "length"
        before = session.token_ids
        with says(session, name, {"role": "assistant", "content": "Yes."}):
            usage = session.send("Sure?").usage
        assert usage.reuse_lost_reason is None
        assert session.token_ids[: len(before)] == before
        tokenizer: Any = engine.tokenizer
        shown = tokenizer.decode(session.token_ids[len(before) - 1 :])
        assert "Sure?" in shown and shown.count("Sure?") == 1
        require_whole(session)


@pytest.mark.parametrize("name", ENDS)
def test_malformed_calls_come_back_to_the_model(name: str) -> None:
    engine = published_engine(name)
    wrong = call_message(ToolCall("call_0", "look_up", {"query": "Ada", "times": "often"}, ""))
    unknown = call_message(ToolCall("call_1", "look_down", {"query": "Ada"}, ""))
    with engine.session(LONG, tools=[look_up]) as session:
        with says(session, name, wrong, unknown, THOUGHTFUL):
            reply = session.run("Where is Ada?")
        assert reply.text == "In room 12."
        first, second = [item["content"] for item in session.messages if item["role"] == "tool"]
        assert "times" in first and "integer" in first
        assert "look_down" in second and "look_up" in second
        assert json.dumps(session.messages)
        require_whole(session)
