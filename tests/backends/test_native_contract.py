"""Every rule, flag, dtype and layout of the native kernels, within the bounds of contract.py.

How far 300 free steps drift from torch's is recorded for each case (`record_property`), and
``pytest tests/backends/test_native_contract.py -k contract -rP`` prints the largest for each dtype.
"""

from __future__ import annotations

import math

import pytest
import torch
from contract import Contract, cases, dtypes, kernels, name_of
from native_helpers import (
    BY_NAME,
    DTYPES,
    HALF,
    assert_identical,
    assert_nan_and_inf_where_torch_has_them,
    assert_no_nan_at_a_rate_beyond_all_floats,
    assert_pattern,
    drawn,
    feed,
    like,
    members,
    parameters,
    tensors_of,
    threads,
    wrapped,
)

from clr_optim import CyclicalOptimizer

pytestmark = pytest.mark.usefixtures("native_kernels")


_deviations = {}


STEPS = 300


@pytest.fixture(scope="module")
def gradients():
    """Return for each dtype 300 gradients of a transposed matrix and of a vector, and in double."""
    found = {}
    for dtype in DTYPES:
        matrices, vectors = drawn([(STEPS, 4, 9), (STEPS, 17)], dtype, seed=1)
        found[dtype] = [
            ([m.t(), v], [m.double().t(), v.double()])
            for m, v in zip(matrices, vectors, strict=True)
        ]
        found[dtype] = [
            # The vector's first gradient comes late and every third is missing, so that its counter
            # differs from the matrix's.
            (narrow, wide if dtype in HALF else narrow)
            if k > 2 and k % 3
            else ([narrow[0], None], [(wide if dtype in HALF else narrow)[0], None])
            for k, (narrow, wide) in enumerate(found[dtype])
        ]
    return found


@dtypes
@cases
def test_contract(case, dtype, gradients, record_property):
    matrix, vector = drawn([(4, 9), (17,)], torch.float64)
    contract = Contract(case, dtype, [matrix.t(), vector], free=dtype != torch.float64)
    for narrow, wide in gradients[dtype]:
        contract.step(narrow, wide)
    contract.compare()
    deviation = contract.deviation()
    record_property("relative deviation after 300 steps", deviation)
    _deviations.setdefault(dtype, {})[case.name] = deviation


def test_contract_deviations(record_property):
    """Print how far 300 free steps drifted: a report, not a check."""
    for dtype, found in _deviations.items():
        name = max(found, key=found.get)
        text = f"{found[name]:.1e} ({name}), median {sorted(found.values())[len(found) // 2]:.1e}"
        record_property(f"{name_of(dtype)}: largest relative deviation after 300 steps", text)
        print(f"{name_of(dtype)}: largest relative deviation after 300 steps {text}")


LAYOUTS = {
    "contiguous": lambda t: t((5, 7)),
    "channels-last": lambda t: t((2, 3, 4, 5)).to(memory_format=torch.channels_last),
    "transposed": lambda t: t((6, 9)).t(),
    "permuted": lambda t: t((3, 4, 5)).permute(2, 0, 1),
    "empty": lambda t: t((0, 3)),
    "scalar": lambda t: t(()),
    "ones": lambda t: t((1, 1, 5, 1)),
    "one-channel": lambda t: t((4, 1, 3, 3)).to(memory_format=torch.channels_last),
    **{f"{n}": lambda t, n=n: t((n,)) for n in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127)},
}


@dtypes
@kernels
def test_layouts(case, dtype):
    generator = torch.Generator().manual_seed(3)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = [make(draw) for make in LAYOUTS.values()]
    contract = Contract(case, dtype, values)
    for p, v in zip(members(contract.ours), values, strict=True):
        assert p.stride() == v.stride()
    for _ in range(6):
        contract.step([like(draw(p.shape), p) for p in members(contract.ours)])
    contract.compare()


SIZES = [4095, 4096, 4097, 32767, 32768, 32769, 3 * 16384 + 5]


@pytest.mark.parametrize("sizes", [[(n,) for n in SIZES], [(37,)] * 500], ids=["large", "many"])
@dtypes
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam-wd"])
def test_pieces(name, dtype, sizes):
    values = drawn(sizes, torch.float64)
    contract = Contract(BY_NAME[name], dtype, values)
    with threads(2):
        for k in range(2):
            contract.step(drawn(sizes, dtype, seed=k + 1))
    contract.compare()


class Island:
    """Memory that begins a tensor at an odd address, between values that must not change."""

    def __init__(self):
        self.shores = []

    def __call__(self, tensor):
        memory = torch.full((tensor.numel() + 2,), 77.0, dtype=tensor.dtype)
        self.shores.append(memory)
        return memory[1:-1].copy_(tensor.flatten()).view(tensor.shape)

    def assert_untouched(self):
        assert all(memory[0] == memory[-1] == 77 for memory in self.shores)


@dtypes
@kernels
def test_odd_lengths_at_odd_addresses(case, dtype):
    # Lengths around a pair, a vector, and float16's block of 512.
    sizes = [(n,) for n in (1, 2, 3, 4, 5, 7, 9, 15, 17, 33, 511, 512, 513, 1023, 1025)]
    island = Island()
    contract = Contract(case, dtype, drawn(sizes, torch.float64))
    for p in members(contract.ours):
        p.data = island(p.data)
    contract._take()
    for k in range(4):
        grads = drawn(sizes, dtype, seed=k + 1)
        # Gradients at odd addresses like their parameters, then at even ones.
        contract.step([island(g) for g in grads] if k % 2 else grads)
        if k == 1:
            for state in contract.ours.state.values():
                state.update({key: island(t) for key, t in state.items() if key != "step"})
            contract._take()
    contract.compare()
    island.assert_untouched()
    assert all(t.data_ptr() % 16 for t in contract.mine)


@dtypes
@kernels
def test_nan_and_inf(case, dtype):
    special = [math.nan, math.inf, -math.inf, 0.0, 1.0, -1.0]
    values = torch.tensor([special] * 6, dtype=torch.float64).t().contiguous()
    shaped = [values.t().contiguous().flatten(), torch.ones(6, dtype=torch.float64), values[4]]
    gradients = [values.flatten(), torch.tensor(special, dtype=torch.float64), values[4] * 0.5]
    contract = Contract(case, dtype, shaped)
    own = case.make(parameters([v.to(dtype) for v in shaped]))
    for k in range(5):
        grads = gradients if k < 2 else [g.nan_to_num(0.25, 0.5, -0.5) for g in gradients]
        for p, g in zip(members(own), grads, strict=True):
            p.grad = like(g, p)
        feed(own, contract.ours)
        own.step()
        contract.step([like(g, p) for g, p in zip(grads, members(contract.ours), strict=True)])
        _, _, mine, expected = contract.segments[-1]
        assert_pattern(mine[-1], expected[-1].to(dtype), k)
        # torch's own step in 16 bits may overflow in between where float64 does not.
        for key, t in tensors_of(own).items() if dtype not in HALF else ():
            assert_pattern(tensors_of(contract.ours)[key], t, (k, key))


@dtypes
@cases
def test_nan_and_inf_of_extreme_values(case, dtype):
    assert_nan_and_inf_where_torch_has_them(case, dtype, "native")


@dtypes
@kernels
@pytest.mark.parametrize("lr", [1e-10, 1e3])
def test_nan_and_inf_of_extreme_values_at_other_rates(case, dtype, lr):
    assert_nan_and_inf_where_torch_has_them(case, dtype, "native", lr=lr)


def test_a_centered_rmsprop_keeps_the_parameter_where_squares_overflow():
    p = torch.nn.Parameter(torch.ones(16))
    rmsprop = torch.optim.RMSprop([p], lr=0.1, centered=True, alpha=0.5)
    p.grad = torch.full((16,), 1e20)
    wrapped(rmsprop, backend="native").step()
    assert p.tolist() == [1.0] * 16


@dtypes
@kernels
def test_no_nan_at_a_rate_beyond_all_floats(case, dtype):
    assert_no_nan_at_a_rate_beyond_all_floats(case, dtype, "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_tensor_lr_is_held_at_its_own_largest_number(dtype):
    p = torch.nn.Parameter(torch.zeros(3))
    sgd = torch.optim.SGD([p], lr=torch.tensor(0.1, dtype=dtype))
    opt = CyclicalOptimizer(sgd, base_lr=1e300, max_lr=1e308, backend="native")
    assert opt.param_groups[0]["lr"].item() == min(torch.finfo(dtype).max, 1e300)
    p.grad = torch.zeros(3)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert p.tolist() == [0.0] * 3


# ---- threads


@dtypes
@kernels
def test_threads_give_the_same_bits(case, dtype):
    shapes = [(n,) for n in [*SIZES, 100, 1, 0]] + [(50,)] * 100
    runs = []
    for count in (1, 2):
        with threads(count):
            opt = case.ours(parameters(drawn(shapes, dtype)), backend="native", max_grad_norm=1.0)
            norms = []
            for k in range(3):
                for p, g in zip(members(opt), drawn(shapes, dtype, seed=k + 1), strict=True):
                    p.grad = g
                opt.step()
                norms.append(opt.grad_norm)
        runs.append((opt, norms))
    assert_identical(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("count", [2, 3, 8])
@dtypes
def test_where_threads_begin(dtype, count):
    # The least number of values that several threads share, one less, one more; and small tensors.
    least = min(count << 12, 1 << 15)
    for sizes in ([least - 1], [least], [least + 1], [97] * (least // 97 + 1)):
        runs = []
        for n in (1, count):
            with threads(n):
                opt = BY_NAME["adam-wd"].ours(parameters(drawn([(s,) for s in sizes], dtype)))
                for p, g in zip(members(opt), drawn([(s,) for s in sizes], dtype, 1), strict=True):
                    p.grad = g
                opt.step()
            runs.append(opt)
        assert_identical(*runs)
