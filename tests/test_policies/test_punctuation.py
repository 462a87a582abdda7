"""`punctuation`: where sentences start, for every script and every way to cut a text in tokens."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import ConfigError, TokenEvent
from sfi_policies import Punctuation, PunctuationConfig
from sfi_policies._pieces import vocabulary_pieces
from sfi_policies._sentences import SentenceScanner
from tests.test_policies.script_tokenizers import (
    TOKENIZER_NAMES,
    boundary_tokens,
    encode,
    tokenizer_named,
    tokens_that_complete,
    unmark,
)
from tests.tiny_tokenizers import byte_tokenizer, chatml_tokenizer

# `|` stands before every character that starts a sentence (the first one is no boundary).
SENTENCES = {
    "plain": "The rain stopped. |The sun came out! |Did it last? |No.",
    "lines": "It rained.\n|Then it stopped.\n\n|The end.\r\n|Fin.",
    "line end without a mark": "A heading\nand text",
    "lower case on a new line": "It rained.\n|then it stopped.",
    "decimals": "Pi is 3.14 and 1,000.5 is more, .5 is less. |At 10.30 it ends.",
    "versions and addresses": "Use v1.2.3 on 192.168.1.1 now. |Then stop.",
    "links and files": "Open config.yaml at https://example.com/a.html?b=c!d, or foo.bar(). |Go.",
    "name at the end": "See example.com. |Then read config.yaml. |Now go.",
    "number at the end": "It was 1999. |Then came 42. |12 people left.",
    "titles": "Dr. Smith met Mr. and Mrs. Jones in St. Louis. |They talked.",
    "latin": "Take fruit, e.g. Apples, i.e. Red ones, cf. Smith vs. Jones. |Then eat.",
    "initials": "J. R. R. Tolkien and George W. Bush met in the U.S. Army. |Then they left.",
    "pronoun": "You and I. |Then they.",
    "may end": "Apples, pears, etc. |Then more at 5 p.m. |Then home, etc. and so on.",
    "before a number": "See fig. 2, No. 5 and Jan. 3. |He said no. |Then he left.",
    "abbreviation and line": "He met Dr.\nSmith etc.\n|Then Dr.\n\n|New part.",
    "german": "Das ist z.B. Eis, d.h. kalt. |„Gut.“ |Er ging bzw. Sie.",
    "russian": "Он пришёл в 5 ч. вечера и т.д. |Потом ушёл. |«Стой!» — сказал он. |Да.",
    "ellipsis": "Well... maybe... |Yes. |So… no… |But wait...what. . . |Then.",
    "marks in a row": "What?! |Really!!! |No?.. |Yes.",
    "quotes": 'He said: "Go." |Then “Stop.” |Then ‘Now.’ |"Good," she said. |End.',
    "quote goes on": '"Really?" he asked. |"Yes!" she said.',
    "brackets": "It works (see below.) |Then it stops. |(Or not.) |[Maybe.] |Done.",
    "brackets of code": "Call f(x.y) and a.b[0].c now. |Then stop.",
    "citations": "It works.[1] |Then it stops.[2][3] |More.¹ |End.",
    "markdown": "**Bold.** |Then `a.b` and *it.* |_So._ |**Next.**",
    "tags": "<b>Go.</b> |Then.<br>|Now.</p>\n<p>|End.</p>",
    "list numbers": "1. First do this. |2. Then that.\n|3. Stop.\n\n|- 4. Or not.\n|a. So\niv. Too",
    "after a colon": "Steps: 1. Go. |2. Stop.",
    "operators": "If a != b or c?.d then e!. |Then 5!=120 and x?y:z.",
    "image": "Look ![here](a.png) now. |Then go.",
    "commas carry on": "Stop! - he said. |Go?, he asked. |End.",
    "no space in chinese": "他来了。|我们走吧！|你是谁？|我不知道",
    "chinese quotes": "「好。」|他走了。|“好。”|他说：“走！”|好。|（他走了。）|好",
    "chinese with ascii": "价格是3.5元.|你好吗?|我很好.|再见",
    "japanese": "今日は雨です。|明日は晴れです．|はい｡|いいえ！？|そうです。",
    "korean": "안녕하세요. |저는 학생입니다. |음... 그래요. |네.",
    "hindi": "नमस्ते। |आप कैसे हैं? |मैं ठीक हूँ॥ |धन्यवाद",
    "arabic": "هل أنت هنا؟ |نعم. |أنا هنا. |لا",
    "urdu": "وہ آیا۔ |وہ گیا۔ |ختم",
    "hebrew": "הוא בא. |היא הלכה? |כן.",
    "armenian": "Այո։ |Ոչ։ |Լավ",
    "ethiopic": "አዎ። |አይ። |እሺ",
    "myanmar": "ဟုတ်ကဲ့။ |မဟုတ်ဘူး။ |ကောင်းပြီ",
    "khmer": "បាទ។ |ទេ។ |ល្អ",
    "tibetan": "ཡིན། |མིན། |རེད",
    "greek": "Τι είναι αυτό\u037e |Δεν ξέρω. |Ναι.",
    "georgian": "დიახ. |არა. |კარგი",
    "spanish": "¡Hola! |¿Qué tal? |Bien. |¿Y tú?",
    "emoji": "Done!🎉 |Next.",
    "emoji after a space": "Done. |🎉 Next.",
    "invisible characters": "One.\u200f |Two.\u200b |Three.",
}


def detector_for(tokenizer: Any) -> Punctuation:
    return Punctuation(PunctuationConfig(), tokenizer)


def starts_of(text: str) -> set[int]:
    """What the scanner says about a text that is not cut at all."""
    scanner = SentenceScanner()
    return {index for index, letter in enumerate(text) if scanner.feed_character(letter)}


@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("tokenizer_name", TOKENIZER_NAMES)
def test_sentences_start_where_expected(tokenizer_name: str, name: str) -> None:
    tokenizer = tokenizer_named(tokenizer_name)
    text, offsets = unmark(SENTENCES[name])
    ids = encode(tokenizer, text)
    expected = tokens_that_complete(tokenizer, ids, offsets)
    assert boundary_tokens(detector_for(tokenizer), tokenizer, ids) == expected


def test_granularities_differ() -> None:
    """The table above says little unless tokens range from parts of characters to sentences."""
    text, _ = unmark(SENTENCES["chinese quotes"])
    counts = {name: len(encode(tokenizer_named(name), text)) for name in TOKENIZER_NAMES}
    assert counts["one byte per token"] == len(text.encode())
    assert counts["byte-level, many scripts"] < len(text.encode()) // 2
    spanning = tokenizer_named("byte-level, across sentences")
    ids = encode(spanning, "The rain stopped.\n\nThe sun came out.")
    pieces = [spanning.decode([token_id]) for token_id in ids]
    assert any(".\n\nT" in piece for piece in pieces), pieces


@pytest.mark.parametrize("tokenizer_name", TOKENIZER_NAMES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    text=st.lists(
        st.sampled_from(
            "a A b. B.. ... … ? ! 1 2. , : ; - — \n \n\n ' \" ” “ ( ) [ ] < > 。 ！ "
            "他 「 」 । ई ؟ ن Dr. e.g. etc. No. 🎉 é **".split(" ")
            + [" ", " ", "\n", " The"]
        ),
        max_size=24,
    ).map("".join)
)
def test_cutting_into_tokens_changes_nothing(tokenizer_name: str, text: str) -> None:
    tokenizer = tokenizer_named(tokenizer_name)
    text = "x" + text  # Some decoders drop a space at the start.
    ids = encode(tokenizer, text)
    expected = tokens_that_complete(tokenizer, ids, starts_of(text))
    assert boundary_tokens(detector_for(tokenizer), tokenizer, ids) == expected


def test_mark_split_over_three_tokens_counts_once_its_follower_is_complete() -> None:
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, "好。好")
    assert len(ids) == 9
    assert boundary_tokens(detector_for(tokenizer), tokenizer, ids) == [8]


def test_text_of_events_is_not_needed() -> None:
    tokenizer = chatml_tokenizer()
    detector = detector_for(tokenizer)
    assert detector.needs == frozenset()
    ids = encode(tokenizer, "Go. Now")
    detector.reset([], "")
    answers = [detector.after_token(TokenEvent(token_id, n)) for n, token_id in enumerate(ids)]
    assert [answer is not None for answer in answers].count(True) == 1


def test_prompt_gives_context_and_no_boundary() -> None:
    tokenizer = byte_tokenizer()
    detector = detector_for(tokenizer)

    def starts(prompt: str, text: str) -> list[int]:
        prompt_ids = tuple(encode(tokenizer, prompt))
        return boundary_tokens(detector, tokenizer, encode(tokenizer, text), prompt_ids)

    assert starts("It is over.", " Then we left.") == []
    assert (
        starts(
            "Pi is 3",
            ".14 and Dr",
        )
        == []
    )
    assert starts("He met D", "r. Smith") == []
    assert starts("He met Jo", "e. Smith") == [3]
    assert starts("word " * 500 + "fi", "n. Then") == [3]


def test_special_tokens_are_no_text_but_end_a_line() -> None:
    tokenizer = chatml_tokenizer()
    detector = detector_for(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    before, after = encode(tokenizer, "Done."), encode(tokenizer, "next")
    assert boundary_tokens(detector, tokenizer, [*before, end]) == []
    assert boundary_tokens(detector, tokenizer, [*before, end, *after]) == [len(before) + 1]
    # An incomplete character does not survive a special token.
    broken = encode(byte_tokenizer(), "。")[:2]
    assert boundary_tokens(detector, tokenizer, [*broken, end, *before]) == []


def test_ids_without_a_token_are_no_text() -> None:
    tokenizer = chatml_tokenizer()
    beyond = len(tokenizer) + 50
    ids = [*encode(tokenizer, "Go."), beyond, *encode(tokenizer, " Now")]
    assert len(boundary_tokens(detector_for(tokenizer), tokenizer_named_twin(), ids)) == 1


def tokenizer_named_twin() -> Any:
    """A tokenizer for the text stream that knows every id of the test above."""
    twin = chatml_tokenizer()
    twin.add_tokens([f"extra{number}" for number in range(100)])
    return twin


def test_state_does_not_grow() -> None:
    tokenizer = byte_tokenizer()
    detector = detector_for(tokenizer)
    sizes = []
    for length in (100, 5000):
        boundary_tokens_of = encode(tokenizer, "x" * length + "!" * length)
        detector.reset([], "")
        for position, token_id in enumerate(boundary_tokens_of):
            detector.after_token(TokenEvent(token_id, position))
        sizes.append(len(repr(detector.snapshot())))
    assert sizes[0] == sizes[1]


def test_vocabulary_table_is_shared_and_follows_the_tokenizer() -> None:
    tokenizer = chatml_tokenizer()
    table = vocabulary_pieces(tokenizer)
    assert vocabulary_pieces(tokenizer) is table
    assert vocabulary_pieces(chatml_tokenizer()) is not table
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    renewed = vocabulary_pieces(tokenizer)
    assert renewed is not table
    assert renewed.piece(tokenizer.convert_tokens_to_ids("<|new|>")) is None
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None, "the table keeps its tokenizer alive"


@pytest.mark.parametrize("tokenizer_name", TOKENIZER_NAMES)
def test_pieces_joined_are_the_text(tokenizer_name: str) -> None:
    tokenizer = tokenizer_named(tokenizer_name)
    table = vocabulary_pieces(tokenizer)
    for marked in SENTENCES.values():
        text = unmark(marked)[0]
        pieces = [table.piece(token_id) or b"" for token_id in encode(tokenizer, text)]
        assert b"".join(pieces).decode().lstrip(" ") == text.lstrip(" ")


def test_other_decoders_are_read_by_decoding() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "##b": 1, "go": 2, ".": 3, "Now": 4}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    table = vocabulary_pieces(tokenizer)
    assert [table.piece(token_id) for token_id in range(5)] == [b" a", b"b", b" go", b".", b" Now"]


@pytest.mark.parametrize("tokenizer", [None, object()], ids=["none", "not a tokenizer"])
def test_without_a_fast_tokenizer_it_is_refused(tokenizer: object) -> None:
    with pytest.raises(ConfigError, match="'punctuation'.*fast tokenizer"):
        detector_for(tokenizer)
