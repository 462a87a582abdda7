"""Linear layers of decoding steps on a CUDA device: equality, capture, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sfi_agent.engine.compile_backend import StepBackend
from sfi_agent.engine.kernels.linear import linear_problem, skinny_gated, skinny_linear
from tests.families import FAMILIES, build_model
from tests.test_engine.kernel_cases import draw
from tests.test_engine.linear_cases import assert_rounded, check_linear, check_rows, exact_gate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DEVICE = torch.device("cuda", 0)


def test_this_device_has_kernels() -> None:
    assert linear_problem(DEVICE, torch.bfloat16) is None


@pytest.mark.parametrize("seed", range(24))
def test_layers_equal_float32(seed: int) -> None:
    check_linear(seed, DEVICE, [72, 130, 384, 2560, 9728])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    check_rows(DEVICE, 2560, dtype)


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_sizes_of_a_model_equal_float32_and_repeat(rows: int) -> None:
    torch.manual_seed(rows)
    for width, sizes in ((2560, (4096, 1024, 1024)), (9728, (2560,)), (2560, (151_936,))):
        x = draw(rows, width, dtype=torch.bfloat16, device=DEVICE)
        weights = [draw(size, width, dtype=torch.bfloat16, device=DEVICE) for size in sizes]
        outs, again = skinny_linear(x, weights), skinny_linear(x, weights)
        for got, second, weight in zip(outs, again, weights, strict=True):
            assert_rounded(got, functional.linear(x.float(), weight.float()))
            assert torch.equal(got, second)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_captured_chain_reads_what_its_predecessors_wrote(rows: int) -> None:
    """Launches that start early wait for each other, for copies and for torch's own kernels."""
    torch.manual_seed(0)
    bf16 = torch.bfloat16
    # Small steps of the residual: twenty large ones would make rounding errors grow without bound.
    gate, up, down = (
        draw(*shape, dtype=bf16, device=DEVICE) / divisor
        for shape, divisor in (((640, 256), 16), ((640, 256), 16), ((256, 640), 256))
    )
    source, kept = (torch.zeros(rows, 256, dtype=bf16, device=DEVICE) for _ in range(2))

    def chain(one: bool) -> Tensor:
        kept.copy_(source)
        x = kept
        for _ in range(20):
            wide = skinny_gated(x, gate, up) if one else exact_gate(x, gate, up).to(bf16)
            if one:
                x = x + skinny_linear(wide, [down])[0]
            else:
                x = x + functional.linear(wide.float(), down.float()).to(bf16)
            x = x / x.float().square().mean().sqrt().to(bf16)
        return x

    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(True)
    for _ in range(5):
        source.normal_()
        eager = chain(True)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager)
    similarity = functional.cosine_similarity(
        out.float().flatten(), chain(False).float().flatten(), 0
    )
    assert similarity > 0.99


# What torch's compiler warns of (its own deprecations, float32 precision) is not ours.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("early_launch", [False, True])
def test_a_compiled_layer_equals_itself(early_launch: bool) -> None:
    torch.compiler.reset()
    family = next(family for family in FAMILIES if family.name == "qwen3")
    model = build_model(family, device="cuda")
    hidden = draw(4, 1, 48, dtype=torch.float32, device=DEVICE)
    positions = model.model.rotary_emb(hidden, torch.tensor([[7]], device=DEVICE))
    layer, backend = model.model.layers[0], StepBackend(early_launch=early_launch)
    with torch.no_grad():
        expected = layer(hidden, position_embeddings=positions, attention_mask=None)
        compiled: Any = torch.compile(layer, backend=backend, dynamic=False, fullgraph=True)
        for _ in range(3):
            got = compiled(hidden, position_embeddings=positions, attention_mask=None)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert backend.replaced == [4]
