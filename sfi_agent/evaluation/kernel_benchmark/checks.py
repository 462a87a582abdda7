"""Whether what is about to be timed computes the right thing: each arm against its reference.

Buffers are poisoned before every comparison. Each function raises AssertionError with the
difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from sfi_agent.engine.kernels import ExtentPlace, LayerExtents
from sfi_agent.engine.kernels.reference import (
    ReferenceCall,
    candidate_range,
    reference_attend,
    reference_gather,
    reference_select,
)
from sfi_agent.errors import SfiError, explain

if TYPE_CHECKING:
    from sfi_agent.evaluation.kernel_benchmark.buffers import Buffers, Pool, Step
    from sfi_agent.evaluation.kernel_benchmark.stopwatch import Arm

__all__ = [
    "check_arms",
    "check_attention",
    "check_gather",
    "check_linear",
    "check_ranking",
    "check_selection",
    "check_torch_attention",
]

_NAN = float("nan")
_OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""Of a value, and of the root mean square of all: means over many tokens are small numbers."""

_EVIDENCE_TOLERANCE = 1e-3

_EXACT_ELEMENTS = 1 << 24
"""Of a weight, as float32 at a time: that of a whole head would take gigabytes."""

LayerStep = Callable[[int], tuple[Tensor, Tensor]]


def check_arms(arms: Iterable[Arm], on_progress: Callable[[str], None]) -> tuple[str, ...]:
    """Run every arm once against its reference; the names of those that were checked.

    Raises:
        SfiError: One computes something else; nothing is to be timed then.
    """
    checked = []
    for arm in arms:
        on_progress(f"compiling and checking {arm.name}")
        try:
            arm.check()
        except AssertionError as error:
            what = " ".join(str(error).split())
            raise SfiError(
                explain(
                    f"checked {arm.name} ({arm.method}) before timing it",
                    got=f"a result that differs from its reference: {what.rstrip('.')}",
                    remedy="Times of a wrong kernel mean nothing; please report this with the card",
                )
            ) from error
        checked.append(arm.name)
    return tuple(checked)


def check_attention(
    buffers: Buffers,
    pool: Pool,
    step: Step,
    layer_step: LayerStep,
    scale: float,
    with_evidence: bool,
) -> None:
    """Output, log-sum-exp, appended tokens and evidence of every layer that has buffers."""
    shape = buffers.workload.shape
    call = ReferenceCall(scale)
    if with_evidence:
        call = ReferenceCall(
            scale,
            sink_tokens=shape.sink_tokens,
            recent_tokens=shape.recent_tokens,
            evidence_queries=1,
        )
    for layer in range(pool.buffers):
        extents, buffer = pool.table.layer(layer), buffers.evidence(layer)
        places = _copied(extents)
        buffer.logits.fill_(_NAN)
        buffer.rest_mass.fill_(_NAN)
        logits, rest_mass = buffer.logits.clone(), buffer.rest_mass.clone()
        expected, expected_lse = reference_attend(
            step.query, step.keys, step.values, places, buffers.starts, pool.ends, call,
            logits, rest_mass,
        )  # fmt: skip
        out, lse = layer_step(layer)
        _assert_output(out, expected)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-3)
        _assert_evidence(buffer.logits, logits)
        _assert_evidence(buffer.rest_mass, rest_mass)
        _assert_same(extents, places)
    assert not buffers.counters.any(), "counters are not ready for the next launch"
    buffers.fill_evidence()


def check_torch_attention(
    buffers: Buffers, pool: Pool, step: Step, layer_step: Callable[[int], Tensor]
) -> None:
    """Torch's attention over the history and the places of the new tokens, nothing masked."""
    batch, queries = step.query.shape[:2]
    scale = step.query.shape[-1] ** -0.5
    call = ReferenceCall(scale, append=False, own_tokens=False)
    ends = torch.full_like(pool.ends, pool.tokens + queries)
    for layer in range(pool.buffers):
        places = pool.table.layer(layer).places
        expected, _ = reference_attend(
            step.query, step.keys, step.values, places, buffers.starts, ends, call
        )
        out = layer_step(layer)
        # Rows are the heads of a group, each with its queries.
        out = out.reshape(batch, -1, queries, out.shape[-1]).transpose(1, 2)
        _assert_output(out, expected)


def check_ranking(buffers: Buffers, dtype: torch.dtype, run: Callable[[], Any]) -> None:
    """Keys are ordered like the log of the attention mass, which is computed in float64."""
    shape, scratch, logits = buffers.workload.shape, buffers.scratch, buffers.logits[dtype]
    scratch.keys.fill_(-(2**31))
    run()
    for layer in range(shape.layers):
        evidence = logits[layer % len(logits)]
        exact = (evidence.double() - buffers.lse.double()[..., None]).logsumexp(-2)
        for sequence, length in enumerate(buffers.ranked_tokens.tolist()):
            place = slice(*candidate_range(length, shape.sink_tokens, shape.recent_tokens))
            keys = scratch.keys[layer, sequence, :, place]
            scores = (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32).double()
            torch.testing.assert_close(scores, exact[sequence, :, place], rtol=1e-5, atol=1e-5)


def check_selection(
    buffers: Buffers, prepare: Callable[[], Any], run: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    """Exactly the best of the ranked keys, ties to the lower position."""
    shape, scratch = buffers.workload.shape, buffers.scratch
    prepare()
    keys = scratch.keys.clone()
    positions, counts = run()
    for sequence, length in enumerate(buffers.ranked_tokens.tolist()):
        first, last = candidate_range(length, shape.sink_tokens, shape.recent_tokens)
        rows = keys[:, sequence].flatten(0, 1)
        found, number = reference_select(rows, first, last, shape.selected_tokens)
        assert torch.equal(counts[:, sequence].flatten(), number), "other counts"
        assert torch.equal(positions[:, sequence].flatten(0, 1), found), "other positions"


def check_gather(buffers: Buffers, run: Callable[[], Any]) -> None:
    """The very bits of the selected, sink and recent tokens, each in its place."""
    shape, memory = buffers.workload.shape, buffers.memory
    assert memory.buffers == shape.layers, "layers that share a memory overwrite each other"
    memory.keys.fill_(_NAN)
    memory.values.fill_(_NAN)
    buffers.gathered_starts.fill_(-1)
    expected = [_copied(memory.table.layer(layer)) for layer in range(shape.layers)]
    run()
    assert not buffers.gathered_starts.any(), "other first slots"
    for layer, memories in enumerate(expected):
        places = buffers.history.table.layer(layer).places
        for sequence, length in enumerate(buffers.history.ends.tolist()):
            reference_gather(
                places[sequence], memories[sequence][0], buffers.positions[layer, sequence],
                buffers.counts[layer, sequence], length, shape.selected_tokens,
                shape.sink_tokens, shape.recent_tokens,
            )  # fmt: skip
        _assert_same(memory.table.layer(layer), memories)


def check_linear(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    gated: bool,
    step: Callable[[int], list[Tensor]],
) -> None:
    """Results with every copy of the weights, against float32 without rounding in between."""
    for copy, together in enumerate(weights):
        exact = [_exact_linear(x, weight) for weight in together]
        if gated:
            exact = [functional.silu(exact[0]) * exact[1]]
        # The next results are likely to lie in the same memory: what is not written shows.
        for out in step(copy):
            out.fill_(_NAN)
        del out
        outs = step(copy)
        assert len(outs) == len(exact), f"{len(outs)} results instead of {len(exact)}"
        for out, expected in zip(outs, exact, strict=True):
            _assert_output(out, expected.to(x.dtype))


def _exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    lines = max(1, _EXACT_ELEMENTS // weight.shape[1])
    parts = [functional.linear(x.float(), some.float()) for some in weight.split(lines)]
    return torch.cat(parts, dim=-1)


def _copied(layer: LayerExtents) -> tuple[tuple[ExtentPlace, ...], ...]:
    return tuple(
        tuple(ExtentPlace(p.keys.clone(), p.values.clone(), p.first_position) for p in places)
        for places in layer.places
    )


def _assert_same(layer: LayerExtents, expected: tuple[tuple[ExtentPlace, ...], ...]) -> None:
    for ours, theirs in zip(layer.places, expected, strict=True):
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own.keys, other.keys, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(own.values, other.values, rtol=0, atol=0, equal_nan=True)


def _assert_output(out: Tensor, expected: Tensor) -> None:
    wanted, tolerance = expected.float(), _OUTPUT_TOLERANCE[expected.dtype]
    typical = float(wanted.square().mean().sqrt())
    torch.testing.assert_close(out.float(), wanted, rtol=tolerance, atol=tolerance * typical)


def _assert_evidence(found: Tensor, expected: Tensor) -> None:
    near = _EVIDENCE_TOLERANCE
    torch.testing.assert_close(found, expected, rtol=near, atol=near, equal_nan=True)
