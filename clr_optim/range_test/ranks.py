"""Sums over the ranks that train one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from clr_optim.checks import check_bool
from clr_optim.sharding import DTensor

__all__ = ["Ranks"]


class Ranks:
    """Give all ranks of a training the same sums.

    Args:
        model: the model. DistributedDataParallel and DTensors tell their ranks.
        average: whether to average over all ranks; ``None``: over the model's ranks.
        device: the device of the sums.
    """

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
                    "first, or leave out average_ranks"
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
        """Return the sums of the ranks' values, entry by entry."""
        if not self._groups:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(total, group=group)
        return [float(value) for value in total.tolist()]

    def largest(self, value: int) -> int:
        """Return the largest of the ranks' values.

        The ranks' loaders may differ in length. Their tests may not.
        """
        if not self._groups:
            return value
        most = torch.tensor(value, dtype=torch.int64, device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
        return int(most)
