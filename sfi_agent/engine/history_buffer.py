"""Storage of a run of keys and values, on a model's device or in host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sfi_agent.engine.host_history import HostStore

__all__ = ["Buffer", "empty_buffer"]


class Buffer:
    """Storage of one extent, possibly read by several histories.

    Attributes:
        keys: `[kv_heads, capacity, key_dim]`.
        values: `[kv_heads, capacity, value_dim]`.
        shared_tokens: Length of the prefix that other histories read; it is never written again.
        key_norms: `[kv_heads, capacity]` float32 of which the first `normed_tokens` are valid;
            None until somebody asks.
        normed_tokens: See `key_norms`.
        home: The host memory that it is in; None where the model's device holds it.
    """

    home: HostStore | None = None

    def __init__(self, keys: Tensor, values: Tensor, home: HostStore | None = None) -> None:
        self.keys = keys
        self.values = values
        self.home = home
        self.shared_tokens = 0
        self.key_norms: Tensor | None = None
        self.normed_tokens = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Put tokens at `start`; in host memory they arrive later (see `HostStore`)."""
        end = start + keys.shape[1]
        pairs = [(self.keys[:, start:end], keys), (self.values[:, start:end], values)]
        if self.home is not None:
            self.home.write(pairs)
            return
        for target, source in pairs:
            target.copy_(source)

    def grown(self, capacity: int, used: int) -> Buffer:
        """A larger private copy of the first `used` tokens. Readers of this buffer keep it."""
        assert self.home is None, "nothing in host memory moves"
        bigger = empty_buffer(self.keys, self.values, capacity)
        bigger.keys[:, :used] = self.keys[:, :used]
        bigger.values[:, :used] = self.values[:, :used]
        return bigger

    def norms(self, tokens: int) -> Tensor:
        """L2 norms of the first `tokens` keys, `[kv_heads, tokens]` float32, kept incrementally."""
        if self.key_norms is None:
            self.key_norms = torch.empty(
                self.keys.shape[:2], dtype=torch.float32, device=self.keys.device
            )
        if self.normed_tokens < tokens:
            fresh = self.keys[:, self.normed_tokens : tokens]
            self.key_norms[:, self.normed_tokens : tokens] = torch.linalg.vector_norm(
                fresh, dim=-1, dtype=torch.float32
            )
            self.normed_tokens = tokens
        return self.key_norms[:, :tokens]


def empty_buffer(
    keys: Tensor, values: Tensor, capacity: int, store: HostStore | None = None
) -> Buffer:
    """Room for `capacity` tokens of such heads and sizes, in a store or where the tensors are."""
    if store is not None:
        return Buffer(store.empty(keys, capacity), store.empty(values, capacity), store)
    return Buffer(_empty(keys, capacity), _empty(values, capacity))


def _empty(like: Tensor, capacity: int) -> Tensor:
    heads, _, dim = like.shape
    return torch.empty(heads, capacity, dim, dtype=like.dtype, device=like.device)
