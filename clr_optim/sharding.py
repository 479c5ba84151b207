"""DTensors: the part on this rank, which kernels update, and sums over all ranks.

An update rule works element by element. A kernel therefore needs only this rank's part of a
parameter, of its gradient and of its state. A sum over all elements, as in a gradient norm, needs
the other ranks.
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
        """Replaces the class if torch was built without it: no tensor is an instance."""


class Spread(NamedTuple):
    """How the elements of DTensors are divided over ranks.

    Args:
        mesh: the ranks.
        dims: the dimensions of the mesh along which the elements are divided. Along the other
            dimensions, all ranks hold the same elements.
    """

    mesh: Any
    dims: tuple[int, ...]


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor on this rank, in the same memory; other tensors unchanged."""
    return tensor._local_tensor if type(tensor) is DTensor else tensor


def spread_of(tensor: Tensor) -> Spread | None:
    """Return how a DTensor is divided; ``None`` for any other tensor."""
    if type(tensor) is not DTensor:
        return None
    dims = tuple(i for i, p in enumerate(tensor.placements) if not p.is_replicate())
    return Spread(tensor.device_mesh, dims)


def same_spread(a: Tensor, b: Tensor) -> bool:
    """Return whether this rank holds the same part of both tensors."""
    if type(a) is not DTensor or type(b) is not DTensor:
        return type(a) is not DTensor and type(b) is not DTensor
    return a.device_mesh == b.device_mesh and a.placements == b.placements


def why_not_local(tensor: Tensor) -> str | None:
    """Return the reason why ranks cannot update their parts of a DTensor alone, or None."""
    if type(tensor) is not DTensor:
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        return "DTensors whose ranks hold summands"
    if tensor.device_mesh.get_coordinate() is None:
        return "DTensors on a mesh without this rank"
    return None


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a gradient. If ranks hold summands of its elements, add them up."""
    copy = tensor.detach()
    if type(copy) is DTensor and any(p.is_partial() for p in copy.placements):
        places = [Replicate() if p.is_partial() else p for p in copy.placements]
        return copy.redistribute(copy.device_mesh, places)
    return copy.clone()


def spreads(tensors: Iterable[Tensor]) -> list[Spread | None]:
    """Return the ways in which tensors are divided, each once, in order of appearance."""
    return list(dict.fromkeys(map(spread_of, tensors)))


def is_wide(params: Iterable[Tensor]) -> bool:
    """Return whether all parameters with gradients are float64, also those without one here."""
    return all(p.dtype == torch.float64 for p in params if p.requires_grad)


def no_sums(
    ways: Iterable[Spread | None], here: torch.device | str = "cpu"
) -> dict[Spread | None, Tensor]:
    """Return a zero per way for :func:`sum_over_ranks`, on the device where its mesh adds.

    That device differs from the device of the tensors if these were moved from GPUs to the CPU.

    Args:
        ways: how the tensors to sum are divided.
        here: the device for tensors that are not divided.
    """
    devices = {way: here if way is None else way.mesh.device_type for way in ways}
    return {
        way: torch.zeros((), dtype=torch.float64, device=device) for way, device in devices.items()
    }


def sum_over_ranks(sums: Mapping[Spread | None, Tensor]) -> Tensor:
    """Return the sum over the elements of all ranks, with each element counted once.

    Every rank must call this with the same keys in the same order. All ranks get the same result.

    Args:
        sums: this rank's sums by the way their tensors are divided: 0-dim float64 tensors on the
            device of the mesh. They are overwritten.
    """
    total: Tensor | None = None
    for spread, part in sums.items():
        if spread is not None:
            # Ranks outside a mesh leave its sum to the ranks inside.
            for dim in spread.dims if spread.mesh.get_coordinate() is not None else ():
                torch.distributed.all_reduce(part, group=spread.mesh.get_group(dim))
        total = part if total is None else total + part.to(total.device)
    return torch.zeros((), dtype=torch.float64, device="cpu") if total is None else total


def global_norm(grads: Sequence[Tensor], ways: Sequence[Spread | None], wide: bool) -> Tensor:
    """Return the 2-norm over the gradients of all ranks, a 0-dim tensor, the same on each rank.

    Args:
        grads: this rank's gradients, none of which holds summands (see :func:`whole`).
        ways: how the parameters are divided, the same list on every rank, since a rank may lack
            gradients that other ranks have.
        wide: whether all parameters are float64, so that the norm of DTensors is float64 too.
    """
    if not any(ways):
        # The norm of 16-bit values in float32: float16 has no number above 65504.
        measured = [
            torch.linalg.vector_norm(grad, dtype=torch.float32)
            if grad.is_floating_point() and grad.itemsize < 4
            else grad
            for grad in grads
        ]
        return torch.nn.utils.get_total_norm(measured)
    parts: dict[Spread | None, list[Tensor]] = {way: [] for way in ways}
    for grad in grads:
        parts.setdefault(spread_of(grad), []).append(local_part(grad))
    sums = no_sums(parts, grads[0].device if grads else "cpu")
    for way, tensors in parts.items():
        for tensor in tensors:
            # In float64, as the kernels sum: ranks that run kernels must get the same norm.
            norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
            sums[way] += norm.square().to(sums[way].device)
    return sum_over_ranks(sums).sqrt().to(torch.float64 if wide else torch.float32)
