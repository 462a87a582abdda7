"""Windows of generated office logs: a long log, a question about it, and the right answer.

Any tokenizer serves. With a chat template log and question are one user message behind the system
text; without, they are plain text. The dense model's own answer is then the answer of a real turn.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from sfi_agent.embedded import DEFAULT_SYSTEM, Case, make_case
from sfi_agent.embedded.world import VARIANTS
from sfi_agent.errors import TemplateError, explain
from sfi_agent.evaluation.fidelity.windows import Window, WindowSizes, tokenizer_of
from sfi_agent.session.templates.stop_ids import stop_ids

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine

__all__ = ["log_windows"]

_FIRST_SEED = 400_000


def log_windows(engine: Engine, sizes: WindowSizes, *, seed: int = 0) -> list[Window]:
    """Logs of about `prompt_tokens` tokens with a report question; easy and hard ones in turn.

    The text behind the prompt is the right answer up to the token that ends the turn, cut to
    `continuation_tokens`; it is often shorter.

    Args:
        engine: Its tokenizer is used.
        sizes: How many windows of what size.
        seed: Which logs.

    Raises:
        InputError: No log of this size can be made, or the engine has no tokenizer.
        TemplateError: The chat template cannot render a question.
    """
    tokenizer: Any = tokenizer_of(engine)

    @cache
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    stops = stop_ids(tokenizer, getattr(engine.model, "generation_config", None))
    windows = []
    for index in range(sizes.samples):
        case = make_case(
            _FIRST_SEED + seed * 1000 + index,
            kind="report",
            variant=VARIANTS[index % len(VARIANTS)],
            log_tokens=sizes.prompt_tokens,
            count=count,
        )
        windows.append(_window(tokenizer, case, stops, sizes.continuation_tokens))
    return windows


def _window(tokenizer: Any, case: Case, stops: frozenset[int], continuation_tokens: int) -> Window:
    prompt_ids, answer_ids = (
        tokenizer.encode(text, add_special_tokens=False) for text in _rendered(tokenizer, case)
    )
    return Window(
        tuple(prompt_ids),
        tuple(_until_stop(answer_ids, stops)[:continuation_tokens]),
        f"report over log {case.seed}, {case.variant}",
    )


def _until_stop(ids: list[int], stops: frozenset[int]) -> list[int]:
    """The ids up to the first stop id, which is the last of them."""
    ends = [index for index, item in enumerate(ids, start=1) if item in stops]
    return ids[: ends[0]] if ends else ids


def _rendered(tokenizer: Any, case: Case) -> tuple[str, str]:
    """Prompt and answer as text.

    Raises:
        TemplateError: The chat template cannot render a question.
    """
    if not getattr(tokenizer, "chat_template", None):
        return f"{case.prompt}\n\nAnswer:", f" {case.expected}"
    system = {"role": "system", "content": DEFAULT_SYSTEM}
    try:
        return _answered(tokenizer, [system, {"role": "user", "content": case.prompt}], case)
    except Exception:
        # Templates are programs from outside: some refuse system messages, each in its own way.
        user = {"role": "user", "content": f"{DEFAULT_SYSTEM}\n\n{case.prompt}"}
    try:
        return _answered(tokenizer, [user], case)
    except Exception as error:
        raise TemplateError(
            explain(
                "rendered a question about a log with the checkpoint's chat template",
                got=f"{type(error).__name__}: {error}",
                allowed="a template that takes a user message and an answer",
                remedy="use another source of text",
            )
        ) from error


def _answered(tokenizer: Any, messages: list[dict[str, str]], case: Case) -> tuple[str, str]:
    prompt: str = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    answered = [*messages, {"role": "assistant", "content": case.expected}]
    full: str = tokenizer.apply_chat_template(answered, tokenize=False)
    # Templates that rewrite what came before cannot say how the answer is joined to the prompt.
    return prompt, full[len(prompt) :] if full.startswith(prompt) else case.expected
