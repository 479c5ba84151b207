"""Sums over the ranks that train one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from clr_optim.checks import (
    check_bool,
)
from clr_optim.sharding import DTensor


class Ranks:
    """Sums over the ranks that train one model, the same on each."""

    def __init__(self, model: nn.Module, average: bool | None, device: torch.device) -> None:
        self._device = device
        self._groups: list[Any] = []
        dist = torch.distributed
        if average is not None:
            check_bool("average_ranks", average)
        if average is False or not dist.is_available() or not dist.is_initialized():
            if average:
                raise ValueError(
                    "average_ranks=True needs ranks: call torch.distributed.init_process_group "
                    "first, or leave it out"
                )
            return
        params: list[Any] = list(model.parameters())
        sharded = [param for param in params if type(param) is DTensor]
        if average:
            self._groups = [dist.group.WORLD]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            self._groups = [model.process_group]
        elif sharded:
            mesh = sharded[0].device_mesh
            self._groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Element by element."""
        if not self._groups:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(total, group=group)
        return [float(value) for value in total.tolist()]

    def largest(self, value: int) -> int:
        """Loaders need not have the same length on all ranks, but tests must."""
        if not self._groups:
            return value
        most = torch.tensor(value, dtype=torch.int64, device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
        return int(most)
