"""Wrapper: stands in for a torch optimizer: groups, state, attributes, hooks and copies."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clr_optim import backends
from clr_optim.checks import check_callable_of_one
from clr_optim.core import leftover
from clr_optim.core.saved import read_position
from clr_optim.core.scheduler_view import CyclicalScheduler
from clr_optim.core.settings import Settings
from clr_optim.core.shared import Shared, alone
from clr_optim.core.warn import warn_each
from clr_optim.gate import NO_STATISTICS, Statistics

__all__ = ["OptimizerT", "Wrapper"]

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)

# The attributes that torch's Optimizer.__init__ would make; its groups are not wanted here.
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Wrapper(Optimizer, Generic[OptimizerT]):
    """An optimizer whose groups, state and attributes are those of another, the wrapped one."""

    _inner: OptimizerT
    _shared: Shared
    _scheduler: weakref.ref[CyclicalScheduler] | None
    _cycle_end_hooks: OrderedDict[int, Callable[[Any], None]]

    def _set_up(self, settings: Settings, chosen: tuple[str, str], statistics: Statistics) -> None:
        """Make the attributes of a new object.

        Args:
            settings: the settings, with the wrapped optimizer.
            chosen: the backend's name, and why it was chosen.
            statistics: those of a gate that a checkpoint has.
        """
        self._inner = settings.optimizer  # type: ignore[assignment]
        self._shared = Shared(settings, chosen, statistics)
        self._scheduler = None
        self._cycle_end_hooks = OrderedDict()
        for name in _HOOKS:
            setattr(self, name, OrderedDict())
        self._patch_step_function()

    # ---- what belongs to the wrapped optimizer

    @property
    def optimizer(self) -> OptimizerT:
        """The wrapped optimizer."""
        return self._inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups, the same list."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._inner.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state, the same object."""
        return self._inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self._inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults, the same object."""
        return self._inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._inner.defaults = value

    def __getattr__(self, name: str) -> Any:
        # Python asks only for names that this object lacks: train(), _step_supports_amp_scaling, …
        inner = self.__dict__.get("_inner")  # absent while the object is unpickled
        if inner is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name == "_step_supports_amp_scaling" and self._shared.in_backward.is_active:
            raise RuntimeError(
                "a GradScaler cannot serve an optimizer with step_in_backward(): the hooks see "
                "scaled gradients, and no overflow check comes before them; train in bfloat16, "
                "which needs no scaler, or remove the handle"
            )
        return getattr(inner, name)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Reset the gradients, as the wrapped optimizer does.

        Args:
            set_to_none: free the gradients, instead of filling them with zeros; ``None`` is the
                wrapped optimizer's own default, which is ``True`` for torch's.

        Example:
            >>> weight = torch.ones(3, requires_grad=True)
            >>> opt = CyclicalOptimizer(torch.optim.SGD([weight], lr=0.4))
            >>> weight.sum().backward()
            >>> opt.zero_grad()
            >>> weight.grad is None
            True
        """
        if set_to_none is None:
            self._inner.zero_grad()  # a wrapped class may take no argument
        else:
            self._inner.zero_grad(set_to_none=set_to_none)

    # ---- hooks and views of our own

    def register_cycle_end_hook(self, hook: Callable[[Any], None]) -> RemovableHandle:
        """Call ``hook(optimizer)`` after each step that completes a cycle.

        The hook is the place to take a snapshot, to average weights, or to stop. If a cycle falls
        at its end, the rate is then at its lowest. The hook runs before step post-hooks. Copies and
        pickles omit all hooks. A warning says if the schedule has no cycles.

        Args:
            hook: a callable of one optimizer, this one.

        Returns:
            A handle with ``remove()``.

        Raises:
            TypeError: if the hook cannot be called with one argument.

        Example:
            >>> weight = torch.ones(3, requires_grad=True)
            >>> opt = CyclicalOptimizer(torch.optim.SGD([weight], lr=0.4), step_size_up=2)
            >>> handle = opt.register_cycle_end_hook(lambda opt: print("after", opt.iteration))
            >>> for _ in range(9):
            ...     opt.step()
            after 4
            after 8
            >>> handle.remove()
        """
        check_callable_of_one("hook", hook, "optimizer")
        if self.schedule.steps_to_cycle_end(0) is None:
            message = (
                f"register_cycle_end_hook has no effect: the schedule {self.schedule.name!r} has "
                "no cycles; use a policy with cycles, such as 'triangular', or "
                "register_step_post_hook"
            )
            warn_each([message])
        return self._add_cycle_end_hook(hook)

    def _add_cycle_end_hook(self, hook: Callable[[Any], None]) -> RemovableHandle:
        handle = RemovableHandle(self._cycle_end_hooks)
        self._cycle_end_hooks[handle.id] = hook
        return handle

    @property
    def scheduler(self) -> CyclicalScheduler:
        """A view for frameworks that insist on a scheduler; its ``step()`` changes nothing."""
        # A weak reference: a cycle of references would keep the parameters until the next gc.
        scheduler = None if self._scheduler is None else self._scheduler()
        if scheduler is None:
            scheduler = CyclicalScheduler(self)
            self._scheduler = weakref.ref(scheduler)
        return scheduler

    # ---- copies and pickles

    @alone
    def __getstate__(self) -> dict[str, Any]:
        shared = self._shared
        shared.refuse_unsettled("a copy")
        shared.position.settle()
        shared.write_notes()
        settings = shared.settings
        # Without hooks, as in torch.
        return {
            "optimizer": self._inner,
            "schedule": settings.schedule,
            "cycle_momentum": settings.cycle_momentum,
            "max_grad_norm": settings.max_grad_norm,
            "backend": settings.backend,
            "schedules": settings.schedules,
            "average": settings.average,
            "master_weights": settings.master_weights,
            "skip_above": settings.skip_above,
            "statistics": NO_STATISTICS if shared.gate is None else shared.gate.statistics,
            "own": leftover.noted_settings(self._inner),
            # Another thread may step before all groups are pickled.
            "position": shared.position.number,
        }

    @alone
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # With the lock: no other thread steps meanwhile, and the copy is of one step.
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizer" not in state:  # the partial form of torch's own classes
            self._inner.__setstate__(state)
            self._shared.position.settle()
            return
        optimizer, schedule = state["optimizer"], state["schedule"]
        settings = Settings(
            optimizer,
            schedule,
            state["cycle_momentum"],
            state["max_grad_norm"],
            state["backend"],
            # Pickles of earlier versions lack some of these.
            state.get("schedules", {}),
            state.get("skip_above"),
            state.get("average"),
            state.get("master_weights", False),
        )
        chosen = backends.resolve(settings.backend, optimizer)
        self._set_up(settings, chosen, state.get("statistics", NO_STATISTICS))
        position = state.get("position")
        if position is None:
            position = read_position(self.param_groups, "param_groups")[0]
        self._shared.position.go_to(position)
        own = state.get("own") or leftover.own_settings(optimizer, schedule, None, False)
        leftover.take_note(optimizer, own, schedule, None, settings.schedules)
