"""What our attention would compute differently from a model's own, and numbers that are not finite.

Both are looked for while a step runs, because only then is known what a model hands over.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sfi_agent.errors import NumericsError, UnsupportedModelError, explain

__all__ = ["check_finite", "check_logits", "refuse_keywords", "refuse_other_views"]

_HARMLESS_KEYWORDS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)
"""Keywords models pass that change nothing here: positions are in the keys, attention is causal
(`refuse_other_views` looks at what says otherwise)."""


def refuse_keywords(keywords: dict[str, Any]) -> None:
    """Refuse keywords of an attention call that we do not know.

    Raises:
        UnsupportedModelError: One is not None and may change the result, by name.
    """
    for name, given in keywords.items():
        if given is not None and name not in _HARMLESS_KEYWORDS:
            raise UnsupportedModelError(
                explain(
                    "the model hands its attention a keyword that slow-fast attention lacks",
                    got=f"{name}={type(given).__name__}",
                    allowed="causal softmax attention with grouped heads and sliding windows",
                    remedy="use another checkpoint; docs/supported_models.md lists families",
                )
            )


def refuse_other_views(
    module: nn.Module,
    mask: Tensor | None,
    handed_window: int | None,
    window: int | None,
    keywords: dict[str, Any],
) -> None:
    """Refuse a layer that sees other tokens than those we would show it.

    Args:
        module: The attention layer.
        mask: What the model handed over; for a name without a mask function transformers makes
            none, so that one is the model's own.
        handed_window: The sliding window in tokens that the model handed over, None for none:
            several families leave it to the mask.
        window: The one that was found when the engine was made, None for full attention.
        keywords: Of the call.

    Raises:
        UnsupportedModelError: A mask of its own, another window, or attention to later tokens.
    """
    causal = keywords.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if mask is not None:
        got = f"a mask of its own, {tuple(mask.shape)}"
    elif causal is False:
        got = "attention to later tokens (is_causal=False)"
    elif handed_window is not None and handed_window != window:
        got = f"a sliding window of {handed_window} tokens where the configuration says {window}"
    else:
        return
    raise UnsupportedModelError(
        explain(
            f"attended in {type(module).__name__}",
            got=got,
            allowed="causal attention to all tokens or to the configuration's sliding window",
            remedy="use another checkpoint; docs/supported_models.md lists families",
        )
    )


def check_finite(
    step: str, layer: int, position: int, out: Tensor, inputs: dict[str, Tensor]
) -> None:
    """For debugging: the host waits for the layer.

    Args:
        step: Its kind, and `layer` and `position` say where.
        layer: Index of the attention layer.
        position: Of the step's first token.
        out: What attention gave.
        inputs: By name, what it was given of the new tokens. Looked at too, because kernels may
            give finite numbers for a query that has none.

    Raises:
        NumericsError: Something is not finite.
    """
    bad = [name for name, tensor in inputs.items() if not bool(tensor.isfinite().all())]
    if not bad and bool(out.isfinite().all()):
        return
    raise NumericsError(
        explain(
            f"attended in layer {layer} on a {step} step at position {position}",
            got=f"{' and '.join(bad)} that are not finite"
            if bad
            else "an output that is not finite, from a finite new token",
            allowed="finite numbers",
            remedy="the weights may overflow in this number type: load the model in bfloat16 or "
            "float32"
            if bad
            else "an earlier token's keys or values are damaged: rewind before it",
        ),
        layer=layer,
    )


def check_logits(logits: Tensor, position: int) -> None:
    """For debugging: the host waits for the step. Minus infinity is a way to forbid a token.

    Args:
        logits: `[batch, rows, vocabulary]`.
        position: Of the step's first token.

    Raises:
        NumericsError: A logit is NaN or infinite.
    """
    if bool((logits < float("inf")).all()):
        return
    raise NumericsError(
        explain(
            f"computed logits on a step at position {position}",
            got="numbers that are not finite, though what attention was given is",
            allowed="finite numbers, or minus infinity",
            remedy="weights behind the last attention (its output projection, the last "
            "feed-forward part, the last norm, the head) are damaged or overflow in this number "
            "type: load the model in bfloat16 or float32",
        ),
        layer=None,
    )
