"""Read an argument that is one number for all parameter groups, or one per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clr_optim.checks import check_number, values_of

__all__ = ["optional_number", "optional_per_group", "per_group"]

_Groups = Sequence[Mapping[str, Any]]


def optional_number(name: str, value: object) -> float | None:
    """Return a number >= 0, or ``None`` for ``None``."""
    return None if value is None else check_number(name, value)


def optional_per_group(name: str, value: object, groups: _Groups) -> list[float | None]:
    """Return a number for each group, or ``None`` for each."""
    return [None] * len(groups) if value is None else list(per_group(name, value, groups))


def per_group(name: str, value: object, groups: _Groups, **limits: Any) -> list[float]:
    """Return a number for each group.

    Args:
        name: of the argument.
        value: one number, a sequence of one per group, or a dictionary from names of groups.
        groups: the parameter groups.
        **limits: as :func:`check_number` takes them.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.
    """
    if isinstance(value, Mapping):
        names = _names(name, value, groups)
        return [check_number(f"{name}[{each!r}]", value[each], **limits) for each in names]
    values = values_of(value)
    if values is not None:
        if len(values) != len(groups):
            raise ValueError(
                f"{name} has {len(values)} values and the optimizer {len(groups)} parameter "
                f"groups: give one number, or one per group; got {value!r}"
            )
        return [check_number(f"{name}[{i}]", v, **limits) for i, v in enumerate(values)]
    return [check_number(name, value, **limits)] * len(groups)


def _names(name: str, value: Mapping[Any, Any], groups: _Groups) -> list[Any]:
    """Return the name of each group; raise unless a dictionary has these names and no others."""
    names = [group.get("name") for group in groups]
    for i, each in enumerate(names):
        if not isinstance(each, str):
            raise TypeError(
                f"{name} must be a number or one per group, got {value!r}: a dictionary goes by "
                f"the names of groups, and parameter group {i} has no 'name' that is a string"
            )
    if set(names) != set(value):
        raise ValueError(
            f"{name}={value!r} must have one number for each name of a parameter group, and the "
            f"names are {names}"
        )
    return names
