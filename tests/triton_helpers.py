"""Helpers of the Triton backend's tests: marks, the mended interpreter, twins on the device.

:mod:`triton_memory` watches every launch in the interpreter.

Under Triton's interpreter all tensors lie on the CPU, else all lie on the GPU. torch's step
counters always lie on the CPU, ours only in the interpreter.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import changes  # noqa: F401  (the tests take it from here)
import contract
import native_helpers
import pytest
import torch
import triton_memory
from internals import take_the_general_way
from native_helpers import HALF, KERNELS, Case, members, parameters
from torch import Tensor

from clr_optim.backends.triton import is_interpreted, launch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and is_interpreted()
RUNS = INTERPRETED or (HAS_TRITON and torch.cuda.is_available())
#: whether kernels are interpreted: without a GPU, or on the fake device of `make fake-gpu`
SLOW = INTERPRETED or "FAKE_ORDER" in os.environ
DEVICE = torch.device("cuda", 0) if RUNS and not INTERPRETED else torch.device("cpu")


# ---- marks, fixtures and cells


MARKS = [
    pytest.mark.triton,
    pytest.mark.skipif(
        not RUNS,
        reason="runs with TRITON_INTERPRET=1 (`make interpreted`) or on a GPU, with Triton",
    ),
    # The interpreter computes with numpy, and numpy warns of every NaN and Inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]
kernels = pytest.mark.parametrize("case", KERNELS, ids=contract.name_of)


def choose_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``backend="auto"`` mean Triton."""
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "triton")


def on_gpus(test: Any) -> Any:
    """Mark a test that runs compiled only, on a GPU."""
    skip = pytest.mark.skipif(INTERPRETED, reason="runs compiled, without TRITON_INTERPRET")
    return pytest.mark.gpu(skip(test))


def some(cells: Iterable[Any], every: int) -> list[Any]:
    """Return one of so many cells where kernels are interpreted, all cells on a GPU."""
    return list(cells)[::every] if SLOW else list(cells)


def named(cell: Iterable[Any]) -> str:
    """Return the name of a cell for its test's id."""
    return "-".join(
        part if isinstance(part, str) else getattr(part, "__name__", "") or contract.name_of(part)
        for part in cell
    )


class Counted:
    """A kernel that counts its launches and their programs."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]

    def taken(self):
        grids, self.grids = self.grids, []
        return grids


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[Counted]:
    """Count the launches of ``whole_step``, ``prepare`` and ``multi_tensor``.

    Every step launches through Triton: native code repeats launches without these objects.
    """
    from clr_optim.kernels.triton import multi_tensor, prepare

    take_the_general_way(monkeypatch)

    found = []
    for module, name in (
        (multi_tensor, "whole_step"), (prepare, "prepare"), (multi_tensor, "multi_tensor"),
    ):  # fmt: skip
        found.append(Counted(getattr(module, name)))
        monkeypatch.setattr(module, name, found[-1])
    return found


def in_both_ways(cells: Iterable[Any]) -> list[Any]:
    """Return each cell with a name of a way to take a step, see :func:`take_way`.

    The interpreter takes one way for each cell, in turn. A GPU takes both.
    """
    if INTERPRETED:
        return [(*cell, WAYS[i % 2]) for i, cell in enumerate(cells)]
    return [(*cell, way) for cell in cells for way in WAYS]


WAYS = ("one-launch", "two-launches")


def take_way(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Have every step take one launch, or two as those of large models."""
    if way == "two-launches":
        take_two_launches(monkeypatch)


def take_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every step prepare the constants in a launch before the update, as large models do."""
    monkeypatch.setattr(launch, "most_programs", lambda device: 0)


# ---- the interpreter


if INTERPRETED:
    from mended_interpreter import mend_the_interpreter

    mend_the_interpreter()
    triton_memory.watch()


# ---- the schedule


if RUNS:
    import triton
    import triton.language as tl

    from clr_optim.kernels.triton.schedule import phase_tables, rate_and_momentum

    @triton.jit
    def _evaluate(ints, floats, phases, steps, bounds, rates, momenta, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0)
        if BLOCK > 0:
            at = at * BLOCK + tl.arange(0, BLOCK)
        rate, momentum = rate_and_momentum(
            ints, floats, phases, tl.load(steps + at),
            tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2), tl.load(bounds + 3),
        )  # fmt: skip
        tl.store(rates + at, rate)
        tl.store(momenta + at, momentum)


def on_device(schedule: Any, steps: Sequence[int], bounds: Sequence[float]) -> Any:
    """Return ``(rates, momenta)`` that the device evaluates at each step."""
    tables = [torch.from_numpy(table).to(DEVICE) for table in phase_tables(schedule)]
    # A GPU runs a program per step, as in the kernels. The interpreter computes all steps at
    # once: its arithmetic is numpy's, for arrays as for numbers.
    block = 1 << (len(steps) - 1).bit_length() if INTERPRETED else 0
    padded = [*steps, *[0] * (block - len(steps))]
    there = torch.tensor(padded, dtype=torch.int64, device=DEVICE)
    rates = torch.zeros(len(padded), dtype=torch.float64, device=DEVICE)
    momenta = torch.zeros_like(rates)
    limits = torch.tensor(bounds, dtype=torch.float64, device=DEVICE)
    grid = (1 if INTERPRETED else len(steps),)
    _evaluate[grid](
        *tables, len(schedule.phases), there, limits, rates, momenta, BLOCK=block,
        enable_fp_fusion=False,
    )  # fmt: skip
    return [found[: len(steps)].cpu().numpy() for found in (rates, momenta)]


# ---- optimizers and their twins


def drawn(shapes: Sequence[Any], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Return normally distributed tensors on the device, equal on every machine."""
    return [t.to(DEVICE) for t in native_helpers.drawn(shapes, dtype, seed)]


def at_home(optimizer: torch.optim.Optimizer) -> Any:
    """Return an optimizer's parameters and state on the CPU, for comparisons."""
    here = {p: torch.nn.Parameter(p.detach().cpu()) for p in members(optimizer)}
    state = {
        here[p]: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
        for p in here
        if p in optimizer.state
    }
    groups = [{"params": [here[p] for p in g["params"]]} for g in optimizer.param_groups]
    return SimpleNamespace(param_groups=groups, state=state)


def assert_alike(ours: Any, twin: Any, tolerance: float = 1e-12) -> None:
    native_helpers.assert_alike(at_home(ours), at_home(twin), tolerance)


class Twins(native_helpers.Twins):
    """Our optimizer with ``backend="triton"``, and torch's for-loop step beside it."""

    def __init__(self, make: Callable[[], torch.optim.Optimizer], **wrap: Any) -> None:
        super().__init__(make, **{"backend": "triton", **wrap})

    def compare(self, tolerance: float) -> None:
        assert_alike(self.ours, self.twin, tolerance)


def twins(case: Case, shapes: Sequence[Any] = ((5, 3), (7,)), **wrap: Any) -> Twins:
    """Return twins of a case in float64."""
    return Twins(
        lambda: case.make(parameters(drawn(shapes, torch.float64))), **{**case.wrap, **wrap}
    )


class Contract(contract.Contract):
    """The contract with each value in a separate group that has separate bounds."""

    def __init__(self, case: Case, dtype: torch.dtype, values: Sequence[Tensor]) -> None:
        def groups(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[dict[str, Any]]:
            return [{"params": parameters([t], dtype)} for t in tensors]

        self.case, self.dtype, self.free = case, dtype, None
        base = [case.lr * (0.25 + 0.1 * (i % 5)) for i in range(len(values))]
        self.ours = case.ours(
            groups(values, dtype), backend="triton", base_lr=base, max_lr=[4 * lr for lr in base]
        )
        wide = torch.float64 if dtype in HALF else dtype
        self.twin = case.make(groups([v.to(dtype) for v in values], wide))
        self.segments: list[Any] = []
        self._take()
