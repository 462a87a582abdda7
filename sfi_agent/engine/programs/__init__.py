"""Steps of many sequences as programs: fixed addresses, captured once, replayed per step.

    cohort          sequences in slots, and tables of where their keys and values lie
    control         the few numbers per slot that change from step to step
    program         one kind of step for a cohort: the forward pass, its draw, its captured graph
    layer_steps     the attention of a program's layers, and the evidence it leaves
    refreshing      from evidence to filled memories
    compilation     a model's layers compiled while a program is captured
    executor        executes the requests of decodings with programs

What a program computes is what `engine/eager.py` computes with plain forward passes; the same
decoder, detectors and selectors stand above both. On a CPU programs run uncaptured over the plain
references, which is for tests.
"""
