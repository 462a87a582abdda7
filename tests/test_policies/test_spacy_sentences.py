"""`spacy`: the sentence starts a pipeline sees, on a running text, at bounded cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sfi_agent import ConfigError, TokenEvent
from sfi_policies import SpacySentences, SpacySentencesConfig, spacy_sentences
from tests.test_policies.script_tokenizers import (
    TOKENIZER_NAMES,
    boundary_tokens,
    encode,
    tokenizer_named,
    tokens_that_complete,
    unmark,
)
from tests.tiny_tokenizers import byte_tokenizer, chatml_tokenizer

TEXTS = {
    "plain": ("en", "The rain stopped. |The sun came out! |Did it? |Dr. Smith paid 3.14 euros."),
    "quotes": ("en", "He said it. |Then he left (by car). |We stayed."),
    "chinese": ("zh", "他来了。|我们走吧！|你是谁？|我不知道"),
    "hindi": ("hi", "नमस्ते। |आप कैसे हैं? |मैं ठीक हूँ"),
    "any language": ("xx", "One. |Two! |Three"),
}


def detector_for(tokenizer: Any, **options: Any) -> SpacySentences:
    return SpacySentences(SpacySentencesConfig(**options), tokenizer)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("tokenizer_name", TOKENIZER_NAMES)
def test_sentences_start_where_the_blank_pipeline_says(tokenizer_name: str, name: str) -> None:
    tokenizer = tokenizer_named(tokenizer_name)
    language, marked = TEXTS[name]
    text, offsets = unmark(marked)
    ids = encode(tokenizer, text)
    expected = tokens_that_complete(tokenizer, ids, offsets)
    assert boundary_tokens(detector_for(tokenizer, language=language), tokenizer, ids) == expected


def test_agrees_with_one_parse_of_the_whole_text() -> None:
    """The slow reference: the same pipeline, once, over everything."""
    import spacy

    sentences = [
        f"Sentence number {n} is about item {n * 7} and more{'!' * (n % 2) or '.'}"
        for n in range(60)
    ]
    text = " ".join(sentences)
    pipeline = spacy.blank("en")
    pipeline.add_pipe("sentencizer")
    offsets = {sentence.start_char for sentence in pipeline(text).sents} - {0}
    assert len(offsets) == 59
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, text)
    expected = tokens_that_complete(tokenizer, ids, offsets)
    assert boundary_tokens(detector_for(tokenizer), tokenizer, ids) == expected


def test_prompt_gives_context_and_no_boundary() -> None:
    tokenizer = byte_tokenizer()
    detector = detector_for(tokenizer)

    def starts(prompt: str, text: str) -> list[int]:
        prompt_ids = tuple(encode(tokenizer, prompt))
        return boundary_tokens(detector, tokenizer, encode(tokenizer, text), prompt_ids)

    assert starts("It is over.", " Then we left") == []
    assert starts("Pi is 3", ".14 and more") == []
    assert starts("So it i", "s. Then") == [3]


def test_special_tokens_end_the_window() -> None:
    tokenizer = chatml_tokenizer()
    ids = encode(tokenizer, "Done.<|im_end|>Next. Now")
    assert len(boundary_tokens(detector_for(tokenizer), tokenizer, ids)) == 1


def characters_parsed(monkeypatch: pytest.MonkeyPatch, text: str) -> tuple[int, int]:
    """How much text the pipeline was given in all, and how large the state became."""
    tokenizer = byte_tokenizer()
    detector = detector_for(tokenizer)
    lengths: list[int] = []
    parse = spacy_sentences._SharedPipeline.sentence_starts

    def counted(self: Any, part: str) -> list[int]:
        lengths.append(len(part))
        return parse(self, part)

    monkeypatch.setattr(spacy_sentences._SharedPipeline, "sentence_starts", counted)
    detector.reset([], "")
    for position, letter in enumerate(text):
        detector.after_token(TokenEvent(0, position, letter))
    return sum(lengths), len(repr(detector.snapshot()))


@pytest.mark.parametrize("text", ["It rained all the day. ", "x = a.b(c)[0]; f(y)\n", "word "])
def test_cost_and_state_do_not_grow_with_the_text(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    # Compared behind the first 1,000 characters, when the window has reached its full size.
    base, _ = characters_parsed(monkeypatch, (text * 100)[:1000])
    short, state_short = characters_parsed(monkeypatch, (text * 200)[:2000])
    long, state_long = characters_parsed(monkeypatch, (text * 300)[:3000])
    assert long - short <= 1.2 * (short - base) + 600
    assert max(state_short, state_long) < 1000


def test_unknown_language_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"language='qq'.*allowed: .*\ben\b.*\bzh\b"):
        detector_for(byte_tokenizer(), language="qq")


def test_unknown_pipeline_lists_what_is_installed() -> None:
    with pytest.raises(ConfigError, match="pipeline='no_such_pipeline'.*installed: "):
        detector_for(byte_tokenizer(), pipeline="no_such_pipeline")


def test_without_a_tokenizer_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="'spacy'.*no tokenizer"):
        detector_for(None)


def install_pipeline(folder: Path, name: str, component: str | None) -> None:
    """Put an installed pipeline package into a folder, as `pip install` would."""
    import spacy

    pipeline = spacy.blank("en")
    if component == "sentencizer":
        # Only semicolons, to tell it from the blank pipeline.
        pipeline.add_pipe("sentencizer", config={"punct_chars": [";"]})
    pipeline.meta["name"] = name.removeprefix("en_")
    package = folder / name
    package.mkdir()
    pipeline.to_disk(package / "data")
    (package / "__init__.py").write_text(
        "from pathlib import Path\n\n"
        "from spacy.util import load_model_from_path\n\n\n"
        "def load(**overrides):\n"
        "    return load_model_from_path(Path(__file__).parent / 'data', **overrides)\n"
    )
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def test_installed_pipeline_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "en_semicolons"
    install_pipeline(tmp_path, name, "sentencizer")
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = byte_tokenizer()
    try:
        ids = encode(tokenizer, "One. Two; Three")
        assert boundary_tokens(detector_for(tokenizer, pipeline=name), tokenizer, ids) == [10]
        by_path = detector_for(tokenizer, pipeline=str(tmp_path / name / "data"))
        assert boundary_tokens(by_path, tokenizer, ids) == [10]
    finally:
        sys.modules.pop(name, None)
        spacy_sentences._load.cache_clear()


def test_pipeline_without_sentences_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "en_without_sentences"
    install_pipeline(tmp_path, name, None)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(ConfigError, match="none of which sets sentence boundaries"):
            detector_for(byte_tokenizer(), pipeline=name)
    finally:
        sys.modules.pop(name, None)


def test_sessions_share_one_pipeline() -> None:
    first, second = (detector_for(byte_tokenizer()) for _ in range(2))
    assert first._pipeline is second._pipeline
    assert detector_for(byte_tokenizer(), language="xx")._pipeline is not first._pipeline
