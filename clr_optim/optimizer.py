"""CyclicalOptimizer: any torch optimizer, its learning rate cycled by the step itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from clr_optim.averages import CycleEnd, Ema
from clr_optim.backends.torch import is_wrapped_by_torch
from clr_optim.core import arguments, checkpoint, edits, settings
from clr_optim.core.backward_steps import BackwardSteps
from clr_optim.core.course import Number
from clr_optim.core.misnamed import refuse_misnamed
from clr_optim.core.refused_writes import refuse_writes
from clr_optim.core.scheduler_view import CyclicalScheduler
from clr_optim.core.shared import alone
from clr_optim.core.step import take_step
from clr_optim.core.wrapper import OptimizerT
from clr_optim.from_torch import read_scheduler
from clr_optim.gate import Spike
from clr_optim.keys import SCHEDULE, SCHEDULES
from clr_optim.pictures import plot_optimizer
from clr_optim.schedule import ScaleFn, Schedule

__all__ = ["CyclicalOptimizer", "CyclicalScheduler"]


@refuse_writes
class CyclicalOptimizer(BackwardSteps[OptimizerT]):
    """Wrap a torch optimizer and cycle its learning rate, with nothing else to step or save.

    For the ``t``-th ``step()``, counted from 0 (see :mod:`clr_optim.schedule`)::

        lr(t) = b(t)·base_lr + a(t)·(max_lr − base_lr)·w(x(t))

    Between steps ``param_groups[i]["lr"]`` holds the rate of the next step, as if a torch scheduler
    were stepped after every optimizer step. ``param_groups``, ``state`` and ``defaults`` are those
    of the wrapped optimizer. The groups hold the position, and so does every checkpoint.

    The cycle starts at step 0. If the optimizer has loaded a checkpoint of this library before it
    is wrapped, the cycle starts at the checkpoint's position.

    A step without any gradient advances the cycle. If an exception in the closure or a pre-hook, or
    an overflow under AMP, prevents a step, the cycle keeps its position. If other code writes
    ``lr``, the policy overrules it, with one warning: use :meth:`set_bounds` and
    :meth:`set_iteration`.

    Args:
        optimizer: any :class:`torch.optim.Optimizer` instance.
        policy: ``"triangular"``, ``"triangular2"``, ``"exp_range"``, ``"exp_range_bounds"``, in any
            case, or a :class:`~clr_optim.schedule.Schedule`, which brings step sizes, gamma, window
            and scale function.
        base_lr: lower bound, a number or one per group: a list, tuple, array or tensor (of one
            element: a number), or a dictionary if each group has a ``"name"``. ``None`` is the
            paper's ``max_lr / 4``.
        max_lr: upper bound, a number or one per group; ``None`` is the group's ``lr``, so that the
            rate chosen for the optimizer becomes the top of the cycle. If an earlier wrapper cycled
            the optimizer, ``None`` is the ``lr`` before that, or a rate that other code has written
            since. If the optimizer has loaded a checkpoint of this library, ``None`` is the
            checkpoint's bound, for ``base_lr`` too.
        step_size_up: steps of the rising half of a cycle; the paper advises 2 to 10 epochs.
        step_size_down: steps of the falling half; ``None`` is ``step_size_up``. Not both 0.
        gamma: decay per step of the ``exp_range`` policies, in (0, 1].
        window: ``"triangle"``, ``"welch"`` or ``"hann"``.
        scale_fn, scale_mode: as in :class:`torch.optim.lr_scheduler.CyclicLR`; ``scale_fn``
            replaces the policy's decay.
        cycle_momentum: cycle ``momentum``, or ``betas[0]``, against the rate.
        base_momentum, max_momentum: the bounds of momentum, a number or one per group, in [0, 1];
            only with ``cycle_momentum=True``.
        schedules: settings that follow schedules, by name: ``{"weight_decay": schedule, ...}``;
            ``"betas[1]"`` names a member of a tuple. A schedule has bounds, see
            :meth:`clr_optim.schedule.Schedule.between`, and counts the same steps as the policy.
            A list has a schedule for each group, or ``None`` for a group whose setting stays.
        max_grad_norm: clip by the global norm, as :func:`torch.nn.utils.clip_grad_norm_` before
            each step; gradients in memory keep their values. See :attr:`grad_norm`.
        skip_above: skip a step whose global norm before clipping is above this number, infinite or
            NaN; ``math.inf`` skips only the last two; a :class:`Spike` follows the norms of the
            run. A skipped step changes nothing: no parameter, state, counter or position. Step
            hooks run, cycle-end hooks do not. See :attr:`skipped`.
        average: keep an average of each parameter, moved within the step: ``"cycle_end"`` or a
            :class:`~clr_optim.CycleEnd` for the mean at the ends of cycles, an
            :class:`~clr_optim.Ema` for an exponential mean. See :meth:`averaged`.
        master_weights: keep a float32 master of each bfloat16 parameter: 16 bits of state beside
            the parameter, which is the master rounded. The course is that of a float32 model, bit
            for bit. Needs a fused kernel. See :meth:`master_state_dict`.
        backend: ``"torch"`` (the wrapped optimizer's step), ``"native"`` (C++ kernels for CPU
            tensors), ``"triton"`` (kernels for GPU tensors) or ``"auto"``: ``"triton"`` for
            parameters on NVIDIA GPUs that Triton compiles for, ``"native"`` on the CPU, and the
            wrapped optimizer's step for all that has no kernel. The kernels equal torch's for-loop
            step up to rounding. See :meth:`explain`.

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

    @refuse_misnamed
    def __init__(
        self,
        optimizer: OptimizerT,
        policy: str | Schedule = "triangular",
        *,
        base_lr: Number | None = None,
        max_lr: Number | None = None,
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        gamma: float = 0.99994,
        window: str = "triangle",
        scale_fn: ScaleFn | None = None,
        scale_mode: str = "cycle",
        cycle_momentum: bool = False,
        base_momentum: Number = settings.LOW_MOMENTUM,
        max_momentum: Number = settings.HIGH_MOMENTUM,
        schedules: Mapping[str, Schedule | Sequence[Schedule | None]] | None = None,
        max_grad_norm: float | None = None,
        skip_above: float | Spike | None = None,
        average: str | CycleEnd | Ema | None = None,
        master_weights: bool = False,
        backend: str = "auto",
    ) -> None:
        arguments.check_optimizer(optimizer, CyclicalOptimizer)
        schedule = arguments.make_schedule(
            policy,
            CyclicalOptimizer,
            step_size_up=step_size_up,
            step_size_down=step_size_down,
            gamma=gamma,
            window=window,
            scale_fn=scale_fn,
            scale_mode=scale_mode,
        )
        start = arguments.check_arguments(
            optimizer,
            schedule,
            base_lr=base_lr,
            max_lr=max_lr,
            cycle_momentum=cycle_momentum,
            base_momentum=base_momentum,
            max_momentum=max_momentum,
            max_grad_norm=max_grad_norm,
            backend=backend,
            schedules=schedules,
            skip_above=skip_above,
            average=average,
            master_weights=master_weights,
        )
        # From here on only a warning that the user turned into an error can raise.
        self._set_up(start.settings, start.chosen, start.statistics)
        edits.begin(self._shared, start)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: LRScheduler,
        *,
        steps_per_epoch: int = 1,
        schedules: Mapping[str, Schedule | Sequence[Schedule | None]] | None = None,
        max_grad_norm: float | None = None,
        skip_above: float | Spike | None = None,
        average: str | CycleEnd | Ema | None = None,
        master_weights: bool = False,
        backend: str = "auto",
    ) -> CyclicalOptimizer[Optimizer]:
        """Take over a scheduler of torch and its optimizer, in mid-run or before.

        The rates continue the scheduler's, beyond its end too, and so do ``momentum`` or
        ``betas[0]`` if it cycles them: ``iteration`` is the number of scheduler steps taken, times
        ``steps_per_epoch``. Call it between a ``scheduler.step()`` and the next
        ``optimizer.step()``, and then step the returned optimizer only. The scheduler, and what the
        scheduler put into groups and optimizer, do not change.

        The rates are those of torch's closed forms: torch computes most rates from the rate before,
        and drifts by rounding. Each group's initial rate is the upper bound, and ``eta_min`` the
        lower. To resume, build scheduler and optimizer anew, take them over, and load the
        checkpoint.

        The function of a ``LambdaLR`` or ``MultiplicativeLR`` becomes a ``scale_fn``: such a step
        cannot be captured into a CUDA graph. The functions behind the schedules of transformers
        become phases, and need none. A ``scale_fn`` also gives the rates of a ``OneCycleLR`` that
        turns between two steps (``pct_start * total_steps`` is no whole number), and of a
        ``ChainedScheduler`` whose product no phase has. After the last step of a ``OneCycleLR``,
        ``total_steps - 1``, the lowest rate stays; torch would overshoot it once and then raise.

        Args:
            scheduler: a ``LinearLR``, ``ConstantLR``, ``StepLR``, ``MultiStepLR``,
                ``ExponentialLR``, ``PolynomialLR``, ``CosineAnnealingLR``,
                ``CosineAnnealingWarmRestarts``, ``CyclicLR``, ``OneCycleLR``, ``LambdaLR`` or
                ``MultiplicativeLR`` of :mod:`torch.optim.lr_scheduler`, or a ``SequentialLR`` or
                ``ChainedScheduler`` of these.
            steps_per_epoch: the optimizer's steps between two calls of ``scheduler.step()``. If the
                loop calls it once per epoch, the rate changes once per epoch here too: take the
                scheduler over at the end of an epoch.
            schedules, max_grad_norm, skip_above, average, master_weights, backend: as in the
                constructor.

        Returns:
            An optimizer around ``scheduler.optimizer``.

        Raises:
            TypeError: for any other scheduler, and for a subclass with other rates.
            ValueError: for settings that no policy here has, and if a group's ``lr`` or momentum
                differs from the scheduler's: naming both, before anything has changed.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> adam = torch.optim.Adam(model.parameters(), lr=0.5)
            >>> scheduler = torch.optim.lr_scheduler.LinearLR(adam, 0.2, total_iters=4)
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
        taken = read_scheduler(scheduler, steps_per_epoch)
        # The scheduler knows the position; the keys of an earlier wrapper or checkpoint are old.
        with edits.without_our_keys(scheduler.optimizer.param_groups):
            opt = cast("type[CyclicalOptimizer[Optimizer]]", cls)(
                scheduler.optimizer,
                schedules=schedules,
                max_grad_norm=max_grad_norm,
                skip_above=skip_above,
                average=average,
                master_weights=master_weights,
                backend=backend,
                **edits.arguments_of(taken),
            )
            opt.set_iteration(taken.position)
        return opt

    @alone
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group in mid-training; the group joins the cycle at the position of the others.

        Args:
            param_group: as in torch, perhaps with its bounds ``"max_lr"`` and ``"base_lr"``. The
                defaults are the group's ``lr`` and a quarter of ``max_lr``.

        Raises:
            TypeError, ValueError: for what torch refuses, and for impossible bounds.

        Example:
            >>> model, head = torch.nn.Linear(4, 2), torch.nn.Linear(2, 1)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4))
            >>> opt.add_param_group({"params": head.parameters(), "base_lr": 0.2, "max_lr": 0.8})
            >>> opt.get_last_lr()
            [0.1, 0.2]
        """
        edits.add_param_group(self._shared, param_group)

    def __repr__(self) -> str:
        inner = "\n".join(
            line
            for line in repr(self._inner).splitlines()
            if not line.strip().startswith((f"{SCHEDULE}:", f"{SCHEDULES}:"))
        )
        return (
            f"{type(self).__name__} ({self.schedule.name}, iteration {self.iteration}, "
            f"backend {self._shared.serving.name})\n{inner}"
        )

    @property
    def grad_norm(self) -> Tensor | None:
        """The global gradient norm of the last step before clipping, a 0-dim tensor.

        A skipped step counts. ``None`` before the first step with ``max_grad_norm`` or
        ``skip_above``.
        """
        norm = self._shared.grad_norm()
        traits = self._shared.serving.traits
        return norm.clone() if norm is not None and traits and traits.reuses_norm else norm

    def explain(self) -> str:
        """Return which backend serves which parameters and why, in a line for each.

        Example:
            >>> model = torch.nn.Linear(4, 2)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters()), backend="torch")
            >>> print(opt.explain())
            torch: 2 parameter tensors, 10 values, SGD: asked for by backend='torch'
        """
        shared = self._shared
        return "\n".join([shared.serving.explain(), *shared.in_backward.explain()])

    plot = plot_optimizer

    # ---- a step

    def _step(
        self, closure: Callable[[], float] | None = None, *args: Any, **kwargs: Any
    ) -> float | None:
        return take_step(self, closure, *args, **kwargs)

    # torch's hooks and its range for profilers cost more than a step of a small model.
    _observed_step = Optimizer.profile_hook_step(_step)

    @overload
    def step(self, closure: None = None, *args: Any, **kwargs: Any) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *args: Any, **kwargs: Any) -> float: ...
    @functools.wraps(_step, assigned=())
    def step(self, *args: Any, **kwargs: Any) -> float | None:
        """Take a step of the wrapped optimizer at the policy's rate, and advance the cycle.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.
            *args: further arguments of the wrapped ``step``.
            **kwargs: likewise.

        Returns:
            What the wrapped ``step`` returns, which is the closure's loss.

        Raises:
            RuntimeError: if a backend that was asked for by name cannot serve all parameters or a
                replaced ``step``, and if a CUDA graph cannot capture the step, saying why.

        Example:
            >>> weight = torch.ones(3, requires_grad=True)
            >>> opt = CyclicalOptimizer(torch.optim.SGD([weight], lr=0.4), step_size_up=3)
            >>> weight.sum().backward()
            >>> opt.step()
            >>> opt.iteration, opt.get_last_lr()
            (1, [0.2])
        """
        # The tracer of torch.compile takes this way. To ask costs less than to pass through the
        # wrapper of torch.compiler.disable at each step.
        if torch.compiler.is_compiling():
            return cast("float | None", _untraced_step(self, *args, **kwargs))
        is_plain = not kwargs and (not args or (len(args) == 1 and args[0] is None))
        if is_plain and self._shared.take_ordinary_step(self.__dict__):
            return None
        return _step_with_hooks(self, *args, **kwargs)

    # This mark keeps torch from wrapping the method.
    step.hooked = True  # type: ignore[attr-defined]

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict, whose ``param_groups`` hold the position.

        If the layout of the wrapped optimizer drops what groups hold, an entry ``"clr_optim"``
        holds our keys. The dictionary loads under ``torch.load(weights_only=True)``, and into the
        plain optimizer too.

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

    @alone
    def _read_state_dict(self) -> dict[str, Any]:
        return checkpoint.save(self._shared)

    @alone
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, or of the plain wrapped optimizer.

        A checkpoint of this class brings position and bounds. A checkpoint of the plain optimizer
        keeps the bounds and starts at position 0: :meth:`set_iteration` changes that. The policy is
        always this object's. A warning comes if the checkpoint was written under another policy, if
        its bounds are not the constructor's, or if its ``lr`` is not the rate of its position:
        :meth:`set_bounds` changes the bounds.

        The load hooks of the wrapped optimizer run before the checks.

        Args:
            state_dict: what :meth:`state_dict` returned, or the plain optimizer's.

        Raises:
            TypeError, ValueError: for what is no checkpoint, or one of another optimizer class or
                other groups; the optimizer has then not changed.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> plain = torch.optim.SGD(model.parameters(), lr=0.4)
            >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.8))
            >>> opt.load_state_dict(plain.state_dict())
            >>> opt.set_iteration(2000)
            >>> opt.get_last_lr()
            [0.8]
        """
        state_dict = checkpoint.shallow_copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        checkpoint.load(self._shared, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _step_with_hooks(optimizer: CyclicalOptimizer[Any], *args: Any, **kwargs: Any) -> float | None:
    """Take a step between the hooks of the wrapper, if it has any."""
    if "step" in optimizer._inner.__dict__:
        optimizer._shared.serving.refuse_replaced_step()
    observed = (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )
    # torch wraps a subclass's own step, and that wrapper runs the hooks.
    if observed and not is_wrapped_by_torch(type(optimizer)):
        return optimizer._observed_step(*args, **kwargs)
    return take_step(optimizer, *args, **kwargs)


# If torch.compile traced a step, each new rate would need a new compilation.
_untraced_step = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _step_with_hooks, reason="CyclicalOptimizer.step changes the parameters in compiled kernels"
)
