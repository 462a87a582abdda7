"""The report on a chat template, pinned for the habits of known families."""

from __future__ import annotations

import pytest

from sfi_agent.errors import TemplateError
from sfi_agent.session.template_report import check_template
from tests.test_session.helpers import make_chat
from tests.tiny_tokenizers import chatml_tokenizer

# system, tools, stable, with tools, with reasoning, continues user turns, continues tool turns
PINNED = {
    "CHATML": ("yyyyyyy", "hermes"),
    "CHATML_THINKING": ("yyyynyy", "hermes"),
    "LLAMA": ("yyyyyyy", "llama"),
    "MISTRAL": ("yyynnyy", "mistral"),
    "GEMMA": ("nnynyyn", "none"),
    "DROPS_TOOL_MESSAGES": ("ynynyyn", "none"),
    "CHANGES_THE_CLOSE": ("ynynynn", "none"),
    "ARGUMENTS_AS_TEXT": ("yyyyyyy", "hermes"),
    "ROLE_OPENS_NEXT_TURN": ("yyyyyyy", "hermes"),
    "NO_CONTROL_TOKENS": ("ynynynn", "none"),
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
    assert ("".join("y" if flag else "n" for flag in flags), report.call_format) == PINNED[family]
    assert bool(report.problems) == (not all(flags))
    shown = str(report)
    assert all(problem in shown for problem in report.problems)


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
