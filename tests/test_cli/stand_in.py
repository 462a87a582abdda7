"""An engine that plays the embedded model: random weights, and answers that are given to it.

Keys and values are real. What is said is fixed by position in the sequence: the model has
memorised the token ids of whole conversations, as the chat template writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from sfi_agent import Engine
from sfi_agent.cli.demo_play import long_enough_conversation
from sfi_agent.embedded import DEFAULT_SYSTEM, Conversation
from sfi_agent.embedded.network import build_network
from sfi_agent.embedded.tokenizer_build import build_tokenizer

__all__ = ["conversation_of", "memorised", "stand_in_engine", "tokenizer"]

DOUBTFUL_EVERY = 11
"""Every so many positions the distribution is flat enough for an entropy retry."""


@lru_cache
def tokenizer() -> Any:
    """The tokenizer of the embedded model."""
    return build_tokenizer()


@lru_cache
def stand_in_engine() -> Engine:
    """A network of the embedded architecture, smaller and untrained."""
    network = build_network(
        len(tokenizer()),
        0,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    network.eval()
    return Engine(network, tokenizer())


def conversation_of(seed: int, log_tokens: int) -> Conversation:
    """The conversation that the demo plays with this seed and length."""
    count = len
    conversation, _ = long_enough_conversation(
        seed, log_tokens, lambda text: count(tokenizer().encode(text, add_special_tokens=False))
    )
    return conversation


@contextmanager
def memorised(
    engine: Engine, conversation: Conversation, answers: Mapping[int, str] | None = None
) -> Iterator[list[int]]:
    """Let the engine's model say the right thing at every position; gives the token ids.

    Args:
        engine: From `stand_in_engine`.
        conversation: Its questions, calls and answers are memorised.
        answers: Other answers by number of the question (0 is the first after the opening).
    """
    messages = _messages(conversation, answers or {})
    text = tokenizer().apply_chat_template(messages, tools=conversation.tools, tokenize=False)
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False)

    def overwrite(module: Any, args: Any, kwargs: Any, result: Any) -> Any:
        last = int(kwargs["position_ids"][0, -1])
        logits = torch.full_like(result.logits, -30.0)
        for back in range(logits.shape[1]):
            position = last - back
            if position + 1 < len(ids):
                sure = position % DOUBTFUL_EVERY != 0
                logits[0, -1 - back, ids[position + 1]] = 30.0 if sure else -22.0
        result.logits = logits
        return result

    handle = engine.model.register_forward_hook(overwrite, with_kwargs=True)
    try:
        yield ids
    finally:
        handle.remove()


def _messages(conversation: Conversation, answers: Mapping[int, str]) -> list[dict[str, Any]]:
    def user(text: str) -> dict[str, Any]:
        return {"role": "user", "content": text}

    def calls(*pairs: tuple[str, Mapping[str, Any], str]) -> list[dict[str, Any]]:
        made = [{"function": {"name": name, "arguments": given}} for name, given, _ in pairs]
        results = [{"role": "tool", "content": result} for _, _, result in pairs]
        return [{"role": "assistant", "content": "", "tool_calls": made}, *results]

    def said(text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text}

    messages = [{"role": "system", "content": DEFAULT_SYSTEM}, user(conversation.opening)]
    messages += calls(("open_log", {"day": conversation.day}, conversation.log))
    messages.append(said(f"The log of {conversation.day} is open."))
    for number, case in enumerate(conversation.turns):
        messages.append(user(case.question))
        if case.calls:
            messages += calls(*((use.name, use.arguments, use.result) for use in case.calls))
        messages.append(said(answers.get(number, case.expected)))
    return messages
