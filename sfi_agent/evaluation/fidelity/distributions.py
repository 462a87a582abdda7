"""Compares what a policy would draw the next token from with what dense decoding would.

Both are taken on the same ids, position by position, so every number is about one step alone and
errors of earlier choices do not add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfi_agent.engine.sampling import entropy_nats
from sfi_agent.errors import UnsupportedModelError, explain

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LogitComparison", "LogitReference", "Step", "kl_nats"]


@dataclass(frozen=True, slots=True)
class Step:
    """Two next-token distributions at one position.

    Attributes:
        kl_nats: KL(dense || policy), 0 where they are equal; lower is better.
        agrees: Both have their largest probability at the same token.
        entropy_nats: Entropy of the policy's distribution; 0 is certain.
    """

    kl_nats: float
    agrees: bool
    entropy_nats: float


def kl_nats(dense_logits: Tensor, policy_logits: Tensor) -> float:
    """KL(dense || policy) = sum over tokens of p_dense * (log p_dense - log p_policy), in nats.

    Args:
        dense_logits: `[vocabulary]`, of the reference.
        policy_logits: `[vocabulary]`, on the same device.

    Returns:
        0 where the distributions are equal, else positive; lower is better. Computed in float64;
        rounding below 0 is cut off.
    """
    dense = dense_logits.double().log_softmax(-1)
    policy = policy_logits.double().log_softmax(-1)
    # A token that is impossible for dense has no weight, whatever the policy gives it.
    terms = (dense.exp() * (dense - policy)).where(dense.isfinite(), dense.new_zeros(()))
    return max(0.0, float(terms.sum()))


class LogitReference:
    """The dense model's logits by position; give it as `Instruments(on_logits=...)`.

    Holds `[vocabulary]` float32 per position on the model's device.
    """

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}

    def __call__(self, position: int, logits: Tensor) -> None:
        """Keep the logits that the token at `position` was chosen from.

        Raises:
            UnsupportedModelError: They are no numbers.
        """
        self._rows[position] = _checked(logits, position, "dense decoding").clone()

    def __getitem__(self, position: int) -> Tensor:
        return self._rows[position]


class LogitComparison:
    """Compares a policy's logits with the reference as they come; an `on_logits` function.

    Args:
        reference: Has a row for every position that will be seen.

    Attributes:
        steps: What was found, by position.
    """

    def __init__(self, reference: LogitReference) -> None:
        self.steps: dict[int, Step] = {}
        self._reference = reference

    def __call__(self, position: int, logits: Tensor) -> None:
        """Compare the logits that the token at `position` was chosen from.

        Raises:
            UnsupportedModelError: They are no numbers.
        """
        dense = self._reference[position]
        given = _checked(logits, position, "the policy").to(dense.device)
        agrees = bool(dense.argmax() == given.argmax())
        self.steps[position] = Step(
            kl_nats(dense, given), agrees, float(entropy_nats(given.double()))
        )


def _checked(logits: Tensor, position: int, whose: str) -> Tensor:
    if bool(logits.isnan().any()):
        raise UnsupportedModelError(
            explain(
                f"compared next-token distributions at position {position}",
                got=f"logits of {whose} that are not numbers",
                allowed="logits without NaN",
                remedy="load the checkpoint in bfloat16 or float32; float16 overflows in many",
            )
        )
    return logits
