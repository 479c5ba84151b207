"""Restore an optimizer if loading a checkpoint fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

__all__ = ["undone_on_error"]


@contextmanager
def undone_on_error(optimizer: Optimizer, *objects: object) -> Iterator[None]:
    """Put an optimizer, the optimizers inside it and other objects back if loading fails."""
    written: list[dict[Any, Any]] = [vars(each) for each in objects]
    for each in _with_those_inside(optimizer):
        written.append(vars(each))
        state = getattr(each, "state", None)
        if isinstance(state, dict):
            written += [state, *(values for values in state.values() if isinstance(values, dict))]
        written += [group for group in getattr(each, "param_groups", ()) if type(group) is dict]
    kept = [(items, dict(items)) for items in written]
    try:
        yield
    except BaseException:
        for items, before in kept:
            for key in [key for key in items if key not in before]:
                del items[key]
            if [*map(id, items)] != [*map(id, before)]:
                items.clear()  # for the old order
            items.update(before)
        raise


def _with_those_inside(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and the optimizers that its attributes hold, singly or in a container."""
    found: list[Optimizer] = [optimizer]
    for each in found:
        for value in list(vars(each).values()):
            inside: Iterable[object] = (value,)
            if isinstance(value, (list, tuple)):
                inside = value
            elif isinstance(value, dict):
                inside = value.values()
            for other in inside:
                if isinstance(other, Optimizer) and all(other is not known for known in found):
                    found.append(other)
    return found
