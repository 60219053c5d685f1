"""Warnings in the log that are not repeated."""

from __future__ import annotations

import logging
from functools import lru_cache

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning, once for each message and process."""
    logger.warning("%s", message)
