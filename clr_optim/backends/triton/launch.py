"""A bucket's launch: its rows and chunks on the device, and the kernel that reads them."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clr_optim.backends.triton import device as current
from clr_optim.backends.triton.mirror import Mirror
from clr_optim.plan import Bucket

__all__ = ["Launch"]


class Launch:
    """A bucket's tables: its rows, and the chunks of the rows that this step updates."""

    def __init__(self, bucket: Bucket) -> None:
        from clr_optim.kernels.triton import multi_tensor

        self.bucket = bucket
        block = multi_tensor.shape_of(bucket.dtype.itemsize).block
        self._chunk = block * multi_tensor.BLOCKS_PER_CHUNK
        # Constants for tensors of any alignment, and for tensors aligned to 16 bytes.
        self._compiled_for = [
            {
                **multi_tensor.constexprs(
                    bucket.kernel, len(bucket.slots), bucket.dtype, bucket.number_dtypes, aligned
                ),
                **multi_tensor.options(bucket.dtype, current.warp(bucket.device)),
            }
            for aligned in (False, True)
        ]
        self._aligned = False
        self._loaded: set[bool] = set()
        self._active = b""
        self._rows = Mirror(bucket.device)
        self._uploaded = bucket.table[:0]
        self._unchanged = b""
        self._chunks = Mirror(bucket.device)
        self.chunks: Tensor | None = None
        #: programs of the launch, one per chunk
        self.count = 0
        #: a row for each step counter that this step advances
        self.counters = self._counters_of(bucket.table[:0])

    def refresh(self) -> Tensor:
        """Return the rows on the device; renew chunks and counters if other rows are active."""
        table = self.bucket.table
        whole = table.tobytes()
        if whole == self._unchanged:  # true of nearly all steps
            return cast("Tensor", self._rows.table)
        self._unchanged = b""
        active = table["active"]
        now = active.tobytes()
        if now != self._active or self.chunks is None:
            rows = np.flatnonzero(active)
            chunks = -(-table["numel"][rows] // self._chunk)
            first = np.cumsum(chunks) - chunks
            of_row = np.repeat(rows, chunks)
            index = np.arange(len(of_row)) - np.repeat(first, chunks)
            pairs = np.stack([of_row, index], axis=1).astype(np.int32)
            # Upload first: if a capture refuses the upload, nothing else has changed.
            self.chunks = self._chunks.put(pairs) if len(pairs) else None
            self.count = len(pairs)
            self.counters = self._counters_of(table[rows])
            self._active = now
        if not current.is_capturing():
            on_device = self._rows.put(_words(table))
            self._rows.stage()
            self._uploaded = table.copy()
            self._unchanged = whole
            return on_device
        # A graph's gradients lie in its own memory. A capture takes in no other change.
        rest = table.copy()
        rest["grad"] = self._uploaded["grad"] if len(self._uploaded) == len(table) else 0
        on_device = self._rows.put(_words(rest))
        if np.array_equal(rest["grad"], table["grad"]):
            return on_device
        return self._rows.put_in_graph(_words(table))

    def _counters_of(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return the table of the rows' step counters, as ``COUNTER`` in multi_tensor.py."""
        dtypes = self.bucket.number_dtypes
        counters = np.zeros((len(rows) if dtypes else 0, 5), dtype=np.int64)
        if dtypes:
            counters[:, 0], counters[:, 2], counters[:, 4] = (
                rows["counter"], rows["scalar"], rows["group"],
            )  # fmt: skip
            for i, dtype in enumerate(dtypes):
                counters[:, 2 * i + 1] = dtype == torch.float64
        return counters

    def give_up(self) -> list[object]:
        """Hand the tables to a graph."""
        tables = [self._rows.give_up(), self._chunks.give_up()]
        self.chunks = None
        self._unchanged = b""
        return [*tables]

    def choose(self) -> None:
        """Choose the kernel by the alignment of the gradients.

        Raises:
            RuntimeError: if the step is being captured and the kernel was never launched. A
                capture can load no kernel.
        """
        grads = self.bucket.table["grad"]
        self._aligned = self.bucket.aligned and not int(np.bitwise_or.reduce(grads)) & 15
        if current.is_capturing() and self._aligned not in self._loaded:
            self._aligned = False  # the kernel for any alignment
            if self._aligned not in self._loaded:
                raise RuntimeError(
                    "step() cannot be captured now: not all gradients begin at multiples of 16 "
                    "bytes, as they did in the steps before; take a step with gradients in the "
                    "memory that the capture gives them, and then capture"
                )
        self._loaded.add(self._aligned)

    @property
    def compiled_for(self) -> dict[str, Any]:
        """Constants and options of the update kernel."""
        return self._compiled_for[self._aligned]

    @property
    def squares_compiled_for(self) -> dict[str, Any]:
        """Constants and options of :func:`sum_of_squares`."""
        both = self._compiled_for[self._aligned]
        return {k: v for k, v in both.items() if k not in ("KERNEL", "SLOTS", "COUNTER")}


def _words(table: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return table.view(np.int64).reshape(len(table), -1)
