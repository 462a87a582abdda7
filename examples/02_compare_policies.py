"""Swap the policy and compare: one prefilled history, forked once per policy and question.

    python examples/02_compare_policies.py
    python examples/02_compare_policies.py --model PATH --selected-tokens 1024

Every policy answers the same questions behind the same history, which is prefilled once. Columns:

    slow      share of tokens for which the whole history was read; lower is cheaper
    agrees    tokens before the first one that differs from the dense answer, of the dense answer's
    right     questions answered word for word as expected (means little with --model)
    KL        what fast steps changed in the history: the next-token distribution behind the same
              ids, read densely from this session's keys and from those of a dense one, mean of
              KL(dense || policy) over every eighth position of the answer, in nats; lower is closer
    ms/token  wall clock per generated token, prefill left out
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sfi_agent import Engine, Session, SessionConfig
from sfi_agent.embedded import DEFAULT_SYSTEM, Case, checkpoint_path, make_conversation, score

KINDS = ("attribute", "report", "chain", "report")
"""The first question is answered densely, once, and becomes part of the shared history."""
KL_STRIDE_TOKENS = 8


@dataclass
class Tally:
    """What one policy did, over all questions."""

    agreeing_tokens: int = 0
    dense_tokens: int = 0
    right: int = 0
    questions: int = 0
    dense_passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    divergences_nats: list[float] = field(default_factory=list)

    def row(self, name: str) -> str:
        """One line of the table."""
        divergence = sum(self.divergences_nats) / max(1, len(self.divergences_nats))
        return (
            f"{name:26} {self.dense_passes / self.tokens:6.1%} "
            f"{f'{self.agreeing_tokens}/{self.dense_tokens}':>9} "
            f"{f'{self.right}/{self.questions}':>6} {divergence:10.2g} "
            f"{1000 * self.seconds / self.tokens:9.1f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the policies and print a table."""
    options = parse(arguments)
    first, *rest = make_conversation(
        options.seed, log_tokens=options.log_tokens, turns=len(KINDS), kinds=KINDS
    ).turns
    dense = SessionConfig(mode="dense", sampling={"max_new_tokens": options.max_new_tokens})
    engine = load_engine(options.model)
    with engine.session(dense, system=DEFAULT_SYSTEM) as base:
        base.send(first.prompt)
        print(
            f"{len(base.token_ids):,} tokens of history, prefilled once; {len(rest)} questions; "
            f"{options.selected_tokens} selected tokens\n"
        )
        print(f"{'policy':26} {'slow':>6} {'agrees':>9} {'right':>6} {'KL':>10} {'ms/token':>9}")
        answers = [answer_ids(base, case) for case in rest]
        for name, config in {"dense": dense, **policies(dense, options.selected_tokens)}.items():
            tally = Tally()
            for case, dense_answer in zip(rest, answers, strict=True):
                measure(base, config, case, dense_answer, tally)
            print(tally.row(name), flush=True)


def policies(base: SessionConfig, selected_tokens: int) -> dict[str, SessionConfig]:
    """What is compared: presets with one budget, and `balanced` with other selectors."""
    memory = {"selected_tokens": selected_tokens, "recent_tokens": 128}
    sampling = base.sampling
    named = {
        name: SessionConfig.preset(name, memory=memory, sampling=sampling)
        for name in ("faithful", "balanced", "fast", "published")
    }
    for selector in ("span", "random", "window"):
        swapped = named["balanced"].replace(selector={"name": selector})
        named[f"balanced, {selector} selector"] = swapped
    return named


def answer_ids(base: Session, case: Case) -> list[int]:
    """The answer of dense decoding, as token ids."""
    with base.fork() as child:
        return [step.token_id for step in child.send(case.question).steps]


def measure(
    base: Session, config: SessionConfig, case: Case, dense_answer: list[int], tally: Tally
) -> None:
    """Answer one question under a policy, behind the shared history, and add it to the tally."""
    with base.fork(config) as child:
        reply = child.send(case.question)
        steps = reply.steps
        pairs = zip(dense_answer, (step.token_id for step in steps), strict=False)
        differing = [index for index, (one, other) in enumerate(pairs) if one != other]
        tally.agreeing_tokens += differing[0] if differing else min(len(dense_answer), len(steps))
        tally.dense_tokens += len(dense_answer)
        tally.right += score(case, reply.text).exact
        tally.questions += 1
        tally.tokens += len(steps)
        tally.dense_passes += sum(step.kind != "fast" for step in steps[1:])
        tally.seconds += sum(step.seconds for step in steps[1:])
        tally.divergences_nats += divergences(base, child, steps[0].position)


def divergences(base: Session, child: Session, answer_start: int) -> list[float]:
    """KL(dense || policy) in nats at every eighth position of the child's answer."""
    ids, past = child.token_ids, base.token_ids
    shared = next((i for i, (a, b) in enumerate(zip(past, ids, strict=False)) if a != b), len(past))
    found = []
    with base.fork() as twin:
        twin.rewind(twin.mark(shared))
        twin.decode(ids[shared:], max_new_tokens=0)
        # Backwards, because a rewind gives up what lies behind it.
        for position in range(len(ids) - 1, answer_start, -KL_STRIDE_TOKENS):
            logs = []
            for session in (twin, child):
                session.rewind(session.mark(position))
                logs.append(session.next_logits().double().log_softmax(-1))
            exact, ours = logs
            found.append(float((exact.exp() * (exact - ours)).sum()))
    return found


def load_engine(model: str | None) -> Engine:
    """The engine of a directory or Hub id, or of the embedded model."""
    if model is not None:
        return Engine.from_pretrained(model)
    # The embedded model is so small that threads mostly wait for each other.
    torch.set_num_threads(1)
    return Engine.from_pretrained(checkpoint_path(), device="cpu", dtype="float32")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="directory or Hub id; default: the embedded model")
    parser.add_argument("--selected-tokens", type=int, default=256, help="budget; default: 256")
    parser.add_argument("--log-tokens", type=int, default=3000, help="length of the log")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="per answer")
    parser.add_argument("--seed", type=int, default=1, help="which log and questions")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
