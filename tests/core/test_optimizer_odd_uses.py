"""Rare uses that work with a plain optimizer also work with ours."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from list_config import ListConfig
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from clr_optim import CyclicalOptimizer


def weight(fill=1.0):
    return torch.nn.Parameter(torch.full((3,), fill))


def step(opt, *params):
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()


def stepped(make, **options):
    param = weight()
    opt = CyclicalOptimizer(make([param]), **options)
    step(opt, param)
    return param, opt


def adam(params):
    return torch.optim.Adam(params, lr=0.4)


BACKENDS = ["native", "torch"]


# ---- what was saved loads


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_given_twice_resumes(backend):
    """Tied weights are listed once for each layer that uses them."""
    param, other = weight(), weight()
    opt = CyclicalOptimizer(torch.optim.AdamW([param, other, param], lr=0.1), backend=backend)
    step(opt, param, other)
    saved = copy.deepcopy(opt.state_dict())
    step(opt, param, other)
    expected = [param.detach().clone(), other.detach().clone()]
    again = [weight(), weight()]
    resumed = CyclicalOptimizer(torch.optim.AdamW([*again, again[0]], lr=0.1), backend=backend)
    start = CyclicalOptimizer(
        torch.optim.AdamW([*(first := [weight(), weight()]), first[0]], lr=0.1), backend=backend
    )
    step(start, *first)
    for param, first_param in zip(again, first, strict=True):
        param.data.copy_(first_param.data)
    resumed.load_state_dict(saved)
    step(resumed, *again)
    assert all(map(torch.equal, again, expected))


def test_one_number_for_two_parameters_is_refused_still():
    _, opt = stepped(adam)
    opt.add_param_group({"params": [weight()]})
    saved = opt.state_dict()
    saved["param_groups"][1]["params"] = [0]
    with pytest.raises(ValueError, match=r"\['params'\] has 0 again, and each parameter"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_of_no_parameter_goes_with_the_rest(backend):
    param, opt = stepped(adam, backend=backend)
    opt.state["global_step"] = 5
    step(opt, param)
    saved = opt.state_dict()
    _, resumed = stepped(adam, backend=backend)
    resumed.load_state_dict(saved)
    assert resumed.state["global_step"] == 5
    resumed.state["mine"] = saved["state"]["mine"] = {}
    resumed.load_state_dict(saved)
    saved["state"][7] = saved["state"].pop(0)
    with pytest.raises(ValueError, match=r"\['state'\]\[7\] belongs to no parameter"):
        resumed.load_state_dict(saved)


# ---- momentum of a run that began without it


def rmsprop(params):
    return torch.optim.RMSprop(params, lr=0.1)


def test_momentum_that_cannot_begin_in_mid_run_is_refused_before():
    param = weight()
    plain = rmsprop([param])
    step(plain, param)
    saved = copy.deepcopy(plain.state_dict())
    with pytest.raises(
        ValueError, match=r"cycle_momentum=True needs the state \['momentum_buffer'\]"
    ):
        CyclicalOptimizer(plain, cycle_momentum=True)
    assert set(plain.param_groups[0]) == set(saved["param_groups"][0])
    step(CyclicalOptimizer(plain), param)
    plain.state.clear()
    step(CyclicalOptimizer(plain, cycle_momentum=True), param)

    fresh = CyclicalOptimizer(rmsprop([weight()]), cycle_momentum=True)
    with pytest.raises(ValueError, match=r"lacks \['momentum_buffer'\]"):
        fresh.load_state_dict(saved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sgd_begins_momentum_in_mid_run(backend):
    param = weight()
    plain = torch.optim.SGD([param], lr=0.1)
    step(plain, param)
    step(CyclicalOptimizer(plain, cycle_momentum=True, backend=backend), param)


# ---- optimizers that users write


def test_zero_grad_as_the_wrapped_one_has_it():
    class Takes(torch.optim.SGD):
        def zero_grad(self):
            super().zero_grad(set_to_none=False)

    class ByName(torch.optim.SGD):
        def zero_grad(self, *, set_to_none=False):
            super().zero_grad(set_to_none=set_to_none)

    for kind in (Takes, ByName):
        param, opt = stepped(lambda params, kind=kind: kind(params, lr=0.1))
        opt.zero_grad()
        assert torch.equal(param.grad, torch.zeros(3))
    opt.zero_grad(set_to_none=True)
    assert param.grad is None
    param, opt = stepped(adam)
    opt.zero_grad(False)
    assert torch.equal(param.grad, torch.zeros(3))
    opt.zero_grad()
    assert param.grad is None


# ---- the scheduler's view


def test_the_view_says_the_same_to_every_holder():
    param, opt = stepped(adam, step_size_up=4)
    assert opt.scheduler.get_last_lr() == [0.1]
    held = opt.scheduler
    step(opt, param)
    assert held.get_last_lr() == opt.scheduler.get_last_lr() == [pytest.approx(0.175)]
    held.step()
    del held
    assert opt.scheduler.get_last_lr() == opt.get_last_lr() == [pytest.approx(0.25)]


def test_after_a_change_of_course_the_view_shows_no_rate_that_never_was():
    param, opt = stepped(adam, step_size_up=4)
    held = opt.scheduler
    opt.set_bounds(max_lr=4.0)
    assert held.get_last_lr() == opt.get_last_lr()
    step(opt, param)
    assert held.get_last_lr() == opt.lr_at(1)
    opt.set_iteration(7)
    assert held.get_last_lr() == opt.get_last_lr() == opt.lr_at(7)
    saved = opt.state_dict()
    step(opt, param)
    opt.load_state_dict(saved)
    assert held.get_last_lr() == opt.lr_at(7)
    assert copy.deepcopy(opt).scheduler.get_last_lr() == opt.lr_at(7)


def test_the_view_in_a_sequence_of_torchs():
    param, opt = stepped(adam, step_size_up=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LinearLR writes rates, and is overruled
        sequence = SequentialLR(opt, [LinearLR(opt), opt.scheduler], milestones=[2])
        for _ in range(4):
            step(opt, param)
            sequence.step()
    assert sequence.get_last_lr() == opt.get_last_lr()


# ---- groups that other code removes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cycle_momentum", [False, True])
def test_groups_may_be_taken_away_and_come_again(backend, cycle_momentum):
    _, opt = stepped(adam, backend=backend, cycle_momentum=cycle_momentum)
    opt.param_groups.clear()
    opt.step()
    param = weight()
    opt.add_param_group({"params": [param]})
    step(opt, param)
    assert not torch.equal(param, torch.ones(3))
    if cycle_momentum:
        assert opt.param_groups[0]["clr_max_momentum"] == 0.9


# ---- a rate in mid-schedule


def test_a_rate_that_a_scheduler_left_is_no_top_without_a_word():
    plain = torch.optim.SGD([param := weight()], lr=0.1)
    scheduler = CosineAnnealingLR(plain, 10)
    assert CyclicalOptimizer(copy.deepcopy(plain)).lr_at(2000) == [0.1]  # it has not begun
    for _ in range(9):
        step(plain, param)
        scheduler.step()
    top = plain.param_groups[0]["lr"]
    assert CyclicalOptimizer(copy.deepcopy(plain), max_lr=0.1).lr_at(2000) == [0.1]
    with pytest.warns(UserWarning, match=r"from the initial_lr 0\.1, .*as max_lr=0\.1") as caught:
        opt = CyclicalOptimizer(plain)
    assert caught[0].filename == __file__
    assert opt.lr_at(2000) == [pytest.approx(top)]
    assert CyclicalOptimizer(plain).lr_at(2000) == [pytest.approx(top)]  # it is remembered


@pytest.mark.parametrize("name", ["base_lr", "max_lr"])
def test_bounds_in_the_groups_that_torch_was_given_have_no_effect_and_warn(name):
    one, two = weight(), weight()
    adam = torch.optim.Adam([{"params": [one]}, {"params": [two], name: 0.5}], lr=0.1)
    with pytest.warns(
        UserWarning, match=rf"'{name}' in parameter group 1 .*{name}=\[\.\.\.\]"
    ) as caught:
        opt = CyclicalOptimizer(adam)
    assert [warning.filename for warning in caught] == [__file__]
    assert opt.lr_at(2000) == [0.1, 0.1]


def test_what_one_cycle_lr_leaves_in_groups_is_no_wish_of_the_user():
    p = weight()
    adam = torch.optim.Adam([p], lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=0.5, total_steps=10)
    assert "max_lr" in adam.param_groups[0]
    CyclicalOptimizer(adam, max_lr=0.5)


# ---- a default device


@pytest.mark.parametrize("backend", ["native", "auto"])
def test_a_default_device_is_not_that_of_the_norm(backend):
    param = weight()
    adam = torch.optim.Adam([param], lr=0.1)
    opt = CyclicalOptimizer(adam, backend=backend, max_grad_norm=0.5)
    param.grad = torch.full_like(param, 3.0)
    expected = param.grad.norm()
    with torch.device("meta"):
        opt.step()
        assert opt.iteration == 1
    assert opt.grad_norm == pytest.approx(expected)
    assert opt.state[param]["step"] == 1


# ---- the user's keys in a group


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("taken", [["last"], ["first"], ["first", "last"], ["first", "middle"]])
def test_keys_written_into_a_group_and_taken_away(taken, backend):
    """Keys come and go: torch's schedulers write ``initial_lr``, users delete it."""
    param, twin_param = weight(), weight()
    plain = torch.optim.SGD([twin_param], lr=0.4, momentum=0.9)
    opt = CyclicalOptimizer(
        torch.optim.SGD([param], lr=0.4, momentum=0.9), base_lr=0.4, max_lr=0.4, backend=backend
    )
    keys = ["first", "middle", "last"]
    opt.param_groups[0].update(dict.fromkeys(keys, "a word"))
    for k in range(8):
        step(opt, param)
        step(plain, twin_param)
        if k in (2, 4):
            for key in taken:
                del opt.param_groups[0][key]
        if k == 3:
            opt.param_groups[0].update(dict.fromkeys(taken, "another"))
    assert opt.iteration == 8
    torch.testing.assert_close(param, twin_param)


def test_explain_tells_what_only_a_step_finds_out():
    memory = torch.ones(100)
    params = [torch.nn.Parameter(memory[:60]), torch.nn.Parameter(memory[40:]), weight()]
    opt = CyclicalOptimizer(torch.optim.SGD(params, lr=0.1))
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    rest, native = opt.explain().split("\n")
    assert native.startswith("native: 1 parameter")
    assert rest.startswith("torch: 2 parameter")
    assert "share memory" in rest


# ---- bounds of other types


def two_groups(**options):
    groups = [{"params": [weight()]}, {"params": [weight()]}]
    return CyclicalOptimizer(torch.optim.SGD(groups, lr=0.5, momentum=0.5), **options)


PER_GROUP = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "ListConfig": ListConfig,
    "array": np.array,
    "float32 array": lambda values: np.array(values, dtype=np.float32),
    "tensor": torch.tensor,
    "list of tensors": lambda values: [torch.tensor(v) for v in values],
    "list of numpy's numbers": lambda values: [np.float32(v) for v in values],
    "trainable tensor": lambda values: torch.tensor(values, requires_grad=True),
}


@pytest.mark.parametrize("kind", PER_GROUP)
def test_a_bound_per_group_in_any_sequence(kind):
    make = PER_GROUP[kind]
    opt = two_groups(
        base_lr=make([0.125, 0.25]),
        max_lr=make([0.5, 1.0]),
        cycle_momentum=True,
        base_momentum=make([0.25, 0.5]),
        max_momentum=make([0.5, 0.75]),
        step_size_up=2,
    )
    assert [opt.lr_at(k) for k in (0, 2)] == [[0.125, 0.25], [0.5, 1.0]]
    assert [group["momentum"] for group in opt.param_groups] == [0.5, 0.75]
    opt.set_bounds(base_lr=make([0.25, 0.5]))
    assert opt.lr_at(0) == [0.25, 0.5]
    torch.save(opt.state_dict(), saved := io.BytesIO())
    saved.seek(0)
    opt.load_state_dict(torch.load(saved, weights_only=True))
    assert opt.lr_at(0) == [0.25, 0.5]


ONE_NUMBER = [
    torch.tensor, lambda x: torch.tensor([x]), np.array, np.float32, lambda x: np.array([x]),
    lambda x: torch.tensor(x, requires_grad=True), lambda x: torch.nn.Parameter(torch.tensor(x)),
]  # fmt: skip


@pytest.mark.parametrize("number", ONE_NUMBER)
def test_a_bound_in_a_tensor_of_one_element(number):
    """As in torch's test_constant_initial_params: the tensors are not changed."""
    given = [number(value) for value in (0.125, 0.5, 0.25, 0.75)]
    kept = [value.item() for value in given]
    opt = two_groups(
        base_lr=given[0],
        max_lr=given[1],
        cycle_momentum=True,
        base_momentum=given[2],
        max_momentum=given[3],
        step_size_up=number(2.0),
        max_grad_norm=number(1.0),
    )
    step(opt, *(p for group in opt.param_groups for p in group["params"]))
    assert opt.get_last_lr() == [0.3125, 0.3125]
    assert [type(group[key]) for group in opt.param_groups for key in ("lr", "momentum")] == [
        float
    ] * 4
    opt.set_bounds(max_lr=number(1.0))
    assert opt.lr_at(2) == [1.0, 1.0]
    opt.add_param_group({"params": [weight()], "base_lr": number(0.25), "max_lr": number(0.5)})
    assert opt.lr_at(2) == [1.0, 1.0, 0.5]
    assert [value.item() for value in given] == kept


def test_a_flag_of_numpys():
    assert "clr_max_momentum" in two_groups(cycle_momentum=np.bool_(True)).param_groups[0]
    assert "clr_max_momentum" not in two_groups(cycle_momentum=np.bool_(False)).param_groups[0]


# ---- explain()


def test_explain_of_parameters_that_have_no_values_yet():
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 2))
    opt = CyclicalOptimizer(torch.optim.Adam(model.parameters()))
    uninitialized = r"torch: 2 parameter tensors, 0 values \(2 uninitialized until .*\), Adam: "
    assert re.search(uninitialized, opt.explain())
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    assert opt.explain().count("4 parameter tensors, 23 values") == 1
    plain = CyclicalOptimizer(
        torch.optim.Adam(torch.nn.LazyLinear(3).parameters()), backend="torch"
    )
    assert re.search(uninitialized, plain.explain())


def test_explain_tells_classes_of_one_name_apart():
    class Adam(torch.optim.Adam):
        pass

    name = f"{__name__}.{Adam.__qualname__}"
    told = CyclicalOptimizer(Adam([weight()])).explain()
    assert told.endswith(f" values, {name}: no fused kernel for {name}")
    assert ", Adam: " in CyclicalOptimizer(torch.optim.Adam([weight()])).explain()


# ---- groups in a tuple


def test_no_group_can_be_added_to_a_tuple():
    _, opt = stepped(adam, backend="torch")
    opt.param_groups = tuple(opt.param_groups)
    before = str(opt.param_groups)
    with pytest.raises(TypeError, match=r"write opt.param_groups = list\(opt.param_groups\) first"):
        opt.add_param_group({"params": [weight()]})
    assert str(opt.param_groups) == before
    opt.param_groups = list(opt.param_groups)
    opt.add_param_group({"params": [weight()]})
    assert len(opt.get_last_lr()) == 2
