"""A model's layers compiled for programs: one code for all layers, and the tokens of eager steps.

On a CPU programs run uncaptured, so the compiled modules are switched on around every body here;
dynamo and the rewriting of graphs are those of a device, what compiles the graphs is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import fx

from sfi_agent import Engine, SessionConfig
from sfi_agent.engine.compile_backend import StepBackend
from sfi_agent.engine.programs.compilation import compiled_modules, modules_to_compile
from sfi_agent.engine.programs.program import StepProgram
from sfi_agent.engine.runner import Runner
from tests.families import FAMILIES, Family, build_model, word_tokenizer

POLICY = SessionConfig(
    boundaries=[{"name": "interval", "every_tokens": 5}],
    memory={"sink_tokens": 2, "selected_tokens": 8, "recent_tokens": 4},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 9},
)
PROMPT = list(range(40))


def as_it_is(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compiles nothing further."""
    return graph.forward


@contextmanager
def compiled_bodies(backend: StepBackend) -> Iterator[None]:
    """Let the bodies of all programs run compiled modules."""
    body = StepProgram.body

    def compiled(program: StepProgram) -> None:
        with compiled_modules(program._model, backend, lambda _: None):
            body(program)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StepProgram, "body", compiled)
        yield


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_compiled_steps_write_what_eager_ones_write(family: Family) -> None:
    model = build_model(family)
    engine = Engine(model, word_tokenizer())
    policies = [POLICY, POLICY.replace(slow_step="verify")]

    def written() -> list[list[int]]:
        found = []
        for config in policies:
            with engine.session(config) as session:
                found.append(session.decode(PROMPT, max_new_tokens=30))
        return found

    expected = written()
    engine.runner = Runner(model, engine.shape, execution="uncaptured")
    backend = StepBackend(as_it_is, force=True)
    with compiled_bodies(backend):
        assert written() == expected
    assert sum(backend.replaced) > 0, "no linear layer was replaced"
    assert all(module._compiled_call_impl is None for module in modules_to_compile(model))


def test_all_layers_share_their_compiled_code() -> None:
    family = next(family for family in FAMILIES if family.name == "qwen3")
    model = build_model(family)
    layers, others = model.config.num_hidden_layers, 2
    assert len(modules_to_compile(model)) == layers + others
    engine = Engine(model, word_tokenizer())
    engine.runner = Runner(model, engine.shape, execution="uncaptured")
    torch._dynamo.reset()
    backend = StepBackend(as_it_is, force=True)
    with compiled_bodies(backend), engine.session(POLICY) as session:
        session.decode(PROMPT, max_new_tokens=40)
    # A layer, the final norm, the head: each once.
    assert backend.replaced == [4, 0, 1]
