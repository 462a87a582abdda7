"""The shipped checkpoint: what it is, and that it answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sfi_agent import Engine, SessionConfig
from sfi_agent.embedded import (
    DEFAULT_SYSTEM,
    Case,
    checkpoint_path,
    make_case,
    make_conversation,
    score,
)
from sfi_agent.embedded.questions import KINDS
from sfi_agent.embedded.world import VARIANTS
from sfi_agent.evaluation.office import evaluate_presets, office_table

_DENSE = SessionConfig(mode="dense", sampling={"max_new_tokens": 256})


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    yield Engine.from_pretrained(checkpoint_path(), device="cpu")


def _answer(engine: Engine, case: Case) -> str:
    with engine.session(_DENSE, system=DEFAULT_SYSTEM, tools=case.tools) as session:
        return session.run(case.prompt, max_turns=3).text


def test_the_checkpoint_is_small_and_its_tokenizer_is_what_the_code_builds(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    folder = checkpoint_path()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    shipped = AutoTokenizer.from_pretrained(folder)
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template
    assert shipped.response_template == tokenizer.response_template


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_answers_are_right_at_1k(engine: Engine, kind: str, variant: str) -> None:
    wrong = []
    for seed in (31, 32, 33):
        case = make_case(seed, kind=kind, variant=variant, log_tokens=1024)
        said = _answer(engine, case)
        if not score(case, said).exact:
            wrong.append((said, case.expected))
    assert not wrong


def test_a_dense_report_is_right_at_4k(engine: Engine) -> None:
    case = make_case(41, kind="report", log_tokens=4096)
    assert score(case, _answer(engine, case)).exact


def test_a_conversation_opens_the_log_and_calls_tools(engine: Engine) -> None:
    conversation = make_conversation(7, log_tokens=600, turns=4)
    right = 0
    with engine.session(_DENSE, system=DEFAULT_SYSTEM, tools=conversation.tools) as session:
        opened = session.run(conversation.opening)
        assert [message["role"] for message in session.messages].count("tool") == 1
        assert opened.text.strip() == "The log is open."
        for case in conversation.turns:
            reply = session.run(case.question, max_turns=3)
            right += score(case, reply.text).exact
        results = [m["content"] for m in session.messages if m["role"] == "tool"]
    assert right == 4
    assert {call.result for case in conversation.turns for call in case.calls} & set(results)


def test_presets_are_compared_on_the_same_reports(engine: Engine) -> None:
    results = evaluate_presets(
        engine,
        log_tokens=1024,
        cases=2,
        selected_tokens=128,
        presets=("faithful",),
        variants=("easy",),
    )
    dense, faithful = results
    assert (dense.policy, faithful.policy) == ("dense", "faithful")
    assert dense.sentences == faithful.sentences > 2
    assert dense.sentences_right >= dense.sentences - 1
    assert faithful.sentences_right >= dense.sentences - 1
    assert dense.slow_share > 0.9 > 0.3 > faithful.slow_share > 0
    assert faithful.tokens > 30 and faithful.dense_passes >= faithful.retries
    assert "| faithful | easy |" in office_table(results)
    record = faithful.as_json()
    low, high = record["sentence_interval_95"]
    assert low <= record["sentence_share"] <= high


def test_a_fact_that_the_log_lacks_leaves_the_model_unsure(engine: Engine) -> None:
    """What the entropy detector with retries relies on."""
    case = make_case(51, kind="attribute", log_tokens=1024)
    *rest, value = case.sentences[0].rstrip(".").split(" ")
    subject = rest[0]
    log = "\n".join(line for line in case.log.split("\n") if f" {subject} " not in line)
    entropies = []
    for text in (case.log, log):
        with engine.session(_DENSE) as session:
            tokenizer = engine.tokenizer
            assert tokenizer is not None
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{text}\n\n{case.question}"}],
                add_generation_prompt=True,
                tokenize=False,
            )
            answer = "".join(f" {word}" for word in rest)
            session.decode(
                tokenizer.encode(f"{prompt}{answer}", add_special_tokens=False), max_new_tokens=0
            )
            shares = session.next_logits().log_softmax(-1)
        entropies.append(float(-(shares.exp() * shares).sum()))
        known = text == case.log
        best = str(tokenizer.decode([int(shares.argmax())]))
        assert (best == f" {value}") == known
    assert entropies[0] < 0.1 and entropies[1] > 0.5
