"""The report on a chat template, pinned for the habits of known families."""

from __future__ import annotations

import pytest

from sfi_agent.errors import TemplateError
from sfi_agent.session.templates.template_report import check_template
from tests.chat_templates import CHATML, CHATML_THINKING
from tests.test_session.helpers import make_chat
from tests.tiny_tokenizers import chatml_tokenizer

# system, tools, stable, with tools, with reasoning, continues user turns, continues tool turns;
# the call format; how user turns (plain, after reasoning, after a cut turn) and tool turns (plain,
# after reasoning) continue: d (delta), r (rendered again), i (impossible)
PINNED = {
    "CHATML": ("yyyyyyy", "hermes", "ddddd"),
    "CHATML_THINKING": ("yyyynyy", "hermes", "ddddd"),
    "LLAMA": ("yyyyyyy", "llama", "ddddd"),
    "MISTRAL": ("yyynnyy", "mistral", "ddddd"),
    "GEMMA": ("nnynyyn", "none", "dddii"),
    "DROPS_TOOL_MESSAGES": ("ynynyyn", "none", "dddii"),
    "CHANGES_THE_CLOSE": ("ynynynn", "none", "rrrrr"),
    "CHANGES_THE_STOP": ("ynynyyn", "none", "ddddd"),
    "ARGUMENTS_AS_TEXT": ("yyyyyyy", "hermes", "ddddd"),
    "ROLE_OPENS_NEXT_TURN": ("yyyyyyy", "hermes", "ddddd"),
    "NO_CONTROL_TOKENS": ("ynynynn", "none", "rrrrr"),
}


@pytest.mark.parametrize("family", sorted(PINNED))
def test_report(family: str) -> None:
    report = check_template(make_chat(family).tokenizer)
    flags = (
        report.system,
        report.tools,
        report.stable,
        report.stable_with_tools,
        report.stable_with_reasoning,
        report.continues_user_turns,
        report.continues_tool_turns,
    )
    turns = "".join(continuation.method[0] for continuation in report.continuations)
    shown_flags = "".join("y" if flag else "n" for flag in flags)
    assert (shown_flags, report.call_format, turns) == PINNED[family]
    assert bool(report.problems) == (not all(flags))
    shown = str(report)
    assert all(problem in shown for problem in report.problems)


def test_whether_a_turn_may_hold_several_calls() -> None:
    for family, several in (("CHATML", True), ("MISTRAL", True), ("LLAMA", False)):
        report = check_template(make_chat(family).tokenizer)
        assert report.several_calls == several
        assert f"several calls in one turn: {'yes' if several else 'no'}" in str(report)
    assert "several calls in one turn: no" in str(check_template(make_chat("GEMMA").tokenizer))


def test_options_change_the_report() -> None:
    source = (
        "{% for m in messages %}{% if m.role != 'system' or takes_system %}"
        "<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = chatml_tokenizer(source)
    assert not check_template(tokenizer).system
    assert check_template(tokenizer, {"takes_system": True}).system


def test_no_template() -> None:
    with pytest.raises(TemplateError):
        check_template(chatml_tokenizer(None))


def test_a_turn_that_is_rendered_again_says_what_it_costs_and_why() -> None:
    report = check_template(make_chat("CHANGES_THE_CLOSE").tokenizer)
    turns = {item.turn: item for item in report.continuations}
    for item in turns.values():
        assert item.method == "rerender"
        assert item.detail.startswith("close_does_not_depend_on_what_follows")
    # Only the line break before the last token differs; reasoning is further back.
    assert 0 < turns["user"].processed_again_share < 0.1
    cut = turns["user_after_cut_turn"]
    assert (cut.processed_again_share, cut.reuse_lost_reason) == (0, None)
    lost = turns["user_after_reasoning"]
    assert lost.reuse_lost_reason == "template_rewrote_history"
    assert 0.2 < lost.processed_again_share < 0.9
    assert "history has" in lost.detail
    shown = str(report)
    assert f"{lost.processed_again_share:.0%} of the history processed again" in shown
    assert "user message after reasoning: rendered again" in shown


def test_whether_reasoning_is_left_out() -> None:
    keeps = """{%- for m in messages -%}
<|im_start|>{{ m.role }}{{ m.reasoning_content or '' }}
{{ m.content }}<|im_end|>{% endfor %}"""
    for source, drops in ((keeps, False), (CHATML_THINKING, True), (CHATML, True)):
        report = check_template(chatml_tokenizer(source))
        assert report.drops_reasoning == drops
        assert f"earlier reasoning: {'left out' if drops else 'kept'}" in str(report)
