"""The LR range test measures what a plain loop would, and puts everything back."""

from __future__ import annotations

import copy
import io
import math
import random
import sys
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from range_test_helpers import linear_model, make_data, same
from torch import Tensor, nn
from torch.nn import functional

from clr_optim import CyclicalOptimizer
from clr_optim.range_test import RangeTest, lr_range_test
from clr_optim.range_test.snapshot import Snapshot

# ---- everything is put back


class Network(nn.Module):
    """Has batch norm, dropout, a frozen layer, a submodule in eval mode, an expanded buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)
        )
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.still = nn.BatchNorm1d(6).eval()
        self.register_buffer("wide", torch.ones(1).expand(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.wide[:1] += 1.0
        return self.body(self.still(self.frozen(x)))


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "sgd-plain": lambda params: torch.optim.SGD(params, lr=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "adam-tensor-lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.01)),
    "cyclical": lambda params: CyclicalOptimizer(
        torch.optim.AdamW(params, lr=0.01), step_size_up=3, cycle_momentum=True
    ),
}


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for i in range(steps):
        x, y = make_data()[i % 4]
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: Any, generator: torch.Generator) -> dict[str, Any]:
    """Return copies of all values, and the ids of the objects that hold them."""
    inner = getattr(optimizer, "optimizer", optimizer)
    tensors = [*model.parameters(), *model.buffers()]
    values = {
        "tensors": tensors,
        "grads": [p.grad for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "flags": [m.training for m in model.modules()],
        "hooks": [
            list(hooks)
            for m in [*model.modules(), inner, optimizer]
            for name, hooks in vars(m).items()
            if "hooks" in name and isinstance(hooks, dict)
        ],
        "state": list(inner.state.values()),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups],
        "defaults": inner.defaults,
        "torch": torch.get_rng_state(),
        "python": list(random.getstate()),
        "numpy": [np.random.get_state()[1].tolist(), *np.random.get_state()[2:]],
        "loader": generator.get_state(),
    }
    values = copy.deepcopy(values)
    objects: list[Any] = [*tensors, *(p.grad for p in model.parameters()), inner.state]
    objects += [inner.param_groups, *inner.param_groups, inner.defaults, *inner.state]
    objects += [g["params"] for g in inner.param_groups] + [g["lr"] for g in inner.param_groups]
    objects += [v for s in inner.state.values() for v in (s, *s.values())]
    values["objects"] = list(map(id, objects))
    values["memory"] = [t.data_ptr() for t in objects if isinstance(t, Tensor)]
    values["held"] = objects  # keep the objects, or Python may use an id again
    return values


class Loader:
    """Draws from three random generators; raises an error at the eighth batch."""

    def __init__(self, generator: torch.Generator, error: BaseException | None = None) -> None:
        self.generator = generator
        self.error = error
        self.given = 0

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        data = make_data()
        for i in torch.randperm(4, generator=self.generator).tolist():
            if self.error is not None and self.given == 7:
                raise self.error
            self.given += 1
            random.random()
            np.random.rand()
            yield data[i]


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("outcome", ["success", "error", "interrupt", "divergence"])
def test_everything_is_as_before(outcome, name, begun, offload):
    torch.manual_seed(0)
    model = Network()
    handle = model.register_forward_hook(lambda *args: None)
    optimizer = OPTIMIZERS[name](model.parameters())
    if begun:
        train(model, optimizer, 3)
        model.eval()
        model.body[1].train()
        model.body[0].bias.grad = None
    twin_model, twin = copy.deepcopy((model, optimizer))
    for param, other in zip(model.parameters(), twin_model.parameters(), strict=True):
        other.grad = None if param.grad is None else param.grad.clone()
    generator = torch.Generator().manual_seed(3)
    errors = {"error": OSError("disk"), "interrupt": KeyboardInterrupt()}
    loader = Loader(generator, errors.get(outcome))
    before = everything(model, optimizer, generator)

    def run() -> RangeTest:
        return lr_range_test(
            model, optimizer, loader, functional.cross_entropy, start_lr=1e-3, offload=offload,
            end_lr=1e6 if outcome == "divergence" else 0.1, num_steps=20, mode="exponential",
        )  # fmt: skip

    if outcome == "error":
        with pytest.raises(OSError, match="disk"):
            run()
    else:
        result = run()
        assert result.interrupted == (outcome == "interrupt")
        assert result.diverged == (outcome == "divergence")
        expected = {"success": 20, "interrupt": 7}.get(outcome, len(result.lrs))
        assert len(result.values) == len(result.lrs) == expected
        assert len(result.lrs) < 20 or outcome != "divergence"
    after = everything(model, optimizer, generator)
    for key in before:
        if key != "held":
            assert same(before[key], after[key]), key
    handle.remove()

    # Training goes on as without the test.
    model.train()
    twin_model.train()
    state = torch.get_rng_state()
    train(model, optimizer, 4)
    torch.set_rng_state(state)
    train(twin_model, twin, 4)
    assert same(list(model.parameters()), list(twin_model.parameters()))
    if name == "cyclical":
        assert optimizer.iteration == twin.iteration == 4 + 3 * begun
        assert optimizer.get_last_lr() == twin.get_last_lr()


def test_changes_by_the_users_function_are_put_back():
    """A step may replace memory, tensors and flags."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator()
    before = everything(model, optimizer, generator)

    def step_fn(model: Network, batch: Any) -> Tensor:
        model.frozen.bias.requires_grad_(True)
        model.frozen.weight.data = model.frozen.weight.data + 1.0
        model.body[1].running_mean = model.body[1].running_mean * 2
        model.body[2].eval()
        optimizer.param_groups[0]["new"] = 1
        return functional.cross_entropy(model(batch[0]), batch[1])

    lr_range_test(model, optimizer, make_data(), step_fn=step_fn, start_lr=0, end_lr=1, num_steps=5)
    after = everything(model, optimizer, generator)
    for key in before:
        if key != "held":
            assert same(before[key], after[key]), key


def test_an_interrupt_while_putting_back_does_not_leave_it_half_done(monkeypatch):
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    restore, calls = Snapshot.restore, []

    def interrupted_once(self: Snapshot) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        restore(self)

    monkeypatch.setattr(Snapshot, "restore", interrupted_once)
    before = copy.deepcopy(list(model.state_dict().values()))
    result = lr_range_test(
        model, optimizer, make_data(), functional.cross_entropy, start_lr=0, end_lr=1, num_steps=3
    )
    assert result.interrupted
    assert len(result.lrs) == 3
    assert same(before, list(model.state_dict().values()))


# ---- the measurements


def reference(batches: list[Any], rates: list[float], make: Any) -> list[float]:
    """Return the losses of a plain loop."""
    model = linear_model()
    optimizer = make(model.parameters())
    losses = []
    for (x, y), lr in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def measure(loader: Any, loss_fn: Any = functional.cross_entropy, **options: Any) -> RangeTest:
    model = options.pop("model", None) or linear_model()
    make = options.pop("make", OPTIMIZERS["sgd"])
    optimizer = make(model.parameters())
    options = {"start_lr": 0.01, "end_lr": 0.1, "num_steps": 6, **options}
    return lr_range_test(model, optimizer, loader, loss_fn, **options)


@pytest.mark.parametrize("mode", ["linear", "exponential"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_losses_are_those_of_a_plain_loop(name, mode):
    space = np.linspace if mode == "linear" else np.geomspace
    rates = space(0.01, 0.1, 12).tolist()
    result = measure(make_data(), mode=mode, num_steps=12, make=OPTIMIZERS[name])
    assert result.lrs == pytest.approx(rates, rel=1e-12)
    assert result.steps == list(range(12))
    assert result.num_steps == 12
    expected = reference(make_data() * 3, rates, OPTIMIZERS[name])
    assert result.values == pytest.approx(expected, rel=1e-5)


Batch = namedtuple("Batch", ["x", "y"])


class Keyword(nn.Module):
    """Takes keywords. With labels it returns the loss, as Hugging Face's models do."""

    def __init__(self, output: str = "") -> None:
        super().__init__()
        self.inner = linear_model()
        self.output = output

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        scores = self.inner(x)
        if labels is None:
            return scores
        loss = functional.cross_entropy(scores, labels)
        if self.output == "dict":
            return {"loss": loss}
        return namedtuple("Output", "loss")(loss)


def cross_entropy_of(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["deep"][0]["x"]), batch["deep"][1])


def dictionaries() -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for x, y in make_data()]


FORMATS: dict[str, Any] = {
    "tuple": lambda: measure(make_data()),
    "list": lambda: measure([list(batch) for batch in make_data()]),
    "namedtuple": lambda: measure([Batch(*batch) for batch in make_data()]),
    "generator": lambda: measure(iter(make_data() * 2)),
    "two inputs": lambda: measure(
        [(x, torch.zeros(1), y) for x, y in make_data()], model=TwoInputs()
    ),
    "dict": lambda: measure(dictionaries(), model=Keyword()),
    "dict, other key": lambda: measure(
        [{"x": x, "y": y} for x, y in make_data()], model=Keyword(), target_key="y"
    ),
    "model's own loss": lambda: measure(dictionaries(), None, model=Keyword()),
    "model's own loss in a dict": lambda: measure(dictionaries(), None, model=Keyword("dict")),
    "step_fn": lambda: measure(
        [{"deep": ({"x": x}, y)} for x, y in make_data()], None, step_fn=cross_entropy_of
    ),
    "step_fn of Lightning": lambda: measure(
        [{"deep": [{"x": x}, y]} for x, y in make_data()],
        None,
        step_fn=lambda model, batch: {"loss": cross_entropy_of(model, batch)},
    ),
    "accuracy too": lambda: measure(
        make_data(), None, step_fn=lambda m, b: (functional.cross_entropy(m(b[0]), b[1]), 1, 2)
    ),
    "DataLoader": lambda: measure(
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*map(torch.cat, zip(*make_data(), strict=True))),
            batch_size=8,
        )
    ),
}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear_model()

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return self.inner(x + offset)


@pytest.mark.parametrize("name", FORMATS)
def test_batches_of_every_format(name):
    assert FORMATS[name]().values == pytest.approx(measure(make_data()).values, rel=1e-6)


def test_accumulating_is_a_larger_batch():
    large = [
        (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
        for a, b in zip(make_data()[::2], make_data()[1::2], strict=True)
    ]
    once, twice = measure(large), measure(make_data(), accumulate=2)
    assert twice.values == pytest.approx(once.values, rel=1e-5)
    assert twice.lrs == once.lrs
    assert len(measure(make_data(), accumulate=2, num_steps=None, epochs=3).lrs) == 6
    assert len(measure(make_data(), num_steps=None, epochs=2.5).lrs) == 10


def test_groups_keep_the_ratio_of_their_rates():
    for mode in ("linear", "exponential"):
        model = linear_model()
        groups = [{"params": [model.bias], "lr": 0.02}, {"params": [model.weight], "lr": 0.2}]
        optimizer = torch.optim.SGD(groups)
        seen: list[list[float]] = []
        optimizer.register_step_pre_hook(
            lambda opt, *rest, seen=seen: seen.append([g["lr"] for g in opt.param_groups])
        )
        result = lr_range_test(
            model, optimizer, make_data(), functional.cross_entropy,
            start_lr=0.01, end_lr=1.0, num_steps=5, mode=mode,
        )  # fmt: skip
        assert result.ratios == pytest.approx([0.1, 1.0])
        assert [rates[1] for rates in seen] == result.lrs
        assert [rates[0] for rates in seen] == pytest.approx([lr / 10 for lr in result.lrs])
        assert result.lrs[-1] == 1.0
        assert [g["lr"] for g in optimizer.param_groups] == [0.02, 0.2]


def test_a_cycle_in_the_middle_does_not_change_the_ratios():
    model = linear_model()
    groups = [{"params": [model.bias]}, {"params": [model.weight]}]
    inner = torch.optim.SGD(groups, lr=0.1)
    optimizer = CyclicalOptimizer(inner, "triangular", base_lr=0.01, max_lr=[0.05, 0.2])
    optimizer.set_iteration(1000)
    before = copy.deepcopy(
        [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups]
    )
    result = lr_range_test(
        model, optimizer, make_data(), functional.cross_entropy,
        start_lr=0.01, end_lr=1.0, num_steps=5,
    )  # fmt: skip
    assert result.ratios == pytest.approx([0.25, 1.0])
    assert result.lrs[0] == 0.01
    assert optimizer.iteration == 1000
    assert before == [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups]


def test_accuracy_is_in_percent():
    result = measure(make_data(), metric="accuracy", num_steps=4)
    model = linear_model()
    x, y = make_data()[0]
    first = 100 * (model(x).argmax(1) == y).float().mean().item()
    assert result.values[0] == pytest.approx(first)
    by_hand = measure(
        make_data(),
        None,
        metric="accuracy",
        num_steps=4,
        step_fn=lambda model, batch: (
            functional.cross_entropy(model(batch[0]), batch[1]),
            (model(batch[0]).argmax(1) == batch[1]).sum(),
            len(batch[1]),
        ),
    )
    assert by_hand.values == pytest.approx(result.values)


def test_validation_is_on_its_own_loader_in_eval_mode():
    model = Network()
    modes = []
    model.body[2].register_forward_hook(lambda module, *rest: modes.append(module.training))
    validation = make_data(3)
    options = {"val_loader": validation, "validate_every": 2, "model": model}
    result = measure(make_data(), metric="validation_accuracy", **options)
    assert result.steps == [1, 3, 5]
    assert modes == [True, True, False, False, False] * 3
    assert all(0 <= value <= 100 for value in result.values)
    torch.manual_seed(0)
    losses = measure(make_data(), metric="validation_loss", **options)
    assert losses.lrs == result.lrs
    assert len(measure(make_data(), metric="validation_loss", val_loader=validation).lrs) == 6


def test_a_loss_that_is_no_longer_finite_ends_the_test():
    calls = []

    def step_fn(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        loss = functional.cross_entropy(model(batch[0]), batch[1])
        return loss * math.nan if len(calls) == 4 else loss

    result = measure(make_data(), None, step_fn=step_fn)
    assert result.diverged
    assert len(result.lrs) == len(calls) - 1 == 3


def test_gradients_are_clipped():
    batches = [(10 * x, y) for x, y in make_data()]
    free, clipped = measure(batches), measure(batches, max_grad_norm=1e-6)
    assert free.values[4] != pytest.approx(free.values[0], rel=0.1)
    assert clipped.values[4] == pytest.approx(clipped.values[0], rel=1e-3)
    wrapped = measure(
        batches, make=lambda p: CyclicalOptimizer(OPTIMIZERS["sgd"](p), max_grad_norm=1e-6)
    )
    assert wrapped.values == clipped.values


def test_autocast_is_on_during_forward():
    for dtype in (torch.bfloat16, torch.float16):
        seen = []

        def step_fn(model: nn.Module, batch: Any, seen: list[Any] = seen) -> Tensor:
            scores = model(batch[0])
            seen.append(scores.dtype)
            return functional.cross_entropy(scores.float(), batch[1])

        result = measure(make_data(), None, step_fn=step_fn, amp_dtype=dtype)
        assert set(seen) == {dtype}
        assert len(result.lrs) == 6
        assert result.values == pytest.approx(measure(make_data()).values, rel=0.05)


def test_steps_that_a_scaler_skips_are_not_counted():
    """The gradients overflow in float16 until the scaler has lowered its scale."""
    calls = []

    def step_fn(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return 100 * functional.cross_entropy(model(batch[0]).float(), batch[1])

    result = measure(
        make_data(), None, step_fn=step_fn, amp_dtype=torch.float16, start_lr=1e-5, end_lr=1e-3
    )
    assert result.steps == list(range(6))
    assert len(calls) > 6
    assert not result.diverged


def test_the_progress_is_for_terminals_only(monkeypatch):
    for terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stderr", stream)
        measure(make_data())
        assert ("range test 1/6  lr 0.01  loss" in stream.getvalue()) == terminal
        assert bool(stream.getvalue()) == terminal


def test_a_test_without_a_range_takes_the_default_one():
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [param.clone() for param in model.parameters()]
    result = lr_range_test(model, optimizer, make_data(), functional.cross_entropy)
    assert (result.mode, result.num_steps) == ("exponential", 500)
    assert result.lrs[0] == 1e-5
    assert result.diverged or result.lrs[-1] > 9
    assert same(before, list(model.parameters()))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"start_lr": 1e-3}, (1e-3, 10.0, "exponential")),
        ({"end_lr": 1e-3}, (1e-5, 1e-3, "exponential")),
        ({"start_lr": 0.0, "end_lr": 1e-3}, (0.0, 1e-3, "linear")),
        ({"start_lr": 1e-4, "end_lr": 1e-3, "mode": "exponential"}, (1e-4, 1e-3, "exponential")),
    ],
)
def test_defaults_replace_only_what_is_left_out(given, expected):
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = lr_range_test(
        model, optimizer, make_data(), functional.cross_entropy, num_steps=8, diverge_factor=1e9,
        **given,
    )  # fmt: skip
    assert (result.lrs[0], result.lrs[-1]) == pytest.approx(expected[:2])
    assert result.mode == expected[2]
