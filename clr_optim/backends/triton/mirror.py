"""A table of the host, mirrored on the device and uploaded only when it changed."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clr_optim.backends import device as current

__all__ = ["Mirror"]


class Mirror:
    """A table of the host on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = b""
        self._is_filled = False
        self._lent = False
        self._staged: Tensor | None = None
        self.table: Tensor | None = None

    def holds(self, table: npt.NDArray[Any]) -> bool:
        """Return whether :meth:`put` has put this table on the device, and nothing has since."""
        return self._is_filled and self._fits(table) and table.tobytes() == self._last

    def put(self, table: npt.NDArray[Any]) -> Tensor:
        """Return the table on the device; upload a changed table without waiting for the copy.

        Raises:
            RuntimeError: if the table changed and the step is being captured.
        """
        if not self.holds(table):
            self.fill(table)
            self._last = table.tobytes()
            self._is_filled = True
        return cast("Tensor", self.table)

    def note(self, content: bytes) -> None:
        """Take note of what other code has uploaded into the table."""
        self._last = content

    def forget(self) -> None:
        """Have the next :meth:`put` upload the table."""
        self._is_filled = False

    def fill(self, table: npt.NDArray[Any]) -> None:
        """Upload the table, changed or not, without waiting for the copy.

        Raises:
            RuntimeError: if the step is being captured.
        """
        if current.is_capturing():
            raise _cannot_capture()
        self._is_filled = False  # remains so if an interrupt ends the upload
        if self._lent or not self._fits(table):
            dtype = torch.from_numpy(np.empty(0, table.dtype)).dtype
            self.table = torch.empty(table.shape, dtype=dtype, device=self._device)
            self._lent = False
        host = torch.from_numpy(table)
        if self._device.type != "cpu":
            host = host.pin_memory()
        cast("Tensor", self.table).copy_(host, non_blocking=True)

    def _fits(self, table: npt.NDArray[Any]) -> bool:
        return self.table is not None and self.table.shape == table.shape

    def renew(self, table: npt.NDArray[Any]) -> None:
        """Upload as many rows of this table as fit; leave the mirror's further rows."""
        if self.table is None or self.table.shape[1:] != table.shape[1:]:
            return
        rows = np.frombuffer(self._last, table.dtype).reshape(self.table.shape).copy()
        count = min(len(rows), len(table))
        rows[:count] = table[:count]
        self.put(rows)

    def stage(self) -> None:
        """Allocate host memory for :meth:`put_in_graph`: a capture can allocate none."""
        table = cast("Tensor", self.table)
        if self._staged is None or self._staged.shape != table.shape:
            pinned = self._device.type != "cpu"
            self._staged = torch.empty(
                table.shape, dtype=table.dtype, device="cpu", pin_memory=pinned
            )

    def put_in_graph(self, table: npt.NDArray[Any]) -> None:
        """Put the table on the device; if it changed, every replay uploads it again.

        Call :meth:`stage` before the capture and :meth:`give_up` after it.

        Raises:
            RuntimeError: if a table of this shape was not staged.
        """
        if self.holds(table):
            return
        if self._staged is None or not self._fits(table):
            raise _cannot_capture()
        self._staged.numpy()[...] = table
        cast("Tensor", self.table).copy_(self._staged, non_blocking=True)

    def lend(self) -> Tensor | None:
        """Return the table, which a graph reads from now on; a change makes a new table."""
        self._lent = True
        return self.table

    def give_up(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the table and its host memory, which a graph uploads; a step makes new ones."""
        given = self.table, self._staged
        self.table = self._staged = None
        return given


def _cannot_capture() -> RuntimeError:
    return RuntimeError(
        "step() cannot be captured now: tensors or settings of the optimizer changed since "
        "its last step, or its last step was captured; take a step, and then capture"
    )
