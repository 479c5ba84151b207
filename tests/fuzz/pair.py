"""Keep two optimizers, ours and plain torch's, through the same steps, and compare them."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from internals import steps_in_backward
from native_helpers import (
    BY_NAME,
    HALF,
    NUMBERS,
    assert_pattern,
    dense,
    failure,
    held,
    like,
    members,
    parameters,
    strides,
)
from torch import Tensor

from clr_optim import CyclicalOptimizer
from clr_optim.keys import REST
from clr_optim.masters import join, split
from fuzz.events import BoomError, event
from fuzz.expected import POLICIES, Expected, Optimizer
from fuzz.setups import (
    DTYPES,
    FLAGS,
    HAVE_CAPTURABLE,
    HAVE_FUSED,
    OTHERS,
    ROUNDING,
    SHAPES,
    TOLERANCES,
)


def add_cycle_end_hook(opt: Any, hook: Callable[[Any], None]) -> Any:
    """Register a hook for the ends of cycles, also under a policy without cycles, which warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "register_cycle_end_hook has no effect", UserWarning)
        return opt.register_cycle_end_hook(hook)


class Pair:
    """Our optimizer and torch's, and the comparison of both.

    Args:
        backend: the backend under test. torch's own step serves what its kernels cannot.
        case: the name of a row in the table of cases.
        seed, count, big: choose the parameters.
        clip, skip: ``max_grad_norm`` and ``skip_above``.
        dtype, policy: names of :data:`DTYPES` and :data:`POLICIES`.
        flag: a flag of the wrapped optimizer; with backend ``"torch"`` of the twin too.
        tensor_lr: whether ``lr`` is a tensor.
        hook: whether a cycle-end hook is registered. A GPU must then tell the host of each end.
    """

    def __init__(
        self,
        backend: str,
        case: str,
        seed: int,
        count: int = 3,
        big: bool = False,
        clip: float | None = None,
        skip: float | None = None,
        dtype: str = "float64",
        policy: str = "triangular",
        flag: str | None = None,
        tensor_lr: bool = False,
        hook: bool = False,
    ) -> None:
        self.backend, self.clip, self.skip, self.hook = backend, clip, skip, hook
        known: Any = BY_NAME.get(case) or OTHERS[case]
        self.case = known
        if case not in BY_NAME:
            flag, tensor_lr = next((f for f in FLAGS if known.options.get(f)), None), False
        if flag == "fused" and (known.cls not in HAVE_FUSED or tensor_lr):
            flag = None
        if flag == "capturable" and known.cls not in HAVE_CAPTURABLE:
            flag = None
        if flag == "foreach" and tensor_lr:
            flag = None
        if known.options.get("centered") and backend != "torch":
            dtype = "float64"  # narrower dtypes lose the difference of two averages to rounding
        self.exact = backend == "torch"
        #: Whether our bfloat16 parameters have float32 masters. The twin keeps the same two halves,
        #: and joins them for its step.
        self.masters = dtype == "masters" and not self.exact
        if dtype == "masters":
            dtype = "bfloat16"
        if self.exact and flag == "fused" and dtype in ("bfloat16", "float16"):
            dtype = "float32"  # torch's fused SGD reads uninitialized memory: not reproducible
        self.dtypes = DTYPES[dtype]
        #: The dtype that limits all tensors: that of the norm, if gradients of several dtypes are
        #: clipped.
        self.precision = torch.float32 if dtype == "mixed" and clip is not None else None
        self.centered = self.dtypes == (torch.float64,) or self.exact
        self.flag = flag
        #: Whether torch's own step would give other numbers, or refuse.
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

        self.twin = make(options if self.exact else {})
        if self.masters:
            self.give_rests(self.twin)
        self.wrap = {
            **POLICIES[policy].options,
            "max_grad_norm": clip,
            "skip_above": skip,
            "master_weights": self.masters,
            **getattr(known, "wrap", {}),
        }
        if not POLICIES[policy].schedule.moves_momentum:
            # A schedule without cycles refuses to cycle momentum.
            for name in ("cycle_momentum", "base_momentum", "max_momentum"):
                self.wrap.pop(name, None)
        self.ours: Any = CyclicalOptimizer(make(options), **self.wrap)
        momenta = None
        if self.wrap.get("cycle_momentum"):
            momenta = [(self.wrap["base_momentum"], self.wrap["max_momentum"])]
        self.expected = Expected(policy, [(known.lr / 4, known.lr)], momenta)
        #: undoes step_in_backward() of the present optimizer or of an earlier one
        self.handle: Any = None
        self.ended: list[int] = []
        self.listen()
        self.others: list[Any] = []
        self.saved: Any = None
        #: Whether settings have types that only a trusted file may hold.
        self.odd = False
        #: Whether other code has written the groups' rates since the last step.
        self.overwritten = False
        #: Steps since the gradients were new. After many, a centered average is all rounding.
        self.stale = 0
        #: What rounding alone may do in the step under test, see :meth:`slack`.
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
        """Note the ends of cycles from now on."""
        self.ended = list(self.expected.ends)
        if self.hook:
            ended = self.ended
            add_cycle_end_hook(self.ours, lambda opt: ended.append(opt.iteration))

    # ---- both at once

    def pair(self) -> tuple[Any, Any]:
        return self.ours, self.twin

    @property
    def in_backward(self) -> bool:
        """Whether hooks update our parameters in the backward pass.

        An earlier optimizer may live on in a cycle of references; its hooks are removed.
        """
        is_active = steps_in_backward(self.ours)
        if self.handle is not None and not is_active:
            self.handle.remove()
        return is_active

    def pick(self, i: int) -> list[tuple[Any, Any]]:
        """Return the same parameter of both."""
        return [(opt, members(opt)[i % len(members(opt))]) for opt in self.pair()]

    def both(self, change: Callable[[Any], object]) -> bool:
        """Do the same to both. If torch raises, ours must raise too."""
        twin_error, error = failure(change, self.twin), failure(change, self.ours)
        if type(twin_error) is not type(error):
            raise AssertionError(f"torch raises {twin_error!r}, ours {error!r}") from error
        return twin_error is None

    @staticmethod
    def normal(shape: Any, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def check(self, before: list[Any] | None = None) -> None:
        """Compare parameters and state.

        Compare the position too, unless the question may change it.
        """
        for i, (p, q) in enumerate(zip(members(self.ours), members(self.twin), strict=True)):
            then = None if before is None else before[i][0]
            self.compare(self.whole(p, self.ours.state), self.whole(q, self.twin.state), then, i)
        for i, (mine, other) in enumerate(zip(held(self.ours), held(self.twin), strict=True)):
            assert [name for name, _ in mine] == [name for name, _ in other], i
            then = {} if before is None else before[i][1]
            for (name, a), (_, b) in zip(mine, other, strict=True):
                if name == REST:
                    continue  # a half of what has been compared
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

    def compare(self, ours: Tensor, expected: Tensor, before: Tensor | None, what: object) -> None:
        """Compare relative to the largest value before or after the step, as sums may cancel."""
        assert ours.shape == expected.shape, what
        assert ours.dtype == expected.dtype, what
        a, b = dense(ours.detach()).double(), dense(expected.detach()).double()
        if torch.equal(a, b):
            return
        assert_pattern(a, b, what)
        finite = b.isfinite()
        if not finite.any():
            return
        error = (a - b)[finite].abs().max().item()
        largest = max(b[finite].abs().max().item(), 1e-3)
        if before is not None and before.shape == expected.shape:
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
        """Compare what our optimizer says about itself."""
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
        """Return a rate's relative error: its dtype's rounding, or three ulps on a device."""
        if not isinstance(group["lr"], Tensor):
            return 0.0
        if group["lr"].dtype == torch.float32:
            return 1e-6
        return 7e-16 if self.backend == "triton" else 0.0

    @event(0.6, number=range(3))
    def write_a_key(self, number: int) -> None:
        """Write a key, as users do, or schedulers that keep ``initial_lr``."""
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

    # ---- a step of both

    def take(
        self,
        call: Callable[[Any], object],
        *,
        rates: list[float] | None = None,
        moves: bool = True,
        late: bool = False,
    ) -> None:
        """Take one step with both; the twin's step is plain torch.

        A step that torch refuses may be half done. Both then return to the state before it.

        Args:
            call: takes our step.
            rates: rates of torch's step, if they are not the policy's.
            moves: whether the cycle advances.
            late: whether ours must raise after it has stepped.
        """
        before = [self.snapshot(opt) for opt in self.pair()]
        self.stale += 1
        self.norm: float | None = None
        self.expected.feed(self.twin, rates)
        twin_error = failure(self.plain_step, self.twin)
        error = failure(call, self.ours)
        wanted = BoomError if late and twin_error is None else type(twin_error)
        if self.masters and wanted is KeyError:
            wanted = RuntimeError  # a kernel would read state that torch's step lacks
        if type(error) is not wanted:
            raise AssertionError(f"torch raises {twin_error!r}, ours {error!r}") from error
        if twin_error is None:
            self.overwritten = self.overwritten and not moves
            if moves:
                self.expected.stepped()
            if not self.exact and (self.precision or self.dtypes[0]) != torch.float64:
                self.doubt = functools.cache(lambda: self.slack(before[1]))
            self.check(before[1])
            self.doubt = None
            if self.norm is not None:
                wide = all(p.dtype == torch.float64 for p in members(self.twin))
                close = pytest.approx(self.norm, rel=1e-10 if wide else 1e-5)
                assert self.ours.grad_norm.item() == close
            self.meet()
        else:
            for opt, saved in zip(self.pair(), before, strict=True):
                self.restore(opt, saved)

    def slack(self, before: list[Any]) -> dict[object, Tensor]:
        """Return how far steps of the twin differ if its gradients are off by float32's rounding.

        The result holds float64 tensors: of parameters by number, of state by number and name.
        """
        norm, came_to = self.norm, self.snapshot(self.twin)
        apart: dict[object, Tensor] = {}

        def note(what: object, a: Any, b: Any) -> None:
            if isinstance(a, Tensor):
                gap = (dense(a).double() - dense(b).double()).abs().nan_to_num(torch.inf)
                apart[what] = torch.maximum(apart[what], gap) if what in apart else gap

        for off in (ROUNDING, -ROUNDING):
            disturbed = copy.deepcopy(self.twin)
            self.restore(disturbed, copy.deepcopy(before))
            for p, q in zip(members(disturbed), members(self.twin), strict=True):
                p.grad = None if q.grad is None else q.grad.clone()
            self.plain_step(disturbed, off)
            for i, (mine, other) in enumerate(zip(self.snapshot(disturbed), came_to, strict=True)):
                note(i, *(self.whole(p, {p: state}) for p, state in (mine, other)))
                for name, t in mine[1].items():
                    note((i, name), t, other[1][name])
        self.norm = norm
        return apart

    def plain_step(self, twin: Any, off: float = 0.0) -> None:
        """Take torch's step: gradients clipped by their norm, 16-bit parameters in float64.

        Args:
            twin: torch's optimizer.
            off: the error of the gradients, relative to themselves and their weight decay.
        """
        with self.widened(twin):
            for group in twin.param_groups if off else ():
                for p in group["params"]:
                    if p.grad is not None and p.grad.layout is torch.strided:
                        decay = group.get("weight_decay", 0.0) * p.detach().abs()
                        p.grad = p.grad + off * (p.grad.abs() + decay)
            kept = [(p, p.grad) for p in members(twin)]
            there = [g for _, g in kept if g is not None]
            if self.clip is not None and all(g.layout is torch.strided for g in there):
                for p, g in kept:
                    p.grad = None if g is None else g.clone()
                norm = torch.nn.utils.clip_grad_norm_([p for p, _ in kept], self.clip)
                self.norm = norm.item()
            try:
                twin.step()
            finally:
                for p, g in kept:
                    p.grad = g

    # ---- float32 masters of the twin

    def whole(self, param: Tensor, state: Any) -> Tensor:
        """Return a parameter; its master, if it has one."""
        rest = state.get(param, {}).get(REST) if self.masters else None
        return param if rest is None else join(param, rest)

    @staticmethod
    def give_rests(twin: Any) -> None:
        """Give state of torch's constructor float32 values, and a rest."""
        for p, state in twin.state.items():
            for name, t in state.items():
                if name not in NUMBERS:
                    value = twin.defaults["initial_accumulator_value"]
                    state[name] = torch.full_like(t, value, dtype=torch.float32)
            state[REST] = torch.zeros_like(p, requires_grad=False)

    def keep_masters(self, opt: Any, p: Any, data: Tensor, wide: Tensor, state: Any) -> None:
        """Split the new values of a parameter, and note its state in the old order."""
        rest = state.get(REST)
        rest = torch.zeros_like(data) if rest is None else rest
        split(wide.float(), data, rest)
        now = opt.state[p]
        names = [*state, *(name for name in now if name not in state)]
        for name in [*names, *([] if REST in state else [REST])]:
            t = now.pop(name, None)
            if name == REST:
                now[REST] = rest
            elif name not in NUMBERS and isinstance(t, Tensor):
                now[name] = t.float() if state.get(name) is None else state[name].copy_(t)
            else:
                now[name] = t

    @contextmanager
    def widened(self, opt: Any) -> Iterator[None]:
        narrow = [p for p in members(opt) if p.dtype in HALF and not self.exact]
        kept = [(p, p.data, p.grad, dict(opt.state.get(p, {}))) for p in narrow]
        for p, _, grad, state in kept:
            p.grad = None
            p.data = self.whole(p, opt.state).detach().double()
            p.grad = None if grad is None else grad.double()
            if state:
                opt.state[p] = {
                    name: t.double() if isinstance(t, Tensor) and name not in NUMBERS else t
                    for name, t in state.items()
                    if name != REST
                }
        done = False
        try:
            yield
            done = True
        finally:
            for p, data, grad, state in kept:
                wide, p.grad = p.data, None
                if done and self.masters:
                    p.data, p.grad = data, grad
                    if grad is not None:
                        self.keep_masters(opt, p, data, wide, state)
                    elif state:
                        opt.state[p] = state
                    continue
                p.data = data.copy_(wide) if done else data
                p.grad = grad
                for name, t in opt.state.get(p, {}).items():
                    if name not in NUMBERS and isinstance(t, Tensor) and done:
                        old = state.get(name)
                        opt.state[p][name] = t.to(data.dtype) if old is None else old.copy_(t)

    def meet(self) -> None:
        """Take over our values where rounding would accumulate."""
        if self.exact:
            return
        for p, q in zip(members(self.ours), members(self.twin), strict=True):
            if (self.precision or q.dtype) != torch.float64:
                q.data.copy_(p.data)
                for name, t in self.twin.state.get(q, {}).items():
                    if isinstance(t, Tensor) and t.layout is torch.strided:
                        t.copy_(self.ours.state[p][name])

    def fill(self, opt: Any, seed: int) -> None:
        """Give one optimizer the gradients of :meth:`backward`."""
        for i, p in enumerate(members(opt)):
            if p.requires_grad:
                p.grad = like(self.normal(p.shape, seed + i), p)

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

    def noticed(self) -> None:
        """Have a GPU's host read the groups, which it does when asked for the position."""
        if self.backend == "triton":
            assert self.ours.iteration == self.expected.position
