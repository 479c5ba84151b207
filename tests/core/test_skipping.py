"""``skip_above``: a skipped step never was, on the host; :class:`Spike` is what NumPy computes."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from cases import EVERY_CLASS, Case, Problem, assert_same
from internals import fail_native_launches, outcome_of
from native_helpers import BY_NAME, KERNELS, assert_identical, drawn, parameters
from torch import Tensor

from clr_optim import CyclicalOptimizer, Spike, lr_range_test
from clr_optim.gate import Gate

SHAPES = [(4, 3), (7,), ()]
STEPS = 500
BACKENDS = ["native", "torch"]
SPIKE = Spike(sigmas=8.0, window=16)


class Run:
    """An optimizer whose gradients depend on the step's number, and bad gradients between them."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.params = parameters(drawn(SHAPES, dtype))
        flags = {"fused": True, "foreach": None} if options.pop("fused", False) else {}
        self.opt = CyclicalOptimizer(
            case.make(self.params, **flags), **{"step_size_up": 7, **case.wrap, **options}
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=False)

    def scale(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
        self.scaler.scale(torch.ones(()))

    def gradients(self, number: int, bad: str | None = None) -> None:
        scale = self.scaler.get_scale()
        for p, grad in zip(self.params, drawn(SHAPES, p_dtype(self.params), number), strict=True):
            p.grad = grad * (1e4 if bad == "spike" else 1.0) * scale
        if bad in ("nan", "inf", "-inf"):
            self.params[1].grad[number % 7] = float(bad)

    def step(self, number: int, bad: str | None = None) -> None:
        self.gradients(number, bad)
        self.scaler.step(self.opt)
        self.scaler.update()


def p_dtype(params: list[Any]) -> torch.dtype:
    dtype: torch.dtype = params[0].dtype
    return dtype


def tries(seed: int, steps: int = STEPS) -> Iterator[tuple[int, str | None]]:
    """Yield the number of each step, and what is bad about a try; None for a step that happens."""
    chance = random.Random(seed)
    for number in range(steps):
        # A spike needs norms to be compared with.
        while number > 20 and chance.random() < 0.15:
            yield number, chance.choice(["nan", "inf", "-inf", "spike"])
        yield number, None


def assert_never_was(bumpy: Run, plain: Run, seed: int) -> None:
    spikes = others = 0
    for number, bad in tries(seed):
        bumpy.step(number, bad)
        spikes, others = spikes + (bad == "spike"), others + (bad not in (None, "spike"))
        if bad is None:
            plain.step(number)
    assert spikes > 10
    assert others > 20
    assert_identical(bumpy.opt, plain.opt)
    assert bumpy.opt.iteration == plain.opt.iteration == STEPS
    assert bumpy.opt.get_last_lr() == plain.opt.get_last_lr()
    # An overflow is the GradScaler's.
    assert bumpy.opt.skipped == spikes + (0 if bumpy.scaler.is_enabled() else others)


@pytest.mark.parametrize("scales", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clipped"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("native", torch.float32), ("native", torch.float64), ("native", torch.bfloat16),
        ("torch", torch.float32),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:skip_above=")
def test_skipped_steps_never_were(case, backend, dtype, clip, scales):
    skip_above = SPIKE if scales == (clip is None) else 500.0
    options = {"backend": backend, "max_grad_norm": clip}
    bumpy = Run(case, dtype, skip_above=skip_above, **options)
    plain = Run(case, dtype, **options)
    if scales:
        bumpy.scale()
    assert_never_was(bumpy, plain, seed=1)


@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clipped"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adamw-ams"])
@pytest.mark.filterwarnings("ignore:skip_above=")
def test_a_gradscalers_fused_path_tells_overflows_from_spikes(name, backend, clip):
    options = {"backend": backend, "max_grad_norm": clip, "fused": True}
    bumpy, plain = (Run(BY_NAME[name], skip_above=each, **options) for each in (500.0, None))
    bumpy.scale()
    plain.scale()
    assert bumpy.opt._step_supports_amp_scaling
    assert_never_was(bumpy, plain, seed=2)


@pytest.mark.parametrize("case", EVERY_CLASS, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:skip_above=")
def test_classes_without_kernels_skip_too(case):
    if case.sparse:
        pytest.skip("torch takes no norm of sparse gradients")
    runs = []
    for skip_above in (1e4, None):
        problem = Problem(case)
        opt = CyclicalOptimizer(case.make(problem.params), step_size_up=3, skip_above=skip_above)
        for k in range(12):
            if skip_above is not None and k % 3 == 0:
                problem_with_a_bad_step(problem, opt, case, k)
            problem.step(opt, k, case.closure)
        runs.append((opt, problem))
    (ours, mine), (twin, others) = runs
    assert ours.skipped == 4
    assert_same(mine.values(), others.values())
    assert ours.iteration == twin.iteration == 12


def problem_with_a_bad_step(problem: Problem, opt: Any, case: Case, k: int) -> None:
    """Try a step with a bad gradient; assert that it creates no state."""
    before = {p: set(s) if isinstance(s, dict) else s for p, s in opt.state.items()}

    def backward() -> Tensor:
        loss = problem.backward(k)
        problem.params[0].grad[0, 0] = float("nan") if k % 2 else 1e9
        return loss

    if case.closure:
        assert torch.is_tensor(opt.step(backward))
    else:
        backward()
        opt.step()
    after = {p: set(s) if isinstance(s, dict) else s for p, s in opt.state.items()}
    assert after.keys() == before.keys()
    assert all(after[p] == before[p] for p in after if isinstance(before[p], set))


# ---- Spike


WRONG_SPIKES: list[tuple[dict[str, Any], str]] = [
    ({"sigmas": 0}, "sigmas must be a finite number > 0, got 0"),
    ({"sigmas": math.inf}, "sigmas must be a finite number > 0, got inf"),
    ({"sigmas": "6"}, "sigmas must be a number, got '6'"),
    ({"window": 1}, "window must be an integer >= 2, got 1"),
    ({"window": 1.5}, r"window must be a whole number of steps, got 1\.5"),
    ({"warmup": 0}, "warmup must be an integer >= 1, got 0"),
    ({"warmup": "long"}, "warmup must be an integer >= 1, got 'long'"),
]


@pytest.mark.parametrize(("options", "pattern"), WRONG_SPIKES)
def test_a_wrong_spike_is_refused(options, pattern):
    with pytest.raises((TypeError, ValueError), match=f"^{pattern}"):
        Spike(**options)


def reference(norms: Any, spike: Spike) -> tuple[list[bool], tuple[float, ...]]:
    """Return which of the norms NumPy finds to be spikes, and the statistics after them."""
    count = mean = variance = row = skipped = np.float64(0)
    warmup = spike.window if spike.warmup is None else spike.warmup
    closed = []
    for norm in map(np.float64, norms):
        deviation = np.maximum(np.sqrt(variance), mean / 1024)
        is_spike = count >= warmup and norm > mean + spike.sigmas * deviation
        skips = not np.isfinite(norm) or bool(is_spike and row < spike.window)
        closed.append(skips)
        if skips:
            row, skipped = row + np.isfinite(norm), skipped + 1
        elif is_spike:
            count, mean, variance, row = map(np.float64, (1, norm, 0, 0))
        else:
            count, row = count + 1, np.float64(0)
            weight = np.maximum(1 / count, np.float64(1) / spike.window)
            distance = norm - mean
            mean = mean + weight * distance
            variance = (1 - weight) * (variance + weight * distance**2)
    return closed, tuple(map(float, (count, mean, variance, row, skipped)))


def norms_with_spikes(steps: int = 2000) -> Any:
    chance = np.random.default_rng(4)
    norms = chance.lognormal(0.0, 0.25, steps) * np.linspace(2.0, 1.0, steps)
    norms[chance.random(steps) < 0.05] *= 12.0
    norms[steps // 2 : steps // 2 + 100] *= 30.0
    norms[chance.random(steps) < 0.02] = np.inf
    norms[chance.random(steps) < 0.02] = np.nan
    return norms


@pytest.mark.parametrize(
    "spike", [Spike(), Spike(4.0, 32), Spike(3.0, 8, warmup=3), Spike(6.0, 40, warmup=80)], ids=str
)
def test_spike_is_what_numpy_computes(spike):
    norms = norms_with_spikes()
    gate = Gate(spike)
    closed = [gate.closes(float(norm)) for norm in norms]
    expected, statistics = reference(norms, spike)
    assert closed == expected
    assert 100 < sum(closed) < 400
    assert gate.statistics == statistics


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:skip_above=")
def test_an_optimizer_skips_what_numpy_finds(backend):
    spike, norms = Spike(4.0, 32), norms_with_spikes(600)
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    opt = CyclicalOptimizer(torch.optim.SGD([weight], lr=1.0), skip_above=spike, backend=backend)
    closed = []
    for norm in norms:
        weight.grad = torch.tensor(norm, dtype=torch.float64)
        before = opt.iteration
        opt.step()
        closed.append(opt.iteration == before)
    expected, statistics = reference(norms, spike)
    assert closed == expected
    assert opt.skipped == sum(expected)
    assert opt.state_dict()["param_groups"][0]["clr_skips"] == [*statistics]


@pytest.mark.parametrize("noise", [0.1, 0.2, 0.3])
def test_a_quiet_run_skips_nothing_and_planted_spikes_are_skipped(noise):
    chance = np.random.default_rng(5)
    steps = 10_000
    norms = (1 + noise * chance.standard_normal(steps)).clip(0.01) * np.linspace(3.0, 0.5, steps)
    gate = Gate(Spike())
    assert not any(gate.closes(float(norm)) for norm in norms)
    gate = Gate(Spike())
    for number, norm in enumerate(norms):
        if number >= 128 and number % 50 == 0:
            assert gate.closes(10.0 * float(gate.statistics[1]))
        assert not gate.closes(float(norm))


def test_equal_norms_and_their_rounding_are_no_spike():
    gate = Gate(Spike(window=4))
    assert not any(gate.closes(1.0 + (k % 2) * 1e-7) for k in range(1000))


def test_a_lasting_rise_is_taken_after_window_skips():
    gate = Gate(Spike(window=16))
    assert not any(gate.closes(1.0 + 0.1 * (k % 3)) for k in range(50))
    assert [gate.closes(40.0) for _ in range(17)] == [True] * 16 + [False]
    assert gate.statistics == (1.0, 40.0, 0.0, 0.0, 16.0)
    assert not any(gate.closes(40.0 + 4.0 * (k % 3)) for k in range(50))


def test_a_norm_that_is_not_finite_breaks_no_row_and_is_never_taken():
    gate = Gate(Spike(window=2))
    for k in range(10):
        assert not gate.closes(1.0 + 0.1 * (k % 3))
    assert all(gate.closes(norm) for norm in [50.0, math.inf, math.nan, 50.0, math.inf])
    assert not gate.closes(50.0)


@pytest.mark.parametrize("huge", [1e160, 1.7e308])
def test_a_huge_norm_counts_as_infinite(huge):
    """The statistics stay finite: a checkpoint with others would be refused."""
    gate = Gate(math.inf)
    assert gate.closes(huge)
    assert not gate.closes(1e150)
    assert all(map(math.isfinite, gate.statistics))


# ---- the rest of a step


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_norm_is_the_number_that_the_gate_compares(backend):
    run = Run(BY_NAME["adam"], skip_above=1e3, backend=backend)
    for number, bad in ((0, None), (1, None), (2, "spike")):
        run.gradients(number, bad)
        expected = torch.nn.utils.get_total_norm([p.grad for p in run.params])
        run.opt.step()
        torch.testing.assert_close(run.opt.grad_norm, expected)
    run.gradients(3)
    limit = torch.nn.utils.get_total_norm([p.grad for p in run.params]).item()
    for skip_above, skipped in ((limit * 1.001, 0), (limit * 0.999, 1)):
        other = Run(BY_NAME["adam"], skip_above=skip_above, backend=backend)
        for _ in range(3):
            other.step(3)
        assert other.opt.skipped == 3 * skipped
        exact = Run(BY_NAME["adam"], skip_above=other.opt.grad_norm.item(), backend=backend)
        exact.step(3)
        assert exact.opt.skipped == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_beyond_the_largest_float16_is_no_infinity(backend, dtype):
    param = torch.nn.Parameter(torch.zeros(400, dtype=dtype))
    opt = CyclicalOptimizer(torch.optim.SGD([param], lr=1e-6), skip_above=math.inf, backend=backend)
    param.grad = torch.full((400,), 4000.0, dtype=dtype)
    opt.step()
    assert (opt.iteration, opt.skipped) == (1, 0)
    assert opt.grad_norm.item() == 80000.0
    param.grad[7] = math.inf
    opt.step()
    assert (opt.iteration, opt.skipped) == (1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_without_gradients_happens_and_tells_nothing(backend):
    weight = torch.ones(3, requires_grad=True)
    opt = CyclicalOptimizer(torch.optim.Adam([weight]), skip_above=Spike(), backend=backend)
    opt.step()
    weight.grad = torch.zeros(3)
    opt.step()
    assert opt.iteration == 2
    assert opt.state_dict()["param_groups"][0]["clr_skips"] == [0.0] * 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_hooks_run_for_a_skipped_try_and_cycle_end_hooks_do_not(backend):
    weight = torch.ones(3, requires_grad=True)
    opt = CyclicalOptimizer(
        torch.optim.SGD([weight], lr=0.1), step_size_up=1, skip_above=10.0, backend=backend
    )
    log: list[Any] = []
    opt.register_cycle_end_hook(lambda opt: log.append(opt.iteration))
    opt.register_step_post_hook(lambda *_: log.append("step"))
    opt.optimizer.register_step_pre_hook(lambda *_: log.append("before"))
    for value in (1.0, math.nan, 1.0, 99.0, 1.0):
        weight.grad = torch.full((3,), value)
        opt.step()
    tried, ended = ["before", "step"], ["before", 2, "step"]
    assert log == [*tried, *tried, *ended, *tried, *tried]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closure_runs_once_and_its_loss_comes_back(backend):
    weight = torch.ones(3, requires_grad=True)
    opt = CyclicalOptimizer(torch.optim.Adam([weight]), skip_above=10.0, backend=backend)
    calls = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = weight.sum() * 1e6
        loss.backward()
        calls.append(opt.iteration)
        return loss

    assert opt.step(closure).item() == 3e6
    assert calls == [0]
    assert not opt.state
    assert opt.iteration == 0
    assert opt.skipped == 1


@pytest.mark.parametrize("bad", [None, "spike"])
def test_what_no_kernel_serves_is_skipped_together_with_the_rest(bad):
    values = [torch.ones(3), torch.ones(2, dtype=torch.complex64)]
    runs = []
    for skip_above in (100.0, None):
        params = parameters(values)
        opt = CyclicalOptimizer(torch.optim.Adam(params, lr=0.1), skip_above=skip_above)
        for k in range(6):
            if k % 2 and bad and skip_above:
                params[0].grad, params[1].grad = torch.ones(3), torch.full((2,), 1e4 + 0j)
                opt.step()
            for p in params:
                p.grad = torch.ones_like(p) * (k + 1)
            opt.step()
        runs.append(opt)
    assert runs[0].skipped == (3 if bad else 0)
    assert_identical(*runs)


def test_an_ordinary_step_asks_the_gate_in_one_call():
    run = Run(BY_NAME["adam"], skip_above=500.0)
    for number in range(4):
        run.step(number)
    run.gradients(4)
    assert outcome_of(run.opt) in ("TAKEN", "OUT_OF_VALUES")
    run.step(5)
    run.gradients(6, "spike")
    before = [p.detach().clone() for p in run.params]
    assert outcome_of(run.opt) == "SKIPPED"
    assert_same([p.detach() for p in run.params], before)


@pytest.mark.parametrize("change", ["parameter", "group", "error"])
def test_the_gate_is_python_code_that_may_change_anything(change, monkeypatch):
    """A signal handler may run while native code hands the norm over, after the step."""
    run, plain = Run(BY_NAME["adam"], skip_above=500.0), Run(BY_NAME["adam"])
    for number in range(10):
        run.step(number)
        plain.step(number)
    closes = Gate.closes

    def disturbed(gate: Gate, norm: float) -> bool:
        monkeypatch.undo()
        closed = closes(gate, norm)
        if change == "parameter":
            run.params[0].data = run.params[0].data.clone()
        elif change == "group":
            run.opt.param_groups[0]["weight_decay"] = 0.5
        else:
            raise KeyboardInterrupt
        return closed

    monkeypatch.setattr(Gate, "closes", disturbed)
    with pytest.raises(KeyboardInterrupt) if change == "error" else nullcontext():
        run.step(10)
    plain.step(10)
    assert run.opt.iteration == 11
    if change == "group":
        plain.opt.param_groups[0]["weight_decay"] = 0.5
    run.step(11)
    plain.step(11)
    assert_identical(run.opt, plain.opt)
    assert run.opt.state_dict()["param_groups"][0]["clr_skips"][0] == 12.0


def test_an_interrupted_step_leaves_no_norm_in_the_statistics(monkeypatch):
    run = Run(BY_NAME["adam"], skip_above=Spike(), max_grad_norm=1.0)
    for number in range(3):
        run.step(number)
    before = run.opt.state_dict()["param_groups"]
    with monkeypatch.context() as patch:
        fail_native_launches(patch, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run.step(3)
    assert run.opt.state_dict()["param_groups"] == before
    run.step(3)
    assert run.opt.state_dict()["param_groups"][0]["clr_skips"][0] == 4.0


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    "ask", [lambda opt: opt.skipped, lambda opt: opt.iteration, lambda opt: opt.state_dict()]
)
def test_each_question_warns_of_many_skips(ask, backend):
    run = Run(BY_NAME["adam"], skip_above=500.0, backend=backend)
    for number in range(12):
        run.step(number, "spike")
    with pytest.warns(UserWarning, match=r"skip_above=500\.0 has skipped 12 of 12 steps"):
        ask(run.opt)


def test_the_host_warns_of_many_skips_once_and_only_when_asked(recwarn):
    run = Run(BY_NAME["adam"], skip_above=500.0)
    for number in range(12):
        run.step(number)
        run.step(number, "spike")
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"skip_above=500\.0 has skipped 12 of 24 steps: .*raise"):
        assert run.opt.skipped == 12
    assert run.opt.skipped == 12
    run.opt.state_dict()
    assert len(recwarn.list) == 0


def test_few_skips_need_no_warning(recwarn):
    run = Run(BY_NAME["adam"], skip_above=500.0)
    for number in range(9):
        run.step(number, "nan")
    run.step(0)
    assert run.opt.skipped == 9
    run.opt.state_dict()
    assert not recwarn.list


def test_without_skip_above_nothing_is_skipped_and_nothing_is_written():
    run = Run(BY_NAME["adam"])
    run.step(0)
    assert run.opt.skipped == 0
    assert "clr_skips" not in run.opt.state_dict()["param_groups"][0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_gradients_are_named(backend):
    weight = torch.ones(4, 2, requires_grad=True)
    opt = CyclicalOptimizer(torch.optim.SGD([weight], lr=0.1), skip_above=1.0, backend=backend)
    weight.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (4, 2), check_invariants=True)
    with pytest.raises(NotImplementedError, match=r"skip_above cannot measure sparse .*\[4, 2\]"):
        opt.step()


# ---- checkpoints and copies


def stored(state_dict: dict[str, Any]) -> Any:
    """Return a state dict as a file holds it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(run: Run, how: str, **options: Any) -> Run:
    """Return a run that goes on from another."""
    new = Run(BY_NAME["adam"], **options)
    new.params = [torch.nn.Parameter(p.detach().clone()) for p in run.params]
    inner = torch.optim.Adam(new.params, lr=0.01, foreach=False)
    if how == "before wrapping":
        inner.load_state_dict(stored(run.opt.state_dict()))
        new.opt = CyclicalOptimizer(inner, step_size_up=7, **options)
    elif how == "inside":
        new.opt = CyclicalOptimizer(inner, step_size_up=7, **options)
        new.opt.optimizer.load_state_dict(stored(run.opt.state_dict()))
    elif how == "state_dict":
        new.opt = CyclicalOptimizer(inner, step_size_up=7, **options)
        new.opt.load_state_dict(stored(run.opt.state_dict()))
    elif how == "pickle":
        new.opt = pickle.loads(pickle.dumps(run.opt))
        new.params = new.opt.param_groups[0]["params"]
    else:
        new.opt = copy.deepcopy(run.opt)
        new.params = new.opt.param_groups[0]["params"]
    return new


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["state_dict", "before wrapping", "inside", "pickle", "deepcopy"])
@pytest.mark.filterwarnings("ignore:skip_above=")
def test_a_resumed_run_decides_as_an_uninterrupted_one(how, backend):
    options = {"skip_above": SPIKE, "backend": backend}
    run, whole = (Run(BY_NAME["adam"], **options) for _ in range(2))
    for k, (number, bad) in enumerate(tries(3, 200)):
        whole.step(number, bad)
        run.step(number, bad)
        if k == 120:
            run = resumed(run, how, **options)
    assert run.opt.skipped == whole.opt.skipped > 10
    ours, expected = (each.opt.state_dict()["param_groups"] for each in (run, whole))
    assert ours == expected
    assert_identical(run.opt, whole.opt)


def test_a_checkpoint_keeps_its_statistics_while_the_run_goes_on():
    run = Run(BY_NAME["adam"], skip_above=500.0)
    run.step(0)
    saved = run.opt.state_dict()
    run.step(1)
    run.opt.state_dict()
    assert saved["param_groups"][0]["clr_skips"][0] == 1.0


def test_a_checkpoint_without_statistics_starts_them_anew():
    plain, run = Run(BY_NAME["adam"]), Run(BY_NAME["adam"], skip_above=500.0)
    plain.step(0)
    for number, bad in ((0, None), (1, "spike"), (1, None)):
        run.step(number, bad)
    run.opt.load_state_dict(plain.opt.state_dict())
    assert run.opt.skipped == 0
    assert run.opt.state_dict()["param_groups"][0]["clr_skips"] == [0.0] * 5


def test_an_optimizer_without_skip_above_drops_the_statistics_of_a_checkpoint():
    plain, run = Run(BY_NAME["adam"]), Run(BY_NAME["adam"], skip_above=500.0)
    run.step(0)
    plain.step(0)
    plain.opt.load_state_dict(run.opt.state_dict())
    plain.step(1)
    assert "clr_skips" not in plain.opt.state_dict()["param_groups"][0]


def test_groups_that_join_or_come_back_do_not_change_the_statistics():
    run = Run(BY_NAME["adam"], skip_above=500.0)
    run.step(0)
    old = copy.copy(run.opt.param_groups[0])
    old["params"] = [torch.nn.Parameter(torch.ones(2))]
    run.opt.state_dict()
    run.step(1)
    run.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    run.step(2)
    run.opt.param_groups.append(old)
    run.step(3)
    saved = [group["clr_skips"][0] for group in run.opt.state_dict()["param_groups"]]
    assert saved == [4.0] * 3


HOSTILE = {
    "none": None,
    "a number": 3.0,
    "too short": [0.0] * 4,
    "negative count": [-1.0, 0.0, 0.0, 0.0, 0.0],
    "half a step": [1.5, 1.0, 0.0, 0.0, 0.0],
    "nan mean": [1.0, math.nan, 0.0, 0.0, 0.0],
    "infinite variance": [1.0, 1.0, math.inf, 0.0, 0.0],
    "huge mean": [1.0, 1e300, 0.0, 0.0, 0.0],
    "negative row": [1.0, 1.0, 0.0, -1.0, 0.0],
    "text": [1.0, 1.0, 0.0, 0.0, "many"],
    "booleans": [True, 1.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("skip_above", [500.0, None])
def test_hostile_statistics_are_refused_and_change_nothing(value, skip_above):
    run = Run(BY_NAME["adam"], skip_above=skip_above)
    for number in range(3):
        run.step(number)
    saved = copy.deepcopy(run.opt.state_dict())
    saved["param_groups"][0]["clr_skips"] = value
    before = copy.deepcopy(run.opt.state_dict())
    with pytest.raises((TypeError, ValueError), match=r"param_groups'\]\[0\]\['clr_skips'\]"):
        run.opt.load_state_dict(saved)
    after = run.opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    plain = torch.optim.Adam(parameters(drawn(SHAPES, torch.float32)))
    plain.load_state_dict(saved)
    with pytest.raises((TypeError, ValueError), match=r"optimizer\[0\]\['clr_skips'\]"):
        CyclicalOptimizer(plain, skip_above=skip_above)


def test_a_range_test_leaves_the_statistics_alone():
    model = torch.nn.Linear(3, 1)
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    opt = CyclicalOptimizer(inner, skip_above=Spike(window=4))
    data = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(9)]

    def train() -> list[float]:
        for x, y in data:
            opt.zero_grad()
            (model(x) - y).square().mean().backward()
            opt.step()
        skips: list[float] = opt.state_dict()["param_groups"][0]["clr_skips"]
        return skips

    before = train()
    lr_range_test(model, opt, data, torch.nn.functional.mse_loss, epochs=1)
    assert opt.state_dict()["param_groups"][0]["clr_skips"] == before
    train()
    assert sum(opt._shared.gate.statistics[::4]) > 12


def test_groups_must_agree():
    run = Run(BY_NAME["adam"], skip_above=500.0)
    run.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    saved = copy.deepcopy(run.opt.state_dict())
    saved["param_groups"][1]["clr_skips"] = [1.0, 1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="disagree on clr_skips"):
        run.opt.load_state_dict(saved)


def test_a_load_beneath_the_wrapper_shows_at_once():
    run, plain = Run(BY_NAME["adam"], skip_above=500.0), Run(BY_NAME["adam"])
    run.step(0)
    run.step(1, "spike")
    saved = run.opt.state_dict()
    plain.step(0)
    run.opt.optimizer.load_state_dict(plain.opt.optimizer.state_dict())
    assert run.opt.skipped == 0
    run.step(1, "spike")
    assert run.opt.skipped == 1
    run.opt.optimizer.load_state_dict(saved)
    assert run.opt.skipped == 1
    run.step(1, "spike")
    assert run.opt.skipped == 2
