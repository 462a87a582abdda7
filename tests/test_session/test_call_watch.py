"""Where a call opens and closes, token by token, and tokens that would open one wrongly."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sfi_agent import ConfigError, Engine, SessionConfig
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.grammar.call_forms import CallForm
from sfi_agent.session.grammar.call_watch import CallWatch
from sfi_agent.session.grammar.held_calls import HeldCalls
from tests.test_guarantees.test_verify_chat import Drafting
from tests.test_session.call_cases import call_engine, recording_tool, short_policy
from tests.test_session.conversations import encode

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
JSON_CALL = '{"name": "greet", "arguments": {"name": "x </tool_call> y"}}'
BROKEN = '{"name": greet'


def watch_of(engine: Engine, trace: Sequence[StepRecord] = ()) -> CallWatch:
    tool, _ = recording_tool("greet", SCHEMA)
    with engine.session(SessionConfig(), tools=[tool]) as session:
        assert session._chat is not None and engine.tokenizer is not None
        return CallWatch(engine.tokenizer, session._chat.output_format, trace, exact=True)


CASES: list[tuple[str, str, list[str]]] = [
    # Parts by turns outside and inside of calls. The tag that opens a call ends the part outside,
    # and the one that closes it the part inside.
    (
        "CHATML",
        "",
        ["Hi <tool> <tool_call>", f"\n{JSON_CALL}\n</tool_call>", "and <tool_call>", ""],
    ),
    ("CHATML", "", ["<tool_call>", f"{BROKEN}</tool_call>", "\n<tool_call>", "{}</tool_call>", ""]),
    ("CHATML", "", ["no </tool_call> here, and no <tool_cal> either"]),
    (
        "CHATML_THINKING",
        "",
        ["<think>\nOr <tool_call>{}</tool_call>?\n</think>\n<tool_call>", "{}</tool_call>", "."],
    ),
    (
        "CHATML_THINKING",
        "<think>\n",
        ["<tool_call> I think</think> <tool_call>", "{}</tool_call>", ""],
    ),
    ("response template", "", ["Hi \n<tool_call>", "\n{}\n</tool_call>", " and <tool_call>", "{"]),
    ("response template", "", ["<think>a<tool_call></think><tool_call>", "{}</tool_call>", "x"]),
    ("LLAMA", "", ["", '{"name": "greet", "parameters": {}}; {}']),
    ("LLAMA", "", ["Well, <|python_tag|>", '{"name": "greet", "parameters": {}}']),
    ("LLAMA", "", ["An answer with {braces}"]),
    ("MISTRAL", "", ["Hm. [TOOL_CALLS]", "[{}] and so on"]),
    ("glm", "", ["<tool_call>", "greet\n<arg_key>name</arg_key><arg_value>a</tool_call>b"]),
    ("kimi", "", ["<|tool_call_begin|>", "functions.greet:0<|tool_call_end|>", "."]),
    ("minimax", "", ["<minimax:tool_call><invoke name=", '"greet">\n</invoke>', "\n<inv"]),
    ("harmony", "<|start|>assistant", ["<|channel|>final<|message|>Hi to=you"]),
    (
        "harmony",
        "<|start|>assistant",
        ["<|channel|>commentary to=", 'functions.greet<|message|>{"name": "a"}<|call|>', ""],
    ),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_call_is_exact_from_its_opening_to_its_closing(case: int) -> None:
    """However the text is cut into tokens, and wherever it was gone back to."""
    name, prompt, parts = CASES[case]
    engine, lots = call_engine(name), random.Random(case)
    assert engine.tokenizer is not None
    edges = [sum(map(len, parts[:index])) for index in range(len(parts))]
    text = "".join(parts)
    for _ in range(4):
        cuts = sorted({0, len(text), *lots.choices(range(len(text) + 1), k=lots.randint(0, 9))})
        pieces = [text[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        ids = [token for piece in pieces for token in encode(engine, piece)]
        watch = watch_of(engine)
        watch.start(encode(engine, prompt))
        places: list[tuple[object, bool]] = []
        at = 0
        while at < len(ids):
            places[at:] = [(watch.snapshot(), watch.exact)]
            if lots.random() < 0.1:
                at = lots.randint(0, at)
                state, exact = places[at]
                watch.restore(state)
                assert watch.exact == exact
            watch.note(ids[at])
            at += 1
            written = len(engine.tokenizer.decode(ids[:at]))
            # At an edge the tag is complete: what comes next lies behind it.
            part = max(index for index, edge in enumerate(edges) if edge <= written)
            assert watch.exact == bool(part % 2), text[:written]


def test_a_decoding_goes_on_where_the_last_one_stopped() -> None:
    engine = call_engine("CHATML")
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.encode("<tool_call> is no call in a prompt")
    answer = engine.tokenizer.encode("Well <tool_call>\n{", add_special_tokens=False)
    ids = [*prompt, *answer]

    def record(position: int) -> StepRecord:
        return StepRecord("fast", None, "", 0, 0, 0.0, position, ids[position])

    trace = [record(position) for position in range(len(prompt), len(ids))]
    watch = watch_of(engine, trace)
    watch.start(ids)
    assert watch.exact
    # New ids behind an answer are a prompt: the next answer begins outside.
    watch.start([*ids, *prompt])
    assert not watch.exact
    # So it is where the generated ids are not the last ones.
    watch = watch_of(engine, trace[:-1])
    watch.start(ids)
    assert not watch.exact


# ---------------------------------------------------------------- in conversations


END = "<|im_end|>"
LOOP = (
    f'<tool_call>\n{{"name": "greet", "arguments": {{"name": "Ada Ünï 👋🏽"}}}}\n</tool_call>{END}',
    f'<tool_call>\n{{"name": "greet",\n\n"arguments": {{"nobody": 3.50}}}}</tool_call>{END}',
    f'<tool_call>{{"name": "greet" "arguments"}}</tool_call>{END}',
)


@pytest.mark.parametrize("mistakes", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("slow_step", ["observe", "rectify"])
@pytest.mark.parametrize("name", ["CHATML", "response template"])
def test_fast_steps_that_err_spoil_no_call(name: str, slow_step: Any, mistakes: float) -> None:
    """Calls come out as dense decoding writes them, when every fast step is wrong too."""
    engine = call_engine(name)
    config = short_policy(
        slow_step=slow_step,
        sampling={"temperature": 0.0, "max_new_tokens": 80},
        tools={"constrain_calls": False},
    )
    for output in LOOP:
        expected = encode(engine, output.removesuffix(END))
        tool, _ = recording_tool("greet", SCHEMA)
        with engine.session(config, tools=[tool]) as session:
            with Drafting(engine, [output], mistakes) as script:
                reply = session.send("Go.")
            written = [step.token_id for step in reply.steps]
            assert written[: len(expected)] == expected
            assert bool(script.wrong_drafts) == bool(mistakes)
            reasons = [record.reason for record in session.trace]
            assert reasons[1] == "tool_call" and "tool_call" not in reasons[2:]
            if not mistakes:
                assert reply.finish_reason == "tool_calls"
                assert "tool_call_end" in reasons


@pytest.mark.parametrize("slow_step", ["observe", "rectify"])
def test_decoded_as_the_session_they_spoil_them(slow_step: Any) -> None:
    engine = call_engine("CHATML")
    config = short_policy(
        slow_step=slow_step,
        sampling={"temperature": 0.0, "max_new_tokens": 60},
        tools={"constrain_calls": False, "decode_calls": "as_session"},
    )
    tool, received = recording_tool("greet", SCHEMA)
    with engine.session(config, tools=[tool]) as session:
        with Drafting(engine, LOOP[:1], 0.3):
            reply = session.send("Go.")
        assert not any(call.error is None for call in reply.tool_calls)
        assert {record.reason for record in session.trace} <= {"prefill", "max_segment", ""}


def test_without_tools_nobody_watches() -> None:
    with call_engine("CHATML").session() as session:
        assert session._core.make_watch is None
    tool, _ = recording_tool("greet", SCHEMA)
    changed: list[Any] = [{"mode": "dense"}, {"slow_step": "verify"}, {"tools": _AS_SESSION}]
    for changes in changed:
        config = SessionConfig(**changes)
        with call_engine("CHATML").session(config, tools=[tool]) as session:
            assert session._core.make_watch is None


_AS_SESSION = {"decode_calls": "as_session"}


# ---------------------------------------------------------------- another grammar


BODIES = (b"{a}", b"{bb}", b"[]")


class _Matcher:
    """Takes one of the bodies."""

    def __init__(self, tokens: Sequence[bytes], taken: list[bytes]) -> None:
        self._tokens = tokens
        self._taken = taken

    @property
    def steps(self) -> int:
        return len(self._taken)

    def _fits(self, text: bytes) -> bool:
        return any(body.startswith(b"".join(self._taken) + text) for body in BODIES)

    def allowed(self) -> Tensor:
        return torch.tensor([bool(text) and self._fits(text) for text in self._tokens])

    def advance(self, token_id: int) -> bool:
        return self.advance_text(self._tokens[token_id])

    def advance_text(self, text: bytes) -> bool:
        fits = self._fits(text)
        if fits and text:
            self._taken.append(text)
        return fits

    def rollback(self, steps: int) -> None:
        del self._taken[len(self._taken) - steps :]

    def fork(self) -> _Matcher:
        return _Matcher(self._tokens, list(self._taken))


class _Grammar:
    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens

    def matcher(self) -> _Matcher:
        return _Matcher(self._tokens, [])


class _Compiler:
    """Grammars of the bodies, whatever the form and the tools."""

    def __init__(self, *tokens: bytes) -> None:
        self.token_bytes = tokens

    def compile(self, form: CallForm, schemas: Mapping[str, Mapping[str, Any]]) -> _Grammar:
        return _Grammar(self.token_bytes)


def held_calls(*tokens: bytes) -> HeldCalls:
    forms = [CallForm("<call>", "", ""), CallForm("<fun=", "", "")]
    return HeldCalls(_Compiler(*tokens), forms, {}, torch.device("cpu"))


def test_tokens_that_would_open_a_call_wrongly_may_not_come() -> None:
    tokens = (
        b"<",
        b"call>",
        b"call>{",
        b"call>{b",
        b"call>x",
        b"fun={",
        b"fun=}",
        b"{a}",
        b"b}",
        b"",
    )
    held = held_calls(*tokens)
    assert held.guard("text") is None and held.guard("a > b") is None
    guard = held.guard("and <")
    assert guard is not None
    assert [text for text, may in zip(tokens, guard.tolist(), strict=True) if not may] == [
        b"call>x",
        b"fun=}",
    ]
    assert held.guard("<cal") is None  # No token goes on from there.
    begun = held.opened("and <call>{b", "call>{b")
    assert begun is not None
    allowed = held.allowed(begun)
    assert allowed is not None
    assert [text for text, may in zip(tokens, allowed.tolist(), strict=True) if may] == [b"b}"]
    assert held.opened("and <call>x", "call>x") is None


def test_a_token_with_a_whole_wrong_opening_is_refused() -> None:
    held_calls(b"<call>", b"<call>{", b"x<fun=[")
    with pytest.raises(ConfigError, match="begins a call wrongly"):
        held_calls(b"<call>", b"a <call>b")


def test_places_in_a_call_can_be_returned_to() -> None:
    tokens = (b"{", b"a", b"b", b"}", b"[", b"]")
    held = held_calls(*tokens)
    start = held.opened("<call>", "l>")
    assert start is not None

    def may(place: Any) -> set[bytes]:
        allowed = held.allowed(place)
        assert allowed is not None
        return {text for text, yes in zip(tokens, allowed.tolist(), strict=True) if yes}

    brace = held.advanced(start, 0, "{")
    assert may(brace) == {b"a", b"b"}
    assert brace is not None
    second = held.advanced(brace, 2, "b")
    assert may(second) == {b"b"}
    assert may(start) == {b"{", b"["}
    bracket = held.advanced(start, 4, "[")
    assert may(bracket) == {b"]"}
    assert held.advanced(start, 1, "a") is None
    assert may(start) == {b"{", b"["}
