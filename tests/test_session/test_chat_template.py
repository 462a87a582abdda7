"""Rendering, forms of tool calls, and what a template cannot do said in plain words."""

from __future__ import annotations

import pytest

from sfi_agent.errors import TemplateError
from sfi_agent.session.templates.chat_template import ChatTemplate, MessageForm
from tests.test_session.helpers import (
    FAMILIES,
    SEARCH,
    call,
    call_message,
    make_chat,
    result,
    user,
)
from tests.tiny_tokenizers import chatml_tokenizer


@pytest.mark.parametrize("family", ["CHATML", "LLAMA", "MISTRAL", "ROLE_OPENS_NEXT_TURN"])
def test_the_first_prompt_is_what_transformers_renders(family: str) -> None:
    chat = make_chat(family, [SEARCH])
    messages = [{"role": "system", "content": "Be brief."}, user("Who is Ada?")]
    expected = chat.tokenizer.apply_chat_template(
        messages, tools=[SEARCH], add_generation_prompt=True, return_dict=False
    )
    assert list(chat.template.first_prompt(messages)) == expected
    assert chat.template.prompt_text(messages) == chat.tokenizer.apply_chat_template(
        messages, tools=[SEARCH], add_generation_prompt=True, tokenize=False
    )


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("CHATML", MessageForm()),
        ("MISTRAL", MessageForm(nine_character_ids=True)),
        ("LLAMA", MessageForm(one_call_per_turn=True)),
        ("ARGUMENTS_AS_TEXT", MessageForm(arguments_as_text=True)),
    ],
)
def test_the_form_of_tool_calls_is_found_by_trying(family: str, form: MessageForm) -> None:
    assert make_chat(family, [SEARCH]).template.form == form


def test_ids_of_nine_characters_agree_between_call_and_result() -> None:
    chat = make_chat("MISTRAL", [SEARCH])
    foreign = call_message(call(0, query="a"))
    foreign["tool_calls"][0]["id"] = "my-own-id"
    answer = {**result("r"), "tool_call_id": "my-own-id"}
    text = chat.template.prompt_text(
        [user("q"), call_message(call(12, query="a")), result("r", 12), user("q"), foreign, answer]
    )
    assert text.count("call00012") == 2
    assert "my-own-id" not in text


def test_options_reach_the_template() -> None:
    source = "{{ greeting }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(chatml_tokenizer(source), options={"greeting": "Hello "})
    assert template.prompt_text([user("you")]) == "Hello you"


def test_no_template_is_an_error_with_a_way_out() -> None:
    with pytest.raises(TemplateError, match="session.decode"):
        ChatTemplate(chatml_tokenizer(None))


@pytest.mark.parametrize(
    ("family", "system", "tools"),
    [
        ("CHATML", True, True),
        ("MISTRAL", True, True),
        ("LLAMA", True, True),
        ("GEMMA", False, False),
        ("DROPS_TOOL_MESSAGES", True, False),
        ("NO_CONTROL_TOKENS", True, False),
    ],
)
def test_what_is_not_supported_is_said(family: str, system: bool, tools: bool) -> None:
    template = make_chat(family, [SEARCH]).template
    for require, works, word in (
        (template.require_system, system, "system message"),
        (template.require_tools, tools, "without tools"),
    ):
        if works:
            require()
        else:
            with pytest.raises(TemplateError, match=word):
                require()


def test_a_template_that_leaves_the_system_message_out_is_found() -> None:
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateError, match="without a word"):
        ChatTemplate(chatml_tokenizer(source)).require_system()


def test_messages_the_template_refuses_are_a_template_error() -> None:
    template = make_chat("GEMMA").template
    with pytest.raises(TemplateError, match="roles user, user"):
        template.first_prompt([user("a"), user("b")])


def test_every_family_of_the_tests_renders_a_user_turn() -> None:
    for family in FAMILIES:
        assert "hello" in make_chat(family).template.prompt_text([user("hello")])
