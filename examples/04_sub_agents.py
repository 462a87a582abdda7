"""Sub-agents on one long text: read once, forked per question, answered in one event loop.

    python examples/04_sub_agents.py
    python examples/04_sub_agents.py --model PATH --agents 6

The agents share what is prefilled and the steps in which they decode, and have tools that take a
while. Then the first of them is saved, loaded again and asked on. Below each question stands what
its turns found in the history, what they had to process, and the answer.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sfi_agent import Engine, Reply, Session, SessionConfig
from sfi_agent.embedded import DEFAULT_SYSTEM, Case, checkpoint_path, make_conversation

KINDS = ("report", "tool", "chain", "attribute")
TOOL_SECONDS = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the agents and print one line for each."""
    options = parse(arguments)
    office = make_conversation(
        options.seed, log_tokens=options.log_tokens, turns=options.agents + 1, kinds=KINDS
    )
    *cases, last = office.turns
    config = SessionConfig.preset(
        options.preset,
        memory={"selected_tokens": options.selected_tokens, "recent_tokens": 128},
        sampling={"max_new_tokens": options.max_new_tokens},
    )
    tools = [slowed(tool) for tool in office.tools]
    with (
        load_engine(options.model) as engine,
        engine.session(config, system=DEFAULT_SYSTEM, tools=tools) as parent,
        tempfile.TemporaryDirectory() as folder,
    ):
        parent.run(office.opening, max_turns=2)
        print(f"{len(parent.token_ids):,} tokens are read once, for {len(cases)} agents.\n")
        asyncio.run(ask_together(parent, cases, Path(folder) / "first"))
        with engine.load_session(Path(folder) / "first", tools=tools) as loaded:
            print("\nThe first agent, saved and loaded:\n" + line(last, loaded.run(last.question)))


async def ask_together(parent: Session, cases: Sequence[Case], folder: Path) -> None:
    """Ask every question of a fork of its own, all at once, and save the first fork."""
    agents = [parent.fork() for _ in cases]
    try:
        pairs = zip(agents, cases, strict=True)
        replies = await asyncio.gather(*(agent.arun(case.question) for agent, case in pairs))
        for case, reply in zip(cases, replies, strict=True):
            print(line(case, reply))
        agents[0].save(folder)
    finally:
        for agent in agents:
            agent.close()


def line(case: Case, reply: Reply) -> str:
    """What was asked, what it cost and what was answered."""
    usage = reply.usage
    return (
        f"{case.question}\n    {usage.cached_tokens:,} cached, {usage.prefilled_tokens:,} "
        f"prefilled, {usage.output_tokens} generated: {reply.text.strip()}"
    )


def slowed(tool: Callable[..., str]) -> Callable[..., Any]:
    """The tool as an async one that takes a while, as a request over a network would."""

    @functools.wraps(tool)
    async def call(**arguments: Any) -> str:
        await asyncio.sleep(TOOL_SECONDS)
        return tool(**arguments)

    return call


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
    parser.add_argument("--agents", type=int, default=4, help="forks at once; default: 4")
    parser.add_argument("--selected-tokens", type=int, default=256, help="budget; default: 256")
    parser.add_argument("--log-tokens", type=int, default=2000, help="length of the log")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="per assistant turn")
    parser.add_argument("--seed", type=int, default=3, help="which log and questions")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
