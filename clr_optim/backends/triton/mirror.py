"""A table of the host on the device."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clr_optim.backends.triton import device as current

__all__ = ["Mirror"]


class Mirror:
    """A table of the host on the device, uploaded when it has changed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = b""
        self._staged: Tensor | None = None
        self.table: Tensor | None = None

    def put(self, table: npt.NDArray[Any]) -> Tensor:
        """The table on the device; a copy under way does not hold up the host."""
        now = table.tobytes()
        there = self.table is not None and self.table.shape == table.shape
        if there and now == self._last:
            return cast("Tensor", self.table)
        if current.is_capturing():
            raise RuntimeError(
                "step() cannot be captured now: tensors or settings of the optimizer changed since "
                "its last step, or that was captured itself; take a step, with the same parameters "
                "having gradients, and then capture"
            )
        if not there:
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
        """The rows of this table, as many as there is place for; further rows stay."""
        if self.table is None or self.table.shape[1:] != table.shape[1:]:
            return
        rows = np.frombuffer(self._last, table.dtype).reshape(self.table.shape).copy()
        count = min(len(rows), len(table))
        rows[:count] = table[:count]
        self.put(rows)

    def stage(self) -> None:
        """Have memory for :meth:`put_in_graph`, which can allocate none."""
        table = cast("Tensor", self.table)
        if self._staged is None or self._staged.shape != table.shape:
            pinned = self._device.type != "cpu"
            self._staged = torch.empty(
                table.shape, dtype=table.dtype, device="cpu", pin_memory=pinned
            )

    def put_in_graph(self, table: npt.NDArray[Any]) -> Tensor:
        """The table on the device, uploaded at every replay; :meth:`stage` and `give_up` around."""
        staged, on_device = cast("Tensor", self._staged), cast("Tensor", self.table)
        staged.numpy()[...] = table
        return on_device.copy_(staged, non_blocking=True)

    def give_up(self) -> tuple[Tensor | None, Tensor | None]:
        """The table and what it is uploaded from, from now on somebody else's."""
        given = self.table, self._staged
        self.table = self._staged = None
        return given
