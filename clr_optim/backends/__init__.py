"""Where a step runs: one module per backend, and the choice between them."""

from __future__ import annotations

import os

__all__ = ["AVAILABLE", "BACKENDS", "resolve"]

#: What ``backend=`` and ``CLR_OPTIM_BACKEND`` may say.
BACKENDS = ("auto", "torch", "native", "triton")

#: What this version can pick.
AVAILABLE = ("torch",)


def resolve(backend: object) -> tuple[str, str]:
    """The backend that serves and, in words, why.

    ``CLR_OPTIM_BACKEND`` overrides ``"auto"``, never a backend asked for by name.

    Raises:
        ValueError: for an unknown name, or a backend asked for by name that cannot serve.
    """
    asked, source = backend, f"backend={backend!r}"
    if backend == "auto" and os.environ.get("CLR_OPTIM_BACKEND"):
        asked = os.environ["CLR_OPTIM_BACKEND"]
        source = f"CLR_OPTIM_BACKEND={asked!r}"
    if not isinstance(asked, str) or asked not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}")
    if asked == "auto":
        return "torch", "the wrapped optimizer's own step; this version has no fused backend yet"
    if asked not in AVAILABLE:
        raise ValueError(
            f"{source} cannot serve: this version has only {', '.join(map(repr, AVAILABLE))}; "
            "use backend='auto'"
        )
    return asked, f"asked for by {source}"
