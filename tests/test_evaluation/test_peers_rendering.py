"""Cases as token ids: one rendering for all arms and both protocols."""

from __future__ import annotations

import pytest

from sfi_agent import Engine, SessionConfig
from sfi_agent.embedded import checkpoint_path
from sfi_agent.errors import InputError, TemplateError
from sfi_agent.evaluation.peers.exchange import PlannedCase
from sfi_agent.evaluation.peers.office_turns import OfficeConversation
from sfi_agent.evaluation.peers.questions import peer_task
from sfi_agent.evaluation.peers.rendering import CaseRenderer
from sfi_agent.evaluation.peers.sessions import play_sessions
from sfi_agent.evaluation.tasks.task import Case, ToolExchange, Turn
from tests.chat_templates import CHATML
from tests.families import tiny_engine
from tests.tiny_tokenizers import chatml_tokenizer


@pytest.fixture(scope="module")
def embedded() -> Engine:
    return Engine.from_pretrained(checkpoint_path())


def case_of(*questions: str, context: str = "Ada has room 3. Bo has room 4.") -> Case:
    turns = tuple(Turn(question, "", ("yes",), 8) for question in questions)
    return Case("task", 0, "Answer.", context, turns)


def whole(case: PlannedCase) -> list[int]:
    return [*case.context_ids, *(token for turn in case.turns for token in turn.ids)]


def test_both_protocols_have_the_same_ids_and_they_are_the_templates(embedded: Engine) -> None:
    renderer, case = CaseRenderer(embedded), case_of("Which room has Ada?")
    dense, sparse = (renderer.render(case, name) for name in ("dense_question", "sparse_question"))
    assert whole(dense) == whole(sparse)
    assert dense.context_ids == sparse.context_ids
    messages = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": f"{case.context}\n\nWhich room has Ada?"},
    ]
    text = renderer.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert renderer.tokenizer.decode(whole(dense)) == text
    assert renderer.tokenizer.decode(dense.context_ids).endswith("Bo has room 4.")


def test_later_turns_go_on_behind_the_stop_id(embedded: Engine) -> None:
    renderer = CaseRenderer(embedded)
    case = renderer.render(case_of("First?", "Second?", "Third?"), "dense_question")
    text = renderer.tokenizer.decode
    assert text(case.closing_ids) == "<|im_end|>" and case.closing_ids[0] in case.stop_ids
    for turn, question in zip(case.turns[1:], ("Second?", "Third?"), strict=True):
        assert text(turn.ids) == (
            f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_the_dense_model_answers_a_rendered_conversation(embedded: Engine) -> None:
    task, renderer = OfficeConversation("easy", turns=2), CaseRenderer(embedded)
    made = task.make_case(context_tokens=600, seed=5, count_tokens=renderer.count_tokens)
    case = renderer.render(made, "dense_question")
    (run,) = play_sessions(embedded, {"dense": SessionConfig(mode="dense")}, [case])
    for turn, played in zip(made.turns, run.turns, strict=True):
        answer = renderer.tokenizer.decode(list(played.output_ids), skip_special_tokens=True)
        assert task.score(turn, answer).exact
        assert played.output_ids[-1] in case.stop_ids


def test_an_answer_prefix_stands_behind_the_generation_prompt(embedded: Engine) -> None:
    renderer = CaseRenderer(embedded)
    case = Case("task", 0, "", "Context.", (Turn("Q?", " The room", ("3",), 8),) * 2)
    for turn in renderer.render(case, "dense_question").turns:
        assert renderer.tokenizer.decode(turn.ids).endswith("<|im_start|>assistant\n The room")


def test_plain_text_without_a_template() -> None:
    tokenizer = chatml_tokenizer(None)
    renderer = CaseRenderer(Engine(tiny_engine("qwen3").model, tokenizer))
    case = renderer.render(case_of("First?", "Second?"), "sparse_question")
    assert tokenizer.decode(whole(case)) == (
        "Answer.\n\nAda has room 3. Bo has room 4.\n\nFirst?\n\n\nSecond?\n"
    )
    assert case.closing_ids == ()


def test_a_question_without_a_context_is_behind_the_system_prompt(embedded: Engine) -> None:
    renderer = CaseRenderer(embedded)
    case = renderer.render(case_of("Who?", context=""), "sparse_question")
    assert renderer.tokenizer.decode(case.context_ids).endswith("<|im_start|>user\n")
    assert renderer.tokenizer.decode(case.turns[0].ids).startswith("Who?<|im_end|>")


def test_what_cannot_be_rendered_is_refused_by_name(embedded: Engine) -> None:
    renderer = CaseRenderer(embedded)
    exchange = ToolExchange("open_log", {}, "text")
    with_tools = Case("tool", 7, "", "c", (Turn("q", "", ("r",), 8, calls=(exchange,)),))
    with pytest.raises(InputError, match="case 7 of tool; got a case with tools"):
        renderer.render(with_tools, "dense_question")
    with pytest.raises(InputError, match=r"allowed: \d+ tokens in this model"):
        renderer.render(case_of("q", context="room " * 16_365), "dense_question")
    template = CHATML.replace("{{ message.content }}", "{{ message.content | upper }}")
    shouting = chatml_tokenizer(template)
    loud = CaseRenderer(Engine(tiny_engine("qwen3").model, shouting))
    with pytest.raises(TemplateError, match="changes the text of the first message"):
        loud.render(case_of("q"), "dense_question")
    bare = CaseRenderer(Engine(tiny_engine("qwen3").model, chatml_tokenizer(None)))
    with pytest.raises(InputError, match="nothing before the first question"):
        bare.render(Case("task", 0, "", "", case_of("q").turns), "dense_question")
    with pytest.raises(InputError, match="without a tokenizer"):
        CaseRenderer(Engine(tiny_engine("qwen3").model))


@pytest.mark.parametrize("name", ["office_conversation_hard", "office_late_log_easy"])
def test_office_turns_fit_their_length_and_score_their_answers(name: str, embedded: Engine) -> None:
    task, count = peer_task(name), CaseRenderer(embedded).count_tokens
    for context_tokens in (1200, 3000):
        case = task.make_case(context_tokens=context_tokens, seed=3, count_tokens=count)
        assert case == task.make_case(context_tokens=context_tokens, seed=3, count_tokens=count)
        texts = [case.system, case.context]
        for turn in case.turns:
            texts += [turn.question, turn.reference_answer]
            assert task.score(turn, f" {turn.reference_answer}").exact
            assert all(task.part_results(turn, turn.reference_answer))
            assert task.score(turn, turn.references[0]).right == 1
            assert task.score(turn, "no").right == 0
        total = sum(map(count, texts))
        assert 0.8 * context_tokens < total <= context_tokens
    with pytest.raises(InputError):
        task.make_case(context_tokens=200, seed=3, count_tokens=count)
    assert task.summary.endswith(".") and task.name == name
