"""How many tokens to draft before they are verified."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DraftLength"]

_VERIFYING_COST = 4.0
"""What a verifying step is taken to cost, in fast steps. `sfi-agent bench decode` measures it: more
where the history is long, less where weights dominate. A constant, so that the kinds of steps
depend on no clock; a wrong one makes segments a little too long or short, and no output wrong."""
_MEMORY = 0.9
"""Weight of what was seen before, per verifying step: some ten of them count."""
_PRIOR_ACCEPTED, _PRIOR_REJECTED = 19.0, 1.0
"""Where nothing was seen yet: 95 % of the drafts stand."""


@dataclass(slots=True)
class DraftLength:
    """Adapts the length of a segment to the share of drafts that stand.

    If each draft stands with probability p, a segment of k drafts yields on average
    `(1 - p^(k+1)) / (1 - p)` tokens (Leviathan et al. 2023, arXiv 2211.17192, equation 1) and
    costs k fast steps and one verifying step; the length with the highest yield per cost is taken.

    Attributes:
        minimum_tokens, maximum_tokens: Bounds of the length.
        accepted, rejected: Drafts seen, older ones weighing less.
    """

    minimum_tokens: int
    maximum_tokens: int
    accepted: float = _PRIOR_ACCEPTED
    rejected: float = _PRIOR_REJECTED

    @property
    def acceptance(self) -> float:
        """Estimated probability that a draft stands, 0 to 1."""
        return self.accepted / (self.accepted + self.rejected)

    def note(self, drafted: int, accepted: int) -> None:
        """A segment was verified: the first rejection hides what came after it, and a segment
        without drafts says nothing."""
        if not drafted:
            return
        self.accepted = _MEMORY * self.accepted + accepted
        self.rejected = _MEMORY * self.rejected + (accepted < drafted)

    def tokens(self) -> int:
        """How many fast tokens the next segment should have at most."""
        p = self.acceptance
        best, length = 0.0, self.minimum_tokens
        expected = sum(p**drafts for drafts in range(self.minimum_tokens))
        for tokens in range(self.minimum_tokens, self.maximum_tokens + 1):
            expected += p**tokens
            gain = expected / (tokens + _VERIFYING_COST)
            if gain <= best:
                break
            best, length = gain, tokens
        return length
