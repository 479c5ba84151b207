"""What a loop may do around steps in backward: hooks, handles, closures, scalers and threads."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backward_helpers import Network, Twins, adamw
from native_helpers import assert_identical, members
from torch import nn

from clr_optim import CyclicalOptimizer, Ema
from clr_optim.schedule import triangular

# ---- gradients that come too often


def test_a_second_gradient_is_refused_before_any_write():
    model = Network()
    opt = adamw(model)
    opt.step_in_backward()
    model.loss(0).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"second gradient before step\(\)"):
        model.loss(1).backward()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    late = [p for p in model.parameters() if p.grad is not None]
    assert len(late) == 1
    with pytest.raises(RuntimeError, match=r"second gradient before step\(\)"):
        opt.step()
    assert opt.iteration == 0
    opt.zero_grad()
    opt.step()
    assert opt.iteration == 1
    model.loss(1).backward()
    opt.step()


# ---- the handle and the hooks


def test_a_handle_undoes_the_call():
    twins = Twins(adamw)
    twins.step(0)
    twins.handle.remove()
    twins.model.loss(1).backward()
    assert twins.model.first.weight.grad is not None
    twins.opt.zero_grad()
    for k in range(1, 4):
        twins.opt.zero_grad()
        twins.step(k)
    twins.opt.zero_grad()
    with twins.opt.step_in_backward():
        twins.handle.remove()  # an old handle removes nothing
        twins.model.loss(4).backward()
        assert twins.model.first.weight.grad is None
    # The pass ends with a step, also if the hooks are gone.
    twins.ordinary.zero_grad()
    twins.other.loss(4).backward()
    for opt in (twins.opt, twins.ordinary):
        opt.step()
    twins.compare()


def test_averages_move_once_if_the_handle_is_removed_within_a_pass():
    twins = Twins(lambda model: adamw(model, average=Ema(0.5)))
    for k in range(3):
        twins.step(k)
    twins.model.loss(3).backward()
    twins.handle.remove()
    twins.ordinary.zero_grad()
    twins.other.loss(3).backward()
    for opt in (twins.opt, twins.ordinary):
        opt.step()
    twins.compare()


def test_the_hooks_do_not_keep_the_optimizer():
    model = Network()
    opt = adamw(model)
    opt.step_in_backward()
    model.loss(0).backward()
    opt.step()
    shared, state = weakref.ref(opt._shared), opt.state
    kept = [weakref.ref(opt), weakref.ref(opt.optimizer), shared]
    gc.collect()
    gc.disable()
    try:
        del opt, state
        assert [each() for each in kept] == [None] * 3
    finally:
        gc.enable()
    before = copy.deepcopy(model.state_dict())
    model.loss(1).backward()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert model.first.weight.grad is not None


def test_the_model_is_freed_with_the_optimizer():
    model = Network()
    opt = adamw(model)
    handle = opt.step_in_backward()
    model.loss(0).backward()
    opt.step()
    kept = weakref.ref(model.first.weight)
    del model, opt
    gc.collect()
    assert kept() is None
    handle.remove()


def test_the_users_hooks_see_the_gradient_if_they_come_first():
    model, seen = Network(), []
    model.first.weight.register_post_accumulate_grad_hook(
        lambda p: seen.append(("before", p.grad is None))
    )
    opt = adamw(model)
    opt.step_in_backward()
    model.first.weight.register_post_accumulate_grad_hook(
        lambda p: seen.append(("after", p.grad is None))
    )
    opt.register_step_post_hook(lambda *_: seen.append(("step", opt.iteration)))
    opt.register_cycle_end_hook(lambda opt: seen.append(("end", opt.iteration)))
    for k in range(6):
        model.loss(k).backward()
        opt.step()
    assert seen[:3] == [("before", False), ("after", True), ("step", 1)]
    assert seen[-2:] == [("end", 6), ("step", 6)]
    assert [each for each in seen if each[0] == "end"] == [("end", 6)]


def test_no_gradient_is_alive_after_its_update():
    """The peak of live gradients is that of one layer, not that of the model."""

    def peak(in_backward: bool) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(12)))
        found: list[int] = []
        size = 64 * 64 * 4

        def note(_: Any) -> None:
            found.append(sum(size for p in model.parameters() if p.grad is not None))

        opt = adamw(model)
        model(torch.ones(2, 64)).sum().backward()
        opt.step()
        opt.zero_grad()
        if in_backward:
            opt.step_in_backward()
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(note)
        model(torch.ones(2, 64)).sum().backward()
        assert len(found) == 12
        return max(found)

    assert peak(False) == 12 * 64 * 64 * 4
    assert peak(True) == 0


def test_a_gradient_is_freed_by_its_update():
    weight = nn.Parameter(torch.ones(4))
    opt = CyclicalOptimizer(torch.optim.SGD([weight], lr=0.1))
    kept: list[Any] = []
    weight.register_post_accumulate_grad_hook(lambda p: kept.append(weakref.ref(p.grad)))
    opt.step_in_backward()
    for _ in range(2):
        (weight * torch.ones(4)).sum().backward()
        assert kept.pop()() is None
        opt.step()


# ---- whatever else a loop does


def test_a_closure_whose_backward_updates():
    twins = Twins(adamw)
    for k in range(8):
        for model, opt in ((twins.model, twins.opt), (twins.other, twins.ordinary)):

            def closure(model=model, opt=opt, k=k):
                opt.zero_grad()
                loss = model.loss(k)
                loss.backward()
                return loss

            assert opt.step(closure) is not None
        assert twins.model.first.weight.grad is None
        twins.compare()


def test_a_grad_scaler_is_refused():
    model = Network()
    opt = adamw(model)
    handle = opt.step_in_backward()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model.loss(0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(opt)
    handle.remove()
    assert not getattr(opt, "_step_supports_amp_scaling", False)


def test_a_disabled_grad_scaler_steps():
    twins = Twins(adamw)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    twins.ordinary.zero_grad()
    for model, opt in ((twins.model, twins.opt), (twins.other, twins.ordinary)):
        scaler.scale(model.loss(0)).backward()
        scaler.step(opt)
    twins.compare()


@pytest.mark.filterwarnings("ignore:lr was written from outside")
def test_a_rate_that_other_code_wrote_is_overruled_before_the_pass():
    twins = Twins(adamw)
    twins.step(0)
    for opt in (twins.opt, twins.ordinary):
        opt.param_groups[0]["lr"] = 5.0
    twins.model.loss(1).backward()
    twins.ordinary.zero_grad()
    twins.other.loss(1).backward()
    for opt in (twins.ordinary, twins.opt):
        opt.step()
    twins.compare()


def test_a_setting_that_other_code_changes_between_steps():
    twins = Twins(adamw)
    for k in range(6):
        for opt in (twins.opt, twins.ordinary):
            opt.param_groups[0]["weight_decay"] = 0.1 * k
            opt.param_groups[0]["betas"] = (0.5 + 0.05 * k, 0.9)
        twins.step(k)


def test_a_scale_fn_that_raises_changes_nothing():
    def fails(x: float) -> float:
        if x >= 2:
            raise ArithmeticError("no scale")
        return 1.0

    model = Network()
    opt = CyclicalOptimizer(torch.optim.AdamW(model.parameters()), step_size_up=1, scale_fn=fails)
    opt.step_in_backward()
    model.loss(0).backward()
    opt.step()
    before = copy.deepcopy(model.state_dict())
    loss = model.loss(1)
    with pytest.raises(ArithmeticError):
        loss.backward()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_a_pass_within_averaged_is_refused():
    model = Network()
    opt = adamw(model, average=Ema(0.5))
    opt.step_in_backward()
    for k in range(3):
        model.loss(k).backward()
        opt.step()
    with opt.averaged(), pytest.raises(RuntimeError, match=r"averaged\(\)"):
        model.loss(3).backward()
    model.zero_grad()
    model.loss(3).backward()
    opt.step()


def test_parameters_that_other_code_replaces_in_mid_training():
    twins = Twins(adamw)
    for k in range(8):
        for model in (twins.model, twins.other):
            if k == 3:
                model.first.weight.data = model.first.weight.data.clone()
            if k == 5:
                model.last.weight.data = torch.zeros(1, 5)
        for opt, model in ((twins.opt, twins.model), (twins.ordinary, twins.other)):
            if k == 6:
                opt.state[model.last.weight] = copy.deepcopy(opt.state[model.last.weight])
            if k == 7:
                opt.state[model.last.bias]["exp_avg"] = torch.zeros(1)
        twins.step(k)


def test_a_parameter_that_has_left_the_optimizer_is_freed():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = CyclicalOptimizer(torch.optim.SGD(weights))
    opt.step_in_backward()
    left = weakref.ref(weights[0])
    for _ in range(2):
        for k in range(2):
            (weights[0].sum() * k + weights[1].sum()).backward()
            opt.step()
        weights[0] = opt.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3))
        opt.state.clear()
    weights[1].sum().backward()
    opt.step()
    gc.collect()
    assert left() is None


def test_a_compiled_function_that_calls_backward():
    twins = Twins(adamw)
    x = torch.ones(6, 3)

    @torch.compile(backend="eager")
    def train() -> None:
        twins.model(x).square().mean().backward()

    for _ in range(3):
        train()
        assert twins.model.first.weight.grad is None
        twins.opt.step()
        twins.ordinary.zero_grad()
        twins.other(x).square().mean().backward()
        twins.ordinary.step()
        twins.compare()


def test_a_step_that_is_replaced_within_a_pass_does_not_end_it():
    twins = Twins(functools.partial(adamw, average=Ema(0.5)))
    twins.step(0)
    twins.model.loss(1).backward()
    inner = twins.opt.optimizer
    inner.step = functools.partial(type(inner).step, inner)
    with pytest.raises(RuntimeError, match=r"cannot end this backward pass: .*as it was"):
        twins.opt.step()
    del inner.step
    twins.opt.step()
    twins.ordinary.zero_grad()
    twins.other.loss(1).backward()
    twins.ordinary.step()
    twins.compare()


REPLACEMENTS: dict[str, Callable[[Any, Any], object]] = {
    "popped": lambda opt, p: opt.state.pop(p),
    "replaced": lambda opt, p: opt.state.update({p: copy.deepcopy(opt.state[p])}),
    "loaded": lambda opt, _: opt.optimizer.load_state_dict(copy.deepcopy(plain_state(opt))),
}


def plain_state(opt: Any) -> dict[str, Any]:
    return torch.optim.Optimizer.state_dict(opt.optimizer)


@pytest.mark.parametrize("what", REPLACEMENTS)
def test_state_that_other_code_replaces_within_a_pass(what):
    """A hook replaces the state of a parameter whose gradient comes later in the pass."""
    twins = Twins(adamw)
    replace = REPLACEMENTS[what]
    waits = [True]

    def hook(_: object) -> None:
        if not waits:
            replace(twins.opt, twins.model.first.weight)
            waits.append(True)

    twins.handle.remove()
    twins.model.last.weight.register_post_accumulate_grad_hook(hook)
    twins.opt.step_in_backward()
    for k in range(4):
        twins.step(k)
    waits.clear()
    twins.model.loss(4).backward()
    assert waits
    twins.ordinary.zero_grad()
    twins.other.loss(4).backward()
    replace(twins.ordinary, twins.other.first.weight)
    for opt in (twins.opt, twins.ordinary):
        opt.step()
    twins.compare()
    for k in range(5, 8):
        twins.step(k)


def test_two_threads_have_backward_passes_of_two_models():
    """The lock keeps one update from running into the other."""
    parts = [Network(width=200), Network(width=200)]
    others = copy.deepcopy(parts)
    opt, ordinary = (adamw(nn.ModuleList(models)) for models in (parts, others))
    opt.step_in_backward()
    for k in range(6):
        failed: list[BaseException] = []

        def run(model: Any, k: int = k, failed: list[BaseException] = failed) -> None:
            torch.set_num_threads(1)  # each thread has its number, and sums depend on that
            try:
                model.loss(k).backward()
            except BaseException as error:
                failed.append(error)

        workers = [threading.Thread(target=run, args=(model,)) for model in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failed
        ordinary.zero_grad()
        for model in others:
            model.loss(k).backward()
        opt.step()
        ordinary.step()
        assert_identical(opt, ordinary)


# ---- what is refused


def _ours(**options: Any) -> CyclicalOptimizer[Any]:
    return CyclicalOptimizer(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1), **options)


def _active() -> CyclicalOptimizer[Any]:
    opt = _ours()
    opt.step_in_backward()
    return opt


#: by what is wrong: the call, the error, and what its message must say. For wrong_input.py too.
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "max_grad_norm=1.0": (
        lambda: _ours(max_grad_norm=1.0).step_in_backward(), ValueError, "max_grad_norm=1.0"),
    "skip_above=5.0": (
        lambda: _ours(skip_above=5.0).step_in_backward(), ValueError, "skip_above=5.0"),
    'backend="torch"': (
        lambda: _ours(backend="torch").step_in_backward(), ValueError, "backend='torch'"),
    "around an Adafactor": (
        lambda: CyclicalOptimizer(
            torch.optim.Adafactor(nn.Linear(2, 1).parameters(), lr=0.1)
        ).step_in_backward(), ValueError, "no fused kernel"),
    "gradients_are_reduced=1": (
        lambda: _ours().step_in_backward(gradients_are_reduced=1),  # type: ignore[arg-type]
        TypeError, "gradients_are_reduced must be True or False"),
    "a second call": (
        lambda: _active().step_in_backward(), RuntimeError, "in effect already"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_right_is_refused(what):
    call, error, text = REFUSED[what]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_above": 5.0}], ids=str)
def test_a_refused_call_changes_nothing(options):
    opt = _ours(**options)
    with pytest.raises(ValueError, match="construct the optimizer without"):
        opt.step_in_backward()
    assert not any(p._post_accumulate_grad_hooks for p in members(opt))
    assert "backward" not in opt.explain()


def test_explain_tells_which_parameters_keep_their_gradients():
    twins = Twins(adamw)
    assert twins.opt.explain().splitlines()[1:] == [
        "in backward: 5 parameter tensors, updated by their hooks",
        "in step(): 2 parameter tensors, which keep their gradients: "
        "it gets a hook in the step after its first gradient",
    ]
    twins.handle.remove()
    assert "backward" not in twins.opt.explain()


def test_a_warmup_schedule_and_the_schedules_of_settings_end_with_the_pass():
    schedules = {"weight_decay": triangular(3, base_lr=0.0, max_lr=0.2)}
    twins = Twins(lambda model: adamw(model, schedules=schedules, average="cycle_end"))
    for k in range(20):
        twins.step(k)
    with twins.opt.averaged(), twins.ordinary.averaged():
        assert all(map(torch.equal, twins.model.parameters(), twins.other.parameters()))
