"""The training forward equals the network's own; a run trains, saves, resumes and exports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sfi_agent.embedded import train
from sfi_agent.embedded.network import (
    QK_NORM_INIT,
    TrainingForward,
    attention_entropy,
    build_network,
)
from sfi_agent.embedded.train import PHASES, Phase, Trainer

_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def test_the_network_has_about_eleven_million_parameters() -> None:
    network = build_network(2048, seed=1)
    parameters = sum(p.numel() for p in network.parameters())
    assert 10.5e6 < parameters < 12e6
    assert network.config.max_position_embeddings >= 16_384
    first = network.model.layers[0].self_attn
    assert torch.equal(first.q_norm.weight, torch.full((64,), QK_NORM_INIT))


def test_training_forward_equals_the_network() -> None:
    network = build_network(101, seed=2, **_TINY)
    ids = torch.randint(0, 101, (2, 40), generator=torch.Generator().manual_seed(3))
    answered = torch.zeros(2, 40, dtype=torch.bool)
    answered[0, 5:20] = True
    answered[1, 30:] = True
    loss, entropy, right = TrainingForward(network, compiled=False)(ids, answered)
    logits = network(ids).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(~answered[:, 1:], -100)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(right, logits.argmax(-1) == ids[:, 1:])
    assert entropy.item() == 0.0


def test_a_batch_without_answers_costs_nothing() -> None:
    network = build_network(101, seed=2, **_TINY)
    ids = torch.zeros(2, 8, dtype=torch.long)
    loss, _, _ = TrainingForward(network, compiled=False)(ids, torch.zeros_like(ids).bool())
    assert loss.item() == 0.0
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


def test_attention_entropy_equals_the_entropy_of_the_attention_weights() -> None:
    network = build_network(101, seed=2, **_TINY)
    network.set_attn_implementation("eager")
    ids = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(4))
    rows = torch.tensor([[0, 7, 23], [3, 11, 20]])
    answered = torch.ones(2, 24, dtype=torch.bool)
    _, entropy, _ = TrainingForward(network, compiled=False)(ids, answered, rows)
    weights = network(ids, output_attentions=True).attentions
    expected = []
    for layer in weights:
        for sequence in range(2):
            chosen = layer[sequence, :, rows[sequence]]
            expected.append(-(chosen * chosen.clamp_min(1e-30).log()).sum(-1).mean())
    torch.testing.assert_close(entropy, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_attention_entropy_of_equal_keys_is_the_logarithm_of_their_number() -> None:
    queries, keys = torch.randn(1, 4, 9, 8), torch.zeros(1, 2, 9, 8)
    entropy = attention_entropy(queries, keys, torch.tensor([[8]]))
    assert entropy.item() == pytest.approx(math.log(9), rel=1e-5)


def test_phases_end_with_long_documents_and_an_entropy_penalty() -> None:
    assert PHASES[-1].entropy_weight > 0
    assert max(PHASES[-1].lengths) > 8192
    assert len({phase.name for phase in PHASES}) == len(PHASES)


def test_a_run_learns_stops_resumes_and_exports(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_EVALUATION_BATCHES", 1)
    phases = (
        Phase("one", (256,), 0.2, 512, 3e-3, 3e-3),
        Phase("two", (384, 256), 0.2, 768, 3e-3, 1e-3, 0.03),
    )

    def start() -> Trainer:
        return Trainer(
            tmp_path,
            phases=phases,
            device="cpu",
            workers=1,
            changes=_TINY,
            tokenizer=tokenizer,
        )

    trainer = start()
    assert not trainer.run(stop_after=0.0)
    assert trainer.run()
    done = trainer.progress
    phases_done = [record["phase_done"] for record in done.history if "phase_done" in record]
    assert phases_done == ["one", "two"]
    assert done.steps > 2 and done.tokens > 2 * 512
    resumed = start()
    resumed.resume()
    assert resumed.progress == done
    for key, value in resumed.network.state_dict().items():
        assert torch.equal(value, trainer.network.state_dict()[key]), key
    folder = tmp_path / "export"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    saved = trainer.network.state_dict()["model.norm.weight"].to(torch.bfloat16)
    assert torch.equal(loaded.model.norm.weight, saved)
    assert AutoTokenizer.from_pretrained(folder).response_template


def test_resume_needs_a_saved_run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, device="cpu", changes=_TINY, tokenizer=tokenizer)
    with pytest.raises(FileNotFoundError):
        trainer.resume()


def test_steps_lower_the_loss(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from sfi_agent.embedded.documents import FragmentTable
    from sfi_agent.embedded.train_data import make_batch

    trainer = Trainer(tmp_path, device="cpu", changes=_TINY, tokenizer=tokenizer)
    batch = make_batch("steps", 320, 2, FragmentTable(tokenizer.backend_tokenizer))
    phase = Phase("step", (320,), 10.0, 640, 1.0, 1.0)
    losses = [float(trainer.step(phase, batch)[0]) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
