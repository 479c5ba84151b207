"""Cases of every fused rule, and twins: our optimizer beside torch's on equal parameters.

The twin of a wrapped optimizer runs torch's for-loop step (``foreach=False``) with the rates and
momenta that ours uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import EVERY_KERNEL, WITH_KERNEL, Case, wrapped
from torch import Tensor

from clr_optim import CyclicalOptimizer
from clr_optim.rules import NUMBERS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)


#: The rows that a kernel serves, beside torch's for-loop step.
CASES = [case.as_for_loop() for case in WITH_KERNEL]
BY_NAME = {case.name: case for case in CASES}
#: One case for each kernel.
KERNELS = [case.as_for_loop() for case in EVERY_KERNEL]


def feed(twin: torch.optim.Optimizer, ours: CyclicalOptimizer[Any]) -> None:
    """Give the twin the rates, and cycled momenta, of our next step."""
    for twin_group, group, lr in zip(
        twin.param_groups, ours.param_groups, ours.get_last_lr(), strict=True
    ):
        twin_group["lr"] = lr
        if "clr_base_momentum" in group:
            key = "betas" if "betas" in group else "momentum"
            twin_group[key] = group[key]


def unaligned(tensor: Tensor) -> Tensor:
    """Return the same values at an address that is no multiple of 16 bytes."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.empty(max(reach, 0) + 2, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def drawn(shapes: Sequence[Any], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Return normal tensors, the same for any dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def like(values: Tensor, param: Tensor) -> Tensor:
    """Return the values in the parameter's dtype and memory layout."""
    return torch.empty_like(param, requires_grad=False).copy_(values)


def parameters(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Any]:
    """Return parameters in new memory, in the layout of the tensors."""
    return [
        torch.nn.Parameter(torch.empty_like(t, dtype=dtype or t.dtype).copy_(t)) for t in tensors
    ]


def members(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def held(optimizer: torch.optim.Optimizer) -> list[list[tuple[str, Any]]]:
    """Return the state of each parameter, in order; an empty list for a parameter without state."""
    return [
        list(optimizer.state[p].items()) if p in optimizer.state else [] for p in members(optimizer)
    ]


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Return parameters and state by position and name."""
    found = {(i, ""): p.detach() for i, p in enumerate(members(optimizer))}
    for i, state in enumerate(held(optimizer)):
        found.update({(i, name): t for name, t in state if isinstance(t, Tensor)})
    return found


def load(optimizer: torch.optim.Optimizer, state_dict: Any) -> None:
    """Load a checkpoint; states of one element keep their dtype in torch's optimizer too.

    torch casts them to the dtype of the parameter, ours does not.
    """
    optimizer.load_state_dict(state_dict)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for param, index in zip(group["params"], saved["params"], strict=True):
            values = state_dict["state"].get(index, {})
            for name in NUMBERS & values.keys():
                if isinstance(values[name], Tensor):
                    number = optimizer.state[param][name].to(values[name].dtype)
                    optimizer.state[param][name] = number.copy_(values[name])


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def assert_close(ours: Tensor, expected: Tensor, tolerance: float, what: object = "") -> None:
    """Relative to the tensor's largest value; NaN and Inf in the same places."""
    assert ours.shape == expected.shape, what
    assert ours.dtype == expected.dtype, what
    a, b = dense(ours.detach()).double(), dense(expected.detach()).double()
    assert_pattern(a, b, what)
    finite = b.isfinite()
    if finite.any():
        error = (a - b)[finite].abs().max().item()
        assert error <= tolerance * max(b[finite].abs().max().item(), 1e-300), (what, error, a, b)


def assert_pattern(ours: Tensor, expected: Tensor, what: object = "") -> None:
    """NaN, Inf and -Inf in the same places."""
    assert torch.equal(ours.isnan(), expected.isnan()), (what, ours, expected)
    assert torch.equal(ours.isposinf(), expected.isposinf()), (what, ours, expected)
    assert torch.equal(ours.isneginf(), expected.isneginf()), (what, ours, expected)


def _extremes(dtype: torch.dtype) -> Tensor:
    """Return zeros, ones, the ends of the range, values whose squares overflow, Inf and NaN."""
    info = torch.finfo(dtype)
    tiny, root, largest = info.tiny, info.max**0.5, info.max
    sizes = [
        0.0, 0.7 * tiny, tiny**0.75, tiny**0.5, 1e-7, 1.0, 2.5, root**0.5, 0.9 * root, 1.1 * root,
        30 * root, largest**0.75, largest / 3, largest, float("inf"),
    ]  # fmt: skip
    values = [sign * size for size in sizes for sign in (1.0, -1.0)]
    return torch.tensor([*values, float("nan")], dtype=torch.float64).to(dtype)


def assert_nan_and_inf_where_torch_has_them(
    case: Case, dtype: torch.dtype, backend: str, device: Any = "cpu", lr: float | None = None
) -> None:
    """Step over extreme parameters and gradients; each step of torch starts from our values.

    For 16-bit storage torch's step runs in float32, the arithmetic of the kernels.
    """
    arithmetic = torch.float32 if dtype in HALF else dtype
    extremes = _extremes(dtype).to(device)
    count = len(extremes)
    bounds = {} if lr is None else {"base_lr": lr, "max_lr": lr}
    ours = case.ours(parameters([extremes.repeat_interleave(count)]), backend=backend, **bounds)
    (p,) = members(ours)
    generator = torch.Generator().manual_seed(5)
    for k in range(5):
        chosen = torch.arange(count).repeat(count)
        if k in (1, 2):
            chosen = torch.randint(0, count, (count * count,), generator=generator)
        p.grad = extremes[chosen.to(device)] if k < 4 else torch.full_like(p, 0.5)
        copied = torch.nn.Parameter(p.detach().to(arithmetic, copy=True))
        copied.grad = p.grad.to(arithmetic)
        twin = case.make([copied])
        for name, value in ours.state.get(p, {}).items():
            where = "cpu" if name in NUMBERS else device
            kind = value.dtype if name in NUMBERS else arithmetic
            twin.state[copied][name] = value.to(where, kind, copy=True)
        feed(twin, ours)
        twin.step()
        ours.step()
        found = tensors_of(ours)
        for key, wanted in tensors_of(twin).items():
            assert_pattern(found[key].cpu(), wanted.to(found[key].dtype).cpu(), (k, key))


def assert_no_nan_at_a_rate_beyond_all_floats(
    case: Case, dtype: torch.dtype, backend: str, device: Any = "cpu"
) -> None:
    """Step at a rate that float32 cannot hold, on gradients of 0; then resume from a checkpoint."""
    params = parameters([torch.zeros(5, dtype=torch.float64)], dtype)
    params = [torch.nn.Parameter(p.detach().to(device)) for p in params]
    ours = case.ours(params, backend=backend, base_lr=1e306, max_lr=1e308)
    for _ in range(3):
        params[0].grad = torch.zeros_like(params[0])
        ours.step()
        ours.load_state_dict(ours.state_dict())
    for tensor in tensors_of(ours).values():
        assert tensor.isfinite().all()


def assert_alike(
    ours: torch.optim.Optimizer, twin: torch.optim.Optimizer, tolerance: float = 1e-12
) -> None:
    """Parameters and state: names in order, dtypes, layouts, values."""
    for i, (p, q) in enumerate(zip(members(ours), members(twin), strict=True)):
        assert_close(p, q, tolerance, i)
    for i, (mine, other) in enumerate(zip(held(ours), held(twin), strict=True)):
        assert [name for name, _ in mine] == [name for name, _ in other], i
        for (name, a), (_, b) in zip(mine, other, strict=True):
            if not isinstance(b, Tensor):
                assert a == b, (i, name)
                continue
            assert a.requires_grad == b.requires_grad, (i, name)
            if b.layout is torch.strided and b.numel():
                assert a.layout is b.layout, (i, name)
                assert strides(a) == strides(b), (i, name)
            assert_close(a, b, tolerance, (i, name))


def strides(tensor: Tensor) -> list[int]:
    """Return the strides that matter: a dimension of size 1 may have any stride."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1]


def assert_identical(one: torch.optim.Optimizer, two: torch.optim.Optimizer) -> None:
    """Parameters and state bit for bit."""
    first, second = tensors_of(one), tensors_of(two)
    assert list(first) == list(second)
    for key, a in first.items():
        b = second[key]
        assert torch.equal(a.isnan(), b.isnan()), key
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), key


def failure(
    change: Callable[[torch.optim.Optimizer], object], optimizer: torch.optim.Optimizer
) -> Exception | None:
    """Return the exception that the change raises, or None."""
    try:
        change(optimizer)
    except Exception as error:
        return error
    return None


class Twins:
    """Our optimizer and torch's own, on equal parameters.

    Args:
        make: makes an equal optimizer with new parameters at each call.
        wrap: options of the wrapper.
    """

    def __init__(self, make: Callable[[], torch.optim.Optimizer], **wrap: Any) -> None:
        self.twin = make()
        self.ours = wrapped(make(), **wrap)
        self.generator = torch.Generator().manual_seed(99)

    def both(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return self.ours, self.twin

    def each(self, change: Callable[[torch.optim.Optimizer], object]) -> None:
        """Do the same to both; if torch raises, ours must raise the same type of error."""
        twin_error, error = failure(change, self.twin), failure(change, self.ours)
        if ADAGRAD_LACKS_STATE and isinstance(twin_error, KeyError) and error is None:
            pytest.skip("this torch's Adagrad raises where its state was taken away")
        if type(error) is not type(twin_error):
            raise AssertionError(f"torch raises {twin_error!r}, ours {error!r}") from error

    def draw(self) -> None:
        """Give every parameter a new gradient, the same to both, in the parameter's layout."""
        for p, q in zip(members(self.ours), members(self.twin), strict=True):
            values = torch.randn(p.shape, generator=self.generator, dtype=torch.float64)
            p.grad, q.grad = like(values, p), like(values, q)

    def step(self, tolerance: float = 1e-12) -> None:
        """Step both with their present gradients; then both must be alike."""
        feed(self.twin, self.ours)
        self.each(lambda optimizer: optimizer.step())
        self.compare(tolerance)

    def compare(self, tolerance: float) -> None:
        assert_alike(self.ours, self.twin, tolerance)

    def run(self, steps: int, tolerance: float = 1e-12) -> None:
        for _ in range(steps):
            self.draw()
            self.step(tolerance)


def _adagrad_lacks_state() -> bool:
    """Return whether torch's Adagrad makes its state in its constructor only, as in torch 2.11."""
    param = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adagrad([param])
    optimizer.state.clear()
    param.grad = torch.ones(())
    return failure(lambda opt: opt.step(), optimizer) is not None


ADAGRAD_LACKS_STATE = _adagrad_lacks_state()


def twins(case: Case, shapes: Sequence[Any] = ((5, 3), (7,), ()), **wrap: Any) -> Twins:
    """Return twins of a case in float64."""
    return Twins(
        lambda: case.make(parameters(drawn(shapes, torch.float64))), **{**case.wrap, **wrap}
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def many_groups(cls, *settings, dtype=torch.float64, draw=None, **options):
    """Return a function that makes an optimizer with one group for each of the settings."""

    def make():
        groups = [
            {"params": parameters((draw or drawn)(((4, 3), (5,)), dtype, seed=i)), **own}
            for i, own in enumerate(settings)
        ]
        return cls(groups, **{"lr": 0.01, "foreach": False, **options})

    return make


def _unfused(**more):
    return {"weight_decay": torch.tensor(0.1, dtype=torch.float64), **more}


#: An optimizer class and settings of its groups, which need several kernels, or torch's step too.
MIXED_GROUPS = {
    "sgd": (torch.optim.SGD, {}, {"momentum": 0.9, "lr": 0.2}, {"momentum": 0.5, "nesterov": True},
            {"maximize": True}, {"weight_decay": 0.3}, {"momentum": 0.5, "dampening": 0.4}),
    "adam": (torch.optim.Adam, {}, {"amsgrad": True}, {"betas": (0.5, 0.6), "lr": 0.2},
            {"eps": 0.1, "weight_decay": 0.1}, {"decoupled_weight_decay": True, "weight_decay": 1}),
    "adagrad": (torch.optim.Adagrad, {}, {"lr_decay": 0.5}, {"eps": 0.1}, {"maximize": True}),
    "adadelta": (torch.optim.Adadelta, {}, {"rho": 0.5}, {"eps": 0.1}, {"lr": 2.0}),
    "rmsprop": (torch.optim.RMSprop, {}, {"momentum": 0.5}, {"centered": True}, {"alpha": 0.5},
            {"centered": True, "momentum": 0.9}),
    "adamw-differentiable": (torch.optim.AdamW, {}, {"differentiable": True}, {"lr": 0.5}),
    "sgd-tensor-decay": (torch.optim.SGD, _unfused(), {"momentum": 0.9}, _unfused(momentum=0.9)),
    "rmsprop-differentiable": (
        torch.optim.RMSprop, {"momentum": 0.9}, {"differentiable": True}, {},
    ),
}  # fmt: skip


def assert_first_gradient_is_whole(backend, draw=None):
    """Assert that only the first gradient of a tensor enters its momentum without dampening."""
    p, late = parameters((draw or drawn)([(3,), (3,)], torch.float32))
    opt = wrapped(torch.optim.SGD([p, late], lr=0.1, momentum=0.5, dampening=0.75), backend=backend)
    p.grad = torch.ones_like(p)
    opt.step()
    assert opt.state[p]["momentum_buffer"].tolist() == [1.0] * 3
    late.grad = torch.ones_like(p)
    opt.step()
    assert opt.state[p]["momentum_buffer"].tolist() == [0.75] * 3
    assert opt.state[late]["momentum_buffer"].tolist() == [1.0] * 3
