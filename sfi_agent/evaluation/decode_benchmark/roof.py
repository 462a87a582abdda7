"""The least that a step must read and write, and how long a copy would take for as many bytes.

Where histories are in host memory, what a dense step reads of them comes over the bus first, and
beside what the device does: the roof is then the longer of the two.

Counted once per step of the batch: every weight (see `ModelSizes.read_weight_bytes`), the keys and
values that attention reads, those that are written. Not counted: activations, logits, and the
evidence that a selector looks at, which a single kernel would not have to write.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfi_agent.evaluation.decode_benchmark.records import DraftCounts
from sfi_agent.evaluation.decode_benchmark.sizes import ModelSizes

__all__ = ["Roof"]


@dataclass(frozen=True, slots=True)
class Roof:
    """See the module text.

    Attributes:
        sizes: Of the model.
        batch: Sequences that step together.
        context_tokens: Length of each history.
        memory_tokens: What a fast step attends to.
        refilled_tokens: What a refresh copies from history to memory.
        dense_layers: Layers that read their history on every step.
        streamed_layers: Layers whose history is in host memory.
    """

    sizes: ModelSizes
    batch: int
    context_tokens: int
    memory_tokens: float
    refilled_tokens: int
    dense_layers: int = 0
    streamed_layers: int = 0

    def bytes_of(self, arm: str, segment_tokens: int, drafts: DraftCounts | None) -> int:
        """Per token of each sequence, for the whole batch.

        Args:
            arm: Its name.
            segment_tokens: Fast tokens between two slow steps of observe and rectify.
            drafts: Of verify.
        """
        if arm in ("generate", "dense"):
            return round(self._weights(1) + self.batch * self._dense())
        if arm == "fast":
            return round(self._weights(1) + self.batch * self._fast())
        if arm == "slow":
            return round(self._weights(1) + self.batch * (self._dense() + self._refill()))
        if arm == "selection":
            return round(self.batch * (self._keys() + self._refill()))
        fast, block, tokens = float(segment_tokens), 1.0, segment_tokens + 1.0
        if arm == "rectify":
            block = segment_tokens + 1.0
        if arm == "verify":
            assert drafts is not None and drafts.verifications
            fast = drafts.drafted / drafts.verifications
            block = fast + 1.0
            tokens = drafts.accepted / drafts.verifications + 1.0
        return round(self._cycle(fast, block) / tokens)

    def bus_bytes_of(self, arm: str, segment_tokens: int, drafts: DraftCounts | None) -> int:
        """Bytes that come from host memory, per token of each sequence, for the whole batch.

        Args:
            arm, segment_tokens, drafts: As in `bytes_of`.
        """
        layer = self.streamed_layers * self.sizes.layer_token_bytes
        history, refill = self.context_tokens * layer, self.refilled_tokens * layer
        whole: dict[str, float] = {
            "dense": history,
            "slow": history + refill,
            "fast": 0,
            "selection": history / 2 + refill,
            "observe": (history + refill) / (segment_tokens + 1),
            "rectify": (history + refill) / (segment_tokens + 1),
        }
        if arm == "verify":
            assert drafts is not None and drafts.verifications
            # Keys once more, when it is known which queries count.
            whole[arm] = (history * 1.5 + refill) / (drafts.accepted / drafts.verifications + 1.0)
        return round(self.batch * whole.get(arm, 0))

    def _cycle(self, fast: float, block: float) -> float:
        """Bytes of some fast steps and one dense pass over `block` tokens, with its refresh."""
        written = (block - 1.0) * self.sizes.token_bytes
        passes = fast * self._weights(1) + self._weights(round(block))
        slow = self._dense() + written + self._refill()
        return passes + self.batch * (fast * self._fast() + slow)

    def _weights(self, rows: int) -> int:
        return self.sizes.read_weight_bytes(self.batch * rows)

    def _dense(self) -> float:
        """The history read, one token written."""
        return float((self.context_tokens + 1) * self.sizes.token_bytes)

    def _fast(self) -> float:
        layer = self.sizes.layer_token_bytes
        sparse = self.sizes.layers - self.dense_layers
        read = sparse * self.memory_tokens + self.dense_layers * self.context_tokens
        return layer * read + self.sizes.token_bytes

    def _keys(self) -> float:
        sparse = self.sizes.layers - self.dense_layers
        return sparse * self.context_tokens * self.sizes.layer_token_bytes / 2

    def _refill(self) -> float:
        """Read from the history, written to the memory."""
        sparse = self.sizes.layers - self.dense_layers
        return 2.0 * self.refilled_tokens * sparse * self.sizes.layer_token_bytes
