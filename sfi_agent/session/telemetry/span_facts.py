"""Numbers and names of a session as attributes of spans."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from sfi_agent.observe import span_names as names
from sfi_agent.observe.telemetry import Attributes
from sfi_agent.session.reply import Reply

if TYPE_CHECKING:
    from sfi_agent.session.token_core import TokenCore

__all__ = ["model_name", "request_attributes", "state_attributes", "usage_attributes"]


def request_attributes(core: TokenCore) -> Attributes:
    """How a turn is to be decoded."""
    sampling, policy = core.config.sampling, core.config
    return {
        names.OUTPUT_TYPE: "text",
        names.REQUEST_MAX_TOKENS: sampling.max_new_tokens,
        names.REQUEST_TEMPERATURE: sampling.temperature,
        names.REQUEST_TOP_P: sampling.top_p,
        names.REQUEST_TOP_K: sampling.top_k or None,
        names.REQUEST_SEED: sampling.seed,
        names.SFI_MODE: policy.mode,
        names.SFI_SELECTOR: policy.selector.name,
    }


def state_attributes(core: TokenCore) -> Attributes:
    """What the session holds now."""
    stats = core.stats()
    return {
        names.SFI_HISTORY_TOKENS: stats.history_tokens,
        names.SFI_HISTORY_BYTES: stats.history_bytes,
        names.SFI_MEMORY_BYTES: stats.memory_bytes,
    }


def usage_attributes(reply: Reply) -> Attributes:
    """Tokens and steps of a turn, or of several turns added up."""
    usage, kinds = reply.usage, [record.kind for record in reply.steps]
    passes = sum(record.dense_passes for record in reply.steps)
    return {
        names.RESPONSE_FINISH_REASONS: [reply.finish_reason],
        names.USAGE_INPUT_TOKENS: usage.prompt_tokens,
        names.USAGE_OUTPUT_TOKENS: usage.output_tokens,
        names.USAGE_CACHE_READ_INPUT_TOKENS: usage.cached_tokens,
        names.USAGE_REASONING_OUTPUT_TOKENS: usage.reasoning_tokens,
        names.SFI_PREFILLED_TOKENS: usage.prefilled_tokens,
        names.SFI_REUSE_LOST_REASON: usage.reuse_lost_reason,
        names.SFI_FAST_TOKENS: kinds.count("fast"),
        names.SFI_SLOW_TOKENS: kinds.count("slow"),
        names.SFI_RETRY_TOKENS: kinds.count("retry"),
        names.SFI_SLOW_SHARE: passes / len(kinds) if kinds else None,
    }


def model_name(core: TokenCore) -> str:
    """The checkpoint's Hub id; for a folder its last part, which names no machine."""
    model = core.engine.model
    given = str(getattr(model.config, "name_or_path", "") or "")
    path = PurePath(given)
    if path.is_absolute() or given.startswith((".", "~")):
        given = path.name
    return given or type(model).__name__
