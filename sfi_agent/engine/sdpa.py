"""Dense attention over pieces of a history, built on torch's own kernels (rows that see all of a
long run of bfloat16 tokens on a CPU: on `cpu_rows`).

Shapes have no batch axis: queries `[query_heads, rows, dim]`, keys and values
`[kv_heads, tokens, dim]`. Grouped heads are folded: the query heads of one KV head become extra
rows, so that no key is repeated. Several pieces are attended one by one and merged by their
log-sum-exps. `reference_attention` is the plain float32 form that everything is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sfi_agent.engine.attention_rule import AttentionRule, tiled_attention
from sfi_agent.engine.cpu_rows import row_kernels
from sfi_agent.engine.history import Piece
from sfi_agent.observe.log import log_event

__all__ = [
    "RunningSoftmax",
    "attend_history",
    "attend_passing",
    "attend_rows",
    "lse_kernel",
    "reference_attention",
]


class LseKernel(Protocol):
    """Attention that also returns its log-sum-exp.

    Takes queries `[heads, rows, dim]`, keys and values `[heads, tokens, dim]`, the scale, and
    whether row i sees tokens 0..i only (rows == tokens then). Returns the output
    `[heads, rows, value_dim]` in the input's dtype and the log-sum-exps `[heads, rows]` float32.
    """

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]: ...


def reference_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Plain float32 softmax attention, the reference of every other kernel (see `LseKernel`)."""
    logits = torch.matmul(query.float(), keys.float().transpose(-1, -2)) * scale
    if causal:
        rows, tokens = logits.shape[-2:]
        visible = torch.ones(rows, tokens, dtype=torch.bool, device=query.device).tril()
        logits = logits.masked_fill(~visible, float("-inf"))
    lse = logits.logsumexp(dim=-1)
    out = torch.matmul((logits - lse[..., None]).exp(), values.float())
    return out.to(query.dtype), lse


def _cpu_flash(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], keys[None], values[None], 0.0, causal, scale=scale
    )
    return out[0], lse[0].float()


def _cuda_flash(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query[None], keys[None], values[None], 0.0, causal, False, scale=scale
    )
    return out[0], lse[0, :, : query.shape[1]].float()


def _cuda_efficient(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query[None], keys[None], values[None], None, True, 0.0, causal, scale=scale
    )
    # This kernel pads the rows of its log-sum-exps to its tile.
    return out[0], lse[0, :, : query.shape[1]].float()


_chosen: dict[tuple[str, torch.dtype, int, int], LseKernel] = {}


def lse_kernel(query: Tensor, values: Tensor) -> LseKernel:
    """The fastest kernel with log-sum-exps for this device, dtype and head size.

    Falls back to `reference_attention` and logs the reason once per combination.
    """
    key = (query.device.type, query.dtype, query.shape[-1], values.shape[-1])
    if key not in _chosen:
        _chosen[key], reason = _choose_kernel(*key)
        log_event(
            "debug", "attention_kernel_chosen", device=key[0], dtype=str(key[1]), reason=reason
        )
    return _chosen[key]


def _choose_kernel(
    device: str, dtype: torch.dtype, key_dim: int, value_dim: int
) -> tuple[LseKernel, str]:
    if key_dim != value_dim:
        return reference_attention, "key and value dimensions differ"
    if device == "cpu":
        return _cpu_flash, "CPU flash kernel"
    if device != "cuda":
        return reference_attention, f"no kernel with log-sum-exps on {device}"
    if dtype in (torch.bfloat16, torch.float16) and key_dim % 8 == 0 and key_dim <= 256:
        return _cuda_flash, "CUDA flash kernel"
    if dtype is torch.float32 and key_dim % 4 == 0:
        return _cuda_efficient, "CUDA memory-efficient kernel"
    return reference_attention, f"no CUDA kernel for {dtype} and head size {key_dim}"


def attend_rows(query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
    """Attention of rows that see every token: `[query_heads, rows, value_dim]`.

    Args:
        query: `[query_heads, rows, key_dim]`.
        keys: `[kv_heads, tokens, key_dim]`.
        values: `[kv_heads, tokens, value_dim]`.
        rule: Of the layer.
    """
    folded = _fold(query, keys.shape[0])
    kernels = row_kernels(folded, keys, values)
    if kernels is not None and rule.sinks is not None:
        _tell_sinks(str(query.dtype))
    elif kernels is not None:
        out = kernels.attend(folded, keys, values, rule.scale, rule.softcap)
        return out.reshape(*query.shape[:2], values.shape[-1])
    return _torch_rows(query, keys, values, rule)


@cache
def _tell_sinks(dtype: str) -> None:
    """Why the compiled rows are there and not used, once."""
    reason = "torch's attention: compiled rows return no log-sum-exps, which sinks need"
    log_event("debug", "attention_kernel_chosen", device="cpu", dtype=dtype, reason=reason)


def _torch_rows(query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
    if not rule.plain:
        return rule.share(*_past_rows(query, keys, values, rule))
    folded = _fold(query, keys.shape[0])
    out = F.scaled_dot_product_attention(folded[None], keys[None], values[None], scale=rule.scale)
    return out[0].reshape(*query.shape[:2], values.shape[-1])


def attend_history(
    query: Tensor,
    pieces: Sequence[Piece],
    rule: AttentionRule,
    *,
    compiled_rows: bool = False,
) -> Tensor:
    """Causal attention of the newest rows over a whole history, those rows included.

    Args:
        query: `[query_heads, rows, key_dim]`; row i is the token `rows - i` from the end.
        pieces: The history in order; the last piece holds at least the `rows` newest tokens.
        rule: Of the layer.
        compiled_rows: Whether a single row may use `attend_rows` and its compiled kernel. Off, it
            is torch's attention: what dense decoding is compared by.

    Returns:
        `[query_heads, rows, value_dim]` in the dtype of `query`.
    """
    rows = query.shape[1]
    if rows == 1 and len(pieces) == 1:
        attend = attend_rows if compiled_rows else _torch_rows
        return attend(query, pieces[0].keys, pieces[0].values, rule)
    *earlier, last = pieces
    split = last.keys.shape[1] - rows
    past = [(piece.keys, piece.values) for piece in earlier]
    if split:
        past.append((last.keys[:, :split], last.values[:, :split]))
    parts = [_past_rows(query, *piece, rule) for piece in past]
    newest = last.keys[:, split:], last.values[:, split:]
    parts.append(_newest_block(query, *newest, rule))
    return rule.share(*_merge(parts)).to(query.dtype)


def attend_passing(
    query: Tensor,
    past: Iterable[Piece],
    own: Piece,
    rule: AttentionRule,
    look: Callable[[Piece], None] | None = None,
) -> Tensor:
    """Causal attention of the newest rows over a history that comes by piece by piece.

    Args:
        query: `[query_heads, rows, key_dim]`.
        past: The tokens before these rows, in any order. A piece is valid until the next one is
            asked for.
        own: The rows' own tokens.
        rule: Of the layer.
        look: Shown every piece while it is there, the own one last.

    Returns:
        `[query_heads, rows, value_dim]` in the dtype of `query`.
    """
    folded = _fold(query, own.keys.shape[0]).contiguous()
    softmax = RunningSoftmax()
    for piece in past:
        out, lse = _attend_part(folded, piece.keys, piece.values, rule, causal=False)
        softmax.add(out.reshape(*query.shape[:2], -1), lse.reshape(query.shape[:2]))
        if look is not None:
            look(piece)
    softmax.add(*_newest_block(query, own.keys, own.values, rule))
    if look is not None:
        look(own)
    return rule.share(*softmax.result()).to(query.dtype)


class RunningSoftmax:
    """One softmax out of parts that come one after the other, in float32; keeps one at a time."""

    def __init__(self) -> None:
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Attention over some more tokens.

        Args:
            out: `[heads, rows, value_dim]`.
            lse: `[heads, rows]` float32, its log-sum-exps.
        """
        if self._out is None or self._lse is None:
            self._out, self._lse = out, lse
            return
        total = torch.logaddexp(self._lse, lse)
        before, share = (self._lse - total).exp(), (lse - total).exp()
        self._out = (self._out.float() * before[..., None]).add_(out.float() * share[..., None])
        self._lse = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Attention over all of them, in the dtype of the part where there was one alone, and its
        log-sum-exps."""
        assert self._out is not None and self._lse is not None, "no part was added"
        return self._out, self._lse


def _past_rows(
    query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    folded = _fold(query, keys.shape[0])
    out, lse = _attend_part(folded, keys, values, rule, causal=False)
    return out.reshape(*query.shape[:2], -1), lse.reshape(query.shape[:2])


def _newest_block(
    query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    # Folded rows cannot use a causal kernel; the block is short, so its keys are repeated.
    group = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    return _attend_part(query.contiguous(), keys, values, rule, causal=True)


def _attend_part(
    query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention over some of the tokens, sinks left out: see `LseKernel`."""
    if rule.softcap:
        return tiled_attention(query, keys, values, rule, causal=causal)
    return lse_kernel(query, values)(query, keys, values, rule.scale, causal)


def _merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax out of several, float32: outputs weighted by their share of the total mass, and
    log-sum-exps."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(dim=0)
    outs = torch.stack([out.float() for out, _ in parts])
    return (outs * (lses - total).exp()[..., None]).sum(dim=0), total


def _fold(query: Tensor, kv_heads: int) -> Tensor:
    """`[query_heads, rows, dim]` to `[kv_heads, group * rows, dim]`, rows of a head together."""
    return query.reshape(kv_heads, -1, query.shape[-1])
