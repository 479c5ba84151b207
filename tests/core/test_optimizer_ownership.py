"""The wrapped optimizer keeps all it owns. Hooks, checkpoints and copies lose nothing."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from cases import BY_NAME, EVERY_CLASS, Problem, SignDescent, assert_same, feed
from internals import drop_cycle_end_hooks
from places import TESTS
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from clr_optim import CyclicalOptimizer, Schedule
from clr_optim.schedule import sequence, triangular, triangular2


@pytest.fixture(autouse=True, params=["torch", "native"])
def backend(request, monkeypatch):
    """Run every test on every backend."""
    monkeypatch.setenv("CLR_OPTIM_BACKEND", request.param)
    return request.param


ids = pytest.mark.parametrize("case", EVERY_CLASS, ids=lambda c: c.name)


def wrap(case, problem, **options):
    options = {"policy": "triangular2", "step_size_up": 3, **options}
    return CyclicalOptimizer(case.make(problem.params), **options)


def saved(optimizer):
    """Return the state dict after torch.save and torch.load(weights_only=True)."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@ids
def test_it_is_an_optimizer_that_shares_all_and_copies_nothing(case):
    problem = Problem(case)
    inner = case.make(problem.params)
    opt = CyclicalOptimizer(inner)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.optimizer is inner
    assert opt.param_groups is inner.param_groups
    assert opt.state is inner.state
    assert opt.defaults is inner.defaults
    plain = case.make(Problem(case).params)
    assert set(inner.state.keys()) == set() or len(inner.state) == len(plain.state)
    assert set(inner.param_groups[0]) - set(plain.param_groups[0]) == {
        "clr_step",
        "clr_base_lr",
        "clr_max_lr",
        "clr_schedule",
    }
    for key, value in plain.defaults.items():
        assert inner.defaults[key] == value


@ids
def test_state_has_torchs_names_shapes_and_dtypes(case):
    mine, torchs = Problem(case), Problem(case)
    opt, reference = wrap(case, mine), case.make(torchs.params)
    mine.run(opt, range(3), closure=case.closure)
    torchs.run(reference, range(3), closure=case.closure)
    for p, q in zip(mine.params, torchs.params, strict=True):
        ours, expected = opt.state[p], reference.state[q]
        assert list(ours) == list(expected)
        for name, value in expected.items():
            assert type(ours[name]) is type(value)
            if isinstance(value, torch.Tensor):
                assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype)


def test_hooks_of_all_six_kinds_fire_once_each():
    problem = Problem(BY_NAME["adam"])
    opt = wrap(BY_NAME["adam"], problem)
    fired = []

    def note(name, expected, result=None):
        def hook(*args):
            assert args[0] is expected
            fired.append(name)
            return result

        return hook

    for who, o in (("wrapper", opt), ("wrapped", opt.optimizer)):
        o.register_step_pre_hook(note(f"{who} step pre", o))
        o.register_step_post_hook(note(f"{who} step post", o))
        o.register_state_dict_pre_hook(note(f"{who} state pre", o))
        o.register_state_dict_post_hook(note(f"{who} state post", o))
        o.register_load_state_dict_pre_hook(note(f"{who} load pre", o))
        o.register_load_state_dict_post_hook(note(f"{who} load post", o))
    handles = [
        register_optimizer_step_pre_hook(note("global pre", opt)),
        register_optimizer_step_post_hook(note("global post", opt)),
    ]
    try:
        problem.step(opt, 0)
    finally:
        for handle in handles:
            handle.remove()
    assert fired == [
        "global pre", "wrapper step pre", "wrapped step pre",
        "wrapped step post", "wrapper step post", "global post",
    ]  # fmt: skip
    fired.clear()
    state = opt.state_dict()
    assert fired == [
        "wrapper state pre", "wrapped state pre", "wrapped state post", "wrapper state post",
    ]  # fmt: skip
    fired.clear()
    opt.load_state_dict(state)
    assert fired == [
        "wrapper load pre",
        "wrapped load pre",
        "wrapped load post",
        "wrapper load post",
    ]


CALLS = {
    "nothing": lambda opt, f: opt.step(),
    "none": lambda opt, f: opt.step(None),
    "none by name": lambda opt, f: opt.step(closure=None),
    "closure": lambda opt, f: opt.step(f),
    "closure by name": lambda opt, f: opt.step(closure=f),
}


@pytest.mark.parametrize("profiled", [False, True], ids=["", "profiled"])
@pytest.mark.parametrize("call", CALLS)
def test_hooks_see_what_torchs_own_see(call, profiled):
    def run(make):
        problem = Problem(BY_NAME["sgd"])
        problem.backward(0)
        opt = make(BY_NAME["sgd"].make(problem.params))
        seen = []

        def closure():
            seen.append("closure")
            return problem.backward(0)

        def note(name):
            def hook(o, args, kwargs):
                if o is opt:
                    args = ["self" if a is opt else "f" if a is closure else a for a in args]
                    kwargs = {k: "f" if v is closure else v for k, v in kwargs.items()}
                    seen.append((name, args, kwargs))

            return hook

        handles = [
            opt.register_step_pre_hook(note("first own pre")),
            opt.register_step_pre_hook(note("own pre")),
            opt.register_step_post_hook(note("own post")),
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
        ]
        try:
            with torch.profiler.profile() if profiled else nullcontext():
                CALLS[call](opt, closure)
            everything = len(seen)
            # Each of the two is enough.
            for i, handle in enumerate(handles):
                handles[i] = None
                handle.remove()
                CALLS[call](opt, closure)
        finally:
            for handle in filter(None, handles):
                handle.remove()
        assert len(seen) > everything
        return seen

    assert run(CyclicalOptimizer) == run(lambda inner: inner)


def test_hooks_fire_once_around_a_subclasss_step():
    class Mine(CyclicalOptimizer):
        def step(self, closure=None):
            fired.append("step")
            return super().step(closure)

    fired = []
    problem = Problem(BY_NAME["sgd"])
    problem.backward(0)
    opt = Mine(BY_NAME["sgd"].make(problem.params))
    opt.register_step_pre_hook(lambda *a: fired.append("pre"))
    opt.register_step_post_hook(lambda *a: fired.append("post"))
    opt.step()
    assert fired == ["pre", "step", "post"]
    # And around a ``step`` that a framework has replaced on the object.
    own = opt.step
    opt.step = lambda: own()
    opt.step()
    assert fired == ["pre", "step", "post"] * 2
    assert opt.iteration == 2


@pytest.mark.parametrize("profiler", [torch.profiler.profile, torch.autograd.profiler.profile])
def test_a_profiler_finds_the_step_once(profiler):
    problem = Problem(BY_NAME["adam"])
    opt = wrap(BY_NAME["adam"], problem)
    problem.step(opt, 0)
    problem.backward(1)
    with profiler() as profile:
        opt.step()
    found = {e.key: e.count for e in profile.key_averages() if e.key.startswith("Optimizer.step")}
    assert found == {"Optimizer.step#CyclicalOptimizer.step": 1}


def test_the_steps_signature_is_what_it_takes():
    # GradScaler looks for an argument "grad_scaler", and would pass itself.
    opt = wrap(BY_NAME["adam"], Problem(BY_NAME["adam"]))
    assert list(inspect.signature(opt.step).parameters) == ["closure", "args", "kwargs"]


def test_hooks_may_replace_what_they_are_given():
    problem = Problem(BY_NAME["sgd"])
    opt = wrap(BY_NAME["sgd"], problem)
    calls = []

    def closure():
        calls.append(1)
        return problem.backward(0)

    handle = opt.optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), kwargs))
    opt.step()
    assert calls == [1]
    handle.remove()
    # By name too; and from the outer one, what the inner one may then take away.
    for own in (opt, opt.optimizer):
        handle = own.register_step_pre_hook(lambda o, args, kwargs: ((o,), {"closure": closure}))
        assert opt.step() is not None
        handle.remove()
    assert calls == [1] * 3
    for give in ({"closure": closure}, {}):
        handle = opt.optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o,), {}))
        assert opt.step(*([] if give else [closure]), **give) is None
        handle.remove()
    assert calls == [1] * 3
    handle = opt.optimizer.register_step_pre_hook(lambda o, args, kwargs: 3)
    with pytest.raises(RuntimeError, match=r"None or \(args, kwargs\), got 3"):
        opt.step()
    handle.remove()
    opt.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1})
    assert opt.state_dict()["extra"] == 1
    opt.register_load_state_dict_pre_hook(lambda o, d: {k: v for k, v in d.items() if k != "extra"})
    opt.load_state_dict(opt.state_dict())


def test_other_attributes_reach_the_wrapped_optimizer():
    class ScheduleFree(torch.optim.SGD):
        mode = "train"

        def eval(self):
            self.mode = "eval"

    problem = Problem(BY_NAME["sgd"])
    opt = CyclicalOptimizer(ScheduleFree(problem.params, lr=0.1))
    opt.eval()
    assert opt.mode == opt.optimizer.mode == "eval"
    assert not hasattr(opt, "consolidate_state_dict")
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = opt.nothing_of_the_kind
    assert not callable(opt)
    opt.state = opt.optimizer.state
    opt.a_new_attribute = 1
    assert weakref_works(opt)


def weakref_works(obj):
    import weakref

    return weakref.ref(obj)() is obj


def test_steps_with_more_than_a_closure_and_patched_steps():
    class Scaled(torch.optim.SGD):
        seen = None

        def step(self, closure=None, scale=1, *, extra=None):
            self.seen = (scale, extra)
            return super().step(closure)

    problem = Problem(BY_NAME["sgd"])
    opt = CyclicalOptimizer(Scaled(problem.params, lr=0.1))
    problem.backward(0)
    opt.step(None, 3, extra="x")
    assert opt.optimizer.seen == (3, "x")
    assert opt.iteration == 1

    patched = []
    inner = torch.optim.SGD(problem.params, lr=0.1)
    opt = CyclicalOptimizer(inner)
    own = inner.step
    inner.step = lambda closure=None: patched.append(1) or own(closure)
    fired = []
    inner.register_step_post_hook(lambda *a: fired.append(1))
    opt.step()
    assert (patched, fired, opt.iteration) == ([1], [1], 1)


def test_repr_shows_policy_position_and_the_wrapped_optimizer(backend):
    opt = wrap(BY_NAME["adam"], Problem(BY_NAME["adam"]))
    text = repr(opt)
    assert text.startswith(
        f"CyclicalOptimizer (triangular2, iteration 0, backend {backend})\nAdam ("
    )
    assert "clr_max_lr: 0.01" in text
    assert "clr_schedule" not in text
    assert f"{backend}: 3 parameter tensors, 20 values, Adam" in opt.explain()


# ---- checkpoints


@pytest.mark.parametrize("stop", range(8))
@ids
def test_save_and_load_at_any_step_is_bit_identical(case, stop):
    whole, first, second = Problem(case), Problem(case), Problem(case)
    reference = wrap(case, whole, cycle_momentum=False)
    whole.run(reference, range(14), closure=case.closure)

    opt = wrap(case, first)
    first.run(opt, range(stop), closure=case.closure)
    for p, q in zip(first.params, second.params, strict=True):
        q.data.copy_(p)
    resumed = wrap(case, second)
    resumed.load_state_dict(saved(opt))
    assert resumed.iteration == stop
    assert resumed.get_last_lr() == opt.get_last_lr() == resumed.lr_at(stop)
    assert [g["lr"] for g in resumed.param_groups] == resumed.get_last_lr()
    second.run(resumed, range(stop, 14), closure=case.closure)
    assert_same(second.values(), whole.values())


@ids
def test_a_plain_torch_checkpoint_loads_and_the_other_way_round(case, backend):
    whole, part = Problem(case), Problem(case)
    plain = case.make(whole.params)
    schedule = triangular2(3)
    base, top = case.lr / 4, case.lr

    def rate(k):
        feed(plain, [schedule(k, base, top)])

    whole.run(plain, range(14), closure=case.closure, before=rate)

    # plain -> wrapped
    inner = case.make(part.params)
    part.run(
        inner, range(5), closure=case.closure,
        before=lambda k: feed(inner, [schedule(k, base, top)]),
    )  # fmt: skip
    file = saved(inner)
    opt = wrap(case, part)
    opt.load_state_dict(file)
    assert opt.iteration == 0  # a plain checkpoint has no position
    assert opt.param_groups[0]["clr_max_lr"] == top  # and the bounds stay
    opt.set_iteration(5)
    part.run(opt, range(5, 9), closure=case.closure)

    # wrapped -> plain
    back = case.make(part.params)
    back.load_state_dict(saved(opt))
    part.run(
        back, range(9, 14), closure=case.closure,
        before=lambda k: feed(back, [schedule(k, base, top)]),
    )  # fmt: skip
    if backend == "torch":
        assert_same(part.values(), whole.values())
    for a, b in zip(part.values(), whole.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


WORKER = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from cases import EVERY_CLASS, Problem
from clr_optim import CyclicalOptimizer

start, stop, load, save = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
checkpoint = torch.load(load, weights_only=True) if load != "-" else None
out = {}
for case in EVERY_CLASS:
    for closure in (False, True):
        if closure < case.closure:
            continue
        problem = Problem(case)
        opt = CyclicalOptimizer(case.make(problem.params), "exp_range", step_size_up=4, gamma=0.9)
        key = f"{case.name} {closure}"
        if checkpoint:
            for p, q in zip(problem.params, checkpoint[key]["params"], strict=True):
                p.data.copy_(q)
            opt.load_state_dict(checkpoint[key]["optimizer"])
        problem.run(opt, range(start, stop), closure=closure)
        out[key] = {"params": problem.values(), "optimizer": opt.state_dict()}
torch.save(out, save)
"""


def test_resume_in_a_new_process_with_and_without_closures(tmp_path):
    here = str(TESTS)

    def worker(start, stop, load, save):
        args = [here, str(start), str(stop), str(load), str(save)]
        subprocess.run([sys.executable, "-c", WORKER, *args], check=True)
        return torch.load(save, weights_only=True)

    whole = worker(0, 13, "-", tmp_path / "whole.pt")
    worker(0, 6, "-", tmp_path / "part.pt")
    resumed = worker(6, 13, tmp_path / "part.pt", tmp_path / "resumed.pt")
    assert len(whole) == 2 * len(EVERY_CLASS) - 1
    for key, run in whole.items():
        assert_same(resumed[key]["params"], run["params"])
        groups = resumed[key]["optimizer"]["param_groups"]
        assert groups == run["optimizer"]["param_groups"]
        assert groups[0]["clr_step"] == 13


def test_a_state_dict_holds_only_plain_things():
    opt = wrap(BY_NAME["adam"], Problem(BY_NAME["adam"]), cycle_momentum=True)

    def check(value):
        if isinstance(value, dict):
            for k, v in value.items():
                assert isinstance(k, (str, int))
                check(v)
        elif isinstance(value, (list, tuple)):
            for v in value:
                check(v)
        else:
            assert value is None or isinstance(value, (int, float, str, torch.Tensor)), value

    check(opt.state_dict())
    group = opt.state_dict()["param_groups"][0]
    assert Schedule.from_json(group["clr_schedule"]) == opt.schedule
    assert '"format":1' in group["clr_schedule"]


def test_loading_under_another_policy_warns_and_says_which_wins():
    case = BY_NAME["adam"]
    problem = Problem(case)
    opt = wrap(case, problem)
    problem.run(opt, range(4))
    other = CyclicalOptimizer(case.make(Problem(case).params), "triangular", step_size_up=5)
    pattern = (
        r" triangular2\(step_size_up=3\); .*policy, triangular\(step_size_up=5\), decides.* step 4"
    )
    with pytest.warns(UserWarning, match=pattern) as w:
        other.load_state_dict(opt.state_dict())
    assert w[0].filename == __file__
    assert other.schedule == triangular(5)
    assert other.iteration == 4
    assert other.param_groups[0]["clr_schedule"] == other.schedule.to_json()
    assert other.param_groups[0]["lr"] == other.lr_at(4)[0]
    again = CyclicalOptimizer(case.make(Problem(case).params), "triangular", step_size_up=5)
    again.load_state_dict(other.state_dict())  # the same policy: no warning


def test_bounds_come_with_our_checkpoints():
    case = BY_NAME["adam"]
    opt = wrap(case, Problem(case), base_lr=0.001, max_lr=0.002)
    other = wrap(case, Problem(case), base_lr=0.1, max_lr=0.2)
    with pytest.warns(UserWarning, match=r"checkpoint's bounds hold .* set_bounds\(base_lr=0.1"):
        other.load_state_dict(opt.state_dict())
    assert (other.param_groups[0]["clr_base_lr"], other.param_groups[0]["clr_max_lr"]) == (
        0.001,
        0.002,
    )
    assert other.lr_at(3) == [0.002]


def test_a_checkpoint_loaded_before_wrapping_resumes_too():
    case = BY_NAME["adam"]
    problem = Problem(case)
    opt = wrap(case, problem)
    problem.run(opt, range(4))
    inner = case.make(Problem(case).params)
    inner.load_state_dict(saved(opt))
    late = CyclicalOptimizer(inner, "triangular2", step_size_up=3)
    assert late.iteration == 4
    # its lr was a rate in mid-cycle, not the user's choice
    assert late.param_groups[0]["clr_max_lr"] == 0.01
    assert late.get_last_lr() == opt.get_last_lr()
    with pytest.warns(UserWarning, match=r"wrapped optimizer was written .* set_iteration\(0\)"):
        CyclicalOptimizer(inner, "triangular", step_size_up=3)


@pytest.mark.parametrize("ours", [True, False], ids=["our checkpoint", "a plain one"])
def test_a_checkpoint_loaded_beneath_us_is_noticed(ours):
    case = BY_NAME["adam"]
    problem = Problem(case)
    opt = wrap(case, problem)
    problem.run(opt, range(4))
    source = wrap(case, Problem(case), max_lr=0.02) if ours else case.make(Problem(case).params)
    if ours:
        source.set_iteration(9)
    opt.optimizer.load_state_dict(source.state_dict())
    assert opt.param_groups is opt.optimizer.param_groups
    problem.step(opt, 0)
    assert opt.iteration == (10 if ours else 1)
    assert opt.param_groups[0]["clr_max_lr"] == (0.02 if ours else 0.01)
    assert opt.param_groups[0]["lr"] == opt.lr_at(opt.iteration)[0]


def test_load_state_dict_takes_its_argument_by_keyword():
    opt = wrap(BY_NAME["adam"], Problem(BY_NAME["adam"]))
    opt.load_state_dict(state_dict=opt.state_dict())


def test_torchs_partial_setstate_is_understood():
    case = BY_NAME["adam"]
    problem = Problem(case)
    opt = wrap(case, problem)
    problem.run(opt, range(4))
    opt.__setstate__({"param_groups": opt.param_groups, "state": opt.state})
    assert opt.iteration == 4


# ---- copies


def same_course(opt, other, problem, twin, start):
    for k in range(start, start + 9):
        problem.step(opt, k)
        twin.step(other, k)
        assert other.iteration == opt.iteration
        assert other.get_last_lr() == opt.get_last_lr()
    assert_same(problem.values(), twin.values())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["adam", "sgd-momentum", "lbfgs", "muon"])
def test_copies_keep_position_and_policy(name, how):
    case = BY_NAME[name]
    problem, twin = Problem(case), Problem(case)
    policy = sequence([(triangular(2), 6), (triangular2(3), None)])
    opt = CyclicalOptimizer(case.make(problem.params), policy, max_grad_norm=3.0)
    problem.run(opt, range(5), closure=case.closure)
    opt.register_cycle_end_hook(lambda o: None)
    if how == "deepcopy":
        (twin.params, other) = copy.deepcopy((problem.params, opt))
    else:
        (twin.params, other) = pickle.loads(pickle.dumps((problem.params, other_or(opt))))
    assert other.optimizer is not opt.optimizer
    assert type(other.optimizer) is case.cls
    assert other.schedule == policy
    assert other.iteration == 5
    if not case.closure:
        same_course(opt, other, problem, twin, 5)


def other_or(opt):
    """Return the optimizer without cycle-end hooks, which no torch optimizer pickles."""
    drop_cycle_end_hooks(opt)
    return opt


def test_a_lambda_as_scale_fn_deepcopies_and_names_itself_when_pickled():
    case = BY_NAME["sgd"]
    problem = Problem(case)
    opt = CyclicalOptimizer(case.make(problem.params), scale_fn=lambda x: 1 / x, step_size_up=2)
    problem.run(opt, range(3))
    other = copy.deepcopy(opt)
    assert other.get_last_lr() == opt.get_last_lr()
    with pytest.raises(pickle.PicklingError, match=r"scale_fn=.*lambda.*cannot be pickled: define"):
        pickle.dumps(opt)
    saved(opt)  # a state dict does not hold the function


def half(x):
    return 0.5**x


def test_a_function_as_scale_fn_pickles():
    opt = CyclicalOptimizer(
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), scale_fn=half, step_size_up=2
    )
    opt.step()
    other = pickle.loads(pickle.dumps(opt))
    assert other.schedule == opt.schedule
    assert other.get_last_lr() == opt.get_last_lr()


def test_an_optimizer_no_library_has():
    problem = Problem(BY_NAME["sign-descent"])
    opt = CyclicalOptimizer(SignDescent(problem.params, lr=0.1))
    problem.run(opt, range(3))
    assert list(opt.state[problem.params[0]]) == ["mean"]


# ---- at a cycle's end


def test_weight_averaging_and_snapshots_at_cycle_ends():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    average = torch.optim.swa_utils.AveragedModel(model)
    opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), step_size_up=2)
    snapshots = []
    opt.register_cycle_end_hook(lambda o: average.update_parameters(model))
    opt.register_cycle_end_hook(lambda o: snapshots.append(copy.deepcopy(model.state_dict())))
    for k in range(14):
        opt.zero_grad()
        (model(torch.randn(4, 3)) ** 2).mean().backward()
        opt.step()
        assert len(snapshots) == (k + 1) // 4
    assert average.n_averaged.item() == 3
    mean = sum(s["weight"] for s in snapshots) / 3
    assert torch.allclose(average.module.weight, mean, rtol=1e-6)
