"""One small model, trained with torch and its CyclicLR, and with one changed line."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import assert_same
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from clr_optim import CyclicalOptimizer

#: A cycle has 7 steps, an epoch 5. So epochs end in mid-cycle, on the way up and on the way down.
UP, DOWN, EPOCH, EPOCHS = 4, 3, 5, 4
STEPS = EPOCH * EPOCHS
BASE, TOP = 0.01, 0.05
BATCH, FEATURES, CLASSES = 8, 6, 3

backends = pytest.mark.parametrize("backend", ["auto", "torch"])


def imported(name: str) -> ModuleType:
    """Import a framework or skip the test module. Ignore the warnings of the import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name.partition(".")[0], reason=f"needs {name}: make test-frameworks")
        return importlib.import_module(name)


def build_model() -> nn.Module:
    """Return a model with the same first weights each time."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def build_data() -> tuple[Tensor, Tensor]:
    """Return the features and labels of one epoch, the same each time."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(BATCH * EPOCH, FEATURES, generator=generator)
    return features, features[:, :CLASSES].argmax(dim=1)


def build_loader(batch_size: int = BATCH) -> Any:
    """Return batches in the same order each time."""
    dataset = torch.utils.data.TensorDataset(*build_data())
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size)


def inner(params: Any) -> torch.optim.Optimizer:
    """Return the optimizer, which is the same before and after the line changes."""
    return torch.optim.AdamW(params, lr=TOP, weight_decay=0.1)


def cyclic_lr(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.CyclicLR:
    """Return the scheduler that the changed line replaces."""
    return torch.optim.lr_scheduler.CyclicLR(
        optimizer,
        BASE,
        TOP,
        step_size_up=UP,
        step_size_down=DOWN,
        mode="triangular2",
        cycle_momentum=False,
    )


def wrap(optimizer: torch.optim.Optimizer, backend: str, **options: Any) -> CyclicalOptimizer:
    """The changed line."""
    return CyclicalOptimizer(
        optimizer,
        "triangular2",
        base_lr=BASE,
        step_size_up=UP,
        step_size_down=DOWN,
        backend=backend,
        **options,
    )


def expected_rates(steps: int = STEPS + 1) -> list[float]:
    """Return the rate of each step, as CyclicLR computes it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=TOP)
    scheduler = cyclic_lr(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def assert_rates(ours: list[float], expected: list[float]) -> None:
    """Assert equal rates, but for CyclicLR's own drift."""
    assert ours == pytest.approx(expected, rel=1e-10)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_like_torch(ours: nn.Module, twin: nn.Module, backend: str) -> None:
    """Assert equal parameters: exact on the optimizer's own step, up to rounding on a kernel."""
    if backend == "torch":
        assert_same(values(ours), values(twin))
    else:
        torch.testing.assert_close(values(ours), values(twin), rtol=1e-4, atol=1e-6)


def assert_served(optimizer: CyclicalOptimizer, backend: str) -> None:
    """Assert that kernels served, if kernels are tested."""
    assert optimizer.explain().startswith({"auto": "native", "torch": "torch"}[backend])


def assert_same_checkpoint(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that two checkpoints hold all of torch's keys, and ours in the groups."""
    assert ours.keys() == expected.keys()
    assert ours["state"].keys() == expected["state"].keys()
    for i, state in expected["state"].items():
        assert list(ours["state"][i]) == list(state)
        for name, value in state.items():
            mine = ours["state"][i][name]
            assert (type(mine), mine.shape, mine.dtype) == (type(value), value.shape, value.dtype)
    for mine, group in zip(ours["param_groups"], expected["param_groups"], strict=True):
        added = {"clr_step", "clr_base_lr", "clr_max_lr", "clr_schedule"}
        assert set(mine) - set(group) == added
        assert set(group) - set(mine) <= {"initial_lr"}  # torch's schedulers leave it there


class Watch:
    """Observes steps by hooks, global ones and an optimizer's own, and by torch's profiler."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, torch.optim.Optimizer]] = []
        self._profile = torch.profiler.profile()
        self._handles: list[Any] = []

    def _note(self, name: str) -> Any:
        return lambda optimizer, args, kwargs: self.seen.append((name, optimizer))

    def register(self, optimizer: torch.optim.Optimizer) -> None:
        """Register the optimizer's own hooks."""
        optimizer.register_step_pre_hook(self._note("own pre"))
        optimizer.register_step_post_hook(self._note("own post"))

    def __enter__(self) -> Watch:
        self._handles = [
            register_optimizer_step_pre_hook(self._note("global pre")),
            register_optimizer_step_post_hook(self._note("global post")),
        ]
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def check(self, optimizer: CyclicalOptimizer, steps: int) -> None:
        """Check that each step was seen once, as a step of this optimizer."""
        names = ["global pre", "own pre", "own post", "global post"]
        assert [name for name, _ in self.seen] == names * steps
        assert all(seen is optimizer for _, seen in self.seen)
        ranges = {
            event.key: event.count
            for event in self._profile.key_averages()
            if event.key.startswith("Optimizer.step")
        }
        assert ranges == {"Optimizer.step#CyclicalOptimizer.step": steps}
