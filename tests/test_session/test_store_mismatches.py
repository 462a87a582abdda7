"""Saved sessions that do not belong to what they are loaded into: refused, or done again."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from sfi_agent import (
    ConfigError,
    Engine,
    InputError,
    StoreError,
    StoreMismatchError,
    TemplateError,
    ToolDefinitionError,
)
from sfi_agent.engine.switch import AttentionSwitch
from sfi_agent.session.store import fingerprints
from sfi_agent.session.store.digests import digest_of
from sfi_agent.session.store.directory import MANIFEST_NAME
from sfi_agent.session.store.fingerprints import fingerprint_model, fingerprint_tokenizer
from tests import chat_templates
from tests.families import FAMILIES, build_model, tiny_engine
from tests.test_guarantees.play import LOGITS_TOLERANCE, close
from tests.test_session.conversations import SPARSE, call_text, chat_engine, policy, says
from tests.tiny_tokenizers import chatml_tokenizer

END = "<|im_end|>"


def find_room(name: str) -> str:
    """Finds a room.

    Args:
        name: Whose room.
    """
    return f"room of {name}"


def find_phone(name: str) -> str:
    """Finds a phone.

    Args:
        name: Whose phone.
    """
    return f"phone of {name}"


CONFIG = policy(sampling={"max_new_tokens": 8})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A conversation with a call that waits."""
    engine, folder = chat_engine(), tmp_path_factory.mktemp("saved")
    with engine.session(CONFIG, system="Be kind.", tools=[find_room]) as session:
        with says(engine, f"Hello Ada.{END}", f"{call_text('find_room', name='Ada')}{END}"):
            session.send("I am Ada.")
            session.send("Where is my room?")
        session.save(folder)
        ids = session.token_ids
    return folder, ids


def other_model(change: Callable[[Any], None]) -> Engine:
    """The engine of the saved session with something changed about its model."""
    model = deepcopy(chat_engine().model)
    change(model)
    return Engine(model, chat_engine().tokenizer)


def flip_a_bit(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data.view(torch.int32)[3, 5] ^= 1


def set_theta(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 77.0}


def with_template(source: str) -> Engine:
    return Engine(chat_engine().model, chatml_tokenizer(source))


def with_another_token() -> Engine:
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens(["qqqq"])
    return Engine(chat_engine().model, tokenizer)


ENGINES: dict[str, tuple[Callable[[], Engine], tuple[str, ...]]] = {
    "weights": (lambda: other_model(flip_a_bit), ("weights",)),
    "config": (lambda: other_model(set_theta), ("model",)),
    "dtype": (lambda: other_model(lambda model: model.to(torch.bfloat16)), ("dtype",)),
    "class": (lambda: chat_engine(family="llama"), ("model", "weights")),
    "tokenizer": (with_another_token, ("tokenizer",)),
    "template": (lambda: with_template(chat_templates.CHATML + " "), ("chat_template",)),
    "no tokenizer": (lambda: Engine(chat_engine().model), ("tokenizer", "chat_template")),
}


@pytest.mark.parametrize("name", ENGINES)
def test_what_differs_is_named(saved: tuple[Path, list[int]], name: str) -> None:
    make, expected = ENGINES[name]
    engine = make()
    with pytest.raises(StoreMismatchError) as raised:
        engine.load_session(saved[0])
    assert raised.value.mismatches == expected
    assert AttentionSwitch.of(engine.model).users == 0
    with pytest.raises(StoreMismatchError) as raised:
        engine.load_session(saved[0], tools=[find_phone], config=SPARSE)
    assert raised.value.mismatches == (*expected, "tools", "policy")
    assert "gone: find_room" in str(raised.value) and "new: find_phone" in str(raised.value)
    assert "sampling" in str(raised.value)


def test_what_is_the_same_fits(saved: tuple[Path, list[int]]) -> None:
    """Another process would make other objects of the same things."""
    model = deepcopy(chat_engine().model)
    model.config._name_or_path, model.config.use_cache = "elsewhere", False
    tokenizer: Any = deepcopy(chat_engine().tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)  # leaves its mark inside
    engine = Engine(model, tokenizer)
    same = type(CONFIG).model_validate(CONFIG.model_dump())
    with engine.load_session(saved[0], tools=[find_room], config=same) as loaded:
        assert loaded.token_ids == saved[1]


def test_a_tool_that_changed_is_named(saved: tuple[Path, list[int]]) -> None:
    def find_room(name: str, floor: int) -> str:
        """Finds a room.

        Args:
            name: Whose room.
            floor: Which floor.
        """
        return name

    with pytest.raises(StoreMismatchError, match="changed: find_room") as raised:
        chat_engine().load_session(saved[0], tools=[find_room])
    assert raised.value.mismatches == ("tools",)
    with pytest.raises(StoreMismatchError, match="gone: find_room"):
        chat_engine().load_session(saved[0], tools=[])


def test_arguments_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    engine: Any = chat_engine()
    missing = tmp_path / "missing"
    for options, error in (
        ({"on_mismatch": "ignore"}, InputError),
        ({"check": "none"}, InputError),
        ({"config": {"mode": "dense"}}, ConfigError),
        ({"tools": [3]}, ToolDefinitionError),
        ({"overflow": "never"}, InputError),
        ({}, StoreError),
    ):
        with pytest.raises(error):
            engine.load_session(missing, **options)
    with pytest.raises(StoreError, match=MANIFEST_NAME):
        engine.load_session(tmp_path)


# ---------------------------------------------------------------- doing it again


def require_again(reply: Any, reason: str | None) -> None:
    usage = reply.usage
    assert usage.reuse_lost_reason == reason
    assert usage.cached_tokens + usage.prefilled_tokens == usage.prompt_tokens
    assert (usage.cached_tokens == 0) == (reason is not None)


RESULT = {"role": "tool", "tool_call_id": "call_0", "content": "room 12"}


@pytest.mark.parametrize("name", ["weights", "config", "dtype"])
def test_another_model_processes_the_same_ids_again(
    saved: tuple[Path, list[int]], name: str
) -> None:
    engine = ENGINES[name][0]()
    with capture_logs() as logs:
        loaded = engine.load_session(saved[0], tools=[find_room], on_mismatch="reprefill")
    (event,) = [entry for entry in logs if entry["event"] == "saved_history_unused"]
    assert event["mismatches"] == ENGINES[name][1] and event["log_level"] == "warning"
    with loaded, engine.session(CONFIG) as fresh:
        assert loaded.token_ids == saved[1] and loaded.stats.history_tokens == 0
        assert len(loaded.trace) == loaded.stats.generated_tokens > 0
        fresh.decode(loaded.token_ids, max_new_tokens=0)
        # All ids in one pass, and all but the last before it: they round differently.
        tolerance = 0.1 if name == "dtype" else LOGITS_TOLERANCE
        assert close(loaded.next_logits(), fresh.next_logits(), tolerance)
        before = loaded.messages
        with says(engine, f"There.{END}", f"Yes.{END}"):
            require_again(loaded.send([RESULT]), "model_changed")
            require_again(loaded.send("Sure?"), None)
        assert loaded.token_ids[: len(saved[1])] == saved[1]
        assert loaded.messages[: len(before)] == before


def test_another_policy_too(saved: tuple[Path, list[int]]) -> None:
    engine = chat_engine()
    other = CONFIG.replace(mode="dense")
    with engine.load_session(saved[0], config=other, on_mismatch="reprefill") as loaded:
        assert loaded.config == other and loaded.stats.history_tokens == 0
        require_again(loaded.send([RESULT]), "model_changed")


@pytest.mark.parametrize(
    ("name", "tools", "reason"),
    [
        ("same", [find_room, find_phone], "tools_changed"),
        ("weights", [find_phone], "tools_changed"),
        ("template", [find_room], "model_changed"),
        ("tokenizer", [find_room], "model_changed"),
        ("tokenizer", None, "model_changed"),
    ],
)
def test_other_texts_are_rendered_again(
    saved: tuple[Path, list[int]], tmp_path: Path, name: str, tools: Any, reason: str
) -> None:
    engine = chat_engine() if name == "same" else ENGINES[name][0]()
    loaded = engine.load_session(saved[0], tools=tools, on_mismatch="reprefill")
    with loaded:
        assert loaded.token_ids == [] and loaded.trace == [] and loaded.stats.history_tokens == 0
        before = loaded.messages
        assert [message["role"] for message in before] == [
            *["system", "user", "assistant", "user", "assistant"]
        ]
        start = loaded.mark()
        loaded.save(tmp_path)
        functions = tools or [find_room]
        again = engine.load_session(tmp_path, tools=functions)
        for one in (loaded, again, loaded.fork()):
            with one, engine.session(CONFIG, system="Be kind.", tools=functions) as fresh:
                with says(engine, f"There.{END}", f"Yes.{END}"):
                    require_again(one.send([RESULT]), reason)
                    require_again(one.send("Sure?"), None)
                assert one.messages[: len(before)] == before
                if one is loaded:
                    one.rewind(start)
                    assert one.messages == before and one.token_ids == []
                    with says(engine, f"Well.{END}"):
                        one.send([RESULT])
                # The same prompt as that of a new session that is told everything at once.
                with says(engine, f"There.{END}"):
                    fresh.send([*before[1:], RESULT])
                prompt = fresh._chat.transcript.spans[0].end  # type: ignore[union-attr]
                assert one.token_ids[:prompt] == fresh.token_ids[:prompt]


def test_a_turn_that_fails_still_has_its_reason_later(saved: tuple[Path, list[int]]) -> None:
    engine = other_model(flip_a_bit)
    with engine.load_session(saved[0], on_mismatch="reprefill") as loaded:
        with pytest.raises(InputError):
            loaded.send([{**RESULT, "tool_call_id": "call_7"}])
        engine.runner.execute, execute = _raise, engine.runner.execute  # type: ignore[method-assign]
        try:
            with pytest.raises(ArithmeticError):
                loaded.send([RESULT])
        finally:
            engine.runner.execute = execute  # type: ignore[method-assign]
        assert loaded.token_ids == saved[1]
        require_again(loaded.send([RESULT]), "model_changed")


def _raise(*arguments: Any, **options: Any) -> Any:
    raise ArithmeticError("planned")


def test_decoding_counts_as_processing_again(saved: tuple[Path, list[int]]) -> None:
    engine = other_model(flip_a_bit)
    with engine.load_session(saved[0], on_mismatch="reprefill") as loaded:
        loaded.decode([], max_new_tokens=0)
        require_again(loaded.send([RESULT]), None)


def test_ids_without_messages_cannot_be_rendered_again(tmp_path: Path) -> None:
    engine = chat_engine()
    with engine.session(CONFIG) as session:
        session.decode([5, 6, 7], max_new_tokens=4)
        session.save(tmp_path)
    with pytest.raises(StoreMismatchError, match="no message brought"):
        with_another_token().load_session(tmp_path, on_mismatch="reprefill")
    # With the same tokenizer they mean the same to any model.
    with other_model(flip_a_bit).load_session(tmp_path, on_mismatch="reprefill") as loaded:
        assert len(loaded.token_ids) == 7


def test_messages_need_a_template(saved: tuple[Path, list[int]]) -> None:
    engine = Engine(chat_engine().model)
    with pytest.raises(TemplateError, match="tokenizer"):
        engine.load_session(saved[0], on_mismatch="reprefill")


def test_nothing_is_lost_where_nothing_was_processed(tmp_path: Path) -> None:
    with chat_engine().session(CONFIG) as session:
        session.save(tmp_path)
    engine = other_model(flip_a_bit)
    with engine.load_session(tmp_path, on_mismatch="reprefill") as loaded:
        assert loaded.send("Hello").usage.reuse_lost_reason is None


def test_saved_again_everything_is_written(saved: tuple[Path, list[int]], tmp_path: Path) -> None:
    """Of the old keys and values none belongs to the session any more."""
    engine, model = chat_engine(), other_model(flip_a_bit)
    with engine.load_session(saved[0]) as session:
        session.save(tmp_path)
    with model.load_session(tmp_path, on_mismatch="reprefill") as loaded:
        loaded.decode([], max_new_tokens=2)
        loaded.save(tmp_path)
        with model.load_session(tmp_path) as again:
            assert torch.equal(again.next_logits(), loaded.next_logits())
    with pytest.raises(StoreMismatchError):
        engine.load_session(tmp_path)


def test_an_impossible_prompt_is_refused_by_its_length(tmp_path: Path) -> None:
    engine = tiny_engine("llama")
    with engine.session(CONFIG.replace(mode="dense")) as session:
        session.decode([1] * 300, max_new_tokens=0)
        session.save(tmp_path)
    family = next(item for item in FAMILIES if item.name == "llama")
    small = Engine(build_model(family, max_position_embeddings=256), engine.tokenizer)
    with pytest.raises(StoreError, match="256"):
        small.load_session(tmp_path, on_mismatch="reprefill")


# ---------------------------------------------------------------- fingerprints


def test_every_parameter_counts() -> None:
    model = build_model(next(item for item in FAMILIES if item.name == "qwen2"))
    seen = {fingerprint_model(model).weights}
    for parameter in model.parameters():
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[flat.numel() // 2] += 1.0
        seen.add(fingerprint_model(model).weights)
    assert len(seen) == len(list(model.parameters())) + 1


def watch_digests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of everything that is read from here on."""
    read: list[int] = []

    def watched(data: torch.Tensor) -> bytes:
        read.append(data.numel())
        return digest_of(data)

    monkeypatch.setattr(fingerprints, "digest_of", watched)
    return read


def test_weights_are_read_once_and_again_when_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(next(item for item in FAMILIES if item.name == "llama"))
    read = watch_digests(monkeypatch)
    first = fingerprint_model(model)
    assert sum(read) == sum(parameter.nbytes for parameter in model.parameters())
    read.clear()
    assert fingerprint_model(model) == first and not read
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    changed = fingerprint_model(model)
    assert read and changed.weights != first.weights
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    assert fingerprint_model(model) == first
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    read.clear()
    assert fingerprint_model(model) == first and read, "a new tensor is read"


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_an_adapter_that_was_merged_is_seen(name: str) -> None:
    """Torch does not count what is done to `data`, which is how adapters are merged."""
    model = build_model(next(item for item in FAMILIES if item.name == "llama"))
    first = fingerprint_model(model)
    weight = model.get_parameter(name)
    before, version = weight.detach().clone(), weight._version
    weight.data += 1e-3 * torch.randn_like(weight)
    assert weight._version == version
    assert fingerprint_model(model).weights != first.weights
    weight.data.copy_(before)
    assert fingerprint_model(model) == first


def test_tied_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    family = next(item for item in FAMILIES if item.name == "llama")
    model = build_model(family, tie_word_embeddings=True)
    read = watch_digests(monkeypatch)
    fingerprint_model(model)
    assert sum(read) == sum(parameter.nbytes for parameter in model.parameters())


def test_a_model_made_in_inference_mode_is_read_every_time() -> None:
    with torch.inference_mode():
        model = build_model(next(item for item in FAMILIES if item.name == "llama"))
        first = fingerprint_model(model)
        model.lm_head.weight.mul_(2.0)
        assert fingerprint_model(model).weights != first.weights


def test_open_sessions_do_not_change_a_model() -> None:
    engine = tiny_engine("gemma3")
    before = fingerprint_model(engine.model)
    with engine.session(CONFIG) as session:
        session.decode([1, 2, 3], max_new_tokens=2)
        assert fingerprint_model(engine.model) == before


def test_a_tokenizer_is_known_by_its_rules() -> None:
    plain = fingerprint_tokenizer(chatml_tokenizer())
    assert plain == fingerprint_tokenizer(chatml_tokenizer())
    other = chatml_tokenizer(vocabulary_size=390)
    assert fingerprint_tokenizer(other).tokenizer != plain.tokenizer
    assert fingerprint_tokenizer(other).chat_template == plain.chat_template
    other = chatml_tokenizer(eos_token="<|endoftext|>")
    assert fingerprint_tokenizer(other).tokenizer != plain.tokenizer
    other = chatml_tokenizer(response_template={"version": 1})
    assert fingerprint_tokenizer(other).chat_template != plain.chat_template
    other = chatml_tokenizer(None)
    assert fingerprint_tokenizer(other).chat_template is None
    before = fingerprint_tokenizer(other).tokenizer
    other.add_tokens(["zzz"])
    assert fingerprint_tokenizer(other).tokenizer != before
    assert fingerprint_tokenizer(None).tokenizer is None
