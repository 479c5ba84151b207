"""One step, from the wrapped optimizer's pre-hooks to its post-hooks.

A step is the kernels' (:func:`_fused_step`) or the wrapped optimizer's own (:func:`_wrapped_step`).
Both evaluate the next rates before a parameter changes, since a ``scale_fn`` may raise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from clr_optim import backends
from clr_optim.backends.base import FusedBackend, Gradients
from clr_optim.backends.torch import (
    ClippedGradients,
    HiddenGradients,
    check_clippable,
    is_profiled,
    raw_step,
)
from clr_optim.checks import shown
from clr_optim.core import amp
from clr_optim.core.capture import cannot_capture, check_capture, momentum_vanishes
from clr_optim.core.groups import GroupMirror, Values
from clr_optim.core.rates import written_rate
from clr_optim.core.serving import parameters_of
from clr_optim.core.shared import Shared
from clr_optim.sharding import local_part, no_sums, spread_of, spreads, sum_over_ranks

__all__ = ["take_step"]

_UNCHANGED_GRADIENTS = Gradients()

#: What keeps the user's gradients while copies, or nothing, take their place.
_Borrowed = list[ClippedGradients | HiddenGradients]


class StepContext:
    """Facts about one step, filled in as the step finds them.

    Args:
        wrapper: the CyclicalOptimizer.
    """

    __slots__ = ("capturing", "creates_state", "evaluates", "shared", "signals", "wrapper")

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.shared: Shared = wrapper._shared
        #: whether a graph is being captured, so that nothing runs
        self.capturing = backends.is_capturing()
        #: whether the step evaluates a closure, which may write anything
        self.evaluates = False
        #: whether the step only creates state, see :func:`_is_checkpointers_step`
        self.creates_state = False
        #: what a GradScaler left on the wrapper
        self.signals = amp.signals_on(wrapper)


def take_step(
    wrapper: Any, closure: Callable[[], float] | None = None, *args: Any, **kwargs: Any
) -> float | None:
    """Take a step of a CyclicalOptimizer, beneath the wrapper's own hooks.

    Args:
        wrapper: the CyclicalOptimizer.
        closure: reevaluates the model and returns the loss.
        *args: for a wrapped ``step`` that takes more than a closure.
        **kwargs: likewise.

    Returns:
        What the wrapped ``step`` returns, which is the closure's loss.
    """
    if closure is not None and not callable(closure):
        raise TypeError(
            f"closure must be a callable that returns the loss, or None, got {shown(closure)}"
        )
    context = StepContext(wrapper)
    shared = context.shared
    inner: Any = shared.settings.optimizer
    # If torch's wrapper is the outermost layer, raw_step() goes beneath it, and the hooks run here.
    runs_hooks = is_profiled(inner)
    if context.capturing:
        check_capture(wrapper)
    call: tuple[Any, ...] = (inner, closure, *args) if closure is not None or args else (inner,)
    # An optimizer that never calls Optimizer.__init__ has no hooks.
    pre_hooks = getattr(inner, "_optimizer_step_pre_hooks", None) if runs_hooks else None
    given = kwargs
    if pre_hooks:
        call, given = _run_pre_hooks(pre_hooks.values(), inner, call, kwargs)
        closure, args = (call[1], call[2:]) if len(call) > 1 else (given.get("closure"), ())
        kwargs = {key: value for key, value in given.items() if key != "closure"}
    context.evaluates = closure is not None

    fused = None
    if runs_hooks and not args and not kwargs:
        fused = shared.serving.fused or shared.serving.make(shared.lock)
    if fused is None:
        loss, reached = _wrapped_step(context, closure, args, kwargs)
    else:
        loss = None
        if closure is not None:
            with shared.lock:
                shared.position.catch_up()
                _prepare(shared)
            with torch.enable_grad():
                loss = closure()
        with shared.lock:
            reached = _fused_step(context, fused)
    hooks = wrapper._cycle_end_hooks
    if hooks and reached and shared.settings.schedule.is_cycle_end(reached):
        for hook in list(hooks.values()):
            hook(wrapper)
    post_hooks = getattr(inner, "_optimizer_step_post_hooks", None) if runs_hooks else None
    if post_hooks:
        for post_hook in post_hooks.values():
            post_hook(inner, call, given)
    return loss


def _run_pre_hooks(
    hooks: Iterable[Callable[..., Any]],
    optimizer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run the wrapped optimizer's pre-hooks as torch does: each may replace the arguments."""
    for hook in hooks:
        changed = hook(optimizer, args, kwargs)
        if changed is not None:
            if not isinstance(changed, tuple) or len(changed) != 2:
                raise RuntimeError(
                    f"a step pre-hook must return None or (args, kwargs), got {changed!r} from "
                    f"{hook!r}"
                )
            args, kwargs = changed
    return args, kwargs


def _prepare(shared: Shared) -> None:
    """Make the groups hold what this step uses, and compute the next values ahead.

    The mirror keeps the values for the write after the step. If a ``scale_fn`` raises, it does so
    here.
    """
    shared.position.overrule()
    shared.position.look_ahead()


# ---- the kernels' step


def _fused_step(context: StepContext, fused: FusedBackend) -> int:
    """Take a step with a fused backend; the caller holds the lock.

    An interrupt may come between the kernels and the groups. Then :meth:`Position.catch_up` makes
    the groups show the kernels' step, here or at the next question.

    Returns:
        The position reached, or 0 if the cycle did not advance.
    """
    shared = context.shared
    position, tally = shared.position, fused.plan.tally
    if tally[1] != position.counted[1]:
        position.catch_up()
    before = position.counted
    ahead: Values | None = None
    if shared.mirror.is_untouched(before[0]):
        ahead = position.look_ahead()
    elif _is_checkpointers_step(context):
        context.creates_state = True
        if shared.settings.cycle_momentum and position.is_on_device:
            position.settle()  # the step uses the groups' momentum
    else:
        _prepare(shared)
    inner: Any = shared.settings.optimizer
    inner._opt_called = True  # a scheduler that was built on it looks at this
    borrowed: _Borrowed = []
    try:
        happened = _launch(context, fused, borrowed)
        # The device counts a graph's replays.
        if not happened or context.creates_state or context.capturing:
            return 0
        # If no other code moved the position meanwhile, write the values computed ahead.
        if ahead is not None and position.counted is before:
            position.advance(before, ahead, tally[1])
        else:
            position.catch_up()
        return position.counted[0]
    except BaseException:
        _give_back(borrowed)
        amp.forget(inner)
        position.catch_up()
        fused.plan.release()
        if context.capturing:
            fused.plan.forget()  # the capture would have created state, and nothing will fill it
        raise


def _launch(context: StepContext, fused: FusedBackend, borrowed: _Borrowed) -> bool:
    """Run the kernels, and torch's own step for the other parameters.

    Args:
        context: the step.
        fused: the backend.
        borrowed: takes what keeps the user's gradients.

    Returns:
        Whether the step happened, as far as the host knows.
    """
    shared, plan, signals = context.shared, fused.plan, context.signals
    settings = shared.settings
    plan.refresh()
    if len(plan.scalars) != len(shared.mirror.records) and not context.creates_state:
        shared.position.overrule()  # another thread has just added a group
    rest = plan.rest and [(p, why) for p, why in plan.rest if p.grad is not None]
    if rest and (backends.is_fused(settings.backend) or context.capturing):
        raise _cannot_serve(context, fused, rest)
    found_inf = signals.found_inf
    if (found_inf is not None or shared.position.is_on_device) and not context.capturing:
        # The device need not tell whether the step happened, unless the host acts on it: calls
        # hooks and functions, runs torch's own step, keeps new state, chooses the kernel.
        acts = bool(
            plan.pending
            or rest
            or settings.has_scale_fn
            or context.wrapper._cycle_end_hooks
            or momentum_vanishes(shared)
        )
        if found_inf is not None and (acts or not fused.sees_overflows):
            if signals.overflowed():
                plan.release()
                return False
            found_inf = None
        if acts and shared.position.is_on_device and not context.creates_state:
            shared.position.settle()
    gradients = _UNCHANGED_GRADIENTS
    if signals.scale is not None or found_inf is not None or settings.max_grad_norm is not None:
        gradients = Gradients(signals.scale, found_inf, settings.max_grad_norm)
    if rest:
        gradients = _step_rest(context, fused, gradients, borrowed)
    course = shared.position.course()
    if context.creates_state:
        course = course._replace(rates=[0.0] * len(course.rates), moves=False)
    norm = fused.step(course, gradients)
    if norm is not None:
        shared.grad_norm = norm
    if borrowed:
        _give_back(borrowed)
    return True


def _step_rest(
    context: StepContext, fused: FusedBackend, gradients: Gradients, borrowed: _Borrowed
) -> Gradients:
    """Take torch's own step with the parameters that no kernel serves.

    Args:
        context: the step.
        fused: the backend.
        gradients: what the step does to the gradients.
        borrowed: takes what keeps the user's gradients.

    Returns:
        What the kernels still have to do to the gradients.
    """
    shared, plan = context.shared, fused.plan
    inner = shared.settings.optimizer
    if shared.settings.max_grad_norm is not None:
        # One norm over all parameters: clipped copies, on which torch and the kernels then work.
        clipped = ClippedGradients(shared.settings.max_grad_norm)
        borrowed.append(clipped)
        shared.grad_norm = clipped.clip(parameters_of(inner), gradients.scale)
        gradients = _UNCHANGED_GRADIENTS
        plan.refresh()
    hidden = HiddenGradients(p for bucket in plan.buckets for p in bucket.params)
    with amp.handed_down(context.signals, inner, scaled=not borrowed):
        borrowed.append(hidden)
        hidden.hide()
        raw_step(inner)()
    hidden.restore()
    return gradients


def _cannot_serve(
    context: StepContext, fused: FusedBackend, rest: list[tuple[Tensor, str]]
) -> RuntimeError:
    """Return the error of a step whose parameters the kernels do not all serve."""
    settings = context.shared.settings
    if settings.max_grad_norm is not None and not context.capturing:
        check_clippable(parameters_of(settings.optimizer), settings.max_grad_norm)
    fused.plan.forget()  # the reason may be gone by the next step
    if context.capturing:
        return cannot_capture(f"no kernel serves {len(rest)} parameters: {rest[0][1]}")
    return RuntimeError(
        f"backend={settings.backend!r} cannot serve {len(rest)} of the parameters: "
        f"{rest[0][1]}; use backend='auto', which leaves them to the wrapped optimizer's own step"
    )


# ---- the wrapped optimizer's own step


def _wrapped_step(
    context: StepContext,
    closure: Callable[[], float] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[float | None, int]:
    """Take the wrapped optimizer's own step.

    No lock is held while the step runs: a closure may wait for other threads.

    Returns:
        The loss, and the position reached, or 0 if the cycle did not advance.
    """
    shared = context.shared
    position, serving = shared.position, shared.serving
    ahead: Values | None = None
    with shared.lock:
        position.catch_up()
        if closure is None and shared.mirror.is_untouched(position.number):
            ahead = position.look_ahead()
        elif _is_checkpointers_step(context):
            context.creates_state = True
        else:
            _prepare(shared)
        # The device will not notice this step.
        if position.is_on_device and not context.creates_state:
            position.settle()
        before = position.counted
    borrowed: _Borrowed = []
    losses: list[float | None] = []
    reached = 0

    def advance() -> None:
        """Go on by one step. A second call, after an interrupt, goes where the first call went."""
        nonlocal reached
        with shared.lock:
            reached = reached or position.number + 1  # other threads step, too
            if ahead is not None and serving.fused is None and position.counted is before:
                position.advance(before, ahead, 0)
            elif position.number != reached:
                position.reach(reached)

    try:
        if context.signals.overflowed():
            return None, 0
        _run_wrapped_step(context, losses, borrowed, closure, args, kwargs)
        if not (context.creates_state or context.capturing):
            advance()
        return losses[0], reached
    except BaseException:
        _give_back(borrowed)
        amp.forget(shared.settings.optimizer)
        if losses and not (context.creates_state or context.capturing):  # the step was taken
            advance()
        raise


def _run_wrapped_step(
    context: StepContext,
    losses: list[float | None],
    borrowed: _Borrowed,
    closure: Callable[[], float] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Run the wrapped optimizer's own step, with clipped gradients if the user asked for them.

    Args:
        context: the step.
        losses: takes what the step returns, as soon as the step was taken.
        borrowed: takes what keeps the user's gradients.
        closure: as in torch.
        args: for a ``step`` that takes more.
        kwargs: likewise.
    """
    shared = context.shared
    inner: Any = shared.settings.optimizer
    max_norm = shared.settings.max_grad_norm
    clipped = None if max_norm is None else ClippedGradients(max_norm)
    if clipped is not None:
        borrowed.append(clipped)

    def clip() -> None:
        if clipped is not None:
            shared.grad_norm = clipped.clip(parameters_of(inner), context.signals.scale)

    def reevaluate() -> float:
        assert closure is not None
        if clipped is not None:
            clipped.restore()
        loss = closure()
        with shared.lock:
            shared.position.overrule()
        clip()
        return loss

    inner._opt_called = True  # a scheduler that was built on it looks at this
    with amp.handed_down(context.signals, inner, scaled=clipped is None):
        step = raw_step(inner)
        # One line each, so that no interrupt comes between the step and its note in `losses`.
        if closure is None:
            clip()
            given = (None, *args) if args else ()
            losses.append(step(*given, **kwargs))
        elif args or not _takes_closure_by_name(step):
            losses.append(step(reevaluate, *args, **kwargs))
        else:
            losses.append(step(closure=reevaluate, **kwargs))
    _give_back(borrowed)


def _takes_closure_by_name(step: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind is not parameter.POSITIONAL_ONLY


def _give_back(borrowed: _Borrowed) -> None:
    """Restore the user's gradients, the last borrowed first. A second call does no harm."""
    while borrowed:
        borrowed[-1].restore()
        borrowed.pop()


# ---- a checkpointer's step


def _is_checkpointers_step(context: StepContext) -> bool:
    """Return whether this step only creates state, for a checkpoint to load into.

    ``torch.distributed.checkpoint`` writes 0 into the ``lr`` of every group, gives every parameter
    a zero gradient and steps, without a closure. A policy's own 0.0 is another object, and under a
    warm-up scheduler the gradients are not zero.
    """
    if context.evaluates or context.capturing:
        return False
    mirror: GroupMirror = context.shared.mirror
    groups: list[dict[str, Any]] = context.shared.settings.optimizer.param_groups
    if not groups:
        return False
    for i, group in enumerate(groups):
        # A group that was added to the wrapped optimizer has no record yet.
        if i < len(mirror.records) and not mirror.is_foreign(i, group):
            return False
        if written_rate(group["lr"], i) != 0.0:
            return False
    # All ranks must give the same answer, or their positions would part. Each rank takes part in
    # the sums, whatever gradients it has.
    params = list(parameters_of(context.shared.settings.optimizer))
    present, nonzero = no_sums(spreads(params)), no_sums(spreads(params))
    for p in params:
        if p.grad is not None:
            present[spread_of(p)] += 1
            nonzero[spread_of(p)] += not _is_zero(local_part(p.grad))
    if not sum_over_ranks(present):
        return not any(p.requires_grad for p in params)
    return not sum_over_ranks(nonzero)


def _is_zero(grad: Tensor) -> bool:
    """Return whether all values of a gradient are 0."""
    if grad.layout is not torch.strided:
        grad = grad.coalesce().values() if grad.layout is torch.sparse_coo else grad.to_dense()
    return not bool(grad.any())
