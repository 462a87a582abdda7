"""Log events of the package: structured, and silent until the host program wants them.

A host that configured structlog gets structlog events. Otherwise events go to the standard
library's logger "sfi_agent", which by default shows warnings and nothing below. Nothing is
configured here.
"""

from __future__ import annotations

import logging
from typing import Literal

import structlog

__all__ = ["LOGGER_NAME", "log_event"]

LOGGER_NAME = "sfi_agent"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


def log_event(level: Literal["debug", "info", "warning"], event: str, **values: object) -> None:
    """Emit one event.

    Args:
        level: How much it matters.
        event: Name of the event, such as "turn_finished".
        values: Its numbers and names; the same as in `usage` where they mean the same.
    """
    if structlog.is_configured():
        getattr(structlog.get_logger(LOGGER_NAME), level)(event, **values)
        return
    logger = logging.getLogger(LOGGER_NAME)
    if logger.isEnabledFor(_LEVELS[level]):
        pairs = " ".join(f"{key}={value!r}" for key, value in values.items())
        logger.log(_LEVELS[level], "%s %s", event, pairs)
