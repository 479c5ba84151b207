"""What ``lr``, the position, the hooks and the warnings say, and when."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import BY_NAME, Problem, rates_in_groups

from clr_optim import CyclicalOptimizer, CyclicalScheduler
from clr_optim.schedule import (
    decay,
    fixed,
    one_cycle,
    ramp,
    sequence,
    triangular,
    triangular2,
    warm_restarts,
)

pytestmark = pytest.mark.usefixtures("each_backend")


ADAM = BY_NAME["adam"]


def wrapped(policy="triangular", *, case=ADAM, groups=1, **options):
    problem = Problem(case)
    params = problem.params if groups == 1 else [{"params": [p]} for p in problem.params]
    if not isinstance(policy, str):
        return problem, CyclicalOptimizer(case.make(params), policy, **options)
    options = {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 4, **options}
    return problem, CyclicalOptimizer(case.make(params), policy, **options)


def test_at_construction_lr_is_that_of_step_0():
    _, opt = wrapped()
    assert rates_in_groups(opt) == opt.get_last_lr() == opt.lr_at(0) == [0.1]
    assert (opt.iteration, opt.cycle, opt.steps_to_cycle_end) == (0, 0.0, 8)


def test_defaults_are_the_groups_own_lr_and_a_quarter_of_it():
    problem = Problem(ADAM)
    groups = [{"params": problem.params[:1], "lr": 0.4}, {"params": problem.params[1:]}]
    opt = CyclicalOptimizer(ADAM.make(groups))
    assert [(g["clr_base_lr"], g["clr_max_lr"]) for g in opt.param_groups] == [
        (0.1, 0.4),
        (0.0025, 0.01),
    ]
    assert opt.schedule == triangular(2000)
    assert opt.lr_at(2000) == [0.4, 0.01]


def test_the_kth_step_uses_lr_k_and_lr_between_steps_is_the_next_one():
    problem, opt = wrapped("triangular2")
    used = []
    opt.register_step_pre_hook(lambda o, args, kwargs: used.append(rates_in_groups(o)[0]))
    for k in range(20):
        assert opt.iteration == k
        assert rates_in_groups(opt) == opt.get_last_lr() == opt.lr_at(k)
        problem.step(opt, k)
    expected = triangular2(4)
    assert used == [expected(k, 0.1, 0.5) for k in range(20)]


def test_what_the_wrapped_step_sees_is_lr_k():
    problem = Problem(BY_NAME["sgd"])
    opt = CyclicalOptimizer(
        torch.optim.SGD(problem.params, lr=0.5), base_lr=0.1, max_lr=0.5, step_size_up=2
    )
    for k in range(6):
        before = problem.values()
        problem.step(opt, k)
        for p, old in zip(problem.params, before, strict=True):
            lr = triangular(2)(k, 0.1, 0.5)
            assert torch.equal(p, torch.add(old, p.grad, alpha=-lr))


def test_a_step_without_any_gradient_advances():
    _, opt = wrapped()
    for _ in range(3):
        opt.step()
    assert opt.iteration == 3
    assert rates_in_groups(opt) == opt.lr_at(3)
    assert not opt.state


def test_a_step_that_fails_does_not_advance():
    problem, opt = wrapped(max_grad_norm=1.0)
    problem.step(opt, 0)
    before, rate = problem.values(), rates_in_groups(opt)

    def fails(*args):
        raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        opt.step(fails)
    handle = opt.register_step_pre_hook(fails)
    with pytest.raises(RuntimeError, match="no such luck"):
        opt.step()
    handle.remove()
    handle = opt.optimizer.register_step_pre_hook(fails)
    with pytest.raises(RuntimeError, match="no such luck"):
        opt.step()
    handle.remove()
    assert opt.iteration == 1
    assert rates_in_groups(opt) == rate
    assert all(torch.equal(a, b) for a, b in zip(before, problem.values(), strict=True))
    problem.step(opt, 1)
    assert opt.iteration == 2


def test_all_groups_share_one_position_and_a_later_one_joins_it():
    problem, opt = wrapped(groups=3, base_lr=[0.1, 0.2, 0.3], max_lr=0.5)
    problem.run(opt, range(3))
    extra = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [extra], "lr": 0.8})
    more = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [more], "base_lr": 0.0, "max_lr": 1.0})
    assert [g["clr_step"] for g in opt.param_groups] == [3] * 5
    assert "max_lr" not in opt.param_groups[-1]
    shape = triangular(4)(3)
    expected = [
        b + (m - b) * shape for b, m in [(0.1, 0.5), (0.2, 0.5), (0.3, 0.5), (0.2, 0.8), (0, 1)]
    ]
    assert rates_in_groups(opt) == pytest.approx(expected, rel=1e-15)
    extra.grad = torch.ones(2)
    opt.step()
    assert opt.iteration == 4
    assert rates_in_groups(opt) == pytest.approx([0.5, 0.5, 0.5, 0.8, 1.0], rel=1e-15)


def test_a_group_added_beneath_us_joins_too():
    problem, opt = wrapped()
    problem.run(opt, range(3))
    opt.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.4})
    problem.step(opt, 3)
    assert rates_in_groups(opt) == opt.lr_at(4) == [0.5, 0.4]


@pytest.mark.filterwarnings("default")
def test_a_rule_that_reads_its_first_rate_alone_warns():
    def wrap(policy):
        return CyclicalOptimizer(torch.optim.Rprop([torch.ones(1, requires_grad=True)]), policy)

    with pytest.warns(UserWarning, match="Rprop reads lr at its first step only.*'triangular' has"):
        wrap("triangular")
    with pytest.warns(UserWarning, match="Rprop reads lr at its first step only"):
        wrap(fixed().with_warmup(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap("fixed")


def test_cycle_end_hook_fires_after_the_step_that_completes_a_cycle():
    problem, opt = wrapped()
    seen = []
    handle = opt.register_cycle_end_hook(
        lambda o: seen.append((o.iteration, o.cycle, rates_in_groups(o)[0], o.steps_to_cycle_end))
    )
    order = []
    opt.register_step_post_hook(lambda o, a, k: order.append(("post", o.iteration)))
    opt.register_cycle_end_hook(lambda o: order.append(("cycle", o.iteration)))
    problem.run(opt, range(20))
    assert seen == [(8, 1.0, 0.1, 8), (16, 2.0, 0.1, 8)]
    assert order[7:9] == [("cycle", 8), ("post", 8)]
    handle.remove()
    problem.run(opt, range(20, 30))
    assert len(seen) == 2
    assert [n for kind, n in order if kind == "cycle"] == [8, 16, 24]


def test_cycle_position_within_a_cycle():
    problem, opt = wrapped()
    problem.run(opt, range(20))
    assert opt.cycle == 2.5
    assert opt.steps_to_cycle_end == 4


def test_stop_at_a_cycles_end():
    problem, opt = wrapped()
    steps = 0
    while opt.steps_to_cycle_end != 8 or opt.cycle < 2:
        problem.step(opt, steps)
        steps += 1
    assert steps == 16


@pytest.mark.parametrize("policy", [fixed(), fixed(0.2), sequence([(fixed(), 3), (fixed(0.1), 2)])])
def test_where_there_is_no_cycle_there_is_no_end(policy):
    problem, opt = wrapped(policy)
    fired = []
    with pytest.warns(UserWarning, match="register_cycle_end_hook has no effect: the sched"):
        opt.register_cycle_end_hook(fired.append)
    problem.run(opt, range(9))
    assert opt.steps_to_cycle_end is None
    assert opt.cycle == 0.0
    assert not fired


@pytest.mark.parametrize(
    ("policy", "ends"),
    [
        (warm_restarts(3, period_multiplier=2), [3, 9, 21]),
        (one_cycle(20, pct_start=0.25), [20]),
        (decay(5), [5]),
        (ramp(6), [6]),
        (sequence([(triangular(2), 6), (triangular(3), None)]), [4, 12, 18, 24]),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_ends_of_other_schedules(policy, ends):
    problem, opt = wrapped(policy, base_lr=0.1, max_lr=0.2)
    fired = []
    opt.register_cycle_end_hook(lambda o: fired.append(o.iteration))
    problem.run(opt, range(25))
    assert fired == ends


# ---- other code writes the rate


def test_an_outside_write_is_overruled_with_one_warning_naming_the_group():
    problem, opt = wrapped(groups=3)
    problem.step(opt, 0)
    opt.param_groups[1]["lr"] = 7.0
    with pytest.warns(
        UserWarning, match=r"parameter group 1 \(7\).*'triangular' decides"
    ) as caught:
        problem.step(opt, 1)
    assert len(caught) == 1
    assert caught[0].filename.endswith("cases.py")  # the caller of step()
    assert rates_in_groups(opt) == opt.lr_at(2)
    opt.param_groups[0]["lr"] = 9.0
    problem.step(opt, 2)  # the warning comes once: warnings are errors here
    assert rates_in_groups(opt) == opt.lr_at(3)


def _through_a_torch_scheduler(opt):
    torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)
    opt.param_groups[0]["lr"] = 7.0
    opt.step()


def _with_hooks_and_a_profiler(opt):
    opt.register_step_pre_hook(lambda *a: None)
    with torch.profiler.profile():
        opt.step()


def _in_a_closure(opt):
    opt.step(lambda: opt.param_groups[0].update(lr=7.0) or 1.0)


def _compiled(opt):
    torch.compile(opt.step, backend="eager")()


def _from_a_scaler(opt):
    torch.amp.GradScaler("cpu", enabled=False).step(opt)


CALLERS = {
    f.__name__.strip("_"): f
    for f in (
        _through_a_torch_scheduler, _with_hooks_and_a_profiler, _in_a_closure, _compiled,
        _from_a_scaler,
    )
}  # fmt: skip
CALLERS["state_dict"] = lambda opt: opt.state_dict()


@pytest.mark.parametrize("caller", CALLERS)
def test_the_warning_names_the_callers_line(caller):
    problem, opt = wrapped()
    problem.backward(0)
    if caller != "in_a_closure":
        opt.param_groups[0]["lr"] = 7.0
    with pytest.warns(UserWarning, match="written from outside") as caught:
        CALLERS[caller](opt)
    (warning,) = [w for w in caught if "from outside" in str(w.message)]
    assert warning.filename == __file__
    code = CALLERS[caller].__code__
    assert warning.lineno in [line for *_, line in code.co_lines()]


@pytest.mark.parametrize("name", ["__main__", "clr_optim_study", "torchtrainer", None])
def test_the_warning_names_the_calling_module(name):
    problem, opt = wrapped()
    problem.backward(0)
    opt.param_groups[0]["lr"] = 7.0
    module = {"opt": opt} if name is None else {"opt": opt, "__name__": name}
    with pytest.warns(UserWarning, match="written from outside") as caught:
        exec(compile("\n\nopt.step()", "a_users_script.py", "exec"), module)
    assert [(w.filename, w.lineno) for w in caught] == [("a_users_script.py", 3)]


def test_the_policys_rate_is_the_one_used():
    problem, opt = wrapped(case=BY_NAME["sgd"])
    twin, other = wrapped(case=BY_NAME["sgd"])
    for k in range(5):
        opt.param_groups[0]["lr"] = 3.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem.step(opt, k)
        twin.step(other, k)
    assert all(torch.equal(a, b) for a, b in zip(problem.params, twin.params, strict=True))


def test_a_write_in_the_closure_is_overruled_too():
    problem, opt = wrapped(case=BY_NAME["sgd"])
    twin, other = wrapped(case=BY_NAME["sgd"])

    def closure():
        opt.param_groups[0]["lr"] = 3.0
        return problem.backward(0)

    with pytest.warns(UserWarning, match="written from outside"):
        opt.step(closure)
    twin.step(other, 0)
    assert all(torch.equal(a, b) for a, b in zip(problem.params, twin.params, strict=True))


def test_a_tensor_lr_is_filled_never_replaced():
    problem = Problem(ADAM)
    lr = torch.tensor(0.5)
    opt = CyclicalOptimizer(ADAM.make(problem.params, lr=lr), base_lr=0.1, step_size_up=2)
    assert opt.param_groups[0]["clr_max_lr"] == 0.5
    for k in range(6):
        assert opt.param_groups[0]["lr"] is lr
        assert lr.item() == pytest.approx(triangular(2)(k, 0.1, 0.5), rel=1e-6)
        problem.step(opt, k)
    lr.fill_(9.0)
    with pytest.warns(UserWarning, match=r"group 0 \(9\)"):
        problem.step(opt, 6)
    assert opt.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(opt.lr_at(7)[0], rel=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: min(1.0, k / 10)),  # writes 0.0
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=50),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 1.0, cycle_momentum=True),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
    ],
    ids=["warm-up", "OneCycleLR", "CyclicLR", "ReduceLROnPlateau", "StepLR"],
)
def test_a_torch_scheduler_on_top_breaks_nothing(make):
    problem, opt = wrapped(case=BY_NAME["sgd-momentum"], cycle_momentum=True)
    twin, reference = wrapped(case=BY_NAME["sgd-momentum"], cycle_momentum=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = make(opt)
        for k in range(12):
            problem.step(opt, k)
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(1.0)
            else:
                scheduler.step()
            assert opt.get_last_lr() == opt.lr_at(k + 1)
    assert [str(w.message) for w in caught if "from outside" not in str(w.message)] == []
    assert len(caught) == 1
    twin.run(reference, range(12))
    assert all(torch.equal(a, b) for a, b in zip(problem.params, twin.params, strict=True))
    assert opt.iteration == 12


def test_a_scheduler_built_before_wrapping_does_not_complain():
    problem = Problem(ADAM)
    inner = ADAM.make(problem.params)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 5)
    opt = CyclicalOptimizer(inner, step_size_up=4)
    problem.step(opt, 0)
    scheduler.step()  # torch would warn that optimizer.step() was not called


# ---- the distributed checkpoint's step at rate 0


def init_state_as_dcp_does(opt, closure_keyword=True):
    """Do what torch.distributed.checkpoint's _init_optim_state does, line by line."""
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    rates = []
    for group in opt.param_groups:
        rates.append(group["lr"])
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], torch.Tensor) else 0.0
    opt.step(closure=None)
    for group in opt.param_groups:
        group["lr"] = rates.pop(0)
    opt.zero_grad(set_to_none=True)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("base_lr", [0.1, 0.0], ids=["", "base_lr=0"])
def test_dcps_zero_rate_step_holds_and_does_not_advance(tensor_lr, base_lr):
    case = BY_NAME["adamw"]
    problem = Problem(case)
    before = problem.values()
    inner = case.make(problem.params, lr=torch.tensor(0.5) if tensor_lr else 0.5, weight_decay=0.1)
    opt = CyclicalOptimizer(inner, base_lr=base_lr, max_lr=0.5, step_size_up=1, step_size_down=0)
    fired = []
    opt.register_cycle_end_hook(fired.append)
    lr = opt.param_groups[0]["lr"]
    init_state_as_dcp_does(opt)
    assert opt.iteration == 0
    assert not fired
    assert all(torch.equal(a, b) for a, b in zip(before, problem.values(), strict=True))
    assert "exp_avg" in opt.state[problem.params[0]]
    assert opt.param_groups[0]["lr"] is lr
    problem.step(opt, 0)
    assert opt.iteration == 1
    assert fired


def test_the_real_dcp_initialisation_leaves_the_position():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = torch.nn.Linear(3, 2)
    opt = CyclicalOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.5), base_lr=0.0, step_size_up=3
    )
    for _ in range(4):
        opt.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        opt.step()
    opt.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    clone = copy.deepcopy(model)
    fresh = CyclicalOptimizer(
        torch.optim.AdamW(clone.parameters(), lr=0.5), base_lr=0.0, step_size_up=3
    )
    set_optimizer_state_dict(clone, fresh, saved)
    assert fresh.iteration == 4
    assert rates_in_groups(fresh) == fresh.lr_at(4) == opt.get_last_lr()
    for m, o in ((model, opt), (clone, fresh)):
        m(torch.ones(1, 3)).sum().backward()
        o.step()
    assert torch.equal(model.weight, clone.weight)


def test_a_policys_own_zero_advances():
    problem, opt = wrapped(base_lr=0.0)
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    assert rates_in_groups(opt) == [0.0]
    opt.step()
    assert opt.iteration == 1


def test_a_warm_up_schedulers_zero_is_overruled():
    problem, opt = wrapped()
    opt.param_groups[0]["lr"] = 0.0
    with pytest.warns(UserWarning, match=r"group 0 \(0\)"):
        problem.step(opt, 0)  # gradients are not zero
    assert opt.iteration == 1


def test_zero_in_one_group_only_is_overruled():
    problem, opt = wrapped(groups=3)
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    opt.param_groups[0]["lr"] = 0.0
    with pytest.warns(UserWarning, match=r"group 0 \(0\)"):
        opt.step()
    assert opt.iteration == 1


def test_zero_without_any_gradient_is_overruled():
    _, opt = wrapped()
    opt.param_groups[0]["lr"] = 0.0
    with pytest.warns(UserWarning, match=r"group 0 \(0\)"):
        opt.step()
    assert opt.iteration == 1


def test_zero_sparse_gradients_count_as_zero():
    problem = Problem(BY_NAME["sparse-adam"])
    opt = CyclicalOptimizer(BY_NAME["sparse-adam"].make(problem.params))
    for p in problem.params:
        p.grad = torch.zeros_like(p).to_sparse()
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert opt.iteration == 0


# ---- momentum


@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "adam", "rmsprop", "adamw", "nadam"])
def test_momentum_follows_the_same_timing(name):
    problem, opt = wrapped(case=BY_NAME[name], cycle_momentum=True, max_momentum=0.95)

    def momentum():
        group = opt.param_groups[0]
        return group["betas"][0] if "betas" in group else group["momentum"]

    betas = opt.param_groups[0].get("betas", (0, None))[1:]
    for k in range(20):
        assert momentum() == triangular(4).momentum(k, 0.8, 0.95)
        problem.step(opt, k)
    assert opt.param_groups[0].get("betas", (0, None))[1:] == betas


def test_momentum_is_left_alone_unless_asked_for():
    problem, opt = wrapped(case=BY_NAME["sgd"])
    problem.run(opt, range(5))
    assert opt.param_groups[0]["momentum"] == 0


# ---- changing course


def test_set_iteration_and_set_bounds():
    problem, opt = wrapped(groups=3)
    fired = []
    opt.register_cycle_end_hook(fired.append)
    opt.set_iteration(8)
    assert (opt.iteration, opt.cycle, fired) == (8, 1.0, [])
    opt.set_iteration(4)
    opt.set_bounds(max_lr=[0.6, 0.7, 0.8])
    assert rates_in_groups(opt) == opt.lr_at(4) == [0.6, 0.7, 0.8]
    opt.set_bounds(base_lr=0.2)
    problem.step(opt, 0)
    assert opt.iteration == 5
    assert rates_in_groups(opt) == pytest.approx([0.2 + (m - 0.2) * 0.75 for m in (0.6, 0.7, 0.8)])
    opt.set_iteration(10**12)
    problem.step(opt, 0)
    assert opt.iteration == 10**12 + 1


def test_an_outside_write_of_the_position_is_honoured():
    problem, opt = wrapped(groups=3)
    problem.run(opt, range(3))
    opt.param_groups[1]["clr_step"] = 11  # as ZeRO's restore writes groups
    opt.param_groups[1]["lr"] = 0.123
    assert opt.iteration == 11
    assert opt.get_last_lr() == opt.lr_at(11)
    problem.step(opt, 3)
    assert opt.iteration == 12
    assert [g["clr_step"] for g in opt.param_groups] == [12] * 3
    assert rates_in_groups(opt) == opt.lr_at(12)


def test_a_hook_may_change_course():
    problem, opt = wrapped()
    opt.register_cycle_end_hook(
        lambda o: o.set_bounds(max_lr=o.param_groups[0]["clr_max_lr"] / 2, base_lr=0.01)
    )
    problem.run(opt, range(12))
    assert rates_in_groups(opt) == [0.25]


# ---- the view for frameworks


def test_the_scheduler_view_changes_nothing():
    problem, opt = wrapped(groups=3, base_lr=[0.1, 0.2, 0.3])
    scheduler = opt.scheduler
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert isinstance(scheduler, CyclicalScheduler)
    assert scheduler is opt.scheduler
    assert scheduler.optimizer is opt
    assert "initial_lr" not in opt.param_groups[0]
    for k in range(5):
        problem.step(opt, k)
        for _ in range(3):  # as accelerate does for 3 processes
            scheduler.step()
        assert scheduler.get_last_lr() == opt.get_last_lr() == rates_in_groups(opt)
        assert scheduler.last_epoch == opt.iteration == k + 1
    assert scheduler.base_lrs == [0.1, 0.2, 0.3]
    assert scheduler.state_dict() == {}
    scheduler.load_state_dict({})
    scheduler.load_state_dict({"last_epoch": 5})
    with pytest.warns(UserWarning, match=r"last_epoch=77, and the optimizer is at step 5, which"):
        scheduler.load_state_dict({"last_epoch": 77, "_step_count": 3})
    assert scheduler.last_epoch == 5


def test_the_scheduler_view_shows_the_rate_that_torchs_scheduler_shows():
    """Between the two steps, where frameworks log, the view shows the rate that was used."""
    problem, opt = wrapped(base_lr=0.1, max_lr=0.5, step_size_up=3)
    param = torch.nn.Parameter(torch.zeros(1))
    twin = torch.optim.SGD([param], lr=0.5)
    reference = torch.optim.lr_scheduler.CyclicLR(
        twin, base_lr=0.1, max_lr=0.5, step_size_up=3, cycle_momentum=False
    )
    scheduler = opt.scheduler
    for k in range(10):
        assert scheduler.get_last_lr() == pytest.approx(reference.get_last_lr())
        problem.step(opt, k)
        twin.step()
        assert scheduler.get_last_lr() == pytest.approx(reference.get_last_lr())
        assert scheduler.get_lr() == opt.get_last_lr()  # ignite writes these, before a step
        scheduler.step()
        reference.step()
    opt.set_iteration(4)
    scheduler.load_state_dict({})  # as frameworks do after they have restored the optimizer
    assert scheduler.get_last_lr() == opt.get_last_lr()


# ---- AMP


def test_a_gradscaler_overflow_moves_nothing():
    problem, opt = wrapped()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for k in range(6):
        opt.zero_grad()
        loss = problem.loss(k)
        scaler.scale(loss).backward()
        overflow = k in (2, 3)
        if overflow:
            problem.params[1].grad[0] = float("inf")
        before, position, rate = problem.values(), opt.iteration, rates_in_groups(opt)
        scaler.step(opt)
        scaler.update()
        if overflow:
            assert (opt.iteration, rates_in_groups(opt)) == (position, rate)
            assert all(torch.equal(a, b) for a, b in zip(before, problem.values(), strict=True))
        else:
            assert opt.iteration == position + 1
    assert opt.iteration == 4


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("name", ["adam-fused", "sgd-fused", "adagrad-fused"])
def test_gradscalers_fused_path_is_the_wrapped_optimizers_own(name, max_grad_norm, monkeypatch):
    case = BY_NAME[name]
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "torch")  # the reference's path, bit for bit
    problem, opt = wrapped(case=case, max_grad_norm=max_grad_norm)
    twin, reference = wrapped(case=case)
    assert opt._step_supports_amp_scaling is True
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    taken = 0
    for k in range(6):
        opt.zero_grad()
        scaler.scale(problem.loss(k)).backward()
        if k == 3:
            problem.params[1].grad[0] = float("nan")
        before, position = problem.values(), opt.iteration
        scaler.step(opt)
        scaler.update()
        if k == 3:
            assert opt.iteration == position
            assert all(torch.equal(a, b) for a, b in zip(before, problem.values(), strict=True))
            continue
        taken += 1
        assert opt.iteration == taken
        twin.backward(k)
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(twin.params, max_grad_norm)
        reference.step()
        # powers of two: unscaling is exact
        assert all(torch.equal(a, b) for a, b in zip(problem.params, twin.params, strict=True))
    assert not hasattr(opt.optimizer, "found_inf")


def test_amp_scaling_is_not_claimed_for_the_user():
    _, opt = wrapped()
    assert getattr(opt, "_step_supports_amp_scaling", False) is False


def test_a_return_to_the_same_step_asks_the_scale_fn_again():
    factor = [1.0]
    sgd = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.4)
    opt = CyclicalOptimizer(sgd, step_size_up=1, scale_fn=lambda cycle: factor[0])
    opt.step()
    assert opt.param_groups[0]["lr"] == 0.4
    factor[0] = 0.5
    opt.set_iteration(1)
    assert opt.param_groups[0]["lr"] == opt.get_last_lr()[0] == 0.25
