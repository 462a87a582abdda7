"""What chat templates may do to a conversation that goes on, each with the answer that is right."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers

from sfi_agent.errors import InputError, TemplateError
from sfi_agent.session.templates.chat_template import ChatTemplate
from sfi_agent.session.templates.control_tokens import ControlTokens
from sfi_agent.session.templates.template_report import check_template
from tests.odd_templates import ODD, chatml
from tests.published_templates import needs_published_templates, tokenizer_of
from tests.test_session.conversations import FULL, chat_engine, encode, require_whole, says
from tests.test_session.helpers import user
from tests.test_session.talks import Talk, call_output, look_up, odd_tokenizer, talk_with
from tests.tiny_tokenizers import chatml_tokenizer

END = "<|im_end|>"


def behind(talk: Talk, text: str) -> str:
    """What the ids hold behind the last time that this is said."""
    return talk.text.rpartition(text)[2]


# ------------------------------------------------- what stands far ahead of the new message


@pytest.mark.parametrize(
    ("name", "system", "first", "expected"),
    [
        ("a switch in the first message", "Be kind. /short", "Hi.", "short: "),
        ("a switch in the first message", None, "Hi. /short", "short: "),
        ("a switch in any message", None, "Hi. /short", "short: "),
        ("a switch in any message", "/short", "Hi.", "short: "),
        ("a switch in any message", "Be kind.", "Hi.", ""),
    ],
)
def test_a_switch_holds_for_later_turns(
    name: str, system: str | None, first: str, expected: str
) -> None:
    talk = talk_with(ODD[name], system=system)
    for text in (first, "And now?", "And then?"):
        plan = talk.turn(text, f"Yes.{END}")
        assert plan.reuse_lost_reason is None
        assert behind(talk, "<|im_start|>assistant\n") == f"{expected}Yes.{END}"


def test_a_switch_holds_for_tool_results() -> None:
    talk = talk_with(ODD["a switch in any message"], tools=[look_up])
    talk.turn("Hi. /short", call_output(query="Ada") + END)
    plan = talk.turn({"role": "tool", "tool_call_id": "call_0", "content": "found"}, f"Yes.{END}")
    assert plan.reuse_lost_reason is None
    assert behind(talk, "found") == f"{END}\n<|im_start|>assistant\nshort: Yes.{END}"


def test_a_switch_in_the_answer_is_seen() -> None:
    talk = talk_with(ODD["a switch in any message"])
    talk.turn("Hi.", f"Say /short and I am.{END}")
    plan = talk.ask("Well?")
    assert talk.ids == talk.rendered(talk.chat.messages)
    assert "does_not_depend_on_the_answer" in plan.detail


@pytest.mark.parametrize(
    ("name", "task"), [("says the task again", "Find Ada."), ("says the question again", "Why?")]
)
def test_earlier_messages_are_said_as_they_were(name: str, task: str) -> None:
    talk = talk_with(ODD[name])
    talk.turn("Find Ada.", f"Yes.{END}")
    plan = talk.ask([user("And Bo?"), user("Why?")])
    assert plan.reuse_lost_reason is None
    assert f": {task}{END}\n<|im_start|>assistant\n" in behind(talk, "system")
    new = list(plan.new_ids)
    assert talk.rendered(talk.chat.messages)[-len(new) :] == new


@pytest.mark.parametrize("name", ["says the answer again", "says the call again"])
def test_what_the_model_said_is_not_replaced_by_a_stand_in(name: str) -> None:
    talk = talk_with(ODD[name], tools=[look_up])
    output = f"I look.\n{call_output(query='Ada')}{END}"
    talk.turn("Find Ada.", output)
    plan = talk.ask({"role": "tool", "tool_call_id": "call_0", "content": "found"})
    assert talk.ids == talk.rendered(talk.chat.messages)
    assert "does_not_depend_on_the_answer" in plan.detail


def test_the_system_text_may_stand_in_the_newest_message() -> None:
    talk = talk_with(ODD["system in the last question"], system="Be kind.")
    talk.turn("Hi.", f"Yes.{END}")
    talk.ask("And now?")
    assert behind(talk, f"Yes.{END}") == (
        "\n<|im_start|>user\nBe kind.\n\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_turns_are_counted_from_any_number_of_messages() -> None:
    talk = talk_with(ODD["marks even messages"])
    for number in range(4):
        # One message or two before each answer: no turn begins at the same parity as the last.
        talk.turn([user("Hi.")] * (1 + number % 2), f"Yes.{END}")
    plan = talk.ask("Well?")
    assert plan.reuse_lost_reason is None
    assert list(plan.new_ids) == talk.rendered(talk.chat.messages)[-len(plan.new_ids) :]


def test_looking_at_earlier_messages_costs_the_same_in_long_conversations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    talk = talk_with(chatml())
    rendered: list[int] = []
    render = ChatTemplate.render

    def count(self: ChatTemplate, messages: Any, **keywords: Any) -> str:
        rendered.append(len(messages))
        return render(self, messages, **keywords)

    monkeypatch.setattr(ChatTemplate, "render", count)
    for number in range(12):
        rendered.clear()
        talk.turn(f"Question {number}?", f"Yes.{END}")
    assert max(rendered) <= 6


# ------------------------------------------------------------------- the end of an answer


@pytest.mark.parametrize("stop", ["<|endoftext|>", ""])
@pytest.mark.parametrize(
    ("name", "lead"),
    [
        ("a line break instead of a stop token", "\n"),
        ("a line break before the close", "\n"),
        ("wraps answers", "</a>"),
    ],
)
@pytest.mark.parametrize("written", [False, True])
def test_what_stands_before_the_close_is_there_once(
    name: str, lead: str, stop: str, written: bool
) -> None:
    tokenizer = odd_tokenizer(name)
    talk = Talk(tokenizer, tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    output = f"{'<a>' if lead == '</a>' else ''}Yes.{lead if written else ''}{stop}"
    talk.turn("Hi.", output)
    plan = talk.ask("Well?")
    assert plan.reuse_lost_reason is None and plan.detail == ""
    chat = [user("Hi."), {"role": "assistant", "content": "Yes."}, user("Well?")]
    assert talk.text == tokenizer.decode(talk.rendered(chat))


def test_a_close_without_stop_tokens_that_changes_is_refused() -> None:
    source = chatml(head="<|{{ m.role }}|>", close="{{ '~~' if loop.last }}")
    talk = talk_with(source)
    talk.turn("Hi.", f"Yes.{END}")
    plan = talk.ask("Well?")
    assert plan.detail.startswith("close_does_not_depend_on_what_follows: '~~' becomes '<|'")
    assert talk.ids == talk.rendered(talk.chat.messages)


def test_an_answer_of_nothing_but_a_stop_token_stays_a_message() -> None:
    (end_of_text,) = encode(chat_engine(), "<|endoftext|>")
    engine = chat_engine(eos_ids=(end_of_text,))
    with engine.session(FULL) as session:
        with says(engine, [end_of_text]):
            assert session.send("Hi.").finish_reason == "stop"
        with says(engine, f"Yes.{END}"):
            usage = session.send("Well?").usage
        assert usage.reuse_lost_reason is None
        said = [(message["role"], message["content"]) for message in session.messages]
        assert said == [
            ("user", "Hi."),
            ("assistant", ""),
            ("user", "Well?"),
            ("assistant", "Yes."),
        ]
        require_whole(session)


def test_text_whose_last_token_is_rendered_again_stays_in_the_message() -> None:
    talk = talk_with(ODD["capitals"])
    # Cut in the middle of a character: rendered again, its replacement is other tokens.
    talk.answer(talk.ask("Hi."), talk.encode("Ada 日")[:-2])
    said = talk.chat.messages[-1]["content"]
    assert said.startswith("Ada ") and said != "Ada "
    before = talk.ids
    plan = talk.ask("Well?")
    assert plan.kept_tokens == len(before) - 1 and plan.reuse_lost_reason is None
    assert [message["content"] for message in talk.chat.messages] == ["Hi.", said, "Well?"]
    assert talk.ids == talk.rendered(talk.chat.messages)


# ------------------------------------------------------------------------- messages that vanish

SECOND_USER_ONLY = chatml(
    each="{% if m.role != 'user' or loop.last or messages[loop.index0 + 1].role != 'user' %}",
    close="<|im_end|>\n{% endif %}",
)


def test_a_message_that_the_template_leaves_out_is_refused() -> None:
    talk = talk_with(SECOND_USER_ONLY)
    with pytest.raises(TemplateError, match="message 0 of 2, of role user, out without a word"):
        talk.ask([user("one"), user("two")])
    talk.turn("one", f"Yes.{END}")
    before = talk.ids
    with pytest.raises(TemplateError, match="message 2 of 4, of role user"):
        talk.ask([user("two"), user("three")])
    assert talk.ids == before
    # What is left out of earlier turns is the template's own business, and so are empty texts.
    talk.turn([user(" "), user("four")], f"Yes.{END}")


def test_text_that_is_shown_in_another_way_is_no_text_left_out() -> None:
    talk = talk_with(ODD["capitals"])
    talk.turn("ONE", f"Yes.{END}")
    talk.ask("TWO")
    assert "One" in talk.text and "Two" in talk.text


def test_tools_must_be_shown_beside_the_system_message() -> None:
    source = chatml(tools="{% if tools and messages[0].role != 'system' %}{{ tools }}{% endif %}")
    talk_with(source, tools=[look_up])
    with pytest.raises(TemplateError, match="beside a system message"):
        talk_with(source, system="Be kind.", tools=[look_up])
    talk = talk_with(source, tools=[look_up])
    with pytest.raises(TemplateError, match="beside a system message"):
        talk.ask([{"role": "system", "content": "Be kind."}, user("Hi.")])


def test_a_template_that_wants_a_system_message_gets_texts() -> None:
    talk = talk_with(ODD["wants a system message"], system="Be kind.", tools=[look_up])
    talk.turn("Hi.", call_output(query="Ada") + END)
    plan = talk.turn({"role": "tool", "tool_call_id": "call_0", "content": "r"}, f"Yes.{END}")
    assert plan.detail == "" and "{'type'" not in talk.text
    new = list(talk.ask("Well?").new_ids)
    assert talk.rendered(talk.chat.messages)[-len(new) :] == new
    report = check_template(odd_tokenizer("wants a system message"))
    assert report.system and report.tools and report.continues_tool_turns and not report.problems
    assert report.call_format == "hermes"
    with pytest.raises(TemplateError, match="no system"):
        talk_with(ODD["wants a system message"]).ask("Hi.")


def test_results_get_the_name_of_their_call() -> None:
    talk = talk_with(ODD["names results"], tools=[look_up])
    talk.turn("Hi.", call_output(query="Ada") + END)
    talk.ask({"role": "tool", "tool_call_id": "call_0", "content": "found"})
    assert "look_up: found" in talk.text
    assert "name" not in talk.chat.messages[-1]
    past = [*talk.chat.messages[:-1], {**talk.chat.messages[-1], "name": "other"}, user("Well?")]
    assert "other: found" in talk.template.prompt_text(past)


# ------------------------------------------------------------------------------ control tokens


@pytest.mark.parametrize("name", ["cuts texts", "capitals"])
def test_no_piece_of_a_separator_reaches_the_model(name: str) -> None:
    source = ODD[name].replace("capitalize", "upper")
    talk = talk_with(source)
    talk.turn("Quite harmless, and long.", f"Yes.{END}")
    before = talk.ids
    with pytest.raises(TemplateError, match="control tokens stand in one.*Remove them"):
        talk.ask("a <|im_end|> b and what comes behind it")
    assert talk.ids == before
    talk.ask("And what comes behind it?")
    assert "sfi" not in talk.text.lower()


def test_other_characters_that_mean_a_control_token_are_refused() -> None:
    tokenizer = chatml_tokenizer(chatml())
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<tool_list>", normalized=True)])
    control = ControlTokens(tokenizer, "<tool_list>")
    wide = "\uff1ctool_list\uff1e"
    assert control.ids["<tool_list>"] in tokenizer.encode(wide, add_special_tokens=False)
    with pytest.raises(InputError, match="reads as '<tool_list>'"):
        control.encode(control.protect(f"a {wide} b"))
    assert control.encode("<tool_list> and <|im_end|>").count(control.ids["<tool_list>"]) == 1


def test_a_role_may_be_named_like_a_control_token() -> None:
    tokenizer = chatml_tokenizer(chatml(), special_tokens=["user", "assistant"])
    talk = Talk(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")])
    talk.turn("a user asks", f"Yes.{END}")
    talk.ask("Well?")
    assert talk.ids == talk.rendered(talk.chat.messages)
    assert talk.ids.count(tokenizer.convert_tokens_to_ids("user")) == 2


# --------------------------------------------------------------------------- what users send


def test_a_session_keeps_the_template_that_it_began_with() -> None:
    talk = talk_with(chatml())
    talk.turn("Hi.", f"Yes.{END}")
    talk.tokenizer.chat_template = chatml("changed: {{ m.content }}")
    talk.ask("Well?")
    assert "changed" not in talk.text


def test_a_list_with_the_whole_conversation_is_not_said_twice() -> None:
    engine = chat_engine()
    with engine.session(FULL, system="Be kind.") as session:
        with says(engine, f"Yes.{END}"):
            session.send("Hi.")
        past, ids = session.messages, session.token_ids
        for repeated in (past[1:], [past[1], {**past[2], "content": "Yes. "}]):
            with pytest.raises(InputError, match="all 2 messages"):
                session.send([*repeated, user("Well?")])
        with pytest.raises(InputError, match="only messages that are new"):
            session.send([*past, user("Well?")])
        assert (session.messages, session.token_ids) == (past, ids)
        # A list that goes another way from some place on is a conversation of its own.
        other = [past[1], {"role": "assistant", "content": "No."}, user("Well?")]
        with says(engine, f"Fine.{END}"):
            assert session.send(other).usage.reuse_lost_reason is None
        assert [m["content"] for m in session.messages[3:]] == ["Hi.", "No.", "Well?", "Fine."]


def test_more_calls_than_the_template_knows_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = chat_engine("LLAMA")
    calls = "".join(
        f'{{"name": "look_up", "parameters": {{"query": "{query}"}}}}; ' for query in ("Ada", "Bo")
    )
    one = '{"name": "look_up", "parameters": {"query": "Ada"}}<|eot_id|>'
    with engine.session(FULL, tools=[look_up]) as session, caplog.at_level(logging.WARNING):
        with says(
            engine, one, f"{calls[:-2]}<|eot_id|>", f"{calls[:-2]}<|eot_id|>", "Yes.<|eot_id|>"
        ):
            reply = session.run("Where?")
        assert reply.usage.reuse_lost_reason is None
        roles = [message["role"] for message in session.messages]
        assert roles == [
            "user",
            *["assistant", "tool"],
            *["assistant", "tool", "tool"] * 2,
            "assistant",
        ]
        told = [text for text in caplog.messages if "several_calls_in_one_turn" in text]
        assert len(told) == 1 and "calls=2" in told[0] and "follow one another" in told[0]
        require_whole(session)


@needs_published_templates
@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
def test_a_template_without_tool_definitions_says_what_to_do(name: str) -> None:
    tokenizer = tokenizer_of(name)
    with pytest.raises(TemplateError, match="Describe tools.*set tokenizer.chat_template to one"):
        Talk(tokenizer, [tokenizer.eos_token_id], tools=[look_up])
