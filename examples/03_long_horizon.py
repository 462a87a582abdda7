"""A long session: 32 turns over one history that is never rendered or prefilled again.

    python examples/03_long_horizon.py
    python examples/03_long_horizon.py --model PATH --turns 60

Every turn asks the model to follow links through an office log, or to report what it says. The
history grows with every turn; what a turn has to prefill, and what a fast step has to read, does
not. Columns:

    prompt    tokens that the model answers from
    cached    share of them whose keys and values were there already
    slow      share of the turn's tokens for which the whole history was read
    memory    tokens that the turn's last fast step could see, of the tokens of the history
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from sfi_agent import Engine, Reply, Session, SessionConfig, Usage
from sfi_agent.embedded import DEFAULT_SYSTEM, Case, checkpoint_path, make_conversation, score

KINDS = ("chain", "attribute", "chain", "report")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the session and print one line per turn."""
    options = parse(arguments)
    cases = make_conversation(
        options.seed, log_tokens=options.log_tokens, turns=options.turns, kinds=KINDS
    ).turns
    config = SessionConfig.preset(
        options.preset,
        memory={"selected_tokens": options.selected_tokens, "recent_tokens": 128},
        sampling={"max_new_tokens": options.max_new_tokens},
    )
    engine = load_engine(options.model)
    print(f"{'turn':>4} {'kind':10} {'prompt':>7} {'cached':>7} {'slow':>6} {'memory':>14}  answer")
    usage, right = Usage(), 0
    with engine.session(config, system=DEFAULT_SYSTEM) as session:
        for number, case in enumerate(cases, start=1):
            reply = session.send(case.prompt if number == 1 else case.question)
            is_right = score(case, reply.text).exact
            print(line(number, case, reply, session, is_right), flush=True)
            usage, right = usage + reply.usage, right + is_right
        stats = session.stats
    print(
        f"\n{right} of {len(cases)} answers are the expected ones, word for word.\n"
        f"Prefilled {usage.prefilled_tokens:,} tokens in all; a client that renders and prefills "
        f"the conversation anew at every turn would have prefilled {usage.prompt_tokens:,}.\n"
        f"{stats.generated_tokens:,} tokens generated, {stats.slow_share:.1%} by reading all of "
        f"the history. History {stats.history_bytes / 2**20:.1f} MiB, memory "
        f"{stats.memory_bytes / 2**20:.1f} MiB."
    )


def line(number: int, case: Case, reply: Reply, session: Session, is_right: bool) -> str:
    """One row of the table."""
    usage, steps = reply.usage, reply.steps
    # The first token of a turn comes from the prefill, which is not a step over the history.
    slow = sum(step.kind != "fast" for step in steps[1:]) / len(steps)
    fast = [step.memory_tokens for step in steps if step.kind == "fast"]
    memory = f"{fast[-1]:,}" if fast else "none"
    size = f"{memory}/{session.stats.history_tokens:,}"
    answer = reply.text.strip().replace("\n", " ")
    return (
        f"{number:4} {case.kind:10} {usage.prompt_tokens:7,} "
        f"{usage.cached_tokens / usage.prompt_tokens:7.1%} {slow:6.1%} {size:>14}  "
        f"{'right' if is_right else 'wrong'}: {answer[:60]}"
    )


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
    parser.add_argument("--preset", default="faithful", help="policy; default: faithful")
    parser.add_argument("--turns", type=int, default=32, help="questions; default: 32")
    parser.add_argument("--selected-tokens", type=int, default=256, help="budget; default: 256")
    parser.add_argument("--log-tokens", type=int, default=2000, help="length of the log")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="per answer")
    parser.add_argument("--seed", type=int, default=2, help="which log and questions")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
