"""A bucket: tensors that one kernel call updates."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clr_optim.plan.eligible import DTYPES
from clr_optim.plan.row import Row
from clr_optim.plan.words import known_words
from clr_optim.rules import KERNELS, AverageSlot, RestSlot, Slot
from clr_optim.sharding import Spread, local_part

__all__ = ["Bucket", "BucketKey"]


# The kernels in native code's order.
_KERNELS = tuple(KERNELS)
# The columns of a row that hold the addresses of `Row.numbers`.
_NUMBERS = ("counter", "scalar")
# The columns with the addresses of its slots.
_SLOTS = ("state0", "state1", "state2", "state3", "state4")


class BucketKey(NamedTuple):
    """What all rows of one bucket have in common, see :class:`Bucket`."""

    kernel: str
    dtype: torch.dtype
    slot_dtypes: tuple[torch.dtype, ...]
    number_dtypes: tuple[torch.dtype, ...]
    device: torch.device
    spread: Spread | None


@dataclass(eq=False)
class Bucket:
    """Tensors that one kernel call updates.

    Args:
        kernel: the name of the kernel.
        dtype: the dtype of parameters and gradients.
        slot_dtypes: the dtypes of the slots.
        number_dtypes: the dtypes of the state of one element, see :attr:`Row.numbers`.
        device: the device of all tensors.
        spread: how the DTensors are divided over ranks, or None for plain tensors.
        slots: the state that the kernel keeps, see :attr:`Row.kinds`.
        numbers: the names of the state of one element.
    """

    kernel: str
    dtype: torch.dtype
    slot_dtypes: tuple[torch.dtype, ...]
    number_dtypes: tuple[torch.dtype, ...]
    device: torch.device
    spread: Spread | None
    slots: tuple[Slot, ...]
    numbers: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    #: the rows as the scan and the kernels read them, see ``kernels/native/bucket.h``
    native: Any = None
    #: how often the rows have changed
    edition: int = 0
    _columns: tuple[str, ...] = ()

    @property
    def has_masters(self) -> bool:
        """Whether the parameters have float32 masters: the slots of the rule are then float32."""
        return any(isinstance(slot, RestSlot) for slot in self.slots)

    @property
    def average(self) -> torch.dtype | None:
        """The dtype of the parameters' averages, or None without averages."""
        has = self.slots and isinstance(self.slots[-1], AverageSlot)
        return self.slot_dtypes[-1] if has else None

    @property
    def rule_slots(self) -> int:
        """The number of slots that belong to the rule."""
        return len(self.slots) - self.has_masters - (self.average is not None)

    @property
    def table(self) -> np.ndarray[Any, np.dtype[np.void]]:
        """The rows as kernels read them: a copy, one field of 8 bytes per column."""
        dtype = np.dtype([(name, np.int64) for name in self._columns])
        return np.frombuffer(self.native.rows(), dtype=dtype)

    @property
    def gradients(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The addresses of the rows' gradients in the last scan; 0 without a gradient."""
        return np.frombuffer(self.native.gradients(), dtype=np.int64)

    def begin(self, first: Row, lib: ModuleType) -> None:
        """Make room for rows like this first one.

        Args:
            first: the row.
            lib: the compiled extension.
        """
        words = known_words()
        if self.spread is not None:
            # A scan reads attributes of DTensors, never the memory of their objects.
            words = words._replace(storage=0)
        device_type, device_id = local_part(first.param).__dlpack_device__()
        self._columns = lib.ROW
        self.native = lib.Bucket(
            _KERNELS.index(self.kernel),
            DTYPES.index(self.dtype),
            (*(slot.name for slot in self.slots), *self.numbers),
            tuple(DTYPES.index(dtype) for dtype in self.slot_dtypes),
            self.has_masters,
            tuple(self._number_sizes),
            (int(device_type), int(device_id)),
            self.spread is not None,
            tuple(words),
        )

    def add(self, row: Row, grad: Tensor | None, entry: dict[str, Any]) -> None:
        """Append a row.

        Args:
            row: the parameter with its state.
            grad: its gradient.
            entry: the dictionary that holds its state.
        """
        self.native.append(row.param, entry, row.state_tensors, row.group, row.first, grad)
        self.params.append(row.param)
        self.rows.append(row)
        self.edition += 1

    def replace(self, index: int, row: Row, grad: Tensor, entry: dict[str, Any]) -> bool:
        """Replace a row by another one of the same parameter; return False if it does not fit.

        Args:
            index: the place of the row.
            row: the parameter with its state.
            grad: its gradient.
            entry: the dictionary that holds its state.
        """
        state = row.state_tensors
        if not self.native.replace(index, row.param, entry, state, row.group, row.first, grad):
            return False
        self.rows[index] = row
        self.edition += 1
        return True

    def spans(self, index: int) -> list[tuple[int, int]]:
        """Return the memory that a row points to."""
        line = self.table[index]
        spans = []
        dtypes = (self.dtype, *self.slot_dtypes)
        for name, dtype in zip(("param", *_SLOTS), dtypes, strict=False):
            size = int(line["numel"]) * dtype.itemsize
            if size:
                spans.append((int(line[name]), int(line[name]) + size))
        for name, bytes_of_number in zip(_NUMBERS, self._number_sizes, strict=True):
            spans.append((int(line[name]), int(line[name]) + bytes_of_number))
        return [span for span in spans if span[0]]

    def note_filled(self, index: int, entry: dict[str, Any]) -> None:
        """Note that a row's pending state was filled and is now in this dictionary."""
        row = self.rows[index]
        row.pending, row.first = {}, False
        self.native.note_filled(index, entry)
        self.edition += 1

    @property
    def _number_sizes(self) -> list[int]:
        """The bytes of each of the row's ``_NUMBERS``; 0 for those that the rule lacks."""
        sizes = [dtype.itemsize for dtype in self.number_dtypes]
        return sizes + [0] * (len(_NUMBERS) - len(sizes))
