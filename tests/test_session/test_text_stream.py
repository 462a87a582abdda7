"""Pieces of text, joined, are the text; the state can be taken and put back."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.session.output.text_stream import TextStream
from tests.tiny_tokenizers import byte_tokenizer, chatml_tokenizer, metaspace_tokenizer

TOKENIZERS: dict[str, Any] = {
    "chatml": chatml_tokenizer(),
    "byte": byte_tokenizer(),
    "metaspace": metaspace_tokenizer(),
}
SMALLEST = min(len(tokenizer) for tokenizer in TOKENIZERS.values())
NAMES = st.sampled_from(sorted(TOKENIZERS))
IDS = st.lists(st.integers(0, SMALLEST - 1), max_size=30)


def read(name: str, ids: list[int], skip: bool = False) -> str:
    stream = TextStream(TOKENIZERS[name], skip_special_tokens=skip)
    return "".join(stream.push(token_id) for token_id in ids) + stream.finish()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(name=st.sampled_from(["chatml", "byte"]), ids=IDS, skip=st.booleans())
def test_random_ids_of_byte_level_tokenizers(name: str, ids: list[int], skip: bool) -> None:
    assert read(name, ids, skip) == TOKENIZERS[name].decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    parts=st.lists(
        st.one_of(
            st.integers(259, len(TOKENIZERS["metaspace"]) - 1).map(lambda index: [index]),
            st.integers(0, 2).map(lambda index: [index]),
            st.characters(codec="utf-8", exclude_characters="\ufffd").map(
                lambda character: [3 + byte for byte in character.encode()]
            ),
        ),
        max_size=20,
    ),
    skip=st.booleans(),
)
def test_random_ids_with_byte_fallback(parts: list[list[int]], skip: bool) -> None:
    ids = [index for part in parts for index in part]
    whole = TOKENIZERS["metaspace"].decode(ids, skip_special_tokens=skip)
    assert read("metaspace", ids, skip) == whole


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 300), max_size=30))
def test_broken_bytes_lose_no_complete_character(ids: list[int]) -> None:
    # decode() spoils the good characters of a broken run; everything else must agree.
    text, whole = read("metaspace", ids), TOKENIZERS["metaspace"].decode(ids)
    if "\ufffd" not in whole:
        assert text == whole
    keep = [index for index in ids if not 3 <= index < 259]
    assert read("metaspace", keep) == TOKENIZERS["metaspace"].decode(keep)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(name=NAMES, text=st.text(st.characters(codec="utf-8"), max_size=20))
def test_text_comes_back_and_never_early(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream, so_far = TextStream(tokenizer), ""
    whole = tokenizer.decode(ids)
    for token_id in ids:
        so_far += stream.push(token_id)
        assert whole.startswith(so_far)
    assert so_far + stream.finish() == whole


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in tokenizer.encode("é😀!")]
    assert pieces == ["", "é", "", "", "", "😀", "!"]
    fallback = TextStream(TOKENIZERS["metaspace"])
    assert [fallback.push(3 + byte) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]


def test_spaces_before_words_survive_where_the_decoder_drops_the_first() -> None:
    tokenizer = TOKENIZERS["metaspace"]
    ids = tokenizer.encode("hello hello hello", add_special_tokens=False)
    stream = TextStream(tokenizer)
    assert "".join(stream.push(index) for index in ids) == "hello hello hello"
    # A byte token for a space is dropped at the start as well, and only there.
    bytes_first = [3 + 0x20, 3 + 0x20, *ids]
    assert read("metaspace", bytes_first) == tokenizer.decode(bytes_first) == " " + " hello" * 3
    skipping = TextStream(tokenizer, skip_special_tokens=True)
    with_start = [tokenizer.bos_token_id, *ids[:1], tokenizer.eos_token_id, *ids[1:]]
    assert "".join(skipping.push(index) for index in with_start) == "hello hello hello"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(name=NAMES, ids=IDS, other=IDS, tail=IDS)
def test_restoring_is_never_having_gone_there(
    name: str, ids: list[int], other: list[int], tail: list[int]
) -> None:
    stream, straight = TextStream(TOKENIZERS[name]), TextStream(TOKENIZERS[name])
    for token_id in ids:
        stream.push(token_id)
        straight.push(token_id)
    state = stream.snapshot()
    for _ in range(2):
        for token_id in other:
            stream.push(token_id)
        stream.restore(state)
    assert [stream.push(token_id) for token_id in tail] == [straight.push(item) for item in tail]
    assert stream.finish() == straight.finish()


@pytest.mark.parametrize("name", ["chatml", "byte"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_long_prompt_equals_token_by_token(name: str, skip: bool) -> None:
    tokenizer, source = TOKENIZERS[name], random.Random(5)
    for length in (129, 200, 300):
        ids = [source.randrange(len(tokenizer)) for _ in range(length)]
        ids[-2:] = tokenizer.encode("😀", add_special_tokens=False)[:2]
        fast = TextStream(tokenizer, skip_special_tokens=skip)
        slow = TextStream(tokenizer, skip_special_tokens=skip)
        assert fast.push_all(ids) == "".join(slow.push(token_id) for token_id in ids)
        tail = tokenizer.encode("é and more", add_special_tokens=False)
        assert fast.push_all(tail) == slow.push_all(tail)


def test_finishing_gives_what_was_held_back_once() -> None:
    tokenizer = TOKENIZERS["byte"]
    half = tokenizer.encode("a😀")[:3]
    stream = TextStream(tokenizer)
    assert stream.push_all(half) == "a"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    fallback = TextStream(TOKENIZERS["metaspace"])
    assert fallback.push(3 + 0xF0) == ""
    assert fallback.finish() == "\ufffd"


@pytest.mark.parametrize("repeated", ["ÿ", "a", "😀"])
def test_the_cost_per_token_does_not_grow(repeated: str) -> None:
    tokenizer = TOKENIZERS["byte"]
    ids = tokenizer.encode(repeated)[:3] * 4000
    stream = TextStream(tokenizer)
    longest = 0
    for token_id in ids:
        stream.push(token_id)
        longest = max(longest, len(stream.snapshot().window) + len(stream.snapshot().run))
    assert longest <= 24
    started = time.perf_counter()
    stream.push(ids[0])
    assert time.perf_counter() - started < 0.05
