"""Playing cases: every policy gets what a session of its own would, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, update_wrapper
from typing import Any

import pytest

from sfi_agent import (
    ConfigError,
    ContextOverflowError,
    Engine,
    InputError,
    SessionConfig,
    TemplateError,
)
from sfi_agent.embedded import DEFAULT_SYSTEM, checkpoint_path
from sfi_agent.evaluation.dialogue import Dialogue, token_counter
from sfi_agent.evaluation.play import CaseRun, TurnRun, play_case
from sfi_agent.evaluation.tasks import TASKS, Case, Score, Turn, task_named
from sfi_agent.session.session import Session
from tests.families import FAMILIES, build_model
from tests.tiny_tokenizers import chatml_tokenizer, metaspace_tokenizer

MEMORY = {"selected_tokens": 64, "recent_tokens": 32}
FAST = SessionConfig(memory=MEMORY)
EXACT = SessionConfig(
    slow_step="verify", memory=MEMORY, refresh={"min_segment_tokens": 4, "max_segment_tokens": 24}
)


@pytest.fixture(scope="module")
def embedded() -> Iterator[Engine]:
    yield Engine.from_pretrained(checkpoint_path(), device="cpu")


@lru_cache
def tiny(template: bool = True, tokenizer: str = "chatml") -> Engine:
    """A random model that writes what it likes, for anything but the answers."""
    words: Any = chatml_tokenizer() if tokenizer == "chatml" else metaspace_tokenizer()
    if not template:
        words.chat_template = None
    family = next(item for item in FAMILIES if item.name == "qwen3")
    model = build_model(family, vocab_size=len(words), max_position_embeddings=4096)
    model.generation_config.eos_token_id = None
    return Engine(model, words)


def office(engine: Engine, name: str, seed: int = 4, context_tokens: int = 900) -> Case:
    count = token_counter(engine.tokenizer)
    return task_named(name).make_case(context_tokens=context_tokens, seed=seed, count_tokens=count)


def short_case(turns: int = 3, **changes: Any) -> Case:
    asked = tuple(
        Turn(f"What is number {index}?", f"Number {index} is", (f"{index}{index}",), 6)
        for index in range(turns)
    )
    case = Case("mt_kv", 0, "", "Number 0 is 00. Number 1 is 11. Number 2 is 22. " * 4, asked)
    return replace(case, **changes)


# ---------------------------------------------------------------- answers of the embedded model


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("office_report_easy", "dense_question"),
        ("office_chain", "sparse_question"),
        ("office_tool", "dense_question"),
        ("office_tool", "sparse_question"),
    ],
)
def test_exact_says_what_dense_says_and_dense_is_right(
    embedded: Engine, name: str, protocol: Any
) -> None:
    case = office(embedded, name)
    runs = play_case(embedded, case, {"exact": EXACT}, protocol=protocol)
    assert list(runs) == ["dense", "exact"]
    for dense, exact in zip(runs["dense"].turns, runs["exact"].turns, strict=True):
        assert dense.score.exact
        assert exact.output_ids == dense.output_ids and exact.score == dense.score
        assert exact.agreed_tokens == len(exact.output_ids) == len(exact.steps)
        assert exact.dense_passes < dense.dense_passes / 2
        assert 0 < exact.accepted_tokens <= exact.drafted_tokens
        assert dense.drafted_tokens == 0 and dense.dense_passes == len(dense.steps) - 1
        assert bool(exact.question_steps) == (protocol == "sparse_question")


def test_the_calls_of_a_tool_turn_are_scored_and_run(embedded: Engine) -> None:
    case = office(embedded, "office_tool")
    (run,) = play_case(embedded, case, {}).values()
    calls, final = run.turns
    assert calls.score.parts == len(case.turns[0].calls) and calls.score.exact
    assert final.output.strip() == case.turns[1].reference_answer
    assert calls.output == "\n".join(case.turns[0].references)


def test_without_a_call_the_turn_of_results_is_not_played(embedded: Engine) -> None:
    case = office(embedded, "office_tool")
    calls, final = case.turns
    subject = final.references[0].split()[0]
    other = replace(calls, question=f"What is the badge of {subject}?")
    (own,) = play_case(embedded, replace(case, turns=(other, final)), {}).values()
    said, silent = own.turns
    tokenizer: Any = embedded.tokenizer
    assert f"{subject} keeps badge" in tokenizer.decode(said.output_ids)
    assert said.output == "" and said.score.right == 0, "it was to call a tool"
    assert (silent.output_ids, silent.steps, silent.output) == ((), (), "")
    assert silent.score == Score(0, len(final.references), False)
    (given,) = play_case(
        embedded, replace(case, turns=(other, final)), {}, answers="reference"
    ).values()
    assert given.turns[0].score.right == 0 and given.turns[1].output_ids, "the calls were given"


def test_a_wrong_call_is_run_as_it_is(embedded: Engine) -> None:
    """The model's own calls bring their own results, here an error that names the tools."""
    case = office(embedded, "office_tool")
    (run,) = play_case(embedded, replace(case, tools=broken_tools(case)), {}).values()
    assert run.turns[0].score.exact and run.turns[1].output_ids
    assert not run.turns[1].score.exact, "the results say something else"


def broken_tools(case: Case) -> tuple[Any, ...]:
    """The same tools with other results."""

    def shifted(tool: Any) -> Any:
        def call(*values: int, **arguments: int) -> str:
            return str(tool(**{name: value + 1 for name, value in arguments.items()}))

        return update_wrapper(call, tool)

    return tuple(shifted(tool) for tool in case.tools)


def test_a_session_of_messages_would_say_the_same(embedded: Engine) -> None:
    case = office(embedded, "office_long", 0, 1500)
    case = replace(case, turns=tuple(replace(t, max_new_tokens=90) for t in case.turns[:3]))
    runs = play_case(embedded, case, {"fast": FAST})
    for policy, config in (("dense", SessionConfig(mode="dense")), ("fast", FAST)):
        limited = config.replace(sampling={"max_new_tokens": 90})
        with embedded.session(limited, system=DEFAULT_SYSTEM) as session:
            for index, played in enumerate(runs[policy].turns):
                question = case.turns[index].question if index else case.opening
                reply = session.send(question)
                assert reply.text.strip() == played.output.strip()
                said = [step.token_id for step in reply.steps]
                assert said == list(played.output_ids)
                assert [step.kind for step in reply.steps] == [s.kind for s in played.steps]


# ---------------------------------------------------------------- mechanics, on random models


@pytest.mark.parametrize(
    ("template", "tokenizer"), [(True, "chatml"), (False, "chatml"), (False, "metaspace")]
)
def test_policies_answer_as_sessions_of_their_own(template: bool, tokenizer: str) -> None:
    engine, case = tiny(template, tokenizer), short_case()
    policies = {"fast": FAST, "other": FAST.replace(selector={"name": "page"})}
    together = play_case(engine, case, policies)
    for name, config in policies.items():
        alone = play_case(engine, case, {name: config})[name]
        assert outputs(alone) == outputs(together[name])
    dialogue = Dialogue(engine, case)
    with engine.session(FAST) as session:
        ids = session.decode(
            dialogue.first_prompt.ids, max_new_tokens=6, stop_ids=dialogue.stop_ids
        )
    assert ids == list(together["fast"].turns[0].output_ids)


def outputs(run: CaseRun) -> list[tuple[tuple[int, ...], list[str]]]:
    return [(turn.output_ids, [step.kind for step in turn.steps]) for turn in run.turns]


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("protocol", ["dense_question", "sparse_question"])
def test_the_history_holds_the_references_and_not_what_was_said(
    template: bool, protocol: Any
) -> None:
    engine, case = tiny(template), short_case()
    sessions: dict[str, Session] = {}
    histories: list[list[int]] = []

    def note(policy: str, index: int, run: TurnRun) -> None:
        if policy == "fast":
            histories.append(sessions["fast"].token_ids)

    play_case(
        engine,
        case,
        {"fast": FAST},
        protocol=protocol,
        answers="reference",
        on_session=sessions.__setitem__,
        on_turn=note,
    )
    tokenizer: Any = engine.tokenizer
    dialogue = Dialogue(engine, case)
    text = tokenizer.decode(histories[-1])
    for turn in case.turns[:2]:
        assert f"{turn.answer_prefix} {turn.reference_answer}" in text
    last = case.turns[-1]
    assert text.endswith(last.answer_prefix), "generated tokens are thrown away"
    reference = list(dialogue.reference_ids(case.turns[0]))
    said = reference[: len(reference) - (reference[-1] in dialogue.stop_ids)]
    start = len(histories[0])
    assert histories[1][:start] == histories[0]
    assert histories[1][start : start + len(said)] == said


def test_reference_answers_make_later_turns_independent_of_earlier_outputs() -> None:
    engine, case = tiny(), short_case()
    shorter = replace(case, turns=(replace(case.turns[0], max_new_tokens=1), *case.turns[1:]))
    whole, cut = (
        play_case(engine, item, {"fast": FAST}, answers="reference") for item in (case, shorter)
    )
    assert len(cut["fast"].turns[0].output_ids) == 1
    for name in ("dense", "fast"):
        assert [t.output_ids for t in cut[name].turns[1:]] == [
            t.output_ids for t in whole[name].turns[1:]
        ]


def test_a_sparse_question_is_decoded_step_by_step() -> None:
    engine, case = tiny(), short_case()
    never = FAST.replace(boundaries=[{"name": "never"}], refresh={"max_segment_tokens": 512})
    runs = play_case(engine, case, {"never": never}, protocol="sparse_question")
    dialogue = Dialogue(engine, case)
    prompt = dialogue.first_prompt
    steps = runs["never"].turns[0].question_steps
    assert tuple(step.token_id for step in steps) == prompt.ids[prompt.question_start :]
    assert {step.kind for step in steps[1:]} == {"fast"}
    assert all(not turn.question_steps for turn in runs["dense"].turns)
    tokenizer: Any = engine.tokenizer
    for turn, run in zip(case.turns, runs["never"].turns, strict=True):
        followed = tokenizer.decode([step.token_id for step in run.question_steps])
        assert turn.question in followed and followed.endswith(turn.answer_prefix)
        assert case.context[:20] not in followed


def test_both_protocols_agree_where_the_memory_holds_everything() -> None:
    engine, case = tiny(), short_case()
    whole = FAST.replace(memory={"selected_tokens": 2048})
    dense_question = play_case(engine, case, {"whole": whole})
    sparse_question = play_case(engine, case, {"whole": whole}, protocol="sparse_question")
    for runs in (dense_question, sparse_question):
        dense = [turn.output_ids for turn in runs["dense"].turns]
        assert [turn.output_ids for turn in runs["whole"].turns] == dense
        assert all(t.agreed_tokens == len(t.output_ids) for t in runs["whole"].turns)


def test_agreement_is_the_common_prefix_with_dense() -> None:
    engine = tiny()
    window = FAST.replace(
        selector={"name": "window"}, memory={"sink_tokens": 0, "recent_tokens": 1}
    )
    long = short_case(1)
    long = replace(long, turns=(replace(long.turns[0], max_new_tokens=24),))
    runs = play_case(engine, long, {"window": window})
    dense, sparse = (runs[name].turns[0] for name in ("dense", "window"))
    agreed = sparse.agreed_tokens
    assert dense.agreed_tokens == len(dense.output_ids) == 24
    assert agreed < 24, "this memory is too small to follow a random model"
    assert sparse.output_ids[:agreed] == dense.output_ids[:agreed]
    assert sparse.output_ids[agreed] != dense.output_ids[agreed]


def test_callbacks_hear_of_everything_in_order() -> None:
    heard: list[object] = []
    runs = play_case(
        tiny(),
        short_case(2),
        {"fast": FAST},
        on_session=lambda name, session: heard.append((name, session.status, session.config.mode)),
        on_turn=lambda name, index, run: heard.append((name, index)),
        on_run=lambda run: heard.append(run.policy),
    )
    assert heard == [
        ("dense", "open", "dense"),
        ("dense", 0),
        ("dense", 1),
        "dense",
        ("fast", "open", "slow_fast"),
        ("fast", 0),
        ("fast", 1),
        "fast",
    ]
    assert [len(run.turns) for run in runs.values()] == [2, 2]


def test_an_own_judge_is_asked() -> None:
    class Judge:
        name, summary = "mine", "Mine."

        def make_case(self, **arguments: Any) -> Case:
            raise NotImplementedError

        def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
            return (True,)

        def score(self, turn: Turn, output: str) -> Score:
            return Score(7, 9, False)

    case = replace(short_case(1), task="mine")
    runs = play_case(tiny(), case, {}, task=Judge())
    assert runs["dense"].turns[0].score == Score(7, 9, False)
    with pytest.raises(InputError, match="no task has this name; got 'mine'"):
        play_case(tiny(), case, {})


def test_dense_samples_like_the_others() -> None:
    sampling = {"temperature": 0.8, "seed": 5}
    sampled = FAST.replace(sampling=sampling, memory={"selected_tokens": 2048})
    runs = play_case(tiny(), short_case(), {"sampled": sampled})
    greedy = play_case(tiny(), short_case(), {})
    dense = [turn.output_ids for turn in runs["dense"].turns]
    assert [turn.output_ids for turn in runs["sampled"].turns] == dense
    assert dense != [turn.output_ids for turn in greedy["dense"].turns]
    with pytest.raises(InputError, match="policies of different sampling"):
        play_case(tiny(), short_case(), {"sampled": sampled, "greedy": FAST})
    both = {"dense": SessionConfig(mode="dense"), "sampled": sampled, "greedy": FAST}
    assert list(play_case(tiny(), short_case(1), both)) == ["dense", "sampled", "greedy"]


# ---------------------------------------------------------------- refused before anything runs


def refuse(error: type[Exception], match: str, case: Case, **arguments: Any) -> None:
    """The error comes, and no policy has begun."""
    begun: list[str] = []
    engine = arguments.pop("engine", tiny())
    policies = arguments.pop("policies", {"fast": FAST})
    with pytest.raises(error, match=match):
        play_case(
            engine, case, policies, on_session=lambda name, _: begun.append(name), **arguments
        )
    assert begun == []


def test_unknown_choices() -> None:
    refuse(
        InputError, "protocol='dense'; allowed: dense_question or", short_case(), protocol="dense"
    )
    refuse(InputError, "answers='both'; allowed: own or reference", short_case(), answers="both")


def test_a_policy_named_dense_must_be_dense() -> None:
    refuse(InputError, "mode 'slow_fast'; allowed: dense", short_case(), policies={"dense": FAST})


def test_a_policy_that_does_not_fit_the_model() -> None:
    deep = FAST.replace(memory={"dense_layers": [40]})
    refuse(ConfigError, "layers \\[40\\]", short_case(), policies={"deep": deep})


@pytest.mark.parametrize("answers", ["own", "reference"])
def test_a_case_that_does_not_fit(answers: str) -> None:
    engine, case = tiny(), short_case()
    room = engine.shape.context_limit_tokens
    long = replace(case, context=case.context * 40)
    refuse(ContextOverflowError, "longest answers; allowed: 4096", long, answers=answers)
    turns = tuple(replace(turn, max_new_tokens=room // 3) for turn in case.turns)
    refuse(ContextOverflowError, "fewer context_tokens", replace(case, turns=turns))


def test_an_engine_without_a_tokenizer_and_a_case_without_turns() -> None:
    bare = Engine(tiny().model)
    refuse(InputError, "an engine without tokenizer", short_case(), engine=bare)
    refuse(InputError, "a case without turns", replace(short_case(), turns=()))


def test_tools_need_a_chat_template() -> None:
    case = office(tiny(), "office_tool", context_tokens=6000)
    plain = tiny(template=False)
    refuse(TemplateError, "which has tools; got a tokenizer without", case, engine=plain)


def test_a_sparse_question_needs_something_in_front_of_it() -> None:
    engine, case = tiny(template=False), replace(short_case(1), context="")
    refuse(InputError, "prefilled densely", case, engine=engine, protocol="sparse_question")
    assert play_case(engine, case, {"fast": FAST})["fast"].turns[0].output_ids


def test_every_task_can_be_written_as_ids_of_any_tokenizer() -> None:
    """Prompts, follow-ups and right answers of all tasks, with and without a template."""
    for index, (name, task) in enumerate(TASKS.items()):
        for engine in (tiny(), *((tiny(False, "metaspace"),) if index % 3 == 0 else ())):
            tokenizer: Any = engine.tokenizer
            case = task.make_case(
                context_tokens=7600, seed=1, count_tokens=token_counter(tokenizer)
            )
            if case.tools and not tokenizer.chat_template:
                continue
            dialogue = Dialogue(engine, case)
            prompt = dialogue.first_prompt
            assert 0 < prompt.question_start < len(prompt.ids)
            text = tokenizer.decode(prompt.ids)
            assert case.turns[0].question in text and text.endswith(
                case.turns[0].answer_prefix or ("" if tokenizer.chat_template else "Answer:")
            )
            answer = tokenizer.decode(dialogue.reference_ids(case.turns[0]))
            if not case.turns[0].calls:
                assert case.turns[0].reference_answer in answer, name
