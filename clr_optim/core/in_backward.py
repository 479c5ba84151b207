"""InBackward: each parameter's update within the backward pass, once the gradient is complete.

A hook on each parameter, which is native code, updates the parameter and frees the gradient. Python
begins a pass with the first gradient, and mends whatever native code finds unusual. All updates of
a pass use the values of one position. ``step()`` updates the parameters that still have a gradient.
The kernels' count of steps then moves on, which ends the pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from clr_optim.backends import current_device
from clr_optim.backends.base import FusedBackend
from clr_optim.backends.torch import is_profiled
from clr_optim.checks import check_bool
from clr_optim.core.averaging import Averaging
from clr_optim.core.groups import GroupMirror
from clr_optim.core.position import Position
from clr_optim.core.serving import Serving, parameters_of
from clr_optim.core.settings import Settings
from clr_optim.rules import class_name
from clr_optim.sharding import DTensor

__all__ = ["BackwardHandle", "InBackward"]


class BackwardHandle:
    """Undoes :meth:`CyclicalOptimizer.step_in_backward`; a context manager, as torch's handles.

    Args:
        in_backward: the hooks of the optimizer, which the handle does not keep alive.
        hook: the hook that the handle removes. It keeps no optimizer and no parameter alive.
    """

    def __init__(self, in_backward: InBackward, hook: object) -> None:
        self._in_backward = weakref.ref(in_backward)
        self._hook = hook

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing.

        Gradients then accumulate again, and ``step()`` updates all parameters.
        """
        in_backward = self._in_backward()
        if in_backward is not None:
            in_backward.deactivate(self._hook)

    def __enter__(self) -> BackwardHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class InBackward:
    """The updates of one optimizer within backward passes.

    A caller holds the optimizer's lock, apart from :attr:`is_active` and :attr:`takes_part`.

    Args:
        settings: the optimizer and its policy.
        mirror: what we wrote into the groups.
        position: the position, and who knows it.
        serving: the backend.
        averaging: the averages.
        let_go: has native code forget the values of the coming ordinary steps.
    """

    def __init__(
        self,
        settings: Settings,
        mirror: GroupMirror,
        position: Position,
        serving: Serving,
        averaging: Averaging,
        let_go: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._mirror = mirror
        self._position = position
        self._serving = serving
        self._averaging = averaging
        self._let_go = let_go
        # The hook of native code; None while the hooks are removed.
        self._hook: Any = None
        # The parameters that have the hook, by their id. A parameter that has left the optimizer is
        # freed as without a hook.
        self._hooked: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    # ---- questions

    @property
    def is_active(self) -> bool:
        """Whether parameters have hooks."""
        return self._hook is not None

    @property
    def has_begun(self) -> bool:
        """Whether the present pass has updated a parameter."""
        fused = self._serving.fused
        return fused is not None and bool(fused.plan.native.in_pass)

    @property
    def takes_part(self) -> bool:
        """Whether the next step must know of passes."""
        return self.is_active or self.has_begun

    def is_done(self, param: Tensor) -> bool:
        """Return whether the present pass has updated a parameter."""
        fused = self._serving.fused
        return fused is not None and bool(fused.plan.native.is_done(param))

    def refuse_in_pass(self, what: str) -> None:
        """Raise if some parameters are a step ahead of the others.

        Args:
            what: what cannot be done meanwhile.

        Raises:
            RuntimeError: naming the remedy.
        """
        if self.has_begun:
            raise RuntimeError(
                f"{what} cannot run between a backward pass and step(), where step_in_backward() "
                "has updated a part of the parameters: call it after step()"
            )

    def refuse_torchs_step(self) -> None:
        """Raise if some parameters are a step ahead, since torch's own step would move them again.

        Raises:
            RuntimeError: naming the remedy.
        """
        if self.has_begun:
            raise RuntimeError(
                "step() cannot end this backward pass: step_in_backward() has updated a part of "
                "the parameters, and the wrapped optimizer's own step would update all of them; "
                "call step() without further arguments, and with the optimizer's step as it was"
            )

    def explain(self) -> list[str]:
        """Return a line for each way in which parameters are updated; none if inactive."""
        if not self.is_active:
            return []
        ways: dict[str, int] = {}
        for param, why in self._serving.reasons():
            if why is None and id(param) in self._hooked:
                way = "in backward: {} parameter tensors, updated by their hooks"
            else:
                why = why or "it gets a hook in the step after its first gradient"
                way = f"in step(): {{}} parameter tensors, which keep their gradients: {why}"
            ways[way] = ways.get(way, 0) + 1
        return [way.format(count) for way, count in ways.items()]

    # ---- hooks

    def activate(self, gradients_are_reduced: object, lock: threading.RLock) -> BackwardHandle:
        """Give each parameter that requires a gradient the hook.

        Args:
            gradients_are_reduced: whether the ranks have the same gradients when hooks run.
            lock: the optimizer's lock.
        """
        is_reduced = check_bool("gradients_are_reduced", gradients_are_reduced)
        self._refuse_second_call()
        self._refuse_norms()
        if not is_reduced:
            self._refuse_ranks()
        plan = self._make(lock).plan
        ours = weakref.ref(self)

        def mend(param: Tensor, is_second: bool) -> bool:
            found = ours()
            return found is not None and found._mend(param, is_second)

        # If a compiled function calls backward(), torch.compile would trace the hooks, and fail.
        untraced = torch.compiler.disable(mend)  # type: ignore[no-untyped-call]
        try:
            self._hook = plan.lib.Hook(plan.native, untraced, lock)
            self.add_hooks(parameters_of(self._settings.optimizer))
            return BackwardHandle(self, self._hook)
        except BaseException:
            self.deactivate(self._hook)
            raise

    def deactivate(self, hook: object) -> None:
        """Remove a hook from all parameters, if the hook is still in effect."""
        if hook is None or hook is not self._hook:
            return
        try:
            for param in list(self._hooked.values()):
                hooks: Any = param._post_accumulate_grad_hooks or {}
                for number in [number for number, each in hooks.items() if each is hook]:
                    hooks.pop(number, None)
            self._hooked.clear()
            self._hook = None
        except KeyboardInterrupt:
            # Hooks that stayed would update parameters, with no handle to remove them.
            self.deactivate(hook)
            raise

    def add_hooks(self, params: Iterable[Tensor]) -> None:
        """Give the hook to those parameters that require a gradient and lack it."""
        if self._hook is None:
            return
        for param in params:
            if param.requires_grad and id(param) not in self._hooked:
                register: Any = param.register_post_accumulate_grad_hook
                # Noted first: an interrupt may come as soon as the parameter has the hook.
                self._hooked[id(param)] = param
                register(self._hook)

    def _refuse_second_call(self) -> None:
        if self.is_active:
            raise RuntimeError(
                "step_in_backward() is in effect already: one call serves all parameters; call "
                "remove() of its handle first to begin anew"
            )

    def _refuse_norms(self) -> None:
        settings = self._settings
        for name in ("max_grad_norm", "skip_above"):
            value = getattr(settings, name)
            if value is not None:
                raise ValueError(
                    f"step_in_backward() cannot serve an optimizer with {name}={value!r}: the norm "
                    "of all gradients is known after the last one only; construct the optimizer "
                    f"without {name}"
                )

    def _make(self, lock: threading.RLock) -> FusedBackend:
        """Return the backend, which must have kernels that update single parameters."""
        serving = self._serving
        fused = None
        traits = serving.traits
        why: str | None = serving.reason
        if traits is not None and not traits.steps_in_backward:
            why = f"the backend {serving.name!r} updates all parameters at once"
        elif traits is not None:
            fused = serving.make(lock)
            reasons = [reason for _, reason in serving.reasons()]
            is_served = fused is not None and None in reasons
            why = None if is_served else (reasons or ["it has no parameters"])[0] or serving.reason
        if fused is None or why is not None:
            raise ValueError(
                f"step_in_backward() cannot serve {class_name(type(self._settings.optimizer))}, as "
                f"only fused kernels update single parameters: {why}; see opt.explain(), or call "
                "step() after backward() as before"
            )
        return fused

    def _refuse_ranks(self) -> None:
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
            return
        plain = [p for p in parameters_of(self._settings.optimizer) if type(p) is not DTensor]
        if plain:
            raise ValueError(
                f"gradients_are_reduced=False: a hook sees one rank's gradient alone, and "
                f"the {dist.get_world_size()} ranks would part ({len(plain)} parameters are no "
                "DTensors); shard the model by fully_shard, or give gradients_are_reduced=True if "
                "each rank's gradients are already the same"
            )

    # ---- a pass

    def drop_pass(self) -> None:
        """Forget the present pass: a checkpoint has replaced what the pass has begun."""
        fused = self._serving.fused
        if fused is not None:
            fused.plan.native.drop_pass()

    def check_step(self) -> None:
        """Make ready for the step that ends the pass; hook parameters that now get gradients.

        Raises:
            RuntimeError: if a parameter that the pass has updated has another gradient.
        """
        fused = self._serving.fused
        if fused is None or not self.takes_part:
            return
        plan = fused.plan
        if plan.native.in_pass:
            plan.commit()  # an interrupt may have come between kernel and commit
        is_done = plan.native.is_done
        with_gradient = [p for p in parameters_of(self._settings.optimizer) if p.grad is not None]
        for param in with_gradient:
            if is_done(param):
                raise _second_gradient(param)
        self.add_hooks(with_gradient)

    def _mend(self, param: Tensor, is_second: bool) -> bool:
        """Bring the plan and the pass up to date for a gradient; return whether to try again.

        If the answer is False, the parameter is updated, or keeps its gradient for ``step()``.

        Args:
            param: the parameter whose gradient is complete.
            is_second: whether the pass has updated the parameter already.
        """
        fused = self._serving.fused
        if is_second:
            raise _second_gradient(param)
        if fused is None or not is_profiled(self._settings.optimizer):
            return False  # other code has replaced the step
        plan, lib = fused.plan, fused.plan.lib
        native = plan.native
        if native.in_pass:
            plan.commit()
        else:
            self._begin()
        plan.refresh()
        if len(plan.scalars) != len(self._mirror.records):
            self._position.overrule()  # other code has just added a group
        course = self._position.course()
        again = False
        try:
            native.open_pass(course.rates, course.weights, fused.open_pass(course))
            plan.release()
            if native.has_row(param):
                if not plan.pending:
                    return True
                again = native.update_one(param) == lib.NO_ROW
                if not again:
                    plan.commit()
        except BaseException:
            # Ctrl-C during the kernel is raised after the kernel, which has filled the new state.
            if native.in_pass:
                plan.commit()
            native.close_pass()
            raise
        native.close_pass()  # native code creates no state, so the next gradient comes here too
        return again

    def _begin(self) -> None:
        """Evaluate the values of a pass, before any parameter changes; a ``scale_fn`` may raise."""
        self._averaging.refuse_exchanged("a backward pass with step_in_backward()")
        if current_device.is_capturing():
            raise RuntimeError(
                "a graph cannot capture a backward pass with step_in_backward(): remove the handle "
                "before the capture"
            )
        position, mirror = self._position, self._mirror
        position.catch_up()
        self._let_go()
        if not mirror.is_untouched(position.number):
            position.overrule()
        mirror.look_ahead(position.number + 1)


def _second_gradient(param: Tensor) -> RuntimeError:
    return RuntimeError(
        f"a parameter of shape {tuple(param.shape)} has got a second gradient before step(): "
        "step_in_backward() has updated it already, and did nothing with the second gradient; call "
        "zero_grad() to drop it, and step() after each backward(). To accumulate gradients, remove "
        "the handle"
    )
