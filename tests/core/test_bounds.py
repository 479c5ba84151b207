"""Bounds: read from the optimizer, given by the names of groups."""

from __future__ import annotations

import pytest
import torch

from clr_optim import CyclicalOptimizer
from clr_optim.schedule import cosine, decay, fixed, sequence, triangular, wsd


def adamw(*names, lr=0.4):
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "name": name} for name in names]
    for group in groups:
        if group["name"] is None:
            del group["name"]
    return torch.optim.AdamW(groups, lr=lr)


def take(opt, steps):
    for _ in range(steps):
        opt.step()


# ---- to read


def test_a_bound_of_all_groups_is_a_number():
    opt = CyclicalOptimizer(adamw(None, None), "exp_range")
    assert (opt.base_lr, opt.max_lr, opt.policy) == (0.1, 0.4, "exp_range")
    opt.set_bounds(max_lr=0.8)
    assert (opt.base_lr, opt.max_lr) == (0.1, 0.8)


def test_bounds_that_differ_are_a_list_and_fit_another_optimizer():
    opt = CyclicalOptimizer(adamw(None, None), base_lr=0.1, max_lr=[0.2, 0.3])
    assert (opt.base_lr, opt.max_lr) == (0.1, [0.2, 0.3])
    other = CyclicalOptimizer(adamw(None, None), base_lr=opt.base_lr, max_lr=opt.max_lr)
    assert other.lr_at(2000) == opt.lr_at(2000) == [0.2, 0.3]
    opt.add_param_group({"params": [torch.ones(1)], "max_lr": 0.3, "base_lr": 0.2})
    assert (opt.base_lr, opt.max_lr) == ([0.1, 0.1, 0.2], [0.2, 0.3, 0.3])


def test_bounds_that_other_code_wrote_and_bounds_of_a_checkpoint():
    opt = CyclicalOptimizer(adamw(None), base_lr=0.1, max_lr=0.2)
    opt.param_groups[0]["clr_max_lr"] = 0.7
    assert opt.max_lr == 0.7
    other = CyclicalOptimizer(adamw(None), base_lr=0.1, max_lr=0.2)
    with pytest.warns(UserWarning, match="the checkpoint's bounds hold"):
        other.load_state_dict(opt.state_dict())
    assert (other.base_lr, other.max_lr) == (0.1, 0.7)


def test_a_phase_with_bounds_shows_them():
    schedule = sequence([(fixed(0.05), 2), (triangular(2), 4), (fixed(0.01), None)])
    opt = CyclicalOptimizer(adamw(None, None), schedule, base_lr=0.1, max_lr=[0.2, 0.3])
    shown = []
    for step in (0, 2, 6):
        opt.set_iteration(step)
        shown.append((opt.base_lr, opt.max_lr))
    assert shown == [(0.05, 0.05), (0.1, [0.2, 0.3]), (0.01, 0.01)]
    assert opt.policy == "sequence"


def test_no_group_has_no_bounds():
    opt = CyclicalOptimizer(adamw(None))
    opt.param_groups.clear()
    assert (opt.base_lr, opt.max_lr) == ([], [])


# ---- by the names of groups


def test_bounds_by_name():
    opt = CyclicalOptimizer(
        adamw("head", "body"), base_lr=1e-5, max_lr={"body": 1e-4, "head": 1e-3}
    )
    assert opt.lr_at(2000) == [1e-3, 1e-4]
    opt.set_bounds(base_lr={"body": 1e-6, "head": 1e-7}, max_lr={"body": 1.0, "head": 2.0})
    assert (opt.base_lr, opt.max_lr) == ([1e-7, 1e-6], [2.0, 1.0])


def test_groups_of_one_name_share_a_bound():
    opt = CyclicalOptimizer(adamw("a", "b", "a"), max_lr={"b": 0.5, "a": torch.tensor(1.0)})
    assert opt.max_lr == [1.0, 0.5, 1.0]


def test_bounds_of_momentum_by_name():
    opt = CyclicalOptimizer(
        adamw("a", "b"), cycle_momentum=True, max_momentum={"a": 0.95, "b": 0.85}
    )
    assert [group["betas"][0] for group in opt.param_groups] == [0.95, 0.85]


@pytest.mark.parametrize(
    ("names", "bounds", "error", "pattern"),
    [
        (("a", None), {"a": 0.1}, TypeError, r"max_lr must be .*'a': 0\.1.* group 1 has no 'name'"),
        (("a", 3), {"a": 0.1, 3: 0.2}, TypeError, "parameter group 1 has no 'name' that is a str"),
        (("a", "b"), {"a": 0.1}, ValueError, r"max_lr=\{'a': 0\.1\} must .*names are \['a', 'b'\]"),
        (("a",), {"a": 0.1, "b": 0.2}, ValueError, r"one number for each name.*are \['a'\]$"),
        (("a",), {"a": "fast"}, TypeError, r"max_lr\['a'\] must be a number, got 'fast'"),
        (("a",), {"a": -1.0}, ValueError, r"max_lr\['a'\] must be .*>= 0"),
        (("a",), {}, ValueError, r"max_lr=\{\} must have one number"),
    ],
)
def test_names_that_do_not_fit(names, bounds, error, pattern):
    inner = adamw(*names)
    before = str(inner.param_groups)
    with pytest.raises(error, match=pattern):
        CyclicalOptimizer(inner, base_lr=0.0, max_lr=bounds)
    assert str(inner.param_groups) == before
    opt = CyclicalOptimizer(inner, base_lr=0.0)
    with pytest.raises(error, match=pattern):
        opt.set_bounds(max_lr=bounds)
    assert opt.max_lr == 0.4


# ---- written where no code reads them


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", ["base_lr", "max_lr"])
def test_a_bound_in_a_group_warns_once_within_64_steps(name, backend):
    opt = CyclicalOptimizer(adamw(None, None), backend=backend)
    group = opt.param_groups[1]
    group["params"][0].grad = torch.ones(2)
    take(opt, 70)
    group[name] = 0.7
    pattern = rf"'{name}' in parameter group 1 has no effect: .*set_bounds, as {name}=\[\.\.\.\]"
    with pytest.warns(UserWarning, match=pattern) as caught:
        take(opt, 64)
    assert [each.filename for each in caught] == [__file__]
    take(opt, 130)
    assert (opt.iteration, opt.base_lr, opt.max_lr) == (264, 0.1, 0.4)


@pytest.mark.parametrize(
    "look",
    [
        lambda opt: opt.max_lr,
        lambda opt: opt.base_lr,
        lambda opt: opt.state_dict(),
        lambda opt: opt.set_bounds(max_lr=0.8),
    ],
    ids=["max_lr", "base_lr", "state_dict", "set_bounds"],
)
def test_a_bound_in_a_group_warns_at_a_look(look):
    opt = CyclicalOptimizer(adamw(None))
    opt.param_groups[0]["max_lr"] = 0.7
    with pytest.warns(UserWarning, match="'max_lr' in parameter group 0 has no effect"):
        look(opt)
    look(opt)


def test_what_a_scheduler_of_torch_writes_does_not_warn():
    opt = CyclicalOptimizer(adamw(None))
    torch.optim.lr_scheduler.OneCycleLR(opt.optimizer, 0.4, total_steps=9, cycle_momentum=False)
    assert {"initial_lr", "max_lr"} <= opt.param_groups[0].keys()
    assert opt.max_lr == 0.4


# ---- lower bounds that no phase reads


def test_a_lower_bound_without_effect_is_named():
    for schedule in (cosine(10), wsd(1, 2, 3), fixed()):
        with pytest.warns(
            UserWarning, match=f"base_lr=0.01 has no effect: .* {schedule.name!r} are"
        ):
            opt = CyclicalOptimizer(sgd(), schedule, base_lr=0.01)
        with pytest.warns(UserWarning, match="base_lr=0.02 has no effect"):
            opt.set_bounds(base_lr=0.02)
        opt.set_bounds(max_lr=0.001)  # below that base_lr
        assert opt.get_last_lr() == schedule.rates(0, [(0.0, 0.001)])
    for schedule in (triangular(3), decay(4), cosine(10).between(0.1, 0.2)):
        if not schedule.has_bounds:
            CyclicalOptimizer(sgd(), schedule, base_lr=0.01).set_bounds(base_lr=0.02)
    CyclicalOptimizer(sgd(), cosine(10), base_lr=0.0)  # the bottom of a cosine without end=


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)


# ---- momentum in checkpoints


def test_a_checkpoint_that_cycles_momentum_otherwise_warns():
    cycled = CyclicalOptimizer(
        sgd(), cycle_momentum=True, base_momentum=0.7, max_momentum=0.95
    ).state_dict()
    with pytest.warns(UserWarning, match=r"written with cycle_momentum=True.*base_momentum=0\.7"):
        CyclicalOptimizer(sgd()).load_state_dict(cycled)
    with pytest.warns(UserWarning, match=r"base_momentum=0\.7.*was given 0\.8 and 0\.9"):
        CyclicalOptimizer(sgd(), cycle_momentum=True).load_state_dict(cycled)
    same = CyclicalOptimizer(sgd(), cycle_momentum=True, base_momentum=0.7, max_momentum=0.95)
    same.load_state_dict(cycled)
