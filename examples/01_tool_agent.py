"""A tool-calling agent: it opens a long office log with a tool, then answers questions about it.

    python examples/01_tool_agent.py
    python examples/01_tool_agent.py --model PATH --preset balanced

Shows the tool loop as a stream of events, and after every assistant turn what it cost: how many
tokens were cached, how many were prefilled, and which steps read the whole history.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence

import torch

from sfi_agent import (
    Engine,
    ReasoningDelta,
    Reply,
    Session,
    SessionConfig,
    TextDelta,
    ToolCall,
    ToolResult,
    TurnEnd,
)
from sfi_agent.embedded import DEFAULT_SYSTEM, checkpoint_path, make_conversation

KINDS = ("tool", "report", "tool", "chain")
"""What is asked, in this order; "tool" questions need a call besides the one that opens the log."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the agent and print the conversation."""
    options = parse(arguments)
    conversation = make_conversation(
        options.seed, log_tokens=options.log_tokens, turns=len(KINDS), kinds=KINDS
    )
    config = SessionConfig.preset(
        options.preset,
        memory={"selected_tokens": options.selected_tokens, "recent_tokens": 128},
        sampling={"max_new_tokens": options.max_new_tokens},
    )
    engine = load_engine(options.model)
    with engine.session(config, system=DEFAULT_SYSTEM, tools=conversation.tools) as session:
        ask(session, conversation.opening)
        for case in conversation.turns:
            answer = ask(session, case.question)
            if answer.strip() != case.expected:
                print(f"  expected: {case.expected}")
        stats = session.stats
    print(
        f"\n{stats.generated_tokens} tokens generated, {stats.slow_share:.1%} of them by reading "
        f"all of the history ({stats.history_tokens:,} tokens, {mebibytes(stats.history_bytes)}); "
        f"the memory of the fast steps takes {mebibytes(stats.memory_bytes)}."
    )


def ask(session: Session, question: str) -> str:
    """Let the agent work on one message, show what it does, and return its last answer."""
    print(f"\nuser> {question}")
    answer = ""
    at_line_start = True
    for event in session.stream(question, max_turns=4):
        if isinstance(event, TextDelta | ReasoningDelta):
            print("agent> " * at_line_start + event.text.lstrip("\n"), end="", flush=True)
            at_line_start = False
            continue
        if isinstance(event, ToolCall | ToolResult | TurnEnd) and not at_line_start:
            print()
            at_line_start = True
        if isinstance(event, ToolCall):
            shown = event.error or json.dumps(dict(event.arguments), ensure_ascii=False)
            print(f"agent> [calls {event.name or 'something unreadable'}: {shown}]")
        elif isinstance(event, ToolResult):
            print(f"tool>  {shortened(event.content)}")
        elif isinstance(event, TurnEnd):
            answer = event.reply.text
            print(f"  {cost(event.reply)}")
    return answer


def cost(reply: Reply) -> str:
    """One line about a turn: reuse, kinds of steps, and why some of them were slow."""
    usage, kinds = reply.usage, Counter(step.kind for step in reply.steps)
    reasons = Counter(step.reason for step in reply.steps if step.kind != "fast")
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return (
        f"[{usage.cached_tokens:,} tokens cached, {usage.prefilled_tokens:,} prefilled; "
        f"{kinds['fast']} fast, {kinds['slow']} slow, {kinds['retry']} retried ({why}); "
        f"{reply.finish_reason}]"
    )


def shortened(text: str, limit: int = 90) -> str:
    """The first line of a text, cut, with its full length."""
    line = text.split("\n", 1)[0][:limit]
    return line if line == text else f"{line} ... ({len(text):,} characters)"


def mebibytes(count: int) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:.1f} MiB"


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
    parser.add_argument("--selected-tokens", type=int, default=256, help="budget; default: 256")
    parser.add_argument("--log-tokens", type=int, default=3000, help="length of the log")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="per assistant turn")
    parser.add_argument("--seed", type=int, default=0, help="which log and questions")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
