"""The embedded model: a small network trained on synthetic office logs, shipped in the package.

It is a test bed. It shows that the machinery works and ranks policies on retrieval; it says
nothing about quality on another checkpoint. Importing this module loads neither torch nor
transformers.
"""

from __future__ import annotations

from pathlib import Path

from sfi_agent.embedded.cases import (
    Case,
    CaseScore,
    Conversation,
    make_case,
    make_conversation,
    score,
)
from sfi_agent.embedded.documents import DEFAULT_SYSTEM
from sfi_agent.embedded.office_tools import make_tools
from sfi_agent.errors import CheckpointError, explain

__all__ = [
    "DEFAULT_SYSTEM",
    "Case",
    "CaseScore",
    "Conversation",
    "checkpoint_path",
    "make_case",
    "make_conversation",
    "make_tools",
    "score",
]


def checkpoint_path() -> Path:
    """Folder of the shipped checkpoint, for `Engine.from_pretrained` or transformers.

    Raises:
        CheckpointError: The installed package does not hold the checkpoint.
    """
    folder = Path(__file__).parent / "checkpoint"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            explain(
                "Looking for the embedded model",
                got=f"no config.json in {str(folder)!r}",
                remedy="Reinstall sfi-agent; the wheel holds the checkpoint",
            )
        )
    return folder
