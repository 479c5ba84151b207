"""Averages of parameters, beside ``torch.optim.swa_utils.AveragedModel``."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import EVERY_CLASS, Problem, SignDescent
from internals import plan_of
from native_helpers import DTYPES, KERNELS, members
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from clr_optim import CycleEnd, CyclicalOptimizer, Ema
from clr_optim.schedule import cosine, fixed, sequence, triangular

KEY, COUNT = "clr_average", "clr_averages"


class Model(torch.nn.Module):
    """Parameters as a module, which an AveragedModel can copy."""

    def __init__(self, params):
        super().__init__()
        self.params = torch.nn.ParameterList(params)


def reference(average, params):
    """Return torch's average of parameters, before any update."""
    ema = isinstance(average, Ema)
    rule = get_ema_multi_avg_fn(average.decay) if ema else get_swa_multi_avg_fn()
    return AveragedModel(Model(params), multi_avg_fn=rule)


def is_due(average, schedule, steps):
    """Return whether the step after which ``steps`` steps were taken falls due, in plain words."""
    if steps <= average.start:
        return False
    if isinstance(average, Ema):
        return (steps - average.start) % average.every == 0
    return schedule.is_cycle_end(steps)


def averages_of(opt):
    return [opt.state[p].get(KEY) if p in opt.state else None for p in members(opt)]


def assert_averages(opt, twin, few=2):
    """Compare with torch's average, which rounds 1/n to float32: ``few`` float32 ulps apart."""
    for average, expected in zip(averages_of(opt), twin.module.params, strict=True):
        assert average.dtype == expected.dtype
        tolerance = few * max(torch.finfo(average.dtype).eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(average, expected.detach(), rtol=tolerance, atol=tolerance)


AVERAGES = [
    Ema(0.9),
    Ema(0.5, 3, start=4),
    Ema(1.0),
    Ema(0.0),
    CycleEnd(),
    CycleEnd(start=6),
]
SCHEDULES = {
    "triangular": triangular(2),
    "short": triangular(1, 0),
    "parts": sequence([(triangular(2), 10), (triangular(3), None)]),
    "ends": cosine(7),
    "warm": triangular(2).with_warmup(3),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("average", AVERAGES, ids=str)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_averages_equal_torchs(backend, average, name):
    case = KERNELS[0]
    problem = Problem(case)
    schedule = SCHEDULES[name]
    opt = CyclicalOptimizer(case.make(problem.params), schedule, average=average, backend=backend)
    twin = reference(average, problem.params)
    taken = 0
    for k in range(25):
        problem.step(opt, k)
        if is_due(average, schedule, k + 1):
            twin.update_parameters(Model(problem.params))
            taken += 1
        if taken:
            assert_averages(opt, twin)
    assert [group[COUNT] for group in opt.state_dict()["param_groups"]] == [[taken, 25]]


@pytest.mark.parametrize("case", EVERY_CLASS, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_average_changes_nothing_else(case, backend):
    problems = [Problem(case), Problem(case)]
    average = Ema(0.9)
    opt = case.ours(problems[0].params, backend=backend, average=average)
    plain = case.ours(problems[1].params, backend=backend)
    twin = reference(average, problems[0].params)
    for k in range(12):
        for problem, each in zip(problems, (opt, plain), strict=True):
            problem.step(each, k, closure=case.closure)
        twin.update_parameters(Model(problems[0].params))
        for p, q in zip(members(opt), members(plain), strict=True):
            assert torch.equal(p, q)
            ours, others = dict(opt.state[p]), plain.state.get(q, {})
            assert ours.pop(KEY) is not None
            assert list(ours) == list(others)
            tensors = [name for name, value in ours.items() if isinstance(value, torch.Tensor)]
            assert all(torch.equal(ours[name], others[name]) for name in tensors)
    assert_averages(opt, twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_each_kernel_moves_averages_as_torch(case, dtype):
    problem = Problem(case, dtype)
    opt = case.ours(problem.params, backend="native", average=Ema(0.75, 2))
    twin = reference(Ema(0.75), problem.params)
    for k in range(9):
        problem.step(opt, k)
        if k % 2:
            twin.update_parameters(Model(problem.params))
    assert {b.kernel for b in plan_of(opt).buckets} == {case.kernel}
    for average, expected in zip(averages_of(opt), twin.module.params, strict=True):
        assert torch.equal(average, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("sizes", [(7, 40_003), (1,)], ids=str)
def test_float32_averages_of_16_bit_parameters(sizes, backend, dtype):
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    average = Ema(0.99, dtype=torch.float32)
    opt = CyclicalOptimizer(torch.optim.SGD(params), average=average, backend=backend)
    means = None
    for _ in range(6):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
        now = [p.detach().float() for p in params]
        means = (
            now
            if means is None
            else [torch.lerp(m, p, 1 - 0.99) for m, p in zip(means, now, strict=True)]
        )
    for mean, own in zip(means, averages_of(opt), strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, mean, rtol=1e-7, atol=1e-7)
    means = [own.clone() for own in averages_of(opt)]
    # torch's own load would cast the averages to the dtype of the parameters.
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(averages_of(opt), means, strict=True))
    before = [p.detach().clone() for p in params]
    with opt.averaged():
        assert all(torch.equal(p, m.to(dtype)) for p, m in zip(params, means, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(averages_of(opt), means, strict=True))


def test_large_tensors_on_threads():
    params = [torch.nn.Parameter(torch.randn(n)) for n in (300_001, 5, 70_000)]
    opt = CyclicalOptimizer(torch.optim.Adam(params), average=Ema(0.9), backend="native")
    twin = reference(Ema(0.9), params)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
        twin.update_parameters(Model(params))
    assert all(torch.equal(a, b) for a, b in zip(averages_of(opt), twin.module.params, strict=True))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("average", [Ema(0.8), CycleEnd()], ids=str)
def test_parameters_without_gradients_take_part(backend, average):
    params = [torch.nn.Parameter(torch.randn(5)) for _ in range(4)]
    inner = torch.optim.Adam(params, weight_decay=0.1)
    opt = CyclicalOptimizer(inner, triangular(1), average=average, backend=backend)
    twin = reference(average, params)
    for k in range(20):
        opt.zero_grad()
        for i, p in enumerate(params):
            # The first comes and goes, the second stops for good, the third begins late.
            if [k % 3 != 1, k < 7, k > 9, True][i]:
                p.grad = torch.randn_like(p)
        if k == 12:  # a plan that is built anew knows rows without gradient no more
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step()
        if is_due(average, opt.schedule, k + 1):
            twin.update_parameters(Model(params))
    assert_averages(opt, twin, few=4)


def test_an_average_is_made_of_ordinary_steps():
    params = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
    opt = CyclicalOptimizer(torch.optim.Adam(params), step_size_up=2, average="cycle_end")
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    native, outcomes = plan_of(opt).native, []
    for _ in range(200):
        opt.step()
        outcomes.append(native.course()[0] == opt.iteration)
    assert sum(outcomes) >= 195  # native code has taken nearly all of them


def test_state_and_keys_stay_away_without_an_average():
    p = torch.nn.Parameter(torch.randn(3))
    opt = CyclicalOptimizer(torch.optim.Adam([p]))
    p.grad = torch.ones_like(p)
    opt.step()
    assert KEY not in opt.state[p]
    assert COUNT not in opt.param_groups[0]


def test_a_skipped_step_takes_no_average():
    p = torch.nn.Parameter(torch.randn(3))
    opt = CyclicalOptimizer(torch.optim.SGD([p], lr=1.0), fixed(1.0), average=Ema(0.5))
    for found_inf in (0.0, 1.0, 0.0):
        p.grad = torch.ones_like(p)
        opt.grad_scale, opt.found_inf = None, torch.tensor(found_inf)
        before = averages_of(opt)[0]
        before = None if before is None else before.clone()
        opt.step()
        del opt.grad_scale, opt.found_inf
        if found_inf:
            assert torch.equal(averages_of(opt)[0], before)
    torch.testing.assert_close(averages_of(opt)[0], p.detach() + 0.5)


# ---- checkpoints


_EMA = Ema(0.9)


def trained(average=_EMA, steps=10, cls=torch.optim.Adam, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(3))]
    opt = CyclicalOptimizer(cls(params), step_size_up=2, average=average, **options)
    train(opt, range(steps))
    return opt


def train(opt, steps):
    for k in steps:
        for i, p in enumerate(members(opt)):
            generator = torch.Generator().manual_seed(100 * k + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.step()


def everything(opt):
    return [p.detach().clone() for p in members(opt)] + [a.clone() for a in averages_of(opt)]


def all_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def put(opt, source):
    with torch.no_grad():
        for p, q in zip(members(opt), members(source), strict=True):
            p.copy_(q)


@pytest.mark.parametrize("average", [Ema(0.9), Ema(0.9, 3), CycleEnd()], ids=str)
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_resumes_exactly(average, backend, way):
    whole = trained(average, 25, backend=backend)
    half = trained(average, 11, backend=backend)
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(half.state_dict(), file)
        file.seek(0)
        rest = trained(average, 0, backend=backend)
        put(rest, half)
        rest.load_state_dict(torch.load(file, weights_only=True))
    else:
        rest = copy.deepcopy(half) if way == "deepcopy" else pickle.loads(pickle.dumps(half))
    train(rest, range(11, 25))
    assert all_equal(everything(rest), everything(whole))
    assert (
        rest.state_dict()["param_groups"][0][COUNT] == whole.state_dict()["param_groups"][0][COUNT]
    )


def test_plain_torch_continues_a_run_with_averages_and_gives_it_back():
    ours = trained(steps=6)
    plain = torch.optim.Adam([torch.nn.Parameter(p.detach().clone()) for p in members(ours)])
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(plain, range(6, 8))
    back = trained(steps=0)
    put(back, plain)
    back.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert back.iteration == 6
    assert all_equal(averages_of(back), averages_of(ours))
    train(back, range(8, 10))


def test_a_checkpoint_without_averages_begins_them():
    before = trained(average=None, steps=7)
    opt = trained(Ema(0.5), steps=0)
    put(opt, before)
    opt.load_state_dict(copy.deepcopy(before.state_dict()))
    with pytest.raises(RuntimeError, match="no step has taken an average yet, at position 7"):
        opt.averaged().__enter__()
    train(opt, range(7, 8))
    assert all_equal(averages_of(opt), [p.detach() for p in members(opt)])
    assert opt.state_dict()["param_groups"][0][COUNT] == [1, 8]


def test_a_checkpoint_with_averages_that_nothing_moves_warns():
    saved = copy.deepcopy(trained(steps=5).state_dict())
    opt = trained(average=None, steps=0)
    with pytest.warns(UserWarning, match="has averages, and this optimizer has average=None"):
        opt.load_state_dict(saved)
    train(opt, range(5, 7))
    assert COUNT not in opt.state_dict()["param_groups"][0]


def test_a_count_survives_another_policy():
    saved = copy.deepcopy(trained(CycleEnd(), steps=21).state_dict())  # five cycles of four steps
    assert saved["param_groups"][0][COUNT] == [5, 21]
    opt = CyclicalOptimizer(
        torch.optim.Adam([torch.nn.Parameter(torch.ones(n)) for n in (4, 3)]),
        step_size_up=1,
        average="cycle_end",
    )
    with pytest.warns(UserWarning, match="under the policy"):
        opt.load_state_dict(saved)
    before = [average.clone() for average in averages_of(opt)]
    train(opt, range(21, 22))  # step 22 ends a cycle of two steps
    for average, old, p in zip(averages_of(opt), before, members(opt), strict=True):
        torch.testing.assert_close(average, torch.lerp(old, p.detach(), 1 / 6))


def load_directly(saved, average):
    opt = trained(average, steps=0)
    opt.load_state_dict(saved)
    return opt


def load_before_wrapping(saved, average):
    inner = torch.optim.Adam([torch.nn.Parameter(torch.ones(n)) for n in (4, 3)])
    inner.load_state_dict(saved)
    return CyclicalOptimizer(inner, step_size_up=2, average=average)


def load_beneath(saved, average):
    opt = trained(average, steps=0)
    opt.optimizer.load_state_dict(saved)
    assert opt.iteration == saved["param_groups"][0]["clr_step"]
    opt.set_bounds(max_lr=opt.max_lr)
    return opt


LOADS = [load_directly, load_before_wrapping, load_beneath]


@pytest.mark.parametrize("load", LOADS)
def test_an_average_of_another_kind_starts_anew_with_a_warning(load):
    saved = copy.deepcopy(trained(Ema(0.9), steps=3).state_dict())
    with pytest.warns(
        UserWarning, match=r"average=Ema\(decay=0\.9\); .*=CycleEnd\(\) .*starts anew"
    ):
        opt = load(saved, CycleEnd())
    train(opt, range(3, 4))
    assert all_equal(averages_of(opt), [p.detach() for p in members(opt)])
    assert opt.state_dict()["param_groups"][0][COUNT] == [1, 4]
    load(copy.deepcopy(opt.state_dict()), "cycle_end")  # no warning


@pytest.mark.parametrize("load", LOADS)
def test_an_average_of_another_decay_goes_on_with_a_warning(load):
    saved = copy.deepcopy(trained(Ema(0.9), steps=3).state_dict())
    with pytest.warns(
        UserWarning, match=r"average=Ema\(decay=0\.9\); .*=Ema\(decay=0\.5\) .*goes on from"
    ):
        opt = load(saved, Ema(0.5))
    before = [average.clone() for average in averages_of(opt)]
    train(opt, range(3, 4))
    for average, old, p in zip(averages_of(opt), before, members(opt), strict=True):
        torch.testing.assert_close(average, torch.lerp(old, p.detach(), 0.5))
    load(saved, Ema(0.9, dtype=torch.float32))  # another dtype is no other average


def test_a_jump_begins_the_average_anew():
    opt = trained(CycleEnd(), steps=9)
    opt.set_iteration(103)
    train(opt, range(1))
    assert all_equal(averages_of(opt), [p.detach() for p in members(opt)])
    assert opt.state_dict()["param_groups"][0][COUNT] == [1, 104]


def test_a_checkpointers_step_creates_averages_that_count_nothing():
    opt = trained(steps=0)
    rates = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
    for p in members(opt):
        p.grad = torch.zeros_like(p)
    opt.step()
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate
    assert opt.iteration == 0
    assert all(average is not None for average in averages_of(opt))
    assert opt.state_dict()["param_groups"][0][COUNT] == [0, 0]


@pytest.mark.parametrize(
    ("value", "error"),
    [(3, TypeError), ([1], TypeError), ([-1, 0], ValueError), ([1, 2.5], ValueError),
     (["a", 0], TypeError), ([0, 2**70], ValueError)],
)  # fmt: skip
def test_a_count_that_nothing_here_writes(value, error):
    opt = trained(steps=5)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0][COUNT] = value
    before = everything(opt)
    with pytest.raises(error, match=COUNT):
        opt.load_state_dict(saved)
    assert all_equal(everything(opt), before)


@pytest.mark.parametrize("value", [torch.ones(5), "x", torch.ones(4, dtype=torch.int64), [1.0]])
def test_an_average_that_fits_no_parameter(value):
    opt = trained(steps=5)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0][KEY] = value
    with pytest.raises(ValueError, match=KEY):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_averages_that_torch_has_cast_become_float32_again(backend):
    param = torch.nn.Parameter(torch.randn(5).bfloat16())
    average = Ema(0.9, dtype=torch.float32)
    opt = CyclicalOptimizer(torch.optim.SGD([param]), average=average, backend=backend)
    train(opt, range(3))
    opt.optimizer.load_state_dict(copy.deepcopy(opt.state_dict()))
    cast = opt.state[param][KEY].float()
    assert opt.state[param][KEY].dtype == torch.bfloat16
    train(opt, range(3, 4))
    assert torch.equal(opt.state[param][KEY], torch.lerp(cast, param.detach().float(), 1 - 0.9))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("value", ["x", None, [1], [-1, 0], [1.5, 2]])
def test_a_hostile_count_beneath_the_wrapper_raises_before_anything_has_changed(value, backend):
    opt = trained(steps=5, backend=backend)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0][COUNT] = value
    opt.optimizer.load_state_dict(saved)
    before = everything(opt)
    with pytest.raises((TypeError, ValueError), match=f"param_groups.*{COUNT}"):
        train(opt, range(5, 6))
    assert all_equal(everything(opt), before)
    assert opt.param_groups[0]["clr_step"] == 5
    fresh = trained(average=None, steps=0).optimizer
    fresh.load_state_dict(saved)
    with pytest.raises((TypeError, ValueError), match=COUNT):
        CyclicalOptimizer(fresh, average="cycle_end")


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_count_that_other_code_removes_begins_anew(backend):
    opt = trained(steps=70, backend=backend)
    for group in opt.param_groups:
        del group[COUNT]
    train(opt, range(70, 71))
    assert all_equal(averages_of(opt), [p.detach() for p in members(opt)])
    train(opt, range(71, 140))
    assert opt.state_dict()["param_groups"][0][COUNT] == [70, 140]


def test_averages_of_a_loaded_optimizer_that_nothing_moves_warn():
    saved = copy.deepcopy(trained(steps=5).state_dict())
    inner = trained(average=None, steps=0).optimizer
    inner.load_state_dict(saved)
    with pytest.warns(UserWarning, match="has averages, and this optimizer has average=None"):
        CyclicalOptimizer(inner, step_size_up=2)
    inner.load_state_dict(saved)
    opt = CyclicalOptimizer(inner, step_size_up=2, average=Ema(0.9))
    assert opt.state_dict()["param_groups"][0][COUNT] == [5, 5]


# ---- parameters that begin late, or stand twice


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_an_average_begins_with_the_parameter_before_its_first_step(backend):
    one, other = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.zeros(3))
    opt = CyclicalOptimizer(
        torch.optim.Adam([one, other], lr=1.0), fixed(1.0), average=Ema(0.5), skip_above=100.0,
        backend=backend,
    )  # fmt: skip
    for _ in range(3):
        one.grad = torch.ones(3)
        opt.step()
    # Other code changes the parameter between a skipped step and the next one.
    other.grad = torch.full((3,), torch.nan)
    opt.step()
    with torch.no_grad():
        other.fill_(7.0)
    other.grad = torch.ones(3)
    opt.step()
    torch.testing.assert_close(opt.state[other][KEY], torch.full((3,), 6.5))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_closure_gives_a_parameter_its_first_gradient(backend):
    one, other = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.zeros(3))
    inner = torch.optim.Adam([one, other], lr=1.0)
    opt = CyclicalOptimizer(inner, fixed(1.0), average=Ema(0.5), backend=backend)
    for _ in range(3):
        one.grad = torch.ones(3)
        opt.step()

    def closure():
        other.grad = torch.ones(3)
        return 1.0

    opt.step(closure)
    torch.testing.assert_close(opt.state[other][KEY], torch.full((3,), -0.5))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_stands_twice_has_one_average(backend):
    param = torch.nn.Parameter(torch.randn(3))
    inner = torch.optim.SGD([param, param], lr=0.1)
    opt = CyclicalOptimizer(inner, average=Ema(0.5), backend=backend)
    mean = None
    for _ in range(4):
        param.grad = torch.randn(3)
        opt.step()
        mean = param.detach().clone() if mean is None else torch.lerp(mean, param.detach(), 0.5)
    assert torch.equal(opt.state[param][KEY], mean)
    own = param.detach().clone()
    with opt.averaged():
        assert torch.equal(param, mean)
    assert torch.equal(param, own)


# ---- averaged()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_block_restores_parameters_that_share_memory(backend):
    memory = torch.randn(6)
    params = [torch.nn.Parameter(memory), torch.nn.Parameter(memory[1:4])]
    opt = CyclicalOptimizer(torch.optim.SGD(params), average=Ema(0.5), backend=backend)
    train(opt, range(4))
    own = everything(opt)
    with opt.averaged():
        pass
    assert all_equal(everything(opt), own)


def test_the_block_exchanges_and_restores_bit_for_bit():
    opt = trained()
    view = members(opt)[0].detach()
    own = everything(opt)
    expected = [average.clone() for average in averages_of(opt)]
    with opt.averaged():
        assert all_equal([p.detach() for p in members(opt)], expected)
        assert torch.equal(view, expected[0])
    assert all_equal(everything(opt), own)
    with pytest.raises(KeyError, match="mine"), opt.averaged():
        raise KeyError("mine")
    assert all_equal(everything(opt), own)
    train(opt, range(10, 12))
    assert all_equal(everything(opt), everything(trained(steps=12)))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_cannot_run_within_the_block(backend):
    opt = trained(backend=backend)
    train(opt, range(10, 15))  # ordinary steps, whose values are computed ahead
    saved = copy.deepcopy(opt.state_dict())
    with opt.averaged():
        for act in (
            opt.step,
            opt.state_dict,
            lambda: opt.load_state_dict(saved),
            lambda: copy.deepcopy(opt),
            lambda: opt.averaged().__enter__(),
            lambda: opt.averaged_state_dict(Model(members(opt))),
        ):
            with pytest.raises(RuntimeError, match=r"cannot run within averaged\(\)"):
                act()
    opt.step()


def test_averages_are_asked_for_too_early_or_without():
    with pytest.raises(RuntimeError, match="keeps no averages: construct it with average="):
        trained(average=None).averaged().__enter__()
    with pytest.raises(RuntimeError, match="no step has taken an average yet"):
        trained(CycleEnd(), steps=3).averaged().__enter__()


def test_a_state_dict_with_averages_loads_into_a_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )
    model[2].weight.requires_grad_(False)
    opt = CyclicalOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        step_size_up=2, average="cycle_end",
    )  # fmt: skip
    for _ in range(9):
        opt.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        opt.step()
    found = opt.averaged_state_dict(model)
    other = copy.deepcopy(model)
    other.load_state_dict(found)
    assert found._metadata == model.state_dict()._metadata
    assert torch.equal(other[0].weight, opt.state[model[0].weight][KEY])
    assert not torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(other[2].weight, model[2].weight)
    assert torch.equal(other[1].running_mean, model[1].running_mean)
    # Copies: the next step changes none of them.
    before = {name: value.clone() for name, value in found.items()}
    opt.step()
    assert all(torch.equal(found[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="no parameter of the Linear has an average here"):
        opt.averaged_state_dict(torch.nn.Linear(2, 2))


# ---- arguments


WRONG = {
    "decay above 1": (lambda: Ema(1.5), ValueError, "decay must be .*, got 1.5"),
    "decay a string": (lambda: Ema("a"), TypeError, "decay must be a number, got 'a'"),
    "every 0": (lambda: Ema(0.9, 0), ValueError, "every must be .*, got 0"),
    "start negative": (lambda: Ema(0.9, start=-1), ValueError, "start must be .*, got -1"),
    "start no whole number": (lambda: CycleEnd(start=0.5), ValueError, "start must be .*, got 0.5"),
    "dtype of 16 bits": (
        lambda: Ema(0.9, dtype=torch.float16), ValueError, "dtype must be None or torch.float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    make, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        make()


def test_state_that_is_no_dictionary():
    class Odd(SignDescent):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p] = 3

    p = torch.nn.Parameter(torch.ones(1))
    opt = CyclicalOptimizer(Odd([p]), average=Ema(0.9))
    p.grad = torch.ones_like(p)
    opt.state[p] = 3
    with pytest.raises(RuntimeError, match="needs a dictionary as the state"):
        opt.step()
    assert opt.iteration == 0
