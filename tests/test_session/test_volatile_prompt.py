"""Clocks at the front of a prompt are told once per session; numbers that are no clocks are not."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sfi_agent.session.templates.chat_template import ChatTemplate
from sfi_agent.session.templates.volatile_prompt import clocks_in, clocks_in_prompt
from tests import chat_templates
from tests.published_templates import needs_published_templates, tokenizer_of
from tests.test_session.conversations import FULL, chat_engine, says
from tests.test_session.helpers import user
from tests.tiny_tokenizers import chatml_tokenizer

NOW = datetime(2026, 3, 14, 15, 9, 26, tzinfo=timezone.utc)
END = "<|im_end|>"

near = st.timedeltas(timedelta(days=-6), timedelta(days=6)).map(lambda delta: NOW + delta)
far = st.one_of(
    st.timedeltas(timedelta(days=-20_000), timedelta(days=-9)),
    st.timedeltas(timedelta(days=9), timedelta(days=2_000)),
).map(lambda delta: NOW + delta)
DATE_FORMS = (
    *("%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M", "%d.%m.%Y", "%m/%d/%Y", "%Y/%m/%d"),
    *("%d %B %Y", "%d %b %Y", "%B %d, %Y", "%b %d %Y", "%A, %d %B %Y"),
)
before = st.sampled_from(["", "Be kind. ", "Session of ", "You answer from the log of (", "\n"])
behind = st.sampled_from(["", ".", ", please.", "\nBe brief.", ")"])


def found(text: str) -> list[str]:
    return list(clocks_in(text, NOW))


@given(when=near, form=st.sampled_from(DATE_FORMS), start=before, end=behind)
def test_dates_near_the_present_are_found(when: datetime, form: str, start: str, end: str) -> None:
    clocks = found(start + when.strftime(form) + end)
    assert clocks
    assert all(clock in start + when.strftime(form) + end for clock in clocks)


@given(when=far, form=st.sampled_from(DATE_FORMS), start=before, end=behind)
def test_dates_far_away_are_text(when: datetime, form: str, start: str, end: str) -> None:
    assume(abs((when.replace(day=1) - NOW).days) > 60)  # day and month may be read either way
    assert found(f"{start}{when.strftime(form)}{end}") == []


@given(seconds=st.integers(0, 86_399), start=before, end=behind)
def test_times_of_day_are_found(seconds: int, start: str, end: str) -> None:
    time = (datetime(2000, 1, 1) + timedelta(seconds=seconds)).strftime("%H:%M:%S")
    assert found(start + time + end) == [time]


@given(when=near, scale=st.sampled_from([1, 1_000, 1_000_000, 1_000_000_000]), start=before)
def test_timestamps_near_the_present_are_found(when: datetime, scale: int, start: str) -> None:
    stamp = str(int(when.timestamp()) * scale)
    assert found(f"{start}{stamp}.") == [stamp]


@pytest.mark.parametrize(
    "text",
    [
        *("Today's date is 26 Jul 2019.", "Today is Monday.", "Current time: 2:03 PM"),
        *("current_date = 2001-02-03", "The time is now 9:15.", "Today: March 3rd", "Now: 17:00"),
        *("Local time is 03:04", "The current date and time: Mon, 5 May 1990"),
    ],
)
def test_what_is_called_the_present_is_found(text: str) -> None:
    assert len(found(text)) >= 1


@given(
    parts=st.lists(st.integers(0, 99), min_size=2, max_size=5),
    start=st.sampled_from(["version ", "v", "Python ", "torch==", "release "]),
)
def test_versions_are_no_clocks(parts: list[int], start: str) -> None:
    assert found(start + ".".join(map(str, parts)) + " is installed") == []
    assert found(f"{start}{parts[0]}.{parts[1]}.{NOW.year}.{NOW.month}") == []


@given(port=st.integers(1, 65_535), start=st.sampled_from(["port ", "localhost:", "10.0.0.1:"]))
def test_ports_and_addresses_are_no_clocks(port: int, start: str) -> None:
    assert found(f"It listens on {start}{port}.") == []
    assert found(f"It listens on [::1]:{port}, device 00:1A:2B:{port % 60:02}:12:34.") == []


@given(
    amount=st.integers(0, 23),
    minutes=st.integers(0, 59),
    words=st.sampled_from(
        [
            *("a timeout of {}", "for {}", "within {}", "takes up to {}", "every {}", "{} hours"),
            *("{} long", "at most {}", "a duration: {}", "no longer than {}"),
        ]
    ),
)
def test_durations_are_no_clocks(amount: int, minutes: int, words: str) -> None:
    for text in (f"{amount:02}:{minutes:02}:30", f"{amount}h {minutes}m", f"PT{amount}H", "90 s"):
        assert found(f"Stop {words.format(text)}, then rest.") == []


@pytest.mark.parametrize(
    "text",
    [
        "Use get_current_time to find out the current time or today's date.",
        "Your knowledge ends in 2024-06. The release date was 2024-06-01.",
        f"The model is called chat-{NOW:%Y-%m-%d}, build {NOW:%Y%m%d}.",
        "Lines 10:20 to 30:40; ratio 16:9; chapter 3:16; score 2:1.",
        "Log of 2019-05-05 12:34:56, and 2019-05-05T12:34:56Z.",
        "Call +4917612345678 or 1234567890. The number 31415926535 is large.",
        "Now answer. The time has come. Today you are a pirate. The date palm.",
    ],
)
def test_other_numbers_are_no_clocks(text: str) -> None:
    assert found(text) == []


# ---------------------------------------------------------------- templates

DATED = chat_templates.CHATML + "{{ strftime_now('%d %b %Y') }}"
MENTIONED = chat_templates.CHATML + "{% if date %}{{ strftime_now('%d') }}{% endif %}"


def test_templates_that_write_the_date_are_found_by_rendering() -> None:
    for source, writes in ((chat_templates.CHATML, False), (DATED, True), (MENTIONED, False)):
        template = ChatTemplate(chatml_tokenizer(source))
        expected = ("the chat template writes the date",) if writes else ()
        assert clocks_in_prompt(template, [user("Hello")]) == expected
    template = ChatTemplate(chatml_tokenizer(MENTIONED), options={"date": True})
    assert len(clocks_in_prompt(template, [user("Hello")])) == 1


@needs_published_templates
@pytest.mark.parametrize(
    ("name", "writes"),
    [("gptoss", True), ("llama3_2", True), ("muse_glimmer", True), ("llama3_1", False)],
)
def test_published_templates_that_write_the_date(name: str, writes: bool) -> None:
    template = ChatTemplate(tokenizer_of(name))
    assert bool(clocks_in_prompt(template, [user("Hello")])) == writes


def test_a_template_that_is_told_the_date_writes_no_clock() -> None:
    source = "{{ date or strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    dated = ChatTemplate(chatml_tokenizer(source), options={"date": "2020"})
    assert clocks_in_prompt(dated, [user("Hello")]) == ()
    assert clocks_in_prompt(ChatTemplate(chatml_tokenizer(source)), [user("Hello")])


# ---------------------------------------------------------------- sessions


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if text.startswith("volatile_prompt")]


def test_a_session_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = chat_engine()
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    with caplog.at_level(logging.WARNING, "sfi_agent"):
        with engine.session(FULL, system=f"It is {today}. Began at 12:34:56.") as session:
            start = session.mark()
            with says(engine, f"Yes.{END}", f"No.{END}", f"Well.{END}"):
                session.send("Sure?")
                session.send(f"Now it is {today}.")
                session.rewind(start)
                session.send("Sure?")
    (warning,) = warnings_of(caplog)
    assert session.id in warning and today in warning and "12:34:56" in warning
    assert "system prompt" in warning and "newest message" in warning


@pytest.mark.parametrize(
    ("system", "message"),
    [
        (None, "Hello"),
        ("Be kind. Version 1.2.3 listens on port 8080 for 00:10:00.", "Hello"),
        ("Be kind.", "What happened at 12:34:56?"),
    ],
)
def test_quiet_sessions(caplog: pytest.LogCaptureFixture, system: str | None, message: Any) -> None:
    engine = chat_engine()
    with caplog.at_level(logging.WARNING, "sfi_agent"):
        with engine.session(FULL, system=system) as session, says(engine, f"Yes.{END}"):
            session.send(message)
    assert warnings_of(caplog) == []


def test_without_a_system_prompt_the_first_message_counts(caplog: pytest.LogCaptureFixture) -> None:
    engine = chat_engine()
    with caplog.at_level(logging.WARNING, "sfi_agent"):
        with engine.session(FULL) as session, says(engine, f"Yes.{END}"):
            session.send("The time is 12:34:56. Are you there?")
    (warning,) = warnings_of(caplog)
    assert "first message" in warning
