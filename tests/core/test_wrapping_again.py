"""An optimizer that is wrapped again, as in a notebook, gets new bounds and a new position."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR

from clr_optim import CyclicalOptimizer, lr_range_test


def weight():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return param


def adam(lr=0.001, **options):
    return torch.optim.Adam([weight()], lr=lr, **options)


def wrap(inner, **options):
    return CyclicalOptimizer(inner, **{"step_size_up": 4, **options})


def trained(inner, steps=5, **options):
    opt = wrap(inner, **options)
    for _ in range(steps):
        opt.step()
    return opt


def bounds(opt):
    return [(group["clr_base_lr"], group["clr_max_lr"]) for group in opt.param_groups]


def test_a_sweep_over_max_lr():
    inner = adam()
    for top in (0.1, 1.0, 0.01):
        opt = trained(inner, max_lr=top)
        assert bounds(opt) == [(top / 4, top)]
        assert opt.iteration == 5
    opt = wrap(inner, base_lr=0.0001)
    assert bounds(opt) == [(0.0001, 0.001)]
    assert (opt.iteration, opt.get_last_lr()) == (0, [0.0001])


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("scale_fn", [None, lambda cycle: 0.5**cycle])
def test_the_own_lr_is_the_one_that_the_user_chose(scale_fn, tensor):
    lr = torch.tensor(0.001) if tensor else 0.001
    inner = adam(lr, foreach=False)
    own = inner.param_groups[0]["lr"]
    own = own.item() if tensor else own
    trained(inner, max_lr=0.1, scale_fn=scale_fn)
    assert bounds(trained(inner, scale_fn=scale_fn)) == [(own / 4, own)]
    assert bounds(trained(inner, scale_fn=scale_fn)) == [(own / 4, own)]
    # A rate that other code has written since is the user's.
    if tensor:
        inner.param_groups[0]["lr"].fill_(0.5)
    else:
        inner.param_groups[0]["lr"] = 0.5
    assert bounds(trained(inner)) == [(0.125, 0.5)]
    opt = trained(inner, max_lr=3.0)
    opt.set_bounds(base_lr=0.25)
    assert bounds(wrap(inner)) == [(0.125, 0.5)]


def test_groups_of_their_own_rates():
    inner = torch.optim.SGD([{"params": [weight()], "lr": 0.1}, {"params": [weight()], "lr": 0.2}])
    opt = trained(inner, max_lr=9.0)
    opt.add_param_group({"params": [weight()], "lr": 0.4})
    opt.step()
    assert bounds(wrap(inner)) == [(0.025, 0.1), (0.05, 0.2), (0.1, 0.4)]


@pytest.mark.parametrize("make", [adam, lambda: torch.optim.SGD([weight()], 0.1, momentum=0.7)])
def test_a_momentum_that_was_cycled_is_put_back(make):
    inner = make()
    momentum = {key: inner.param_groups[0].get(key) for key in ("betas", "momentum")}
    trained(inner, cycle_momentum=True)
    opt = trained(inner)
    assert {key: opt.param_groups[0].get(key) for key in momentum} == momentum
    assert not [key for key in opt.param_groups[0] if key.startswith("clr_") and "moment" in key]
    trained(inner, cycle_momentum=True, base_momentum=0.5)
    if "momentum" in inner.param_groups[0]:
        inner.param_groups[0]["momentum"] = 0.61  # the user's rate
        assert wrap(inner).param_groups[0]["momentum"] == 0.61


def test_the_position_goes_on_where_a_checkpoint_was_loaded():
    saved = copy.deepcopy(trained(adam(), steps=3).state_dict())
    inner = adam()
    inner.load_state_dict(saved)
    opt = wrap(inner)
    assert opt.iteration == 3
    # Wrap once more before any step: the checkpoint still decides where to go on.
    assert wrap(inner, backend="torch").iteration == 3
    # The same if an earlier wrapper has loaded it.
    inner = adam()
    wrap(inner).load_state_dict(saved)
    assert wrap(inner).iteration == 3
    # After an earlier run.
    inner = adam()
    trained(inner, max_lr=9.0)
    inner.load_state_dict(saved)
    opt = wrap(inner)
    assert (opt.iteration, bounds(opt)) == (3, [(0.00025, 0.001)])


def test_a_run_that_went_on_from_a_checkpoint_warns_when_another_starts():
    saved = copy.deepcopy(trained(adam(), steps=3).state_dict())
    inner = adam()
    inner.load_state_dict(saved)
    trained(inner)
    with pytest.warns(
        UserWarning, match=r"checkpoint of step 3.*step 8: .*set_iteration\(8\)"
    ) as w:
        opt = wrap(inner)
    assert opt.iteration == 0
    assert w[0].filename == __file__
    assert wrap(inner).iteration == 0


def test_a_plain_checkpoint_starts_anew_with_its_own_rate():
    inner = adam()
    trained(inner, max_lr=0.1)
    inner.load_state_dict(adam(lr=0.3).state_dict())
    opt = wrap(inner)
    assert (opt.iteration, bounds(opt)) == (0, [(0.075, 0.3)])


def test_an_edited_rate_of_a_loaded_checkpoint_warns():
    inner = adam()
    inner.load_state_dict(trained(adam(), steps=3).state_dict())
    inner.param_groups[0]["lr"] = 0.5
    with pytest.warns(UserWarning, match="0.5 instead of .*set_bounds"):
        opt = wrap(inner)
    assert bounds(opt) == [(0.00025, 0.001)]
    inner = adam()
    inner.load_state_dict(trained(adam(), steps=3).state_dict())
    inner.param_groups[0]["lr"] = 0.5
    wrap(inner, max_lr=0.001)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_go_on_and_start_anew_when_wrapped(copied):
    opt = copied(trained(adam(), max_lr=0.1))
    assert (opt.iteration, bounds(opt)) == (5, [(0.025, 0.1)])
    again = wrap(opt.optimizer)
    assert (again.iteration, bounds(again)) == (0, [(0.00025, 0.001)])


def test_a_scheduler_says_where_the_cycle_is():
    inner = adam(0.5)
    trained(inner)
    scheduler = CyclicLR(inner, 0.1, 0.5, step_size_up=4, cycle_momentum=False)
    for _ in range(2):
        inner.step()
        scheduler.step()
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    assert (opt.iteration, bounds(opt), opt.get_last_lr()) == (2, [(0.1, 0.5)], opt.lr_at(2))


def test_a_range_test_in_between_changes_nothing():
    model = nn.Linear(2, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.2)
    opt = wrap(inner, max_lr=0.1)
    batches = [(torch.ones(2, 2), torch.ones(2, 1))] * 4
    lr_range_test(model, opt, batches, nn.MSELoss(), start_lr=1e-4, end_lr=0.1, num_steps=4)
    assert opt.iteration == 0
    opt.step()
    assert bounds(opt) == [(0.025, 0.1)]
    assert bounds(wrap(inner)) == [(0.05, 0.2)]


def test_an_argument_that_is_refused_leaves_the_earlier_run_as_it_was():
    inner = adam()
    opt = trained(inner)
    before = str(inner.param_groups)
    with pytest.raises(ValueError, match="max_lr"):
        wrap(inner, max_lr=-1.0)
    assert str(inner.param_groups) == before
    opt.step()
    assert opt.iteration == 6


def test_nothing_is_kept_alive_and_nothing_is_saved():
    import gc
    import weakref

    inner = adam()
    opt = trained(inner)
    assert set(inner.state_dict()) == {"state", "param_groups"}
    assert set(inner.__getstate__()) == {"defaults", "state", "param_groups"}
    alive = weakref.ref(opt)
    gc.disable()
    try:
        del opt
        assert alive() is None
    finally:
        gc.enable()


def test_groups_that_came_later_get_their_own_settings_back():
    first, second, third = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    sgd = torch.optim.SGD([first], lr=0.1, momentum=0.9)
    opt = CyclicalOptimizer(
        sgd, step_size_up=3, cycle_momentum=True, base_momentum=0.5, max_momentum=0.95
    )
    opt.add_param_group({"params": [second], "lr": 0.3})
    sgd.add_param_group({"params": [third], "lr": 0.2})
    for _ in range(2):
        opt.step()
    opt.set_bounds(max_lr=0.7)
    again = CyclicalOptimizer(sgd, step_size_up=3)
    assert [group["momentum"] for group in sgd.param_groups] == [0.9] * 3
    assert again.lr_at(3) == [0.1, 0.3, 0.2]
    assert again.iteration == 0
