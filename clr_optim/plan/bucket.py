"""A bucket: tensors that one kernel call updates, and the tables that kernels read."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from clr_optim.plan.eligible import DTYPES
from clr_optim.plan.row import Row
from clr_optim.plan.structures import DLPACK_TYPES, NO_DATA, ROW, Scan
from clr_optim.plan.words import known_words
from clr_optim.rules import KERNELS, Slot
from clr_optim.sharding import DTensor, Spread, local_part

__all__ = ["Bucket", "BucketKey"]


# The kernels in native code's order.
_KERNELS = tuple(KERNELS)
# The columns of a row that hold the addresses of `Row.numbers`.
_NUMBERS = ("counter", "scalar")


class BucketKey(NamedTuple):
    """What all rows of one bucket have in common, see :class:`Bucket`."""

    kernel: str
    dtype: torch.dtype
    number_dtypes: tuple[torch.dtype, ...]
    device: torch.device
    aligned: bool
    spread: Spread | None


@dataclass(eq=False)
class Bucket:
    """Tensors that one kernel call updates.

    Args:
        kernel: the name of the kernel.
        dtype: the dtype of parameters, gradients and slots.
        number_dtypes: the dtypes of the state of one element, see :attr:`Row.numbers`.
        device: the device of all tensors.
        aligned: whether all tensors began at a multiple of 16 bytes when the plan was built. False
            where kernels take no advantage of that.
        spread: how the DTensors are divided over ranks, or None for plain tensors.
        slots: the state that the kernel keeps.
        numbers: the names of the state of one element.
    """

    kernel: str
    dtype: torch.dtype
    number_dtypes: tuple[torch.dtype, ...]
    device: torch.device
    aligned: bool
    spread: Spread | None
    slots: tuple[Slot, ...]
    numbers: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    #: the gradients that the rows point to, kept alive until the step is over, or None
    grads: list[Tensor | None] = field(default_factory=list)
    scan: Scan = field(init=False)
    #: how often the rows have changed
    edition: int = 0
    # All arrays have room for more rows.
    _table: np.ndarray[Any, np.dtype[np.void]] = field(init=False)
    _gradients: np.ndarray[Any, np.dtype[np.int64]] = field(init=False)
    _layout: np.ndarray[Any, np.dtype[np.int64]] = field(init=False)
    # Where each row's layout begins, and where the last one ends.
    _begins: list[int] = field(default_factory=list)
    _end: int = field(init=False, default=0)

    @property
    def table(self) -> np.ndarray[Any, np.dtype[np.void]]:
        """The rows as kernels read them."""
        return self._table[: len(self.rows)]

    @property
    def gradients(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The addresses of the rows' gradients, which a scan renews; 0 without a gradient."""
        return self._gradients[: len(self.rows)]

    @property
    def memory(self) -> tuple[object, ...]:
        """All memory that native code points to."""
        return (self.scan, self._table, self._gradients, self._layout)

    def begin(self, first: Row) -> None:
        """Make the tables for rows like this first one."""
        device_type, device_id = local_part(first.param).__dlpack_device__()
        code, bits = DLPACK_TYPES[self.dtype]
        words = known_words()
        of_dtensors: dict[str, Any] = {}
        if self.spread is not None:
            of_dtensors = {
                "dtensor": DTensor,
                "specs": [],
                "local": "_local_tensor",
                "spec": "_spec",
                "placements": "placements",
                "mesh": "mesh",
            }
            # A scan reads attributes of DTensors, never the memory of their objects.
            words = words._replace(storage=0)
        counter_bits, scalar_bits = (8 * size for size in self._number_sizes)
        self._table = np.zeros(1, dtype=ROW)
        self._gradients = np.zeros(1, dtype=np.int64)
        self._layout = np.zeros(8, dtype=np.int64)
        self.scan = Scan(
            params=self.params,
            dicts=[],
            keys=[slot.name for slot in self.slots] + [*self.numbers],
            tensors=[],
            grad="grad",
            none=None,
            capsule=Tensor.__dlpack_c_exchange_api__,
            tensor=Tensor,
            parameter=torch.nn.Parameter,
            is_neg="is_neg",
            no=False,
            grads=self.grads,
            nones=[],
            slots=len(self.slots),
            code=code,
            bits=bits,
            counter_bits=counter_bits,
            scalar_bits=scalar_bits,
            device_type=int(device_type),
            device_id=int(device_id),
            **words._asdict(),
            **of_dtensors,
        )

    def add(self, row: Row, grad: Tensor | None, entry: dict[str, Any]) -> None:
        """Append a row.

        Args:
            row: the parameter with its state.
            grad: its gradient.
            entry: the dictionary that holds its state.
        """
        count, layout = len(self.rows), _layout_of(row.param)
        end = self._end + len(layout)
        self._table = _with_room(self._table, count + 1)
        self._gradients = _with_room(self._gradients, count + 1)
        self._layout = _with_room(self._layout, end)
        self._table[count] = self._line(row)
        self._gradients[count] = _address(grad)
        self._layout[self._end : end] = layout
        self._begins.append(self._end)
        self._end = end
        scan = self.scan
        scan.layout = self._layout.ctypes.data
        if scan.keys:
            scan.dicts.append(entry)
            scan.tensors.extend(row.state_tensors)
        if self.spread is not None:
            scan.specs.extend(_specs_of(row))
        scan.nones.append(None)
        self.grads.append(grad)
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
        begin, layout = self._begins[index], _layout_of(row.param)
        numel = local_part(row.param).numel()
        if self._layout[begin] != layout[0] or self._table["numel"][index] != numel:
            return False
        self._layout[begin : begin + len(layout)] = layout
        self._table[index] = self._line(row)
        self._gradients[index] = _address(grad)
        scan, keys = self.scan, len(self.scan.keys)
        if keys:
            scan.dicts[index] = entry
            scan.tensors[index * keys : (index + 1) * keys] = row.state_tensors
        if self.spread is not None:
            specs = _specs_of(row)
            scan.specs[index * len(specs) : (index + 1) * len(specs)] = specs
        self.grads[index] = grad
        self.rows[index] = row
        self.edition += 1
        return True

    def spans(self, index: int) -> list[tuple[int, int]]:
        """Return the memory that a row points to."""
        line = self._table[index]
        size = int(line["numel"]) * self.dtype.itemsize
        names = ("param", "state0", "state1", "state2")
        spans = [(int(line[name]), int(line[name]) + size) for name in names if size]
        for name, bytes_of_number in zip(_NUMBERS, self._number_sizes, strict=True):
            spans.append((int(line[name]), int(line[name]) + bytes_of_number))
        return [span for span in spans if span[0]]

    def note_filled(self, index: int, entry: dict[str, Any]) -> None:
        """Note that a row's pending state was filled and is now in this dictionary."""
        row = self.rows[index]
        row.pending, row.first = {}, False
        self._table["first"][index] = 0
        self.edition += 1
        if self.scan.keys:
            self.scan.dicts[index] = entry

    @property
    def _number_sizes(self) -> list[int]:
        """The bytes of each of the row's ``_NUMBERS``; 0 for those that the rule lacks."""
        sizes = [dtype.itemsize for dtype in self.number_dtypes]
        return sizes + [0] * (len(_NUMBERS) - len(sizes))

    def header(self) -> tuple[int, ...]:
        """Return the bucket's line in the view's table, see ``structures.BUCKET``."""
        return (
            ctypes.addressof(self.scan),
            self._table.ctypes.data,
            self._gradients.ctypes.data,
            len(self.rows),
            int(np.count_nonzero(self.gradients)),
            _KERNELS.index(self.kernel),
            DTYPES.index(self.dtype),
            *(size == 8 for size in self._number_sizes),
            1,
        )

    def release(self) -> None:
        """Let go of the gradients."""
        self.grads[:] = [None] * len(self.grads)

    @staticmethod
    def _line(row: Row) -> tuple[int, ...]:
        """Return the row's line in the table, see ``structures.ROW``."""
        slots = [local_part(tensor).data_ptr() for tensor in row.slots]
        numbers = [number.data_ptr() for number in row.numbers]
        part = local_part(row.param)
        return (
            part.data_ptr(),
            *slots,
            *[0] * (3 - len(slots)),
            *numbers,
            *[0] * (len(_NUMBERS) - len(numbers)),
            part.numel(),
            row.group,
            row.first,
        )


def _address(grad: Tensor | None) -> int:
    """Return the address of a gradient, as a scan writes it."""
    part = None if grad is None else local_part(grad)
    return 0 if part is None else part.data_ptr() if part.numel() else NO_DATA


def _layout_of(param: Tensor) -> tuple[int, ...]:
    """Return number of dimensions, sizes and strides, as a scan compares them."""
    part = local_part(param)
    return (part.dim(), *part.shape, *part.stride())


def _specs_of(row: Row) -> list[Any]:
    """Return the objects that tell how a row's DTensors are divided over the ranks."""
    tensors: list[Any] = [row.param, *row.slots]
    return [tensor._spec for tensor in tensors]


_Array = TypeVar("_Array", bound=np.ndarray[Any, Any])


def _with_room(array: _Array, count: int) -> _Array:
    """Return the array, or a larger copy if it has no room for ``count`` items."""
    if count <= len(array):
        return array
    larger = np.zeros(2 * count, dtype=array.dtype)
    larger[: len(array)] = array
    return cast("_Array", larger)
