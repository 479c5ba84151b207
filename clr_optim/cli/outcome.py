"""What a command returns: its exit code, and its results for ``--json``."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Outcome"]


class Outcome(NamedTuple):
    """The results of a command, and its exit code."""

    #: numbers, texts, lists and dictionaries
    results: dict[str, Any]
    code: int = 0
