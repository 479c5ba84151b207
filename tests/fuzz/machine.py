"""Two optimizers that live through the same events, ours and plain torch's: they must stay equal.

The twin is torch's own step, fed rates that are computed here from nothing but the number of steps
taken. What may happen is declared once, with the values that an event may take: the fuzzer draws
from these, and so does the state machine of ``test_native_machine.py``. A setup and its events are
plain JSON, which plays the same again at any time.

``native`` and ``triton`` are compared up to rounding: float64 at the end of all steps, narrower
dtypes after each step, from which both then go on alike; 16-bit parameters with a step of the twin
in float64. ``torch`` is compared bit for bit.

A step may amplify rounding without limit: where a gradient and its weight decay cancel and the
second moment is below what 16 bits can hold, what is left of one is divided by what is left of the
other. Values that part by more than rounding are therefore held against two more steps of the twin,
whose gradients are off by no more than float32's rounding.
"""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from cases import OTHER_IMPLEMENTATIONS, WITHOUT_KERNEL
from native_helpers import (
    ADAGRAD_LACKS_STATE,
    BY_NAME,
    HALF,
    assert_pattern,
    dense,
    failure,
    held,
    like,
    members,
    parameters,
    strides,
    unaligned,
)
from torch import Tensor

from clr_optim import CyclicalOptimizer
from clr_optim import schedule as schedules
from clr_optim.schedule import Schedule

Optimizer = torch.optim.Optimizer

BACKENDS = ("native", "torch", "triton")

# ---- the rates, by the paper


def halved(cycle: float) -> float:
    """A ``scale_fn``, at the top of a module so that it can be pickled."""
    return 0.5**cycle


def _paper(
    step_size: int, amplitude: Callable[[int, int], float], floor: Callable[[int], float]
) -> Callable[[int, float, float], float]:
    """The paper's own code, its decays as functions of cycle (counted from 1) and iteration."""

    def rate(iteration: int, base_lr: float, max_lr: float) -> float:
        cycle = 1 + iteration // (2 * step_size)
        x = abs(iteration / step_size - 2 * cycle + 1)
        decayed = (max_lr - base_lr) * amplitude(cycle, iteration)
        return floor(iteration) * base_lr + max(0.0, 1 - x) * decayed

    return rate


@dataclass(frozen=True)
class Policy:
    """Options of the wrapper, the schedule they come to, and the paper's formula for it, if any."""

    options: dict[str, Any]
    schedule: Schedule
    formula: Callable[[int, float, float], float] | None = None


def _policies() -> Iterator[tuple[str, Policy]]:
    def same(iteration: int) -> float:
        return 1.0

    for name, formula in (
        ("triangular", _paper(7, lambda c, t: 1.0, same)),
        ("triangular2", _paper(3, lambda c, t: 2.0 ** (1 - c), same)),
        ("exp_range", _paper(4, lambda c, t: 0.99**t, same)),
        ("exp_range_bounds", _paper(2, lambda c, t: 0.99**t, lambda t: 0.99**t)),
    ):
        size = {"triangular": 7, "triangular2": 3, "exp_range": 4, "exp_range_bounds": 2}[name]
        gamma = {"gamma": 0.99} if name.startswith("exp") else {}
        made = getattr(schedules, name)(size, **gamma)
        yield name, Policy({"policy": name, "step_size_up": size, **gamma}, made, formula)
    halving = {"step_size_up": 3, "scale_fn": halved}
    made = schedules.triangular(3, scale_fn=halved)
    yield "scale_fn", Policy(halving, made, _paper(3, lambda c, t: halved(c), same))
    for name, schedule in (
        ("welch", schedules.triangular(2, 5, window="welch")),
        ("hann", schedules.triangular2(3, 0, window="hann")),
        ("fixed", schedules.fixed()),
        ("decay", schedules.decay(9)),
        ("exp", schedules.exp(gamma=0.9)),
        ("one_cycle", schedules.one_cycle(20)),
        ("warm_restarts", schedules.warm_restarts(3, period_multiplier=2)),
        ("ramp", schedules.ramp(12)),
        ("sequence", schedules.sequence([(schedules.triangular(2), 7), (schedules.exp(), None)])),
        ("own_bounds", schedules.triangular(3, base_lr=0.002, max_lr=0.03)),
    ):
        yield name, Policy({"policy": schedule}, schedule)


POLICIES = dict(_policies())


@dataclass
class Expected:
    """Where our optimizer must be: all that its rates follow from."""

    policy: str
    bounds: list[tuple[float, float]]
    momenta: list[tuple[float, float]] | None
    position: int = 0
    #: after which steps a cycle ended
    ends: list[int] = field(default_factory=list)

    def rates(self) -> list[float]:
        """To the last bit by the schedule; the paper's formula says whether that is right."""
        policy = POLICIES[self.policy]
        rates = policy.schedule.rates(self.position, self.bounds)
        if policy.formula is not None:
            by_paper = [policy.formula(self.position, *bounds) for bounds in self.bounds]
            assert rates == pytest.approx(by_paper, rel=1e-9, abs=1e-12)
        return rates

    def feed_rates(self, theirs: Optimizer, rates: list[float] | None = None) -> None:
        for group, lr in zip(theirs.param_groups, rates or self.rates(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def feed(self, theirs: Optimizer, rates: list[float] | None = None) -> None:
        self.feed_rates(theirs, rates)
        if self.momenta is None:
            return
        momenta = POLICIES[self.policy].schedule.momenta(self.position, self.momenta)
        for group, momentum in zip(theirs.param_groups, momenta, strict=True):
            if "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            else:
                group["momentum"] = momentum

    def stepped(self) -> None:
        self.position += 1
        if POLICIES[self.policy].schedule.is_cycle_end(self.position):
            self.ends.append(self.position)


# ---- what there may be

SHAPES = [(3, 4), (5,), (), (0, 2), (2, 3, 2, 2), (1, 3), (70,)]
DTYPES = {
    "float64": (torch.float64,),
    "float32": (torch.float32,),
    "bfloat16": (torch.bfloat16,),
    "float16": (torch.float16,),
    "mixed": (torch.float64, torch.float32),
}
#: relative to a tensor's largest value; float64 over all steps, the others over one
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-7 * 1.01,
    torch.float16: 2.0**-10 * 1.01,
}
#: of the gradient with its weight decay, which kernels sum in float32
ROUNDING = 2.0**-23
KEYS: dict[str, list[Any]] = {
    "weight_decay": [0.0, 0.1],
    "maximize": [False, True],
    "momentum": [0.0, 0.5, 0.9],
    "dampening": [0.0, 0.3],
    "nesterov": [False, True],
    "amsgrad": [False, True],
    "betas": [(0.9, 0.999), (0.5, 0.7)],
    "eps": [1e-8, 1e-2],
    "lr_decay": [0.0, 0.1],
    "rho": [0.9, 0.4],
    "alpha": [0.99, 0.5],
    "centered": [False, True],
    "differentiable": [False, True],
    "decoupled_weight_decay": [False, True],
}


class Settings(Sequence[float]):
    """A sequence of the user's own, as ListConfig is one."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = tuple(values)

    def __getitem__(self, i: Any) -> Any:
        return self.values[i]

    def __len__(self) -> int:
        return len(self.values)


#: kinds of settings: the type that is replaced, and what replaces it
ODD: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "list": (tuple, list),
    "sequence": (tuple, Settings),
    "number": (float, np.float64),
    "flag": (bool, np.bool_),
}
#: Rows that are not on torch's for-loop, or that no kernel serves; for the torch backend.
OTHERS = {
    case.name: case
    for case in [*OTHER_IMPLEMENTATIONS, *WITHOUT_KERNEL]
    if not (case.sparse or case.closure or case.only_2d)
}
_FLAGS = ("fused", "capturable", "foreach")
_HAVE_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
_HAVE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad)
_HAVE_CAPTURABLE = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adadelta
)  # fmt: skip


def setups(backend: str) -> dict[str, Sequence[Any]]:
    """What an optimizer may be made of: the values of each of the arguments of a machine."""
    names = [
        name for name, case in BY_NAME.items()
        if not (case.cls is torch.optim.Adagrad and ADAGRAD_LACKS_STATE)
    ]  # fmt: skip
    flags = {
        "native": (None,) * 6 + ("fused",),
        "triton": (None,) * 4 + ("fused", "capturable"),
        "torch": (None, None, "foreach", "fused"),
    }[backend]
    return {
        "backend": (backend,),
        "case": [*names, *(list(OTHERS) * 3 if backend == "torch" else [])],
        "seed": range(2**16),
        # Each program costs Triton's interpreter some milliseconds.
        "count": range(1, 6 if backend != "triton" else 3),
        "big": (False,) * (9 if backend != "triton" else 29) + (True,),
        "clip": (None, None, 0.5),
        "dtype": ("float64",) * 4 + ("float32",) * 2 + ("mixed", "bfloat16", "float16"),
        "policy": ["triangular"] * 4 + list(POLICIES),
        "flag": flags,
        "tensor_lr": (False,) * 6 + (True,),
        "hook": (False, True),
    }


@dataclass(frozen=True)
class Event:
    """How often it happens, and what its arguments may be."""

    weight: float
    arguments: dict[str, Sequence[Any]]


EVENTS: dict[str, Event] = {}

WHICH = range(64)
SEEDS = range(2**16)
FLAG = (False, True)


def event(weight: float, **arguments: Sequence[Any]) -> Callable[[Any], Any]:
    """Declare a method of the machine as something that may happen; False if nothing did."""

    def declare(method: Any) -> Any:
        EVENTS[method.__name__] = Event(weight, arguments)
        return method

    return declare


class BoomError(Exception):
    """Raised by a closure or a hook of the user's."""


def boom(*args: object) -> None:
    raise BoomError


@contextmanager
def surroundings(backend: str) -> Iterator[None]:
    """What "auto" means, and the warnings that belong to events."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("CLR_OPTIM_BACKEND", backend)
        warnings.filterwarnings("ignore", "lr was written from outside", UserWarning)
        warnings.filterwarnings("ignore", "state_dict has the bounds", UserWarning)
        warnings.filterwarnings("ignore", "an earlier CyclicalOptimizer went on", UserWarning)
        # Nobody edits a checkpoint here.
        warnings.filterwarnings("error", "the checkpoint's lr is not", UserWarning)
        warnings.filterwarnings("ignore", "Sparse invariant checks")
        warnings.filterwarnings("ignore", "grad and param do not obey", UserWarning)
        # numpy's, of what the interpreter computes and nobody reads: an SGD's empty first buffer.
        warnings.filterwarnings("ignore", "", RuntimeWarning, r"triton\.runtime\.interpreter")
        threads = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class Machine:
    """Ours and torch's, and what may happen to both.

    Args:
        backend: the one that is looked at; what a kernel cannot serve goes to torch's own step.
        case: the optimizer, by the name of its row in the tests' tables.
        seed, count, big: of the parameters.
        clip: ``max_grad_norm``.
        dtype, policy: names of :data:`DTYPES` and :data:`POLICIES`.
        flag: of the wrapped optimizer; torch's twin has it too where backend is ``"torch"``.
        tensor_lr: whether ``lr`` is a tensor.
        hook: whether ends of cycles are listened to, which a GPU's host must then be told.
    """

    def __init__(
        self,
        backend: str,
        case: str,
        seed: int,
        count: int = 3,
        big: bool = False,
        clip: float | None = None,
        dtype: str = "float64",
        policy: str = "triangular",
        flag: str | None = None,
        tensor_lr: bool = False,
        hook: bool = False,
    ) -> None:
        self.backend, self.clip, self.hook = backend, clip, hook
        known: Any = BY_NAME.get(case) or OTHERS[case]
        self.case = known
        if case not in BY_NAME:
            flag, tensor_lr = next((f for f in _FLAGS if known.options.get(f)), None), False
        if flag == "fused" and (known.cls not in _HAVE_FUSED or tensor_lr):
            flag = None
        if flag == "capturable" and known.cls not in _HAVE_CAPTURABLE:
            flag = None
        if flag == "foreach" and tensor_lr:
            flag = None
        if known.options.get("centered") and backend != "torch":
            dtype = "float64"  # narrower ones lose the difference of two averages to rounding
        self.exact = backend == "torch"
        if self.exact and flag == "fused" and dtype in ("bfloat16", "float16"):
            dtype = "float32"  # torch's fused SGD reads memory nobody wrote: not twice the same
        self.dtypes = DTYPES[dtype]
        #: of what all tensors follow from, the norm over all of them, if not their own
        self.precision = torch.float32 if dtype == "mixed" and clip is not None else None
        self.centered = self.dtypes == (torch.float64,) or self.exact
        self.flag = flag
        #: torch's own step would not do the same: it rounds otherwise, or refuses
        self.only_kernels = not self.exact and (dtype in ("bfloat16", "float16") or bool(flag))
        self.numbers = 0
        values = [self.value(seed, i) for i in range(count)]
        if big:
            length = 2100 if backend == "triton" else 40_000
            values.append(self.normal((length,), seed).to(self.dtypes[0]))

        options = {flag: True} if flag else {}
        if flag == "fused":
            options["foreach"] = None

        def make(options: dict[str, Any]) -> Optimizer:
            if tensor_lr:
                options = {**options, "lr": torch.tensor(known.lr, dtype=torch.float64)}
            made: Optimizer = known.make(parameters(values), **options)
            return made

        self.theirs = make(options if self.exact else {})
        self.wrap = {
            **POLICIES[policy].options,
            "max_grad_norm": clip,
            **getattr(known, "wrap", {}),
        }
        self.ours: Any = CyclicalOptimizer(make(options), **self.wrap)
        momenta = None
        if self.wrap.get("cycle_momentum"):
            momenta = [(self.wrap["base_momentum"], self.wrap["max_momentum"])]
        self.expected = Expected(policy, [(known.lr / 4, known.lr)], momenta)
        self.ended: list[int] = []
        self.listen()
        self.others: list[Any] = []
        self.saved: Any = None
        #: whether settings are of types that only a trusted file may hold
        self.odd = False
        #: whether the groups' rates are somebody else's at the moment
        self.overwritten = False
        #: steps since the gradients were new; after too many a centered average is all rounding
        self.stale = 0
        #: what rounding alone may come to in the step that is looked at, see :meth:`slack`
        self.doubt: Callable[[], Any] | None = None

    def value(self, seed: int, i: int) -> Tensor:
        value = self.normal(SHAPES[(seed + i) % len(SHAPES)], seed + i)
        value = value.to(self.dtypes[i % len(self.dtypes)])
        if value.dim() == 2 and i % 2:
            value = value.t()
        if value.dim() == 4 and i % 2:
            value = value.to(memory_format=torch.channels_last)
        return value

    def listen(self) -> None:
        """Note the ends of cycles from here on."""
        self.ended = list(self.expected.ends)
        if self.hook:
            ended = self.ended
            self.ours.register_cycle_end_hook(lambda opt: ended.append(opt.iteration))

    # ---- both at once

    def pair(self) -> tuple[Any, Any]:
        return self.ours, self.theirs

    def pick(self, i: int) -> list[tuple[Any, Any]]:
        """The same parameter of both."""
        return [(opt, members(opt)[i % len(members(opt))]) for opt in self.pair()]

    def both(self, change: Callable[[Any], object]) -> bool:
        """What torch raises, ours must raise."""
        theirs, ours = failure(change, self.theirs), failure(change, self.ours)
        if type(theirs) is not type(ours):
            raise AssertionError(f"torch raises {theirs!r}, ours {ours!r}") from ours
        return theirs is None

    @staticmethod
    def normal(shape: Any, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def check(self, before: list[Any] | None = None) -> None:
        """Parameters and state; where we are, unless asking might change the answer."""
        for i, (p, q) in enumerate(zip(members(self.ours), members(self.theirs), strict=True)):
            self.compare(p, q, None if before is None else before[i][0], i)
        for i, (mine, other) in enumerate(zip(held(self.ours), held(self.theirs), strict=True)):
            assert [name for name, _ in mine] == [name for name, _ in other], i
            then = {} if before is None else before[i][1]
            for (name, a), (_, b) in zip(mine, other, strict=True):
                if not isinstance(b, Tensor):
                    assert a == b, (i, name)
                    continue
                assert a.requires_grad == b.requires_grad, (i, name)
                if b.layout is torch.strided and b.numel():
                    assert a.layout is b.layout, (i, name)
                    assert strides(a) == strides(b), (i, name)
                self.compare(a, b, then.get(name), (i, name))
        if self.backend != "triton":
            self.look()

    def compare(self, ours: Tensor, theirs: Tensor, before: Tensor | None, what: object) -> None:
        """Relative to the tensor's largest value, before the step or after: sums may cancel."""
        assert ours.shape == theirs.shape, what
        assert ours.dtype == theirs.dtype, what
        a, b = dense(ours.detach()).double(), dense(theirs.detach()).double()
        if torch.equal(a, b):
            return
        assert_pattern(a, b, what)
        finite = b.isfinite()
        if not finite.any():
            return
        error = (a - b)[finite].abs().max().item()
        largest = max(b[finite].abs().max().item(), 1e-3)
        if before is not None and before.shape == theirs.shape:
            then = dense(before.detach()).double().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
            largest = max(largest, then)
        tolerance = 0.0 if self.exact else TOLERANCES[self.precision or ours.dtype]
        if error <= tolerance * largest:
            return
        assert self.doubt is not None, (what, error, a, b)
        allowed = tolerance * largest + self.doubt()[what]
        beyond = finite & ((a - b).abs() > allowed)
        assert not beyond.any(), (what, error, a, b)
        parted = int((finite & ((a - b).abs() > tolerance * largest)).sum())
        print(
            f"{self.case.name}, {ours.dtype}, {what}: {parted} of {a.numel()} values part by up to "
            f"{error:g}, as float32's rounding of their gradients lets them",
            flush=True,
        )

    @event(1.0)
    def look(self) -> None:
        """What our optimizer says of itself."""
        opt, expected = self.ours, self.expected
        assert opt.iteration == expected.position
        rates = expected.rates()
        assert opt.get_last_lr() == rates
        assert opt.cycle == POLICIES[expected.policy].schedule.cycle(expected.position)
        if self.hook:
            assert self.ended == expected.ends
        if not self.overwritten:
            for group, rate in zip(opt.param_groups, rates, strict=True):
                assert group["clr_step"] == expected.position
                error = self.lr_error(group)
                close = pytest.approx(rate, rel=error, abs=1e-30) if error else rate
                assert float(group["lr"]) == close

    def lr_error(self, group: dict[str, Any]) -> float:
        """Relative, of a rate in a group: rounded where it is kept, three ulps where computed."""
        if not isinstance(group["lr"], Tensor):
            return 0.0
        if group["lr"].dtype == torch.float32:
            return 1e-6
        return 7e-16 if self.backend == "triton" else 0.0

    @event(0.6, number=range(3))
    def write_a_key(self, number: int) -> None:
        """As a user does, or a scheduler that keeps its initial_lr there."""
        for opt in self.pair():
            for group in opt.param_groups:
                group[f"of the user {number}"] = number

    @event(0.6, number=range(3))
    def remove_a_key(self, number: int) -> bool | None:
        held = [g.pop(f"of the user {number}", None) for o in self.pair() for g in o.param_groups]
        return None if any(value is not None for value in held) else False

    @event(0.5)
    def ask_for_words(self) -> None:
        assert f"iteration {self.expected.position}," in repr(self.ours)
        assert self.ours.explain()

    # ---- gradients

    @event(6.0, seed=SEEDS)
    def backward(self, seed: int) -> None:
        """New tensors of their own memory for all."""
        self.stale = 0
        for opt in self.pair():
            for i, p in enumerate(members(opt)):
                if p.requires_grad:
                    p.grad = like(self.normal(p.shape, seed + i), p)

    @event(2.0, seed=SEEDS)
    def backward_by_autograd(self, seed: int) -> bool | None:
        """Added to what there is, wherever autograd puts it."""
        for opt in self.pair():
            self.own_memory(opt)
            terms = [
                (p * self.normal(p.shape, seed + i).to(p.dtype)).sum().double()
                for i, p in enumerate(members(opt))
                if p.requires_grad
            ]
            if not terms:
                return False
            torch.stack(terms).sum().backward()
        return None

    @event(1.0, seed=SEEDS)
    def accumulate(self, seed: int) -> None:
        for opt in self.pair():
            self.own_memory(opt)
            for i, p in enumerate(members(opt)):
                if p.grad is not None and p.grad.layout is torch.strided:
                    p.grad.add_(self.normal(p.shape, seed + i))

    @staticmethod
    def own_memory(opt: Any) -> None:
        """Nothing can be added to an expanded gradient in place."""
        for p in members(opt):
            if p.grad is not None and p.grad.layout is torch.strided and 0 in p.grad.stride():
                p.grad = p.grad.clone()

    @event(1.5, i=WHICH)
    def drop_a_gradient(self, i: int) -> None:
        for _, p in self.pick(i):
            p.grad = None

    @event(1.5, to_none=FLAG)
    def zero_grad(self, to_none: bool) -> None:
        self.both(lambda opt: opt.zero_grad(set_to_none=to_none))

    @event(1.0, i=WHICH, seed=SEEDS, kind=("transposed", "expanded", "strided"))
    def gradient_of_another_layout(self, i: int, seed: int, kind: str) -> bool | None:
        # torch's fused steps walk such gradients as if they were their parameter's like.
        if self.only_kernels or self.flag == "fused":
            return False
        for _, p in self.pick(i):
            values = self.normal(p.shape, seed).to(p.dtype)
            backwards = tuple(range(values.dim()))[::-1]
            if kind == "transposed":
                p.grad = values.permute(backwards).contiguous().permute(backwards)
            elif kind == "expanded":
                p.grad = torch.ones((), dtype=p.dtype).expand(p.shape)
            else:
                p.grad = torch.stack([values, values], -1)[..., 1]
        return None

    @event(1.0, i=WHICH, seed=SEEDS)
    def sparse_gradient(self, i: int, seed: int) -> bool | None:
        """As an embedding's; not with weight decay, which torch refuses half-way."""
        if self.only_kernels or self.clip is not None or self.case.cls not in _HAVE_SPARSE:
            return False
        for opt, p in self.pick(i):
            if p.dim() == 2 and p.shape[0] and not opt.param_groups[0]["weight_decay"]:
                rows = torch.tensor([seed % p.shape[0]])
                values = self.normal((1, p.shape[1]), seed).to(p.dtype)
                p.grad = torch.sparse_coo_tensor(
                    rows[None], values, p.shape, check_invariants=True
                ).coalesce()
        return None

    # ---- tensors

    @event(1.0, i=WHICH)
    def swap_data(self, i: int) -> None:
        for _, p in self.pick(i):
            p.data = like(p.detach() * 0.5, p)

    @event(1.0, i=WHICH, whole=FLAG)
    def transpose_data(self, i: int, whole: bool) -> None:
        """By itself, or its state with it."""
        whole = whole or self.only_kernels
        for opt, p in self.pick(i):
            if p.dim() == 2 and (p.grad is None or p.grad.layout is torch.strided):
                p.data = p.detach().t().contiguous().t()
                if whole:
                    p.grad = None
                    for name, t in opt.state.get(p, {}).items():
                        if isinstance(t, Tensor) and t.shape == p.shape:
                            opt.state[p][name] = dense(t).t().contiguous().t()

    @event(1.0, i=WHICH, length=range(1, 5), move=FLAG)
    def resize(self, i: int, length: int, move: bool) -> None:
        """With its state, as somebody who prunes does; in the old memory or in new."""
        for opt, p in self.pick(i):
            if p.dim() == 1 and p.numel() > length:
                was, p.grad = p.shape, None
                p.data = p.detach()[:length].clone() if move else p.detach()[:length]
                for name, t in opt.state.get(p, {}).items():
                    if isinstance(t, Tensor) and t.shape == was:
                        opt.state[p][name] = t.to_dense()[:length]

    @event(1.0, i=WHICH)
    def replace_state(self, i: int) -> None:
        for opt, p in self.pick(i):
            for name, t in list(opt.state.get(p, {}).items()):
                if isinstance(t, Tensor):
                    opt.state[p][name] = t.clone()

    @event(1.0, i=WHICH, what=("parameter", "gradient", "state"))
    def move_off_alignment(self, i: int, what: str) -> bool | None:
        """To one element after the beginning of new memory: no multiple of 16 bytes."""

        def movable(t: Any) -> bool:
            strided = isinstance(t, Tensor) and t.layout is torch.strided and t.numel()
            return bool(strided) and 0 not in t.stride()

        did = False
        for opt, p in self.pick(i):
            if what == "parameter" and movable(p):
                p.data, did = unaligned(p.detach()), True
            elif what == "gradient" and movable(p.grad):
                p.grad, did = unaligned(p.grad), True
            elif what == "state":
                for name, t in opt.state.get(p, {}).items():
                    if movable(t) and name != "step":
                        opt.state[p][name], did = unaligned(t), True
        return None if did else False

    @event(0.7, i=WHICH)
    def refill_state(self, i: int) -> None:
        for opt, p in self.pick(i):
            for t in opt.state.get(p, {}).values():
                if isinstance(t, Tensor) and t.layout is torch.strided:
                    t.data = t.detach() * 2

    @event(0.7, i=WHICH)
    def widen_counter(self, i: int) -> bool | None:
        """As a whole module's ``.double()`` does to what it knows."""
        if self.flag:
            return False  # a checkpoint then makes it float32 again, one's own and torch's do not
        for opt, p in self.pick(i):
            counter = opt.state.get(p, {}).get("step")
            if isinstance(counter, Tensor):
                opt.state[p]["step"] = counter.double()
        return None

    @event(1.0, i=WHICH)
    def rebuild_state_dict(self, i: int) -> None:
        for opt, p in self.pick(i):
            if p in opt.state:
                opt.state[p] = dict(opt.state[p])

    @event(1.0, i=WHICH)
    def delete_state(self, i: int) -> None:
        for opt, p in self.pick(i):
            opt.state.pop(p, None)

    @event(0.7, i=WHICH)
    def delete_a_buffer(self, i: int) -> None:
        """Only where torch makes a new one."""
        for opt, p in self.pick(i):
            if self.case.cls is torch.optim.SGD and p in opt.state:
                opt.state[p].pop("momentum_buffer", None)

    @event(0.5)
    def a_new_state_object(self) -> None:
        self.ours.optimizer.state = copy.copy(self.ours.optimizer.state)

    # ---- checkpoints and copies

    def loads(self, ours: Any, theirs: Any) -> bool:
        """Load both; ours may refuse state that torch takes and then cannot step with."""
        error = failure(lambda opt: opt.load_state_dict(ours), self.ours)
        if error is not None:
            if not self.is_refusal(error, theirs):
                raise error
            return False
        self.theirs.load_state_dict(theirs)
        return True

    def is_refusal(self, error: Exception, theirs: Any) -> bool:
        """Whether ours refused a checkpoint that torch takes and then cannot step with."""
        if not isinstance(error, ValueError):
            return False
        twin = copy.deepcopy(self.theirs)
        twin.load_state_dict(copy.deepcopy(theirs))
        for p in members(twin):
            p.grad = torch.zeros_like(p)
        return failure(lambda opt: opt.step(), twin) is not None

    def from_torch(self) -> Any:
        """Torch's checkpoint, for ours: with the flags that ours was built with."""
        state = copy.deepcopy(self.theirs.state_dict())
        if not self.exact:
            for saved, group in zip(state["param_groups"], self.ours.param_groups, strict=True):
                saved.update({k: group[k] for k in _FLAGS if k in group})
        return state

    @event(0.5)
    def load_own_state_dict(self) -> bool | None:
        theirs = copy.deepcopy(self.theirs.state_dict())
        done = self.loads(copy.deepcopy(self.ours.state_dict()), theirs)
        self.overwritten = False
        return None if done else False

    @event(0.5, sets=FLAG)
    def load_torchs_state_dict(self, sets: bool) -> bool | None:
        """Without a position it begins at 0."""
        state = self.from_torch()
        if not self.loads(state, copy.deepcopy(self.theirs.state_dict())):
            return False
        self.overwritten = False
        if sets:
            self.ours.set_iteration(self.expected.position)
        else:
            self.expected.position = 0
        return None

    @event(0.4, own=FLAG)
    def load_beneath(self, own: bool) -> bool | None:
        """Into the wrapped optimizer, as somebody does who kept hold of it."""
        rates = self.expected.rates() if own else [g["lr"] for g in self.theirs.param_groups]
        if not any(rates):
            return False  # with zero gradients, a step at a 0 that was loaded is a checkpointer's
        if own:
            state = copy.deepcopy(self.ours.state_dict())
            theirs = copy.deepcopy(self.theirs.state_dict())
        else:
            state = self.from_torch()
            theirs = copy.deepcopy(self.theirs.state_dict())
            self.expected.position = 0
        self.ours.optimizer.load_state_dict(state)
        self.theirs.load_state_dict(theirs)
        self.overwritten = True  # until the next step
        self.noticed()
        return None

    @event(0.5)
    def torch_loads_ours(self) -> bool | None:
        """And keeps our keys, of which it knows nothing."""
        ours = copy.deepcopy(self.ours.state_dict())
        state = copy.deepcopy(self.ours.state_dict())
        self.overwritten = False  # it wrote the groups' own rates first
        for saved, group in zip(state["param_groups"], self.theirs.param_groups, strict=True):
            if not self.exact:
                saved.update({k: group[k] for k in (*_FLAGS, "lr") if k in group})
            for key in [key for key in saved if key.startswith("clr_")]:
                del saved[key]
        return None if self.loads(ours, state) else False

    def shapes(self) -> Any:
        """What a checkpoint must fit; a kernel's state has its parameter's layout, too."""
        return [
            [(p.shape, p.stride() if self.only_kernels else ()) for p in group["params"]]
            for group in self.theirs.param_groups
        ]

    @event(0.7)
    def save(self) -> None:
        def written(state: Any) -> bytes:
            file = io.BytesIO()
            torch.save(state, file)
            return file.getvalue()

        files = [written(opt.state_dict()) for opt in self.pair()]
        self.overwritten = False
        self.saved = files, copy.deepcopy(self.expected), self.shapes()

    @event(0.7)
    def load(self) -> bool | None:
        """An older checkpoint, where its shapes still fit."""
        if self.saved is None or self.saved[2] != self.shapes():
            return False
        files, then, _ = self.saved
        states = [torch.load(io.BytesIO(file), weights_only=not self.odd) for file in files]
        if not self.loads(*states):
            return False
        self.overwritten = False
        then, ends = copy.deepcopy(then), self.expected.ends
        self.expected, self.expected.ends = then, ends
        return None

    @event(0.7, to_torch=(False, False, True), own=FLAG)
    def change_backend(self, to_torch: bool, own: bool) -> bool | None:
        """At a checkpoint, its own or torch's."""
        if self.exact or (to_torch and self.only_kernels):
            return False
        saved = copy.deepcopy(self.ours.state_dict()) if own else self.from_torch()
        bounds = self.expected.bounds
        if not POLICIES[self.expected.policy].schedule.has_bounds:
            low, high = zip(*bounds, strict=True)
            self.wrap.update(base_lr=list(low), max_lr=list(high))
        inner = self.ours.optimizer
        self.noticed()  # whoever wraps it anew asks first: only the device may know of an overflow
        self.ours = CyclicalOptimizer(
            inner, **{**self.wrap, "backend": "torch" if to_torch else "auto"}
        )
        self.overwritten = False
        # Unless it has loaded a checkpoint and not stepped since, it starts anew.
        assert self.ours.iteration in (0, self.expected.position)
        error = failure(lambda opt: opt.load_state_dict(saved), self.ours)
        if error is not None and not self.is_refusal(error, self.theirs.state_dict()):
            raise error
        self.ours.set_iteration(self.expected.position)
        self.listen()
        return None

    @event(0.7, pickled=FLAG)
    def keep_a_copy(self, pickled: bool) -> None:
        """Gradients are not copied along, by torch nor by us; nor are hooks."""
        kept = self.ours, self.theirs, self.expected, self.ended
        whole = (*self.pair(), self.expected)
        ours, theirs, expected = (
            pickle.loads(pickle.dumps(whole)) if pickled else copy.deepcopy(whole)
        )
        self.ours, self.theirs, self.expected = ours, theirs, expected
        self.listen()
        self.others = [*self.others, (*self.pair(), self.expected, self.ended, False)][-2:]
        self.ours, self.theirs, self.expected, self.ended = kept

    @event(0.7, i=WHICH)
    def go_on_with_a_copy(self, i: int) -> bool | None:
        if not self.others:
            return False
        i %= len(self.others)
        now = (*self.pair(), self.expected, self.ended, self.overwritten)
        other, self.others[i] = self.others[i], now
        self.ours, self.theirs, self.expected, self.ended, self.overwritten = other
        return None

    # ---- groups

    @event(0.5, seed=SEEDS, how=("plain", "bounds", "beneath"))
    def add_group(self, seed: int, how: str) -> bool | None:
        few = self.backend == "triton"
        if len(self.ours.param_groups) >= (3 if few else 4):
            return False
        for opt in self.pair():
            values = [self.value(seed, i) for i in range(1 if few else 2)]
            new: dict[str, Any] = {"params": parameters(values), "lr": 0.02}
            if opt is self.ours and how == "bounds":
                new.update(base_lr=0.001, max_lr=0.01)
            inner = opt.optimizer if opt is self.ours and how == "beneath" else opt
            inner.add_param_group(new)
        self.expected.bounds.append((0.001, 0.01) if how == "bounds" else (0.005, 0.02))
        if self.expected.momenta is not None:
            self.expected.momenta.append(self.expected.momenta[0])
        self.overwritten = how == "beneath"  # that one has its rate at the next step
        return None

    @event(1.0, i=WHICH, free=(False, True, True))
    def freeze(self, i: int, free: bool) -> None:
        for _, p in self.pick(i):
            p.requires_grad_(free)
            p.grad = None

    @event(0.7, i=WHICH)
    def reorder_in_place(self, i: int) -> None:
        for opt in self.pair():
            groups = opt.param_groups
            groups[i % len(groups)]["params"].reverse()

    @event(2.0, i=WHICH, key=sorted(KEYS), choice=WHICH)
    def change_a_setting(self, i: int, key: str, choice: int) -> bool | None:
        if key == "differentiable" and self.flag:
            return False
        if key == "differentiable" and self.only_kernels:
            return False
        if key == "centered" and not self.centered:
            return False
        if key == "decoupled_weight_decay" and isinstance(self.theirs, torch.optim.AdamW):
            return False  # torch's writes its own whenever anything is loaded
        for opt in self.pair():
            group = opt.param_groups[i % len(opt.param_groups)]
            if key not in group:
                return False
            group[key] = KEYS[key][choice % len(KEYS[key])]
        if key in ("momentum", "betas") and self.expected.momenta is not None:
            self.overwritten = True  # until the cycle writes its own at the next step
        return None

    @event(0.7, i=WHICH, key=sorted(KEYS), kind=sorted(ODD))
    def write_an_odd_setting(self, i: int, key: str, kind: str) -> bool | None:
        """The same value of another type: as configurations and arrays give it."""
        for opt in self.pair():
            group = opt.param_groups[i % len(opt.param_groups)]
            takes, make = ODD[kind]
            if not isinstance(group.get(key), takes) or (key == "betas" and self.expected.momenta):
                return False
            group[key] = make(group[key])
        self.odd = True
        return None

    @event(0.5, i=WHICH)
    def keep_own_state(self, i: int) -> None:
        """As users do, for a parameter and for none, under names of other classes' too."""
        if self.case.cls is torch.optim.Adagrad:
            return False  # which takes each entry for a parameter's when it loads
        for opt, p in self.pick(i):
            opt.state["of the user"] = {"step": 2, "exp_avg": torch.ones(2)}
            opt.state["epoch"] = i
            if opt.state.get(p):
                opt.state[p].update(prev=2.5, mu_product=i)
        return None

    @event(0.7, top=(0.001, 0.004, 0.02, 0.1), i=WHICH)
    def set_bounds(self, top: float, i: int) -> bool | None:
        """For all groups alike, or each its own."""
        if POLICIES[self.expected.policy].schedule.has_bounds:
            return False
        tops = [top] * len(self.expected.bounds)
        if i % 2:
            tops[i % len(tops)] = top / 2
        base = [value / 4 for value in tops]
        self.ours.set_bounds(base_lr=base, max_lr=tops)
        self.expected.bounds = list(zip(base, tops, strict=True))
        self.overwritten = False
        return None

    @event(0.5, top=(0.003, 0.05))
    def write_bounds(self, top: float) -> bool | None:
        """As an older script does; the next step takes it in."""
        if POLICIES[self.expected.policy].schedule.has_bounds:
            return False
        self.ours.param_groups[0].update(clr_base_lr=top / 3, clr_max_lr=top)
        self.expected.bounds[0] = (top / 3, top)
        self.overwritten = True
        self.noticed()
        return None

    @event(0.7, to=range(40))
    def set_iteration(self, to: int) -> None:
        self.ours.set_iteration(to)
        self.expected.position = to
        self.overwritten = False

    @event(0.5, to=range(1000, 1_000_000))
    def write_position(self, to: int) -> None:
        """As a sharded optimizer's restore does."""
        for group in self.ours.param_groups:
            group["clr_step"] = to
        self.expected.position = to
        self.overwritten = True
        self.noticed()

    @event(0.5, i=WHICH)
    def write_lr(self, i: int) -> bool | None:
        """As a second scheduler does: overruled."""
        group = self.ours.param_groups[i % len(self.ours.param_groups)]
        if "clr_max_lr" not in group:
            return False  # added beneath: it is still to say which rate it wants
        held = group["lr"]
        group["lr"] = torch.full_like(held, 0.5) if isinstance(held, Tensor) else 0.5
        self.overwritten = True
        return None

    def noticed(self) -> None:
        """The host of a GPU looks at the groups when it is asked."""
        if self.backend == "triton":
            assert self.ours.iteration == self.expected.position

    @event(0.7, count=(1, 2))
    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)

    # ---- steps

    def take(
        self,
        call: Callable[[Any], object],
        *,
        rates: list[float] | None = None,
        moves: bool = True,
        late: bool = False,
    ) -> None:
        """One step of both, of which torch's is plain.

        A step that torch refuses may leave it half done: both then go back to before it.

        Args:
            call: makes our step.
            rates: those of torch's step, if not the policy's.
            moves: whether the cycle moves on.
            late: whether ours is to raise after it has stepped.
        """
        before = [self.snapshot(opt) for opt in self.pair()]
        self.stale += 1
        self.norm: float | None = None
        self.expected.feed(self.theirs, rates)
        theirs = failure(self.plain_step, self.theirs)
        ours = failure(call, self.ours)
        wanted = BoomError if late and theirs is None else type(theirs)
        if type(ours) is not wanted:
            raise AssertionError(f"torch raises {theirs!r}, ours {ours!r}") from ours
        if theirs is None:
            self.overwritten = self.overwritten and not moves
            if moves:
                self.expected.stepped()
            if not self.exact and (self.precision or self.dtypes[0]) != torch.float64:
                self.doubt = functools.cache(lambda: self.slack(before[1]))
            self.check(before[1])
            self.doubt = None
            if self.norm is not None:
                wide = all(p.dtype == torch.float64 for p in members(self.theirs))
                close = pytest.approx(self.norm, rel=1e-10 if wide else 1e-5)
                assert self.ours.grad_norm.item() == close
            self.meet()
        else:
            for opt, saved in zip(self.pair(), before, strict=True):
                self.restore(opt, saved)

    def slack(self, before: list[Any]) -> dict[object, Tensor]:
        """How far apart steps of the twin come whose gradients differ by float32's rounding.

        Of each value, in float64: of parameters by number, of state by number and name.
        """
        norm, came_to = self.norm, self.snapshot(self.theirs)
        apart: dict[object, Tensor] = {}

        def note(what: object, a: Any, b: Any) -> None:
            if isinstance(a, Tensor):
                gap = (dense(a).double() - dense(b).double()).abs().nan_to_num(torch.inf)
                apart[what] = torch.maximum(apart[what], gap) if what in apart else gap

        for off in (ROUNDING, -ROUNDING):
            twin = copy.deepcopy(self.theirs)
            self.restore(twin, copy.deepcopy(before))
            for p, q in zip(members(twin), members(self.theirs), strict=True):
                p.grad = None if q.grad is None else q.grad.clone()
            self.plain_step(twin, off)
            for i, (mine, other) in enumerate(zip(self.snapshot(twin), came_to, strict=True)):
                note(i, mine[0], other[0])
                for name, t in mine[1].items():
                    note((i, name), t, other[1][name])
        self.norm = norm
        return apart

    def plain_step(self, theirs: Any, off: float = 0.0) -> None:
        """Torch's, its gradients clipped for its length, 16-bit parameters in float64.

        Args:
            theirs: whose step.
            off: by how much its gradients are, relative to themselves and their weight decay.
        """
        with self.widened(theirs):
            for group in theirs.param_groups if off else ():
                for p in group["params"]:
                    if p.grad is not None and p.grad.layout is torch.strided:
                        decay = group.get("weight_decay", 0.0) * p.detach().abs()
                        p.grad = p.grad + off * (p.grad.abs() + decay)
            kept = [(p, p.grad) for p in members(theirs)]
            there = [g for _, g in kept if g is not None]
            if self.clip is not None and all(g.layout is torch.strided for g in there):
                for p, g in kept:
                    p.grad = None if g is None else g.clone()
                norm = torch.nn.utils.clip_grad_norm_([p for p, _ in kept], self.clip)
                self.norm = norm.item()
            try:
                theirs.step()
            finally:
                for p, g in kept:
                    p.grad = g

    @contextmanager
    def widened(self, opt: Any) -> Iterator[None]:
        narrow = [p for p in members(opt) if p.dtype in HALF and not self.exact]
        kept = [(p, p.data, p.grad, dict(opt.state.get(p, {}))) for p in narrow]
        for p, _, grad, state in kept:
            p.grad = None
            p.data = p.data.double()
            p.grad = None if grad is None else grad.double()
            if state:
                opt.state[p] = {
                    name: t.double() if isinstance(t, Tensor) and name != "step" else t
                    for name, t in state.items()
                }
        done = False
        try:
            yield
            done = True
        finally:
            for p, data, grad, state in kept:
                wide, p.grad = p.data, None
                p.data = data.copy_(wide) if done else data
                p.grad = grad
                for name, t in opt.state.get(p, {}).items():
                    if name != "step" and isinstance(t, Tensor) and done:
                        old = state.get(name)
                        opt.state[p][name] = t.to(data.dtype) if old is None else old.copy_(t)

    def meet(self) -> None:
        """Go on from our values where rounding would pile up."""
        if self.exact:
            return
        for p, q in zip(members(self.ours), members(self.theirs), strict=True):
            if (self.precision or q.dtype) != torch.float64:
                q.data.copy_(p.data)
                for name, t in self.theirs.state.get(q, {}).items():
                    if isinstance(t, Tensor) and t.layout is torch.strided:
                        t.copy_(self.ours.state[p][name])

    @event(9.0)
    def step(self) -> None:
        if self.stale > 4:
            self.backward(self.expected.position)
        self.take(lambda opt: opt.step())

    @event(7.0, seed=SEEDS)
    def train(self, seed: int) -> None:
        self.zero_grad(True)
        self.backward(seed)
        self.step()

    @event(2.0, seed=SEEDS, i=WHICH)
    def train_one_alone(self, seed: int, i: int) -> None:
        """As an adapter or an expert: no other parameter has a gradient."""
        self.backward(seed)
        for opt in self.pair():
            chosen = members(opt)[i % len(members(opt))]
            for p in members(opt):
                if p is not chosen:
                    p.grad = None
        self.step()

    @event(0.5, seed=SEEDS)
    def step_while_others_save(self, seed: int) -> bool | None:
        """In a thread of their own, as asynchronous checkpointing and logging do."""
        if self.backend == "triton":
            return False
        self.backward(seed)
        raised: list[BaseException] = []
        over = threading.Event()

        def save() -> None:
            try:
                while not over.is_set():
                    groups = self.ours.state_dict()["param_groups"]
                    assert len({group["clr_step"] for group in groups}) <= 1
                    assert self.ours.iteration >= 0
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=save, daemon=True)
        thread.start()
        try:
            for _ in range(3):
                self.take(lambda opt: opt.step())
        finally:
            over.set()
            thread.join()
        if raised:
            raise raised[0]
        return None

    @event(0.2)
    def step_in_a_fork(self) -> bool | None:
        """Of the copy there; here nothing moves."""
        if self.backend == "triton" or not hasattr(os, "fork"):
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            failure(lambda opt: opt.step(), self.ours)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        return None

    @event(1.5, seed=SEEDS)
    def step_with_closure(self, seed: int) -> None:
        def closure() -> float:
            self.fill(self.ours, seed)
            return 2.5

        self.stale = 0
        self.fill(self.theirs, seed)

        def call(opt: Any) -> None:
            assert opt.step(closure) == 2.5

        self.take(call)

    def fill(self, opt: Any, seed: int) -> None:
        """As :meth:`backward`, for one of them."""
        for i, p in enumerate(members(opt)):
            if p.requires_grad:
                p.grad = like(self.normal(p.shape, seed + i), p)

    @event(0.7, seed=SEEDS)
    def exception_in_closure(self, seed: int) -> None:
        """No step was taken; the gradients are new."""
        self.backward(seed)

        def closure() -> float:
            self.fill(self.ours, seed)
            raise BoomError

        assert type(failure(lambda opt: opt.step(closure), self.ours)) is BoomError

    @event(0.7, inner=FLAG)
    def exception_in_pre_hook(self, inner: bool) -> None:
        handle = (self.ours.optimizer if inner else self.ours).register_step_pre_hook(boom)
        try:
            assert type(failure(lambda opt: opt.step(), self.ours)) is BoomError
        finally:
            handle.remove()

    @event(0.7, inner=FLAG)
    def exception_in_post_hook(self, inner: bool) -> None:
        handle = (self.ours.optimizer if inner else self.ours).register_step_post_hook(boom)
        try:
            self.take(lambda opt: opt.step(), late=True)
        finally:
            handle.remove()

    @event(0.5)
    def exception_in_cycle_end_hook(self) -> None:
        ends = POLICIES[self.expected.policy].schedule.is_cycle_end(self.expected.position + 1)
        handle = self.ours.register_cycle_end_hook(boom)
        try:
            self.take(lambda opt: opt.step(), late=ends)
        finally:
            handle.remove()

    @event(0.5)
    def step_at_rate_zero(self) -> bool | None:
        """As torch's distributed checkpoint creates state."""
        if self.overwritten and self.expected.momenta is not None:
            return False  # momentum is as it stands in the groups, nothing else is asked
        for opt in self.pair():
            for p in members(opt):
                p.grad = torch.zeros_like(p) if p.requires_grad else None

        def call(opt: Any) -> None:
            lrs = [group["lr"] for group in opt.param_groups]
            for group, lr in zip(opt.param_groups, lrs, strict=True):
                group["lr"] = torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0
            try:
                opt.step()
            finally:
                for group, lr in zip(opt.param_groups, lrs, strict=True):
                    group["lr"] = lr

        self.take(call, rates=[0.0] * len(self.ours.param_groups), moves=False)
        self.expected.feed_rates(self.theirs)  # a checkpoint of it is of a rate that is in use
        return None

    @event(2.0, seed=SEEDS, overflow=(False, False, True), power=range(4), unscales=FLAG)
    def step_by_grad_scaler(self, seed: int, overflow: bool, power: int, unscales: bool) -> Any:
        """Both of a GradScaler's paths: the optimizer says which it wants."""
        whole = getattr(self.ours, "_step_supports_amp_scaling", False)
        if torch.float16 in self.dtypes and (unscales or not whole):
            return False  # it refuses to unscale them
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (2 * power))
        scaler.scale(torch.zeros(()))
        self.stale = 0
        for opt, scale in ((self.theirs, 1.0), (self.ours, scaler.get_scale())):
            for i, p in enumerate(members(opt)):
                grad = like(self.normal(p.shape, seed + i), p) * scale
                p.grad = grad if p.requires_grad else None
        grads = [p.grad for p in members(self.ours) if p.grad is not None and p.grad.numel()]
        if not grads:
            return False
        if unscales:
            scaler.unscale_(self.ours)
        if overflow:
            if unscales:  # it has looked at them already
                return False
            bad = grads[seed % len(grads)]
            bad[(0,) * bad.dim()] = float("inf")
            scaler.step(self.ours)
        else:
            self.take(lambda opt: scaler.step(opt))
            for name in ("grad_scale", "found_inf"):  # a step that raised has left them
                self.ours.__dict__.pop(name, None)
        for opt in self.pair():
            for p in members(opt):
                p.grad = None
        return None

    def snapshot(self, opt: Any) -> list[tuple[Tensor, dict[str, Any]]]:
        return [
            (
                p.detach().clone(),
                {k: t.clone() if isinstance(t, Tensor) else t for k, t in state},
            )
            for p, state in zip(members(opt), held(opt), strict=True)
        ]

    @staticmethod
    def restore(opt: Any, saved: list[tuple[Tensor, dict[str, Any]]]) -> None:
        for p, (value, state) in zip(members(opt), saved, strict=True):
            p.data = value
            p.grad = None
            opt.state.pop(p, None)
            if state:
                opt.state[p] = dict(state)


def compile_kernels(backend: str) -> None:
    """Without them torch would be compared with itself."""
    if backend != "torch":
        from clr_optim.kernels.native import build

        build.load()
    if backend == "triton":
        assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
        import triton_helpers  # mends the interpreter

        assert triton_helpers.INTERPRETED
