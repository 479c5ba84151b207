"""A sequence that is neither a list nor a tuple, as users put into settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class ListConfig(Sequence[Any]):
    """A sequence like omegaconf's.

    Args:
        values: its values.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self.values = tuple(values)

    def __getitem__(self, i: Any) -> Any:
        return self.values[i]

    def __len__(self) -> int:
        return len(self.values)
