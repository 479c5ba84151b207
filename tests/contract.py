"""How close a kernel must stay to torch's for-loop step, and the runner that compares the two.

In float64 a whole run agrees to 1e-12 relative to a tensor's largest value. In float32 each step,
taken from torch's state, agrees to `FEW` float32 ulps of the largest update, and one ulp of the
parameter, to which it is rounded. In bfloat16 and float16 the reference is torch's float64 step
from the same state, rounded. Ours computes in float32 and rounds then, so the two roundings can end
one ulp of the 16 bits apart, and no more.
"""

from __future__ import annotations

import pytest
import torch
from changes import drop
from native_helpers import (
    BY_NAME,
    CASES,
    DTYPES,
    HALF,
    KERNELS,
    MIXED_GROUPS,
    NUMBERS,
    assert_close,
    feed,
    many_groups,
    members,
    parameters,
    strides,
    tensors_of,
)

FEW = 4
ULP32 = torch.finfo(torch.float32).eps


def name_of(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value.name


cases = pytest.mark.parametrize("case", CASES, ids=name_of)
kernels = pytest.mark.parametrize("case", KERNELS, ids=name_of)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


class Contract:
    """Run one case beside torch, each step from torch's state, and compare at the end.

    Args:
        case: the optimizer.
        dtype: the dtype of the parameters.
        values: their first values, in the layouts to use.
        free: whether a third optimizer runs beside them without being set back.
    """

    def __init__(self, case, dtype, values, free=False):
        self.case, self.dtype = case, dtype
        wide = torch.float64 if dtype in HALF else dtype
        self.ours = case.ours(parameters(values, dtype), backend="native")
        self.twin = case.make(parameters([v.to(dtype) for v in values], wide))
        self.free = case.ours(parameters(values, dtype), backend="native") if free else None
        #: one segment per set of state tensors; the set grows with each first gradient
        self.segments = []
        self._take()

    def step(self, grads, wide_grads=None):
        """Take one step with these gradients, in their parameters' layout; None for no gradient."""
        if wide_grads is None:
            wide_grads = [g if g is None or self.dtype not in HALF else g.double() for g in grads]
        for optimizer, given in (
            (self.ours, grads), (self.free, grads), (self.twin, wide_grads),
        ):  # fmt: skip
            if optimizer is not None:
                for p, g in zip(members(optimizer), given, strict=True):
                    p.grad = g
        feed(self.twin, self.ours)
        for optimizer in (self.ours, self.twin, self.free):
            if optimizer is not None:
                optimizer.step()
        self._log()

    def _take(self):
        """Begin a new segment with all present tensors and their values."""
        mine, reference = tensors_of(self.ours), tensors_of(self.twin)
        assert list(mine) == list(reference)
        keys = [key for key in mine if key[1] not in NUMBERS]
        for key in keys:
            assert strides(mine[key]) == strides(reference[key])
            assert mine[key].dtype == self.dtype
        self.keys = keys
        self.count = sum(len(state) for state in self.twin.state.values())
        self.mine, self.reference = [mine[k] for k in keys], [reference[k] for k in keys]
        # New state had no value before the step.
        last = self.last() if self.segments else {}
        before = flat([last.get(k, t) for k, t in zip(keys, self.reference, strict=True)])
        self.segments.append((keys, [before], [], []))

    def last(self):
        """Return the values after the last step."""
        keys, before, _, _ = self.segments[-1]
        found = tensors_of(self.ours)
        return dict(zip(keys, before[-1].split([found[key].numel() for key in keys]), strict=True))

    def _log(self):
        if sum(len(state) for state in self.twin.state.values()) != self.count:
            self._take()
        _, before, mine, reference = self.segments[-1]
        if self.dtype in HALF:
            rounded = [t.to(self.dtype) for t in self.reference]
        else:
            rounded = self.reference
        mine.append(flat(self.mine))
        reference.append(flat(self.reference))
        before.append(flat(rounded))
        if self.dtype != torch.float64:
            torch._foreach_copy_(self.mine, rounded)
        if self.dtype in HALF:
            torch._foreach_copy_(self.reference, rounded)

    def compare(self):
        """Assert that every step so far is within the bound of the dtype."""
        found = tensors_of(self.ours)
        for key, t in tensors_of(self.twin).items():
            if key[1] in NUMBERS:
                assert (found[key].dtype, found[key].item()) == (t.dtype, t.item())
        for keys, before, mine, reference in self.segments:
            if not mine:
                continue
            sizes = [found[key].numel() for key in keys]
            columns = [torch.stack(c).split(sizes, 1) for c in (before[:-1], mine, reference)]
            for key, old, ours, wide in zip(keys, *columns, strict=True):
                if ours.numel():
                    self.bound(key, old.double(), ours, wide.double())

    def bound(self, key, before, ours, wide):
        """Assert the bound for one tensor, with one row per step."""
        error = (ours.double() - wide.to(self.dtype).double()).abs()
        size = torch.maximum(wide.abs(), before.abs())
        if self.dtype == torch.float64:
            allowed = 1e-12 * wide.abs().amax(1, keepdim=True)
        elif self.dtype == torch.float32:
            # Relative to the largest value of the state tensor, since sums of both signs cancel.
            largest = (wide - before).abs() if key[1] == "" else size
            allowed = FEW * ULP32 * largest.amax(1, keepdim=True)
            if key[1] == "":
                allowed = allowed + ULP32 * wide.abs()
        else:
            near = (ordered(ours) - ordered(wide.to(self.dtype))).abs() <= 1
            # If a sum is nearly 0, its error is the rounding of its terms to float32.
            terms = FEW * ULP32 * size.amax(1, keepdim=True)
            assert (near | (error <= terms)).all(), (key, ours, wide)
            return
        assert (error <= allowed).all(), (key, (error / allowed).max())

    def deviation(self):
        """Return the largest deviation of the free run, relative to a tensor's largest value."""
        free, reference = tensors_of(self.free or self.ours), tensors_of(self.twin)
        return max(
            ((free[key].double() - t.double()).abs().max() / t.abs().max()).item()
            for key, t in reference.items()
            if key[1] == "" and t.numel()
        )


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def ordered(x):
    """Return 16-bit floats as integers in the same order, with neighbours one apart."""
    bits = x.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


# ---- clipping, for both backends


def assert_one_norm_over_both_backends(make_twins, *, steps, draw=None):
    """Assert that one norm clips the tensors of the kernels and the tensors of torch's own step.

    Args:
        make_twins: makes twins of a function that makes an optimizer, and of the wrapper's options.
        steps: the number of steps.
        draw: returns tensors for shapes, a dtype and a seed; None for tensors on the CPU.
    """
    make = many_groups(*MIXED_GROUPS["adamw-differentiable"], draw=draw)
    pair = make_twins(make, backend="auto", max_grad_norm=0.5)
    for _ in range(steps):
        pair.draw()
        gradients = [(p, p.grad, p.grad.clone()) for p in members(pair.ours)]
        norm = torch.nn.utils.clip_grad_norm_(members(pair.twin), 0.5)
        pair.step()
        assert_close(pair.ours.grad_norm, norm, 1e-12)
        assert all(p.grad is g and torch.equal(g, values) for p, g, values in gradients)


def assert_clips_nan_and_inf(pair, value, *, steps):
    """Assert that twins clipped to 1.0 agree if one gradient is NaN, infinite or 0."""
    for k in range(steps):
        pair.draw()
        if k != 1:
            for opt in pair.both():
                members(opt)[0].grad[0, 0] = value
        norm = torch.nn.utils.clip_grad_norm_(members(pair.twin), 1.0)
        pair.step()
        assert_close(pair.ours.grad_norm, norm, 1e-12)


def assert_clips(pair, limit, *, steps):
    """Assert that twins clipped to a limit agree, and that gradients stay as they are."""
    assert pair.ours.grad_norm is None
    for k in range(steps):
        pair.draw()
        drop(pair, lambda i: i == k % 4)  # noqa: B023
        kept = [(p, p.grad, p.grad.clone()) for p in members(pair.ours) if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(members(pair.twin), limit)
        pair.step()
        assert_close(pair.ours.grad_norm, norm, 1e-12)
        for p, grad, values in kept:
            assert p.grad is grad
            assert torch.equal(grad, values)


def assert_clips_in_another_dtype(dtype, *, backend, draw, tolerance):
    """Assert that clipping agrees with torch's in float64, rounded to the dtype.

    Args:
        dtype: of the parameters.
        backend: the name of the backend.
        draw: makes values of several shapes.
        tolerance: of the norm, relative.
    """
    case, shapes = BY_NAME["adam-wd"], ((5, 3), (300,))
    values = draw(shapes, dtype)
    ours = case.ours(parameters(values), backend=backend, max_grad_norm=0.5)
    twin = case.make(parameters(values, torch.float64))
    for k in range(3):
        for p, q, g in zip(*map(members, (ours, twin)), draw(shapes, dtype, k + 9), strict=True):
            p.grad, q.grad = g.clone(), g.double()
        norm = torch.nn.utils.clip_grad_norm_(members(twin), 0.5)
        feed(twin, ours)
        twin.step()
        ours.step()
        assert ours.grad_norm.dtype == torch.float32
        assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=tolerance)
        for p, q in zip(*map(members, (ours, twin)), strict=True):
            assert_close(p, q.to(dtype), 4 * torch.finfo(dtype).eps)


def assert_a_copy_and_the_original_go_on(pair, duplicate, *, steps):
    """Assert that duplicates of twins run on beside the twins themselves."""
    pair.run(steps)
    other = type(pair).__new__(type(pair))
    other.twin, other.ours = duplicate(pair.twin), duplicate(pair.ours)
    other.generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        pair.run(1)
        other.run(2)
    assert not torch.equal(members(pair.ours)[0], members(other.ours)[0])


def assert_a_backward_through_an_older_graph_raises(optimizer):
    """Assert it for an optimizer of two parameters, 3×3 with a gradient and 3 without."""
    weight, idle = members(optimizer)
    weight.grad = torch.ones_like(weight)
    for _ in range(2):
        loss = (weight @ weight).sum()
        other = (idle**2).sum()
        versions = weight._version, idle._version
        optimizer.step()
        assert weight._version > versions[0]
        assert idle._version == versions[1]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        idle.grad = None
        other.backward()  # without a gradient, the step left it alone
        idle.grad = None
