"""Storage of a run of keys and values, on a model's device or in host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sfi_agent.engine.host_history import HostStore
from sfi_agent.engine.surroundings import own_surroundings

__all__ = ["Buffer", "copy_rows", "empty_buffer"]


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
            # At least float32: torch refuses to narrow a float64 model's keys on the way.
            wide = torch.promote_types(fresh.dtype, torch.float32)
            self.key_norms[:, self.normed_tokens : tokens] = torch.linalg.vector_norm(
                fresh, dim=-1, dtype=wide
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
    with own_surroundings(like.device):
        return torch.empty(heads, capacity, dim, dtype=like.dtype, device=like.device)


def copy_rows(source: Tensor, place: Tensor, target: Tensor) -> Tensor:
    """Copy `source[head, place[head]]` to `target`: `[kv_heads, places, dim]`, for every head."""
    if source.device.type != "cpu":
        return target.copy_(source.gather(1, place[..., None].expand(-1, -1, source.shape[-1])))
    # A CPU gathers number by number; rows of one head are copied whole, an order faster.
    for head in range(source.shape[0]):
        torch.index_select(source[head], 0, place[head], out=target[head])
    return target
