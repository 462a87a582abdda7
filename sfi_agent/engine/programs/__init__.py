"""Steps of many sequences as programs: fixed addresses, captured once, replayed per step.

    cohort          sequences in slots, and tables of where their keys and values lie
    control         the few numbers per slot that change from step to step
    slot_steps      requests as those numbers, and what a step leaves in a sequence's state
    program         one kind of step for a cohort: the forward pass, its draw, its captured graph
    layer_steps     the attention of a program's layers, and the evidence it leaves
    refreshing      from evidence to filled memories
    compilation     a model's layers compiled while a program is captured
    cohort_programs the programs of a cohort, made when they are first needed
    seats           the cohorts of a model, and which sequences sit where
    support         which requests programs can execute, and why not the others
    ahead           steps that are begun before anybody has seen the tokens they process
    block_steps     blocks of rectify and verify, and refreshes from the queries they leave
    executor        executes the requests of decodings with programs
    choice          programs where they can run, eager steps with a reason where they cannot

What a program computes is what `engine/eager.py` computes with plain forward passes; the same
decoder, detectors and selectors stand above both. On a CPU programs run uncaptured over the plain
references, which is for tests.
"""
