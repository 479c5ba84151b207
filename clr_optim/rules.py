"""The update rules, one entry each: an optimizer class, and its kernel, state and scalars.

The arithmetic of a rule is in ``kernels/native/rules.h`` and in ``kernels/triton/rules.py``; a list
at the end of each names the kernels. ``STATE_SLOTS`` also has the state of the optimizers that no
kernel serves. A new update rule costs one entry here, its arithmetic once per kernel language, and
one row in the tests' table.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.keys import AVERAGE, REST

__all__ = [
    "KERNELS",
    "NUMBERS",
    "RULES",
    "SHIPPED",
    "STATE_SLOTS",
    "AverageSlot",
    "RestSlot",
    "Slot",
    "StateSlots",
    "UpdateRule",
    "class_name",
    "reads_first_rate_alone",
    "register_rule",
]  # fmt: skip

Group = Mapping[str, Any]
Shape = tuple[int, ...]

# A number that no setting has, to find the column of a setting.
_MARK = 0.7390851332151607
# Types of settings that cannot hold a tensor.
_NO_TENSORS = frozenset({bool, int, float, type(None)})


@dataclass(frozen=True)
class Slot:
    """A state tensor with the shape of its parameter.

    Args:
        name: torch's key in ``optimizer.state[p]``.
        fill: the initial value; ``None`` for a buffer that starts as the first gradient. Before the
            first gradient such a buffer may be missing or ``None``.
    """

    name: str
    fill: Callable[[Mapping[str, Any]], float] | None = lambda defaults: 0.0


@dataclass(frozen=True)
class AverageSlot(Slot):
    """The average of a parameter: the last slot. It starts as a copy of the parameter.

    Args:
        name: as for :class:`Slot`.
        fill: not used.
        wide: the dtype of the average of a 16-bit parameter; None is that of the parameter.
    """

    name: str = AVERAGE
    wide: torch.dtype | None = None

    def dtype_for(self, param: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's average."""
        return self.wide if self.wide is not None and param.itemsize < 4 else param.dtype

    def find(self, state: dict[str, Any], param: Tensor) -> Tensor | None:
        """Return the average in a parameter's state, or None without one; mend its dtype.

        torch's load_state_dict casts the average to the dtype of the parameter.
        """
        average = state.get(self.name)
        if not isinstance(average, Tensor) or average.shape != param.shape:
            return None
        dtype = self.dtype_for(param)
        if average.dtype != dtype:
            average = state[self.name] = average.to(dtype)
        return average


@dataclass(frozen=True)
class RestSlot(Slot):
    """The rest of a master: 16 raw bits beside each value of a bfloat16 parameter.

    It follows the slots of the rule, and starts with zeros. The dtype is bfloat16, and kernels read
    the bits as int16.

    Args:
        name, fill: as for :class:`Slot`.
    """

    name: str = REST


@dataclass(frozen=True)
class UpdateRule:
    """An optimizer class, and the kernel that updates its parameters.

    Args:
        optimizer: the exact class. A subclass may override ``step``, so torch serves subclasses.
            ``Optimizer`` for a rule that :func:`register_rule` binds to a class.
        kernels: the kernels of the class by name, each with the state that the kernel reads and
            writes, in the kernel's order. Classes may share a kernel.
        has_step: whether ``state[p]["step"]`` counts the parameter's steps.
        scalars: returns the scalars that this rule reads, in the kernel's order. They come after
            those that every rule reads, see :meth:`row`.
        momentum: the index in the scalars of the momentum or ``betas[0]``, which may cycle.
        choose: returns the name of the kernel for the flags of a group. A class with one kernel
            needs none.
        scalar_states: the first values of states that have one element, by name. Each step
            multiplies them by the kernel's factor. At most one, and only beside a step counter.
        is_decoupled: returns whether the weight decay of a group shrinks the weights. Otherwise
            the weight decay is added to the gradient.
        refuses: returns why the kernel cannot serve an optimizer of the class, or None.
        reads: settings that the kernel reads, beside the arguments of the class.
    """

    optimizer: type[Optimizer]
    kernels: Mapping[str, tuple[Slot, ...]]
    has_step: bool
    scalars: Callable[[Group], tuple[float, ...]]
    momentum: int | None = None
    choose: Callable[[Group], str] | None = None
    scalar_states: Mapping[str, float] = field(default_factory=dict)
    is_decoupled: Callable[[Group], bool] = lambda group: False
    refuses: Callable[[Optimizer], str | None] = lambda optimizer: None
    reads: frozenset[str] = frozenset()

    @functools.cached_property
    def settings(self) -> frozenset[str]:
        """The names of the class's settings, without the rate and without keys of the user."""
        names = inspect.signature(self.optimizer).parameters
        # No argument of AdamW, but a key in its groups: torch tells AdamW from Adam by this key.
        return frozenset({*names, *self.reads, "decoupled_weight_decay"}) - {"params", "lr"}

    def kernel(self, group: Group) -> str:
        """Return the name of the kernel for the flags of a group."""
        return next(iter(self.kernels)) if self.choose is None else self.choose(group)

    def slots(self, group: Group) -> tuple[Slot, ...]:
        """Return the state that the kernel reads and writes, in the kernel's order."""
        return self.kernels[self.kernel(group)]

    def bound_to(self, cls: type[Optimizer]) -> UpdateRule:
        """Return the same rule for another class."""
        return replace(self, optimizer=cls, reads=self.settings)

    def not_fused(self, group: Group, *, capturable: bool = False) -> str | None:
        """Return the reason why torch must serve a group with these settings, or None.

        Args:
            group: the settings.
            capturable: whether a graph can capture the kernels.
        """
        for flag in ("differentiable",) if capturable else ("differentiable", "capturable"):
            if group.get(flag):
                return f"{flag}=True"
        for name, value in group.items():
            if type(value) in _NO_TENSORS or name not in self.settings:
                continue
            values = value if isinstance(value, Sequence) else (value,)
            if any(isinstance(v, Tensor) for v in values):
                return f"{name} is a tensor"
            if name == "betas" and isinstance(value, (list, tuple)) and 1.0 in value:
                return "a beta is 1"
        if isinstance(group.get("weight_decay"), str):  # which row() would convert
            return "weight_decay is a string"
        try:
            self.kernel(group)
            row = self.row(group)
        except KeyError as missing:
            return f"its group has no {missing}"
        if any(isinstance(scalar, str) for scalar in row):
            return "a setting is a string"
        return None

    @property
    def numbers(self) -> dict[str, float]:
        """The first values of all state that has one element, by name, the step counter first."""
        return {"step": 0.0, **self.scalar_states} if self.has_step else {}

    @property
    def state_order(self) -> tuple[str, ...]:
        """The names of all state, in the order in which torch creates it."""
        tensors = (slot.name for slots in self.kernels.values() for slot in slots)
        return (*self.numbers, *dict.fromkeys(tensors))

    def columns_of(self, group: Group, key: str, members: Sequence[int]) -> list[int]:
        """Return the column in :meth:`row` of each number of a setting, or -1.

        Args:
            group: the settings of a group.
            key: the setting's name.
            members: the places of its numbers in a tuple; empty if the setting is a number.
        """
        columns = []
        for member in members or (None,):
            marked: Any = _MARK
            if member is not None:
                marked = [*group[key]]
                marked[member] = _MARK
            row = self.row({**group, key: marked})
            columns.append(row.index(_MARK) if _MARK in row else -1)
        return columns

    def row(self, group: Group) -> tuple[float, ...]:
        """Return the scalars of a group: those of every rule, as ``Common`` in rules.h, then ours.

        The first is the rate, which each step fills in.
        """
        decay = float(group["weight_decay"])
        added, shrinking = (0.0, decay) if self.is_decoupled(group) else (decay, 0.0)
        maximizes = "maximize" in self.settings and group["maximize"]
        return (0.0, added, shrinking, -1.0 if maximizes else 1.0, *self.scalars(group))


_MOMENTUM_BUFFER = Slot("momentum_buffer")
_EXP_AVG, _SQUARE_AVG = Slot("exp_avg"), Slot("square_avg")
_ADAM = (_EXP_AVG, Slot("exp_avg_sq"))


def class_name(cls: type[Optimizer]) -> str:
    """Return the name of a class, with its module if torch has another class of that name."""
    torchs = getattr(torch.optim, cls.__name__, cls)
    return cls.__name__ if torchs is cls else f"{cls.__module__}.{cls.__qualname__}"


def _adam(optimizer: type[Optimizer], decoupled: bool) -> UpdateRule:
    def scalars(group: Group) -> tuple[float, ...]:
        return (*group["betas"], group["eps"])

    return UpdateRule(
        optimizer,
        kernels={"adam": _ADAM, "adam_amsgrad": (*_ADAM, Slot("max_exp_avg_sq"))},
        choose=lambda group: "adam_amsgrad" if group["amsgrad"] else "adam",
        has_step=True,
        scalars=scalars,
        momentum=0,
        # torch before 2.12 has no such key: the class decides.
        is_decoupled=lambda group: bool(group.get("decoupled_weight_decay", decoupled)),
    )


def _rmsprop_kernel(group: Group) -> str:
    momentum = "_momentum" if group["momentum"] > 0 else ""
    return f"rmsprop{momentum}{'_centered' if group['centered'] else ''}"


_SHIPPED = (
    UpdateRule(
        torch.optim.SGD,
        # The buffer starts as the first gradient.
        kernels={"sgd": (), "sgd_momentum": (Slot("momentum_buffer", None),)},
        choose=lambda group: "sgd_momentum" if group["momentum"] != 0 else "sgd",
        has_step=False,
        scalars=lambda g: (g["momentum"], g["dampening"], float(bool(g["nesterov"]))),
        momentum=0,
    ),
    _adam(torch.optim.Adam, decoupled=False),
    _adam(torch.optim.AdamW, decoupled=True),
    UpdateRule(
        torch.optim.Adagrad,
        kernels={"adagrad": (Slot("sum", lambda d: float(d["initial_accumulator_value"])),)},
        has_step=True,
        scalars=lambda g: (g["lr_decay"], g["eps"]),
    ),
    UpdateRule(
        torch.optim.Adadelta,
        kernels={"adadelta": (_SQUARE_AVG, Slot("acc_delta"))},
        has_step=True,
        scalars=lambda g: (g["rho"], g["eps"]),
    ),
    UpdateRule(
        torch.optim.RMSprop,
        kernels={
            "rmsprop": (_SQUARE_AVG,),
            "rmsprop_momentum": (_SQUARE_AVG, _MOMENTUM_BUFFER),
            "rmsprop_centered": (_SQUARE_AVG, Slot("grad_avg")),
            "rmsprop_momentum_centered": (_SQUARE_AVG, _MOMENTUM_BUFFER, Slot("grad_avg")),
        },
        choose=_rmsprop_kernel,
        has_step=True,
        scalars=lambda g: (g["alpha"], g["eps"], g["momentum"]),
        momentum=2,
    ),
    UpdateRule(
        torch.optim.Adamax,
        kernels={"adamax": (_EXP_AVG, Slot("exp_inf"))},
        has_step=True,
        scalars=lambda g: (*g["betas"], g["eps"]),
        momentum=0,
    ),
    UpdateRule(
        torch.optim.RAdam,
        kernels={"radam": _ADAM},
        has_step=True,
        scalars=lambda g: (*g["betas"], g["eps"]),
        momentum=0,
        is_decoupled=lambda group: bool(group["decoupled_weight_decay"]),
    ),
    UpdateRule(
        torch.optim.NAdam,
        kernels={"nadam": _ADAM},
        has_step=True,
        scalars=lambda g: (*g["betas"], g["eps"], g["momentum_decay"]),
        momentum=0,
        scalar_states={"mu_product": 1.0},
        is_decoupled=lambda group: bool(group["decoupled_weight_decay"]),
    ),
    UpdateRule(
        Optimizer,
        kernels={"lion": (_EXP_AVG,)},
        has_step=False,
        scalars=lambda g: tuple(g["betas"]),
        momentum=0,
        is_decoupled=lambda group: True,
        # lion-pytorch keeps this argument out of the groups, and divides the weight decay by lr.
        refuses=lambda lion: (
            "decoupled_weight_decay=True" if getattr(lion, "decoupled_wd", False) else None
        ),
        reads=frozenset({"betas", "weight_decay"}),
    ),
)


def _name(rule: UpdateRule) -> str:
    if rule.optimizer is Optimizer:
        return next(iter(rule.kernels))
    return rule.optimizer.__name__.lower()


#: The rules that have kernels, by the name that :func:`register_rule` takes: the class of torch in
#: lower case, or the name of the kernel.
SHIPPED: dict[str, UpdateRule] = {_name(rule): rule for rule in _SHIPPED}

#: The state of each kernel, by the kernel's name. Native code knows a kernel by its place here.
KERNELS: dict[str, tuple[Slot, ...]] = {
    name: slots for rule in _SHIPPED for name, slots in rule.kernels.items()
}

#: The names of all state that has one element.
NUMBERS = frozenset(name for rule in SHIPPED.values() for name in rule.numbers)

#: The fused rules, by exact class.
RULES: dict[type[Optimizer], UpdateRule] = {
    rule.optimizer: rule for rule in SHIPPED.values() if rule.optimizer is not Optimizer
}


def _whole(shape: Shape) -> Shape:
    return shape


@dataclass(frozen=True)
class StateSlots:
    """The names that ``optimizer.state[p]`` may hold after the first step of a parameter.

    Args:
        tensors: by name, a function from the parameter's shape to the shape of the tensor; the
            function returns None if a parameter of that shape has no such tensor.
        numbers: names of numbers, or of tensors of one element.
        others: names of values without a fixed form.
        rule: the update rule, which knows the state that depends on the flags of a group.
        lazy: names that may still be missing after the first step.
    """

    tensors: Mapping[str, Callable[[Shape], Shape | None]]
    numbers: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    rule: UpdateRule | None = None
    lazy: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """All names."""
        return self.numbers | self.others | frozenset(self.tensors)

    def used(self, group: Group, shape: Shape) -> dict[str, Shape]:
        """Return the shapes of the tensors that a step with these settings reads, by name."""
        names = self.tensors if self.rule is None else [s.name for s in self.rule.slots(group)]
        forms = {name: self.tensors[name](shape) for name in names}
        return {name: form for name, form in forms.items() if form is not None}

    def needed(self, group: Group, shape: Shape) -> frozenset[str]:
        """Return the names without which a step fails, for a parameter of this shape."""
        if self.rule is None:
            kept = {name for name, form in self.tensors.items() if form(shape) is not None}
        else:
            kept = {slot.name for slot in self.rule.slots(group) if slot.fill is not None}
        return (self.numbers | kept) - self.lazy


def _slots(*names: str, numbers: tuple[str, ...] = ("step",)) -> StateSlots:
    return StateSlots(dict.fromkeys(names, _whole), frozenset(numbers))


def _fused_slots(rule: UpdateRule) -> StateSlots:
    tensors = {name: _whole for name in rule.state_order if name not in rule.numbers}
    return StateSlots(tensors, frozenset(rule.numbers), rule=rule)


#: The names that ``optimizer.state[p]`` may hold, by exact class of the optimizer.
STATE_SLOTS: dict[type[Optimizer], StateSlots] = {
    **{cls: _fused_slots(rule) for cls, rule in RULES.items()},
    torch.optim.Adafactor: StateSlots(
        {
            "row_var": lambda shape: (*shape[:-1], 1) if len(shape) > 1 else None,
            "col_var": lambda shape: (*shape[:-2], 1, shape[-1]) if len(shape) > 1 else None,
            "variance": lambda shape: shape if len(shape) < 2 else None,
        },
        frozenset({"step"}),
    ),
    torch.optim.ASGD: _slots("ax", numbers=("step", "eta", "mu")),
    torch.optim.LBFGS: StateSlots(
        {},
        others=frozenset(
            {
                "func_evals", "n_iter", "d", "t", "old_dirs", "old_stps", "ro", "H_diag",
                "prev_flat_grad", "prev_loss", "al",
            }
        ),
    ),
    torch.optim.Muon: StateSlots(
        {"momentum_buffer": _whole}, lazy=frozenset({"momentum_buffer"})
    ),
    torch.optim.Rprop: _slots("prev", "step_size"),
    torch.optim.SparseAdam: _slots("exp_avg", "exp_avg_sq"),
}  # fmt: skip


def reads_first_rate_alone(optimizer: Optimizer) -> bool:
    """Whether the optimizer reads ``lr`` at its first step only."""
    return isinstance(optimizer, torch.optim.Rprop)


def register_rule(optimizer_class: type[Optimizer], rule: str) -> None:
    """Let the fused kernels of a rule update the parameters of another optimizer class.

    The kernels then replace the class's ``step``, so ``step`` must compute the rule. The class must
    have the settings and the state of the rule, under the same names. A group that lacks a setting
    is served by the class's own ``step``. A binding holds for the exact class, until the process
    ends, and for optimizers that are wrapped afterwards.

    Args:
        optimizer_class: the class. It is no class of torch.
        rule: ``"lion"``, which updates as the class ``Lion`` of the package lion-pytorch, or the
            name of a fused class of torch in lower case, such as ``"adam"``.

    Raises:
        TypeError: ``optimizer_class`` is no subclass of ``torch.optim.Optimizer``.
        ValueError: ``optimizer_class`` is already bound to a rule or is a class of torch, or no
            rule has this name.

    Example:
        >>> from clr_optim import register_rule
        >>> from lion_pytorch import Lion  # doctest: +SKIP
        >>> register_rule(Lion, "lion")  # doctest: +SKIP
        >>> opt = CyclicalOptimizer(Lion(model.parameters(), lr=1e-4))  # doctest: +SKIP
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(
            f"optimizer_class must be a subclass of torch.optim.Optimizer, got {optimizer_class!r}"
        )
    cls = optimizer_class
    if cls is Optimizer or getattr(torch.optim, cls.__name__, None) is cls:
        raise ValueError(f"optimizer_class must not be a class of torch, got {class_name(cls)}")
    if cls in RULES:
        raise ValueError(
            f"optimizer_class must not be bound twice: {class_name(cls)} is already bound to a "
            "rule; bind a subclass to another rule"
        )
    if not isinstance(rule, str) or rule not in SHIPPED:
        names = ", ".join(map(repr, SHIPPED))
        got = repr(rule) if isinstance(rule, str) else f"an object of type {type(rule).__name__}"
        raise ValueError(f"rule must be one of {names}, got {got}")
    RULES[cls] = SHIPPED[rule].bound_to(cls)
    STATE_SLOTS[cls] = _fused_slots(RULES[cls])
