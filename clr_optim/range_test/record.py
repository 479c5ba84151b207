"""Record: copies of many values, each copied once, and the functions that put them back."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from clr_optim.range_test.contents import (
    BUFFERS,
    CONTAINERS,
    GENERATORS,
    attributes_of,
    is_atom,
    members_of,
)
from clr_optim.range_test.put_back import (
    PutBack,
    array_back,
    attributes_back,
    dict_back,
    generator_back,
    members_back,
    sharded_back,
    tensor_back,
)
from clr_optim.sharding import DTensor

__all__ = ["Record"]


class Record:
    """Copy single values, without the values in them.

    Args:
        offload: whether to copy tensors into the CPU's memory.
        shared: parameters and modules. Deep copies refer to these instead of copying them.
        with_extra_state: ids of the modules whose extra state is put back.
    """

    def __init__(self, offload: bool, shared: Iterable[Any], with_extra_state: set[int]) -> None:
        self._offload = offload
        self._shared = list(shared)
        self._with_extra_state = with_extra_state
        self._deep_copies: dict[int, Any] = {}
        #: copied values by id. The reference keeps Python from using an id again.
        self.copied: dict[int, Any] = {}
        #: values by id that stay as they are
        self.left_out: dict[int, Any] = {}
        #: functions that put the values back
        self.put_backs: list[PutBack] = []
        #: whether to leave out a value that cannot be copied, instead of raising
        self.is_lenient = False

    def is_done(self, value: Any) -> bool:
        """Return whether a value has been copied, or cannot change."""
        return is_atom(type(value)) or id(value) in self.copied

    def copy(self, value: Any) -> None:
        """Copy a value, and remember how to put it back."""
        if self.is_done(value):
            return
        self.copied[id(value)] = value
        try:
            self.put_backs += self._ways_back(value)
        except Exception as error:
            if not self.is_lenient or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                raise
            self.left_out[id(value)] = value

    def copy_deeply(self, value: Any) -> None:
        """Copy a value and everything in it, if Python can."""
        self.copied[id(value)] = value
        memo = {id(thing): thing for thing in self._shared}
        try:
            self._deep_copies[id(value)] = copy.deepcopy(value, memo)
        except Exception:  # a lock, a file, a stream, a process group: leave it unchanged
            return

    def _resolve(self, value: Any) -> Any:
        """Return the value; or its deep copy, if there is one and the value has changed."""
        if not self._deep_copies or id(value) not in self._deep_copies:
            return value
        deep_copy = self._deep_copies[id(value)]
        try:
            return value if (value == deep_copy) is True else deep_copy
        except Exception:
            return deep_copy

    def _ways_back(self, value: Any) -> list[PutBack]:
        """Copy a value's elements, members and attributes."""
        kind = type(value)
        ways: list[PutBack] = []
        if issubclass(kind, Tensor):
            if issubclass(kind, DTensor):
                ways.append(sharded_back(value, self._offload))
            elif not is_traceable_wrapper_subclass(value):
                ways.append(tensor_back(value, self._offload))
        elif issubclass(kind, np.ndarray):
            ways.append(array_back(value))
        elif issubclass(kind, GENERATORS):
            ways.append(generator_back(value))
        elif issubclass(kind, BUFFERS):
            saved = value[:]
            ways.append(lambda: value.__setitem__(slice(None), saved))
        elif issubclass(kind, dict):
            ways.append(dict_back(value, self._resolve))
        elif issubclass(kind, (list, deque, set)):
            ways.append(members_back(value, self._resolve))
        attributes = attributes_of(value)
        if attributes is not None and kind not in CONTAINERS:
            # set_extra_state has put back the objects that were not searched.
            keep = self._is_left_out if id(value) in self._with_extra_state else None
            ways.append(attributes_back(value, attributes, self._resolve, keep))
        return ways

    def _is_left_out(self, value: Any) -> bool:
        return not self.is_done(value) and members_of(value) != []
