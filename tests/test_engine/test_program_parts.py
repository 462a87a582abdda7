"""What programs are made of: capacity classes, the control tensor, slots and their tables."""

from __future__ import annotations

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.engine.memory import MemoryLayout
from sfi_agent.engine.programs.cohort import Cohort, geometry_of
from sfi_agent.engine.programs.cohort_programs import capacity_class
from sfi_agent.engine.programs.control import CHAINED, FAST, IDLE, SLOW, Control, SlotStep
from sfi_agent.engine.sampling import Sampler
from sfi_agent.engine.sequence import SequenceState

CPU = torch.device("cpu")
few = settings(max_examples=60, derandomize=True, deadline=None, database=None)


@few
@given(st.integers(1, 2**24), st.integers(0, 2**20))
def test_capacity_classes_hold_what_they_are_for_and_waste_a_quarter_at_most(
    tokens: int, more: int
) -> None:
    size = capacity_class(tokens)
    assert size >= tokens
    assert size <= max(8192, tokens * 5 // 4 + 1)
    assert capacity_class(size) == size, "a class is its own"
    assert capacity_class(tokens + more) >= size
    # Quarter steps between powers of two: a handful of classes per doubling.
    power = 1 << (size.bit_length() - 1)
    assert size % (power // 4) == 0


def test_a_doubling_has_four_classes() -> None:
    classes = {capacity_class(tokens) for tokens in range(8193, 16385, 64)}
    assert len(classes) == 4


slot_steps = st.builds(
    SlotStep,
    kind=st.sampled_from([FAST, SLOW]),
    memory_end=st.integers(0, 5000),
    history_end=st.integers(0, 2**31),
    tokens=st.lists(st.integers(0, 200_000), min_size=1, max_size=3).map(tuple)
    | st.just((CHAINED,)),
    sampler=st.builds(
        Sampler,
        temperature=st.floats(0.0, 10.0),
        top_p=st.floats(1e-9, 1.0),
        top_k=st.integers(0, 1000),
        seed=st.integers(-(2**63), 2**63 - 1),
    ),
    prompt_end=st.integers(0, 2**31),
)


@few
@given(st.lists(st.dictionaries(st.integers(0, 3), slot_steps), min_size=1, max_size=11))
def test_the_control_tensor_holds_the_last_step_and_nothing_of_those_before(
    writes: list[dict[int, SlotStep]],
) -> None:
    """More writes than the ring has places."""
    control = Control(4, 3, CPU)
    address = control.fields.data_ptr()
    for steps in writes:
        control.write(steps)
        assert control.fields.data_ptr() == address
        for slot in range(4):
            step = steps.get(slot)
            if step is None:
                assert not control.fields[slot].any() and int(control.kinds[slot]) == IDLE
                continue
            assert int(control.kinds[slot]) == step.kind
            assert int(control.memory_ends[slot]) == step.memory_end
            assert int(control.history_ends[slot]) == step.history_end
            assert int(control.prompt_ends[slot]) == step.prompt_end
            assert float(control.temperatures[slot]) == step.sampler.temperature
            assert float(control.top_ps[slot]) == step.sampler.top_p
            assert int(control.top_ks[slot]) == step.sampler.top_k
            assert int(control.seeds[slot]) == step.sampler.seed
            rest = (0,) * (3 - len(step.tokens))
            assert tuple(control.tokens[slot].tolist()) == step.tokens + rest


def sequence_of(tokens: int, *, sparse: bool = True) -> SequenceState:
    """Two layers, the second one sliding, with random keys."""
    layout = MemoryLayout(1, 4, 2, CPU) if sparse else None
    sequence = SequenceState((None, 5), layout, frozenset())
    append(sequence, tokens)
    return sequence


def append(sequence: SequenceState, tokens: int) -> None:
    for layer in sequence.layers:
        layer.history.append(torch.randn(2, tokens, 8), torch.randn(2, tokens, 8))
    sequence.processed_tokens += tokens


def check_tables(cohort: Cohort, slot: int, sequence: SequenceState) -> None:
    """The slot's places are the sequence's buffers, in order and with their first positions."""
    for index, layer in enumerate(sequence.layers):
        places = cohort.extent_places(index, [SLOW] * cohort.batch)[slot]
        extents = layer.history.extents
        assert [place.keys.data_ptr() for place in places] == [
            extent.buffer.keys.data_ptr() for extent in extents
        ]
        firsts, first = [], 0
        for extent in extents:
            firsts.append(first)
            first += extent.tokens
        assert [place.first_position for place in places] == firsts


def fork_of(sequence: SequenceState) -> SequenceState:
    child = SequenceState((None, 5), MemoryLayout(1, 4, 2, CPU), frozenset())
    sequence.share_history_with(child)
    return child


def test_tables_follow_growth_forks_and_rewinds() -> None:
    parent = sequence_of(10)
    child = fork_of(parent)
    append(child, 3)
    geometry = geometry_of(child)
    assert geometry is not None and geometry.extents == 2
    cohort = Cohort(geometry, 2, CPU)
    slots = cohort.take_slots([parent, child])
    cohort.place(slots, [parent, child])
    for slot, sequence in zip(slots, (parent, child), strict=True):
        check_tables(cohort, slot, sequence)
    # Growth moves the buffers of both; the child goes on reading what the parent had.
    append(parent, 2000)
    append(child, 2000)
    cohort.place(slots, [parent, child])
    for slot, sequence in zip(slots, (parent, child), strict=True):
        check_tables(cohort, slot, sequence)
    # Below what a child reads, the parent begins an extent of its own.
    another = fork_of(parent)
    parent.cut(6)
    append(parent, 1)
    cohort.place(slots, [parent, child])
    check_tables(cohort, slots[0], parent)
    assert len(parent.layers[0].history.extents) == 2
    assert another.layers[0].history.tokens == 2010


def test_a_geometry_foresees_the_extent_that_the_next_token_begins() -> None:
    parent = sequence_of(10)
    before = geometry_of(parent)
    child = fork_of(parent)
    assert before is not None and before.extents == 1
    assert geometry_of(parent) == before
    moves = parent.moves.count
    parent.cut(6)
    assert parent.moves.count > moves
    for sequence in (parent, child):
        foreseen = geometry_of(sequence)
        assert foreseen is not None and foreseen.extents == 2
        for layer in sequence.layers:
            layer.history.make_room(1)
        assert geometry_of(sequence) == foreseen


def test_slots_are_kept_then_free_ones_taken_then_those_of_others() -> None:
    sequences = [sequence_of(4) for _ in range(4)]
    geometry = geometry_of(sequences[0])
    assert geometry is not None
    cohort = Cohort(geometry, 2, CPU)
    evicted: list[tuple[SequenceState, int]] = []
    cohort.on_evict = lambda sequence, slot: evicted.append((sequence, slot))
    assert cohort.take_slots(sequences[:2]) == [0, 1]
    assert cohort.take_slots([sequences[1]]) == [1]
    assert cohort.take_slots([sequences[1], sequences[0]]) == [1, 0]
    assert not evicted
    assert cohort.take_slots([sequences[2], sequences[1]]) == [0, 1]
    assert evicted == [(sequences[0], 0)]
    # Nobody is told of a sequence that is gone, and its slot counts as free.
    del sequences[1], evicted[:]
    gc.collect()
    assert cohort.take_slots([sequences[2]]) == [1]
    assert not evicted


def test_an_evicted_sequence_takes_the_starts_of_its_memory_along() -> None:
    first, second = sequence_of(20), sequence_of(20)
    geometry = geometry_of(first)
    assert geometry is not None
    cohort = Cohort(geometry, 1, CPU)
    starts = {}
    for number, sequence in enumerate((first, second, first, second)):
        layout, memory = sequence.layout, sequence.layers[0].memory
        assert layout is not None and memory is not None
        if sequence not in starts:
            layout.begin_segment(layout.plan(20), 4)
            memory.allocate(sequence.layers[0].history)
            memory.starts = torch.tensor([number, number + 1])
            starts[sequence] = memory.starts.clone()
            layout.ready = True
        slots = cohort.take_slots([sequence])
        cohort.place(slots, [sequence])
        assert torch.equal(cohort.memory_starts[0, 0], starts[sequence])
        assert torch.equal(memory.starts, starts[sequence])
        assert memory.starts.data_ptr() == cohort.memory_starts[0, 0].data_ptr()
    kept = first.layers[0].memory
    assert kept is not None and torch.equal(kept.starts, starts[first])
