"""Where a step runs: one module per backend, and the choice between them."""

from __future__ import annotations

import os

from torch.optim import Optimizer

from clr_optim.backends.native import BuildError, library, rule_for

__all__ = ["BACKENDS", "resolve"]

#: What ``backend=`` and ``CLR_OPTIM_BACKEND`` may say.
BACKENDS = ("auto", "torch", "native", "triton")


def resolve(backend: object, optimizer: Optimizer) -> tuple[str, str]:
    """``("native" or "torch", why)`` for this optimizer.

    ``CLR_OPTIM_BACKEND`` overrides ``"auto"``, never a backend asked for by name; it is a wish for
    every optimizer of the process, so one that no kernel serves gets its own step all the same.

    Raises:
        ValueError: for an unknown name, or a backend asked for by name that cannot serve.
    """
    source = f"backend={backend!r}"
    wish = os.environ.get("CLR_OPTIM_BACKEND") if backend == "auto" else None
    asked = wish or backend
    if wish:
        source = f"CLR_OPTIM_BACKEND={wish!r}"
    if not isinstance(asked, str) or asked not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}")
    if asked == "torch":
        return "torch", f"asked for by {source}"
    rule = rule_for(optimizer)
    if asked == "auto":
        # Compiled at the first step only, and not at all for parameters that are not on the CPU.
        return ("torch", rule) if isinstance(rule, str) else ("native", "it has a fused kernel")
    refusal = f"{source} cannot serve {type(optimizer).__name__}: "
    if asked == "triton":
        raise ValueError(f"{refusal}this version has no Triton kernels yet; use backend='auto'")
    if isinstance(rule, str):
        if wish:
            return "torch", rule
        raise ValueError(f"{refusal}{rule}; use backend='auto'")
    if not wish:
        try:
            library()
        except BuildError as error:
            raise ValueError(f"{refusal}{error}; or use backend='auto'") from error
    return "native", f"asked for by {source}"
