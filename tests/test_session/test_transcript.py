"""Ids are the truth, messages a view; cutting and copying keep both in step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.errors import InputError
from sfi_agent.session.events import ToolCall
from sfi_agent.session.transcript import Transcript
from tests.test_session.helpers import assistant, call, call_message, result, user


def reread(ids: Sequence[int]) -> tuple[dict[str, Any], list[ToolCall]]:
    return assistant(f"cut at {list(ids)}"), []


def grown() -> Transcript:
    transcript = Transcript()
    transcript.append_prompt([{"role": "system", "content": "s"}, user("u")], [1, 2, 3])
    transcript.append_output([4, 5], call_message(call()), [call()])
    transcript.append_prompt([result("r")], [6, 7])
    transcript.append_output([8, 9], assistant("done"))
    return transcript


def test_messages_and_where_their_ids_are() -> None:
    transcript = grown()
    assert transcript.token_ids == tuple(range(1, 10))
    assert len(transcript) == 9 and transcript.last_id == 9
    roles = [message["role"] for message in transcript.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert transcript.message_starts == (0, 0, 3, 5, 7)
    assert [(span.kind, span.start, span.end) for span in transcript.spans] == [
        ("prompt", 0, 3),
        ("output", 3, 5),
        ("prompt", 5, 7),
        ("output", 7, 9),
    ]
    assert transcript.ends_with_output and transcript.open_calls == ()
    assert transcript.calls_seen == 1


def test_an_empty_transcript() -> None:
    transcript = Transcript()
    assert (transcript.token_ids, transcript.last_id, transcript.messages) == ((), None, [])
    assert not transcript.ends_with_output and transcript.open_calls == ()


def test_open_calls_wait_until_something_follows() -> None:
    transcript = grown()
    transcript.cut(5, reread)
    assert list(transcript.open_calls) == [call()]
    transcript.append_prompt([user("never mind")], [6])
    assert list(transcript.open_calls) == []


def test_messages_are_copies() -> None:
    transcript, message = grown(), user("late")
    transcript.messages[0]["content"] = "changed"
    assert transcript.messages[0]["content"] == "s"
    transcript.append_prompt([message], [10])
    message["content"] = "changed"
    assert transcript.messages[-1]["content"] == "late"


def test_a_cut_inside_an_output_reads_it_again() -> None:
    transcript = grown()
    transcript.cut(8, reread)
    assert transcript.messages[-1] == assistant("cut at [8]")
    assert transcript.ends_with_output
    transcript.cut(4, reread)
    assert transcript.messages[-1] == assistant("cut at [4]")
    # The call is gone: the next one has its number again.
    assert transcript.calls_seen == 0


def test_a_cut_inside_a_prompt_marks_it_incomplete() -> None:
    transcript = grown()
    transcript.cut(6, reread)
    assert [message["role"] for message in transcript.messages][-1] == "tool"
    assert not transcript.spans[-1].complete and not transcript.ends_with_output
    transcript.cut(5, reread)
    assert all(span.complete for span in transcript.spans)


@pytest.mark.parametrize("count", [-1, 10])
def test_a_cut_out_of_range_is_refused(count: int) -> None:
    transcript = grown()
    with pytest.raises(InputError, match="0 to 9"):
        transcript.cut(count, reread)
    with pytest.raises(InputError):
        transcript.replace_from(count, [1], [])
    assert transcript.token_ids == tuple(range(1, 10))


def test_a_copy_goes_its_own_way() -> None:
    parent = grown()
    before = (parent.token_ids, parent.messages, parent.spans)
    child = parent.copy()
    child.append_prompt([user("child")], [10])
    child.cut(4, reread)
    assert (parent.token_ids, parent.messages, parent.spans) == before


@pytest.mark.parametrize(
    ("kept", "starts"), [(2, (0,) * 6), (3, (0, 0, 3, 3, 3, 3)), (6, (0, 0, 3, 5, 5, 5))]
)
def test_a_rerendered_chat_is_one_prompt_behind_the_spans_that_are_kept(
    kept: int, starts: tuple[int, ...]
) -> None:
    transcript = grown()
    messages = [*transcript.messages, user("next")]
    transcript.replace_from(kept, [20, 21], messages)
    assert transcript.token_ids == (*range(1, kept + 1), 20, 21)
    assert transcript.messages == messages
    assert transcript.message_starts == starts
    assert transcript.calls_seen == 1
    transcript.cut(3, reread)
    assert transcript.messages == messages[: 2 if kept >= 3 else 6]


def test_raw_ids_carry_no_message() -> None:
    transcript = grown()
    transcript.append_raw([])
    assert transcript.ends_with_output
    transcript.append_raw([10, 11])
    assert transcript.token_ids[-2:] == (10, 11)
    assert not transcript.ends_with_output
    transcript.cut(10, reread)
    assert transcript.spans[-1].kind == "raw" and transcript.last_id == 10


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.tuples(st.sampled_from("por"), st.integers(1, 3)), max_size=8),
    cut_at=st.integers(0, 24),
)
def test_spans_always_cover_all_ids(parts: list[tuple[str, int]], cut_at: int) -> None:
    transcript, counter = Transcript(), 0
    for kind, length in parts:
        ids = list(range(counter, counter + length))
        counter += length
        if kind == "p":
            transcript.append_prompt([user(str(ids))], ids)
        elif kind == "o":
            transcript.append_output(ids, assistant(str(ids)))
        else:
            transcript.append_raw(ids)
    transcript.cut(min(cut_at, counter), reread)
    assert transcript.token_ids == tuple(range(min(cut_at, counter)))
    edges = [0] + [span.end for span in transcript.spans]
    assert edges[:-1] == [span.start for span in transcript.spans]
    assert edges[-1] == len(transcript)
    assert all(span.start < span.end for span in transcript.spans)
