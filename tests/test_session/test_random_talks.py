"""Random conversations over all published templates and those with odd habits: what is appended is
what a rendering of the whole conversation ends with, or it is said that it was rendered again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfi_agent.errors import InputError, TemplateError
from sfi_agent.session.templates.chat_template import RenderFailure
from sfi_agent.session.turn_plan import TurnPlan
from tests.odd_templates import ODD
from tests.published_templates import FOLDER, PUBLISHED, tokenizer_of
from tests.test_session.published_chats import stops_of
from tests.test_session.talks import Talk, look_up, odd_tokenizer

NAMES = [*sorted(PUBLISHED if FOLDER is not None else ()), *ODD]
WORDS = (
    *(
        "Ada",
        "room 12.",
        "\n",
        "  ",
        "\n\n",
        "é👋",
        "Why?",
        "/short",
        "/no_think",
        "日本",
        "\u200b",
    ),
    *("</think>", "<think>", '{"a": 1}', "'", '"', "<", ">", "|", "{{ x }}", "{% raw %}", "\r\n"),
)


@dataclass(frozen=True)
class Turn:
    """What is said in one turn, as far as it is possible there.

    Attributes:
        kind: Who speaks: the user once or twice, in parts, with an earlier conversation, or a tool.
        texts: What they say.
        answer: What the model says.
        reasoning: What it thinks; "" for nothing.
        calls: How many calls it makes instead.
        named: Whether results say whose they are.
        ending: How the model's turn ends; a number cuts it there.
    """

    kind: Literal["once", "twice", "parts", "past"]
    texts: tuple[str, ...]
    answer: str
    reasoning: str
    calls: int
    named: bool
    ending: Literal["whole", "other stop"] | int


@lru_cache
def tokenizer(name: str) -> Any:
    return tokenizer_of(name) if name in PUBLISHED else odd_tokenizer(name)


@st.composite
def turns(draw: st.DrawFn, name: str) -> list[Turn]:
    tokens = [item.content for item in tokenizer(name).added_tokens_decoder.values()]
    words = st.one_of(st.sampled_from(WORDS), st.sampled_from(WORDS), st.sampled_from(tokens))
    texts = st.lists(words, max_size=4).map("".join)
    plain = st.lists(st.sampled_from(WORDS[:2]), min_size=1, max_size=3).map(" ".join)
    turn = st.builds(
        Turn,
        st.sampled_from(["once", "once", "twice", "parts", "past"]),
        st.tuples(texts, texts, texts),
        st.one_of(plain, plain, texts),
        st.one_of(st.just(""), plain),
        st.sampled_from([0, 0, 1, 2, 3]),
        st.booleans(),
        st.one_of(st.just("whole"), st.just("whole"), st.just("other stop"), st.integers(1, 9)),
    )
    return draw(st.lists(turn, min_size=2, max_size=4))


def messages_of(turn: Turn, talk: Talk) -> list[dict[str, Any]]:
    first, second, third = turn.texts
    if calls := talk.chat.transcript.open_calls:
        return [
            {"role": "tool", "tool_call_id": call.id, "content": text}
            | ({"name": call.name} if turn.named and call.name else {})
            for call, text in zip(calls, turn.texts * len(calls), strict=False)
        ]
    said: dict[str, list[Any]] = {
        "once": [first],
        "twice": [first, second],
        "parts": [[{"type": "text", "text": first}, {"type": "text", "text": second}]],
        "past": [first, second, third],
    }
    given = [{"role": "user", "content": content} for content in said[turn.kind]]
    if turn.kind == "past":
        given[1] |= {"role": "assistant", "reasoning_content": "Hm."}
    return given


def output_of(turn: Turn, talk: Talk, past: Sequence[Any]) -> list[int]:
    """The model's turn, as the template would write it."""
    thought = {"reasoning_content": turn.reasoning} if turn.reasoning else {}
    answer: dict[str, Any] = {"role": "assistant", "content": turn.answer, **thought}
    if talk.chat.tools.schemas and turn.calls:
        first = talk.chat.transcript.calls_seen
        arguments = {"query": turn.texts[0], "times": 2}
        function = {"name": "look_up", "arguments": arguments}
        names = [f"call_{first + number}" for number in range(turn.calls)]
        calls = [{"id": name, "type": "function", "function": function} for name in names]
        answer |= {"content": "", "tool_calls": calls}
    stops, tokens = sorted(talk.chat.stop_ids), talk.template.control_tokens
    try:
        before = talk.template.render(past, generation_prompt=True)
        after = talk.template.render([*past, answer], generation_prompt=False)
    except RenderFailure:
        return [*talk.encode("Fine."), stops[0]]
    ids = talk.encode(tokens.plain(after[tokens.shared(before, after) :]))
    ends = [place for place, index in enumerate(ids) if index in stops]
    written, end = ids[: ends[0] if ends else None], ids[ends[0]] if ends else stops[0]
    if isinstance(turn.ending, int):
        return written[: turn.ending] or [end]
    return [*written, end if turn.ending == "whole" else stops[-1]]


def require_rendering(talk: Talk, plan: TurnPlan, history: list[int], answered: int) -> None:
    """Called when the plan's messages are in the transcript."""
    ids, new = talk.ids, list(plan.new_ids)
    assert ids == [*history[: plan.kept_tokens], *new] and new
    whole = talk.rendered(talk.chat.messages)
    if plan.detail or not history:
        # Rendered as a whole, and said so.
        assert ids == whole
        assert (plan.reuse_lost_reason is not None) == (plan.kept_tokens < len(history) - 1)
        return
    assert plan.reuse_lost_reason is None and plan.kept_tokens >= len(history) - 1
    assert history[plan.kept_tokens :] == [] or history[-1] in talk.chat.stop_ids
    if plan.joined_calls or (answered > 1 and talk.template.form.one_call_per_turn):
        return  # The results follow each other, which no rendering does; it was told once.
    assert whole[-len(new) :] == new
    if plan.kept_tokens and history[plan.kept_tokens - 1] in talk.chat.stop_ids:
        assert whole[-len(new) - 1] == history[plan.kept_tokens - 1]


def open_talk(name: str, system: str | None, with_tools: bool) -> Talk:
    stops: list[Any] = ["<|im_end|>", "<|endoftext|>"]
    stops = stops_of(name) if name in PUBLISHED else stops
    ids = [tokenizer(name).convert_tokens_to_ids(s) if isinstance(s, str) else s for s in stops]
    try:
        return Talk(tokenizer(name), ids, system, [look_up] if with_tools else [])
    except TemplateError:
        return Talk(tokenizer(name), ids)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), name=st.sampled_from(NAMES), with_tools=st.booleans())
def test_what_is_appended_is_the_end_of_the_whole_conversation(
    data: st.DataObject, name: str, with_tools: bool
) -> None:
    system = data.draw(st.sampled_from([None, "Be kind.", "Be <|im_end|> short: /short\n"]))
    talk = open_talk(name, system, with_tools)
    for turn in data.draw(turns(name)):
        history, answered = talk.ids, len(talk.chat.transcript.open_calls)
        said = messages_of(turn, talk)
        try:
            plan = talk.ask(said)
        except (TemplateError, InputError):
            assert talk.ids == history  # Refused before anything has changed.
            break
        # Reasoning that a rendering leaves out leaves the messages too.
        heard = [{**item, "reasoning_content": ""} for item in talk.chat.messages]
        told = [
            {**item, "content": flat(item["content"]), "reasoning_content": ""} for item in said
        ]
        assert heard[-len(said) :] == told
        require_rendering(talk, plan, history, answered)
        talk.answer(plan, output_of(turn, talk, talk.chat.messages))


def flat(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
