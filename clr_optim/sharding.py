"""DTensors: the part on this rank, which kernels update, and sums over all ranks.

An update rule works element by element, so a rank's part of a parameter, of its gradient and of its
state is all that a kernel needs. Only a sum over elements, as in a gradient norm, asks the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DTensor",
    "Spread",
    "global_norm",
    "is_wide",
    "local_part",
    "no_sums",
    "same_spread",
    "spread_of",
    "spreads",
    "sum_over_ranks",
    "whole",
    "why_not_local",
]

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate
else:

    class DTensor(Tensor):  # type: ignore[no-redef]
        """Stands for the class where torch was built without it: nothing is one."""


class Spread(NamedTuple):
    """How the elements of DTensors are divided over ranks.

    Args:
        mesh: the ranks.
        dims: those of the mesh's dimensions along which the elements are divided; along the others
            each rank holds the same ones.
    """

    mesh: Any
    dims: tuple[int, ...]


def local_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor on this rank, sharing its memory; any other tensor itself."""
    return tensor._local_tensor if type(tensor) is DTensor else tensor


def spread_of(tensor: Tensor) -> Spread | None:
    """How a DTensor is divided; ``None`` for any other tensor."""
    if type(tensor) is not DTensor:
        return None
    dims = tuple(i for i, p in enumerate(tensor.placements) if not p.is_replicate())
    return Spread(tensor.device_mesh, dims)


def same_spread(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors' parts on this rank are the same part of the whole."""
    if type(a) is not DTensor or type(b) is not DTensor:
        return type(a) is not DTensor and type(b) is not DTensor
    return a.device_mesh == b.device_mesh and a.placements == b.placements


def why_not_local(tensor: Tensor) -> str | None:
    """Why a DTensor cannot be worked on a part at a time, or None."""
    if type(tensor) is not DTensor:
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        return "DTensors whose ranks hold summands"
    if tensor.device_mesh.get_coordinate() is None:
        return "DTensors on a mesh without this rank"
    return None


def whole(tensor: Tensor) -> Tensor:
    """A copy of a gradient whose elements are the true ones, not summands of them."""
    copy = tensor.detach()
    if type(copy) is DTensor and any(p.is_partial() for p in copy.placements):
        places = [Replicate() if p.is_partial() else p for p in copy.placements]
        return copy.redistribute(copy.device_mesh, places)
    return copy.clone()


def spreads(tensors: Iterable[Tensor]) -> list[Spread | None]:
    """How these tensors are divided, each way once, in the order of their first."""
    return list(dict.fromkeys(map(spread_of, tensors)))


def is_wide(params: Iterable[Tensor]) -> bool:
    """Whether gradients of all of these, be they there on this rank or not, are float64."""
    return all(p.dtype == torch.float64 for p in params if p.requires_grad)


def no_sums(
    ways: Iterable[Spread | None], here: torch.device | str = "cpu"
) -> dict[Spread | None, Tensor]:
    """Zeros for :func:`sum_over_ranks`, where each mesh can add them up.

    That is not where its tensors are, if they were moved from GPUs to the CPU.

    Args:
        ways: how what is to be summed is divided.
        here: the device for what is not.
    """
    devices = {way: here if way is None else way.mesh.device_type for way in ways}
    return {
        way: torch.zeros((), dtype=torch.float64, device=device) for way, device in devices.items()
    }


def sum_over_ranks(sums: Mapping[Spread | None, Tensor]) -> Tensor:
    """The sum over all elements wherever they are, each counted once.

    Every rank must call this with the same keys in the same order, and gets the same result.

    Args:
        sums: this rank's sums by how what was summed is divided, 0-dim float64 tensors on the
            mesh's device; overwritten.
    """
    total: Tensor | None = None
    for spread, part in sums.items():
        if spread is not None:
            # A mesh without this rank is for others to sum over.
            for dim in spread.dims if spread.mesh.get_coordinate() is not None else ():
                torch.distributed.all_reduce(part, group=spread.mesh.get_group(dim))
        total = part if total is None else total + part.to(total.device)
    return torch.zeros((), dtype=torch.float64, device="cpu") if total is None else total


def global_norm(grads: Sequence[Tensor], ways: Sequence[Spread | None], wide: bool) -> Tensor:
    """The 2-norm over all gradients on all ranks together, a 0-dim tensor, the same on each.

    Args:
        grads: this rank's, none of them a sum still to be made (see :func:`whole`).
        ways: how any of the parameters are divided, the same list on every rank: one of them may
            lack gradients here.
        wide: whether all parameters are float64, which the norm of DTensors' then is too.
    """
    if not any(ways):
        return torch.nn.utils.get_total_norm(grads)
    parts: dict[Spread | None, list[Tensor]] = {way: [] for way in ways}
    for grad in grads:
        parts.setdefault(spread_of(grad), []).append(local_part(grad))
    sums = no_sums(parts, grads[0].device if grads else "cpu")
    for way, tensors in parts.items():
        for tensor in tensors:
            # Not in 16 bits: ranks on another way would come to another norm.
            norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
            sums[way] += norm.square().to(sums[way].device)
    return sum_over_ranks(sums).sqrt().to(torch.float64 if wide else torch.float32)
