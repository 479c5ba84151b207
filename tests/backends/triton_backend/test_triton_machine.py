"""Random sequences of graphs, overflows, checkpoints and outside writes.

Our optimizer steps eagerly, by a GradScaler's fused path and by replays. Its twin, on torch's own
step, takes only the steps that happened, eagerly. After any sequence both must agree. Below the
machine are the sequences that once parted host and device, each as short as possible.
"""

from __future__ import annotations

import copy
import gc
import pickle
import random
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from graph_helpers import PlayedGraph, Run, WaitedError, assert_together, scaled
from native_helpers import BY_NAME, Case, assert_close, like, members, tensors_of
from torch import Tensor
from triton_helpers import INTERPRETED, choose_triton, drawn

from clr_optim import CyclicalOptimizer

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"),
    # The interpreter computes with an SGD's unfilled first buffer, and numpy warns of its NaNs.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:lr was written from outside:UserWarning"),
]


class Graph(PlayedGraph):
    """A played graph whose capture leaves no values behind, since a GPU runs nothing then."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        is_view = any(r.alias_info for r in func._schema.returns)
        if isinstance(out, Tensor) and not writes and not is_view:
            out.fill_(float("nan") if out.is_floating_point() else 99)
        return out


@contextmanager
def a_change(opt: Any) -> Iterator[None]:
    """Change a setting, which a graph cannot take in, and undo that."""
    group = opt.param_groups[0]
    before = group["weight_decay"]
    group["weight_decay"] = before + 1.0
    yield
    group["weight_decay"] = before


# ---- the machine

SHAPES = [(5, 3), (7,), (), (4,)]
# Of SHAPES, the last tensor joins late.
MACHINES = [
    ("adam-wd", {}, {}),
    ("adam-wd", {"capturable": True}, {"max_grad_norm": 0.5}),
    ("adamw-ams", {"capturable": True}, {}),
    ("adam-cycled", {}, {"max_grad_norm": 0.5}),
    ("adam-cycled", {"capturable": True}, {}),
    ("sgd-nest-wd", {}, {"max_grad_norm": 0.5}),
    ("sgd-nest-cycled", {}, {}),
    ("sgd-wd", {}, {}),
    ("adagrad-decay", {}, {"max_grad_norm": 0.5}),
    ("rmsprop-mom-cent", {"capturable": True}, {}),
]


class Machine:
    """Our optimizer, its twin, and our graphs that the test may still replay."""

    def __init__(self, seed: int, case: Case, own: dict[str, Any], wrap: dict[str, Any]) -> None:
        self.chance = random.Random(seed)
        self.case = case
        self.number = 0
        self.own = own

        def make(backend: str, options: dict[str, Any]) -> CyclicalOptimizer[Any]:
            params = [torch.nn.Parameter(t) for t in drawn(SHAPES, torch.float64, seed=3)]
            inner = case.make(params[:2], **options)
            inner.add_param_group({"params": params[2:], "lr": 2 * case.lr})
            return CyclicalOptimizer(
                inner, step_size_up=3, backend=backend, **{**case.wrap, **wrap}
            )

        self.ours, self.twin = make("triton", own), make("torch", {})
        # graph, gradients, and a GradScaler's two tensors if it was captured with them
        self.graphs: list[tuple[Graph, list[Tensor | None], tuple[Tensor, Tensor] | None]] = []
        self.saved: Any = None
        self.log: list[str] = []

    def both(self) -> tuple[CyclicalOptimizer[Any], CyclicalOptimizer[Any]]:
        return self.ours, self.twin

    def each(self, change: Callable[[CyclicalOptimizer[Any]], object]) -> None:
        for opt in self.both():
            change(opt)

    def draw(self) -> list[Tensor]:
        self.number += 1
        shapes = [p.shape for p in members(self.twin)]
        return drawn(shapes, torch.float64, seed=1000 + self.number)

    def active(self) -> list[bool]:
        """Draw which parameters have gradients: mostly all, and the last joins late."""
        count = len(members(self.twin))
        if self.chance.random() < 0.6:
            return [i != 3 or self.number > 12 for i in range(count)]
        return [self.chance.random() < 0.7 for _ in range(count)]

    def feed(self, opt: Any, grads: Sequence[Tensor | None], scale: float = 1.0) -> None:
        for p, grad in zip(members(opt), grads, strict=True):
            p.grad = None if grad is None else like(grad * scale, p)

    def grads(self, active: Sequence[bool]) -> list[Tensor | None]:
        return [g if on else None for g, on in zip(self.draw(), active, strict=True)]

    # ---- events

    def eager(self, active: Sequence[bool] | None = None) -> None:
        grads = self.grads(active or self.active())
        for opt in self.both():
            self.feed(opt, grads)
            opt.step()

    def idle(self) -> None:
        self.eager([False] * len(members(self.twin)))

    def closure(self) -> None:
        grads = self.grads(self.active())
        for opt in self.both():
            opt.step(lambda opt=opt: self.feed(opt, grads) or 1.0)

    def amp(self) -> None:
        """A GradScaler's fused step, perhaps after ``unscale_``."""
        scale, overflow = 2.0 ** self.chance.randrange(18), self.chance.random() < 0.4
        grads = self.grads(self.active())
        unscaled = self.chance.random() < 0.3
        self.feed(self.ours, grads, 1.0 if unscaled else scale)
        there = [p.grad for p in members(self.ours) if p.grad is not None]
        overflow = overflow and bool(there)
        if overflow:
            there[-1].view(-1)[0] = float("inf")
        self.ours.grad_scale = None if unscaled else torch.tensor([scale])
        self.ours.found_inf = torch.tensor(float(overflow))
        self.ours.step()
        del self.ours.grad_scale, self.ours.found_inf
        if not overflow:
            self.feed(self.twin, grads)
            self.twin.step()

    def _capture(self) -> Any:
        """After a step with the same gradients."""
        active = self.active()
        active[0] = True  # the device needs at least one tensor
        self.eager(active)
        static = [
            torch.zeros_like(p) if on else None
            for p, on in zip(members(self.ours), active, strict=True)
        ]
        for p, grad in zip(members(self.ours), static, strict=True):
            p.grad = grad
        amp = None
        if self.chance.random() < 0.4:
            amp = torch.ones(()), torch.zeros(())
            self.ours.grad_scale, self.ours.found_inf = amp
        before = copy.deepcopy(tensors_of(self.ours))
        graph = Graph()
        with graph.capture():
            self.ours.step()
        if amp:
            del self.ours.grad_scale, self.ours.found_inf
        after = tensors_of(self.ours)
        assert all(torch.equal(before[key], after[key]) for key in before)
        for p in members(self.ours):
            p.grad = None
        return graph, static, amp

    def capture(self) -> None:
        self.graphs.append(self._capture())

    def discard(self) -> None:
        self._capture()

    def refused(self) -> None:
        """Try a capture after a change that a graph cannot take in; take no step."""
        active = self.active()
        self.eager(active)
        for p in members(self.ours):
            p.grad = None
        some = [p for p, on in zip(members(self.ours), active, strict=True) if on]
        for p in some[1:]:
            p.grad = torch.ones_like(p)
        if not some:
            return
        refused = pytest.raises(RuntimeError, match="cannot be captured")
        with a_change(self.ours), refused, Graph().capture():
            self.ours.step()
        if self.chance.random() < 0.5:
            self.eager(active)

    def replay(self) -> None:
        if not self.graphs:
            return self.capture()
        for _ in range(self.chance.randrange(1, 4)):
            graph, static, amp = self.chance.choice(self.graphs)
            count = len(members(self.twin))
            own = [*static, *[None] * (count - len(static))]
            grads = self.grads([s is not None for s in own])
            scale, overflow = 1.0, False
            if amp:
                scale = 2.0 ** self.chance.randrange(18)
                overflow = self.chance.random() < 0.3
                amp[0].fill_(scale)
                amp[1].fill_(float(overflow))
            for place, grad in zip(own, grads, strict=True):
                if place is not None and grad is not None:
                    place.copy_(float("nan") * grad if overflow else grad * scale)
            graph.replay()
            if not overflow:
                self.feed(self.twin, grads)
                self.twin.step()
        return None

    def set_iteration(self) -> None:
        to = self.chance.randrange(12)
        self.each(lambda opt: opt.set_iteration(to))

    def set_bounds(self) -> None:
        top = self.case.lr * self.chance.uniform(0.5, 2)
        self.each(lambda opt: opt.set_bounds(base_lr=top / 5, max_lr=top))

    def write_step(self) -> None:
        # Avoid the position that the host may believe: the write would go unnoticed.
        to = 100 * self.number + self.chance.randrange(12)

        def write(opt: Any) -> None:
            for group in opt.param_groups:
                group["clr_step"] = to

        self.each(write)
        self.noticed()

    def noticed(self) -> None:
        """Make the host read the groups: replays do not, steps and questions do."""
        self.chance.choice([self.eager, self.look, self.amp])()

    def write_bounds(self) -> None:
        top = self.case.lr * self.chance.uniform(0.5, 2)
        self.each(lambda opt: opt.param_groups[0].update(clr_max_lr=top, clr_base_lr=top / 3))
        self.noticed()

    def write_lr(self) -> None:
        lr: Any = self.chance.choice([0.5, torch.tensor(0.25), 0.0])
        for opt in self.both():
            opt.param_groups[self.chance.randrange(2)]["lr"] = copy.deepcopy(lr)
        self.eager([True] * len(members(self.twin)))

    def settings(self) -> None:
        """Change settings of torch's groups, which a step takes in and a replay does not."""
        value = self.chance.choice([0.0, 0.05, 0.3])
        self.each(lambda opt: opt.param_groups[0].update(weight_decay=value))
        if "betas" in self.twin.param_groups[0]:
            for opt in self.both():
                group = opt.param_groups[1]
                group["betas"] = (group["betas"][0], 0.9 + value / 10)
        self.eager()

    def zero_rate(self) -> None:
        """Step at rate 0, as torch's distributed checkpoint does to create state."""
        for opt in self.both():
            held = [group["lr"] for group in opt.param_groups]
            for group, lr in zip(opt.param_groups, held, strict=True):
                group["lr"] = torch.tensor(0.0) if isinstance(lr, Tensor) else 0.0
            for p in members(opt):
                p.grad = torch.zeros_like(p)
            opt.step()
            for group, lr in zip(opt.param_groups, held, strict=True):
                group["lr"] = lr

    def add_group(self) -> None:
        if len(self.twin.param_groups) > 3:
            return
        beneath = self.chance.random() < 0.3
        for opt in self.both():
            new = {"params": [torch.nn.Parameter(torch.full((3,), 2.0).double())], "lr": 0.02}
            (opt.optimizer if beneath else opt).add_param_group(new)

    def save(self) -> None:
        self.saved = [copy.deepcopy(opt.state_dict()) for opt in self.both()]

    def load(self) -> None:
        """Load our checkpoint or the twin's into both."""
        if self.saved is None or len(self.saved[0]["param_groups"]) != len(self.twin.param_groups):
            return self.save()
        state = self.chance.choice(self.saved)
        for opt in self.both():
            own = copy.deepcopy(state)
            for group in own["param_groups"]:
                if "capturable" in group:
                    group["capturable"] = bool(self.own) and opt is self.ours
                group["lr"] = float(group["lr"])  # the twin has no float32
            loading = opt.optimizer if self.chance.random() < 0.2 else opt
            with warnings.catch_warnings():
                # set_bounds() since it was saved
                warnings.filterwarnings("ignore", "state_dict has the bounds", UserWarning)
                loading.load_state_dict(own)
        self.graphs.clear()
        return None

    def copied(self) -> None:
        how = self.chance.choice([copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
        self.ours = how(self.ours)
        self.graphs.clear()

    def look(self) -> None:
        assert self.ours.iteration == self.twin.iteration
        assert self.ours.get_last_lr() == self.twin.get_last_lr()
        ours, expected = self.ours.state_dict(), self.twin.state_dict()
        for mine, other in zip(ours["param_groups"], expected["param_groups"], strict=True):
            assert set(mine) == set(other)
            for key in set(mine) - {"lr", "capturable", "params"}:
                assert mine[key] == other[key], key
            assert float(mine["lr"]) == pytest.approx(float(other["lr"]), rel=1e-6)

    def compare(self) -> None:
        ours, expected = tensors_of(self.ours), tensors_of(self.twin)
        assert set(ours) == set(expected)
        for key, value in expected.items():
            assert_close(ours[key], value, 1e-9, key)

    WEIGHTS: ClassVar = {
        "eager": 4, "amp": 5, "replay": 7, "capture": 2, "discard": 1, "refused": 1, "idle": 1,
        "closure": 1, "set_iteration": 1, "set_bounds": 1, "write_step": 1, "write_bounds": 1,
        "write_lr": 1, "settings": 1, "zero_rate": 1, "add_group": 0.5, "save": 0.5, "load": 0.7,
        "copied": 0.5, "look": 1,
    }  # fmt: skip

    def run(self, length: int) -> None:
        for _ in range(length):
            (name,) = self.chance.choices(list(self.WEIGHTS), list(self.WEIGHTS.values()))
            self.log.append(name)
            getattr(self, name)()
            self.compare()
        self.log.append("look")
        self.look()


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_is_that_of_the_steps_taken(seed):
    name, own, wrap = MACHINES[seed % len(MACHINES)]
    machine = Machine(seed, BY_NAME[name], own, wrap)
    try:
        machine.run(25)
    except BaseException as error:
        error.add_note(f"{name} {own} {wrap}: {', '.join(machine.log)}")
        raise


# ---- sequences that once parted host and device


@contextmanager
def captured(run: Run) -> Iterator[Graph]:
    """Capture a step in a graph, even if the capture fails."""
    run.static = [torch.zeros_like(p) for p in run.params]
    for param, grad in zip(run.params, run.static, strict=True):
        param.grad = grad
    graph = Graph()
    try:
        with graph.capture():
            yield graph
    finally:
        for param in run.params:
            param.grad = None


def graph_of(run: Run) -> Graph:
    with captured(run) as graph:
        run.opt.step()
    return graph


def pair(name: str = "adam-wd", **options: Any) -> tuple[Run, Run]:
    """Return our run and an eager twin, after a step."""
    runs = Run(BY_NAME[name], **options), Run(BY_NAME[name], **options)
    for run in runs:
        run.eager(0)
    return runs


def test_a_refused_capture_leaves_all_chunks():
    """Fewer gradients in a capture that was refused must not shorten the next step."""
    run, plain = pair()
    run.params[0].grad = None
    for param in run.params[1:]:
        param.grad = torch.ones_like(param)
    refused = pytest.raises(RuntimeError, match="cannot be captured")
    with a_change(run.opt), refused, Graph().capture():
        run.opt.step()
    for r in (run, plain):
        r.eager(1)
    assert_together(run, plain)


def test_a_refused_capture_creates_no_state():
    """No kernel has filled the state that the capture was to create."""
    run, plain = Run(BY_NAME["adam-wd"]), Run(BY_NAME["adam-wd"])
    with pytest.raises(RuntimeError, match="create the optimizer's state"), captured(run):
        run.opt.step()
    for r in (run, plain):
        r.eager(0)
    assert_together(run, plain)


def test_a_refusal_under_amp_says_why():
    run = Run(BY_NAME["adam-wd"])
    run.opt.grad_scale, run.opt.found_inf = torch.ones(()), torch.zeros(())
    with pytest.raises(RuntimeError, match="create the optimizer's state"), captured(run):
        run.opt.step()


def test_a_capture_without_any_tensors_is_refused():
    run = Run(BY_NAME["adam-wd"])
    with pytest.raises(RuntimeError, match="cannot be captured"), Graph().capture():
        run.opt.step()
    assert run.opt.iteration == 0


def test_a_question_during_a_capture_changes_nothing():
    run, plain = pair()
    for overflow in (True, True, False):
        scaled(run, 1, 8.0, overflow)
        run.opt.step()
    plain.eager(1)
    del run.opt.grad_scale, run.opt.found_inf
    with pytest.raises(WaitedError), captured(run):
        _ = run.opt.iteration
    assert run.opt.iteration == plain.opt.iteration == 2


def test_what_was_written_outside_is_refused_before_anything_moves():
    run, _ = pair(capturable=True)
    run.opt.param_groups[0]["clr_step"] = 2
    before = run.opt.param_groups[0]["lr"].clone()
    with pytest.raises(RuntimeError, match="cannot be captured"), captured(run) as graph:
        run.opt.step()
    assert graph.noted == []
    assert torch.equal(run.opt.param_groups[0]["lr"], before)


def test_a_discarded_capture_leaves_the_norm():
    run, _ = pair(max_grad_norm=0.5)
    before = run.opt.grad_norm.clone()
    graph_of(run)
    assert torch.equal(run.opt.grad_norm, before)


def test_the_norm_is_that_of_the_last_step_whatever_that_was():
    run, plain = pair(max_grad_norm=0.5)
    graph = graph_of(run)
    run.eager(1)
    run.replay(graph, 2)
    for k in (1, 2):
        plain.eager(k)
    assert torch.equal(run.opt.grad_norm, plain.opt.grad_norm)


def test_a_group_can_be_added_after_a_capture():
    run, plain = pair()
    graph = graph_of(run)
    run.replay(graph, 1)
    plain.eager(1)
    for r in (run, plain):
        r.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        r.eager(2)
        r.opt.set_bounds(base_lr=0.002, max_lr=0.04)  # for the older graph too
    run.replay(graph, 3)
    plain.eager(3)
    assert_together(run, plain)


def test_a_step_at_rate_zero_stops_no_replay():
    run, plain = pair()
    graph = graph_of(run)
    for r in (run, plain):
        held = r.opt.param_groups[0]["lr"]
        r.opt.param_groups[0]["lr"] = 0.0
        for param in r.params:
            param.grad = torch.zeros_like(param)
        r.opt.step()
        r.opt.param_groups[0]["lr"] = held
    for k in (1, 2):
        run.replay(graph, k)
        plain.eager(k)
    assert_together(run, plain)


def test_bounds_written_from_outside_move_no_position_back():
    run, plain = pair()
    graph = graph_of(run)
    for k in (1, 2, 3):
        run.replay(graph, k)
        plain.eager(k)
    for r in (run, plain):
        r.opt.param_groups[0]["clr_max_lr"] = 0.02
        r.eager(4)
    assert_together(run, plain)


@pytest.mark.parametrize("asked", [False, True])
def test_a_group_added_beneath_us_moves_no_position_back(asked):
    run, plain = pair()
    graph = graph_of(run)
    for k in (1, 2, 3):
        run.replay(graph, k)
        plain.eager(k)
    for r in (run, plain):
        r.opt.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        assert not asked or r.opt.iteration == 4
        r.eager(4)
    assert_together(run, plain)


def test_bounds_written_from_outside_reach_lr_and_replays():
    """A question for the position takes the bounds in and writes them to the device."""
    run, plain = pair(capturable=True)[0], pair()[1]
    graph = graph_of(run)
    run.replay(graph, 1)
    plain.eager(1)
    for r in (run, plain):
        r.opt.param_groups[0]["clr_max_lr"] = 0.02
        assert r.opt.iteration == 2
    lr = run.opt.param_groups[0]["lr"].item()
    assert lr == pytest.approx(plain.opt.get_last_lr()[0], rel=1e-6)
    run.replay(graph, 2)
    plain.eager(2)
    for a, b in zip(run.params, plain.params, strict=True):
        assert torch.equal(a, b)


def test_a_load_beneath_us_counts_even_where_the_host_believes_to_be():
    run, _ = pair()
    saved = copy.deepcopy(run.opt.state_dict())
    graph = graph_of(run)
    for k in (1, 2, 3):
        run.replay(graph, k)
    run.opt.optimizer.load_state_dict(saved)
    assert run.opt.iteration == 1


def test_a_hook_registered_after_replays_fires_at_cycle_ends():
    run, plain = pair()
    graph = graph_of(run)
    for k in (1, 2):
        run.replay(graph, k)
        plain.eager(k)
    ends: list[int] = []
    for r in (run, plain):
        r.opt.register_cycle_end_hook(lambda opt: ends.append(opt.iteration))
        for k in range(3, 8):
            r.eager(k)
    assert ends == [6, 6]


def test_the_wrapped_step_after_replays_goes_on_where_they_were(monkeypatch):
    """No kernel serves a replaced step: it uses the device's rate, and the device counts it."""
    choose_triton(monkeypatch)  # a backend by name refuses a replaced step
    run, plain = pair(backend="auto", capturable=False)
    graph = graph_of(run)
    for k in (1, 2):
        run.replay(graph, k)
        plain.eager(k)
    for r in (run, plain):
        step = r.opt.optimizer.step
        r.opt.optimizer.step = lambda *args, step=step: step(*args)
        r.eager(3)
        del r.opt.optimizer.step
    assert run.opt.iteration == plain.opt.iteration == 4
    assert run.opt.get_last_lr() == plain.opt.get_last_lr()
    for a, b in zip(run.params, plain.params, strict=True):
        torch.testing.assert_close(a, b)


def test_lr_is_current_before_any_gradient():
    run = Run(BY_NAME["adam-wd"], capturable=True)
    run.opt.step()
    assert run.opt.param_groups[0]["lr"].item() == pytest.approx(run.opt.lr_at(1)[0], rel=1e-6)


def test_a_group_may_become_capturable():
    run, plain = pair()
    run.opt.param_groups[0]["capturable"] = True
    for k in (1, 2):
        run.eager(k)
        plain.eager(k)
    lr = run.opt.param_groups[0]["lr"]
    assert lr.item() == pytest.approx(plain.opt.get_last_lr()[0], rel=1e-6)
    graph = graph_of(run)
    run.replay(graph, 3)
    plain.eager(3)
    assert lr.item() == pytest.approx(plain.opt.get_last_lr()[0], rel=1e-6)


def test_the_scale_is_a_float32_whatever_the_default():
    """In float16 the scale would be infinite and the gradients 0."""
    amp, plain = Run(BY_NAME["sgd-wd"]), Run(BY_NAME["sgd-wd"])
    torch.set_default_dtype(torch.float16)
    try:
        for param, grad, shape in zip(amp.params, plain.draw(0), plain.params, strict=True):
            param.grad = grad.to(shape.dtype) * 2.0**17
            shape.grad = grad.to(shape.dtype)
        amp.opt.grad_scale = torch.tensor(2.0**17, dtype=torch.float32)
        amp.opt.found_inf = torch.zeros((), dtype=torch.float32)
        amp.opt.step()
        plain.opt.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_together(amp, plain)


def test_what_amp_launches_is_loaded_by_a_step_without():
    """A capture cannot load a kernel that was never launched."""
    from clr_optim.kernels.triton import gate

    launched: list[object] = []
    kernel = gate.open_gate

    class Noting:
        def __getitem__(self, grid: Any) -> Any:
            launched.append(grid)
            return kernel[grid]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "open_gate", Noting())
        Run(BY_NAME["adam-wd"]).eager(0)
    assert launched


def test_a_graph_keeps_what_it_writes_to():
    """A checkpoint's tensors replace the state that a graph was captured with."""
    run, _ = pair()
    saved = copy.deepcopy(run.opt.state_dict())
    graph = graph_of(run)
    graph.noted.clear()
    state = weakref.ref(run.opt.state[run.params[0]]["exp_avg"])
    run.opt.load_state_dict(saved)
    run.eager(1)
    gc.collect()
    assert state() is not None
