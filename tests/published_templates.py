"""The chat templates of published checkpoints, as the package trl collects them.

They are not part of this project: the files are read from an installed trl, which is found without
importing it. Each gets a small tokenizer with the control tokens of its family.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_tokenizers import chatml_tokenizer

__all__ = [
    "FAMILIES",
    "PUBLISHED",
    "TRL",
    "Family",
    "family_of",
    "needs_published_templates",
    "source_of",
    "tokenizer_of",
]

TRL = "trl==1.16.0"


def _folder() -> Path | None:
    found = importlib.util.find_spec("trl")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return Path(places[0]) / "chat_templates" if places else None


FOLDER = _folder()

needs_published_templates = pytest.mark.skipif(
    FOLDER is None,
    reason=f"the published chat templates are not installed: pip install --no-deps {TRL}",
)


@dataclass(frozen=True)
class Family:
    """Control tokens of a family's tokenizer, beyond those of ChatML.

    Attributes:
        special: Special tokens.
        markup: Added tokens that are not special.
        eos: End of sequence.
        bos: Start of sequence.
        stops: What the generation configuration of its checkpoints ends a turn on besides `eos`.
    """

    special: tuple[str, ...] = ()
    markup: tuple[str, ...] = ()
    eos: str = "<|im_end|>"
    bos: str | None = None
    stops: tuple[str, ...] = ()


_GEMMA_4 = Family(
    special=(
        *("<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"),
        *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
        *("<|tool_response>", "<tool_response|>", '<|"|>'),
        *("<|image|>", "<|audio|>", "<|video|>"),
    ),
    eos="<eos>",
    bos="<bos>",
    stops=("<turn|>", "<|tool_response>"),
)

FAMILIES: dict[str, Family] = {
    "cohere": Family(
        special=(
            *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
            *("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        ),
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    "deepseek": Family(
        special=(
            *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
            *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
            *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
            *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        ),
        eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
    ),
    "diffusion_gemma": _GEMMA_4,
    "gemma": Family(
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        eos="<eos>",
        bos="<bos>",
        stops=("<end_of_turn>",),
    ),
    "gemma4": _GEMMA_4,
    "glm4moe": Family(
        special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        markup=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        eos="<|endoftext|>",
        stops=("<|user|>", "<|observation|>"),
    ),
    "gptoss": Family(
        special=(
            *("<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
            *("<|constrain|>", "<|return|>", "<|call|>"),
        ),
        eos="<|return|>",
        stops=("<|call|>", "<|endoftext|>"),
    ),
    "idefics3": Family(
        special=("<|begin_of_text|>", "<end_of_utterance>", "<image>"),
        eos="<end_of_utterance>",
        bos="<|begin_of_text|>",
    ),
    "lfm2": Family(
        special=(
            *("<|startoftext|>", "<|tool_list_start|>", "<|tool_list_end|>"),
            *("<|tool_call_start|>", "<|tool_call_end|>"),
            *("<|tool_response_start|>", "<|tool_response_end|>"),
        ),
        bos="<|startoftext|>",
    ),
    "llama3": Family(
        special=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
            *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
        ),
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        stops=("<|eom_id|>", "<|end_of_text|>"),
    ),
    "llava_next": Family(special=("<s>", "</s>", "<image>"), eos="</s>", bos="<s>"),
    "muse_glimmer": Family(
        special=(
            *("<|begin_of_text|>", "<|start|>", "<|message|>", "<|eom|>", "<|eot|>"),
            *("<|patch|>", "<|video|>"),
        ),
        eos="<|eot|>",
        bos="<|begin_of_text|>",
    ),
    "nemotron": Family(),
    "phi3": Family(
        special=("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        bos="<s>",
        stops=("<|end|>",),
    ),
    "qwen": Family(
        special=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        stops=("<|endoftext|>",),
    ),
    "smolvlm": Family(special=("<end_of_utterance>", "<image>"), eos="<end_of_utterance>"),
}

PUBLISHED: dict[str, str] = {
    "cohere": "90c33aee14aa2a22",
    "cohere2": "2147c474f41b522b",
    "deepseek_r1_distill": "56a1447ad31926fd",
    "deepseekv3": "563b1ce7d61d50a9",
    "diffusion_gemma": "9aeb7eac68ad87bb",
    "gemma": "ecd6ae513fe103f0",
    "gemma3": "7de1c58e208eda46",
    "gemma4": "33204f1acb5bd000",
    "gemma4_v2": "55572b8d3c834204",
    "gemma4_v3": "781d10940fbc44be",
    "gemma4_v4": "2f1b4d75d067bae3",
    "gemma4_v5": "0a2c8073c878ab1d",
    "glm4moe": "44f815868bf02fa4",
    "gptoss": "a4c9919cbbd4acdd",
    "idefics3": "0d7e56ca41705b79",
    "lfm2": "cef187400d62a595",
    "lfm2_2_5": "6d65c8804847ad74",
    "lfm2_2_5_v2": "c5b67247c9f736f6",
    "lfm2_2_5_vl": "86f4770449a4797c",
    "lfm2_v2": "5504d163d879bfb6",
    "llama3": "ba03a121d097859c",
    "llama3_1": "e10ca381b1ccc5cf",
    "llama3_2": "5816fce10444e03c",
    "llava_next": "2c17243a977fd064",
    "muse_glimmer": "cfc67e5f349f3769",
    "nemotron_3_5_lightning": "58933db77d3099b4",
    "nemotron_3_nano": "ab7813c3abdd9cb6",
    "nemotron_3_super": "575fb74f54ed264d",
    "nemotron_3_ultra": "82753bef5cedc493",
    "phi3": "dcaee66df77bfbb7",
    "phi3_5": "78d976a442bcde2f",
    "qwen2_5": "cd8e9439f0570856",
    "qwen2_5_vl": "a0bc6f6fc7a29a80",
    "qwen3": "a55ee1b1660128b7",
    "qwen3_5_nothink": "273d8e0e683b8850",
    "qwen3_5_think": "a4aee8afcf2e0711",
    "qwen3_6": "e84f32a23fdda276",
    "qwen3_8": "c3cf9e34abf4f9e3",
    "qwen3_instruct_2507": "64f85b198065d0fb",
    "qwen3_vl": "3636d0f0bd6bef02",
    "smolvlm": "830005085ddd94ce",
}
"""Beginning of the SHA-256 of each file that the pinned results were made with."""


def family_of(name: str) -> Family:
    """The tokens of a template's family."""
    return FAMILIES[max((key for key in FAMILIES if name.startswith(key)), key=len)]


def source_of(name: str) -> str:
    """The template's source.

    Raises:
        AssertionError: The file is not the one that the results were pinned for.
    """
    assert FOLDER is not None
    data = (FOLDER / f"{name}.jinja").read_bytes()
    digest = sha256(data).hexdigest()
    assert digest.startswith(PUBLISHED[name]), (
        f"{name}.jinja is another file than in {TRL}: look at its results again and pin {digest}"
    )
    return data.decode()


@lru_cache
def tokenizer_of(name: str) -> Any:
    """A small tokenizer with a published template. Shared: leave it as it is."""
    family = family_of(name)
    return chatml_tokenizer(
        source_of(name),
        special_tokens=family.special,
        markup_tokens=family.markup,
        eos_token=family.eos,
        bos_token=family.bos,
    )
