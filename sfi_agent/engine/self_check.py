"""Proof, before anything is decoded, that our attention computes what the model's own computes.

A few tokens go through the model as it is, and through ours in two prefill chunks and a fast step
whose memory holds everything. A family with an attention we do not reproduce fails here, with a
reason, instead of decoding wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfi_agent.engine.memory import MemoryLayout
from sfi_agent.engine.model_shape import ModelShape
from sfi_agent.engine.refresh import refresh_memory
from sfi_agent.engine.runner import Runner
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.engine.surroundings import own_surroundings
from sfi_agent.engine.switch import AttentionSwitch
from sfi_agent.errors import ModelInUseError, SfiError, UnsupportedModelError, explain
from sfi_agent.protocols import Evidence, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_model"]

_TOKENS = 14
_CHUNKS = (6, 7)
_LARGEST_RELATIVE_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3}
_LARGEST_RELATIVE_ERROR_HALF = 0.2
"""Half precision rounds differently per kernel, and a rounded router may pick another expert."""


class _Everything:
    """Selects every candidate."""

    needs: frozenset[str] = frozenset()

    def select(self, evidence: Evidence, budget: int) -> Selection:
        heads = evidence.logits.shape[:2]
        device = evidence.logits.device
        positions = evidence.candidate_start + torch.arange(budget, device=device)
        counts = torch.full(heads, budget, dtype=torch.int64, device=device)
        return Selection(positions.expand(*heads, budget).contiguous(), counts)


@torch.no_grad()
def check_model(model: PreTrainedModel, shape: ModelShape) -> float:
    """Compare the model's own attention with ours on a few tokens.

    Must be called while no session is open on the model.

    Returns:
        The relative error of the last logits (norm of the difference over the norm), lower is
        better.

    Raises:
        UnsupportedModelError: The error is larger than rounding explains, a layer never asked for
            attention, or the model gives no logits by itself.
    """
    stride = max(1, shape.vocabulary_size // (_TOKENS + 1))
    ids = [(index + 1) * stride % shape.vocabulary_size for index in range(_TOKENS)]
    with own_surroundings(shape.device):
        own = _own_logits(model, shape, ids)
        try:
            ours = _our_logits(model, shape, ids)
        except ModelInUseError as error:
            got = "a model that does not hand keywords to its attention"
            raise _cannot_run(model, got) from error
        except (SfiError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _cannot_run(model, f"{type(error).__name__}: {error}") from error
    difference = torch.linalg.vector_norm(own.float() - ours)
    relative_error = float(difference / torch.linalg.vector_norm(own.float()).clamp(min=1e-20))
    allowed = _LARGEST_RELATIVE_ERROR.get(shape.dtype, _LARGEST_RELATIVE_ERROR_HALF)
    if not relative_error <= allowed:
        raise UnsupportedModelError(
            explain(
                f"checked {type(model).__name__} against its own attention",
                got=f"a relative error of {relative_error:.3g} in the logits",
                allowed=f"at most {allowed:g} in {shape.dtype}",
                remedy="its attention is not the causal softmax attention this engine computes",
            )
        )
    return relative_error


def _cannot_run(model: PreTrainedModel, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        explain(
            f"ran a few tokens of {type(model).__name__} through slow-fast attention",
            got=got,
            allowed="models that hand query, key, value and extra keywords to the interface",
            remedy="docs/supported_models.md lists families that work",
        )
    )


def _own_logits(model: PreTrainedModel, shape: ModelShape, ids: list[int]) -> Tensor:
    """`[vocabulary]` of the model as it is."""
    tokens = torch.tensor([ids], device=shape.device)
    try:
        with _soft_cap_kept(model):
            output = model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1]
    except (SfiError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            explain(
                f"ran a few tokens through {type(model).__name__} as it is",
                got=f"{type(error).__name__}: {error}",
                allowed="causal language models that turn token ids into logits",
                remedy="load it with transformers' AutoModelForCausalLM",
            )
        ) from error
    return logits


@contextmanager
def _soft_cap_kept(model: PreTrainedModel) -> Iterator[None]:
    """For the length of a with block the attention of a model has the soft-cap that it was trained
    with: older versions of transformers (seen in 5.17) run Gemma 2 by torch's, which drops it."""
    config = model.config.get_text_config()
    before = model.config._attn_implementation
    if before != "sdpa" or not getattr(config, "attn_logit_softcapping", None):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _our_logits(model: PreTrainedModel, shape: ModelShape, ids: list[int]) -> Tensor:
    runner = Runner(model, shape)
    layout = MemoryLayout(1, _TOKENS, 2, shape.device)
    sequence = SequenceState(shape.windows, layout, frozenset())
    first, second = _CHUNKS
    with AttentionSwitch.of(model).switched_on(model):
        runner.dense(sequence, ids[:first])
        runner.dense(sequence, ids[first : first + second], evidence_rows=1)
        for index, layer in enumerate(sequence.layers):
            if layer.history.tokens != first + second:
                raise UnsupportedModelError(
                    explain(
                        f"checked {type(model).__name__}",
                        got=f"layer {index} with {layer.history.tokens} keys after "
                        f"{first + second} tokens",
                        allowed="one attention call per layer and pass",
                        remedy="the model does not use transformers' attention interface "
                        "in every layer",
                    )
                )
        refresh_memory(sequence, _Everything(), segment_capacity=1)
        return runner.fast(sequence, ids[first + second]).logits
