"""A step that is interrupted at any line happens whole or not at all.

Ctrl-C and signal handlers run between two lines of Python. A trace function plays them. At the n-th
line of our code within one step, for every n, it raises or saves a checkpoint as a handler would.
"""

from __future__ import annotations

import copy
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from internals import (
    act_before_native_steps,
    bare_native_backend,
    bare_step,
    plan_of,
    take_the_general_way,
)
from native_helpers import BY_NAME, assert_identical, drawn, members, parameters

import clr_optim
from clr_optim import CyclicalOptimizer, Ema, Spike
from clr_optim.plan.placement import Placement

OURS = str(Path(clr_optim.__file__).parent)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "cycled momentum": {"cycle_momentum": True},
    "gated and averaged": {"skip_above": Spike(1e6, window=4), "average": Ema(0.5)},
}


def make(name: str, **options: Any) -> Any:
    weights = parameters(drawn([(4, 3), (5,)], torch.float64))
    return BY_NAME[name].ours(weights, step_size_up=3, **options)


def gradients(opt: Any, seed: int) -> None:
    shapes = [p.shape for p in members(opt)]
    for p, grad in zip(members(opt), drawn(shapes, torch.float64, seed), strict=True):
        p.grad = grad


def at_line(number: int, act: Callable[[], None], step: Callable[[], object]) -> bool:
    """Run an action at the n-th line of our code within a step.

    Return whether there is such a line.
    """
    left = number

    def watch(frame: Any, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            left -= 1
            if left == -1:
                sys.settrace(None)
                act()
        return watch

    sys.settrace(watch)
    try:
        step()
    finally:
        sys.settrace(None)
    return left < 0


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted(number: int, step: Callable[[], object]) -> bool:
    """Interrupt a step at its n-th line. Return whether there is such a line."""
    try:
        return at_line(number, interrupt, step)
    except KeyboardInterrupt:
        return True
    finally:
        assert torch.is_grad_enabled()


def counters(opt: Any) -> set[float]:
    return {float(state["step"]) for state in opt.state.values() if "step" in state}


@pytest.fixture(params=["ordinary", "general"])
def way(request, monkeypatch):
    """The way that steps take, if nothing unusual happens."""
    if request.param == "general":
        take_the_general_way(monkeypatch)
    return request.param


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("started", [True, False], ids=["", "first step"])
@pytest.mark.parametrize("name", ["adam-wd", "sgd-mom"])
def test_ctrl_c_at_any_line_finds_the_step_done_or_not_begun(name, started, settings, way):
    done = {False: 0, True: 0}
    for number in range(10**6):
        opt, twin = (make(name, **SETTINGS[settings]) for _ in range(2))
        if started:
            for each in (opt, twin):
                gradients(each, 1)
                each.step()
        before = opt.iteration
        gradients(opt, 2)
        gradients(twin, 2)
        if not interrupted(number, opt.step):
            break
        # The groups must be right at once, since other code may save the wrapped optimizer.
        position = opt.param_groups[0]["clr_step"]
        assert opt.iteration == position
        assert position in (before, before + 1)
        done[position > before] += 1
        if position > before:
            twin.step()
        assert_identical(opt, twin)
        assert counters(opt) <= {float(position)}
        for each in (opt, twin):
            gradients(each, 3)
            each.step()
            gradients(each, 4)
            each.step()
        assert_identical(opt, twin)
        assert opt.iteration == twin.iteration
        assert opt.get_last_lr() == twin.get_last_lr()
        assert opt.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
    # After the one call of an ordinary step hardly a line is left.
    assert min(done.values()) > (0 if started and way == "ordinary" else 10), done


@pytest.mark.parametrize("take", ["step", "closure"])
@pytest.mark.parametrize("started", [True, False], ids=["", "first step"])
def test_ctrl_c_moves_averages_of_torchs_own_step_once(started, take):
    done = {False: 0, True: 0}
    for number in range(10**6):
        opt, twin = (make("adam-wd", backend="torch", average=Ema(0.5)) for _ in range(2))
        for each in (opt, twin) if started else ():
            gradients(each, 1)
            each.step()
        before = opt.iteration
        gradients(opt, 2)
        gradients(twin, 2)

        def act(opt=opt):
            return opt.step() if take == "step" else opt.step(lambda: 0.0)

        if not interrupted(number, act):
            break
        done[opt.iteration > before] += 1
        if opt.iteration > before:
            twin.step()
        assert_identical(opt, twin)
        for each in (opt, twin):
            gradients(each, 3)
            each.step()
        assert_identical(opt, twin)
    assert min(done.values()) > 10, done


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ctrl_c_within_the_exchange_with_averages_loses_nothing(dtype):
    memory = torch.randn(6).to(dtype)
    weights = [torch.nn.Parameter(memory), torch.nn.Parameter(memory[2:4])]
    average = Ema(0.5, dtype=torch.float32)
    opt = CyclicalOptimizer(torch.optim.SGD(weights, lr=0.1), average=average)
    for _ in range(3):
        for p in weights:
            p.grad = torch.randn_like(p)
        opt.step()

    def tensors() -> list[torch.Tensor]:
        found = [*weights, *(opt.state[p]["clr_average"] for p in weights)]
        return [each.detach().clone() for each in found]

    own = tensors()

    def enter() -> None:
        block = opt.averaged()
        block.__enter__()
        sys.settrace(None)  # the next test interrupts the way back
        block.__exit__(None, None, None)

    for number in range(10**6):
        was_interrupted = interrupted(number, enter)
        assert all(map(torch.equal, tensors(), own)), number
        if not was_interrupted:
            break
    assert number > 20


def test_ctrl_c_while_parameters_come_back_is_raised_after_all_are_back():
    opt = make("adam-wd", average=Ema(0.5))
    for seed in (1, 2, 3):
        gradients(opt, seed)
        opt.step()
    own = [p.detach().clone() for p in members(opt)]
    copies, calls = torch.Tensor.clone, []

    def failing(tensor, *args, **kwargs):
        calls.append(tensor)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return copies(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt), opt.averaged():
        patch.setattr(torch.Tensor, "clone", failing)
    assert len(calls) == 1 + len(own)
    assert all(map(torch.equal, own, members(opt)))
    opt.step()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_two_interrupts_in_one_step(settings):
    """The second interrupt comes while the first is handled."""
    first = 0
    while True:
        second = 0
        while True:
            opt, twin = (make("adam-wd", **SETTINGS[settings]) for _ in range(2))
            for each in (opt, twin):
                gradients(each, 1)
                each.step()
            gradients(opt, 2)
            hits = []

            def watch(frame, event, _, counts=[first, second], hits=hits):  # noqa: B006
                if not frame.f_code.co_filename.startswith(OURS):
                    return None
                if event == "line" and len(hits) < 2:
                    counts[len(hits)] -= 1
                    if counts[len(hits)] < 0:
                        hits.append(frame.f_lineno)
                        if len(hits) == 1:
                            # An exception ends tracing. The next interrupt needs another trace.
                            sys.settrace(watch)
                        raise KeyboardInterrupt
                return watch

            sys.settrace(watch)
            try:
                opt.step()
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            position = opt.iteration
            assert position in (1, 2)
            if position == 2:
                gradients(twin, 2)
                twin.step()
            assert_identical(opt, twin)
            for each in (opt, twin):
                gradients(each, 3)
                each.step()
            assert_identical(opt, twin)
            assert opt.iteration == twin.iteration
            if len(hits) < 2:
                break
            second += 1
        if not hits:
            break
        first += 7  # the other test interrupts at each line once


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["adam-wd", "sgd-mom"])
def test_a_handler_that_saves_at_any_line_saves_one_consistent_step(name, settings):
    saved_at = set()
    number = 0
    while True:
        opt, twin = (make(name, **SETTINGS[settings]) for _ in range(2))
        for each in (opt, twin):
            gradients(each, 1)
            each.step()
        values = {}
        for step in (1, 2):
            values[step] = [p.detach().clone() for p in members(twin)], twin.get_last_lr()
            gradients(twin, 2)
            twin.step()
        gradients(opt, 2)
        found: list[Any] = []

        def save(opt=opt, found=found):
            found.append((copy.deepcopy(opt.state_dict()), opt.iteration))
            found.append([p.detach().clone() for p in members(opt)])

        if not at_line(number, save, opt.step):
            break
        (checkpoint, position), params = found
        saved_at.add(position)
        right, rates = values[position]
        assert all(map(torch.equal, params, right))
        assert [g["clr_step"] for g in checkpoint["param_groups"]] == [position]
        assert [g["lr"] for g in checkpoint["param_groups"]] == rates
        assert {float(s.get("step", position)) for s in checkpoint["state"].values()} == {position}
        # And the step goes on as if the handler had asked nothing.
        assert opt.iteration == opt.param_groups[0]["clr_step"] == 2
        for each, seeds in ((opt, (2, 3)), (twin, (3,))):
            for seed in seeds[each is opt :]:
                gradients(each, seed)
                each.step()
        number += 1
    assert saved_at == {1, 2}


@pytest.mark.parametrize("name", ["adam-wd", "sgd-mom"])
def test_a_handler_that_steps_at_any_line_of_an_ordinary_step_adds_one_step(name):
    for number in range(10**6):
        opt, twin = (make(name) for _ in range(2))
        for each in (opt, twin):
            gradients(each, 1)
            each.step()
            gradients(each, 2)
        if not at_line(number, opt.step, opt.step):
            break
        for _ in range(2):
            twin.step()
        assert opt.iteration == twin.iteration, number
        assert_identical(opt, twin)
        for each in (opt, twin):
            gradients(each, 3)
            each.step()
        assert_identical(opt, twin)
    assert number > 10


def test_a_handler_that_steps_while_a_plan_is_built(monkeypatch):
    """It creates the state that the plan would have created."""
    weights = parameters(drawn([(3,), (2,)], torch.float64))
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.Adam(weights, lr=1.0, eps=0.0)
    backend = bare_native_backend(optimizer)
    place_all = Placement.place_all

    def interrupted(placement: Placement, why: str | None) -> None:
        place_all(placement, why)
        monkeypatch.setattr(Placement, "place_all", place_all)
        backend.plan.refresh()
        bare_step(backend, 0.5)

    monkeypatch.setattr(Placement, "place_all", interrupted)
    backend.plan.refresh()
    bare_step(backend, 0.5)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    assert [len(bucket.rows) for bucket in backend.plan.buckets] == [2]


def test_ctrl_c_within_a_scan_is_raised_before_anything_has_changed():
    opt, twin = (make("adam-wd") for _ in range(2))
    for each in (opt, twin):
        for seed in (1, 2, 3):
            gradients(each, seed)
            each.step()
        gradients(each, 4)

    class Interrupted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Interrupted():
        opt.step()
    assert_identical(opt, twin)
    assert opt.iteration == twin.iteration == 3
    for each in (opt, twin):
        each.step()
    assert_identical(opt, twin)


def step(opt: Any) -> None:
    opt.step()


def step_with_closure(opt: Any) -> None:
    opt.step(lambda: 0.0)


def step_with_tensor_rates(opt: Any) -> None:
    for group in opt.param_groups:
        if not isinstance(group["lr"], torch.Tensor):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    opt.step()


@pytest.mark.usefixtures("way")
@pytest.mark.filterwarnings("ignore:lr was written from outside")
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("take", [step, step_with_closure, step_with_tensor_rates])
@pytest.mark.parametrize("change", ["position", "bounds"])
def test_a_handler_that_changes_the_course_within_a_step_is_obeyed(change, take, backend):
    number = 0
    while True:
        opt = make("sgd-mom", backend=backend)
        gradients(opt, 1)
        opt.step()
        top = 2 * opt.param_groups[0]["clr_max_lr"]

        def act(opt=opt, top=top):
            if change == "position":
                opt.set_iteration(10)
            else:
                opt.set_bounds(max_lr=top)

        if not at_line(number, act, lambda opt=opt: take(opt)):
            break
        # The running step counts as taken if the handler came before the kernel.
        assert opt.iteration in ((10, 11) if change == "position" else (2,))
        (group,) = opt.param_groups
        assert group["clr_step"] == opt.iteration
        assert change == "position" or group["clr_max_lr"] == top
        assert [float(group["lr"])] == opt.get_last_lr() == opt.lr_at(opt.iteration)
        number += 1
    assert number > 50


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("beneath", [False, True], ids=["", "into the wrapped optimizer"])
def test_ctrl_c_at_any_line_of_adding_a_group_loses_no_group(beneath, backend):
    number = 0
    while True:
        opt = make("sgd-mom", backend=backend, cycle_momentum=True)
        gradients(opt, 1)
        opt.step()
        extra = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

        def add(opt=opt, extra=extra):
            adding = opt.optimizer if beneath else opt
            adding.add_param_group({"params": [extra], "lr": 0.8})
            opt.step()

        gradients(opt, 2)
        if not interrupted(number, add):
            break
        taken = opt.iteration
        for k in range(3):
            gradients(opt, 3 + k)
            opt.step()
        assert opt.iteration == taken + 3
        assert [group["clr_step"] for group in opt.param_groups] == [taken + 3] * len(
            opt.param_groups
        )
        assert [group["lr"] for group in opt.param_groups] == opt.lr_at(taken + 3)
        number += 1
    assert number > 100


@pytest.mark.parametrize("name", ["adam-wd", "sgd-mom"])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_a_step_marks_its_parameters_as_changed_once(name, rate):
    opt = make(name)
    for group in opt.param_groups:
        group["lr"] = copy.copy(rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in (1, 2):
            gradients(opt, seed)
            opt.step()
    before = [p._version for p in members(opt)]
    gradients(opt, 3)
    opt.step()
    assert [p._version for p in members(opt)] == [version + 1 for version in before]


def test_an_exception_in_the_middle_leaves_no_gradient_held(way):
    opt = make("adam-wd")
    gradients(opt, 1)
    opt.step()
    for number in range(0, 200, 5 if way == "general" else 1):
        gradients(opt, 2)
        held = [weakref.ref(p.grad) for p in members(opt)]
        if not interrupted(number, opt.step):
            break
        opt.step()
        opt.zero_grad()
        assert [grad() for grad in held] == [None] * len(held)
    assert number > (10 if way == "ordinary" else 50)


# ---- what a step takes in, and what it borrows


def latecomers(name: str) -> tuple[Any, list[torch.nn.Parameter]]:
    """Return an optimizer that has stepped two parameters and then gets something new."""
    weights = parameters(drawn([(3,)] * 6, torch.float64))
    opt = BY_NAME["adam-wd"].ours(weights[:4], step_size_up=3)
    for p in weights[:2]:
        p.grad = torch.ones_like(p)
    opt.step()
    if name == "first gradients":
        weights = weights[:4]
    elif name == "appended parameters":
        opt.param_groups[0]["params"] += weights[4:]
    elif name == "a group beneath":
        opt.optimizer.add_param_group({"params": weights[4:]})
    elif name == "a setting":
        opt.param_groups[0]["weight_decay"] = 0.5
        weights = weights[:2]
    else:
        weights[0].data = weights[0].detach().clone()
        weights = weights[:2]
    for p in weights:
        p.grad = torch.ones_like(p)
    return opt, weights


@pytest.mark.parametrize(
    "name",
    ["first gradients", "appended parameters", "a group beneath", "a setting", "moved memory"],
)
def test_ctrl_c_while_a_plan_takes_something_in(name):
    number = 0
    while True:
        opt, weights = latecomers(name)
        before = opt.iteration
        if not interrupted(number, opt.step):
            break
        more = opt.iteration - before
        for _ in range(2):
            opt.step()
        taken = [float(opt.state[p]["step"]) for p in weights]
        assert taken == [(1 if i < 2 else 0) + more + 2 for i in range(len(weights))], number
        number += 1
    assert number > 100


@pytest.mark.parametrize("clip", [None, 1e9], ids=["", "clipped"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_ctrl_c_takes_no_gradient_away(backend, clip):
    """Beside a kernel, torch's own step has gradients hidden or replaced by copies."""
    number = 0
    while True:
        weights = parameters(drawn([(2, 3)] * 4, torch.float64))
        opt = BY_NAME["sgd-mom"].ours(weights, max_grad_norm=clip, backend=backend)
        for i, p in enumerate(weights):
            p.grad = torch.ones(3, 2, dtype=p.dtype).t() if i < 2 else torch.ones_like(p)
        opt.step()
        grads = [p.grad for p in weights]
        if not interrupted(number, opt.step):
            break
        assert all(p.grad is grad for p, grad in zip(weights, grads, strict=True)), number
        number += 1
    assert number > 50


@pytest.mark.parametrize("clip", [None, 1e9], ids=["", "clipped"])
def test_ctrl_c_after_torchs_own_step_counts_it(clip):
    """An interrupt within torch's step leaves what it leaves in torch.

    After the step it is counted.
    """
    number = 0
    while True:
        (weight,) = parameters(drawn([(3,)], torch.float64))
        opt = BY_NAME["adam"].ours([weight], max_grad_norm=clip, backend="torch")
        weight.grad = torch.ones_like(weight)
        opt.step()
        if not interrupted(number, opt.step):
            break
        steps = float(opt.state[weight]["step"])
        assert opt.iteration == opt.param_groups[0]["clr_step"] == steps, number
        number += 1
    assert number > 50


def test_a_finalizer_that_steps_is_refused_and_hangs_nothing():
    opt = make("sgd-mom")
    gradients(opt, 1)
    opt.step()
    gradients(opt, 2)
    calls: list[Any] = []

    def finalizer() -> None:
        try:
            opt.step()
        except RuntimeError as error:
            calls.append(error)

    for p in members(opt):
        weakref.finalize(p.grad, finalizer)
        p.grad.add_(0)  # now only the step holds it

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        act_before_native_steps(patch, lambda backend: opt.zero_grad())
        opt.step()
    assert len(calls) == 2
    assert "within a step of the same optimizer" in str(calls[0])
    assert opt.iteration == 2


def test_a_finalizer_that_steps_while_a_plan_lets_go_of_gradients():
    """The finalizer would wake idle parameters, and so move the list that is being emptied."""
    weights = parameters(drawn([(3,)] * 40, torch.float64))
    opt = BY_NAME["adam-wd"].ours(weights, step_size_up=3)
    for p in weights[:2]:
        p.grad = torch.ones_like(p)
    opt.step()
    calls: list[Any] = []

    def finalizer() -> None:
        for p in weights:
            p.grad = torch.ones_like(p)
        try:
            opt.step()
        except RuntimeError as error:
            calls.append(error)

    plan = plan_of(opt)
    plan.refresh()
    weakref.finalize(weights[0].grad, finalizer)
    for p in weights[:2]:
        p.grad = None
    plan.release()
    assert len(calls) == 1
    opt.step()
    assert opt.iteration == 2
    assert counters(opt) == {1.0, 2.0}
