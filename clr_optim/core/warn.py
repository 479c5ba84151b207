"""Warnings that name the caller's line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable


def callers_level() -> int:
    """Return the ``stacklevel`` of the nearest frame outside clr_optim and torch.

    The caller hands the level to :func:`warnings.warn` at once.
    """
    level, frame = 1, sys._getframe(1)
    ours = ("clr_optim.", "torch.")
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(ours):
        level, frame = level + 1, frame.f_back
    return level


def warn_each(messages: Iterable[str | None]) -> None:
    """Give each message that is not None as a :class:`UserWarning`."""
    for message in messages:
        if message is not None:
            warnings.warn(message, UserWarning, stacklevel=callers_level())
