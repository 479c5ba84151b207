"""A table of the host, mirrored on the device and uploaded only when it changed."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clr_optim.backends.triton import device as current

__all__ = ["Mirror"]


class Mirror:
    """A table of the host on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = b""
        self._staged: Tensor | None = None
        self.table: Tensor | None = None

    def put(self, table: npt.NDArray[Any]) -> Tensor:
        """Return the table on the device; upload a changed table without waiting for the copy.

        Raises:
            RuntimeError: if the table changed and the step is being captured.
        """
        now = table.tobytes()
        fits = self.table is not None and self.table.shape == table.shape
        if fits and now == self._last:
            return cast("Tensor", self.table)
        if current.is_capturing():
            raise RuntimeError(
                "step() cannot be captured now: tensors or settings of the optimizer changed since "
                "its last step, or its last step was captured; take a step with the same "
                "parameters having gradients, and then capture"
            )
        if not fits:
            dtype = torch.from_numpy(np.empty(0, table.dtype)).dtype
            self.table = torch.empty(table.shape, dtype=dtype, device=self._device)
        on_device = cast("Tensor", self.table)
        host = torch.from_numpy(table.copy())
        if self._device.type != "cpu":
            host = host.pin_memory()
        on_device.copy_(host, non_blocking=True)
        self._last = now
        return on_device

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

    def put_in_graph(self, table: npt.NDArray[Any]) -> Tensor:
        """Return the table on the device, which every replay uploads again.

        Call :meth:`stage` before the capture and :meth:`give_up` after it.
        """
        staged, on_device = cast("Tensor", self._staged), cast("Tensor", self.table)
        staged.numpy()[...] = table
        return on_device.copy_(staged, non_blocking=True)

    def give_up(self) -> tuple[Tensor | None, Tensor | None]:
        """Hand the table and its host memory to a graph; the next :meth:`put` makes a new table."""
        given = self.table, self._staged
        self.table = self._staged = None
        return given
