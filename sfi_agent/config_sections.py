"""The sections of a session's configuration: memory, refresh, sampling, tools, history."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from sfi_agent.config_model import ConfigModel
from sfi_agent.problems import Problem, problems_error

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "HistorySettings",
    "MemorySettings",
    "RefreshSettings",
    "SamplingSettings",
    "ToolSettings",
]

_LARGEST_SEED = 2**63 - 1


class MemorySettings(ConfigModel):
    """What a fast step may attend to: sink, selected and recent tokens."""

    sink_tokens: int = Field(
        default=4,
        ge=0,
        description="First tokens of the history that every fast step sees.",
        json_schema_extra={"unit": "tokens"},
    )
    selected_tokens: int = Field(
        default=2048,
        ge=0,
        description="Budget: tokens that the selector may choose per layer and KV head.",
        json_schema_extra={"unit": "tokens"},
    )
    recent_tokens: int = Field(
        default=256,
        ge=1,
        description="Tokens before a segment that its fast steps see; the segment's own are added.",
        json_schema_extra={"unit": "tokens"},
    )
    dense_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        strict=False,
        description="Layers that read the whole history on every step, counted from 0.",
        json_schema_extra={"unit": "layers"},
    )

    @model_validator(mode="after")
    def _dense_layers_are_distinct(self) -> Self:
        layers = self.dense_layers
        if len(set(layers)) != len(layers):
            problem = Problem("dense_layers", got=str(list(layers)), allowed="distinct layers")
            raise problems_error([problem])
        return self


class RefreshSettings(ConfigModel):
    """When the memory is refreshed, and from how many queries."""

    min_segment_tokens: int = Field(
        default=16,
        ge=1,
        description="Tokens a segment has at least; a boundary reported earlier waits until then.",
        json_schema_extra={"unit": "tokens"},
    )
    max_segment_tokens: int = Field(
        default=96,
        ge=1,
        description="Tokens after which a slow step comes without any boundary.",
        json_schema_extra={"unit": "tokens"},
    )
    evidence_queries: int = Field(
        default=1,
        ge=1,
        description="Last queries of a slow step that the selector sees; above 1 only with "
        "slow_step rectify or verify.",
        json_schema_extra={"unit": "queries"},
    )
    prefill_evidence_queries: int = Field(
        default=16,
        ge=1,
        description="Last queries of a prefill that the selector sees.",
        json_schema_extra={"unit": "queries"},
    )
    lag: int = Field(
        default=0,
        ge=0,
        le=1,
        description="Fast tokens between a boundary and its slow step: 0 is exact; with 1 a fast "
        "step that a device has begun before the boundary was seen is kept instead of discarded.",
        json_schema_extra={"unit": "tokens"},
    )

    @model_validator(mode="after")
    def _segment_bounds_are_ordered(self) -> Self:
        if self.min_segment_tokens > self.max_segment_tokens:
            problem = Problem(
                "min_segment_tokens, max_segment_tokens",
                got=f"{self.min_segment_tokens} and {self.max_segment_tokens}",
                allowed="1 <= min_segment_tokens <= max_segment_tokens",
            )
            raise problems_error([problem])
        return self


class SamplingSettings(ConfigModel):
    """How a token is drawn from the logits."""

    temperature: float = Field(
        default=0.0,
        ge=0.0,
        description="Divisor of the logits; 0 takes the most probable token (greedy).",
        json_schema_extra={"unit": "number"},
    )
    top_p: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Draw from the smallest set of tokens that holds this share of the "
        "probability; 1 keeps all. Makes no difference when temperature is 0.",
        json_schema_extra={"unit": "probability"},
    )
    top_k: int = Field(
        default=0,
        ge=0,
        description="Draw from this many most probable tokens; 0 keeps all. Makes no difference "
        "when temperature is 0.",
        json_schema_extra={"unit": "tokens"},
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=_LARGEST_SEED,
        description="Seed of the sampling noise, and of seeded plugins that name no seed.",
        json_schema_extra={"unit": "seed"},
    )
    max_new_tokens: int = Field(
        default=512,
        ge=1,
        description="Tokens that one assistant turn generates at most.",
        json_schema_extra={"unit": "tokens"},
    )


class ToolSettings(ConfigModel):
    """How tool calls are decoded and run."""

    constrain_calls: bool = Field(
        default=False,
        description="Hold tool calls to the model's call format and to the schemas of the tools "
        "while they are decoded; text outside calls stays free. Needs tools, and the extra "
        "grammar.",
        json_schema_extra={"unit": "flag"},
    )
    decode_calls: Literal["as_session", "exact"] = Field(
        default="exact",
        description="How tool calls are decoded: exact takes every token of a call from dense "
        "decoding (drafted and verified, whatever slow_step is); as_session decodes them like "
        "everything else. Makes no difference without tools, with mode dense, and with slow_step "
        "verify.",
        json_schema_extra={"unit": "choice"},
    )
    timeout_seconds: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="Time a tool may take before its call is answered with an error; null sets no "
        "limit, and a Tool's own limit goes first.",
        json_schema_extra={"unit": "seconds"},
    )


class HistorySettings(ConfigModel):
    """Where the keys and values of a sequence are kept."""

    device: Literal["same", "cpu"] = Field(
        default="same",
        description="Where the history lives: same is the model's device; cpu is host memory, "
        "from where slow steps and prefills stream it, except for dense and sliding layers. "
        "Makes no difference on a CPU.",
        json_schema_extra={"unit": "choice"},
    )
    reserve_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens to make room for at the start; 0 lets the history grow as needed.",
        json_schema_extra={"unit": "tokens"},
    )
    reasoning: Literal["keep", "template"] = Field(
        default="keep",
        description="What becomes of earlier reasoning: keep leaves it in the history; template "
        "drops it at the next user message, where the chat template does, and processes what comes "
        "behind it again.",
        json_schema_extra={"unit": "choice"},
    )
