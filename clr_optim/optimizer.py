"""CyclicalOptimizer: any torch optimizer, its learning rate cycled by the step itself."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import numbers
import operator
import os
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.hooks import RemovableHandle

from clr_optim import backends
from clr_optim.backends.base import Course, FusedBackend, Gradients
from clr_optim.backends.native import BuildError, NativeBackend, rule_for
from clr_optim.backends.torch import (
    ClippedGradients,
    HiddenGradients,
    check_clippable,
    is_profiled,
    is_wrapped_by_torch,
    raw_step,
)
from clr_optim.checkpoint import (
    after_load_hooks,
    are_groups,
    check_for,
    check_layout,
    check_mapping,
    check_momentum_state,
    check_tensor_lr,
    holds_key,
    in_our_words,
    loads_as_torch,
    own_counters,
    policy_name,
    undone_on_error,
    without_load_hooks,
)
from clr_optim.checks import (
    as_position,
    check_bool,
    check_bounds,
    check_choice,
    check_int,
    check_momenta,
    check_number,
    item,
    shown,
    values_of,
)
from clr_optim.core.warn import callers_level, warn_each
from clr_optim.keys import BASE, BASE_MOMENTUM, ENTRY, KEYS, MAX, MAX_MOMENTUM, NOTE, SCHEDULE, STEP
from clr_optim.plan import classify
from clr_optim.refused_writes import refuse_writes
from clr_optim.rules import class_name
from clr_optim.schedule import (
    SCALE_MODES,
    ScaleFn,
    Schedule,
    check_growth,
    exp_range,
    exp_range_bounds,
    triangular,
    triangular2,
)
from clr_optim.sharding import local_part, no_sums, spread_of, spreads, sum_over_ranks
from clr_optim.torch_schedulers import read_scheduler

__all__ = ["CyclicalOptimizer", "CyclicalScheduler"]

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)

POLICIES = ("triangular", "triangular2", "exp_range", "exp_range_bounds")

_BOUNDS_OF, _RATE_OF = operator.itemgetter(BASE, MAX), operator.itemgetter("lr")

# The paper's guideline for the lower bound: a third or a quarter of the upper one.
_BASE_FRACTION = 4.0

# torch's CyclicLR's.
_LOW_MOMENTUM, _HIGH_MOMENTUM = 0.8, 0.9

_AS_THEY_ARE = Gradients()

#: What keeps the user's gradients while copies, or nothing, stand in their place.
_Borrowed = list[ClippedGradients | HiddenGradients]

# How often groups that other threads change meanwhile are read again.
_ATTEMPTS = 8

#: a bound: a number, or one per group
_Number = float | Tensor | Sequence[float | Tensor] | npt.NDArray[Any]


class _Shared:
    """What changes from step to step beside the groups.

    An object of its own, so that a framework that copies ``__dict__`` (Lightning does) shares it.
    """

    def __init__(self, chosen: tuple[str, str]) -> None:
        #: held by the thread that steps the optimizer, changes its course or copies its state
        self.lock = threading.RLock()
        #: the position that the groups show, and the kernel's count of steps when they were written
        self.counted = (0, 0)
        # What was last written into the groups, to tell other code's writes from ours; per group
        # the object in `lr` and the value it was given.
        self.groups: Sequence[dict[str, Any]] | None = None
        #: the groups that were in that list then
        self.members: list[dict[str, Any]] = []
        self.bounds: list[tuple[float, float]] = []
        #: bounds by the constructor's arguments and the groups' own lr; None is the default base_lr
        self.given: list[tuple[float | None, float]] = []
        #: groups that somebody put there since, and the bounds that were found for them
        self.seen: tuple[Sequence[dict[str, Any]], list[tuple[float, float]]] | None = None
        #: the bounds of each group's momentum, and the object that holds it
        self.momenta: list[tuple[float, float]] = []
        self.held_momenta: list[object] = []
        self.rates: list[tuple[object, float]] = []
        self.warned = False
        self.grad_norm: Tensor | None = None
        #: the position whose rate is the last, as of the scheduler's step()
        self.shown = 0
        #: the backend that serves, and why
        self.chosen = chosen
        self.fused: FusedBackend | None = None
        _alive.add(self)

    @property
    def position(self) -> int:
        """The position that the groups show."""
        return self.counted[0]

    @property
    def steps(self) -> int:
        """Steps that the fused kernels have taken."""
        return 0 if self.fused is None else self.fused.plan.tally[1]

    def are_ours(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether these are the groups that were last written.

        The list may be another one: some optimizers make it anew at each access.
        """
        known = self.groups
        if known is groups or known is None:
            return known is groups
        return len(known) == len(groups) and all(map(operator.is_, known, groups))


# A forked process has a copy of each lock as it was, perhaps held by a thread that it has not.
_alive: weakref.WeakSet[_Shared] = weakref.WeakSet()


def _renew_locks() -> None:
    for shared in list(_alive):
        shared.lock = threading.RLock()
        if shared.fused is not None:
            shared.fused.plan.after_fork(shared.lock)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _alone(
    method: Callable[Concatenate[Any, _Arguments], _Result],
) -> Callable[Concatenate[Any, _Arguments], _Result]:
    """Have a method run while no other thread is in a step or in another such method."""

    @functools.wraps(method)
    def alone(self: Any, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with self._shared.lock:
            self._catch_up()
            return method(self, *args, **kwargs)

    return alone


def _per_group(name: str, value: object, groups: int, **limits: Any) -> list[float]:
    """A number, or one per group, as a list of floats."""
    values = values_of(value)
    if values is not None:
        if len(values) != groups:
            raise ValueError(
                f"{name} has {len(values)} values and the optimizer {groups} parameter groups: "
                f"give one number, or one per group; got {value!r}"
            )
        return [check_number(f"{name}[{i}]", v, **limits) for i, v in enumerate(values)]
    return [check_number(name, value, **limits)] * groups


def _is_zero(grad: Tensor) -> bool:
    if grad.layout is not torch.strided:
        grad = grad.coalesce().values() if grad.layout is torch.sparse_coo else grad.to_dense()
    return not bool(grad.any())


@refuse_writes
class CyclicalOptimizer(Optimizer, Generic[OptimizerT]):
    """Wraps a torch optimizer and cycles its learning rate, with nothing else to step or save.

    For the ``t``-th ``step()``, counted from 0 (see :mod:`clr_optim.schedule`)::

        lr(t) = b(t)·base_lr + a(t)·(max_lr − base_lr)·w(x(t))

    Between steps ``param_groups[i]["lr"]`` holds the rate that the next step will use, as it does
    with a torch scheduler stepped after every optimizer step. ``param_groups``, ``state`` and
    ``defaults`` are the wrapped optimizer's own; the position sits in the groups, and so in every
    checkpoint.

    The cycle starts at step 0, whatever an earlier wrapper of this optimizer left in the groups. If
    the optimizer has loaded a checkpoint of ours before it is wrapped, the cycle goes on there.

    A step without any gradient advances the cycle; one that did not happen (an exception in the
    closure or a pre-hook, an overflow under AMP) does not. Other code that writes ``lr`` is
    overruled, with one warning: use :meth:`set_bounds` and :meth:`set_iteration`.

    Args:
        optimizer: any :class:`torch.optim.Optimizer` instance.
        policy: ``"triangular"``, ``"triangular2"``, ``"exp_range"``, ``"exp_range_bounds"`` or a
            :class:`~clr_optim.schedule.Schedule` (which brings its own step sizes, gamma, window
            and scale function).
        base_lr: lower bound, a number or one per group (a list, a tuple, an array or a tensor; a
            tensor of one element is a number); ``None`` is ``max_lr / 4``, the paper's
            guideline.
        max_lr: upper bound, a number or one per group; ``None`` is the group's own ``lr``: the
            rate chosen for the optimizer becomes the top of the cycle. If an earlier wrapper cycled
            this optimizer, the own ``lr`` is the one from before, or the one that other code has
            written since. If the optimizer has loaded a checkpoint of ours, ``None`` is that
            checkpoint's bound, for ``base_lr`` too.
        step_size_up: steps of the rising half of a cycle; the paper advises 2 to 10 epochs.
        step_size_down: steps of the falling half; ``None`` is ``step_size_up``. Not both 0.
        gamma: decay per step of the ``exp_range`` policies, in (0, 1].
        window: ``"triangle"``, ``"welch"`` or ``"hann"``.
        scale_fn, scale_mode: as in :class:`torch.optim.lr_scheduler.CyclicLR`; with ``scale_fn``
            the policy's own decay is not used.
        cycle_momentum: cycle ``momentum``, or ``betas[0]``, against the rate.
        base_momentum, max_momentum: its bounds, a number or one per group, in [0, 1]; as in torch
            of no effect without ``cycle_momentum``, which is not the default here.
        max_grad_norm: clip by the global norm as :func:`torch.nn.utils.clip_grad_norm_` before
            each step would; gradients in memory stay as they were. See :attr:`grad_norm`.
        backend: ``"torch"`` (the wrapped optimizer's own step, for everything), ``"native"`` (C++
            kernels for CPU tensors) and ``"triton"`` (kernels for GPU tensors), both equal to
            torch's for-loop step up to rounding, or ``"auto"``: where parameters are on NVIDIA GPUs
            that Triton compiles for ``"triton"``, else ``"native"``, where they have a kernel, and
            for the rest the optimizer's own step. See :meth:`explain`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right, before
            anything has changed.

    Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = CyclicalOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3),
        ...                         policy="exp_range", step_size_up=100)
        >>> opt.get_last_lr()
        [0.00025]
        >>> loss = model(torch.ones(1, 2)).sum()
        >>> loss.backward()
        >>> opt.step()
        >>> opt.iteration
        1
    """

    def __init__(
        self,
        optimizer: OptimizerT,
        policy: str | Schedule = "triangular",
        *,
        base_lr: _Number | None = None,
        max_lr: _Number | None = None,
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        gamma: float = 0.99994,
        window: str = "triangle",
        scale_fn: ScaleFn | None = None,
        scale_mode: str = "cycle",
        cycle_momentum: bool = False,
        base_momentum: _Number = _LOW_MOMENTUM,
        max_momentum: _Number = _HIGH_MOMENTUM,
        max_grad_norm: float | None = None,
        backend: str = "auto",
    ) -> None:
        if isinstance(optimizer, CyclicalOptimizer):
            raise ValueError(
                "optimizer is already a CyclicalOptimizer: wrap its .optimizer, or change its "
                "course with set_bounds and set_iteration"
            )
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be an instance of torch.optim.Optimizer, got {optimizer!r} "
                f"of type {type(optimizer).__name__}"
            )
        schedule = _make_schedule(
            policy,
            step_size_up=step_size_up,
            step_size_down=step_size_down,
            gamma=gamma,
            window=window,
            scale_fn=scale_fn,
            scale_mode=scale_mode,
        )
        groups = optimizer.param_groups
        for i, group in enumerate(groups):
            if "lr" not in group:
                raise ValueError(
                    f"optimizer: parameter group {i} of {type(optimizer).__name__} has no 'lr', "
                    "so there is no rate to cycle"
                )
            check_tensor_lr(group["lr"], f"optimizer: lr of parameter group {i}")
        if schedule.has_bounds and not (base_lr is None and max_lr is None):
            raise ValueError(
                f"base_lr={base_lr!r} and max_lr={max_lr!r} have no effect: every phase of the "
                f"schedule {schedule.name!r} has bounds of its own; leave them out"
            )
        # A checkpoint may have been loaded before the optimizer was wrapped.
        leftover = _leftover(optimizer)
        position, resumed = _read_position(groups, "optimizer") if leftover is None else (0, False)
        own = _own_settings(optimizer, schedule, leftover, max_lr is not None)
        bounds = [
            _initial_bounds(group, f" in parameter group {i}", base, top)
            for i, (group, base, top) in enumerate(
                zip(
                    groups if leftover is None else own,
                    _optional_per_group("base_lr", base_lr, len(groups)),
                    _optional_per_group("max_lr", max_lr, len(groups)),
                    strict=True,
                )
            )
        ]
        if max_lr is None and not schedule.has_bounds:
            _warn_scheduled_rates(groups)
        cycle_momentum = check_bool("cycle_momentum", cycle_momentum)
        low = _per_group("base_momentum", base_momentum, len(groups), maximum=1.0)
        high = _per_group("max_momentum", max_momentum, len(groups), maximum=1.0)
        for i, (group, b, m) in enumerate(zip(groups, low, high, strict=True)):
            if cycle_momentum and "betas" not in group and "momentum" not in group:
                raise ValueError(
                    f"cycle_momentum=True needs a 'momentum' or 'betas' to cycle, and "
                    f"parameter group {i} of {type(optimizer).__name__} has neither: "
                    "leave it False"
                )
            beta = cycle_momentum and "betas" in group
            check_momenta(b, m, f" for parameter group {i}", beta=beta)
        if cycle_momentum:
            check_momentum_state(optimizer)
        if max_grad_norm is not None:
            max_grad_norm = check_number(
                "max_grad_norm", max_grad_norm, open_minimum=True, finite=False
            )
        schedule.rates(position, bounds)  # a scale_fn may raise
        chosen = backends.resolve(backend, optimizer)
        saved = groups[0].get(SCHEDULE) if resumed and groups else None
        warned: list[str | None] = []
        if leftover is not None:
            warned = [_starts_anew(groups, leftover["loaded"])]
        elif resumed and not schedule.has_bounds:
            given = base_lr is not None or max_lr is not None
            warned = [
                _other_arguments(groups, bounds) if given else _edited_rates(groups, schedule)
            ]

        # Nothing has changed up to here, and nothing raises from here on.
        _separate_defaults(optimizer)
        self._set_up(optimizer, schedule, cycle_momentum, max_grad_norm, backend, chosen)
        if leftover is not None:
            _clear_leftover(groups, own)
        for group, (base, top), b, m in zip(groups, bounds, low, high, strict=True):
            group[BASE], group[MAX] = base, top
            if cycle_momentum:
                group[BASE_MOMENTUM], group[MAX_MOMENTUM] = b, m
        self._change_course(position)
        self._shared.given = [(None if base_lr is None else base, top) for base, top in bounds]
        _take_note(optimizer, own, schedule, position if resumed else None)
        if saved is not None:
            self._warn_other_policy(saved, "the wrapped optimizer")
        warn_each(warned)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: CyclicLR | OneCycleLR,
        *,
        max_grad_norm: float | None = None,
        backend: str = "auto",
    ) -> CyclicalOptimizer[Optimizer]:
        """Take over a torch ``CyclicLR`` or ``OneCycleLR`` and its optimizer, in mid-run or before.

        The rates go on as the scheduler's would, and so do ``momentum`` or ``betas[0]`` where it
        cycles them: ``iteration`` is the number of scheduler steps taken. Call it between a
        ``scheduler.step()`` and the next ``optimizer.step()``; from then on step only what it
        returns. The scheduler is left as it is, and so is what it put into groups and optimizer.

        Where a ``OneCycleLR`` turns between two steps (``pct_start * total_steps`` is no whole
        number), the rates are the same too, but computed by a ``scale_fn``: a step cannot then be
        captured into a CUDA graph, and there is no cycle to count. To resume, build scheduler and
        optimizer anew, take them over, and load the checkpoint. After its last step,
        ``total_steps - 1``, the lowest rate stays, where torch would overshoot it once and then
        raise.

        Args:
            scheduler: an instance of :class:`torch.optim.lr_scheduler.CyclicLR` (whole step sizes,
                ``base_lr <= max_lr``, ``gamma`` in (0, 1]) or
                :class:`torch.optim.lr_scheduler.OneCycleLR` (``div_factor >= 1``).
            max_grad_norm, backend: as in the constructor.

        Returns:
            An optimizer around ``scheduler.optimizer``.

        Raises:
            TypeError: for any other scheduler, and for a subclass that computes rates of its own.
            ValueError: for settings that no policy here has, and where a group's ``lr`` or momentum
                is not what the scheduler says: naming both, before anything has changed.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> adam = torch.optim.Adam(model.parameters())
            >>> scheduler = torch.optim.lr_scheduler.CyclicLR(
            ...     adam, base_lr=0.1, max_lr=0.5, step_size_up=4, cycle_momentum=False)
            >>> for _ in range(3):
            ...     adam.step()
            ...     scheduler.step()
            >>> opt = CyclicalOptimizer.from_scheduler(scheduler)
            >>> opt.iteration, opt.get_last_lr()
            (3, [0.4])
            >>> opt.step()
            >>> opt.get_last_lr()
            [0.5]
        """
        course = read_scheduler(scheduler)
        options: dict[str, Any] = {}
        if course.momenta is not None:
            low, high = zip(*course.momenta, strict=True)
            options = {"cycle_momentum": True, "base_momentum": low, "max_momentum": high}
        base, top = zip(*course.bounds, strict=True)
        # The scheduler says where the cycle is, not the keys of an earlier wrapper or a checkpoint.
        groups = scheduler.optimizer.param_groups
        before = [dict(group) for group in groups]
        for group in groups:
            for key in KEYS:
                group.pop(key, None)
        try:
            opt = cast("type[CyclicalOptimizer[Optimizer]]", cls)(
                scheduler.optimizer,
                course.schedule,
                base_lr=base,
                max_lr=top,
                max_grad_norm=max_grad_norm,
                backend=backend,
                **options,
            )
        except BaseException:
            for group, items in zip(groups, before, strict=True):
                group.clear()
                group.update(items)
            raise
        opt.set_iteration(course.position)
        return opt

    def _set_up(
        self,
        optimizer: OptimizerT,
        schedule: Schedule,
        cycle_momentum: bool,
        max_grad_norm: float | None,
        backend: str,
        chosen: tuple[str, str],
    ) -> None:
        # Optimizer.__init__ would make groups of its own; the hooks are all we need of it.
        self._inner = optimizer
        self._schedule = schedule
        self._schedule_json = schedule.to_json()
        self._has_scale_fn = schedule.scale_fn is not None
        self._cycle_momentum = cycle_momentum
        self._max_grad_norm = max_grad_norm
        self._backend = backend
        self._shared = _Shared(chosen)
        self._scheduler: weakref.ref[CyclicalScheduler] | None = None
        self._cycle_end_hooks: OrderedDict[int, Callable[[Any], None]] = OrderedDict()
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()

    # ---- what belongs to the wrapped optimizer

    @property
    def optimizer(self) -> OptimizerT:
        """The wrapped optimizer."""
        return self._inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups, the very list."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._inner.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state, the very object."""
        return self._inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self._inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults, the very object."""
        return self._inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._inner.defaults = value

    def __getattr__(self, name: str) -> Any:
        # Only for what is not found here: train(), eval(), _step_supports_amp_scaling, ...
        # While unpickling there is nothing wrapped yet.
        inner = self.__dict__.get("_inner")
        if inner is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Reset the gradients, as the wrapped optimizer does.

        Args:
            set_to_none: free them, instead of filling them with zeros; ``None`` is the wrapped
                optimizer's own default, which is ``True`` for torch's.

        Example:
            >>> weight = torch.ones(3, requires_grad=True)
            >>> opt = CyclicalOptimizer(torch.optim.SGD([weight], lr=0.4))
            >>> weight.sum().backward()
            >>> opt.zero_grad()
            >>> weight.grad is None
            True
        """
        if set_to_none is None:
            self._inner.zero_grad()  # which may take no argument at all
        else:
            self._inner.zero_grad(set_to_none=set_to_none)

    @_alone
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group in mid-training; it joins the cycle where the others are.

        Args:
            param_group: as in torch. ``"max_lr"`` and ``"base_lr"`` in it are its bounds; without
                them the top is its own ``lr`` and the bottom a quarter of that.

        Raises:
            TypeError, ValueError: for what torch refuses, and for bounds that are none.

        Example:
            >>> model, head = torch.nn.Linear(4, 2), torch.nn.Linear(2, 1)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4))
            >>> opt.add_param_group({"params": head.parameters(), "base_lr": 0.2, "max_lr": 0.8})
            >>> opt.get_last_lr()
            [0.1, 0.2]
        """
        if not isinstance(param_group, dict):
            raise TypeError(
                f"param_group must be a dict, one group a call, got {shown(param_group)}"
            )
        torchs_own = type(self._inner).add_param_group is Optimizer.add_param_group
        if torchs_own and isinstance(self.param_groups, tuple):
            raise TypeError(
                "param_groups is a tuple, to which no group can be added: write "
                "opt.param_groups = list(opt.param_groups) first"
            )
        if "params" not in param_group:
            raise ValueError(
                f"param_group lacks 'params': give it the tensors to train; it has "
                f"{sorted(map(str, param_group))}"
            )
        given: dict[str, Any] = {
            k: param_group[k] for k in ("base_lr", "max_lr") if k in param_group
        }
        probe = {"lr": self.defaults.get("lr"), **param_group}
        check_tensor_lr(probe["lr"], "lr in param_group")
        bounds = _initial_bounds(
            probe,
            " in param_group",
            _maybe_number("param_group['base_lr']", given.get("base_lr")),
            _maybe_number("param_group['max_lr']", given.get("max_lr")),
        )
        shared = self._shared
        known = not self._only_the_device_knows() and self._are_known()
        if not known:
            self._settle()
        for key in given:
            del param_group[key]
        try:
            self._inner.add_param_group(param_group)
        except BaseException as error:
            param_group.update(given)
            if isinstance(error, TypeError):
                raise TypeError(
                    f"param_group['params'] must be a tensor or a list of tensors, got "
                    f"{shown(param_group['params'])}: {error}"
                ) from error
            if isinstance(error, ValueError):
                raise ValueError(
                    f"param_group cannot be added: {error}; 'params' must be leaf tensors that no "
                    "group has yet"
                ) from error
            raise
        _note_group(self._inner, self.param_groups[-1])
        self._set_group_bounds(len(self.param_groups) - 1, self.param_groups[-1], bounds)
        if known:
            self._join()
        else:
            self._go_to(shared.position)

    def __repr__(self) -> str:
        inner = "\n".join(
            line
            for line in repr(self._inner).splitlines()
            if not line.strip().startswith(f"{SCHEDULE}:")
        )
        return (
            f"{type(self).__name__} ({self._schedule.name}, iteration {self.iteration}, "
            f"backend {self._shared.chosen[0]})\n{inner}"
        )

    # ---- the position in the cycle

    @property
    def schedule(self) -> Schedule:
        """The policy, as a schedule."""
        return self._schedule

    @property
    def iteration(self) -> int:
        """Steps taken, and so the number that the next ``step()`` has, counted from 0.

        Waits for the device where only that knows: after steps that a GradScaler's fused path may
        have skipped, and once a step was captured into a graph.
        """
        shared = self._shared
        if shared.fused is None or not (
            shared.steps != shared.counted[1] or shared.fused.uncertain
        ):
            return self._believed_iteration()
        with shared.lock:
            self._catch_up()
            position = self._believed_iteration()
            # Groups that are not ours yet, loaded beneath us, say for themselves where they are.
            ours = position == shared.position and shared.are_ours(self.param_groups)
            if ours and shared.fused.uncertain:
                position = shared.fused.position()
                kept = any(map(self._is_kept, self.param_groups))
                if kept or position != shared.position:
                    self._write_bounds()
                    # Not as if it were all stepped: bounds written since are news to the device,
                    # and an older graph does not keep the rate of a group that was added.
                    self._go_to(position, there=True)
            return position

    def _believed_iteration(self) -> int:
        """:attr:`iteration` as far as the host knows, without waiting."""
        shared, groups = self._shared, self.param_groups
        seen = shared.position
        here = False
        known: set[int] | None = None
        for group in groups:
            step = group.get(STEP)
            if step is None:
                continue
            here = True
            if type(step) is int and step == seen:
                continue
            # Written from outside, as a sharded restore does? A group that was taken out
            # for a while, or copied earlier, shows a position that is over, beside those we wrote.
            if known is None:
                known = set(map(id, shared.members))
                known = known if any(id(each) in known for each in groups) else set()
            if known and id(group) not in known:
                continue
            position = as_position(step, f"param_groups: {STEP}")
            if position != seen:
                return position
        # A checkpoint without a position, loaded beneath us, starts at 0.
        return seen if here or shared.are_ours(groups) else 0

    @property
    def cycle(self) -> float:
        """Cycles done, of which 2.5 is half-way through the third."""
        return self._schedule.cycle(self.iteration)

    @property
    def steps_to_cycle_end(self) -> int | None:
        """Steps until the cycle is complete; ``None`` where there is no cycle."""
        return self._schedule.steps_to_cycle_end(self.iteration)

    def lr_at(self, step: int) -> list[float]:
        """The rates that a step uses.

        Args:
            step: its number, an integer >= 0, counted from 0.

        Returns:
            One rate per group.

        Raises:
            TypeError, ValueError: for a step that is none.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4), step_size_up=2)
            >>> opt.lr_at(1), opt.lr_at(2)
            ([0.25], [0.4])
        """
        return self._schedule.rates(check_int("step", step, minimum=0), self._bounds())

    def get_last_lr(self) -> list[float]:
        """The rates that the next step will use; the name is that of torch's schedulers.

        Returns:
            One rate per group.
        """
        return self.lr_at(self.iteration)

    @_alone
    def set_iteration(self, iteration: int) -> None:
        """Go to a step of the schedule. Fires no cycle-end hook.

        Args:
            iteration: the number of the next step, an integer >= 0.

        Raises:
            TypeError, ValueError: naming the value and what would be right.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4), step_size_up=3)
            >>> opt.set_iteration(9)
            >>> opt.cycle, opt.steps_to_cycle_end, opt.get_last_lr()
            (1.5, 3, [0.4])
        """
        iteration = as_position(iteration, "iteration")
        self._settle()
        self._change_course(iteration)

    @_alone
    def set_bounds(self, *, base_lr: _Number | None = None, max_lr: _Number | None = None) -> None:
        """Change the bounds, from the next step on.

        Args:
            base_lr, max_lr: a number or one per group; ``None`` leaves what there is.

        Raises:
            TypeError, ValueError: for bounds that are none, and where every phase of the schedule
                has bounds of its own.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4))
            >>> opt.set_bounds(base_lr=0.2)
            >>> opt.get_last_lr(), opt.lr_at(2000)
            ([0.2], [0.4])
        """
        if base_lr is None and max_lr is None:
            raise ValueError("base_lr=None and max_lr=None: give at least one of the bounds")
        if self._schedule.has_bounds:
            raise ValueError(
                f"base_lr={base_lr!r}, max_lr={max_lr!r}: every phase of the schedule "
                f"{self._schedule.name!r} has bounds of its own, which these would not change"
            )
        position = self._settle()
        groups = self.param_groups
        bounds = []
        for i, ((old_base, old_max), new_base, new_max) in enumerate(
            zip(
                self._bounds(),
                _optional_per_group("base_lr", base_lr, len(groups)),
                _optional_per_group("max_lr", max_lr, len(groups)),
                strict=True,
            )
        ):
            base = old_base if new_base is None else new_base
            top = old_max if new_max is None else new_max
            check_bounds(base, top, f" in parameter group {i}")
            bounds.append((base, top))
        for group, (base, top) in zip(groups, bounds, strict=True):
            group[BASE], group[MAX] = base, top
        self._change_course(position)

    def register_cycle_end_hook(self, hook: Callable[[Any], None]) -> RemovableHandle:
        """Call ``hook(optimizer)`` after each step that completes a cycle.

        The moment for a snapshot, for averaging weights, or for stopping: where a cycle falls at
        its end, the rate has come to its lowest. The hook runs before step post-hooks; like those
        it is not copied or pickled.

        Args:
            hook: a callable of one optimizer, this one.

        Returns:
            A handle with ``remove()``.

        Raises:
            TypeError: if it cannot be called.

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
        if not callable(hook):
            raise TypeError(f"hook must be a callable of one optimizer, got {hook!r}")
        handle = RemovableHandle(self._cycle_end_hooks)
        self._cycle_end_hooks[handle.id] = hook
        return handle

    @property
    def scheduler(self) -> CyclicalScheduler:
        """A view for frameworks that insist on a scheduler; its ``step()`` changes nothing."""
        # Held weakly: a cycle of references would keep the parameters alive until the next gc.
        scheduler = None if self._scheduler is None else self._scheduler()
        if scheduler is None:
            scheduler = CyclicalScheduler(self)
            self._scheduler = weakref.ref(scheduler)
        return scheduler

    @property
    def grad_norm(self) -> Tensor | None:
        """Global gradient norm before clipping, of the last step with ``max_grad_norm``.

        A 0-dim tensor; ``None`` before the first such step.
        """
        norm = self._shared.grad_norm
        # On the device the next step's goes to the same place.
        return norm if norm is None or self._shared.chosen[0] != "triton" else norm.clone()

    def explain(self) -> str:
        """Which backend serves which parameters, and why, in words.

        Returns:
            A line for each backend and reason.

        Example:
            >>> model = torch.nn.Linear(4, 2)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters()), backend="torch")
            >>> print(opt.explain())
            torch: 2 parameter tensors, 10 values, SGD: asked for by backend='torch'
        """
        name, reason = self._shared.chosen
        rule = rule_for(self._inner)
        if name != "torch" and not isinstance(rule, str):
            device = backends.plan_device(name, self._inner)
            classes = classify(self._inner, rule, device, capturable=name == "triton")
            # And what only a step finds out: memory that is shared, state of a form of its own.
            fused = self._shared.fused
            found = {} if fused is None else {id(p): why for p, why in fused.plan.rest}
            served: dict[tuple[str, str], list[Tensor]] = {}
            for why, params in classes.items():
                for param in params:
                    known = why or found.get(id(param))
                    by = ("torch", known) if known else (name, reason)
                    served.setdefault(by, []).append(param)
        else:
            served = {(name, reason): list(self._params())}
        of_class = class_name(type(self._inner))
        return "\n".join(
            f"{name}: {len(params)} parameter tensors, {_values_in(params)}, {of_class}: {why}"
            for (name, why), params in served.items()
        )

    # ---- a step

    def _step(
        self, closure: Callable[[], float] | None = None, *args: Any, **kwargs: Any
    ) -> float | None:
        """:meth:`step` beneath this object's own hooks."""
        if closure is not None and not callable(closure):
            raise TypeError(
                f"closure must be a callable that returns the loss, or None, got {shown(closure)}"
            )
        inner = self._inner
        # Any other outermost layer runs the wrapped optimizer's hooks by itself.
        hooked = is_profiled(inner)
        capturing = backends.is_capturing()
        if capturing:
            self._check_capture()
        call: tuple[Any, ...] = (inner, closure, *args) if closure is not None or args else (inner,)
        # Some optimizers never call Optimizer.__init__, and have no hooks.
        pre_hooks = getattr(inner, "_optimizer_step_pre_hooks", None) if hooked else None
        if pre_hooks:
            call, given = _run_pre_hooks(pre_hooks.values(), inner, call, kwargs)
            closure, args = (call[1], call[2:]) if len(call) > 1 else (given.get("closure"), ())
            kwargs = {key: value for key, value in given.items() if key != "closure"}
        else:
            given = kwargs

        fused = None
        if hooked and not args and not kwargs:
            fused = self._shared.fused or self._fused_backend()
        if fused is None:
            loss, reached = self._wrapped_step(capturing, closure, *args, **kwargs)
        else:
            loss = None
            if closure is not None:
                with self._shared.lock:
                    self._catch_up()
                    self._prepare()
                with torch.enable_grad():
                    loss = closure()
            with self._shared.lock:
                reached = self._fused_step(fused, capturing, closure is not None)
        if self._cycle_end_hooks and reached and self._schedule.is_cycle_end(reached):
            for hook in list(self._cycle_end_hooks.values()):
                hook(self)
        post_hooks = getattr(inner, "_optimizer_step_post_hooks", None) if hooked else None
        if post_hooks:
            for post_hook in post_hooks.values():
                post_hook(inner, call, given)
        return loss

    # With torch's hooks and its range for profilers: dearer than the whole step of a small model.
    _observed_step = Optimizer.profile_hook_step(_step)

    @overload
    def step(self, closure: None = None, *args: Any, **kwargs: Any) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *args: Any, **kwargs: Any) -> float: ...
    # Not traced by torch.compile: a graph break here, and nothing to recompile as the rate moves.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @functools.wraps(_step, assigned=())
    def step(self, *args: Any, **kwargs: Any) -> float | None:
        """One step of the wrapped optimizer, at the policy's rate; then the cycle advances.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.
            *args: for a wrapped ``step`` that takes more than a closure.
            **kwargs: likewise.

        Returns:
            What the wrapped ``step`` returns, which is the closure's loss.

        Raises:
            RuntimeError: if a backend asked for by name cannot serve all parameters, and where the
                step cannot be captured into a graph, saying why.

        Example:
            >>> weight = torch.ones(3, requires_grad=True)
            >>> opt = CyclicalOptimizer(torch.optim.SGD([weight], lr=0.4), step_size_up=3)
            >>> weight.sum().backward()
            >>> opt.step()
            >>> opt.iteration, opt.get_last_lr()
            (1, [0.2])
        """
        observed = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd.profiler._is_profiler_enabled
        )
        # Around a subclass's own step torch has put its wrapper, which has seen to them.
        if observed and not is_wrapped_by_torch(type(self)):
            return self._observed_step(*args, **kwargs)
        return self._step(*args, **kwargs)

    # Else torch puts its wrapper around this one.
    step.hooked = True  # type: ignore[attr-defined]

    def _prepare(self, at_zero: bool = False) -> None:
        """Have the groups hold what this step uses; a ``scale_fn`` that raises does so here."""
        if not at_zero:
            self._overrule()
        if self._has_scale_fn:
            self._next_rates()

    def _next_rates(self) -> list[float]:
        """Return the rates of the step after the next one."""
        shared = self._shared
        return self._schedule.rates(shared.counted[0] + 1, shared.bounds)

    def _wrapped_step(
        self, capturing: bool, closure: Callable[[], float] | None, *args: Any, **kwargs: Any
    ) -> tuple[float | None, int]:
        """The wrapped optimizer's own step: ``(loss, the position reached or 0)``.

        No lock is held while it runs: a closure may wait for other threads.
        """
        shared = self._shared
        at_zero = False
        rates: list[float] | None = None
        with shared.lock:
            self._catch_up()
            if closure is None and self._is_untouched():
                rates = self._next_rates()
            else:
                # A checkpointer's step has no closure. Asked before anything writes a rate.
                at_zero = closure is None and not capturing and self._is_zero_rate_step()
                self._prepare(at_zero)
            if self._only_the_device_knows():  # and it will not notice this step
                self._settle()
            before = shared.counted
        borrowed: _Borrowed = []
        losses: list[float | None] = []
        reached = 0

        def advance() -> None:
            """Go on by one step; called again after an interrupt, go where the first call went."""
            nonlocal reached
            with shared.lock:
                reached = reached or shared.position + 1  # other threads step, too
                if rates is not None and shared.fused is None and shared.counted is before:
                    self._advance(before, rates, 0)
                elif shared.position != reached:
                    self._go_to(reached, stepped=shared.fused is None)

        try:
            if self._overflowed():
                return None, 0
            self._torch_step(losses, borrowed, closure, *args, **kwargs)
            if not (at_zero or capturing):
                advance()
            return losses[0], reached
        except BaseException:
            _give_back(borrowed)
            self._forget_scale()
            if losses and not (at_zero or capturing):  # the step was taken
                advance()
            raise

    def _torch_step(
        self,
        losses: list[float | None],
        borrowed: _Borrowed,
        closure: Callable[[], float] | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """The wrapped optimizer's own step.

        Args:
            losses: takes what the step returns, as soon as it has been taken.
            borrowed: takes what gradients are kept by while others stand in their place.
            closure: as in torch.
            *args: for a ``step`` that takes more.
            **kwargs: likewise.
        """
        inner: Any = self._inner
        clipped = None if self._max_grad_norm is None else ClippedGradients(self._max_grad_norm)
        if clipped is not None:
            borrowed.append(clipped)

        def clip() -> None:
            if clipped is not None:
                self._shared.grad_norm = clipped.clip(self._params(), self._grad_scale())

        def reevaluate() -> float:
            assert closure is not None
            if clipped is not None:
                clipped.restore()
            loss = closure()
            with self._shared.lock:
                self._overrule()
            clip()
            return loss

        inner._opt_called = True  # a scheduler built on it before it was wrapped looks at this
        with self._handed_down(scaled=clipped is None):
            step = raw_step(inner)
            # Each in one line, so that no interrupt comes between the step and its note.
            if closure is None:
                clip()
                given = (None, *args) if args else ()
                losses.append(step(*given, **kwargs))
            elif args or not _takes_closure_by_name(step):
                losses.append(step(reevaluate, *args, **kwargs))
            else:
                losses.append(step(closure=reevaluate, **kwargs))
        _give_back(borrowed)

    # GradScaler's fused path hands what it knows to the object that it knows, which is this one.

    def _grad_scale(self) -> Tensor | None:
        """The scale that a GradScaler's fused path has left in the gradients."""
        grad_scale: Tensor | None = self.__dict__.get("grad_scale")
        return grad_scale

    def _overflowed(self) -> bool:
        """Whether a GradScaler's fused path has found an overflow; waits for the device.

        The wrapped step, asked to skip, would create its state nevertheless; torch's SGD a momentum
        buffer that was never written.
        """
        found_inf: Tensor | None = self.__dict__.get("found_inf")
        return found_inf is not None and bool(found_inf)

    def _forget_scale(self) -> None:
        """Take from the wrapped optimizer what an interrupt left there of a GradScaler's."""
        for name in ("grad_scale", "found_inf"):
            vars(self._inner).pop(name, None)

    @contextmanager
    def _handed_down(self, scaled: bool) -> Iterator[None]:
        """Give the wrapped optimizer what a GradScaler's fused path gave this one."""
        inner: Any = self._inner
        found_inf = self.__dict__.get("found_inf")
        if found_inf is None:
            yield
            return
        inner.grad_scale = self._grad_scale() if scaled else None
        inner.found_inf = found_inf
        try:
            yield
        finally:
            del inner.grad_scale, inner.found_inf

    def _fused_backend(self) -> FusedBackend | None:
        """The fused backend, compiled at first use; None where the wrapped step serves."""
        shared = self._shared
        if shared.fused is None and shared.chosen[0] != "torch":
            with shared.lock:
                self._make_fused_backend()
        return shared.fused

    def _make_fused_backend(self) -> None:
        shared = self._shared
        name = shared.chosen[0]
        if shared.fused is None:
            rule = rule_for(self._inner)
            if isinstance(rule, str):
                return
            devices = backends.devices(name)
            if not any(p.device.type in devices for p in self._params()):
                return
            try:
                if name == "triton":
                    from clr_optim.backends.triton import TritonBackend, try_out

                    device = backends.plan_device(name, self._inner)
                    if self._backend == "auto" and not backends.is_capturing():
                        # Nobody has asked for Triton, which may not be able to compile here.
                        try_out(next(p.device for p in self._params() if p.device.type == device))
                    shared.fused = TritonBackend(
                        self._inner, rule, self._schedule, device, shared.lock
                    )
                else:
                    shared.fused = NativeBackend(self._inner, rule, shared.lock)
            except BuildError as error:
                if self._backend != "auto":
                    raise
                shared.chosen = ("torch", f"the fused kernels cannot be compiled: {error}")
                _warn_no_kernels(error)

    def _course(self, at_zero: bool) -> Course:
        shared = self._shared
        momenta = None
        if self._cycle_momentum:
            momenta = self._read_momenta(self._inner.param_groups[: len(shared.rates)])
        rates = [0.0 if at_zero else value for _, value in shared.rates]
        kept = [
            (i, lr)
            for i, (lr, _) in enumerate(shared.rates)
            # Still a float in the step after which a group has become capturable.
            if isinstance(lr, Tensor) and self._is_kept(self._inner.param_groups[i])
        ]
        return Course(shared.counted[0], rates, shared.bounds, momenta, kept, not at_zero)

    def _fused_step(self, fused: FusedBackend, capturing: bool, evaluated: bool) -> int:
        """One call per bucket; what the kernels do not serve goes through the wrapped step.

        The caller holds the lock. What an interrupt leaves undone between the kernel and the groups
        is done by :meth:`_catch_up`, here or at the next question.

        Args:
            fused: the backend.
            capturing: whether the step is captured into a graph, and not run.
            evaluated: whether a closure was evaluated, which may have written anything.

        Returns:
            The position reached, or 0 if the cycle did not advance.
        """
        shared, tally = self._shared, fused.plan.tally
        if tally[1] != shared.counted[1]:
            self._catch_up()
        before = shared.counted
        at_zero = False
        rates: list[float] | None = None
        if self._is_untouched():
            rates = self._next_rates()
        else:
            # A checkpointer's step has no closure. Asked before anything below writes a rate.
            at_zero = not evaluated and not capturing and self._is_zero_rate_step()
            self._prepare(at_zero)
            if (
                at_zero
                and self._cycle_momentum
                and len(shared.rates) == len(self.param_groups)
                and fused.uncertain
            ):
                self._settle()  # momentum is then the host's to say
        self._inner._opt_called = True  # type: ignore[attr-defined]
        borrowed: _Borrowed = []
        try:
            happened = self._launched(fused, at_zero, capturing, borrowed)
            if not happened or at_zero or capturing:  # the device counts a graph's replays
                return 0
            # Unless a group came in between, or a signal handler went elsewhere.
            if rates is not None and shared.counted is before:
                self._advance(before, rates, tally[1])
            else:
                self._catch_up()
            return shared.counted[0]
        except BaseException:
            _give_back(borrowed)
            self._forget_scale()
            self._catch_up()
            fused.plan.release()
            if capturing:
                fused.plan.forget()  # state that was to be created is filled by no one
            raise

    def _catch_up(self) -> None:
        """Have the groups show the steps that the kernels took.

        An exception between the two, or a signal handler that asks or saves there, finds the
        kernel's steps ahead of the groups.
        """
        shared = self._shared
        position, steps = shared.counted
        position += shared.steps - steps
        if shared.fused is not None and position != shared.counted[0]:
            shared.fused.plan.commit_if_called()
            self._go_to(position, stepped=True)

    def _launched(
        self, fused: FusedBackend, at_zero: bool, capturing: bool, borrowed: _Borrowed
    ) -> bool:
        """The step itself; whether it happened, as far as the host knows."""
        plan = fused.plan
        plan.refresh()
        if len(plan.scalars) != len(self._shared.rates) and not at_zero:
            self._overrule()  # another thread has just added a group
        rest = plan.rest and [(p, why) for p, why in plan.rest if p.grad is not None]
        if rest and (self._backend in ("native", "triton") or capturing):
            if self._max_grad_norm is not None and not capturing:
                check_clippable(self._params(), self._max_grad_norm)
            plan.forget()  # whatever the reason is, it may be gone by the next step
            if capturing:
                raise self._no_capture(f"no kernel serves {len(rest)} parameters: {rest[0][1]}")
            raise RuntimeError(
                f"backend={self._backend!r} cannot serve {len(rest)} of the parameters: "
                f"{rest[0][1]}; use backend='auto', which leaves them to the wrapped optimizer's "
                "own step"
            )
        # The device need not tell what it has found, unless the host is to act on it: call hooks
        # and functions, have the wrapped step run, keep the state that this step creates, choose
        # the kernel.
        acts = bool(plan.pending or rest or self._has_scale_fn or self._cycle_end_hooks)
        acts = acts or (self._cycle_momentum and self._momentum_vanishes())
        scale, found_inf = self._grad_scale(), self.__dict__.get("found_inf")
        if found_inf is not None and (acts or not fused.sees_overflows) and not capturing:
            if self._overflowed():
                plan.release()
                return False
            found_inf = None
        if acts and fused.uncertain and not capturing and not at_zero:
            self._settle()
        gradients = _AS_THEY_ARE
        if scale is not None or found_inf is not None or self._max_grad_norm is not None:
            gradients = Gradients(scale, found_inf, self._max_grad_norm)
        if rest and self._max_grad_norm is not None:
            # One norm over both: copies, which both then work on.
            clipped = ClippedGradients(self._max_grad_norm)
            borrowed.append(clipped)
            self._shared.grad_norm = clipped.clip(self._params(), gradients.scale)
            gradients = _AS_THEY_ARE
            plan.refresh()
        if rest:
            hidden = HiddenGradients(p for bucket in plan.buckets for p in bucket.params)
            with self._handed_down(scaled=not borrowed):
                borrowed.append(hidden)
                hidden.hide()
                raw_step(self._inner)()
            hidden.restore()
        norm = fused.step(self._course(at_zero), gradients)
        if norm is not None:
            self._shared.grad_norm = norm
        if borrowed:
            _give_back(borrowed)
        return True

    def _check_capture(self) -> None:
        """Raise unless a step can be captured into a graph now; tell what to do."""
        name, reason = self._shared.chosen
        if name != "triton" or not is_profiled(self._inner):
            raise self._no_capture(
                f"on backend {name!r} ({reason}) a graph would replay the same rate for ever; use "
                "backend='triton', or capture forward and backward only"
            )
        if self._has_scale_fn:
            raise self._no_capture(
                "a scale_fn runs on the host, which no graph asks; use a schedule without one"
            )
        if self._cycle_end_hooks:
            raise self._no_capture(
                "cycle-end hooks run on the host, which no graph asks; remove them, and look at "
                "opt.cycle between replays"
            )
        if self._momentum_vanishes():
            raise self._no_capture(
                "momentum cycles down to 0, and steps without momentum are others than those with "
                "it; construct CyclicalOptimizer with a base_momentum above 0"
            )
        if self._shared.fused is not None and not self._is_settled(self._believed_iteration()):
            raise self._no_capture(
                "position, bounds or groups were changed since the last step; take a step and then "
                "capture"
            )
        for param, state in self.state.items():
            counter = state.get("step") if isinstance(state, dict) else None
            if isinstance(counter, Tensor) and counter.device != param.device:
                raise self._no_capture(
                    "a checkpoint left step counters on the CPU; take a step and then capture"
                )

    def _momentum_vanishes(self) -> bool:
        """Whether the cycle comes to where SGD and RMSprop keep no buffer: the host then chooses.

        Their steps without momentum leave the buffer as it was, and have a kernel of their own.
        """
        return self._cycle_momentum and any(
            "betas" not in group and group[BASE_MOMENTUM] <= 0.0 < group[MAX_MOMENTUM]
            for group in self._inner.param_groups
            if BASE_MOMENTUM in group and MAX_MOMENTUM in group
        )

    @staticmethod
    def _no_capture(reason: str) -> RuntimeError:
        return RuntimeError(f"step() cannot be captured into a graph: {reason}")

    def _is_kept(self, group: Mapping[str, Any]) -> bool:
        """Whether the device keeps the group's ``lr``, a tensor then, current by itself."""
        if not group.get("capturable") or self._shared.chosen[0] != "triton" or self._has_scale_fn:
            return False
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            return bool(group["params"])
        device = backends.plan_device("triton", self._inner)
        return lr.device.type == device and lr.dtype in (torch.float32, torch.float64)

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _is_zero_rate_step(self) -> bool:
        """Whether this is a checkpointer's step at rate 0, made only to create state.

        ``torch.distributed.checkpoint`` writes 0 into every group, gives every parameter a zero
        gradient and steps. Told from a 0.0 of the policy's own by its being another object, and
        from a warm-up scheduler's by the gradients.
        """
        rates, groups = self._shared.rates, self.param_groups
        if not groups:
            return False
        for i, group in enumerate(groups):
            lr = group["lr"]
            # A group added beneath us has nothing of ours in it yet.
            if i < len(rates) and not self._is_foreign(group, *rates[i]):
                return False
            if _written_rate(lr, i) != 0.0:
                return False
        # The ranks' answers must be the same, or their positions would part; and each must take
        # part in the sums, whatever gradients it has.
        params = list(self._params())
        there, nonzero = no_sums(spreads(params)), no_sums(spreads(params))
        for p in params:
            if p.grad is not None:
                there[spread_of(p)] += 1
                nonzero[spread_of(p)] += not _is_zero(local_part(p.grad))
        if not sum_over_ranks(there):
            return not any(p.requires_grad for p in params)
        return not sum_over_ranks(nonzero)

    def _is_foreign(self, group: Mapping[str, Any], held: object, value: float) -> bool:
        lr = group["lr"]
        if lr is not held:
            return True
        # A tensor on a GPU is not looked into: that would wait for the device.
        if not isinstance(lr, Tensor) or lr.device.type != "cpu" or self._is_kept(group):
            return False
        return lr.item() != value

    def _overrule(self) -> None:
        """Take in what others may write into the groups; whatever they wrote into ``lr`` is
        overruled, with one warning.
        """
        self._settle(self._believed_iteration())
        shared = self._shared
        foreign = [
            i
            for i, (group, (held, value)) in enumerate(
                zip(self.param_groups, shared.rates, strict=False)
            )
            if self._is_foreign(group, held, value)
        ]
        if not foreign and self._is_momentum_ours():
            return
        written = {i: _written_rate(self.param_groups[i]["lr"], i) for i in foreign}
        written = {i: lr for i, lr in written.items() if lr != shared.rates[i][1]}
        if written and not shared.warned:
            shared.warned = True
            warnings.warn(
                "lr was written from outside in parameter group "
                + ", ".join(f"{i} ({lr:g})" for i, lr in written.items())
                + f"; the policy {self._schedule.name!r} decides instead, here and from now on. "
                "Remove the other scheduler, or change course with set_bounds or set_iteration.",
                UserWarning,
                stacklevel=callers_level(),
            )
        self._go_to(shared.position, stepped=True)

    def _is_momentum_ours(self) -> bool:
        """Whether the groups hold the momenta and their bounds that we wrote, if they cycle."""
        if not self._cycle_momentum:
            return True
        shared, groups = self._shared, self.param_groups
        if len(groups) != len(shared.momenta) or shared.momenta != self._read_momenta(groups):
            return False
        # A tensor may have been filled, which does not show.
        return all(
            _momentum_of(group) is held and type(held) is not Tensor
            for group, held in zip(groups, shared.held_momenta, strict=False)
        )

    # ---- keeping the groups in line

    def _is_untouched(self) -> bool:
        """Whether the groups are certainly as we left them: the step's way past all else."""
        shared, groups = self._shared, self._inner.param_groups
        if len(shared.rates) != len(groups) or self._cycle_momentum:
            return False
        if shared.groups is not groups and not shared.are_ours(groups):
            return False
        position = shared.counted[0]
        for group, (held, _), (base, top) in zip(groups, shared.rates, shared.bounds, strict=False):
            if (
                group["lr"] is not held
                or type(held) is not float
                or group.get("capturable")
                or type(group.get(STEP)) is not int
                or group[STEP] != position
                or group.get(BASE) is not base
                or group.get(MAX) is not top
            ):
                return False
        return True

    def _are_known(self) -> bool:
        """Whether the groups have the position, bounds and rates that we know of.

        Thousands of groups may be added one by one, so this takes no longer than torch's own check.
        """
        shared, groups = self._shared, self.param_groups
        if not shared.are_ours(groups) or len(shared.rates) != len(groups):
            return False
        try:
            bounds = list(map(_BOUNDS_OF, groups))
            same = bounds == shared.bounds and groups[0][STEP] == shared.position
        except LookupError:  # a group without our keys; no groups at all
            return False
        rates = (held for held, _ in shared.rates)
        return same and all(map(operator.is_, map(_RATE_OF, groups), rates))

    def _bounds(self, groups: Sequence[dict[str, Any]] | None = None) -> list[tuple[float, float]]:
        """(base_lr, max_lr) per group, the groups being the truth."""
        shared = self._shared
        groups = list(self.param_groups) if groups is None else groups
        # After a load beneath us, groups without our keys keep the bounds they had, or that
        # somebody had written into the groups which were there before.
        known: list[tuple[float, float]] = []
        before, had = shared.seen or (shared.groups, shared.bounds)
        if before is not None and not shared.are_ours(groups):
            known = _found_bounds(before, had)
        found = _found_bounds(groups, known)
        shared.seen = None if shared.are_ours(groups) else (groups, found)
        return found

    def _settle(self, position: int | None = None) -> int:
        """Take in what others did to the groups; returns the position.

        A position written from outside is honoured, groups that lack our keys get them.

        Args:
            position: where the groups stand; ``None`` asks the device, if only that knows.
        """
        if position is None:
            position = self.iteration
        if self._is_settled(position):
            return position
        for group in self.param_groups:
            if STEP not in group:
                _note_group(self._inner, group)
        _forget_removed_groups(self._inner)
        self._write_bounds()
        if position == self._shared.position:
            position = self.iteration  # what changed is not where the device is
        self._go_to(position)
        return position

    def _is_settled(self, position: int) -> bool:
        """Whether the groups hold what we know of them, and this position."""
        shared, groups = self._shared, self.param_groups
        return (
            shared.are_ours(groups)
            and len(shared.rates) == len(groups)
            and position == shared.position
            and all(
                STEP in group
                and isinstance(group.get(BASE), float)
                and isinstance(group.get(MAX), float)
                and (group[BASE], group[MAX]) == bounds
                for group, bounds in zip(groups, shared.bounds, strict=False)
            )
        )

    def _only_the_device_knows(self) -> bool:
        """Whether the host may be wrong about the position, after steps it did not see."""
        fused = self._shared.fused
        return fused is not None and fused.uncertain

    def _write_bounds(self) -> None:
        groups = list(self.param_groups)
        for i, (group, bounds) in enumerate(zip(groups, self._bounds(groups), strict=True)):
            self._set_group_bounds(i, group, bounds)

    def _set_group_bounds(
        self, index: int, group: dict[str, Any], bounds: tuple[float, float]
    ) -> None:
        """Write a group's bounds; those of momentum, where it has none, as they were."""
        group[BASE], group[MAX] = bounds
        if self._cycle_momentum and not (BASE_MOMENTUM in group and MAX_MOMENTUM in group):
            # Known of the first group at least, which may have lost its keys to a load beneath us.
            known = self._shared.momenta
            if not known:  # all groups were taken away
                known = [(_LOW_MOMENTUM, _HIGH_MOMENTUM)]
            low, high = known[index if index < len(known) else 0]
            group[BASE_MOMENTUM], group[MAX_MOMENTUM] = low, high

    def _advance(self, before: tuple[int, int], rates: list[float], steps: int) -> None:
        """:meth:`_go_to` the next step, for groups that are as we left them, rates as floats.

        Args:
            before: what was counted before the step.
            rates: those of the next step.
            steps: the kernel's count of steps.
        """
        shared = self._shared
        position = before[0] + 1
        for group, rate in zip(self._inner.param_groups, rates, strict=False):
            group["lr"] = rate
            group[STEP] = position
        shared.rates = [(rate, rate) for rate in rates]
        # A signal handler may have gone elsewhere up to here, but not within this line.
        counted = (position, steps)
        shared.counted = counted if shared.counted is before else shared.counted
        if shared.counted is not counted:
            self._go_to(shared.position)

    def _change_course(self, position: int) -> None:
        """:meth:`_go_to` a step that does not follow from the last one's."""
        self._go_to(position)
        self._shared.shown = position

    def _go_to(self, position: int, *, stepped: bool = False, there: bool = False) -> None:
        """Write the position, the policy and the rates of this step into the groups.

        Args:
            position: the step's number.
            stepped: the device gets there by itself.
            there: the device has said that it is there.
        """
        shared, all_groups = self._shared, self.param_groups
        groups = list(all_groups)  # another thread may add one meanwhile
        bounds = self._bounds(groups)
        rates = self._schedule.rates(position, bounds)
        momenta = self._read_momenta(groups)
        before = shared.rates if shared.are_ours(all_groups) else []
        held: list[tuple[object, float]] = []
        taken: set[int] = set()
        for i, (group, rate) in enumerate(zip(groups, rates, strict=True)):
            lr = before[i][0] if i < len(before) else group["lr"]
            held.append(self._write_rate(group, position, lr, rate, taken, stepped))
        held_momenta = self._write_momenta(groups, position, momenta, set()) if momenta else []
        shared.groups, shared.members, shared.bounds = all_groups, groups, bounds
        shared.momenta, shared.held_momenta = momenta, held_momenta
        shared.rates, shared.seen = held, None
        shared.counted = (position, shared.steps)
        if shared.fused is not None and not stepped and self._only_the_device_knows():
            shared.fused.move_to(self._course(at_zero=False), there=there)

    def _join(self) -> None:
        """:meth:`_go_to` where the groups are, for one that was added to them."""
        shared, groups = self._shared, self.param_groups
        group, position = groups[-1], shared.position
        bounds = (group[BASE], group[MAX])
        [rate] = self._schedule.rates(position, [bounds])
        momenta = self._read_momenta([group])
        taken = {id(lr) for lr, _ in shared.rates} if isinstance(group["lr"], Tensor) else set()
        held = self._write_rate(group, position, group["lr"], rate, taken, stepped=False)
        if momenta:
            taken = set()
            if isinstance(_momentum_of(group), Tensor):
                taken = {id(held) for held in shared.held_momenta}
            shared.held_momenta += self._write_momenta([group], position, momenta, taken)
        shared.groups = groups
        shared.members.append(group)
        shared.bounds.append(bounds)
        shared.momenta += momenta
        shared.rates.append(held)

    def _write_rate(
        self,
        group: dict[str, Any],
        position: int,
        lr: object,
        rate: float,
        taken: set[int],
        stepped: bool,
    ) -> tuple[object, float]:
        """Write position, policy and rate into a group.

        Args:
            group: the group.
            position: the number of the step that the rate is for.
            lr: what the group's ``lr`` is to be: a tensor is filled, never replaced, and one that
                other code put in a float's place is not filled but replaced by a float.
            rate: the rate.
            taken: ids of the tensors that other groups have for their ``lr``; added to.
            stepped: the device has written the rate that it keeps.

        Returns:
            The object that is in ``lr`` now, and the value that it was given.
        """
        shared = self._shared
        group[STEP] = position
        group[SCHEDULE] = self._schedule_json
        kept = self._is_kept(group)
        if kept and not isinstance(lr, Tensor):
            lr = torch.tensor(rate, device=group["params"][0].device, dtype=torch.float32)
        if not isinstance(lr, Tensor):
            group["lr"] = rate
            return rate, rate
        if id(lr) in taken:  # torch's default, shared by groups
            lr = lr.detach().clone()
        taken.add(id(lr))
        driven = kept and stepped and shared.fused is not None and shared.fused.keeps(lr)
        if not driven:
            _fill(lr, rate)
        group["lr"] = lr
        return lr, lr.item() if lr.device.type == "cpu" and not kept else rate

    def _read_momenta(self, groups: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
        """The bounds of each group's momentum; empty where it does not cycle."""
        if not self._cycle_momentum:
            return []
        return [(group[BASE_MOMENTUM], group[MAX_MOMENTUM]) for group in groups]

    def _write_momenta(
        self,
        groups: Sequence[dict[str, Any]],
        position: int,
        bounds: Sequence[tuple[float, float]],
        taken: set[int],
    ) -> list[object]:
        """Write the momenta of a step into groups.

        Args:
            groups: the groups.
            position: the step's number.
            bounds: those of each group's momentum.
            taken: ids of what other groups have for their ``betas[0]``; tensors are added to it.

        Returns:
            The object that holds each group's momentum now, see :func:`_momentum_of`.
        """
        momenta = self._schedule.momenta(position, bounds)
        for group, momentum in zip(groups, momenta, strict=True):
            if "betas" not in group:
                group["momentum"] = momentum
                continue
            beta, *others = group["betas"]
            if isinstance(beta, Tensor):
                if id(beta) in taken:  # torch's default, shared by groups
                    beta = beta.clone()
                    group["betas"] = (beta, *others)
                taken.add(id(beta))
                _fill(beta, momentum)
            else:
                group["betas"] = (momentum, *others)
        return list(map(_momentum_of, groups))

    # ---- checkpoints and copies

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict; the position is in its ``param_groups``.

        If the wrapped optimizer's layout drops what groups hold, our keys are in an entry
        ``"clr_optim"`` beside it. Loads under ``torch.load(weights_only=True)``, and into the plain
        optimizer too.

        Returns:
            ``"state"`` and ``"param_groups"``, with torch's names, shapes and dtypes.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4))
            >>> group = opt.state_dict()["param_groups"][0]
            >>> group["clr_step"], group["clr_base_lr"], group["clr_max_lr"]
            (0, 0.1, 0.4)
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._read_state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            if result is not None:
                state_dict = result
        return state_dict

    @_alone
    def _read_state_dict(self) -> dict[str, Any]:
        """:meth:`state_dict` without this object's own hooks."""
        state_dict: dict[str, Any] = {}
        for _ in range(_ATTEMPTS):
            self._settle()
            self._overrule()
            state_dict = self._inner.state_dict()
            if len(self._shared.rates) == len(self.param_groups):
                break  # no other thread has added a group meanwhile, which would lack our keys
        if not isinstance(state_dict, dict) or "param_groups" not in state_dict:
            pass  # a layout that only the wrapped class knows
        elif any(isinstance(group["lr"], Tensor) for group in self.param_groups):
            # Ours to fill, and not for others who fill a state dict, as checkpointers do.
            state_dict["param_groups"] = [
                {**group, "lr": group["lr"].detach().clone()}
                if isinstance(group["lr"], Tensor)
                else group
                for group in state_dict["param_groups"]
            ]
        if self._shared.chosen[0] == "triton":
            state_dict["state"] = _with_counters_where_torch_has_them(state_dict)
        whole: dict[str, Any] = _with_our_entry(state_dict, self.param_groups)
        return whole

    @_alone
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, or of the plain wrapped optimizer.

        With our keys in its groups, position and bounds are the checkpoint's. Without them the
        bounds stay, and the position is 0: :meth:`set_iteration` moves it. The policy is always
        this object's; a checkpoint written under another one warns. So do a checkpoint whose bounds
        are not the constructor's, and one whose ``lr`` is not the rate of its own position:
        :meth:`set_bounds` changes them.

        The load hooks of the wrapped optimizer run before anything is checked.

        Args:
            state_dict: what :meth:`state_dict` returned, or the plain optimizer's.

        Raises:
            TypeError, ValueError: for what is no checkpoint, or one of another optimizer class or
                other groups; the optimizer is then as it was.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> plain = torch.optim.SGD(model.parameters(), lr=0.4)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.8))
            >>> opt.load_state_dict(plain.state_dict())
            >>> opt.set_iteration(2000)
            >>> opt.get_last_lr()
            [0.8]
        """
        state_dict = _shallow_copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        inner = self._inner
        own = _noted_settings(inner)
        with undone_on_error(inner, self._shared):
            state_dict, saved_keys = _without_our_entry(_shallow_copy(state_dict))
            before = self._kept_keys()
            if loads_as_torch(inner):
                loaded, keys = self._load_as_torch(state_dict)
            else:
                loaded, keys = self._load_own_layout(state_dict)
            if saved_keys is not None:
                keys = self._checked_keys(saved_keys, f"state_dict[{ENTRY!r}]")
                if len(keys) != len(self.param_groups):
                    raise ValueError(
                        f"state_dict[{ENTRY!r}] is of {len(keys)} parameter groups, the optimizer "
                        f"has {len(self.param_groups)}: build the optimizer with the groups that "
                        "it had when it was saved"
                    )
            position, resumed = _read_position(keys, "state_dict['param_groups']")
            warned = [self._other_bounds(before, keys)]
            if saved_keys is None and not _fills_in_our_keys():
                lrs = [group.get("lr") for group in loaded]
                warned.append(_edited_rates(keys, self._schedule, lrs))
            for i, (group, old, new) in enumerate(zip_longest(self.param_groups, before, keys)):
                if group is not None:
                    group.update({**(old or {}), **(new or {})})
                    if BASE in group and MAX in group:
                        self._set_group_bounds(i, group, (group[BASE], group[MAX]))
            with in_our_words(inner):
                self._change_course(position)
        _take_note(inner, own, self._schedule, position if resumed else None)
        if resumed and SCHEDULE in keys[0]:
            self._warn_other_policy(keys[0][SCHEDULE], "state_dict")
        warn_each(warned)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_as_torch(self, state_dict: Any) -> tuple[Sequence[Any], list[dict[str, Any]]]:
        """Load a checkpoint of torch's layout, checked once the wrapped optimizer's hooks have run.

        Returns:
            The checkpoint's groups, and our keys in each.
        """
        inner = self._inner
        state_dict = dict(check_mapping("state_dict", after_load_hooks(inner, state_dict)))
        check_layout(state_dict)
        groups = state_dict["param_groups"]
        keys = self._checked_keys(groups, "state_dict['param_groups']")
        check_for(inner, state_dict, self._cycle_momentum)
        state_dict["state"] = own_counters(state_dict["state"])
        with in_our_words(inner), without_load_hooks(inner):
            inner.load_state_dict(state_dict)
        return groups, keys

    def _load_own_layout(self, state_dict: Any) -> tuple[Sequence[Any], list[dict[str, Any]]]:
        """Load a checkpoint by a method that is the wrapped class's own, which knows the layout.

        Returns:
            The groups as loaded, and our keys in each, which come from the checkpoint alone.
        """
        groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
        if groups is not None and are_groups(groups):
            self._checked_keys(groups, "state_dict['param_groups']")
        if isinstance(state_dict, dict) and isinstance(state_dict.get("state"), Mapping):
            state_dict["state"] = own_counters(state_dict["state"])
        for group in self.param_groups:
            for key in KEYS:
                group.pop(key, None)
        with in_our_words(self._inner):
            self._inner.load_state_dict(state_dict)
        # Groups may be other objects now.
        loaded = self.param_groups
        return loaded, self._checked_keys(loaded, "state_dict['param_groups']")

    def _kept_keys(self) -> list[dict[str, Any]]:
        """Our keys of each group for a checkpoint that has none: bounds of rate and momentum."""
        return [
            {
                **{key: group[key] for key in (BASE_MOMENTUM, MAX_MOMENTUM) if key in group},
                BASE: base,
                MAX: top,
            }
            for group, (base, top) in zip(self.param_groups, self._bounds(), strict=True)
        ]

    def _checked_keys(self, groups: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
        """Our keys in each group of a checkpoint. Raise for values that we could not have written.

        Args:
            groups: the checkpoint's groups, or dictionaries of our keys alone.
            name: the groups in messages.
        """
        found = [{key: group[key] for key in KEYS if key in group} for group in groups]
        for i, keys in enumerate(found):
            if BASE_MOMENTUM in keys or MAX_MOMENTUM in keys:
                low, high = (
                    check_number(f"{name}[{i}][{key!r}]", item(keys.get(key)), maximum=1.0)
                    for key in (BASE_MOMENTUM, MAX_MOMENTUM)
                )
                beta = self._cycle_momentum and "betas" in groups[i]
                check_momenta(low, high, f" in {name}[{i}]", beta=beta)
                keys.update({BASE_MOMENTUM: low, MAX_MOMENTUM: high})
            base, top = keys.get(BASE), keys.get(MAX)
            if type(base) is type(top) is float and 0.0 <= base <= top < math.inf:
                continue
            if BASE in keys or MAX in keys:
                base = check_number(f"{name}[{i}][{BASE!r}]", item(base))
                top = check_number(f"{name}[{i}][{MAX!r}]", item(top))
                check_bounds(base, top, f" in {name}[{i}]")
                keys.update({BASE: base, MAX: top})
        _read_position(found, name)
        return found

    def _other_bounds(
        self, before: Sequence[Mapping[str, Any]], keys: Sequence[Mapping[str, Any]]
    ) -> str | None:
        """What to say if a checkpoint's bounds are neither those in use nor those of the code."""
        if self._schedule.has_bounds:
            return None
        given = self._shared.given
        for i, (old, new) in enumerate(zip(before, keys, strict=False)):
            if BASE not in new:
                continue
            base, top = new[BASE], new[MAX]
            code_base, code_top = given[i] if i < len(given) else (old[BASE], old[MAX])
            as_code = _are_close(top, code_top) and (
                code_base is None or _are_close(base, code_base)
            )
            if not as_code and not (_are_close(base, old[BASE]) and _are_close(top, old[MAX])):
                code_base = code_top / _BASE_FRACTION if code_base is None else code_base
                return (
                    f"state_dict has the bounds base_lr={base:g}, max_lr={top:g} in parameter "
                    f"group {i}, and this optimizer was given base_lr={code_base:g}, "
                    f"max_lr={code_top:g}: the checkpoint's bounds hold from here on. To train "
                    f"with the others, call set_bounds(base_lr={code_base:g}, "
                    f"max_lr={code_top:g}) after loading."
                )
        return None

    def _warn_other_policy(self, saved: object, source: str) -> None:
        if saved == self._schedule_json:
            return
        warnings.warn(
            f"{source} was written under the policy {policy_name(saved, source)!r} with "
            f"{saved}; this optimizer's own, "
            f"{self._schedule.name!r} with {self._schedule_json}, decides from here on, from step "
            f"{self._shared.position}. To go on with the old one, construct with "
            "policy=Schedule.from_json(...) of it; to begin anew, set_iteration(0).",
            UserWarning,
            stacklevel=callers_level(),
        )

    @_alone
    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        # As in torch, hooks are not copied.
        return {
            "optimizer": self._inner,
            "schedule": self._schedule,
            "cycle_momentum": self._cycle_momentum,
            "max_grad_norm": self._max_grad_norm,
            "backend": self._backend,
            "own": _noted_settings(self._inner),
            # Another thread may step before all groups are pickled.
            "position": self._shared.position,
        }

    @_alone
    def __deepcopy__(self, memo: dict[int, Any]) -> CyclicalOptimizer[OptimizerT]:
        # Under the lock: another thread may step meanwhile, and the copy must be of one step.
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizer" not in state:  # torch's own partial form
            self._inner.__setstate__(state)
            self._settle()
            return
        self._set_up(
            state["optimizer"],
            state["schedule"],
            state["cycle_momentum"],
            state["max_grad_norm"],
            state["backend"],
            backends.resolve(state["backend"], state["optimizer"]),
        )
        position = state.get("position")
        if position is None:
            position = _read_position(self.param_groups, "param_groups")[0]
        self._change_course(position)
        own = state.get("own") or _own_settings(self._inner, self._schedule, None, False)
        _take_note(self._inner, own, self._schedule, None)


class CyclicalScheduler(LRScheduler):
    """A scheduler that only looks on, for frameworks that want one and for their LR logging.

    ``step()`` changes nothing but what :meth:`get_last_lr` shows: the optimizer's own step advances
    the cycle. There is nothing to save, since the position is in the optimizer's checkpoint.

    Args:
        optimizer: the one to look at; its :attr:`CyclicalOptimizer.scheduler` is one of these.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4), step_size_up=3)
        >>> scheduler = CyclicalScheduler(opt)
        >>> opt.step()
        >>> scheduler.step()
        >>> scheduler.last_epoch, scheduler.get_last_lr(), scheduler.get_lr()
        (1, [0.2], [0.2])
        >>> scheduler.load_state_dict(scheduler.state_dict())
    """

    def __init__(self, optimizer: CyclicalOptimizer[Any]) -> None:
        # LRScheduler.__init__ would write rates and patch step().
        self.optimizer = optimizer
        self._step_count = 1  # frameworks add to it

    @property
    def base_lrs(self) -> list[float | Tensor]:  # type: ignore[override]
        """The rates of step 0."""
        return list(cast("CyclicalOptimizer[Any]", self.optimizer).lr_at(0))

    @property
    def last_epoch(self) -> int:
        """The optimizer's iteration."""
        return cast("CyclicalOptimizer[Any]", self.optimizer).iteration

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        pass  # frameworks set it while they restore; the optimizer knows better

    @property
    def _last_lr(self) -> list[float | Tensor]:
        return self.get_last_lr()

    @_last_lr.setter
    def _last_lr(self, value: object) -> None:
        pass  # SequentialLR, which then asks for it

    def get_last_lr(self) -> list[float | Tensor]:
        """As of torch's schedulers: until this one's ``step()``, the rates of the last step.

        Frameworks log between the two steps, and mean the rate that was used.

        Returns:
            One rate per group, the one that the optimizer's last step used, or after :meth:`step`,
            and after a change of course, the one that the next will use.
        """
        optimizer = cast("CyclicalOptimizer[Any]", self.optimizer)
        iteration = optimizer.iteration
        if iteration in (0, optimizer._shared.shown):
            return list(optimizer.get_last_lr())
        return list(optimizer.lr_at(iteration - 1))

    def get_lr(self) -> list[float | Tensor]:
        """The rates that the next step will use, one per group: what ignite writes into groups."""
        return list(cast("CyclicalOptimizer[Any]", self.optimizer).get_last_lr())

    def step(self, epoch: int | None = None) -> None:
        """Change nothing; from here on :meth:`get_last_lr` shows the next step's rates.

        Args:
            epoch: of no effect.
        """
        optimizer = cast("CyclicalOptimizer[Any]", self.optimizer)
        optimizer._shared.shown = optimizer.iteration

    def state_dict(self) -> dict[str, Any]:
        """An empty dictionary, as the position is in the optimizer's state dict."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Change nothing, as :meth:`step`: what is restored is in the optimizer.

        Args:
            state_dict: of no effect.
        """
        self.step()


def _fills_in_our_keys() -> bool:
    """Whether ``torch.distributed.checkpoint`` is loading.

    Where a plain optimizer's checkpoint lacks our keys, it leaves this optimizer's own in place.
    """
    frame = sys._getframe(1)
    ours = ("clr_optim.", "torch.")
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(ours):
        if frame.f_globals["__name__"].startswith("torch.distributed.checkpoint"):
            return True
        frame = frame.f_back
    return False


def _warn_scheduled_rates(groups: Sequence[Mapping[str, Any]]) -> None:
    """Say that what becomes the top of the cycle is what a torch scheduler has come to."""
    for i, group in enumerate(groups):
        lr, initial = item(group["lr"]), item(group.get("initial_lr"))
        if MAX not in group and isinstance(initial, float) and initial != lr:
            warnings.warn(
                f"lr in parameter group {i} is {lr!r}, to which a scheduler has brought it from "
                f"the initial_lr {initial!r}, and becomes the top of the cycle: give the rate that "
                f"is meant, as max_lr={initial!r}",
                UserWarning,
                stacklevel=callers_level(),
            )
            return


_warned_no_kernels = False


def _warn_no_kernels(error: BuildError) -> None:
    """Say once per process that steps are slower than they could be."""
    global _warned_no_kernels
    if not _warned_no_kernels:
        _warned_no_kernels = True
        warnings.warn(
            f"the fused kernels cannot be compiled, so each wrapped optimizer's own step runs, "
            f"more slowly and otherwise the same: {error}",
            RuntimeWarning,
            stacklevel=callers_level(),
        )


def _make_schedule(policy: object, **options: Any) -> Schedule:
    if isinstance(policy, Schedule):
        parameters = inspect.signature(CyclicalOptimizer).parameters
        for name in options:
            value, default = options[name], parameters[name].default
            if value is not default and not (type(value) is type(default) and value == default):
                raise ValueError(
                    f"{name}={options[name]!r} has no effect with policy={policy.name!r}, a "
                    f"Schedule: give {name} to the schedule's constructor"
                )
        check_growth(policy)
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(
            f"policy must be one of {', '.join(map(repr, POLICIES))} or a Schedule "
            f"(see clr_optim.schedule: fixed, one_cycle, sequence, ...), got {policy!r}"
        )
    gamma, scale_fn = options.pop("gamma"), options.pop("scale_fn")
    scale_mode = check_choice("scale_mode", options.pop("scale_mode"), SCALE_MODES)
    check_number("gamma", gamma, open_minimum=True, maximum=1.0)
    if scale_fn is not None:
        schedule = triangular(**options, scale_fn=scale_fn, scale_mode=scale_mode)
        return Schedule(policy, schedule.phases)
    if policy == "triangular":
        return triangular(**options)
    if policy == "triangular2":
        return triangular2(**options)
    return (exp_range if policy == "exp_range" else exp_range_bounds)(**options, gamma=gamma)


def _with_counters_where_torch_has_them(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """The state of a state dict, step counters on the CPU unless the group's flags say otherwise.

    Kernels count on the device; all that leave it do so in one copy.
    """
    stays = {
        index
        for group in state_dict["param_groups"]
        for index in group["params"]
        if group.get("capturable") or group.get("fused")
    }
    state: dict[Any, Any] = dict(state_dict["state"])
    by_kind: dict[Any, list[Any]] = {}
    for index, values in state.items():
        counter = values.get("step") if isinstance(values, Mapping) else None
        if index not in stays and isinstance(counter, Tensor) and counter.device.type != "cpu":
            kind = (counter.device, counter.dtype, counter.shape)
            by_kind.setdefault(kind, []).append(index)
    for indices in by_kind.values():
        counters = torch.stack([state[index]["step"] for index in indices]).cpu()
        for index, counter in zip(indices, counters, strict=True):
            state[index] = {**state[index], "step": counter.clone()}
    return state


def _maybe_number(name: str, value: object) -> float | None:
    return None if value is None else check_number(name, value)


def _optional_per_group(name: str, value: object, groups: int) -> list[float | None]:
    return [None] * groups if value is None else list(_per_group(name, value, groups))


def _written_bounds(group: Mapping[str, Any], index: int) -> tuple[float, float]:
    """A group's bounds, as whoever wrote them last left them."""
    base, top = group[BASE], group[MAX]
    if type(base) is not float or type(top) is not float or not 0.0 <= base <= top < math.inf:
        where = f" in parameter group {index}"
        base, top = check_number(BASE + where, base), check_number(MAX + where, top)
        check_bounds(base, top, where)
    return base, top


def _found_bounds(
    groups: Sequence[Mapping[str, Any]], known: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Each group's bounds: those written in it, else those known by its place, else its own."""
    return [
        _written_bounds(group, i)
        if BASE in group and MAX in group
        else (known[i] if i < len(known) else _initial_bounds(group, f" in group {i}"))
        for i, group in enumerate(groups)
    ]


def _written_rate(lr: object, index: int) -> float:
    """What somebody else has put into a group's ``lr``."""
    try:
        return float(cast("float", lr))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(
            f"lr in parameter group {index} must be a number or a tensor of one element, got "
            f"{shown(lr)}: leave it to the policy"
        ) from error


def _initial_bounds(
    group: Mapping[str, Any], where: str, base_lr: float | None = None, max_lr: float | None = None
) -> tuple[float, float]:
    """A group's bounds: the given ones, else those it remembers, else from its own ``lr``."""
    if max_lr is None:
        # A mid-cycle rate that we wrote is not the rate the user chose.
        name = MAX if MAX in group else "lr"
        remembered = group[name]
        if isinstance(remembered, Tensor):
            remembered = remembered.item()
        max_lr = check_number(f"{name}{where}", remembered)
    if base_lr is None:
        base_lr = max_lr / _BASE_FRACTION
        # A remembered one belongs to the remembered max_lr.
        if BASE in group:
            remembered = check_number(f"{BASE}{where}", group[BASE])
            if remembered <= max_lr and max_lr == group.get(MAX, max_lr):
                base_lr = remembered
    check_bounds(base_lr, max_lr, where)
    return base_lr, max_lr


def _values_in(params: Sequence[Tensor]) -> str:
    """How many values there are, in words; a lazy module's parameters have none yet."""
    there = [p for p in params if not is_lazy(p)]
    text = f"{sum(p.numel() for p in there):,} values"
    lazy = len(params) - len(there)
    return f"{text} ({lazy} uninitialized until the model's first forward)" if lazy else text


def _give_back(borrowed: _Borrowed) -> None:
    """Put the user's gradients back, the last that were taken first; may be called again."""
    while borrowed:
        borrowed[-1].restore()
        borrowed.pop()


def _momentum_of(group: Mapping[str, Any]) -> object:
    """The object that holds a group's momentum: a number, the betas, or the first of them."""
    betas = group.get("betas")
    if betas is None:
        return group.get("momentum")
    return betas[0] if isinstance(betas[0], Tensor) else betas


@torch.no_grad()
def _fill(tensor: Tensor, value: float) -> None:
    """Write a rate or momentum, at most the largest number of the tensor's dtype."""
    largest = torch.finfo(tensor.dtype).max
    tensor.fill_(max(-largest, min(value, largest)))


def _separate_defaults(optimizer: Optimizer) -> None:
    """Unshare tensors that torch puts both into the defaults and into groups.

    A group's are filled at every step; a group added later is to begin with the user's value.
    """
    defaults = getattr(optimizer, "defaults", None)
    if not isinstance(defaults, dict):
        return
    if isinstance(defaults.get("lr"), Tensor):
        defaults["lr"] = defaults["lr"].detach().clone()
    betas = defaults.get("betas")
    if isinstance(betas, Tensor):
        defaults["betas"] = betas.detach().clone()
    elif isinstance(betas, (list, tuple)) and any(isinstance(beta, Tensor) for beta in betas):
        defaults["betas"] = tuple(
            beta.detach().clone() if isinstance(beta, Tensor) else beta for beta in betas
        )


def _run_pre_hooks(
    hooks: Iterable[Callable[..., Any]],
    optimizer: Optimizer,
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


def _takes_closure_by_name(step: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind is not parameter.POSITIONAL_ONLY


def _read_position(groups: Sequence[Mapping[str, Any]], name: str) -> tuple[int, bool]:
    """``(position, whether any group holds one)``; they must agree, and name a policy."""
    steps = {
        i: as_position(group[STEP], f"{name}[{i}][{STEP!r}]")
        for i, group in enumerate(groups)
        if STEP in group
    }
    known: set[str] = set()
    for i, group in enumerate(groups):
        if SCHEDULE in group:
            text = group[SCHEDULE]
            if not isinstance(text, str) or text not in known:
                policy_name(text, f"{name}[{i}][{SCHEDULE!r}]")
                known.add(text)
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"{name} disagree on {STEP}: {steps} by group; all groups share one position, "
            "so set them all to it"
        )
    return (next(iter(steps.values())), True) if steps else (0, False)


# ---- a state dict of a layout that is not torch's


def _shallow_copy(state_dict: Any) -> Any:
    """What torch hands to load hooks: a copy, or for what has none the thing itself."""
    if isinstance(state_dict, Mapping):
        return dict(state_dict)
    return state_dict.copy() if isinstance(state_dict, list) else state_dict


def _with_our_entry(state_dict: Any, groups: Sequence[Mapping[str, Any]]) -> Any:
    """Put our keys beside a state dict that has dropped the groups' own."""
    if not groups or not isinstance(state_dict, dict) or holds_key(state_dict, STEP):
        return state_dict
    entry = [{key: group[key] for key in KEYS if key in group} for group in groups]
    return {**state_dict, ENTRY: entry}


def _without_our_entry(state_dict: Any) -> tuple[Any, Any]:
    """What :func:`_with_our_entry` was given, and the keys that it put beside, if any."""
    if not isinstance(state_dict, dict) or ENTRY not in state_dict:
        return state_dict, None
    keys = state_dict.pop(ENTRY)
    if not are_groups(keys):
        raise ValueError(f"state_dict[{ENTRY!r}] must be a list of dictionaries, got {shown(keys)}")
    return state_dict, keys


# ---- rates and bounds that a checkpoint, or an earlier wrapper, left in groups


def _written_rates(
    groups: Sequence[Mapping[str, Any]], schedule: Schedule
) -> Iterator[float | None]:
    """The rate that each group's own position, bounds and policy give, if all are known.

    Args:
        groups: groups, or our keys of each.
        schedule: the policy of those that name the same.
    """
    policies: dict[object, Schedule | None] = {schedule.to_json(): schedule}
    rates: dict[object, float | None] = {}
    for group in groups:
        if any(key not in group for key in (STEP, BASE, MAX, SCHEDULE)):
            yield None
            continue
        text, step = group[SCHEDULE], group[STEP]
        course = (group[BASE], group[MAX], step, text)
        try:
            if course not in rates:
                if text not in policies:
                    policies[text] = _schedule_of(text)
                policy, position = policies[text], as_position(step, STEP)
                rates[course] = None if policy is None else policy.rates(position, [course[:2]])[0]
            yield rates[course]
        except (ArithmeticError, LookupError, TypeError, ValueError):
            yield None


def _schedule_of(text: str) -> Schedule | None:
    """The schedule that a checkpoint remembers, if this version can read it."""
    try:
        return Schedule.from_json(text)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None


def _is_rate(lr: object, rate: float) -> bool:
    """Whether ``lr`` is a rate up to the rounding of the type that holds it."""
    error, smallest = 1e-5, 1e-30
    if isinstance(lr, Tensor):
        kind = torch.finfo(lr.dtype)
        rate = min(rate, kind.max)
        error, smallest = max(error, 4 * kind.eps), kind.smallest_normal * kind.eps
    try:
        return math.isclose(float(cast("float", lr)), rate, rel_tol=error, abs_tol=smallest)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _number_shown(lr: object) -> str:
    number = item(lr)
    return f"{number:g}" if isinstance(number, numbers.Real) else shown(number)


def _are_close(one: float, other: float) -> bool:
    """Whether two bounds are the same but for the rounding of a file format."""
    return one == other or math.isclose(one, other, rel_tol=1e-6)


def _edited_rates(
    groups: Sequence[Mapping[str, Any]], schedule: Schedule, lrs: Sequence[object] | None = None
) -> str | None:
    """What to say if an ``lr`` of a checkpoint is not the rate of its own position and bounds.

    Args:
        groups: the checkpoint's groups, or our keys of each.
        schedule: the policy of the optimizer that has loaded it.
        lrs: the checkpoint's rates, if the groups lack them.
    """
    lrs = [group["lr"] for group in groups] if lrs is None else lrs
    edited = [
        f"{i} ({_number_shown(lr)} instead of {rate:g})"
        for i, (lr, rate) in enumerate(zip(lrs, _written_rates(groups, schedule), strict=False))
        if rate is not None and lr is not None and not _is_rate(lr, rate)
    ]
    if not edited:
        return None
    remedy = "set_bounds(base_lr=..., max_lr=...) after loading"
    if schedule.has_bounds:
        remedy = "the constructor with another policy: set_bounds cannot change this one's bounds"
    return (
        f"the checkpoint's lr is not the rate of its own position, bounds and policy in parameter "
        f"group {', '.join(edited)}; the policy {schedule.name!r} decides instead. To train at "
        f"other rates, call {remedy}."
    )


def _other_arguments(
    groups: Sequence[Mapping[str, Any]], bounds: Sequence[tuple[float, float]]
) -> str | None:
    """What to say if a checkpoint's bounds differ from the constructor's arguments."""
    for i, (group, (base, top)) in enumerate(zip(groups, bounds, strict=True)):
        if BASE in group and MAX in group:
            saved = float(group[BASE]), float(group[MAX])
            if not (_are_close(saved[0], base) and _are_close(saved[1], top)):
                return (
                    f"the wrapped optimizer's checkpoint has the bounds base_lr={saved[0]:g}, "
                    f"max_lr={saved[1]:g} in parameter group {i}, and the arguments give "
                    f"base_lr={base:g}, max_lr={top:g}: the arguments hold. To train with the "
                    f"checkpoint's, call set_bounds(base_lr={saved[0]:g}, max_lr={saved[1]:g})."
                )
    return None


# ---- what an earlier wrapper of the same optimizer left behind


def _take_note(
    optimizer: Optimizer,
    own: Sequence[Mapping[str, Any]],
    schedule: Schedule,
    loaded: int | None,
) -> None:
    """Note with an optimizer what is being cycled, for a wrapper that comes later.

    Args:
        optimizer: the wrapped optimizer.
        own: the settings that each group had before it was cycled.
        schedule: the policy.
        loaded: the position of the checkpoint that was loaded, if any.
    """
    groups = optimizer.param_groups
    vars(optimizer)[NOTE] = {
        # The groups by their ids, which are no other's as long as the groups are kept.
        "own": {id(group): (group, each) for group, each in zip(groups, own, strict=False)},
        "schedule": schedule,
        "loaded": loaded,
    }


def _note_group(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Note the own settings of a group that was added while the optimizer is cycled."""
    if NOTE in vars(optimizer):
        own: dict[str, Any] = {"lr": item(group["lr"])}
        if _momentum(group) is not None:
            own["momentum"] = _momentum(group)
        vars(optimizer)[NOTE]["own"][id(group)] = group, own


def _forget_removed_groups(optimizer: Optimizer) -> None:
    """Keep no group in the note that the optimizer has no more: its parameters may be freed."""
    if NOTE in vars(optimizer):
        noted = vars(optimizer)[NOTE]["own"]
        for key in noted.keys() - set(map(id, optimizer.param_groups)):
            del noted[key]


def _noted_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The own settings of each group, as far as they were noted."""
    own = vars(optimizer).get(NOTE, {"own": {}})["own"]
    return [own.get(id(group), (group, {}))[1] for group in optimizer.param_groups]


def _leftover(optimizer: Optimizer) -> dict[str, Any] | None:
    """The note of an earlier wrapper, if the groups hold what that wrapper left there.

    A checkpoint that was loaded since brings groups of its own, and is one that goes on.
    """
    note: dict[str, Any] | None = vars(optimizer).get(NOTE)
    groups = optimizer.param_groups
    if note is None or not any(STEP in group for group in groups):
        return None
    if not any(id(group) in note["own"] for group in groups):
        return None
    loaded = note["loaded"]
    steps = [group.get(STEP) for group in groups]
    if loaded is not None and all(type(step) is int and step == loaded for step in steps):
        return None  # nothing has been trained since the checkpoint was loaded
    return note


def _own_settings(
    optimizer: Optimizer, schedule: Schedule, leftover: Mapping[str, Any] | None, given: bool
) -> list[dict[str, Any]]:
    """Each group's ``lr`` and momentum as the user chose them, whatever a cycle made of them.

    Args:
        optimizer: the optimizer that is being wrapped.
        schedule: the policy.
        leftover: the note of an earlier wrapper whose rates are in the groups.
        given: whether the user gives bounds, and so leaves ``lr`` to the cycle.
    """
    groups = optimizer.param_groups
    noted = _noted_settings(optimizer)
    cycling = schedule if leftover is None else leftover["schedule"]
    settings = []
    for i, (group, rate) in enumerate(zip(groups, _written_rates(groups, cycling), strict=True)):
        own = {"lr": item(group["lr"])}
        before = noted[i]
        # Other code may have written another rate since, which is then the user's.
        cycled = STEP in group and (rate is None or _is_rate(group["lr"], rate))
        if "lr" in before and (cycled or (given and STEP not in group)):
            own["lr"] = before["lr"]
        elif cycled and MAX in group:
            own["lr"] = item(group[MAX])
        momentum = _momentum(group)
        if momentum is not None:
            own["momentum"] = momentum
            if leftover is not None and _is_cycled(group, cycling, momentum):
                own["momentum"] = before.get("momentum", momentum)
        settings.append(own)
    return settings


def _momentum(group: Mapping[str, Any]) -> Any:
    """A group's ``momentum`` or ``betas[0]``; ``None`` where it has neither."""
    if "betas" not in group:
        return item(group.get("momentum"))
    try:
        return item(group["betas"][0])
    except (TypeError, LookupError):
        return None


def _is_cycled(group: Mapping[str, Any], schedule: Schedule, momentum: object) -> bool:
    """Whether a momentum is the one that a schedule has written."""
    try:
        ends = (float(group[BASE_MOMENTUM]), float(group[MAX_MOMENTUM]))
        (written,) = schedule.momenta(as_position(group[STEP], STEP), [ends])
        return math.isclose(float(cast("float", momentum)), written, rel_tol=1e-6)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return False


def _clear_leftover(groups: Sequence[dict[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Take an earlier wrapper's keys out of the groups, and put back the momentum it cycled."""
    for group, settings in zip(groups, own, strict=True):
        if BASE_MOMENTUM in group and settings.get("momentum") != _momentum(group):
            if "betas" not in group:
                group["momentum"] = settings["momentum"]
            elif isinstance(group["betas"][0], Tensor):
                _fill(group["betas"][0], settings["momentum"])
            else:
                group["betas"] = (settings["momentum"], *group["betas"][1:])
        for key in KEYS:
            group.pop(key, None)


def _starts_anew(groups: Sequence[Mapping[str, Any]], loaded: int | None) -> str | None:
    """What to say if a cycle that went on from a checkpoint is not the one that goes on now.

    Args:
        groups: the groups, with the keys of the earlier wrapper.
        loaded: the position of the checkpoint that the earlier wrapper went on from, if any.
    """
    if loaded is None:
        return None
    step = next(group[STEP] for group in groups if STEP in group)
    return (
        f"an earlier CyclicalOptimizer went on from a checkpoint of step {loaded}, and has come to "
        f"step {step}: this one starts at step 0. To go on from there, call set_iteration({step})."
    )
