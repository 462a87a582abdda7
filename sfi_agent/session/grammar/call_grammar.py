"""What holds the tokens of a tool call to a grammar, whichever library does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from sfi_agent.session.grammar.call_forms import CallForm

__all__ = ["CallGrammar", "CallMatcher", "GrammarCompiler"]


class CallMatcher(Protocol):
    """How far one call has got. It begins behind the form's opening.

    Attributes:
        steps: How many tokens and texts it has taken.
    """

    @property
    def steps(self) -> int: ...

    def allowed(self) -> Tensor:
        """The tokens that may come next: `[vocabulary]` bool on the CPU.

        Control tokens are among them only where they belong to the form or end the turn.
        """
        ...

    def advance(self, token_id: int) -> bool:
        """Take a token; false, and nothing has changed, where it may not come."""
        ...

    def advance_text(self, text: bytes) -> bool:
        """The same for a piece of text, as one step."""
        ...

    def rollback(self, steps: int) -> None:
        """Take back the last so many steps."""
        ...

    def fork(self) -> CallMatcher:
        """An independent one with the same past."""
        ...


class CallGrammar(Protocol):
    """The calls of one session's tools in one form."""

    def matcher(self) -> CallMatcher:
        """One that has taken nothing yet."""
        ...


class GrammarCompiler(Protocol):
    """Makes grammars over one vocabulary.

    Attributes:
        token_bytes: The text of every token; empty for those without one.
    """

    @property
    def token_bytes(self) -> Sequence[bytes]: ...

    def compile(self, form: CallForm, schemas: Mapping[str, Mapping[str, Any]]) -> CallGrammar:
        """The grammar of calls of these tools.

        Args:
            form: How a call is written.
            schemas: JSON schema of the arguments, by tool name.

        Raises:
            ToolDefinitionError: A schema cannot be made into a grammar.
        """
        ...
