"""Check one value: return the value as its type, or raise and say what would be right."""

from __future__ import annotations

import inspect
import math
import numbers
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

#: The last step that a device can count, in an int64.
LAST_STEP = 2**63 - 1


def _number_in(value: object) -> object:
    """Return the number in a tensor or an array of one element, and any other value unchanged."""
    take = None if isinstance(value, numbers.Number) else getattr(value, "item", None)
    if take is None:
        return value
    try:
        return take()
    except (TypeError, ValueError, RuntimeError):  # several elements, none, or no data
        return value


def values_of(value: object) -> list[Any] | None:
    """Return the values of a list, tuple, array or other sequence; None for a single value."""
    if isinstance(value, (str, bytes, Mapping, Set)) or isinstance(_number_in(value), numbers.Real):
        return None  # an array of one element counts as a number, a list of one as a list
    if getattr(value, "ndim", 1) == 0 or not hasattr(value, "__len__"):
        return None
    return list(value) if isinstance(value, Iterable) else None


def check_int(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """Return ``value`` as an int within the bounds.

    Whole floats pass, as in CyclicLR, and so do tensors and arrays of one element.
    """
    given = _number_in(value)
    if isinstance(given, numbers.Integral) and not isinstance(given, bool):
        number = int(given)
    elif isinstance(given, numbers.Real) and not isinstance(given, bool):
        as_float = float(given)
        if not as_float.is_integer():  # NaN and infinities included
            raise ValueError(f"{name} must be a whole number of steps, got {reprlib.repr(value)}")
        number = int(as_float)
    else:
        raise TypeError(f"{name} must be an integer >= {minimum}, got {reprlib.repr(value)}")
    if number < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {reprlib.repr(value)}")
    if maximum is not None and number > maximum:
        most = "2**63 - 1" if maximum == LAST_STEP else maximum
        raise ValueError(f"{name} must be an integer <= {most}, got {reprlib.repr(value)}")
    return number


def check_number(
    name: str,
    value: object,
    *,
    minimum: float = 0.0,
    maximum: float = math.inf,
    open_minimum: bool = False,
    finite: bool = True,
) -> float:
    """Return ``value`` as a float within the bounds, finite unless ``finite=False``.

    Tensors and arrays of one element pass too.
    """
    given = _number_in(value)
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise TypeError(
            f"{name} must be a number, got {reprlib.repr(value)} of type {type(value).__name__}"
        )
    try:
        number = float(given)
    except OverflowError:  # an integer beyond all floats
        number = -math.inf if given < 0 else math.inf
    below = number <= minimum if open_minimum else number < minimum
    if math.isnan(number) or (finite and math.isinf(number)) or below or number > maximum:
        limits = []
        if minimum > -math.inf:
            limits.append(f"> {minimum:g}" if open_minimum else f">= {minimum:g}")
        if maximum < math.inf:
            limits.append(f"<= {maximum:g}")
        kind = "a finite number" if finite else "a number"
        wanted = " and ".join(limits)
        raise ValueError(f"{name} must be {f'{kind} {wanted}'.rstrip()}, got {reprlib.repr(value)}")
    return number


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Return ``value`` if ``choices`` has it."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_bool(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False. Refuse numbers and strings as likely mistakes."""
    if isinstance(value, np.bool_):
        return bool(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_path(name: str, value: object) -> Path:
    """Return ``value`` as a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a string or a Path, got {reprlib.repr(value)}")
    return Path(value)


def check_bounds(base_lr: float, max_lr: float, where: str = "") -> None:
    """Raise unless ``base_lr <= max_lr``."""
    if base_lr > max_lr:
        raise ValueError(
            f"base_lr={base_lr!r} is above max_lr={max_lr!r}{where}: "
            "base_lr is the lower end of the cycle; swap the two or lower base_lr"
        )


def check_momenta(low: float, high: float, where: str = "", *, beta: bool = False) -> None:
    """Raise unless momentum can cycle between ``low`` and ``high``.

    Args:
        low, high: the bounds.
        where: the group, for the message.
        beta: whether the momentum is ``betas[0]``, which must stay below 1.
    """
    if low > high:
        raise ValueError(
            f"base_momentum={low!r} is above max_momentum={high!r}{where}: "
            "base_momentum is the lower end of the cycle; swap the two"
        )
    if beta and high >= 1.0:
        raise ValueError(f"max_momentum={high!r} must be below 1{where}, where it cycles betas[0]")


def item(value: object) -> object:
    """Return the number in a tensor or an array of one element, and any other value unchanged."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and not value.is_meta else value
    if isinstance(value, (np.ndarray, np.bool_)) and value.size == 1:
        return value.item()
    return value


def as_position(step: object, name: str) -> int:
    """Return a position from which the host and a device can count on, an int64."""
    if type(step) is int and 0 <= step <= LAST_STEP:
        return step
    return check_int(name, item(step), minimum=0, maximum=LAST_STEP)


def shown(value: object) -> str:
    """Return a short description of a value for a message, since checkpoints are large."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_meta):
        kind = f"{value.dtype}, {value.layout} on {value.device}"
        return f"a tensor of shape {list(value.shape)}, {kind}"
    return reprlib.repr(value)


def check_callable_of_one(name: str, value: object, argument: str) -> None:
    """Raise unless ``value`` can be called with one argument.

    Args:
        name: of the value.
        value: the value. A callable that has no signature passes.
        argument: what the argument is, for the message.
    """
    why = ""
    if callable(value):
        try:
            inspect.signature(value).bind(None)
        except TypeError as error:
            why = f" ({error})"
        except ValueError:
            return
        else:
            return
    raise TypeError(f"{name} must be a callable of one {argument}, got {value!r}{why}")
