"""Search for the values that training may change, and have each copied."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from clr_optim.range_test.contents import (
    CONTAINERS,
    RUNNING,
    SOURCES,
    attributes_of,
    bytes_of,
    is_plain,
    members_of,
)
from clr_optim.range_test.record import Record

__all__ = ["Search"]

# A search through more objects takes seconds.
_MANY = 20_000


class Search:
    """Search objects for values to copy.

    Copied are tensors, arrays, containers and random generators of modules and optimizers;
    attributes of modules and optimizers; and objects of any other class that hold only such data,
    within limits. In an optimizer's state every object is copied, if need be by a deep copy.
    Loaders, samplers and datasets are searched too, within the same limits.

    Args:
        record: keeps the copies.
        largest: bytes. The data of one object or loader beyond this limit are left out.
    """

    def __init__(self, record: Record, largest: int) -> None:
        self._record = record
        self._largest = largest
        self.loaders_with_persistent_workers: list[Any] = []

    def copy(self, root: Any, everything: bool = False) -> None:
        """Copy ``root`` and the values in it.

        Args:
            root: the value.
            everything: whether to copy objects that hold more than data, too.
        """
        stack = [root]
        while stack:
            value = stack.pop()
            if self._record.is_done(value):
                continue
            members = members_of(value)
            if members is None:
                if everything or type(value).__module__ == "itertools":
                    self._record.copy_deeply(value)
            elif everything or issubclass(
                type(value), (Tensor, np.ndarray, nn.Module, Optimizer, *CONTAINERS)
            ):
                self._record.copy(value)
                stack.extend(members)
            else:
                self._copy_data(value)

    def _copy_data(self, root: Any, sources: list[Any] | None = None) -> None:
        """Copy an object if it holds only data, and not too much.

        Args:
            root: the object.
            sources: takes the loaders, samplers and datasets in the object. Without this list,
                an object that holds one is left out.
        """
        found: dict[int, Any] = {}
        size = 0
        stack = [root]
        while stack:
            value = stack.pop()
            if id(value) in found or self._record.is_done(value):
                continue
            if issubclass(type(value), SOURCES) and sources is not None:
                sources.append(value)
                continue
            members = None if id(value) in self._record.left_out else members_of(value)
            size += bytes_of(value)
            if (
                members is None
                or size > self._largest
                or len(found) > _MANY
                or issubclass(type(value), SOURCES)
            ):
                self._record.left_out[id(root)] = root
                if sources is not None and issubclass(type(root), CONTAINERS):
                    self._record.copy(root)  # the order of its members: some loaders shuffle it
                return
            found[id(value)] = value
            stack.extend(members)
        for value in found.values():
            self._record.copy(value)

    def copy_loader(self, loader: Any) -> None:
        """Copy the attributes of a loader and of its samplers and datasets, and their data."""
        if issubclass(type(loader), CONTAINERS):
            self._copy_data(loader, sources=[])  # batches, which a model may change in place
        stack = [loader]
        while stack:
            source = stack.pop()
            attributes = attributes_of(source)
            if (
                attributes is None
                or self._record.is_done(source)
                or id(source) in self._record.left_out
            ):
                continue
            if any(issubclass(type(value), RUNNING) for value in attributes.values()):
                continue
            if attributes.get("persistent_workers") is True:
                self.loaders_with_persistent_workers.append(source)
            self._record.copy(source)
            for name, value in attributes.items():
                kind = type(value)
                if name == "_iterator":
                    continue
                if is_plain(kind) or issubclass(kind, SOURCES):
                    stack.append(value)
                elif not issubclass(kind, (nn.Module, Optimizer)):
                    self._copy_data(value, sources=stack)
