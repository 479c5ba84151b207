"""Read an argument that is one number for all parameter groups, or one per group."""

from __future__ import annotations

from typing import Any

from clr_optim.checks import check_number, values_of

__all__ = ["optional_number", "optional_per_group", "per_group"]


def optional_number(name: str, value: object) -> float | None:
    """Return a number >= 0, or ``None`` for ``None``."""
    return None if value is None else check_number(name, value)


def optional_per_group(name: str, value: object, groups: int) -> list[float | None]:
    """Return a number for each group, or ``None`` for each."""
    return [None] * groups if value is None else list(per_group(name, value, groups))


def per_group(name: str, value: object, groups: int, **limits: Any) -> list[float]:
    """Return a list with a number for each group, from one number or a sequence."""
    values = values_of(value)
    if values is not None:
        if len(values) != groups:
            raise ValueError(
                f"{name} has {len(values)} values and the optimizer {groups} parameter groups: "
                f"give one number, or one per group; got {value!r}"
            )
        return [check_number(f"{name}[{i}]", v, **limits) for i, v in enumerate(values)]
    return [check_number(name, value, **limits)] * groups
