"""`spacy`: a sentence starts, as a spaCy pipeline sees it."""

from __future__ import annotations

import pkgutil
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import Field

from sfi_agent import Boundary, ConfigError, Settings, StepEvent, TokenEvent
from sfi_policies._pieces import require_tokenizer

if TYPE_CHECKING:
    from spacy.language import Language

__all__ = ["SpacySentences", "SpacySentencesConfig"]

_WINDOW_CHARACTERS = 600  # What is parsed at most; the longest sentence that is seen whole.
_KEPT_CHARACTERS = 300  # What stays of a window that was cut, so that cuts are rare.
# Where a pipeline can find a start: the first visible character behind a line end or a mark.
# Commas, hyphens, apostrophes and slashes do not end sentences in any pipeline worth a parse.
_PLAUSIBLE = re.compile(r"(?:\n|[^\w\s,'\u2019/-])\s*\S")
# What the first chosen token may continue: a word that no mark has ended.
_LAST_WORD = re.compile(r"\S{0,60}\w$")
_BOUNDARY = Boundary("spacy: sentence start")


class SpacySentencesConfig(Settings):
    """Options of `spacy`."""

    language: str = Field(
        default="en",
        min_length=1,
        description="Language code of the blank pipeline that is used when no pipeline is named.",
        json_schema_extra={"unit": "choice"},
    )
    pipeline: str | None = Field(
        default=None,
        min_length=1,
        description="Name or path of an installed spaCy pipeline; null uses a blank pipeline with "
        "the sentencizer.",
        json_schema_extra={"unit": "name"},
    )


@dataclass(frozen=True, slots=True)
class _Window:
    """The running text since the last sentence start.

    Attributes:
        text: Its characters, at most `_WINDOW_CHARACTERS`.
        searched: How many of its first characters no longer need to be looked through.
    """

    text: str = ""
    searched: int = 0

    @classmethod
    def after(cls, text: str) -> _Window:
        """A window over this text, cut if it is too long, all of it looked through.

        The last visible character stays to be looked at: it may be the mark of the next start.
        """
        if len(text) > _WINDOW_CHARACTERS:
            text = text[-_KEPT_CHARACTERS:]
        return cls(text, max(len(text.rstrip()) - 1, 0))


class _SharedPipeline:
    """One loaded pipeline for all sessions of the process."""

    def __init__(self, language: Language) -> None:
        self._language = language
        # Memory zones are per pipeline, not per thread; sessions may run in several threads.
        self._lock = threading.Lock()

    def sentence_starts(self, text: str) -> list[int]:
        """Offsets at which sentences start, without the first one at the text's own start."""
        # The zone frees the strings of this text: without it the vocabulary grows for ever.
        with self._lock, self._language.memory_zone():
            return [sentence.start_char for sentence in self._language(text).sents][1:]


class SpacySentences:
    """Reports the token that starts a sentence according to a spaCy pipeline.

    By default a blank pipeline of `language` with the rule-based sentencizer, which needs no
    download; `pipeline` takes any installed one that sets sentence boundaries (a parser, a
    senter, a sentencizer). The pipeline judges the text written so far, once per plausible start:
    when the first visible character behind a mark or a line end has arrived. It is given the
    text since the last start it confirmed, at most 600 characters, so the cost per token does
    not grow with the length of the text, and neither does the state.

    A pipeline with a parser may judge a prefix differently from the finished sentence; what was
    reported stays reported. One loaded pipeline is shared by all sessions with the same options.

    Source: Honnibal et al., spaCy (doi 10.5281/zenodo.1212303); that the next sentence's first
    token opens the slow step is the rule of Slow-Fast Inference (arXiv 2603.12038).

    Args:
        config: Language or pipeline.
        tokenizer: A Hugging Face tokenizer: its special tokens are no text and end the window.

    Raises:
        ConfigError: There is no tokenizer and so no text, spaCy has no such language or
            pipeline, or the pipeline sets no sentence boundaries.
    """

    needs: frozenset[str] = frozenset({"text"})

    def __init__(self, config: SpacySentencesConfig, tokenizer: Any) -> None:
        require_tokenizer("spacy", tokenizer, "the running text")
        self._control_ids = frozenset(tokenizer.all_special_ids)
        self._pipeline = _load(config.language, config.pipeline)
        self._window = _Window()

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        """Start behind the prompt, of which an unfinished last word is remembered."""
        word = _LAST_WORD.search(prompt_text)
        self._window = _Window.after(word[0] if word else "")

    def after_step(self, event: StepEvent) -> Boundary | None:
        """No boundary: sentences are seen in tokens."""
        return None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        """A boundary when a sentence starts with this token, or is first seen to have started."""
        if event.token_id in self._control_ids:
            self._window = _Window()
            return None
        if not event.text:
            return None
        text = self._window.text + event.text
        starts: list[int] = []
        if _PLAUSIBLE.search(text, self._window.searched):
            starts = self._pipeline.sentence_starts(text)
        self._window = _Window.after(text[starts[-1] :] if starts else text)
        return _BOUNDARY if starts else None

    def snapshot(self) -> _Window:
        """The window; does not grow with the text."""
        return self._window

    def restore(self, state: _Window) -> None:
        """Return to such a window."""
        self._window = state


@lru_cache(maxsize=8)
def _load(language: str, pipeline: str | None) -> _SharedPipeline:
    """The pipeline of these options, loaded once per process."""
    import spacy

    if pipeline is None:
        try:
            blank = spacy.blank(language)
        except ImportError as error:
            raise ConfigError(
                f"the detector 'spacy' was built; got language={language!r} "
                f"({_first_line(error)}); allowed: {', '.join(_known_languages())}, where some "
                "need a package of their own. Choose one of them, or name an installed pipeline."
            ) from error
        blank.add_pipe("sentencizer")
        return _SharedPipeline(blank)
    try:
        loaded = spacy.load(pipeline)
    except (OSError, ImportError, ValueError) as error:
        installed = ", ".join(sorted(spacy.util.get_installed_models())) or "none is installed"
        raise ConfigError(
            f"the detector 'spacy' was built; got pipeline={pipeline!r} ({_first_line(error)}); "
            f"allowed: an installed pipeline or its folder; installed: {installed}. "
            f"Install it with `python -m spacy download`, or leave pipeline out."
        ) from error
    _require_sentences(loaded, pipeline)
    return _SharedPipeline(loaded)


def _require_sentences(loaded: Language, pipeline: str) -> None:
    """Refuse a pipeline that sets no sentence boundaries."""
    if loaded("One. Two.").has_annotation("SENT_START"):
        return
    raise ConfigError(
        f"the detector 'spacy' was built; got pipeline={pipeline!r} with the components "
        f"{loaded.pipe_names}, none of which sets sentence boundaries; allowed: a pipeline with a "
        "parser, a senter or a sentencizer. Add one of them to it, or leave pipeline out."
    )


def _known_languages() -> list[str]:
    """The language codes that this spaCy can make a blank pipeline for."""
    import spacy.lang

    return sorted(
        module.name for module in pkgutil.iter_modules(spacy.lang.__path__) if module.ispkg
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
