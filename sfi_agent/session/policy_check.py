"""Whether a policy fits a model, before anything is built for it."""

from __future__ import annotations

from sfi_agent.config import SessionConfig
from sfi_agent.engine.model_shape import ModelShape
from sfi_agent.errors import ConfigError, explain

__all__ = ["check_policy"]


def check_policy(config: object, shape: ModelShape) -> None:
    """Refuse a policy that does not fit.

    Raises:
        ConfigError: It is no SessionConfig, or names a dense layer the model does not have.
    """
    if not isinstance(config, SessionConfig):
        raise ConfigError(
            explain(
                "opened a session with something that is not a configuration",
                got=repr(config),
                allowed="a SessionConfig",
                remedy="use SessionConfig(...), SessionConfig.load(path) or a preset",
            )
        )
    missing = [layer for layer in config.memory.dense_layers if layer >= shape.num_layers]
    if missing:
        raise ConfigError(
            explain(
                "opened a session with memory.dense_layers that the model lacks",
                got=f"layers {missing}",
                allowed=f"0 to {shape.num_layers - 1}",
            )
        )
