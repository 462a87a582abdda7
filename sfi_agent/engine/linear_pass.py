"""Rewriting of a dynamo graph: linear layers over few rows become launches that read once.

Linear layers over 1 to 16 rows that share an input become one `sfi_agent::skinny_linear`, and
`silu(gate(x)) * up(x)` one `sfi_agent::skinny_gated` (see `kernels/linear.py`). Whatever does not
match stays as it was, and nothing moves across an operation that may write to a tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from sfi_agent.engine.kernels.linear import linear_problem
from sfi_agent.engine.kernels.linear_plans import MOST_ROWS

__all__ = ["replace_linears"]

_LINEARS = (functional.linear, torch._C._nn.linear)
_SILUS = (
    functional.silu,
    torch._C._nn.silu,
    torch.ops.aten.silu,
    torch.ops.aten.silu.default,
)
_PRODUCTS = (operator.mul, torch.mul, torch.multiply)
_WRITES = (operator.setitem, *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul")))


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear layer of the graph that the kernel can do.

    Attributes:
        node: The call.
        weight: Its weight.
        bias: Its bias, if any.
        place: Index of the call in the graph.
        epoch: How many nodes before it may write to tensors; across those nothing is moved.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    place: int
    epoch: int

    @property
    def x(self) -> fx.Node:
        """Its input, which may have been replaced since the layer was found."""
        node = self.node.args[0] if self.node.args else self.node.kwargs["input"]
        assert isinstance(node, fx.Node)
        return node


def replace_linears(graph_module: fx.GraphModule, *, force: bool = False) -> int:
    """Rewrite the linear layers of a dynamo graph in place.

    Args:
        graph_module: As dynamo hands it over, with `example_value` in the meta of its nodes.
        force: Also where the kernels do not run, for tests.

    Returns:
        How many operations were put in.
    """
    graph = graph_module.graph
    places = {node: place for place, node in enumerate(graph.nodes)}
    epochs = _epochs(graph)
    linears: dict[fx.Node, _Linear] = {}
    for node, place in places.items():
        linear = _as_linear(node, place, epochs[node], force)
        if linear is not None:
            linears[node] = linear
    replaced = 0
    for node in list(graph.nodes):
        replaced += _replace_gated(graph, node, linears, epochs)
    for group in _groups(linears.values(), places):
        _replace_group(graph, group)
        replaced += 1
    if replaced:
        graph.lint()
        graph_module.recompile()
    return replaced


def _epochs(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node how many earlier ones may write to a tensor that others read."""
    epochs, count = {}, 0
    for node in graph.nodes:
        epochs[node] = count
        count += _may_write(node)
    return epochs


def _may_write(node: fx.Node) -> bool:
    if node.op == "call_module":
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    if "out" in node.kwargs or node.kwargs.get("inplace") or node.target in _WRITES:
        return True
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(_mutates(getattr(target, name)) for name in target.overloads())
    if isinstance(target, torch._ops.OpOverload):
        return _mutates(target)
    name = getattr(target, "__name__", "")
    return isinstance(target, torch._ops.HigherOrderOperator) or (
        name.endswith("_") and not name.endswith("__")
    )


def _mutates(overload: torch._ops.OpOverload[Any, Any]) -> bool:
    """Whether it writes to an argument; results that are handed in have the name `out`."""
    arguments = overload._schema.arguments
    return any(one.alias_info and one.alias_info.is_write and not one.is_out for one in arguments)


def _as_linear(node: fx.Node, place: int, epoch: int, force: bool) -> _Linear | None:
    """The linear layer that a node is, if the kernel computes it."""
    if node.op != "call_function" or node.target not in _LINEARS:
        return None
    named = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    x, weight, bias = named.get("input"), named.get("weight"), named.get("bias")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if bias is not None and not isinstance(bias, fx.Node):
        return None
    out, *operands = (None if part is None else _value(part) for part in (node, x, weight, bias))
    if out is None or not _suits(out, operands[0], operands[1], operands[2], force):
        return None
    if bias is not None and operands[2] is None:
        return None
    return _Linear(node, weight, bias, place, epoch)


def _value(node: fx.Node) -> Tensor | None:
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def _suits(
    out: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, force: bool
) -> bool:
    """Whether the kernel computes this layer: few rows, known sizes, plain weights, no gradient."""
    if x is None or weight is None or weight.dim() != 2 or x.dim() < 1 or out.requires_grad:
        return False
    parts = [out, x, weight] if bias is None else [out, x, weight, bias]
    if not all(isinstance(size, int) for part in parts for size in part.shape):
        return False
    if not 1 <= math.prod(x.shape[:-1]) <= MOST_ROWS or min(weight.shape) < 1:
        return False
    if any(part.dtype is not x.dtype or part.device != x.device for part in parts):
        return False
    if any(part.layout is not torch.strided for part in parts) or not weight.is_contiguous():
        return False
    return force or (x.device.type == "cuda" and linear_problem(x.device, x.dtype) is None)


def _replace_gated(
    graph: fx.Graph,
    node: fx.Node,
    linears: dict[fx.Node, _Linear],
    epochs: dict[fx.Node, int],
) -> bool:
    """Put one operation for `silu(linear(x, gate)) * linear(x, up)`; what it covers is removed."""
    method = node.op == "call_method" and node.target == "mul"
    if not method and not (node.op == "call_function" and node.target in _PRODUCTS):
        return False
    if len(node.args) != 2 or node.kwargs:
        return False
    for activated, other in (node.args, node.args[::-1]):
        gate = _gate_of(activated, linears)
        up = linears.get(other) if isinstance(other, fx.Node) else None
        if gate is None or up is None or not _belong(gate, up, epochs[node]):
            continue
        with graph.inserting_before(node):
            out = graph.call_function(
                torch.ops.sfi_agent.skinny_gated.default,
                (_as_rows(graph, gate.x), gate.weight, up.weight),
            )
            out = _with_leading_sizes(graph, out, up.node)
        _hand_over(node, out)
        graph.erase_node(node)
        assert isinstance(activated, fx.Node)
        for covered in (activated, gate.node, up.node):
            graph.erase_node(covered)
        del linears[gate.node], linears[up.node]
        return True
    return False


def _gate_of(activated: Any, linears: dict[fx.Node, _Linear]) -> _Linear | None:
    """The linear layer under a silu that nothing else reads."""
    if not isinstance(activated, fx.Node) or activated.op != "call_function":
        return None
    if activated.target not in _SILUS or len(activated.users) != 1:
        return None
    named = dict(zip(("input", "inplace"), activated.args, strict=False)) | dict(activated.kwargs)
    source = named.pop("input", named.pop("self", None))
    if named.get("inplace") or not isinstance(source, fx.Node):
        return None
    return linears.get(source)


def _belong(gate: _Linear, up: _Linear, epoch: int) -> bool:
    """Whether two layers are gate and up of one input, and read by the product alone."""
    if gate.x is not up.x or gate.bias is not None or up.bias is not None:
        return False
    if len(gate.node.users) != 1 or len(up.node.users) != 1 or gate.node is up.node:
        return False
    if not gate.epoch == up.epoch == epoch:
        return False
    one, other = _value(gate.weight), _value(up.weight)
    return one is not None and other is not None and one.shape == other.shape


def _groups(linears: Iterable[_Linear], places: dict[fx.Node, int]) -> list[list[_Linear]]:
    """Layers that share an input and may run where the first of them stands."""
    groups: list[list[_Linear]] = []
    for linear in linears:
        parts = [part for part in (linear.weight, linear.bias) if part is not None]
        for group in groups:
            first = group[0]
            if first.x is linear.x and first.epoch == linear.epoch:
                if all(places.get(part, first.place) < first.place for part in parts):
                    group.append(linear)
                    break
        else:
            groups.append([linear])
    return groups


def _replace_group(graph: fx.Graph, group: list[_Linear]) -> None:
    with graph.inserting_before(group[0].node):
        weights, biases = [one.weight for one in group], [one.bias for one in group]
        outs = graph.call_function(
            torch.ops.sfi_agent.skinny_linear.default,
            (_as_rows(graph, group[0].x), weights, biases),
        )
        for index, linear in enumerate(group):
            out = graph.call_function(operator.getitem, (outs, index))
            _hand_over(linear.node, _with_leading_sizes(graph, out, linear.node))
    for linear in group:
        graph.erase_node(linear.node)


def _as_rows(graph: fx.Graph, x: fx.Node) -> fx.Node:
    value = _value(x)
    assert value is not None
    shape = (math.prod(value.shape[:-1]), value.shape[-1])
    return x if value.shape == shape else graph.call_method("reshape", (x, shape))


def _with_leading_sizes(graph: fx.Graph, out: fx.Node, like: fx.Node) -> fx.Node:
    """Results `[rows, out]` in the shape of the layer that they replace."""
    value = _value(like)
    assert value is not None
    return out if value.dim() == 2 else graph.call_method("reshape", (out, tuple(value.shape)))


def _hand_over(node: fx.Node, out: fx.Node) -> None:
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
