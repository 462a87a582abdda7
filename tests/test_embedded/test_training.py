"""The training forward equals the network's own; a run trains, saves, resumes and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sfi_agent.embedded.network import QK_NORM_INIT, build_network, training_forward
from sfi_agent.embedded.recipe import PHASES
from sfi_agent.embedded.supervision import SUPERVISION, attention_source_loss
from sfi_agent.embedded.train import Trainer
from sfi_agent.embedded.train_data import make_batch
from sfi_agent.embedded.train_progress import Phase, Shape
from sfi_agent.embedded.writer import FragmentTable

_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def test_the_network_is_small_and_starts_as_documented() -> None:
    network = build_network(1863, seed=1)
    assert sum(p.numel() for p in network.parameters()) < 2e6
    assert network.config.max_position_embeddings >= 16_384
    first, last = network.model.layers[0].self_attn, network.model.layers[-1].self_attn
    assert torch.equal(first.q_norm.weight, torch.full((64,), QK_NORM_INIT))
    assert torch.equal(last.q_proj.weight[:64], last.k_proj.weight[:64])
    assert torch.equal(last.q_proj.weight[128:192], last.k_proj.weight[64:])
    assert torch.equal(last.o_proj.weight[:, 64:128], last.v_proj.weight[:64].T)
    deepest = max(duty.layer for duty in SUPERVISION.values())
    assert deepest == network.config.num_hidden_layers - 1


@pytest.mark.parametrize("tokens", [40, 1100])
def test_training_forward_equals_the_network(tokens: int) -> None:
    """Both ways of attending: written out for short documents, fused for long ones."""
    network = build_network(101, seed=2, **_TINY)
    ids = torch.randint(0, 101, (2, tokens), generator=torch.Generator().manual_seed(3))
    answered = torch.zeros(2, tokens, dtype=torch.bool)
    answered[0, 5:20] = True
    answered[1, 30:] = True
    positions = torch.arange(tokens).repeat(2, 1)
    positions[1, 8:] += 300
    result = training_forward(network, ids, answered, positions, {})
    logits = network(ids, position_ids=positions).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(~answered[:, 1:], -100)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(result.loss, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.right, (logits.argmax(-1) == ids[:, 1:])[answered[:, 1:]])


def test_a_batch_without_answers_costs_nothing() -> None:
    network = build_network(101, seed=2, **_TINY)
    ids = torch.zeros(2, 8, dtype=torch.long)
    positions = torch.arange(8).repeat(2, 1)
    result = training_forward(network, ids, torch.zeros_like(ids).bool(), positions, {})
    assert result.loss.item() == 0.0
    result.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("role", ["back2", "bind"])
def test_the_source_loss_is_read_off_the_attention_weights(role: str) -> None:
    network = build_network(101, seed=2, **_TINY)
    network.set_attn_implementation("eager")
    ids = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(4))
    rows = torch.tensor([[5, 7, 23], [3, 11, 0]])
    targets = torch.tensor([[[1, 4], [7, -1], [0, 1]], [[2, -1], [4, 5], [-1, -1]]])
    positions = torch.arange(24).repeat(2, 1)
    answered = torch.ones(2, 24, dtype=torch.bool)
    found = training_forward(network, ids, answered, positions, {role: (rows, targets)})
    duty = SUPERVISION[role]
    weights = network(ids, output_attentions=True).attentions[duty.layer]
    expected = []
    for sequence in range(2):
        for row, wanted in zip(rows[sequence], targets[sequence], strict=True):
            places = [int(place) for place in wanted if place >= 0]
            for head in duty.heads if places else ():
                expected.append(-weights[sequence, head, row, places].sum().log())
    torch.testing.assert_close(found.sources[role], torch.stack(expected).mean())
    assert (f"{role}_token" in found.sources) == duty.tells


def test_equal_shares_are_best_when_each_target_counts() -> None:
    keys = torch.eye(4)[None, None]
    targets = torch.tensor([[[0, 1]]])
    row = torch.tensor([[3]])

    def loss(query: list[float], together: bool) -> float:
        queries = torch.zeros(1, 1, 4, 4)
        queries[0, 0, 3] = torch.tensor(query)
        return float(attention_source_loss(queries, keys, (0,), row, targets, together=together))

    even, uneven = [40.0, 40.0, 0.0, 0.0], [80.0, 0.0, 0.0, 0.0]
    assert loss(even, True) == pytest.approx(0.0, abs=1e-6)
    assert loss(uneven, True) == pytest.approx(0.0, abs=1e-6)
    assert loss(even, False) == pytest.approx(0.6931, abs=1e-3)
    assert loss(uneven, False) > 15


def test_phases_end_with_whole_logs() -> None:
    assert max(shape.tokens for shape in PHASES[-1].shapes) > 8192
    assert all(shape.last_position > 8192 for shape in PHASES[0].shapes)
    assert len({phase.name for phase in PHASES}) == len(PHASES)


def test_a_run_learns_stops_resumes_and_exports(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shapes = (Shape(256, 2, (0.3, 0.6), 900), Shape(300, 1, (0.3, 0.6)))
    phases = (
        Phase("one", shapes[:1], 4, 3e-3, 3e-3, 0.3),
        Phase("two", shapes, 4, 3e-3, 1e-3, 0.3, low_precision=False),
    )

    def start() -> Trainer:
        return Trainer(tmp_path, phases=phases, changes=_TINY, tokenizer=tokenizer)

    trainer = start()
    assert not trainer.run(stop_after=0.0)
    assert trainer.run()
    done = trainer.progress
    phases_done = [record["phase_done"] for record in done.history if "phase_done" in record]
    assert phases_done == ["one", "two"]
    assert done.steps == 8 and done.tokens == 4 * 512 + 2 * 512 + 2 * 300
    resumed = start()
    resumed.resume()
    assert resumed.progress == done
    for key, value in resumed.network.state_dict().items():
        assert torch.equal(value, trainer.network.state_dict()[key]), key
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.model.norm.weight, trainer.network.model.norm.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").response_template


def test_resume_needs_a_saved_run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, changes=_TINY, tokenizer=tokenizer)
    with pytest.raises(FileNotFoundError):
        trainer.resume()


def test_steps_lower_the_loss(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, changes=_TINY, tokenizer=tokenizer)
    batch = make_batch("steps", 320, 2, FragmentTable(tokenizer.backend_tokenizer))
    shape = Shape(320, 2, (0.3, 0.9))
    phase = Phase("step", (shape,), 8, 1.0, 1.0, 0.3)
    results = [trainer.step(phase, batch, index / 8) for index in range(8)]
    assert results[-1].loss.item() < results[0].loss.item() - 0.1
    assert results[-1].sources["back1"].item() < results[0].sources["back1"].item()
