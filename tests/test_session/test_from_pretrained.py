"""Loading checkpoints: what is there is loaded, what is not is said by name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from sfi_agent import (
    CheckpointError,
    ConfigError,
    Engine,
    TemplateError,
    UnsupportedModelError,
)
from tests.families import FAMILIES, build_model
from tests.test_guarantees.play import close
from tests.test_session.conversations import DENSE, FULL
from tests.tiny_tokenizers import chatml_tokenizer


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Progress bars and reports of transformers are not what these tests are about."""
    import structlog
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if was_shown:
        logging.enable_progress_bar()
    structlog.reset_defaults()


def save(folder: Path, family: str, *, tokenizer: bool = True, **options: Any) -> Any:
    """Save a tiny checkpoint; returns the model it was made from."""
    words = chatml_tokenizer()
    size = {"vocab_size": len(words), "eos_token_id": None, "bos_token_id": None}
    shard_size = options.pop("max_shard_size", "1GB")
    found = next(item for item in FAMILIES if item.name == family)
    model = build_model(found, **{**size, **options})
    model.save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer:
        words.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint in one file; tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("plain")
    save(folder, "qwen3")
    return folder


@pytest.fixture
def copied(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


def change_weights(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------- what loads


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("qwen2", torch.bfloat16),
        ("gemma3", torch.float32),
        ("mistral_sliding", torch.bfloat16),
        ("qwen3_moe", torch.bfloat16),
        ("phi3", torch.float32),
    ],
)
def test_a_checkpoint_says_what_its_model_said(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = save(tmp_path, family, dtype=dtype)
    engine = Engine.from_pretrained(tmp_path)
    assert engine.shape.dtype is dtype and str(engine.shape.device) == "cpu"
    assert not engine.model.training
    ids = list(range(5, 45))
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    with engine.session(DENSE) as session:
        session.decode(ids, max_new_tokens=0)
        tolerance = 1e-4 if dtype is torch.float32 else 0.1
        assert close(session.next_logits(), expected, tolerance)
    with engine.session(FULL, system="Be kind.") as session:
        assert session.send("Hello.").usage.output_tokens > 0


def test_tied_embeddings_are_not_missing(tmp_path: Path) -> None:
    save(tmp_path, "qwen3", tie_word_embeddings=True)
    engine = Engine.from_pretrained(str(tmp_path))
    weights = engine.model.get_output_embeddings().weight
    assert weights is engine.model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_a_dtype_can_be_chosen(plain: Path, dtype: str, expected: torch.dtype) -> None:
    engine = Engine.from_pretrained(plain, dtype=dtype, device="cpu", prefill_chunk_tokens=5)
    assert engine.shape.dtype is expected
    assert engine.runner.prefill_chunk_tokens == 5
    with engine.session(FULL) as session:
        assert len(session.decode(list(range(20)), max_new_tokens=4)) == 4


def test_shards_are_put_together(tmp_path: Path, plain: Path) -> None:
    save(tmp_path, "qwen3", max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    ids = []
    for path in (plain, tmp_path):
        with Engine.from_pretrained(path).session(DENSE) as session:
            ids.append(session.decode([1, 2, 3], max_new_tokens=12))
    assert ids[0] == ids[1]
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_a_checkpoint_without_a_tokenizer_decodes_ids(family: str, tmp_path: Path) -> None:
    # For some of these families transformers makes an empty tokenizer out of nothing.
    save(tmp_path, family, tokenizer=False)
    with capture_logs() as logs:
        engine = Engine.from_pretrained(tmp_path)
    assert engine.tokenizer is None
    (entry,) = [item for item in logs if item["event"] == "tokenizer_missing"]
    assert entry["log_level"] == "warning" and entry["path"] == str(tmp_path)
    with engine.session(DENSE) as session:
        assert len(session.decode([1, 2, 3], max_new_tokens=5)) == 5
        with pytest.raises(TemplateError, match="no tokenizer"):
            session.send("Hello.")
    with pytest.raises(ConfigError, match="punctuation"):
        engine.session(FULL)


# ---------------------------------------------------------------- what does not


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    with pytest.raises(CheckpointError, match="nowhere") as caught:
        Engine.from_pretrained(path)
    assert caught.value.__cause__ is not None
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Engine.from_pretrained(path)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "config", "no weights"])
def test_damaged_files_are_checkpoint_errors(copied: Path, damage: str) -> None:
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    match damage:
        case "cut":
            weights.write_bytes(whole[: len(whole) // 2])
        case "garbage":
            weights.write_bytes(b"garbage" * 1000)
        case "empty":
            weights.write_bytes(b"")
        case "config":
            (copied / "config.json").write_text('{"model_type": ')
        case "no weights":
            weights.unlink()
    with pytest.raises(CheckpointError, match="tried to load a model from"):
        Engine.from_pretrained(copied)


def test_missing_weights_are_not_made_up(copied: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    change_weights(copied, lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match=name):
        Engine.from_pretrained(copied)


def test_weights_of_another_shape_are_refused(copied: Path) -> None:
    def cut(weights: dict[str, Any]) -> None:
        name = "model.layers.1.self_attn.q_proj.weight"
        weights[name] = weights[name][:3].clone()

    change_weights(copied, cut)
    with pytest.raises(CheckpointError):
        Engine.from_pretrained(copied)


def test_a_checkpoint_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=50,
    )
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no weights for cls"):
        Engine.from_pretrained(tmp_path)


def test_a_broken_tokenizer_is_not_taken_for_none(copied: Path) -> None:
    (copied / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(CheckpointError, match="tokenizer"):
        Engine.from_pretrained(copied)


@pytest.mark.parametrize("device", ["tpu", "mps", "meta", "", None, 0, "cuda:99"])
def test_an_unknown_device_is_refused_before_loading(device: Any) -> None:
    with pytest.raises(ConfigError, match="device"):
        Engine.from_pretrained("not/looked-at", device=device)


@pytest.mark.parametrize("dtype", ["int8", "fp32", "", None, torch.float32])
def test_an_unknown_dtype_is_refused_before_loading(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="auto, float32, bfloat16, float16"):
        Engine.from_pretrained("not/looked-at", dtype=dtype)


def test_a_model_in_training_is_refused() -> None:
    model = build_model(FAMILIES[0]).train()
    with pytest.raises(UnsupportedModelError, match="eval"):
        Engine(model)
