"""Graphs for the tests of captured steps, and runs of an optimizer that capture and replay them.

On a GPU the graphs are CUDA's. In Triton's interpreter a graph is played: a capture notes launches
and tensor operations and runs none; a replay runs them on the memory that the capture noted.
"""

from __future__ import annotations

import copy
import importlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from native_helpers import Case, assert_identical, tensors_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_helpers import DEVICE, INTERPRETED

from clr_optim import CyclicalOptimizer
from clr_optim.backends import device as current

SHAPES = [(5, 3), (1100,), (), (0,)]


class WaitedError(AssertionError):
    """The host read a value from the device."""


class _Watch(TorchDispatchMode):
    """Lets no value of a tensor reach the host, except in the interpreter's kernels."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise WaitedError
        return func(*args, **(kwargs or {}))


class _Kernel:
    """A kernel that runs outside of any dispatch mode, or that a graph notes."""

    def __init__(self, kernel: Any, graph: PlayedGraph | None = None) -> None:
        self._kernel, self._graph = kernel, graph

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            def run() -> None:
                with torch.utils._python_dispatch._disable_current_modes():
                    self._kernel[grid](*args, **kwargs)

            if self._graph is None:
                run()
            else:
                self._graph.noted.append(run)

        return launch


NAMES = {
    "multi_tensor": ("multi_tensor", "whole_step"),
    "prepare": ("prepare", "advance"),
    "gate": ("open_gate", "sum_of_squares"),
    "schedule": ("follow_schedules",),
}


@contextmanager
def _kernels(graph: PlayedGraph | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module_name, names in NAMES.items():
            module = importlib.import_module(f"clr_optim.kernels.triton.{module_name}")
            for name in names:
                patch.setattr(module, name, _Kernel(getattr(module, name), graph))
        yield


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Raise if a value of a tensor reaches the host."""
    if not INTERPRETED:
        torch.cuda.synchronize()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
                torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with _kernels(None), _Watch():
        yield


class CudaGraph:
    """A graph of CUDA."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @contextmanager
    def capture(self) -> Iterator[None]:
        with torch.cuda.graph(self._graph):
            yield

    def replay(self) -> None:
        self._graph.replay()


class PlayedGraph(TorchDispatchMode):
    """Notes launches and tensor operations, and replays them."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise WaitedError
        written = [a for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        if written:
            self.noted.append(lambda: func(*args, **kwargs))
            return args[0] if func._schema.returns else None
        out = func(*args, **kwargs)
        is_view = any(r.alias_info for r in func._schema.returns)
        if not is_view and "empty" not in func.name() and isinstance(out, Tensor):
            self.noted.append(lambda: out.copy_(func(*args, **kwargs)))
        return out

    @contextmanager
    def capture(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(current, "is_capturing", lambda: True)
            with _kernels(self), self:
                yield

    def replay(self) -> None:
        for run in self.noted:
            run()


Graph = PlayedGraph if INTERPRETED else CudaGraph


class Run:
    """A wrapped optimizer, and gradients that depend only on the step's number."""

    def __init__(
        self,
        case: Case,
        *,
        shapes: Sequence[Any] = SHAPES,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        names = (
            "average", "backend", "master_weights", "max_grad_norm", "policy", "schedules",
            "skip_above", "step_size_up",
        )  # fmt: skip
        wrap = {name: options.pop(name) for name in names if name in options}
        generator = torch.Generator().manual_seed(3)
        self.params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype))
            for shape in shapes
        ]
        inner = case.make(self.params, **options)
        self.opt = CyclicalOptimizer(
            inner, **{"step_size_up": 3, "backend": "triton", **case.wrap, **wrap}
        )
        self.static: list[Tensor] = []

    def draw(self, number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(100 + number)
        return [torch.randn(p.shape, generator=generator).to(DEVICE, p.dtype) for p in self.params]

    def eager(self, number: int, idle: int | None = None) -> None:
        """Take a step, with gradients for all parameters but the one with this index."""
        for i, (param, grad) in enumerate(zip(self.params, self.draw(number), strict=True)):
            param.grad = None if i == idle else grad
        self.opt.step()

    def capture(
        self,
        full_like: Callable[..., Tensor] = torch.full_like,
        idle: int | None = None,
        steps: int = 1,
    ) -> Any:
        """Return a graph of steps, whose gradients have separate memory, as after a backward."""
        graph = Graph()
        self.static = [full_like(p.detach(), float("nan")) for p in self.params]
        for i, (param, grad) in enumerate(zip(self.params, self.static, strict=True)):
            param.grad = None if i == idle else grad
        before = copy.deepcopy(tensors_of(self.opt))
        with graph.capture():
            for _ in range(steps):
                self.opt.step()
        after = tensors_of(self.opt)
        assert all(torch.equal(before[key], after[key]) for key in before)  # nothing has run
        for param in self.params:
            param.grad = None
        return graph

    def replay(self, graph: Any, number: int) -> None:
        for static, grad in zip(self.static, self.draw(number), strict=True):
            static.copy_(grad)
        graph.replay()


def assert_together(ours: Run, twin: Run) -> None:
    assert ours.opt.iteration == twin.opt.iteration
    assert ours.opt.cycle == twin.opt.cycle
    assert ours.opt.get_last_lr() == twin.opt.get_last_lr()
    assert ours.opt.state_dict()["param_groups"] == twin.opt.state_dict()["param_groups"]
    assert_identical(ours.opt, twin.opt)


def scaled(run: Run, number: int, scale: float, overflow: bool) -> None:
    """Set scaled gradients, and the two tensors that a GradScaler hands to a fused step."""
    for param, grad in zip(run.params, run.draw(number), strict=True):
        param.grad = grad * scale
    if overflow:
        run.params[1].grad[7] = random.Random(number).choice([float("inf"), float("nan")])
    run.opt.grad_scale = torch.tensor(scale, device=DEVICE)
    run.opt.found_inf = torch.tensor([float(overflow)], device=DEVICE)
