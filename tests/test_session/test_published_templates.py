"""The delta method on chat templates of published checkpoints, token for token."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.session.events import ToolCall
from sfi_agent.session.templates.chat_delta import ChatDelta
from sfi_agent.session.templates.chat_template import ChatTemplate, RenderFailure
from sfi_agent.session.templates.stop_ids import stop_ids
from sfi_agent.session.templates.template_report import TemplateReport, check_template
from tests.published_templates import PUBLISHED, needs_published_templates, tokenizer_of
from tests.test_session import published_chats
from tests.test_session.helpers import (
    SEARCH,
    Chat,
    assistant,
    call,
    call_message,
    result,
    user,
)

pytestmark = needs_published_templates

NAMES = sorted(PUBLISHED)

REPORTS: dict[str, str] = {
    "cohere": "ynynyyn none dddii",
    "cohere2": "ynynyyn none dddii",
    "deepseek_r1_distill": "ynnnnyn deepseek ddddd",
    "deepseekv3": "ynnnnyn deepseek ddddd",
    "diffusion_gemma": "yyyynyy gemma ddddd",
    "gemma": "nnynyyn none dddii",
    "gemma3": "ynynyyn none dddii",
    "gemma4": "yyyynyy gemma ddddd",
    "gemma4_v2": "yyyyyyy gemma ddddd",
    "gemma4_v3": "yyyynyy gemma ddddd",
    "gemma4_v4": "yyyynyy gemma ddddd",
    "gemma4_v5": "yyyynyy gemma ddddd",
    "glm4moe": "yyyynyy glm ddddd",
    "gptoss": "yyyynyy harmony ddddd",
    "idefics3": "ynynyyn none ddddd",
    "lfm2": "yyyyyyy pythonic ddddd",
    "lfm2_2_5": "yyyynyy pythonic ddddd",
    "lfm2_2_5_v2": "yyyynyy pythonic ddddd",
    "lfm2_2_5_vl": "yyyynyy pythonic ddddd",
    "lfm2_v2": "yyyyyyy pythonic ddddd",
    "llama3": "ynynyyn none ddddd",
    "llama3_1": "yyyyyyy llama ddddd",
    "llama3_2": "yyyyyyy llama ddddd",
    "llava_next": "ynynyyn none dddii",
    "muse_glimmer": "yyyyyyy recipients ddddd",
    "nemotron_3_5_lightning": "yynnnyy qwen_xml ddddd",
    "nemotron_3_nano": "yynnnyy qwen_xml ddddd",
    "nemotron_3_super": "yynnnyy qwen_xml ddddd",
    "nemotron_3_ultra": "yynnnyy qwen_xml ddddd",
    "phi3": "ynynyyn none dddii",
    "phi3_5": "ynynyyn none dddii",
    "qwen2_5": "yyyyyyy hermes ddddd",
    "qwen2_5_vl": "ynynyyn none ddddd",
    "qwen3": "yyyynyy hermes ddddd",
    "qwen3_5_nothink": "yynnnyy qwen_xml ddddd",
    "qwen3_5_think": "yynnnyy qwen_xml ddddd",
    "qwen3_6": "yynnnyy qwen_xml ddddd",
    "qwen3_8": "yyyyyyy qwen_xml ddddd",
    "qwen3_instruct_2507": "yyyyyyy hermes ddddd",
    "qwen3_vl": "yyyyyyy hermes ddddd",
    "smolvlm": "ynynyyn none ddddd",
}
"""By name: yes or no for system, tools, stable, stable with tools, stable with reasoning, continues
user turns, continues tool turns; the call format; and for each kind of turn d (delta), r (rendered
again) or i (impossible)."""


@lru_cache
def chat_of(name: str) -> Chat:
    return published_chats.chat_of(name, [SEARCH])


@lru_cache
def report_of(name: str) -> TemplateReport:
    return check_template(tokenizer_of(name))


def row(report: TemplateReport) -> str:
    flags = (
        *(report.system, report.tools, report.stable, report.stable_with_tools),
        *(report.stable_with_reasoning, report.continues_user_turns, report.continues_tool_turns),
    )
    turns = "".join(continuation.method[0] for continuation in report.continuations)
    return f"{''.join('y' if flag else 'n' for flag in flags)} {report.call_format} {turns}"


def test_all_reports() -> None:
    assert len(NAMES) == 41
    assert {name: row(report_of(name)) for name in NAMES} == REPORTS


OPTIONS: list[tuple[str, dict[str, bool], str]] = [
    ("qwen3", {"enable_thinking": False}, "yynnnyy hermes ddddd"),
    ("qwen3_5_think", {"enable_thinking": False}, "yynnnyy qwen_xml ddddd"),
    ("qwen3_6", {"preserve_thinking": True}, "yyyyyyy qwen_xml ddddd"),
    ("qwen3_8", {"preserve_thinking": False}, "yynnnyy qwen_xml ddddd"),
    ("nemotron_3_nano", {"enable_thinking": False}, "yyyynyy qwen_xml ddddd"),
    ("gemma4_v5", {"enable_thinking": True}, "yyynnyy gemma ddddd"),
    ("glm4moe", {"enable_thinking": False}, "yyyynyy glm ddddd"),
    ("lfm2_2_5", {"preserve_thinking": True}, "yyyyyyy pythonic ddddd"),
]


@pytest.mark.parametrize(("name", "options", "expected"), OPTIONS)
def test_reports_with_options(name: str, options: dict[str, bool], expected: str) -> None:
    assert row(check_template(tokenizer_of(name), options)) == expected
    assert expected != REPORTS[name] or name == "qwen3_5_think" or name == "glm4moe"


@pytest.mark.parametrize("name", NAMES)
def test_reports_are_readable(name: str) -> None:
    report = report_of(name)
    shown = str(report).splitlines()
    for continuation in report.continuations:
        assert str(continuation) in shown
        appends = continuation.method == "delta"
        assert appends == (continuation.detail == "")
        assert continuation.processed_again_share == 0 and continuation.reuse_lost_reason is None
    assert [continuation.turn for continuation in report.continuations] == [
        *("user", "user_after_reasoning", "user_after_cut_turn", "tool", "tool_after_reasoning")
    ]


def takes_tool_results(name: str) -> bool:
    return chat_of(name).template.tool_results_problem() is None


@pytest.mark.parametrize("name", NAMES)
def test_the_first_prompt_is_that_of_transformers(name: str) -> None:
    """The same ids, start token included, and no second one."""
    chat = published_chats.chat_of(name)
    asked: list[dict[str, Any]] = [user("Who is it, é?")]
    if chat.template.form.content_as_parts:
        asked = [user([{"type": "text", "text": "Who is it, é?"}])]
    expected = chat.tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=False
    )
    assert list(chat.template.first_prompt([user("Who is it, é?")])) == list(expected)


# ---------------------------------------------------------------- the suffix of the longer chat

CALLS = (call(0, query="Ada"), call(1, query="Bo"))
CALLED = call_message(call(7, query="x"))
ROUND = [CALLED, result("found it", 7)]
PASTS: dict[str, list[dict[str, Any]]] = {
    "first turn": [user("Who is it?")],
    "with a system prompt": [{"role": "system", "content": "Be brief."}, user("Who is it?")],
    "second turn": [user("Hello"), assistant("Hi."), user("Who is it?")],
    "second tool round": [user("Look"), *ROUND],
    "after a turn with tools": [user("Look"), *ROUND, assistant("Here."), user("And now?")],
}


def renders(template: ChatTemplate, chat: Sequence[Mapping[str, Any]]) -> bool:
    try:
        template.render(chat, generation_prompt=True)
    except RenderFailure:
        return False
    return True


def require_suffix(
    name: str,
    past: Sequence[Mapping[str, Any]],
    answer: Mapping[str, Any],
    new: Sequence[Mapping[str, Any]],
    calls: Sequence[ToolCall] = (),
) -> None:
    """The delta is the end of the really rendered chat, from right behind what the model wrote."""
    chat = chat_of(name)
    real = chat.template.first_prompt([*past, answer, *new])
    shown = chat.tokenizer.convert_ids_to_tokens
    whole = chat.delta.delta(new, calls, [-1], past)
    assert not whole.replaces_last
    ids = whole.ids
    for stop in chat.stops:
        delta = chat.delta.delta(new, calls, [*real[:5], stop], past)
        # A stop token of the model's own stands for the one that the template writes there.
        appended = delta.ids if delta.replaces_last else (stop, *delta.ids)
        assert shown(real[-len(appended) :]) == shown(appended)
        assert delta.replaces_last == (appended[0] != stop)
        assert len(appended) <= len(ids)
    assert shown(real[-len(ids) :]) == shown(ids)
    # Between the last thing the model said and the delta stands nothing but markup of its call.
    text = chat.tokenizer.decode(real[: -len(ids)], skip_special_tokens=False)
    last = calls[-1].arguments["query"] if calls else answer["content"]
    before, shows_it, written = text.rpartition(last)
    if calls and not shows_it:
        # The template shows no calls: the delta begins right behind the text.
        written = text.rpartition(answer["content"])[2] if answer["content"] else ""
    assert shows_it or calls
    control = {text for _, text in chat.template.control_tokens.spans(written)}
    assert not set(chat.tokenizer.convert_tokens_to_ids(list(control))) & chat.stops
    assert calls or not written.strip()


def places_text_before_calls(name: str) -> bool:
    """Some templates write the text of a turn with calls behind them, or behind their results."""
    text = chat_of(name).template.prompt_text([user("u"), call_message(CALLS[0], content="I look")])
    return text.find("Ada") > text.find("I look")


@pytest.mark.parametrize("name", NAMES)
def test_user_turns_equal_the_longer_chat(name: str) -> None:
    template, tried = chat_of(name).template, 0
    for past in PASTS.values():
        new = [user("Where is she?")]
        for answer in (
            assistant("A person."),
            {**assistant("A person."), "reasoning_content": "Let me think."},
        ):
            if past[-1]["role"] == "user" and renders(template, [*past, answer, *new]):
                require_suffix(name, past, answer, new)
                tried += 1
    assert tried >= 4


@pytest.mark.parametrize("name", NAMES)
def test_tool_turns_equal_the_longer_chat(name: str) -> None:
    if not takes_tool_results(name):
        assert report_of(name).continuations[-1].method == "impossible"
        return
    template, tried = chat_of(name).template, 0
    extras: list[dict[str, str]] = [{}, {"reasoning_content": "Let me think."}]
    if places_text_before_calls(name):
        extras.append({"content": "I look."})
    for past, number, extra in itertools.product(PASTS.values(), (1, 2), extras):
        calls = CALLS[: 1 if template.form.one_call_per_turn else number]
        answer = {**call_message(*calls), **extra}
        new = [result(f"found {index}", index) for index in range(number)]
        for behind in ([], [user("Well?")]):
            if renders(template, [*past, answer, *new, *behind]):
                require_suffix(name, past, answer, [*new, *behind], calls)
                tried += 1
    assert tried >= 20


# ---------------------------------------------------------------- contents and raw outputs


@st.composite
def contents(draw: st.DrawFn, name: str) -> str:
    """Text with control tokens of the family, whole and in pieces."""
    control = [*chat_of(name).template.control_tokens.ids]
    broken = draw(st.sampled_from(control))
    parts = st.one_of(
        st.sampled_from(control),
        st.sampled_from([broken[:-1], broken[1:], "\n", " ", "</think>", "<think>", "/nothink"]),
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=5),
    )
    return "x" + "".join(draw(st.lists(parts, max_size=6))) + "x"


def shape(chat: Chat, ids: Sequence[int]) -> list[str]:
    """The control tokens among ids, in order."""
    control = {index: text for text, index in chat.template.control_tokens.ids.items()}
    return [control[index] for index in ids if index in control]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_control_tokens_in_contents_stay_text(data: st.DataObject, name: str) -> None:
    chat = chat_of(name)
    text = data.draw(contents(name))
    if data.draw(st.booleans()) and takes_tool_results(name):
        calls: tuple[ToolCall, ...] = CALLS[:1]
        past, answer, new = [user("Go")], call_message(*calls), [result(text)]
        quiet = [result("quiet")]
    else:
        calls = ()
        past, answer, new, quiet = [user("Go")], assistant("Yes."), [user(text)], [user("quiet")]
    require_suffix(name, past, answer, new, calls)
    ids = chat.delta.delta(new, calls, [-1], past).ids
    assert shape(chat, ids) == shape(chat, chat.delta.delta(quiet, calls, [-1], past).ids)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_what_the_model_wrote_is_not_touched(data: st.DataObject, name: str) -> None:
    chat = chat_of(name)
    prompt = chat.template.first_prompt([user("Go")])
    raw = data.draw(st.lists(st.integers(0, len(chat.tokenizer) - 1), max_size=20))
    last = data.draw(st.one_of(st.sampled_from(sorted(chat.stops)), st.integers(0, 255)))
    history = [*prompt, *raw, last]
    found = chat.delta.continue_chat(history, [user("Go"), assistant("?")], [user("Well?")])
    assert found.reuse_lost_reason is None and found.detail == ""
    assert found.kept_tokens >= len(history) - (last in chat.stops)
    joined = [*history[: found.kept_tokens], *found.new_ids]
    assert joined[: len(prompt) + len(raw)] == [*prompt, *raw]
    real = chat.template.first_prompt([user("Go"), assistant("Yes."), user("Well?")])
    assert list(real[-len(found.new_ids) :]) == list(found.new_ids)


def test_a_cut_answer_gets_the_end_of_its_frame_as_far_as_it_is_missing() -> None:
    chat = chat_of("cohere2")
    response, turn = chat.ids("<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>")
    letter = chat.tokenizer.encode("x", add_special_tokens=False)
    other = ChatDelta(chat.template, frozenset({turn}))
    inside = other.delta([user("Well?")], [], letter).ids
    assert inside[:2] == (response, turn)
    behind = other.delta([user("Well?")], [], [*letter, response]).ids
    assert (response, *behind) == inside
    # A model that stops on the first of two such tokens keeps it.
    both = ChatDelta(chat.template, frozenset({response, turn}))
    asked, answer, new = [user("Go")], assistant("x"), [user("Well?")]
    history = (*chat.template.first_prompt(asked), *letter, response)
    found = both.continue_chat(history, [*asked, answer], new)
    assert found.kept_tokens == len(history)
    assert history + found.new_ids == chat.template.first_prompt([*asked, answer, *new])
    ended = other.delta([user("Well?")], [], [*letter, response, turn])
    assert (response, turn, *ended.ids) == inside and not ended.replaces_last


def test_tokens_that_end_a_turn_are_found_without_a_configuration() -> None:
    found = {}
    for name in ("gptoss", "glm4moe", "gemma4", "llama3_1", "muse_glimmer", "phi3", "deepseekv3"):
        tokenizer = tokenizer_of(name)
        found[name] = {*tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer)))}
    assert found == {
        "gptoss": {"<|return|>", "<|call|>"},
        "glm4moe": {"<|endoftext|>", "<|user|>", "<|observation|>"},
        "gemma4": {"<eos>", "<turn|>", "<|tool_response>"},
        "llama3_1": {"<|eot_id|>"},
        "muse_glimmer": {"<|eot|>"},
        "phi3": {"<|end|>", "<|endoftext|>"},
        "deepseekv3": {"<｜end▁of▁sentence｜>"},
    }
