"""Measures the gradients of the wrapped optimizer, and clips them for the length of one step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from clr_optim.sharding import DTensor, global_norm, is_wide, local_part, spreads, whole

__all__ = ["ClippedGradients", "check_clippable"]

_SPARSE = (
    torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc,
)  # fmt: skip


class ClippedGradients:
    """Puts clipped copies in place of the gradients for one step, and the user's own back after it.

    Args:
        max_norm: the largest norm over all gradients together, as in
            :func:`torch.nn.utils.clip_grad_norm_`; None leaves the user's gradients in place.
    """

    def __init__(self, max_norm: float | None) -> None:
        self._max_norm = max_norm
        self._originals: list[tuple[Tensor, Tensor]] = []

    def clip(self, params: Iterable[Tensor], grad_scale: Tensor | None = None) -> Tensor:
        """Put clipped copies in place of the gradients; return the norm before clipping.

        Args:
            params: the parameters of all groups.
            grad_scale: the AMP scale that the gradients still carry, divided out first.

        Raises:
            NotImplementedError: if a gradient is sparse.
        """
        self.restore()
        params = list(dict.fromkeys(params))
        copies = []
        for param in params:
            grad = param.grad
            if grad is not None:
                is_read_only = self._max_norm is None and grad_scale is None
                own = grad.detach() if is_read_only and type(grad) is not DTensor else whole(grad)
                if grad_scale is not None:
                    local_part(own).mul_(grad_scale.to(own.device).reciprocal())
                if self._max_norm is not None:
                    self._originals.append((param, grad))
                    param.grad = own
                copies.append(own)
        ways = spreads(params)
        if not any(ways):
            try:
                if self._max_norm is None:
                    return global_norm(copies, ways, is_wide(params))
                return torch.nn.utils.clip_grad_norm_(
                    [p for p, _ in self._originals], self._max_norm
                )
            except (NotImplementedError, RuntimeError) as error:
                self.restore()
                sparse = [p for p in params if p.grad is not None and p.grad.layout in _SPARSE]
                if not sparse:
                    raise
                raise self._no_norm(sparse[0]) from error
        # torch's function takes DTensors of one mesh only, and no other tensors beside them.
        norm = global_norm(copies, ways, is_wide(params))
        if self._max_norm is None:
            return norm
        factor = (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
        for own in copies:
            local_part(own).mul_(factor.to(own.device))
        return norm

    def _no_norm(self, param: Tensor) -> NotImplementedError:
        """Return the error of a parameter whose gradient is sparse."""
        name, verb = "skip_above", "measure"
        asked = name
        if self._max_norm is not None:
            name, verb = "max_grad_norm", "clip"
            asked = f"{name}={self._max_norm}"
        return NotImplementedError(
            f"{asked} cannot {verb} sparse gradients, because torch takes no norm of them: a "
            f"parameter of shape {list(param.shape)} has one. Construct CyclicalOptimizer without "
            f"{name}, or use dense gradients, as torch.nn.Embedding(..., sparse=False) does"
        )

    def restore(self) -> None:
        """Put the user's gradients back, if copies are in their place."""
        for param, grad in self._originals:
            param.grad = grad
        self._originals.clear()


def check_clippable(params: Iterable[Tensor], max_norm: float | None) -> None:
    """Raise if torch takes no norm of the gradients."""
    clipped = ClippedGradients(max_norm)
    try:
        clipped.clip(params)
    finally:
        clipped.restore()
