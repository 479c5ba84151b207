"""Ordinary steps, which native code takes alone, equal those of the general way."""

from __future__ import annotations

import copy
import gc
import itertools
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from internals import outcome_of, plan_of, take_the_general_way
from native_helpers import BY_NAME, KERNELS, assert_identical, drawn, members, parameters

from clr_optim import CyclicalOptimizer
from clr_optim.core import step as general
from clr_optim.schedule import one_cycle, ramp, sequence, triangular, triangular2, warm_restarts

pytestmark = pytest.mark.usefixtures("native_kernels")

POLICIES: dict[str, Callable[[], Any]] = {
    "triangular": lambda: triangular(3),
    "triangular2": lambda: triangular2(4, step_size_down=7),
    "exp_range": lambda: "exp_range",
    "exp_range_bounds": lambda: "exp_range_bounds",
    "one_cycle": lambda: one_cycle(40),
    "warm_restarts": lambda: warm_restarts(9),
    "sequence": lambda: sequence([(ramp(5), 5), (triangular(2), 12), (triangular(31), None)]),
}


@pytest.fixture
def generals(monkeypatch):
    """A list that grows at every step that takes the general way."""
    taken: list[Any] = []
    fused = general._fused_step

    def counted(context: Any, backend: Any) -> int:
        taken.append(context)
        return fused(context, backend)

    monkeypatch.setattr(general, "_fused_step", counted)
    return taken


def probe(policy: Any = "triangular", groups: int = 1, lr: Any = 0.5, **options: Any) -> Any:
    """Return an SGD whose step at gradient 1 subtracts exactly the rate from 0."""
    params = [{"params": [parameter()], "lr": copy.copy(lr)} for _ in range(groups)]
    return (
        CyclicalOptimizer(torch.optim.SGD(params), policy, **{"step_size_up": 5, **options})
        if isinstance(policy, str)
        else CyclicalOptimizer(torch.optim.SGD(params), policy, **options)
    )


def parameter() -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    return weight


def used(opt: Any) -> list[float]:
    """Take a step and return the rate that it used in each group."""
    for p in members(opt):
        p.data.zero_()
    opt.step()
    return [-group["params"][0].item() for group in opt.param_groups]


# ---- rates


@pytest.mark.parametrize("name", POLICIES)
def test_every_step_uses_the_rate_of_its_position(name, generals):
    opt = probe(POLICIES[name](), groups=2)
    for k in range(300):
        assert opt.param_groups[0]["clr_step"] == k
        assert [group["lr"] for group in opt.param_groups] == opt.lr_at(k)
        assert used(opt) == opt.lr_at(k)
    assert opt.iteration == 300
    assert len(generals) == 1  # the first step builds the plan


EVENTS = st.lists(
    st.tuples(
        st.integers(1, 140),
        st.sampled_from(
            ["bounds", "iteration", "load", "group", "rate", "ask", "hook", "same rate", "copy"]
        ),
    ),
    min_size=1,
    max_size=6,
)


@given(EVENTS, st.sampled_from(sorted(POLICIES)))
@settings(deadline=None, max_examples=40)
@pytest.mark.filterwarnings("ignore:lr was written from outside")
@pytest.mark.filterwarnings("ignore:register_cycle_end_hook has no effect")
def test_rates_after_any_change_of_course(events, name):
    opt = probe(POLICIES[name]())
    for steps, event in events:
        for _ in range(steps):
            k = opt.param_groups[0]["clr_step"]
            expected = opt.lr_at(k)
            assert used(opt) == expected
            assert opt.param_groups[0]["clr_step"] == k + 1
        k = opt.iteration
        if event == "bounds":
            opt.set_bounds(max_lr=0.5 + k / 1000)
        elif event == "iteration":
            opt.set_iteration(2 * k + 1)
        elif event == "load":
            saved = copy.deepcopy(opt.state_dict())
            opt.set_iteration(k + 9)
            opt.load_state_dict(saved)
        elif event == "group":
            opt.add_param_group({"params": [parameter()], "lr": 0.25})
        elif event == "rate":
            opt.param_groups[0]["lr"] = 7.0
        elif event == "same rate":
            opt.param_groups[0]["lr"] = float(repr(opt.param_groups[0]["lr"]))
        elif event == "hook":
            opt.register_cycle_end_hook(lambda _: None)
        elif event == "copy":
            opt = copy.deepcopy(opt)
            for p in members(opt):
                p.grad = torch.ones_like(p)


def test_values_are_computed_in_blocks(generals):
    calls = []

    opt = probe("triangular")
    mirror = opt._shared.mirror
    evaluate = mirror.evaluate
    mirror.evaluate = lambda position, *bounds: (
        calls.append(position) or evaluate(position, *bounds)
    )
    for _ in range(1000):
        opt.step()
    assert len(generals) == 1
    # Blocks of 1, 2, 4, … 64, and then of 64.
    assert calls == [*range(calls[0], calls[0] + len(calls))]
    assert len(calls) <= 1000 + 64


# ---- the same bits as the general way


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "cycled momentum": {"cycle_momentum": True},
    "momentum down to 0": {"cycle_momentum": True, "base_momentum": 0.0},
    "both": {"cycle_momentum": True, "max_grad_norm": 0.01},
}


def can(case: Any, options: dict[str, Any]) -> bool:
    (group,) = case.make(parameters(drawn([(2,)], torch.float32))).param_groups
    return not options.get("cycle_momentum") or "betas" in group or group.get("momentum", 0) > 0


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_ordinary_steps_give_the_bits_of_the_general_way(case, options, monkeypatch):
    if not can(case, OPTIONS[options]):
        pytest.skip("there is no momentum to cycle")
    runs = []
    for general_way in (False, True):
        with monkeypatch.context() as patch:
            if general_way:
                take_the_general_way(patch)
            opt = case.ours(
                parameters(drawn([(4, 3), (5,), ()], torch.float32)),
                step_size_up=3,
                **OPTIONS[options],
            )
            norms = []
            for seed in range(90):
                shapes = [p.shape for p in members(opt)]
                for p, grad in zip(members(opt), drawn(shapes, torch.float32, seed), strict=True):
                    p.grad = None if seed % 11 == 5 and p.dim() == 1 else grad
                opt.step()
                norms.append(None if opt.grad_norm is None else opt.grad_norm.item())
            runs.append((opt, norms))
    (one, norms), (two, others) = runs
    assert_identical(one, two)
    assert norms == others
    assert one.iteration == two.iteration == 90
    plain = [
        {key: value for key, value in group.items() if key != "params"}
        for group in (one.param_groups[0], two.param_groups[0])
    ]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_rate_is_filled_and_marked_as_changed(dtype, generals):
    lr = torch.tensor(0.5, dtype=dtype)
    opt = probe("exp_range", lr=lr, groups=2)
    tensors = [group["lr"] for group in opt.param_groups]
    opt.step()
    for k in range(1, 150):
        versions = [t._version for t in tensors]
        rates = [t.item() for t in tensors]
        assert rates == [torch.tensor(r, dtype=dtype).item() for r in opt.lr_at(k)]
        assert used(opt) == rates
        assert all(g["lr"] is t for g, t in zip(opt.param_groups, tensors, strict=True))
        assert [t._version for t in tensors] == [v + 1 for v in versions]
    assert len(generals) <= 2


def test_a_filled_tensor_rate_is_overruled():
    opt = probe("triangular", lr=torch.tensor(0.5, dtype=torch.float64))
    for _ in range(9):
        opt.step()
    opt.param_groups[0]["lr"].fill_(3.0)
    with pytest.warns(UserWarning, match="lr was written from outside"):
        assert used(opt) == opt.lr_at(9)


# ---- hooks at the ends of cycles


@pytest.mark.parametrize("since", [0, 1, 17, 40])
def test_cycle_end_hooks_are_called_when_due(since, generals):
    opt = probe("triangular", step_size_up=6)
    seen: list[int] = []
    handle = None
    for k in range(100):
        if k == since:
            handle = opt.register_cycle_end_hook(lambda opt: seen.append(opt.iteration))
        opt.step()
    assert seen == [k for k in range(12, 101, 12) if k > since]
    # A step with a hook due takes the general way, the others do not.
    assert len(generals) <= 2 + len(seen)
    assert handle is not None
    handle.remove()
    del generals[:]
    for _ in range(50):
        opt.step()
    assert not generals


# ---- anything unusual


def started(**options: Any) -> Any:
    opt = BY_NAME["adam-wd"].ours(
        parameters(drawn([(4, 3), (5,)], torch.float64)), step_size_up=3, **options
    )
    for seed in range(5):
        for p, grad in zip(members(opt), drawn([(4, 3), (5,)], torch.float64, seed), strict=True):
            p.grad = grad
        opt.step()
    for p, grad in zip(members(opt), drawn([(4, 3), (5,)], torch.float64, 9), strict=True):
        p.grad = grad
    return opt


def write(opt: Any, key: str, value: Any) -> None:
    opt.param_groups[0][key] = value


UNUSUAL: dict[str, tuple[str, Callable[[Any], object]]] = {
    "GradScaler": ("OBSERVED", lambda o: setattr(o, "found_inf", torch.zeros(()))),
    "pre-hook": ("OBSERVED", lambda o: o.register_step_pre_hook(lambda *_: None)),
    "post-hook": ("OBSERVED", lambda o: o.register_step_post_hook(lambda *_: None)),
    "inner hook": ("REPLACED", lambda o: o.optimizer.register_step_post_hook(lambda *_: None)),
    "own step": ("REPLACED", lambda o: setattr(o.optimizer, "step", lambda *_: None)),
    "state": ("REPLACED", lambda o: setattr(o.optimizer, "state", copy.copy(o.state))),
    "groups": ("REPLACED", lambda o: setattr(o.optimizer, "param_groups", list(o.param_groups))),
    "rate": ("WRITTEN", lambda o: write(o, "lr", 3.0)),
    "tensor rate": ("WRITTEN", lambda o: write(o, "lr", torch.tensor(3.0))),
    "position": ("WRITTEN", lambda o: write(o, "clr_step", 77)),
    "bound": ("WRITTEN", lambda o: write(o, "clr_max_lr", 77.0)),
    "capturable": ("OUTDATED", lambda o: write(o, "capturable", True)),
    "bounds": ("WRITTEN", lambda o: o.set_bounds(max_lr=3.0)),
    "iteration": ("WRITTEN", lambda o: o.set_iteration(30)),
    "setting": ("OUTDATED", lambda o: write(o, "weight_decay", 0.3)),
    "group": ("OUTDATED", lambda o: o.param_groups.append(copy.copy(o.param_groups[0]))),
    "memory": ("OUTDATED", lambda o: setattr(members(o)[0], "data", members(o)[0].data.clone())),
    "moments": ("OUTDATED", lambda o: o.state[members(o)[0]].update(
        exp_avg=o.state[members(o)[0]]["exp_avg"].clone())),
    "gradient": ("OUTDATED", lambda o: setattr(
        members(o)[0], "grad", torch.ones(3, 4, dtype=torch.float64).t())),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_anything_unusual_ends_the_call_before_anything_has_changed(name):
    outcome, change = UNUSUAL[name]
    opt = started()
    change(opt)
    before = [p.detach().clone() for p in members(opt)]
    state = copy.deepcopy(list(opt.state.values()))
    groups = [dict(group) for group in opt.param_groups]
    steps = plan_of(opt).steps
    assert outcome_of(opt) == outcome
    assert all(map(torch.equal, members(opt), before))
    for now, then in zip(opt.state.values(), state, strict=True):
        assert all(torch.equal(now[key], then[key]) for key in then)
    for group, then in zip(opt.param_groups, groups, strict=True):
        assert group.keys() == then.keys()
        assert all(group[key] is then[key] for key in then)
    assert plan_of(opt).steps == steps


def test_a_profiler_is_served_the_general_way():
    opt = started()
    with torch.profiler.profile(acc_events=True) as profile:
        assert outcome_of(opt) == "OBSERVED"
        opt.step()
    assert any("step" in event.key.lower() for event in profile.key_averages())
    assert outcome_of(opt) in ("TAKEN", "OUT_OF_VALUES")


# ---- memory


def test_nothing_leaks():
    """Steps, blocks, plans built anew, and errors on every path."""
    opt = started(cycle_momentum=True, max_grad_norm=1.0)
    kinds = [change for name, (_, change) in UNUSUAL.items() if name in (
        "rate", "bounds", "iteration", "memory", "moments", "setting", "gradient")]  # fmt: skip

    def run(steps: int) -> None:
        for k in range(steps):
            if k % 50 == 0:
                next(changes)(opt)
            opt.step()

    changes = itertools.cycle(kinds)
    with pytest.warns(UserWarning, match="lr was written"):
        run(1000)
    gc.collect()
    tracemalloc.start()
    try:
        run(1000)
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
        run(6000)
        gc.collect()
        second = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert second - first < 20_000, (first, second)


@pytest.mark.parametrize("collects", [True, False])
def test_an_optimizer_is_freed_at_once(collects):
    opt = started()
    weights = [weakref.ref(p) for p in members(opt)]
    was_enabled = gc.isenabled()
    if not collects:
        gc.disable()
    try:
        del opt
        if collects:
            gc.collect()
        assert [weight() for weight in weights] == [None] * 2
    finally:
        if was_enabled:
            gc.enable()


def test_a_tensor_rate_that_is_negated_in_its_place_is_overruled():
    opt = probe("triangular", lr=torch.tensor(0.5, dtype=torch.float64))
    for _ in range(9):
        opt.step()
    lr = opt.param_groups[0]["lr"]
    lr.data = torch._neg_view(lr.data.clone())
    with pytest.warns(UserWarning, match="lr was written from outside"):
        assert used(opt) == opt.lr_at(9)
    assert opt.param_groups[0]["lr"].item() == opt.lr_at(10)[0]


@pytest.mark.parametrize("served", [0, 1], ids=["no group", "one group"])
def test_groups_that_no_kernel_serves_and_that_have_no_gradient(served):
    weights = [parameter() for _ in range(2)]
    opt = CyclicalOptimizer(
        torch.optim.Adam([{"params": [weight]} for weight in weights], lr=0.5),
        step_size_up=5,
        cycle_momentum=True,
    )
    for group, weight in zip(opt.param_groups, weights[: 2 - served], strict=False):
        group["differentiable"] = True
        weight.grad = None
    for k in range(40):
        assert [group["lr"] for group in opt.param_groups] == opt.lr_at(k)
        opt.step()
    assert opt.iteration == 40
    assert len(opt.state) == served
