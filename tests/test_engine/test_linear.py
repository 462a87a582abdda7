"""Linear layers of decoding steps: the operations, their plans, the rewriting of real layers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from sfi_agent.engine.compile_backend import StepBackend
from sfi_agent.engine.kernels import linear
from sfi_agent.engine.kernels.linear import linear_problem, skinny_gated, skinny_linear
from sfi_agent.engine.kernels.linear_plans import MOST_COUNTERS, plan_linear
from tests.families import FAMILIES, Family, build_model
from tests.test_engine.linear_cases import assert_rounded, exact_gate

CPU = torch.device("cpu")
HAS_TRITON = find_spec("triton") is not None


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------- operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 2560), (3, 384), (16, 72), (2, 9728)])
def test_operations_equal_float32(rows: int, width: int, dtype: torch.dtype) -> None:
    x = draw(0, rows, width, dtype=dtype)
    weights = [draw(size, size, width, dtype=dtype) / width**0.5 for size in (33, 8, 1, 33)]
    biases = [draw(9, 33, dtype=dtype), None, draw(8, 1, dtype=dtype), None]
    for got, weight, bias in zip(skinny_linear(x, weights, biases), weights, biases, strict=True):
        exact = functional.linear(x.float(), weight.float())
        assert got.dtype is dtype
        assert_rounded(got, exact if bias is None else exact + bias.float())
    gate, up = weights[0], weights[3]
    assert_rounded(skinny_gated(x, gate, up), exact_gate(x, gate, up))
    assert torch.equal(skinny_linear(x, [gate])[0], skinny_linear(x, [gate], [None])[0])


def test_operations_have_shapes_without_data() -> None:
    with FakeTensorMode():
        x = torch.empty(3, 64, dtype=torch.bfloat16)
        weights = [x.new_empty(size, 64) for size in (5, 1000)]
        outs = torch.ops.sfi_agent.skinny_linear(x, weights, [None, x.new_empty(1000)])
        assert [out.shape for out in outs] == [(3, 5), (3, 1000)]
        assert all(out.dtype is torch.bfloat16 for out in outs)
        assert torch.ops.sfi_agent.skinny_gated(x, weights[0], weights[0]).shape == (3, 5)


def test_a_cpu_runs_the_reference_and_says_why() -> None:
    linear._uses_kernels.cache_clear()
    with capture_logs() as logs:
        skinny_linear(draw(0, 1, 8), [draw(1, 4, 8)])
        skinny_linear(draw(0, 1, 8), [draw(1, 4, 8)])
    chosen = [entry for entry in logs if entry["event"] == "linear_kernels_chosen"]
    assert [entry["reason"] for entry in chosen] == [linear_problem(CPU, torch.float32)]
    assert chosen[0]["kernels"] == "reference"


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    one_row=st.booleans(),
    width=st.integers(1, 30_000),
    outputs=st.lists(st.integers(1, 260_000), min_size=1, max_size=3),
    gated=st.booleans(),
    element_bytes=st.sampled_from([2, 4]),
)
def test_plans_fit_the_device(
    one_row: bool, width: int, outputs: list[int], gated: bool, element_bytes: int
) -> None:
    sizes = outputs[:1] if gated else outputs
    plan = plan_linear(one_row, width, tuple(sizes), gated, element_bytes, 132, True)
    for size in (plan.block_outputs, plan.block_inputs, plan.warps):
        assert size & (size - 1) == 0
    assert plan.early_launch is one_row and plan.block_outputs % 2 == 0
    programs = plan.programs(sizes, gated)
    assert programs * plan.block_outputs >= sum(sizes) * (1 + gated)
    if one_row:
        assert plan.splits == 1
        assert plan.block_inputs * element_bytes == 16 * 32 * plan.warps
    else:
        assert plan.splits == 1 or programs <= MOST_COUNTERS
        assert plan.splits <= max(1, width // plan.block_inputs)
        tile_bytes = (plan.block_outputs + 16) * plan.block_inputs * element_bytes
        assert tile_bytes * plan.stages <= 99_000


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_kernels_equal_float32(child_environment: Callable[..., dict[str, str]]) -> None:
    """Under Triton's interpreter, in a child: the choice is made when Triton is imported."""
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    root = Path(__file__).resolve().parent.parent.parent
    environment = child_environment(root, Path(spec.origin).parent.parent)
    environment |= {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.test_engine.linear_cases", "12"]
    done = run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    if done.stdout.startswith("unusable:"):
        pytest.skip(done.stdout.strip())
    assert done.stdout.strip() == "checked 12"


# ---------------------------------------------------------------- rewriting


class Recorder:
    """A backend that keeps the graph and runs it as it is.

    Attributes:
        operations: For each linear layer or operation left in the graphs, its name and how many
            weights it reads.
    """

    def __init__(self) -> None:
        self.operations: list[tuple[str, int]] = []

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for node in module.graph.nodes:
            name = getattr(node.target, "__name__", "")
            if node.target is torch.ops.sfi_agent.skinny_linear.default:
                self.operations.append(("skinny_linear", len(node.args[1])))
            elif node.target is torch.ops.sfi_agent.skinny_gated.default:
                self.operations.append(("skinny_gated", 2))
            elif name == "linear":
                self.operations.append(("linear", 1))
        forward: Callable[..., Any] = module.forward
        return forward


def rewritten(
    function: Callable[..., Any], *inputs: Any, force: bool = True, **named: Any
) -> list[tuple[str, int]]:
    """What the graph of `function` holds; its results are those of the function itself."""
    recorder = Recorder()
    with torch.no_grad():
        expected = function(*inputs, **named)
        compiled = torch.compile(
            function, backend=StepBackend(recorder, force=force), dynamic=False, fullgraph=True
        )
        torch.testing.assert_close(compiled(*inputs, **named), expected)
    return recorder.operations


_GATED = [("skinny_linear", 3), ("skinny_linear", 1), ("skinny_gated", 2), ("skinny_linear", 1)]
_UNGATED = [("skinny_linear", 3), ("skinny_linear", 1), ("skinny_linear", 2), ("skinny_linear", 1)]
_PACKED = [("skinny_linear", 1)] * 4
_EXPECTED = {"phi3": _PACKED} | dict.fromkeys(("gemma", "gemma2", "gemma3"), _UNGATED)
_ROUTED = ("gpt_oss", "qwen3_moe", "mixtral")
_DENSE = [family for family in FAMILIES if family.name not in _ROUTED]


@pytest.mark.parametrize("family", _DENSE, ids=lambda family: family.name)
def test_a_layer_becomes_four_launches(family: Family) -> None:
    """Query, key and value are one, gate and up one (with silu), the two others one each."""
    model = build_model(family)
    hidden = draw(0, 4, 1, 48)
    by_kind = (model.config.layer_types[0],) if family.name in ("gemma3", "olmo3") else ()
    positions = model.model.rotary_emb(hidden, torch.tensor([[7]]), *by_kind)
    layer = model.model.layers[0]
    found = rewritten(layer, hidden, position_embeddings=positions, attention_mask=None)
    assert found == _EXPECTED.get(family.name, _GATED)


def test_without_force_a_cpu_keeps_its_layers() -> None:
    layer = nn.Linear(8, 8)
    assert rewritten(layer, draw(0, 2, 8), force=False) == [("linear", 1)]


class Gate(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.silu, self.order = nn.SiLU(), order

    def forward(self, x: Tensor) -> Any:
        if self.order == "up first":
            return self.up(x) * self.silu(self.gate(x))
        if self.order == "method":
            return functional.silu(self.gate(x)).mul(self.up(x))
        if self.order == "aten":
            return torch.ops.aten.silu(self.gate(x)) * self.up(x)
        gate, up = self.gate(x), self.up(x)
        product = functional.silu(gate) * up
        return {"gate twice": (product, gate), "up twice": (product, up)}.get(self.order, product)


@pytest.mark.parametrize("order", ["gate first", "up first", "method", "aten"])
def test_gates_are_found_in_any_spelling(order: str) -> None:
    assert rewritten(Gate(order), draw(0, 3, 8)) == [("skinny_gated", 2)]


@pytest.mark.parametrize("order", ["gate twice", "up twice"])
def test_a_gate_that_others_read_stays_apart(order: str) -> None:
    assert rewritten(Gate(order), draw(0, 3, 8)) == [("skinny_linear", 2)]


def test_gates_of_two_sizes_or_inputs_or_with_biases_stay_apart() -> None:
    first, second = nn.Linear(8, 12), nn.Linear(8, 12, bias=False)
    narrow = nn.Linear(8, 1, bias=False)
    x, other = draw(0, 3, 8), draw(1, 3, 8)
    assert rewritten(lambda x: functional.silu(first(x)) * second(x), x) == [("skinny_linear", 2)]
    assert rewritten(lambda x: functional.silu(second(x)) * narrow(x), x) == [("skinny_linear", 2)]
    assert (
        rewritten(lambda x, y: functional.silu(second(x)) * second(y), x, other)
        == [("skinny_linear", 1)] * 2
    )


def test_layers_that_do_not_suit_stay() -> None:
    layer, wide = nn.Linear(8, 6), draw(1, 8, 6)
    assert rewritten(layer, draw(0, 17, 8)) == [("linear", 1)], "too many rows"
    assert rewritten(layer, draw(0, 4, 4, 8)) == [("skinny_linear", 1)], "16 rows in all"
    assert rewritten(layer, draw(0, 8)) == [("skinny_linear", 1)], "one row without an axis"
    assert rewritten(lambda x: functional.linear(x, wide.t()), draw(0, 2, 8)) == [("linear", 1)]
    assert rewritten(layer, draw(0, 0, 8)) == [("linear", 1)], "no rows"


def test_tied_weights_and_named_arguments_are_read_right() -> None:
    weight, bias = draw(1, 6, 8), draw(2, 6)

    def twice(x: Tensor) -> Tensor:
        first = functional.linear(x, weight)
        second = functional.linear(input=x, weight=weight, bias=bias)
        return first - 2 * second

    assert rewritten(twice, draw(0, 2, 1, 8)) == [("skinny_linear", 2)]


def test_nothing_moves_across_a_write() -> None:
    one, two = nn.Linear(8, 6), nn.Linear(8, 6)

    def writes(x: Tensor) -> Tensor:
        x = x * 1.0
        first = one(x)
        x.add_(1.0)
        product: Tensor = first * two(x)
        return product

    assert rewritten(writes, draw(0, 2, 8)) == [("skinny_linear", 1)] * 2


def test_weights_made_late_are_not_read_early() -> None:
    one = nn.Linear(8, 6, bias=False)

    def late(x: Tensor) -> Tensor:
        first = one(x)
        return functional.linear(x, (first.sum() * one.weight).contiguous())

    assert rewritten(late, draw(0, 2, 8)) == [("skinny_linear", 1)] * 2


def test_layers_with_gradients_stay() -> None:
    recorder, layer = Recorder(), nn.Linear(8, 6)
    compiled = torch.compile(layer, backend=StepBackend(recorder, force=True), fullgraph=True)
    compiled(draw(0, 2, 8)).sum().backward()
    assert recorder.operations == [("linear", 1)] and layer.weight.grad is not None


def test_backends_count_what_they_put_in() -> None:
    backend = StepBackend(Recorder(), force=True)
    with torch.no_grad():
        torch.compile(Gate("gate first"), backend=backend)(draw(0, 1, 8))
    assert backend.replaced == [1]
