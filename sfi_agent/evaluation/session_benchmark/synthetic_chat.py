"""A session with a long past that was never computed: a chat over random keys and values.

Ids, messages and records are what a real conversation would have left; keys and values are random
numbers, since nothing that is measured on them depends on what they say. This is the only module
here that reaches behind the public names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.evaluation.session_benchmark.office_text import office_text
from sfi_agent.observe.trace import StepRecord

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig
    from sfi_agent.engine.history import LayerHistory
    from sfi_agent.evaluation.decode_benchmark import ModelSizes
    from sfi_agent.evaluation.session_benchmark.options import ChatLayout
    from sfi_agent.session.engine import Engine
    from sfi_agent.session.session import Session

__all__ = ["LongSession", "open_long_session"]

_FILL_CHUNK_TOKENS = 2048
_KEY_SCALE = 2.5
"""See `decode_benchmark.histories`: attention is then neither all on one token nor nothing."""
_CORPUS_TOKENS = 16384
_SHORT_PROMPT_TOKENS = 48
_TEMPLATE_TOKENS = 32
"""What a chat template may write around a message; what it does not write goes to the answer."""
_SEGMENT_TOKENS = 33
"""Every so many of the records are those of slow steps."""


@dataclass(frozen=True, slots=True)
class LongSession:
    """An open session, and the places in it that rewinds go back to.

    Attributes:
        session: Its last id is pending.
        first_turn_end: Ids before the second turn.
        last_turn_start: Ids before the last, short turn; there ends the last long answer.
        long_answer_tokens: Length of that answer.
        generated_tokens: Ids that were generated, all answers together.
    """

    session: Session
    first_turn_end: int
    last_turn_start: int
    long_answer_tokens: int
    generated_tokens: int


def open_long_session(
    engine: Engine,
    config: SessionConfig,
    layout: ChatLayout,
    sizes: ModelSizes,
    seed: int,
    on_progress: Callable[[str], None],
) -> LongSession:
    """Open a session and put a past into it.

    Args:
        engine: With a tokenizer whose ids the model's vocabulary holds, and a chat template.
        config: The policy; its `history.reserve_tokens` hold the whole past.
        layout: What the past looks like.
        sizes: Of the model.
        seed: Of texts, keys and values.
        on_progress: Told how far it is.
    """
    session = engine.session(config)
    try:
        session.mark()  # Opens it.
        on_progress("messages")
        found = _write_chat(session, layout, seed)
        _fill_histories(session, layout.ids - 1, sizes, seed, on_progress)
    except BaseException:
        session.close()
        raise
    return found


def _write_chat(session: Session, layout: ChatLayout, seed: int) -> LongSession:
    """Ids, messages and records of all turns."""
    tokenizer: Any = session.engine.tokenizer

    def ids_of(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    corpus = ids_of(office_text(_CORPUS_TOKENS, seed, lambda text: len(ids_of(text))))
    words = cycle(corpus)

    def take(tokens: int) -> list[int]:
        return list(islice(words, tokens))

    ends, answers = [0], [0]
    for number in range(layout.long_turns):
        prompt = tokenizer.decode(take(layout.turn_ids - layout.answer_ids - _TEMPLATE_TOKENS))
        answers.append(_write_turn(session, prompt, (number + 1) * layout.turn_ids, take))
        ends.append(len(session._core.ids))
    short = tokenizer.decode(take(_SHORT_PROMPT_TOKENS))
    short_answer = _write_turn(session, short, layout.ids, take)
    assert len(session._core.ids) == layout.ids, "the chat has another length than was planned"
    return LongSession(session, ends[1], ends[-1], answers[-1], sum(answers) + short_answer)


def _write_turn(session: Session, prompt: str, end: int, take: Callable[[int], list[int]]) -> int:
    """One turn: the prompt as the template writes it, and an answer that ends at `end` ids.

    Returns:
        The length of the answer.
    """
    core, chat = session._core, session._chat
    assert chat is not None and session.engine.tokenizer is not None
    plan = chat.plan(prompt)
    core.append(plan.new_ids, 0)
    chat.begin(plan)
    start = len(core.ids)
    answer = take(end - start - 1) + [int(session.engine.tokenizer.eos_token_id)]
    core.append(answer, 0)
    core.trace.extend(_records(start, answer))
    chat.append_raw((), answer)
    return len(answer)


def _records(start: int, answer: Sequence[int]) -> Iterator[StepRecord]:
    """What a slow-fast decoding would have recorded."""
    for place, token in enumerate(answer):
        since = place % _SEGMENT_TOKENS
        slow = since == 0
        yield StepRecord(
            kind="slow" if slow else "fast",
            slow_step="observe" if slow else None,
            reason="segment" if slow else "",
            memory_tokens=2308,
            segment_tokens=since + 1,
            seconds=0.01 + place * 1e-7,
            position=start + place,
            token_id=token,
            dense_passes=int(slow),
        )


def _fill_histories(
    session: Session,
    tokens: int,
    sizes: ModelSizes,
    seed: int,
    on_progress: Callable[[str], None],
) -> None:
    """Keys and values of all processed tokens; the last id stays pending."""
    state, shape = session._core._opened(), session.engine.shape
    generator = torch.Generator(shape.device).manual_seed(seed)
    for index, layer in enumerate(state.sequence.layers):
        on_progress(f"layer {index + 1} of {shape.num_layers}")
        _fill(layer.history, tokens, sizes, generator)
    state.sequence.processed_tokens = state.prompt_start = tokens


def _fill(
    history: LayerHistory, tokens: int, sizes: ModelSizes, generator: torch.Generator
) -> None:
    """One chunk of random numbers, again and again: what is measured does not read them."""
    shape = sizes.kv_heads, min(_FILL_CHUNK_TOKENS, tokens), sizes.head_size
    device = generator.device
    keys, values = (
        torch.randn(shape, generator=generator, device=device, dtype=sizes.dtype) for _ in range(2)
    )
    keys.mul_(_KEY_SCALE)
    for start in range(0, tokens, _FILL_CHUNK_TOKENS):
        chunk = min(_FILL_CHUNK_TOKENS, tokens - start)
        history.append(keys[:, :chunk], values[:, :chunk])
