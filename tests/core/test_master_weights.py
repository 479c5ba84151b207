"""Float32 masters beside bfloat16 parameters: the course of a float32 model, bit for bit."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from internals import kernels_of
from native_helpers import BY_NAME, CASES, KERNELS, like, members, unaligned

from clr_optim import CyclicalOptimizer, Ema, Snapshots, lr_range_test
from clr_optim.kernels.native import load as load_kernels
from clr_optim.masters import join, split
from clr_optim.schedule import triangular

BF16, REST = torch.bfloat16, "clr_rest"
SHAPES = [(37, 19), (3, 4), (70,), (5,), (), (0, 2), (2, 3, 2, 2), (1,)]


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int32)


def master(opt, param):
    """Return the master of a parameter, computed by NumPy from its two halves."""
    upper = param.detach().contiguous().view(torch.int16).numpy().astype(np.int32)
    rest = opt.state.get(param, {}).get(REST)
    lower = 0 if rest is None else rest.contiguous().view(torch.int16).numpy().astype(np.int32)
    size = upper & 0x7FFF
    is_foreign = ((size == 0) & (lower < 0)) | ((size == 0x7F80) & (lower > 0))
    whole = (upper << 16) + np.where(is_foreign, 0, lower)
    return torch.from_numpy(np.asarray(whole, dtype=np.int32)).view(torch.float32)


class Twins:
    """A bfloat16 model with masters beside a float32 model, which get the same gradients."""

    def __init__(self, case, shapes=SHAPES, seed=0, masters=True, **wrap):
        self.generator = torch.Generator().manual_seed(seed)
        narrow = [self.draw(shape) for shape in shapes]
        for i, value in enumerate(narrow):
            if value.dim() == 2 and i % 2:
                narrow[i] = value.t()
            if value.dim() == 4:
                narrow[i] = value.to(memory_format=torch.channels_last)
            if i == 2:
                narrow[i] = unaligned(value)
        # Preserves strides; t() and channels_last are dense.
        wide = [value.float() for value in narrow]
        self.narrow, self.wide = (
            [torch.nn.Parameter(value) for value in values] for values in (narrow, wide)
        )
        wrap = {"backend": "native", **case.wrap, **wrap}
        self.wrap, self.case = wrap, case
        self.ours = case.ours(self.narrow, master_weights=True, **wrap)
        self.twin = case.ours(self.wide, **wrap)

    def draw(self, shape):
        return torch.randn(shape, generator=self.generator).to(BF16)

    def give_gradients(self, idle=(), scale=1.0):
        for i, (p, q) in enumerate(zip(self.narrow, self.wide, strict=True)):
            grad = like(self.draw(p.shape) * scale, p)
            p.grad = None if i in idle else grad
            q.grad = None if i in idle else like(grad, q)

    def step(self, **how):
        self.give_gradients(**how)
        self.ours.step()
        self.twin.step()

    def check(self):
        for i, (p, q) in enumerate(zip(self.narrow, self.wide, strict=True)):
            assert torch.equal(bits(master(self.ours, p)), bits(q)), i
            mine, other = self.ours.state.get(p, {}), self.twin.state.get(q, {})
            assert [name for name in mine if name != REST] == [*other], i
            for name, value in other.items():
                assert mine[name].dtype == value.dtype, (i, name)
                assert torch.equal(mine[name], value), (i, name)

    def run(self, steps, **how):
        for _ in range(steps):
            self.step(**how)
            self.check()


# ---- the halves of a master


def test_split_and_join_undo_each_other_for_all_kinds_of_floats():
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32)
    edges = torch.tensor(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0x7FFFFF, 0x800000, 0x3F808000, 0x3F807FFF, 0x3F818000,
         0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    ).to(torch.int32)  # fmt: skip
    given = torch.cat([drawn, edges, edges | torch.tensor(-(2**31), dtype=torch.int32)])
    values = given.view(torch.float32)
    param, rest = (torch.empty(len(given), dtype=BF16) for _ in range(2))
    split(values, param, rest)
    found = join(param, rest)
    same = (bits(found) == given) | (values.isnan() & found.isnan() & param.isnan())
    assert same.all()
    # Nearest, ties away from zero: NumPy rounds the magnitudes' integers.
    magnitude = (given.numpy().view(np.uint32) & 0x7FFFFFFF).astype(np.int64)
    away = np.floor(magnitude / 65536 + 0.5).astype(np.int64)
    upper = param.view(torch.int16).numpy().astype(np.int64) & 0x7FFF
    assert np.array_equal(upper, away) or (upper == away)[~values.isnan().numpy()].all()


RESTS = [0, 1, -1, 2, 0x7FFF, -0x8000, -0x7FFF, 0x4000, -0x4000, *range(-32700, 32701, 350)]


@pytest.mark.parametrize("part", range(4))
def test_kernels_agree_with_the_reference_for_every_parameter_and_many_rests(part):
    rests = RESTS[part::4]
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    param = every.repeat(len(rests)).requires_grad_()
    rest = torch.tensor(rests).to(torch.int16).view(BF16).repeat_interleave(len(every))
    whole = join(param, rest)
    given = np.asarray(whole.view(torch.int32))
    plain = param.detach().view(torch.int16).numpy().astype(np.int32) << 16
    lower = rest.view(torch.int16).numpy().astype(np.int32)
    foreign = (np.abs(param.detach().float().numpy()) == 0) & (lower < 0)
    foreign |= param.detach().isinf().numpy() & (lower > 0)
    assert np.array_equal(given, plain + np.where(foreign, 0, lower))
    assert torch.equal(whole.isnan(), param.isnan())
    # A gradient that moves each master a little: torch's own float32 step is the reference.
    opt = CyclicalOptimizer(
        torch.optim.SGD([param], lr=1e-3), triangular(2, base_lr=1e-3, max_lr=1e-3),
        master_weights=True, backend="native",
    )  # fmt: skip
    opt.state[param][REST] = rest
    param.grad = torch.ones_like(param)
    twin = whole.clone().requires_grad_()
    twin.grad = torch.ones_like(twin)
    torch.optim.SGD([twin], lr=1e-3, foreach=False).step()
    opt.step()
    expected = [torch.empty_like(param) for _ in range(2)]
    split(twin, *expected)
    for found, wanted in zip((param, opt.state[param][REST]), expected, strict=True):
        equal = found.detach().view(torch.int16) == wanted.view(torch.int16)
        assert (equal | (found.isnan() & wanted.isnan() & twin.isnan())).all()


# ---- the course of a float32 model


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_a_thousand_steps_of_each_kernel_equal_the_float32_model(case):
    twins = Twins(case, [(9, 7), (40,), (), (0, 2)])
    twins.run(1000)
    assert kernels_of(twins.ours) == {case.kernel}
    assert all(p.dtype == BF16 for p in twins.narrow)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_case_equals_the_float32_model(case):
    twins = Twins(case)
    twins.run(12)
    twins.run(6, idle=(0, 4))
    twins.run(12)


def test_each_set_of_kernels_equals_the_float32_model():
    module = load_kernels()
    names, own = module.kernel_sets(), module.kernel_set()
    try:
        for name in names[: names.index(own) + 1]:  # this CPU runs its own set and older ones
            module.use(name)
            for case in KERNELS:
                Twins(case, [(129, 7), (64,), (63,), (3,)]).run(4)
    finally:
        module.use(own)


@pytest.mark.parametrize("threads", [1, 3])
def test_large_tensors_equal_the_float32_model(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        twins = Twins(BY_NAME["adamw"], [(120_001,), (300, 301), (33,)], average=Ema(0.9))
        twins.run(4)
    finally:
        torch.set_num_threads(before)


WRAPS = {
    "clipping": {"max_grad_norm": 0.5},
    "a gate": {"skip_above": 1e30},
    "weight decay on a schedule": {"schedules": {"weight_decay": triangular(3).between(0.0, 0.3)}},
    "an average": {"average": Ema(0.8)},
    "averages at cycle ends": {"average": "cycle_end", "step_size_up": 2},
    "momentum": {"cycle_momentum": True},
    "a scale function": {"scale_fn": lambda cycle: 0.5**cycle},
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_other_features_go_beside_masters(wrap):
    twins = Twins(BY_NAME["adamw"], **wrap)
    twins.run(30)
    twins.run(10, idle=(1,))


def test_a_skipped_step_changes_no_master():
    twins = Twins(BY_NAME["adam"], skip_above=100.0)
    twins.step(scale=1e6)  # before there is state
    assert not any(twins.ours.state.values())
    twins.run(3)
    twins.run(2, scale=1e6)
    twins.run(3)
    assert twins.ours.skipped == twins.twin.skipped == 3


@pytest.mark.parametrize("scaled", [1.0, math.inf])
def test_a_grad_scaler_serves_masters(scaled):
    twins = Twins(BY_NAME["sgd-mom"])
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for k in range(6):
        twins.give_gradients(scale=scaled if k == 3 else 1.0)
        for scaler, opt in zip(scalers, (twins.ours, twins.twin), strict=True):
            scaler.scale(torch.zeros(()))
            scaler.step(opt)
            scaler.update()
        twins.check()


def test_averages_of_masters_are_float32_and_exchanged_for_a_while():
    twins = Twins(BY_NAME["sgd-mom"], average=Ema(0.9))
    twins.run(7)
    values = [(p.detach().clone(), twins.ours.state[p][REST].clone()) for p in twins.narrow]
    with twins.ours.averaged():
        for p, q in zip(twins.narrow, twins.wide, strict=True):
            average = twins.twin.state[q]["clr_average"]
            assert torch.equal(p, average.to(BF16))
        with pytest.raises(RuntimeError, match="averaged"):
            twins.ours.master_state_dict(torch.nn.ParameterList(twins.narrow))
    for p, (value, rest) in zip(twins.narrow, values, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(twins.ours.state[p][REST].view(torch.int16), rest.view(torch.int16))
    whole = twins.ours.averaged_state_dict(torch.nn.ParameterList(twins.narrow))
    for value, q in zip(whole.values(), twins.wide, strict=True):
        assert torch.equal(value, twins.twin.state[q]["clr_average"].to(BF16))
    twins.run(3)
    # The host moves the average of a parameter without a gradient that no plan knows.
    other = Twins(BY_NAME["sgd-mom"], average=Ema(0.9))
    other.ours.load_state_dict(twins.ours.state_dict())
    other.twin.load_state_dict(twins.twin.state_dict())
    with torch.no_grad():
        for p, q, a, b in zip(other.narrow, other.wide, twins.narrow, twins.wide, strict=True):
            p.copy_(a)
            q.copy_(b)
    other.run(3, idle=(0, 2))


# ---- writes of other code


def zero(p):
    p.zero_()


def negative_zero(p):
    p.zero_().neg_()


def mask(p):
    p.mul_((torch.arange(p.numel()) % 2 == 0).reshape(p.shape).to(p.dtype))


def clamp(p):
    p.clamp_(-0.25, 0.25)


def load(p):
    torch.manual_seed(3)
    module = torch.nn.ParameterList([p])
    module.load_state_dict({"0": torch.randn(p.shape)})


@pytest.mark.parametrize(
    "write", [zero, negative_zero, mask, clamp, load], ids=lambda w: w.__name__
)
def test_after_another_codes_write_the_master_is_within_half_a_unit(write):
    twins = Twins(BY_NAME["adamw"], [(50, 30), (9,)])
    twins.run(20)
    with torch.no_grad():
        for p in twins.narrow:
            write(p)
    for p in twins.narrow:
        found, value = master(twins.ours, p), p.detach().float()
        assert torch.equal(found, join(p, twins.ours.state[p][REST]))
        assert found.isfinite().all()
        exponent = torch.frexp(value).exponent.clamp(min=-125)
        assert ((found - value).abs().double() <= 2.0 ** (exponent.double() - 9)).all()
    with torch.no_grad():
        for p, q in zip(twins.narrow, twins.wide, strict=True):
            q.copy_(master(twins.ours, p))
    twins.run(5)  # from this master on, as any float32 model


# ---- copies, checkpoints, conversions


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", ["adamw", "sgd-mom", "sgd", "adagrad-init", "nadam"])
def test_a_checkpoint_goes_on_bit_for_bit(name):
    case = BY_NAME[name]
    twins = Twins(case)
    for seed, steps in enumerate((3, 1, 7, 4)):
        twins.run(steps)
        values = [p.detach().clone() for p in twins.narrow]
        saved = through_file(twins.ours.state_dict())
        for state in saved["state"].values():
            assert state[REST].dtype == BF16
            assert all(t.dtype == torch.float32 for n, t in state.items() if n != REST)
        other = Twins(case, seed=seed + 7)
        other.ours.load_state_dict(saved)
        other.twin.load_state_dict(through_file(twins.twin.state_dict()))
        with torch.no_grad():
            for p, q, value, wide in zip(other.narrow, other.wide, values, twins.wide, strict=True):
                p.copy_(value)
                q.copy_(wide)
        other.check()
        twins = other
        twins.run(3)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_keep_masters(how):
    twins = Twins(BY_NAME["adamw"])
    twins.run(4)
    both = (
        how((twins.ours, twins.twin))
        if how is copy.deepcopy
        else tuple(map(how, (twins.ours, twins.twin)))
    )
    twins.ours, twins.twin = both
    twins.narrow, twins.wide = members(both[0]), members(both[1])
    twins.run(4)
    assert "float32 masters" in twins.ours.explain()


def test_wrapping_again_keeps_masters():
    twins = Twins(BY_NAME["adamw"])
    twins.run(4)
    with pytest.raises(ValueError, match="master_weights=False, and the optimizer's state has"):
        CyclicalOptimizer(twins.ours.optimizer)
    twins.ours = CyclicalOptimizer(twins.ours.optimizer, step_size_up=5, master_weights=True)
    twins.twin = CyclicalOptimizer(twins.twin.optimizer, step_size_up=5)
    twins.run(4)


def test_a_scheduler_is_taken_over_with_masters():
    def take(params, **more):
        inner = torch.optim.Adam(params, lr=0.5)
        scheduler = torch.optim.lr_scheduler.LinearLR(inner, 0.2, total_iters=4)
        return CyclicalOptimizer.from_scheduler(scheduler, backend="native", **more)

    twins = Twins(BY_NAME["adam"])
    twins.ours, twins.twin = take(twins.narrow, master_weights=True), take(twins.wide)
    twins.run(5)


@pytest.mark.parametrize("name", ["adamw", "sgd-mom", "adagrad-init", "nadam"])
def test_a_plain_run_goes_on_with_masters(name):
    """State of bfloat16 is widened exactly, and the first master is the parameter."""
    case = BY_NAME[name]
    twins = Twins(case)
    plain = case.make(twins.narrow)
    for _ in range(3):
        twins.give_gradients()
        plain.step()
    wide = case.make(twins.wide)
    with torch.no_grad():
        for p, q in zip(twins.narrow, twins.wide, strict=True):
            q.copy_(p)
            wide.state[q] = {
                key: value.clone() if value.dim() == 0 and key in ("step", "mu_product")
                else value.float()
                for key, value in plain.state[p].items()
            }  # fmt: skip
    twins.ours = case.ours(plain.param_groups[0]["params"], master_weights=True, **twins.wrap)
    twins.ours.load_state_dict(plain.state_dict())
    twins.twin = CyclicalOptimizer(wide, **{"step_size_up": 7, **twins.wrap})
    twins.ours.set_iteration(0)
    for p, q in zip(twins.narrow, twins.wide, strict=True):
        if "mu_product" in wide.state[q]:
            wide.state[q]["mu_product"] = wide.state[q]["mu_product"].float()
            assert twins.ours.state[p]["mu_product"].dtype in (torch.float32, BF16)
    twins.run(5)
    again = CyclicalOptimizer(plain, step_size_up=7, master_weights=True, backend="native")
    again.step()
    assert all(REST in again.state[p] for p in twins.narrow)


def test_adagrads_sum_starts_at_the_float32_value():
    twins = Twins(BY_NAME["adagrad-decay-start"])  # initial_accumulator_value=0.1
    # torch's constructor has made bfloat16 sums, where 0.1 is 0.1001.
    assert all(state["sum"].eq(0.1).all() for state in twins.ours.state.values())
    twins.run(3)


def test_a_float32_run_goes_on_with_masters_and_back():
    case = BY_NAME["adamw"]
    twins = Twins(case)
    names = [f"p{i}" for i in range(len(twins.narrow))]

    def module(params):
        found = torch.nn.Module()
        for name, p in zip(names, params, strict=True):
            found.register_parameter(name, torch.nn.Parameter(p.detach()))
        return found

    narrow, wide = module(twins.narrow), module(twins.wide)
    twins.narrow, twins.wide = [*narrow.parameters()], [*wide.parameters()]
    twins.twin = case.ours(twins.wide, **twins.wrap)
    for _ in range(4):
        twins.give_gradients()
        twins.twin.step()
    twins.ours = case.ours(twins.narrow, master_weights=True, **twins.wrap)
    twins.ours.load_state_dict(through_file(twins.twin.state_dict()))
    twins.ours.load_master_state_dict(narrow, through_file(wide.state_dict()))
    twins.check()
    twins.run(4)
    # Back into a float32 model: the weights are the masters, and the rest is dropped.
    found = twins.ours.master_state_dict(narrow)
    assert [*found] == names
    again = copy.deepcopy(wide)
    again.load_state_dict(found)
    for p, q in zip(again.parameters(), twins.wide, strict=True):
        assert torch.equal(bits(p), bits(q))
    opt = case.ours([*again.parameters()], **twins.wrap)
    opt.load_state_dict(through_file(twins.ours.state_dict()))
    assert not any(REST in state for state in opt.state.values())
    twins.wide, twins.twin = [*again.parameters()], opt
    twins.run(3)


def test_masters_load_before_the_first_step():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    narrow = copy.deepcopy(model).to(BF16)
    opt = CyclicalOptimizer(torch.optim.AdamW(narrow.parameters()), master_weights=True)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    assert opt.master_state_dict(narrow)["weight"].dtype == torch.float32
    opt.load_master_state_dict(narrow, values)
    assert all(
        torch.equal(value, values[name]) for name, value in opt.master_state_dict(narrow).items()
    )
    saved = through_file(opt.state_dict())
    assert {name for state in saved["state"].values() for name in state} == {
        "step", "exp_avg", "exp_avg_sq", REST,
    }  # fmt: skip
    opt.load_state_dict(saved)
    twin = CyclicalOptimizer(torch.optim.AdamW(model.parameters()))
    for _ in range(3):
        for p, q in zip(narrow.parameters(), model.parameters(), strict=True):
            p.grad = torch.randn(p.shape).to(BF16)
            q.grad = p.grad.float()
        opt.step()
        twin.step()
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in opt.master_state_dict(narrow).items()
    )


@pytest.mark.parametrize("name", ["adamw", "sgd-mom", "lion"])
def test_plain_torchs_load_is_refused_at_the_step(name):
    twins = Twins(BY_NAME[name])
    twins.run(3)
    saved = copy.deepcopy(twins.ours.state_dict())
    torch.optim.Optimizer.load_state_dict(twins.ours.optimizer, saved)
    before = [p.detach().clone() for p in twins.narrow]
    twins.give_gradients()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"torch\.bfloat16.*torch\.float32.*through the"):
            twins.ours.step()
    assert all(map(torch.equal, before, twins.narrow))
    assert twins.ours.iteration == 3
    twins.ours.load_state_dict(saved)
    twins.check()
    twins.run(2)


def test_a_step_of_zero_rate_creates_all_state():
    twins = Twins(BY_NAME["adamw"], average=Ema(0.5))
    for opt, params in ((twins.ours, twins.narrow), (twins.twin, twins.wide)):
        for group in opt.param_groups:
            group["lr"] = 0.0
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
        assert opt.iteration == 0
    twins.check()
    state = twins.ours.state[twins.narrow[0]]
    assert [*state] == ["step", "exp_avg", "exp_avg_sq", REST, "clr_average"]
    assert {name: str(t.dtype)[6:] for name, t in state.items() if t.dim()} == {
        "exp_avg": "float32", "exp_avg_sq": "float32", REST: "bfloat16", "clr_average": "float32",
    }  # fmt: skip


# ---- what is around


def test_range_test_and_snapshots_go_beside_masters(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2).to(BF16)
    opt = CyclicalOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1), step_size_up=2, master_weights=True
    )
    batches = [(torch.randn(8, 4).to(BF16), torch.randn(8, 2).to(BF16)) for _ in range(6)]

    def train(steps):
        for x, y in batches[:steps]:
            opt.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            opt.step()

    train(3)
    before = copy.deepcopy(opt.state_dict()["state"]), opt.master_state_dict(model)
    lr_range_test(
        model, opt, batches, torch.nn.functional.mse_loss, start_lr=1e-4, end_lr=0.1, num_steps=5
    )
    assert opt.iteration == 3
    after = opt.state_dict()["state"], opt.master_state_dict(model)
    for was, now in zip(before[0].values(), after[0].values(), strict=True):
        assert all(torch.equal(was[name], now[name]) for name in was)
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    snapshots = Snapshots(opt, model, last=2)
    train(6)
    assert snapshots.steps == [4, 8]
    assert snapshots.predict(batches[0][0]).isfinite().all()
