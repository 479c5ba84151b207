"""What happens on overflow: a GradScaler's signals, which keep a step from happening.

If a gradient is infinite or NaN, the step changes nothing, and the cycle keeps its position. The
host asks :meth:`Signals.overflowed` before a step. If the kernels can read ``found_inf``, and the
host need not know, the gate on the device decides (:mod:`clr_optim.backends.triton.gate`).

torch's GradScaler sets ``grad_scale`` and ``found_inf`` on the wrapper, the one optimizer that it
knows, and deletes both after the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["NO_SIGNALS", "Signals", "forget", "handed_down", "signals_on"]


class Signals(NamedTuple):
    """A GradScaler's signals.

    Args:
        scale: the factor that is still in the gradients, a tensor of one element; or None.
        found_inf: nonzero if a gradient is infinite or NaN, a tensor of one element; or None.
    """

    scale: Tensor | None
    found_inf: Tensor | None

    def overflowed(self) -> bool:
        """Return whether the step must not happen; wait for the device.

        torch's own step, asked to skip, would create its state nevertheless, and SGD's momentum
        buffer would hold memory that nothing has written.
        """
        return self.found_inf is not None and bool(self.found_inf)


#: The signals where no GradScaler is at work.
NO_SIGNALS = Signals(None, None)


def signals_on(wrapper: object) -> Signals:
    """Return the signals that a GradScaler has left on a wrapper."""
    attributes = vars(wrapper)
    if "found_inf" not in attributes and "grad_scale" not in attributes:
        return NO_SIGNALS
    return Signals(attributes.get("grad_scale"), attributes.get("found_inf"))


@contextmanager
def handed_down(signals: Signals, optimizer: Any, *, scaled: bool) -> Iterator[None]:
    """Leave the signals on the wrapped optimizer while that takes its step.

    Args:
        signals: the signals.
        optimizer: the wrapped optimizer.
        scaled: whether the scale is still in the gradients.
    """
    if signals.found_inf is None:
        yield
        return
    optimizer.grad_scale = signals.scale if scaled else None
    optimizer.found_inf = signals.found_inf
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def forget(optimizer: object) -> None:
    """Remove the signals from the wrapped optimizer, which an interrupt may have left there."""
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)
