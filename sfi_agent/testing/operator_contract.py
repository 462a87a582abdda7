"""Which tensor operators a selector runs: none that waits for the device, none per head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sfi_agent.protocols import Selector
from sfi_agent.testing.evidence import make_evidence

__all__ = ["check_operators", "check_other_device", "require"]

_FORBIDDEN_OPERATORS = {
    "_local_scalar_dense": "reads a number back to the host (.item(), int(), float(), bool())",
    "item": "reads a number back to the host",
    "is_nonzero": "reads a truth value back to the host (bool(), if, while)",
    "equal": "reads a truth value back to the host (torch.equal)",
    "nonzero": "has a result whose size depends on data (nonzero, where with one argument)",
    "masked_select": "has a result whose size depends on data",
    "_unique2": "has a result whose size depends on data",
    "unique_dim": "has a result whose size depends on data",
    "unique_consecutive": "has a result whose size depends on data",
}
_INDEX_OPERATORS = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
_FEW_HEADS, _MANY_HEADS = 4, 64


def require(condition: bool, selector: Selector, what: str) -> None:
    """Raise an AssertionError that names the selector's class, unless the condition holds.

    Not an `assert`: the contract is checked under `python -O` as well.
    """
    if not condition:
        raise AssertionError(f"{type(selector).__name__}: {what}")


@contextmanager
def _watching(see: Callable[[Any, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `see(operator, arguments)` for every tensor operator that runs inside the block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func: Any,
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            see(func, args)
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        yield


def _is_mask(index: Any) -> bool:
    import torch

    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def check_operators(selector: Selector, with_norms: bool) -> None:
    """No operator that waits for the device, and none per head."""
    counts: dict[int, int] = {}
    for kv_heads in (_FEW_HEADS, _MANY_HEADS):
        names: list[str] = []

        def see(operator: Any, arguments: tuple[Any, ...], names: list[str] = names) -> None:
            name = operator.overloadpacket.__name__
            names.append(name)
            reason = _FORBIDDEN_OPERATORS.get(name)
            if name in _INDEX_OPERATORS and any(_is_mask(index) for index in arguments[1]):
                reason = "indexes with a mask, which has a size that depends on data"
            require(
                reason is None,
                selector,
                f"synchronises with the host: operator {name} {reason}",
            )

        evidence = make_evidence(
            seed=7, kv_heads=kv_heads, rows=3, candidates=40, key_norms=with_norms
        )
        with _watching(see):
            selector.select(evidence, 16)
        counts[kv_heads] = len(names)
    # A loop costs at least one operator per head. Folding heads in halves costs a few per doubling.
    more = counts[_MANY_HEADS] - counts[_FEW_HEADS]
    require(
        more < (_MANY_HEADS - _FEW_HEADS) // 2,
        selector,
        f"loops over heads: {counts[_FEW_HEADS]} operators with {_FEW_HEADS} KV heads, "
        f"{counts[_MANY_HEADS]} with {_MANY_HEADS}; work on whole tensors",
    )


def check_other_device(selector: Selector, with_norms: bool) -> None:
    """Run on the meta device, where nothing has a value: reading one back is an error there."""
    evidence = make_evidence(
        batch=2, kv_heads=4, rows=3, candidates=40, key_norms=with_norms, device="meta"
    )
    try:
        selection = selector.select(evidence, 16)
    except Exception as error:
        raise AssertionError(
            f"{type(selector).__name__}: select failed for evidence on another device (meta, "
            "which holds no values): it reads values back to the host, or makes tensors without "
            f"device=evidence.logits.device. {type(error).__name__}: {error}"
        ) from error
    for name, tensor in (("positions", selection.positions), ("counts", selection.counts)):
        require(
            tensor.device.type == "meta",
            selector,
            f"`{name}` must stay on the evidence's device, got {tensor.device}",
        )
