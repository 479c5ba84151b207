"""One step, from the wrapped optimizer's pre-hooks to its post-hooks.

A step is the kernels' (:func:`_fused_step`) or the wrapped optimizer's own (:func:`_wrapped_step`).
Both evaluate the next rates before a parameter changes, since a ``scale_fn`` may raise.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from clr_optim import backends
from clr_optim.backends.base import FusedBackend, Gradients
from clr_optim.backends.torch import ClippedGradients, is_profiled, raw_step
from clr_optim.checks import shown
from clr_optim.core import amp
from clr_optim.core.capture import cannot_capture, check_capture
from clr_optim.core.creation import asks_for_state, create_state
from clr_optim.core.fallback import Borrowed, give_back, has_fallback, step_fallback
from clr_optim.core.mastering import refuse_torchs_step
from clr_optim.core.serving import parameters_of
from clr_optim.core.shared import Shared
from clr_optim.core.values import Values
from clr_optim.gate import NO_STATISTICS

__all__ = ["take_step"]


class _ClosedError(Exception):
    """The gate has closed in the middle of torch's own step.

    Args:
        loss: the loss of the closure, if there was one.
    """

    def __init__(self, loss: float | None) -> None:
        super().__init__("skip_above has skipped the step")
        self.loss = loss


_UNCHANGED_GRADIENTS = Gradients()

# Steps between two looks for bounds, as "max_lr", in a group, where no code reads them.
_LOOK_EVERY = 64


class StepContext:
    """Facts about one step, filled in as the step finds them.

    Args:
        wrapper: the CyclicalOptimizer.
    """

    __slots__ = (
        "ahead", "before", "capturing", "evaluates", "only_creates_state", "shared", "signals",
        "statistics", "wrapper",
    )  # fmt: skip

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.shared: Shared = wrapper._shared
        #: whether a graph is being captured, so that nothing runs
        self.capturing = backends.current_device.is_capturing()
        #: what a GradScaler left on the wrapper
        self.signals = amp.signals_on(wrapper)
        #: whether the step evaluates a closure, which may write anything
        self.evaluates = False
        #: whether the step does nothing but create state, as a checkpointer's step does
        self.only_creates_state = False
        #: :attr:`Position.counted` before the step
        self.before = (0, 0)
        #: what to write after the step, if other code has not touched the groups
        self.ahead: Values | None = None
        #: the gate's statistics before the step
        self.statistics = NO_STATISTICS

    def forget_decision(self) -> None:
        """Take the gate's decision back: the step did not happen."""
        if self.shared.gate is not None:
            self.shared.gate.take_back(self.statistics)

    def begin(self) -> None:
        """Compute the next values, and settle the groups if other code has touched them.

        A step that only creates state leaves the groups alone. The caller holds the lock.
        """
        shared = self.shared
        position = shared.position
        position.catch_up()
        shared.ordinary.leave()
        self.before = position.counted
        if shared.gate is not None:
            self.statistics = shared.gate.statistics
        if self.before[0] % _LOOK_EVERY == 0:
            position.warn_unread_bounds()
        if shared.mirror.is_untouched(self.before[0]):
            self.ahead = shared.mirror.look_ahead(self.before[0] + 1)
        elif not (self.evaluates or self.capturing) and asks_for_state(shared):
            self.only_creates_state = True
        else:
            position.overrule()
            # The mirror keeps the values for the write after the step.
            shared.mirror.look_ahead(position.number + 1)


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
    shared.averaging.refuse_exchanged("step()")
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
                shared.position.overrule()
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


# ---- the kernels' step


def _fused_step(context: StepContext, fused: FusedBackend) -> int:
    """Take a step with a fused backend; the caller holds the lock.

    An interrupt may come between the kernels and the groups. Then :meth:`Position.catch_up` makes
    the groups show the kernels' step, here or at the next question.

    Returns:
        The position reached, or 0 if the cycle did not advance.
    """
    shared = context.shared
    position = shared.position
    shared.in_backward.check_step()
    context.begin()
    inner: Any = shared.settings.optimizer
    inner._opt_called = True  # a scheduler that was built on it looks at this
    borrowed: Borrowed = []
    try:
        if context.only_creates_state:
            shared.in_backward.refuse_in_pass("a step that creates state")
            create_state(shared, fused, borrowed)
            happened = False
        else:
            happened = _launch(context, fused, borrowed)
            settings = shared.settings
            copies_params = settings.average is not None or settings.master_weights
            if not happened and copies_params and fused.plan.pending:
                fused.plan.forget()  # new state copies the parameters as of the next step
        if borrowed:
            give_back(borrowed)
        # The device counts a graph's replays.
        if not happened or context.capturing:
            return 0
        # Each write makes a new tuple, so the identity shows that no other code moved the position.
        if context.ahead is not None and position.counted is context.before:
            position.advance(context.before, context.ahead, fused.plan.steps)
        else:
            position.follow_kernels()
        return position.counted[0]
    except BaseException:
        give_back(borrowed)
        amp.forget(inner)
        if fused.plan.steps == context.before[1]:
            context.forget_decision()
        position.catch_up()
        fused.plan.release()
        if context.capturing:
            fused.plan.forget()  # the capture would have created state, and nothing will fill it
        raise


def _launch(context: StepContext, fused: FusedBackend, borrowed: Borrowed) -> bool:
    """Run the kernels, and torch's own step for the other parameters.

    Returns:
        Whether the step happened, as far as the host knows.
    """
    shared, plan, signals = context.shared, fused.plan, context.signals
    settings = shared.settings
    plan.refresh()
    if len(plan.scalars) != len(shared.mirror.records):
        shared.position.overrule()  # another thread has just added a group
    falls_back = plan.fallback and has_fallback(shared, fused, capturing=context.capturing)
    averaging = shared.averaging
    averages = settings.average is not None and averaging.left_to_host(plan.unserved)
    if averages and context.capturing:
        raise cannot_capture("a parameter without a gradient has an average, which the host moves")
    found_inf, gate = signals.found_inf, shared.gate
    acts = False
    may_skip = found_inf is not None or gate is not None
    if (may_skip or shared.position.is_on_device) and not context.capturing:
        # The host waits for the device only if it acts on the answer. It acts for hooks, a
        # scale_fn, torch's own step, new state and the choice of the kernel.
        acts = bool(
            plan.pending
            or falls_back
            or averages
            or settings.has_scale_fn
            or context.wrapper._cycle_end_hooks
            or settings.momentum_vanishes
        )
        if found_inf is not None and (acts or not fused.sees_overflows):
            if signals.overflowed():
                plan.release()
                return False
            found_inf = None
        if acts and shared.position.is_on_device:
            shared.position.settle()
    gradients = _UNCHANGED_GRADIENTS
    if may_skip or signals.scale is not None or settings.max_grad_norm is not None:
        gradients = Gradients(signals.scale, found_inf, settings.max_grad_norm, gate, acts)
    copies: dict[Tensor, Tensor] = {}
    if falls_back:
        averaging.copy(plan.unserved, copies)
        left = step_fallback(shared, fused, signals, gradients, borrowed)
        if left is None:
            plan.release()
            return False
        gradients = left
    position = shared.position.number
    is_done = shared.in_backward.is_done
    of_host = {id(p) for p in plan.unserved if not is_done(p)} if copies or averages else set()
    norm, happened = fused.step(shared.position.course(), gradients)
    if norm is not None:
        shared.ordinary.norm = norm
    if happened and (copies or averages):
        averaging.put(plan.unserved, copies)
        averaging.take(position, [], only=of_host)
    return happened


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
    copies: dict[Tensor, Tensor] = {}
    refuse_torchs_step(shared, has_arguments=bool(args or kwargs))
    shared.in_backward.refuse_torchs_step()
    with shared.lock:
        context.begin()
        # The device will not notice this step.
        if position.is_on_device and not context.only_creates_state:
            position.settle()
        shared.averaging.copy(parameters_of(shared.settings.optimizer), copies)
    moves = not (context.only_creates_state or context.capturing)
    borrowed: Borrowed = []
    losses: list[float | None] = []
    moved: list[Any] = []
    start: tuple[int, int] | None = None

    def advance() -> int:
        """Count the step and return the position. A second call, after an interrupt, returns."""
        nonlocal start
        with shared.lock:
            if start is None and not moved:
                shared.averaging.put(parameters_of(shared.settings.optimizer), copies)
                shared.averaging.take(position.number, moved)
            start = start or position.counted  # other threads step, too
            is_as_before = start is context.before and serving.fused is None
            if position.number != start[0]:
                pass  # the first call has counted the step, or a signal handler went elsewhere
            elif context.ahead is not None and is_as_before and not context.evaluates:
                position.advance(start, context.ahead, 0)
            else:
                position.reach(start[0] + 1, start)
            return position.number

    try:
        if context.signals.overflowed():
            return None, 0
        known = set(shared.settings.optimizer.state) if closure is not None else None
        try:
            _run_wrapped_step(context, losses, borrowed, copies, closure, args, kwargs)
        except _ClosedError as closed:
            give_back(borrowed)
            _forget_step(shared, known)
            return closed.loss, 0
        if context.only_creates_state:
            shared.averaging.put(parameters_of(shared.settings.optimizer), copies)
        return losses[0], advance() if moves else 0
    except BaseException:
        give_back(borrowed)
        amp.forget(shared.settings.optimizer)
        if losses and moves:  # the step was taken
            advance()
        elif not losses:
            with shared.lock:
                context.forget_decision()
        raise


def _forget_step(shared: Shared, known: set[Any] | None) -> None:
    """Remove the state that a skipped step has created, and have the device count the skip.

    Args:
        shared: the optimizer.
        known: the keys of the state before the step; None if the step cannot have created any.
    """
    state = shared.settings.optimizer.state
    if known is not None:
        # LBFGS creates its counters before it calls the closure.
        for key in state.keys() - known:
            del state[key]
    with shared.lock:
        if shared.position.is_on_device:
            shared.position.rewrite()


def _run_wrapped_step(
    context: StepContext,
    losses: list[float | None],
    borrowed: Borrowed,
    copies: dict[Tensor, Tensor],
    closure: Callable[[], float] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Run the wrapped optimizer's own step, with clipped gradients if the user asked for them.

    The gate decides by the first gradients: before the step, or after the closure's first call.

    Args:
        context: the step.
        losses: a list to which the loss is added as soon as the step was taken.
        borrowed: an empty list, see :data:`Borrowed`.
        copies: see :meth:`Averaging.copy`.
        closure: as in torch.
        args: for a ``step`` that takes more.
        kwargs: likewise.

    Raises:
        _ClosedError: if the gate closes.
    """
    shared = context.shared
    inner: Any = shared.settings.optimizer
    max_norm, gate = shared.settings.max_grad_norm, shared.gate
    clipped = None if max_norm is None and gate is None else ClippedGradients(max_norm)
    if clipped is not None:
        borrowed.append(clipped)

    def clip(loss: float | None = None) -> None:
        nonlocal gate
        if clipped is None:
            return
        norm = shared.ordinary.norm = clipped.clip(parameters_of(inner), context.signals.scale)
        if gate is not None:
            with shared.lock:
                closes, gate = gate.closes(norm.item()), None
            if closes:
                raise _ClosedError(loss)

    def reevaluate() -> float:
        assert closure is not None
        if clipped is not None:
            clipped.restore()
        loss = closure()
        with shared.lock:
            shared.position.overrule()
            shared.averaging.copy(parameters_of(inner), copies)
        clip(loss)
        return loss

    inner._opt_called = True  # a scheduler that was built on it looks at this
    with amp.handed_down(context.signals, inner, scaled=max_norm is None):
        step = raw_step(inner)
        if closure is None:
            clip()
            given = (None, *args) if args else ()
        elif args or not _takes_closure_by_name(step):
            given = (reevaluate, *args)
        else:
            given, kwargs = (), {"closure": reevaluate, **kwargs}
        # extend() runs no Python code between the step and its note in `losses`, so that an
        # interrupt finds both or none.
        losses.extend(itertools.starmap(functools.partial(step, **kwargs), [given]))
    give_back(borrowed)


def _takes_closure_by_name(step: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind is not parameter.POSITIONAL_ONLY
