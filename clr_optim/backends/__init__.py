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

    ``CLR_OPTIM_BACKEND`` overrides ``"auto"``, never a backend asked for by name. ``"auto"`` does
    not compile anything yet: that is done at the first step that has a use for it.

    Raises:
        ValueError: for an unknown name, or a backend asked for by name that cannot serve.
    """
    asked, source = backend, f"backend={backend!r}"
    if backend == "auto" and os.environ.get("CLR_OPTIM_BACKEND"):
        asked = os.environ["CLR_OPTIM_BACKEND"]
        source = f"CLR_OPTIM_BACKEND={asked!r}"
    if not isinstance(asked, str) or asked not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}")
    if asked == "torch":
        return "torch", f"asked for by {source}"
    rule = rule_for(optimizer)
    if asked == "auto":
        return ("torch", rule) if isinstance(rule, str) else ("native", "a fused kernel serves it")
    refusal = f"{source} cannot serve {type(optimizer).__name__}: "
    if asked == "triton":
        raise ValueError(f"{refusal}this version has no Triton kernels yet; use backend='auto'")
    if isinstance(rule, str):
        raise ValueError(f"{refusal}{rule}; use backend='auto'")
    try:
        library()
    except BuildError as error:
        raise ValueError(f"{refusal}{error}; or use backend='auto'") from error
    return "native", f"asked for by {source}"
