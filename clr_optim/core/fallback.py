"""The parameters that no kernel serves: torch's own step takes them, or the step raises."""

from __future__ import annotations

from clr_optim import backends
from clr_optim.backends.base import FusedBackend, Gradients
from clr_optim.backends.torch import ClippedGradients, HiddenGradients, check_clippable, raw_step
from clr_optim.core import amp
from clr_optim.core.capture import cannot_capture
from clr_optim.core.mastering import refuse_fallback
from clr_optim.core.serving import parameters_of
from clr_optim.core.shared import Shared

__all__ = ["Borrowed", "give_back", "has_fallback", "step_fallback"]

#: Objects that can give the user's gradients back. A step adds one before it replaces gradients.
Borrowed = list[ClippedGradients | HiddenGradients]


def has_fallback(shared: Shared, fused: FusedBackend, *, capturing: bool) -> bool:
    """Return whether torch's own step must serve a parameter that has a gradient.

    The plan of the backend must be up to date.

    Raises:
        RuntimeError: if the user asked for this backend by name, or if the step is captured.
    """
    plan, settings = fused.plan, shared.settings
    left = [(p, why) for p, why in plan.fallback if p.grad is not None]
    refuse_fallback(shared, plan, left)
    if not left or not (capturing or backends.is_fused(settings.backend)):
        return bool(left)
    needs_norm = settings.max_grad_norm is not None or settings.skip_above is not None
    if needs_norm and not capturing:
        check_clippable(parameters_of(settings.optimizer), settings.max_grad_norm)
    plan.forget()  # the reason may be gone by the next step
    if capturing:
        raise cannot_capture(f"no kernel serves {len(left)} parameters: {left[0][1]}")
    raise RuntimeError(
        f"backend={settings.backend!r} cannot serve {len(left)} of the parameters: {left[0][1]}; "
        "use backend='auto', which leaves them to the wrapped optimizer's own step"
    )


def step_fallback(
    shared: Shared,
    fused: FusedBackend,
    signals: amp.Signals,
    gradients: Gradients,
    borrowed: Borrowed,
) -> Gradients | None:
    """Take torch's own step with the parameters that no kernel serves.

    Args:
        shared: the optimizer.
        fused: the backend.
        signals: what a GradScaler left on the wrapper.
        gradients: how the step scales and clips gradients, and the gate.
        borrowed: an empty list, see :data:`Borrowed`.

    Returns:
        How the kernels still have to scale and clip the gradients; None if the gate closes.
    """
    plan, inner = fused.plan, shared.settings.optimizer
    is_clipped = gradients.max_norm is not None
    if gradients.needs_norm:
        # One norm over all parameters: clipped copies, on which torch and the kernels then work.
        clipped = ClippedGradients(gradients.max_norm)
        borrowed.append(clipped)
        norm = shared.ordinary.norm = clipped.clip(parameters_of(inner), gradients.scale)
        if gradients.gate is not None and gradients.gate.closes(norm.item()):
            return None
        # Clipping has divided the scale out.
        gradients = Gradients() if is_clipped else gradients._replace(gate=None)
        plan.refresh()
    hidden = HiddenGradients(p for bucket in plan.buckets for p in bucket.params)
    with amp.handed_down(signals, inner, scaled=not is_clipped):
        borrowed.append(hidden)
        hidden.hide()
        raw_step(inner)()
    hidden.restore()
    return gradients


def give_back(borrowed: Borrowed) -> None:
    """Restore the user's gradients, the last borrowed first. A second call does no harm."""
    while borrowed:
        borrowed[-1].restore()
        borrowed.pop()
