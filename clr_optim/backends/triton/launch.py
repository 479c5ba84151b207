"""A bucket's launch: its rows and chunks on the device, and the kernel that reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clr_optim.backends import device as current
from clr_optim.backends.triton.mirror import Mirror
from clr_optim.plan import Bucket

__all__ = ["Launch"]


class Launch:
    """A bucket's tables: its rows, their gradients, and the chunks that this step updates.

    The rows seldom change, so the device has them from an earlier step. The addresses of the
    gradients come from the host whenever they differ.
    """

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
        self._rows, self._gradients, self._chunks = (Mirror(bucket.device) for _ in range(3))
        self._edition = -1  # of the bucket's rows on the device
        self._is_current = False  # whether the last refresh ended, and was not of a capture
        #: programs of the launch, one per chunk
        self.count = 0
        #: a row for each step counter that this step advances
        self.counters = self._counters_of(bucket.table[:0])

    def refresh(self) -> None:
        """Bring the tables on the device up to date.

        Raises:
            RuntimeError: if the step is being captured, and anything but the addresses of the
                gradients changed.
        """
        bucket = self.bucket
        gradients, changed = bucket.gradients, bucket.edition != self._edition
        if not changed and self._is_current and self._gradients.holds(gradients):
            return
        self._is_current = False
        if changed:
            self._rows.fill(bucket.table.view(np.int64).reshape(len(gradients), -1))
        active = (gradients != 0).tobytes()
        if changed or active != self._active:
            self._active = b""
            self._choose_chunks(np.flatnonzero(gradients))
            self._active, self._edition = active, bucket.edition
        if current.is_capturing():
            self._gradients.put_in_graph(gradients)
        else:
            self._gradients.put(gradients)
            self._gradients.stage()
            self._is_current = True

    def _choose_chunks(self, rows: npt.NDArray[np.int64]) -> None:
        """Have the step update these rows alone."""
        table = self.bucket.table[rows]
        chunks = -(-table["numel"] // self._chunk)
        first = np.cumsum(chunks) - chunks
        of_row = np.repeat(rows, chunks)
        index = np.arange(len(of_row)) - np.repeat(first, chunks)
        pairs = np.stack([of_row, index], axis=1).astype(np.int32)
        # Upload first: if a capture refuses the upload, nothing else has changed.
        if len(pairs):
            self._chunks.put(pairs)
        self.count = len(pairs)
        self.counters = self._counters_of(table)

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The chunks, rows and gradients on the device; a launch without chunks has none."""
        return self._chunks.table, self._rows.table, self._gradients.table

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
        """Return the tables that a captured step reads, and writes at every replay."""
        return [self._rows.lend(), self._chunks.lend(), self._gradients.give_up()]

    def choose(self) -> None:
        """Choose the kernel by the alignment of the gradients.

        Raises:
            RuntimeError: if the step is being captured and the kernel was never launched. A
                capture can load no kernel.
        """
        addresses = int(np.bitwise_or.reduce(self.bucket.gradients))
        self._aligned = self.bucket.aligned and not addresses & 15
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
        of_update = {"CONSTANTS", "UPDATE", "FLAGS", "SLOTS", "COUNTER", "SCALAR"}
        return {k: v for k, v in both.items() if k not in of_update}
