"""Calls that are held to the model's format and the tools' schemas, from their opening on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfi_agent.errors import ConfigError, ToolDefinitionError, explain
from sfi_agent.session.grammar.call_forms import CallForm
from sfi_agent.session.grammar.call_grammar import CallMatcher, GrammarCompiler
from sfi_agent.session.output.output_pieces import held_back_length

__all__ = ["HeldCall", "HeldCalls"]

_BARE = re.compile(rb'\s*\{\s*"name"\s*:')
_BARE_BEGUN = re.compile(rb'\s*\{\s*(?:"(?:n(?:a(?:m(?:e(?:"\s*)?)?)?)?)?)?')


@dataclass(frozen=True, slots=True)
class HeldCall:
    """A place in a call. A value: going on from it makes another, and it can be returned to.

    Attributes:
        matcher: Takes the tokens, and is rolled back to this place when it is used; None while it
            is open whether JSON becomes a call.
        steps: Of the matcher, at this place.
        text: That JSON so far.
    """

    matcher: CallMatcher | None
    steps: int = 0
    text: str = ""


class HeldCalls:
    """Says which tokens may come next, at every place of a turn.

    Args:
        compiler: Makes the grammars.
        forms: How the model writes calls, at least one form.
        schemas: JSON schema of the arguments, by tool name.
        device: Where logits are.

    Raises:
        ToolDefinitionError: A schema cannot be made into a grammar.
        ConfigError: The vocabulary has a token that holds an opening and goes on as no call does.
    """

    def __init__(
        self,
        compiler: GrammarCompiler,
        forms: Sequence[CallForm],
        schemas: Mapping[str, Mapping[str, Any]],
        device: torch.device,
    ) -> None:
        self._token_bytes = compiler.token_bytes
        self._device = device
        self._grammars = {form: compiler.compile(form, schemas) for form in forms}
        self._bare = next((form for form in forms if form.bare), None)
        self._guards: dict[tuple[CallForm, str], Tensor | None] = {}
        self._require_openings_at_token_ends()

    def opened(self, tail: str, piece: str) -> HeldCall | None:
        """The place behind the token with which a call opened.

        Args:
            tail: The end of the answer's text, that token's included.
            piece: That token's text.

        Returns:
            None where what follows the opening in the token is no beginning of a call: it is then
            left free, as are calls whose tokens were given and go wrong.
        """
        found = [
            (place, form)
            for form in self._grammars
            if not form.bare and (place := tail.rfind(form.opening)) >= 0
        ]
        if found:
            place, form = max(found, key=lambda item: item[0])
            rest = tail[place + len(form.opening) :]
            if len(rest) < len(piece):
                return self._begun(form, rest.encode())
        start = piece.find("{")
        return self._undecided(piece[start:]) if start >= 0 else None

    def advanced(self, held: HeldCall, token_id: int, piece: str) -> HeldCall | None:
        """The place behind a further token; None where the call has gone wrong."""
        if held.matcher is None:
            return self._undecided(held.text + piece)
        matcher = self._at(held)
        assert matcher is not None
        return HeldCall(matcher, matcher.steps) if matcher.advance(token_id) else None

    def allowed(self, held: HeldCall) -> Tensor | None:
        """What may come next inside a call; see `TokenWatch`."""
        matcher = self._at(held)
        if matcher is None:
            assert self._bare is not None
            return self._guard(self._bare, held.text)
        allowed = matcher.allowed()
        if not bool(allowed.any()):
            raise ToolDefinitionError(
                explain(
                    "Held a call to the schema of its tool",
                    got="a place where no token of the vocabulary may come next",
                    remedy="Simplify the schemas, or leave tools.constrain_calls false",
                )
            )
        return allowed.to(self._device)

    def guard(self, tail: str) -> Tensor | None:
        """What may come next outside calls: everything, save tokens that would complete an
        opening and go on as no call does."""
        found: Tensor | None = None
        for form in self._grammars:
            length = 0 if form.bare else held_back_length(tail, form.opening)
            mask = self._guard(form, form.opening[:length]) if length else None
            if mask is not None:
                found = mask if found is None else found & mask
        return found

    def _require_openings_at_token_ends(self) -> None:
        for form in self._grammars:
            if wrong := self._wrong_behind(form, b""):
                raise ConfigError(
                    explain(
                        "opened a session with tools.constrain_calls",
                        got=f"a token {self._token_bytes[wrong[0]]!r}, which begins a call wrongly",
                        remedy="leave tools.constrain_calls false with this tokenizer",
                    )
                )

    def _at(self, held: HeldCall) -> CallMatcher | None:
        """The matcher of a place, there."""
        if held.matcher is not None:
            held.matcher.rollback(held.matcher.steps - held.steps)
        return held.matcher

    def _undecided(self, text: str) -> HeldCall | None:
        form = self._bare
        if form is None:
            return None
        written = text.encode()
        found = _BARE.match(written)
        if found is not None:
            return self._begun(form, written[found.end() :])
        # With another first key it is an answer, or a call in a form that is not known here.
        return HeldCall(None, text=text) if _BARE_BEGUN.fullmatch(written) else None

    def _begun(self, form: CallForm, rest: bytes) -> HeldCall | None:
        matcher = self._grammars[form].matcher()
        return HeldCall(matcher, matcher.steps) if matcher.advance_text(rest) else None

    def _guard(self, form: CallForm, begun: str) -> Tensor | None:
        """Everything but tokens that go wrong behind the opening, of which `begun` is written."""
        key = form, begun
        if key not in self._guards:
            wrong = self._wrong_behind(form, begun.encode())
            mask = torch.ones(len(self._token_bytes), dtype=torch.bool)
            mask[wrong] = False
            self._guards[key] = mask.to(self._device) if wrong else None
        return self._guards[key]

    def _wrong_behind(self, form: CallForm, begun: bytes) -> list[int]:
        opening = _BARE if form.bare else re.compile(re.escape(form.opening.encode()))
        wrong = []
        for index, text in enumerate(self._token_bytes):
            # Most tokens lack the last character of the opening, which is quick to see.
            if form.opening.encode()[-1:] not in text[:-1]:
                continue
            whole = begun + text
            found = opening.match(whole) if form.bare or begun else opening.search(whole)
            if found is None or found.end() <= len(begun) or found.end() == len(whole):
                continue
            if self._begun(form, whole[found.end() :]) is None:
                wrong.append(index)
        return wrong
