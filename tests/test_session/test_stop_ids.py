"""Which tokens end a chat turn."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from sfi_agent.session.templates.stop_ids import stop_ids
from tests import chat_templates
from tests.test_session.helpers import FAMILIES
from tests.tiny_tokenizers import chatml_tokenizer


def names(family: str | None, eos: str, config: GenerationConfig | None = None) -> set[str]:
    special = FAMILIES[family][0] if family else ()
    source = getattr(chat_templates, family) if family else None
    tokenizer = chatml_tokenizer(source, special_tokens=special, eos_token=eos)
    return set(tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer, config))))


@pytest.mark.parametrize(
    ("family", "close"),
    [
        ("CHATML", "<|im_end|>"),
        ("LLAMA", "<|eot_id|>"),
        ("MISTRAL", "</s>"),
        ("GEMMA", "<end_of_turn>"),
    ],
)
def test_the_templates_own_close_is_found(family: str, close: str) -> None:
    assert names(family, "<|endoftext|>") == {"<|endoftext|>", close}


def test_without_a_template_only_the_declared_ones() -> None:
    assert names(None, "<|endoftext|>") == {"<|endoftext|>"}


def test_where_the_next_role_ends_a_turn_its_token_does() -> None:
    """Behind an answer the user's, behind calls that of the results."""
    found = names("ROLE_OPENS_NEXT_TURN", "<|endoftext|>")
    assert found == {"<|endoftext|>", "<|user|>", "<|observation|>"}


CALLS_END_OTHERWISE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{{ call.function.arguments | tojson }}EACH
{%- endfor -%}
{{ '<|call|>' if message.tool_calls else '<|im_end|>' }}
{% endfor -%}
"""


def test_the_token_behind_calls_is_found_unless_it_ends_each_of_them() -> None:
    for each, ends in (("", {"<|im_end|>", "<|call|>"}), ("<|call|>", {"<|im_end|>"})):
        source = CALLS_END_OTHERWISE.replace("EACH", each)
        tokenizer = chatml_tokenizer(source, special_tokens=["<|call|>"])
        assert {*tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer)))} == ends


def test_generation_config_adds_one_or_several() -> None:
    tokenizer = chatml_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for value in (start, [start]):
        assert start in stop_ids(tokenizer, GenerationConfig(eos_token_id=value))
    assert names("CHATML", "<|im_end|>", GenerationConfig()) == {"<|im_end|>"}


def test_text_that_is_no_special_token_is_no_stop() -> None:
    tokenizer = chatml_tokenizer(chat_templates.NO_CONTROL_TOKENS)
    assert stop_ids(tokenizer) == {tokenizer.eos_token_id}
    # One token, but not a special one: the model may write it inside a text.
    source = "{% for m in messages %}{{ m.content }}</turn>{% endfor %}"
    tokenizer = chatml_tokenizer(source, markup_tokens=["</turn>"])
    assert stop_ids(tokenizer) == {tokenizer.eos_token_id}


def test_a_template_that_raises_adds_nothing() -> None:
    tokenizer = chatml_tokenizer("{{ raise_exception('no') }}")
    assert stop_ids(tokenizer) == {tokenizer.eos_token_id}
