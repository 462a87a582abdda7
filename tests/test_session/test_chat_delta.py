"""Appending messages by delta equals the end of the real longer chat, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.errors import TemplateError
from sfi_agent.session.templates.chat_delta import DeltaRefused
from sfi_agent.session.templates.chat_template import ChatTemplate
from sfi_agent.session.templates.history_match import common_prefix
from sfi_agent.session.templates.stop_ids import stop_ids
from tests.test_session.helpers import (
    SEARCH,
    Chat,
    assistant,
    call,
    call_message,
    make_chat,
    result,
    user,
)
from tests.tiny_tokenizers import chatml_tokenizer

STABLE_FOR_USERS = ["CHATML", "LLAMA", "MISTRAL", "GEMMA", "ARGUMENTS_AS_TEXT"]
STABLE_FOR_TOOLS = ["CHATML", "CHATML_THINKING", "MISTRAL", "ARGUMENTS_AS_TEXT"]


def stop_of(chat: Chat) -> int:
    (stop,) = chat.stops
    return stop


@pytest.mark.parametrize("family", STABLE_FOR_USERS)
def test_a_user_turn_equals_the_real_longer_chat(family: str) -> None:
    chat = make_chat(family)
    begun, answer, new = [user("Who is Ada?")], assistant("A person."), user("Where is she?")
    history = [
        *chat.template.first_prompt(begun),
        *chat.model_output(begun, answer),
        stop_of(chat),
    ]
    continued = chat.delta.continue_chat(history, [*begun, answer], [new])
    assert continued.reuse_lost_reason is None
    assert continued.kept_tokens == len(history)
    real = chat.template.first_prompt([*begun, answer, new])
    assert tuple(history) + continued.new_ids == real


@pytest.mark.parametrize("family", STABLE_FOR_TOOLS)
@pytest.mark.parametrize("calls", [1, 2])
def test_a_tool_round_equals_the_real_longer_chat(family: str, calls: int) -> None:
    chat = make_chat(family, [SEARCH])
    made = [call(number, query=f"q{number}") for number in range(calls)]
    begun, answer = [user("Look for Ada")], call_message(*made, content="Looking.")
    new = [result(f"found {number}", number) for number in range(calls)]
    real = chat.template.first_prompt([*begun, answer, *new])
    delta = chat.delta.delta(new, made, [stop_of(chat)])
    assert not delta.replaces_last
    assert real[-len(delta.ids) :] == delta.ids
    if family == "CHATML":
        output = chat.model_output(begun, answer)
        history = (*chat.template.first_prompt(begun), *output, stop_of(chat))
        assert history + delta.ids == real


def test_llama_hides_text_beside_a_call_and_takes_one_call_per_turn() -> None:
    chat = make_chat("LLAMA", [SEARCH])
    assert chat.template.form.one_call_per_turn
    single = call(query="Ada")
    begun, answer = [user("Look")], call_message(single, content="this text is not rendered")
    history = [*chat.template.first_prompt(begun), *chat.model_output(begun, answer)]
    delta = chat.delta.delta([result("found")], [single], [stop_of(chat)])
    real = chat.template.first_prompt([*begun, answer, result("found")])
    assert (*history, stop_of(chat), *delta.ids) == real
    # Two calls in one turn: the results follow one another, nothing is refused.
    both = [call(0, query="a"), call(1, query="b")]
    delta = chat.delta.delta([result("one"), result("two", 1)], both, [stop_of(chat)])
    text = chat.tokenizer.decode(delta.ids)
    assert "one" in text and "two" in text
    # The whole chat can be rendered as well, as two turns.
    whole = chat.template.prompt_text([*begun, call_message(*both), result("one"), result("2", 1)])
    assert whole.index('"one"') < whole.index('"b"') < whole.index('"2"')


def test_thinking_history_is_not_rendered_again() -> None:
    chat = make_chat("CHATML_THINKING")
    begun = [user("Why?")]
    thinking = {**assistant("Because."), "reasoning_content": "Let me think."}
    output = chat.model_output(begun, thinking)
    assert "Let me think." in chat.tokenizer.decode(output)
    history = [*chat.template.first_prompt(begun), *output, stop_of(chat)]
    continued = chat.delta.continue_chat(history, [*begun, thinking], [user("Really?")])
    assert continued.reuse_lost_reason is None
    real = chat.template.first_prompt([*begun, thinking, user("Really?")])
    # The template itself drops the thought, so the whole chat would lose that part of the history.
    assert common_prefix(history, real) < len(history) - 3
    assert real[-len(continued.new_ids) :] == continued.new_ids


@pytest.mark.parametrize(
    "written",
    [
        '<tool_call>{"name":"search","arguments":{"query":"Ada"}}</tool_call>',
        '<tool_call>\n\n  {"arguments": {"query": "\\u00e9"}, "name": "search"} </tool_call>',
        '<think>\n\n\nhm </think>text  \n\n<tool_call>\n{"name": "search"}\n</tool_call>\n',
        '<tool_call>{"name": "search", "arguments": {"query": ',
        "\ufffd odd \u200b output",
    ],
)
def test_odd_output_stays_as_the_model_wrote_it(written: str) -> None:
    chat = make_chat("CHATML", [SEARCH])
    raw = chat.tokenizer(written, add_special_tokens=False)["input_ids"]
    history = [*chat.template.first_prompt([user("Go")]), *raw, stop_of(chat)]
    continued = chat.delta.continue_chat(
        history, [user("Go"), call_message(call())], [result("r")], [call()]
    )
    assert continued.kept_tokens == len(history)
    assert continued.reuse_lost_reason is None


def test_a_turn_that_was_cut_short_gets_the_whole_close() -> None:
    chat = make_chat("CHATML")
    (last,) = chat.tokenizer.encode("x", add_special_tokens=False)
    cut = chat.delta.delta([user("Go on")], [], [last])
    whole = chat.delta.delta([user("Go on")], [], [stop_of(chat)])
    assert cut.ids == (stop_of(chat), *whole.ids)
    assert not cut.replaces_last


def test_another_stop_token_than_the_template_writes_gives_way() -> None:
    chat = make_chat("LLAMA", [SEARCH], extra_stops=["<|eom_id|>"])
    eot, eom = chat.ids("<|eot_id|>", "<|eom_id|>")
    history = [*chat.template.first_prompt([user("Look")]), 70, 71, eom]
    new, made = [result("r")], [call()]
    continued = chat.delta.continue_chat(history, [user("Look"), call_message(*made)], new, made)
    assert continued.kept_tokens == len(history) - 1
    assert continued.new_ids[0] == eot
    assert continued.reuse_lost_reason is None


def test_families_without_end_of_turn_stop_on_the_next_role() -> None:
    chat = make_chat("ROLE_OPENS_NEXT_TURN", [SEARCH], extra_stops=["<|observation|>"])
    observation, next_user = chat.ids("<|observation|>", "<|user|>")
    begun, answer = [user("Look")], call_message(call(query="Ada"))
    output = chat.model_output(begun, answer)
    history = (*chat.template.first_prompt(begun), *output, observation)
    delta = chat.delta.delta([result("r")], [call(query="Ada")], [observation])
    assert history + delta.ids == chat.template.first_prompt([*begun, answer, result("r")])
    # The model stopped to call a tool, but the user speaks: the role token is replaced.
    delta = chat.delta.delta([user("Never mind")], [], [observation])
    assert delta.replaces_last and delta.ids[0] == next_user


@pytest.mark.parametrize(
    ("family", "messages", "calls", "requirement"),
    [
        ("CHANGES_THE_CLOSE", [user("b")], [], "close_does_not_depend_on_what_follows"),
        ("NO_CONTROL_TOKENS", [user("b")], [], "begins_with_control_token"),
        ("DROPS_TOOL_MESSAGES", [result("b")], [call()], "contents_are_rendered"),
        ("GEMMA", [result("b")], [call()], "renders"),
        ("GEMMA", [user("a"), user("b")], [], "renders"),
    ],
)
def test_what_cannot_be_proven_is_refused(
    family: str, messages: list[dict[str, Any]], calls: list[Any], requirement: str
) -> None:
    chat = make_chat(family)
    with pytest.raises(DeltaRefused) as caught:
        chat.delta.delta(messages, calls, [stop_of(chat) if len(chat.stops) == 1 else -1])
    assert caught.value.requirement == requirement


def test_a_stop_token_that_the_template_does_not_write_gives_way() -> None:
    chat = make_chat("CHATML", [SEARCH])
    im_end, end_of_text = chat.ids("<|im_end|>", "<|endoftext|>")
    other = type(chat.delta)(chat.template, frozenset({end_of_text}))
    delta = other.delta([user("b")], [], [end_of_text])
    assert delta.replaces_last and delta.ids[0] == im_end
    # Behind calls their markup comes before the close, and which token closes is not known.
    with pytest.raises(DeltaRefused) as caught:
        other.delta([result("b")], [call()], [end_of_text])
    assert caught.value.requirement == "closes_with_a_stop_token"


def test_a_turn_inside_a_chat_may_end_otherwise_than_the_last_one() -> None:
    chat = make_chat("CHANGES_THE_STOP", extra_stops=["<|im_end|>"])
    end_of_text, im_end = chat.ids("<|endoftext|>", "<|im_end|>")
    begun, answer, new = [user("a")], assistant("one"), [user("b")]
    written = chat.tokenizer.encode("one", add_special_tokens=False)
    real = chat.template.first_prompt([*begun, answer, *new])
    for last, kept in ((end_of_text, 0), (im_end, 1)):
        history = [*chat.template.first_prompt(begun), *written, last]
        continued = chat.delta.continue_chat(history, [*begun, answer], new)
        assert continued.reuse_lost_reason is None and continued.detail == ""
        assert continued.kept_tokens == len(history) - 1 + kept
        assert (*history[: continued.kept_tokens], *continued.new_ids) == real


EACH_CALL_ENDS = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{{ call.function.arguments | tojson }}<|call|>
{%- endfor -%}
<|im_end|>
{% endfor -%}
"""
"""A stop token behind each call, and another one behind the turn."""


def test_stop_tokens_between_calls_belong_to_their_markup() -> None:
    tokenizer = chatml_tokenizer(EACH_CALL_ENDS, special_tokens=["<|call|>"])
    template = ChatTemplate(tokenizer, [SEARCH])
    each, end = tokenizer.convert_tokens_to_ids(["<|call|>", "<|im_end|>"])
    delta = type(make_chat("CHATML").delta)(template, frozenset({each, end}))
    made, new = [call(0), call(1)], [result("one"), result("two", 1)]
    real = template.first_prompt([user("a"), call_message(*made, content="x"), *new])
    found = delta.delta(new, made, [end])
    assert not found.replaces_last
    assert real[-len(found.ids) - 1 :] == (end, *found.ids)
    assert each not in found.ids


STATEFUL = """\
{%- set seen = namespace(results=false) -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{ '' if seen.results else '<|im_start|>results' }}
{{ message.content }}<|im_end|>
{%- set seen.results = true -%}
{%- else -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
"""
"""In the manner of DeepSeek: what stands before results depends on earlier turns."""


def test_text_between_turns_may_depend_on_earlier_ones() -> None:
    tokenizer = chatml_tokenizer(STATEFUL)
    template = ChatTemplate(tokenizer, [SEARCH])
    (stop,) = stops = stop_ids(tokenizer)
    delta = type(make_chat("CHATML").delta)(template, stops)
    past = [user("a"), call_message(call(5)), result("r", 5), assistant("x"), user("b")]
    made, new = call(), [result("found")]
    for earlier in ([user("a")], past):
        real = template.first_prompt([*earlier, call_message(made), *new])
        ids = delta.delta(new, [made], [stop], earlier).ids
        assert real[-len(ids) - 1 :] == (stop, *ids)
    assert len(delta.delta(new, [made], [stop], past).ids) < len(
        delta.delta(new, [made], [stop], [user("a")]).ids
    )


def test_a_missing_marker_is_refused() -> None:
    chat = make_chat("CHATML")
    source = "{%- for m in messages -%}<|im_start|>{{ m.content | upper }}<|im_end|>{%- endfor -%}"
    chat.tokenizer.chat_template = source
    delta = type(chat.delta)(ChatTemplate(chat.tokenizer), chat.stops)
    with pytest.raises(DeltaRefused) as caught:
        delta.delta([user("b")], [], [-1])
    assert caught.value.requirement == "marker_is_rendered"


def test_fallback_keeps_the_common_prefix_and_says_why() -> None:
    chat = make_chat("CHANGES_THE_CLOSE")
    begun, answer, new = [user("a")], assistant("one"), [user("b")]
    prompt = chat.template.first_prompt(begun)
    history = [*prompt, *chat.tokenizer.encode("one", add_special_tokens=False)]
    # Written as the template would: only the pending stop token differs, nothing is lost.
    stopped = [*history, *chat.ids("<|endoftext|>")]
    continued = chat.delta.continue_chat(stopped, [*begun, answer], new)
    assert continued.kept_tokens == len(history)
    assert continued.reuse_lost_reason is None
    assert (*history, *continued.new_ids) == chat.template.first_prompt([*begun, answer, *new])
    # Written otherwise: the output is rendered again.
    odd = [*prompt, *chat.tokenizer.encode(" one ", add_special_tokens=False), stopped[-1]]
    continued = chat.delta.continue_chat(odd, [*begun, answer], new)
    assert continued.kept_tokens == len(prompt)
    assert continued.reuse_lost_reason == "template_rewrote_history"
    assert "close_does_not_depend_on_what_follows" in continued.detail
    assert "token" in continued.detail and "one" in continued.detail


@pytest.mark.parametrize("reason", ["tools_changed", "history_edited"])
def test_a_wanted_rerender_gives_its_reason(reason: Any) -> None:
    chat = make_chat("CHATML")
    history = [*chat.template.first_prompt([user("aaa")]), 70, 71, stop_of(chat)]
    edited = [user("bbb"), assistant("x")]
    continued = chat.delta.continue_chat(history, edited, [user("c")], rerender_reason=reason)
    assert continued.reuse_lost_reason == reason
    real = chat.template.first_prompt([*edited, user("c")])
    assert (*history[: continued.kept_tokens], *continued.new_ids) == real


def test_something_is_always_left_to_process() -> None:
    chat = make_chat("CHATML")
    whole = chat.template.first_prompt([user("a")])
    continued = chat.delta.continue_chat(
        whole, [], [user("a")], rerender_reason="template_rewrote_history"
    )
    assert continued.kept_tokens == len(whole) - 1
    assert continued.new_ids == whole[-1:]


def test_a_chat_no_template_can_render_is_a_template_error() -> None:
    chat = make_chat("GEMMA")
    history = [*chat.template.first_prompt([user("a")]), stop_of(chat)]
    with pytest.raises(TemplateError, match="alternate"):
        chat.delta.continue_chat(history, [user("a"), assistant("x")], [user("b"), user("c")])


def test_a_result_that_quotes_the_marker_does_not_move_the_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = make_chat("ROLE_OPENS_NEXT_TURN", [SEARCH])
    expected = chat.delta.delta([user("quiet")], [], [-1])
    words = iter(["first", *(f"other{number}" for number in range(9))])
    monkeypatch.setattr("sfi_agent.session.templates.turn_glue.probe_text", lambda: next(words))
    delta = chat.delta.delta([user("first")], [], [-1])
    assert chat.tokenizer.decode(delta.ids) == chat.tokenizer.decode(expected.ids).replace(
        "quiet", "first"
    )


CONTROL = ["<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_response>", "<|im_", "end|>", "\n"]
CONTENTS = st.lists(
    st.one_of(st.sampled_from(CONTROL), st.text(st.characters(codec="utf-8"), max_size=6)),
    max_size=8,
).map("".join)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(content=CONTENTS, family=st.sampled_from(["CHATML", "CHATML_THINKING"]))
def test_control_tokens_in_results_stay_text(content: str, family: str) -> None:
    chat = _cached_chat(family)
    delta = chat.delta.delta([result(content)], [call()], [stop_of(chat)])
    quiet = chat.delta.delta([result("quiet")], [call()], [stop_of(chat)])
    control = set(chat.template.control_tokens.ids.values())
    shape = [index for index in delta.ids if index in control]
    assert shape == [index for index in quiet.ids if index in control]
    assert content in chat.tokenizer.decode(delta.ids, skip_special_tokens=False)
    # The same ids as at the end of the real longer chat.
    real = chat.template.first_prompt([user("a"), call_message(call()), result(content)])
    assert real[-len(delta.ids) :] == delta.ids


_CHATS: dict[str, Chat] = {}


def _cached_chat(family: str) -> Chat:
    if family not in _CHATS:
        _CHATS[family] = make_chat(family, [SEARCH])
    return _CHATS[family]
