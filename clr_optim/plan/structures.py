"""The structures that Python fills and the C++ scan reads, and the answers of a scan.

``kernels/native/view.h`` declares the same structures and answers, with a comment for each field.
``tests/plan/test_plan_structures.py`` compares the two files.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

__all__ = ["BUCKET", "DLPACK_TYPES", "ROW", "Answer", "Scan", "View"]

Table = np.ndarray[Any, np.dtype[np.void]]


def _int64s(*names: str) -> np.dtype[np.void]:
    return np.dtype([(name, np.int64) for name in names])


#: A row: one tensor of a bucket, as kernels read it. Addresses are 0 where there is no tensor.
ROW = _int64s(
    "param", "grad", "state0", "state1", "state2", "counter", "scalar", "numel", "group", "first",
    "active",
)  # fmt: skip
#: The header of a bucket.
BUCKET = _int64s(
    "scan", "rows", "count", "active", "kernel", "dtype", "wide_counter", "wide_scalar", "held"
)

#: Type code and bits by which DLPack names each dtype.
DLPACK_TYPES = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
}


class Answer:
    """The answers of ``clr_current``."""

    ALL_ACTIVE = 0
    SETTINGS_CHANGED = 1
    SOME_IDLE = 2
    CHANGED = -1
    BUSY = -2
    GROUPS_CHANGED = -3
    STATE_CHANGED = -4
    WOKEN = -5
    NESTED = -6


def _objects(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.py_object) for name in names]


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


class Scan(ctypes.Structure):
    """What the rows of one bucket were built from."""

    _fields_ = [
        *_objects("params", "dicts", "keys", "tensors"),
        *_objects("grad", "none", "capsule", "tensor", "parameter", "is_neg", "no"),
        *_objects("dtensor", "specs", "local", "spec", "placements", "mesh"),
        *_objects("grads", "nones"),
        ("layout", ctypes.c_void_p),
        *_integers("slots", "code", "bits", "counter_bits", "scalar_bits"),
        *_integers("device_type", "device_id"),
        *_integers("impl", "storage", "key_set"),
        ("negative", ctypes.c_uint64),
    ]


class PlannedBucket(Protocol):
    """What a view needs of a bucket."""

    @property
    def memory(self) -> tuple[object, ...]: ...

    def header(self) -> tuple[int, ...]: ...


class View(ctypes.Structure):
    """What a whole plan was built from, and the headers of its buckets.

    A view keeps all memory alive that it points to. A thread may therefore finish a step with its
    view while another thread builds the plan anew.
    """

    _fields_ = [
        *_objects("groups", "members", "keys", "settings", "state", "dicts", "idle"),
        *_objects("params", "grad", "none", "has_mode", "no"),
        ("buckets", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("tally", ctypes.c_void_p),
        *_integers("busy", "ready", "bucket", "row"),
    ]

    #: the address of the view
    address = 0
    #: one row of the kernel's scalars per group; each step fills in the rates
    scalars = np.zeros((0, 0))
    scalars_address = 0
    #: one header per bucket
    table: Table = np.zeros(0, dtype=BUCKET)
    _memory: object = None

    def point_to_scalars(self, scalars: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Give kernels these scalars."""
        self.scalars, self.scalars_address = scalars, scalars.ctypes.data

    def point_to_buckets(self, buckets: Sequence[PlannedBucket], tally: object) -> None:
        """Give kernels these buckets with their present rows.

        Args:
            buckets: the buckets.
            tally: two numbers that kernel calls count up, see :attr:`Plan.tally`.
        """
        self.table = np.array([bucket.header() for bucket in buckets], dtype=BUCKET)
        self.buckets, self.count = self.table.ctypes.data, len(buckets)
        self._memory = [self.table, tally, *(bucket.memory for bucket in buckets)]
