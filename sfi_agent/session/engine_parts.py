"""Whether an engine is made of what it needs, before anything is made of it."""

from __future__ import annotations

import torch

from sfi_agent.errors import InputError, UnsupportedModelError, explain
from sfi_agent.observe.telemetry import Telemetry
from sfi_agent.session.parking import ParkingLimits

__all__ = ["check_parts"]


def check_parts(model: object, tokenizer: object, telemetry: object, parking: object) -> None:
    """Refuse objects of other kinds than those that `Engine` takes.

    Raises:
        UnsupportedModelError: The model is none, or in training mode.
        InputError: One of the others is something else, and not None.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise UnsupportedModelError(
            explain(
                "made an Engine",
                got=f"a model of type {type(model).__name__}",
                allowed="a causal language model of transformers",
                remedy="Engine.from_pretrained(path) loads one from a directory or the Hub",
            )
        )
    if model.training:
        raise UnsupportedModelError(
            explain("made an Engine", got="a model in training mode", remedy="call model.eval()")
        )
    if tokenizer is not None and not (
        hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")
    ):
        raise _refused("tokenizer", tokenizer, "a tokenizer of transformers, or None")
    if telemetry is not None and not isinstance(telemetry, Telemetry):
        raise _refused("telemetry", telemetry, "a Telemetry, or None")
    if parking is not None and not isinstance(parking, ParkingLimits):
        raise _refused("parking", parking, "ParkingLimits, or None")


def _refused(name: str, given: object, allowed: str) -> InputError:
    return InputError(
        explain("made an Engine", got=f"{name} of type {type(given).__name__}", allowed=allowed)
    )
