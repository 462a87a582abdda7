"""Which tokens end an assistant turn of a chat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

__all__ = ["stop_ids"]

_MARKER = "sfianswersfi"


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Ids after which a chat turn is over.

    These are the end-of-sequence ids of the generation configuration and of the tokenizer, and
    the token with which the chat template itself closes an assistant message, if that is a single
    special token (such as `<|im_end|>`, `<|eot_id|>` or `<end_of_turn>`).

    Args:
        tokenizer: With or without a chat template.
        generation_config: The model's; its `eos_token_id` may be an id, a list or None.
    """
    found = set(_as_ids(getattr(generation_config, "eos_token_id", None)))
    found.update(_as_ids(tokenizer.eos_token_id))
    close = _template_close(tokenizer)
    return frozenset(found if close is None else found | {close})


def _as_ids(value: Any) -> Iterable[int]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else (int(item) for item in value)


def _template_close(tokenizer: PreTrainedTokenizerBase) -> int | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": _MARKER}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:
        # A template is a program from outside and may raise anything. What it cannot render is
        # reported where it is asked for; here it only has nothing to add.
        return None
    assert isinstance(text, str)
    special = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    _, found, tail = text.rpartition(_MARKER)
    tail = tail.lstrip()
    matches = [content for content in special if found and tail.startswith(content)]
    return special[max(matches, key=len)] if matches else None
