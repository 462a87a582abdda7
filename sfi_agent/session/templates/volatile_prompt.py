"""Clocks at the front of a prompt, where they make two sessions share nothing.

Looked for are a date or a time of day in the system prompt (or the first message), and chat
templates that write the date themselves. Dates and timestamps count when they are near the present;
times of day count unless they are named as durations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta, timezone

from sfi_agent.observe.log import log_event
from sfi_agent.session.templates.chat_template import ChatTemplate, Message

__all__ = ["clocks_in", "clocks_in_prompt", "warn_of_clocks"]

_NEAR = timedelta(days=7)
_MOST_SHOWN = 3
_REMEDY = (
    "Prompts that begin differently share no history: say what changes in the newest message, or "
    "let a tool tell it"
)

_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_MONTH = r"(?P<month>(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*)\.?"
_WEEKDAY = r"(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?"
_DATES = (
    r"(?<![\w./:-])(?P<year>\d{4})-(?P<number>\d\d)-(?P<day>\d\d)(?=T\d|(?![\w/-]))",
    r"(?<![\w./:-])(?P<year>\d{4})/(?P<number>\d\d?)/(?P<day>\d\d?)(?![\w/.-]*\d)",
    r"(?<![\w./:-])(?P<day>\d\d?)(?P<mark>[./])(?P<number>\d\d?)(?P=mark)(?P<year>\d{4})(?![\w/-])",
    r"(?<![\w./:-])(?P<number>\d\d?)/(?P<day>\d\d?)/(?P<year>\d{4})(?![\w/-])",
    rf"\b(?P<day>\d\d?)(?:st|nd|rd|th)?(?: of)?[ -]{_MONTH},?[ -](?P<year>\d{{4}})\b",
    rf"\b{_MONTH} (?P<day>\d\d?)(?:st|nd|rd|th)?,? (?P<year>\d{{4}})\b",
)
_DATE_PATTERNS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in _DATES)
_TIME = re.compile(
    r"(?<![\w.:/+-])(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:[.,]\d+)?(?![:\w]|-\d|/\d)"
    r"(?:\s?(?:Z|UTC|GMT)\b)?"
)
_TIMESTAMP = re.compile(r"(?<![\w.+-])(\d{10}|\d{13}|\d{16}|\d{19})(?:\.\d+)?(?![\w-]|\.\d)")
_VALUE = (
    rf"(?:{_WEEKDAY}\b|(?:{_WEEKDAY},? )?(?:(?:the )?\d\d?(?:st|nd|rd|th)?(?: of)? )?{_MONTH}\b"
    r"|\d{4}[-/.]\d\d?[-/.]\d\d?|\d\d?[-/.]\d\d?[-/.]\d\d(?:\d\d)?|\d\d?:\d\d|\d{10,})"
)
_LABELLED = re.compile(
    r"\b(?:today(?:['’]s)?(?: date)?|(?:current|local|present)[ _-](?:date|time|timestamp)\w*"
    r"(?:(?: and | & |/)(?:date|time))?|date today|the (?:date|time)(?: now)?|time now|now)"
    rf"(?:\s+is(?: now)?|\s*[:=])\s*(?:{_VALUE})[^\n]{{0,12}}",
    re.IGNORECASE,
)
_DURATION_BEFORE = re.compile(
    r"\b(?:timeouts?|durations?|takes?|took|lasts?|for|within|after|every|interval|delay|length|"
    r"limit|elapsed|runtime|run ?time|budget|deadline of|up to|at most|at least|than|max(?:imum)?|"
    r"min(?:imum)?|ttl|period|uptime|wait(?:s|ed)?)\b[^\n.;]{0,16}\Z",
    re.IGNORECASE,
)
_DURATION_BEHIND = re.compile(
    r"\s*(?:h|hrs?|hours?|minutes?|seconds?|long|elapsed|duration|left|remaining)\b", re.IGNORECASE
)


def clocks_in(text: str, now: datetime) -> Iterator[str]:
    """What in a text looks like the current date or time, as it stands there.

    Args:
        text: Any text.
        now: The present, with its time zone.
    """
    for match in _LABELLED.finditer(text):
        yield match.group().strip()
    dates = [match for pattern in _DATE_PATTERNS for match in pattern.finditer(text)]
    yield from (match.group() for match in dates if _is_near(match, now.date()))
    dated = {match.end() for match in dates}
    for match in _TIME.finditer(text):
        # The time behind a date is as near as the date.
        behind_date = len(text[: match.start()].rstrip(" ,")) in dated
        if not behind_date and not _is_duration(text, match):
            yield match.group().strip()
    for match in _TIMESTAMP.finditer(text):
        seconds = int(match.group(1)) / 10 ** (len(match.group(1)) - 10)
        if abs(seconds - now.timestamp()) <= _NEAR.total_seconds():
            yield match.group()


def clocks_in_prompt(template: ChatTemplate, messages: Sequence[Message]) -> tuple[str, ...]:
    """What makes the beginning of a chat depend on when it is rendered, one phrase each."""
    found: list[str] = []
    if template.writes_the_date(messages):
        found.append("the chat template writes the date")
    content = messages[0].get("content")
    if isinstance(content, str):
        place = "system prompt" if messages[0]["role"] == "system" else "first message"
        # One clock may be found in several ways: the longest phrase says most.
        phrases = sorted(set(clocks_in(content, datetime.now(timezone.utc))), key=len, reverse=True)
        distinct = [
            phrase
            for index, phrase in enumerate(phrases)
            if not any(phrase in longer for longer in phrases[:index])
        ]
        found += [f"{phrase!r} in the {place}" for phrase in distinct[:_MOST_SHOWN]]
    return tuple(found)


def warn_of_clocks(session_id: str, found: Sequence[str]) -> None:
    """Log what `clocks_in_prompt` found, if anything."""
    if found:
        log_event(
            "warning", "volatile_prompt", session=session_id, found=list(found), remedy=_REMEDY
        )


def _is_near(match: re.Match[str], today: date) -> bool:
    parts = match.groupdict()
    name = (parts.get("month") or "")[:3].lower()
    month = _MONTHS.index(name) + 1 if name else int(parts["number"])
    try:
        found = date(int(parts["year"]), month, int(parts["day"]))
    except ValueError:
        return False
    return abs(found - today) <= _NEAR


def _is_duration(text: str, match: re.Match[str]) -> bool:
    before = text[max(0, match.start() - 32) : match.start()]
    behind = _DURATION_BEHIND.match(text, match.end())
    return bool(_DURATION_BEFORE.search(before) or behind)
