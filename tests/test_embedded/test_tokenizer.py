"""Tokenizer, chat template and response template of the embedded model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sfi_agent.embedded import make_case, make_tools
from sfi_agent.embedded.lexicon import (
    CITIES,
    DEPARTMENTS,
    MONTHS,
    NUMBERS,
    PERSON_NAMES,
    PROJECT_NAMES,
)

_PREFIX = "<|im_start|>assistant\n"
_CALL = {"type": "function", "function": {"name": "check_room", "arguments": {"room": 412}}}
_OTHER = {"type": "function", "function": {"name": "find_phone", "arguments": {"badge": 417}}}
_CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "You are the office assistant."},
    {"role": "user", "content": "Is the room of Mara free?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL, _OTHER]},
    {"role": "tool", "name": "check_room", "content": "room 412 is free until 09:15"},
    {"role": "tool", "name": "find_phone", "content": "phone 12345"},
    {"role": "assistant", "content": "Mara sits in room 412 which is free until 09:15."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [_CALL]},
    {"role": "tool", "name": "check_room", "content": "room 412 is taken until 10:15"},
    {"role": "assistant", "content": " No."},
    {"role": "user", "content": "Thanks."},
]


def _render(
    tokenizer: PreTrainedTokenizerFast, chat: list[dict[str, Any]], *, tools: bool, prompt: bool
) -> str:
    offered: list[Any] | None = [*make_tools("")] if tools else None
    text = tokenizer.apply_chat_template(
        chat, tools=offered, tokenize=False, add_generation_prompt=prompt
    )
    return str(text)


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_comes_back_unchanged(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < len(tokenizer) for token in ids)


def test_names_and_values_are_one_token_after_a_space(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 2048
    for word in (*PERSON_NAMES, *PROJECT_NAMES, *CITIES, *MONTHS, *DEPARTMENTS, *NUMBERS):
        ids = tokenizer.encode(" " + word, add_special_tokens=False)
        assert len(ids) == 1, word
    names = {tokenizer.encode(" " + name)[0] for name in PERSON_NAMES}
    assert len(names) == len(PERSON_NAMES)
    assert len(tokenizer.encode(" 1412", add_special_tokens=False)) == 5
    assert len(tokenizer.encode(" 4.12", add_special_tokens=False)) == 5


@pytest.mark.parametrize("variant", ["easy", "hard"])
def test_logs_are_about_as_long_as_asked(tokenizer: PreTrainedTokenizerFast, variant: str) -> None:
    for seed in range(3):
        for wanted in (300, 4096):
            case = make_case(seed, variant=variant, log_tokens=wanted)
            length = len(tokenizer.encode(case.log, add_special_tokens=False))
            assert 0.8 * wanted < length < 1.2 * wanted


@pytest.mark.parametrize("tools", [False, True])
def test_template_is_prefix_stable(tokenizer: PreTrainedTokenizerFast, tools: bool) -> None:
    prompts = [
        _render(tokenizer, _CHAT[:end], tools=tools, prompt=True)
        for end in (2, 5, 7, 9, len(_CHAT))
    ]
    for shorter, longer in zip(prompts, prompts[1:], strict=False):
        assert longer.startswith(shorter)


def test_template_merges_results_and_writes_one_space_before_an_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = _render(tokenizer, _CHAT[:6], tools=True, prompt=False)
    assert text.count("<|im_start|>user") == 2
    assert (
        "<|im_start|>user\n<tool_response>\nroom 412 is free until 09:15\n</tool_response>\n"
        "<tool_response>\nphone 12345\n</tool_response><|im_end|>\n" in text
    )
    assert text.endswith("assistant\n Mara sits in room 412 which is free until 09:15.<|im_end|>\n")
    for tool in make_tools(""):
        assert f'"name": "{tool.__name__}"' in text
    assert text.count("<|im_start|>system") == 1
    spaced = _render(
        tokenizer, [{"role": "assistant", "content": " No."}], tools=False, prompt=False
    )
    bare = _render(tokenizer, [{"role": "assistant", "content": "No."}], tools=False, prompt=False)
    assert spaced == bare


def test_template_refuses_what_it_cannot_write(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="Unknown role"):
        _render(tokenizer, [{"role": "critic", "content": "x"}], tools=False, prompt=False)
    with pytest.raises(Exception, match="must be the first"):
        _render(tokenizer, [*_CHAT[:2], _CHAT[0]], tools=False, prompt=False)


def test_parse_response_reads_text_and_calls(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(" Mara works in finance.<|im_end|>", add_special_tokens=False)
    assert tokenizer.parse_response(ids, prefix=_PREFIX) == {
        "role": "assistant",
        "content": "Mara works in finance.",
    }
    rendered = _render(tokenizer, _CHAT[:3], tools=False, prompt=False)
    raw = rendered.rsplit(_PREFIX, 1)[1].rstrip("\n")
    parsed = tokenizer.parse_response(raw, prefix=_PREFIX)
    assert parsed["tool_calls"] == [_CALL, _OTHER]
    assert not parsed.get("content")


def test_decoding_drops_control_tokens_and_keeps_call_tags(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tokenizer.encode("<tool_call>\n{}\n</tool_call><|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>\n{}\n</tool_call>"


def test_saving_and_loading_keeps_everything(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    loaded: Any = AutoTokenizer.from_pretrained(folder)
    text = _render(tokenizer, _CHAT, tools=True, prompt=True)
    assert _render(loaded, _CHAT, tools=True, prompt=True) == text
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.response_template == tokenizer.response_template
    assert loaded.eos_token == "<|im_end|>" and loaded.pad_token == "<|endoftext|>"
