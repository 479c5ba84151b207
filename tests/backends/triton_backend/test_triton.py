"""The Triton backend's numbers against torch's own for-loop step.

On the CPU the tests run in Triton's interpreter, in a separate process, since Triton decides at its
import: ``TRITON_INTERPRET=1 pytest tests/backends/triton_backend/test_triton.py`` (``make
interpreted``). On a GPU they run compiled (``make gpu-check``). The tolerances are those of the
native backend's tests. A program takes the interpreter some milliseconds, so there only some pairs
of setting and dtype run.
"""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from native_helpers import (
    BY_NAME,
    CASES,
    DTYPES,
    HALF,
    KERNELS,
    MIXED_GROUPS,
    assert_first_gradient_is_whole,
    assert_nan_and_inf_where_torch_has_them,
    assert_no_nan_at_a_rate_beyond_all_floats,
    assert_pattern,
    held,
    like,
    many_groups,
    members,
    parameters,
    wrapped,
)
from triton_helpers import (
    DEVICE,
    MARKS,
    SLOW,
    Contract,
    Twins,
    changes,
    choose_triton,
    contract,
    count_launches,
    drawn,
    kernels,
    named,
    some,
    twins,
)

pytestmark = MARKS
_backend = pytest.fixture(autouse=True)(choose_triton)
launches = pytest.fixture(name="launches")(count_launches)


# ---- the contract


_crossed = [(case, DTYPES[i % 4]) for i, case in enumerate(CASES)]
CELLS = (
    [*_crossed, *(cell for cell in itertools.product(KERNELS, DTYPES) if cell not in _crossed)]
    if SLOW
    else list(itertools.product(CASES, DTYPES))
)


def values_of(count=2):
    channels, vector, scalar = drawn([(2, 3, 2, 2), (17,), ()], torch.float64)
    return [channels.to(memory_format=torch.channels_last), vector, scalar][:count]


@pytest.mark.parametrize("cell", CELLS, ids=named)
def test_contract(cell):
    case, dtype = cell
    contract = Contract(case, dtype, values_of())
    assert members(contract.ours)[0].is_contiguous(memory_format=torch.channels_last)
    for k in range(8):
        grads = [
            like(g, p)
            for g, p in zip(
                drawn([(2, 3, 2, 2), (17,)], torch.float64, k + 1),
                members(contract.ours),
                strict=True,
            )
        ]
        # The vector's first gradient comes late, and some are missing.
        contract.step([grads[0], None if k in (0, 5) else grads[1]])
    contract.compare()


LAYOUTS = {
    "transposed": lambda draw: draw((6, 9)).t(),
    "permuted": lambda draw: draw((3, 4, 5)).permute(2, 0, 1),
    "empty": lambda draw: draw((0, 3)),
    "scalar": lambda draw: draw(()),
    "ones": lambda draw: draw((1, 1, 5, 1)),
    "one-channel": lambda draw: draw((4, 1, 3, 3)).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("cell", some(itertools.product(KERNELS, DTYPES), 5), ids=named)
def test_layouts(cell):
    case, dtype = cell
    generator = torch.Generator().manual_seed(3)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    contract = Contract(case, dtype, [make(draw) for make in LAYOUTS.values()])
    for _ in range(3):
        contract.step([like(draw(p.shape), p) for p in members(contract.ours)])
    contract.compare()


@pytest.mark.parametrize("dtype", DTYPES, ids=contract.name_of)
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam-wd"])
def test_sizes_around_a_block_and_a_chunk(name, dtype):
    from clr_optim.kernels.triton import multi_tensor

    block = multi_tensor.shape_of(dtype.itemsize).block
    chunk = block * multi_tensor.BLOCKS_PER_CHUNK
    sizes = [(n,) for n in (0, 1, block - 1, block, block + 1, chunk - 1, chunk, chunk + 1)]
    contract = Contract(BY_NAME[name], dtype, drawn(sizes, torch.float64))
    for k in range(2):
        contract.step(drawn(sizes, dtype, seed=k + 1))
    contract.compare()


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, 1.0, -1.0]


@pytest.mark.parametrize("cell", some(itertools.product(KERNELS, DTYPES), 3), ids=named)
def test_nan_and_inf(cell):
    case, dtype = cell
    special = torch.tensor([SPECIAL] * 6, dtype=torch.float64, device=DEVICE)
    values = [special.flatten(), torch.ones(6, dtype=torch.float64, device=DEVICE)]
    gradients = [special.t().flatten(), special[0]]
    contract = Contract(case, dtype, values)
    for k in range(4):
        grads = gradients if k < 2 else [g.nan_to_num(0.25, 0.5, -0.5) for g in gradients]
        contract.step([like(g, p) for g, p in zip(grads, members(contract.ours), strict=True)])
        _, _, mine, expected = contract.segments[-1]
        assert_pattern(mine[-1], expected[-1].to(dtype), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=contract.name_of)
@pytest.mark.parametrize("case", KERNELS, ids=contract.name_of)
def test_nan_and_inf_of_extreme_values(case, dtype):
    assert_nan_and_inf_where_torch_has_them(case, dtype, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=contract.name_of)
@kernels
def test_no_nan_at_a_rate_beyond_all_floats(case, dtype):
    assert_no_nan_at_a_rate_beyond_all_floats(case, dtype, "triton", DEVICE)


# ---- gradients that come and go, and the launches


@pytest.mark.parametrize(
    "cell",
    some(
        itertools.product(
            # No kernel takes the other patterns' gradients, or they lie on the CPU.
            [p for p in changes.PATTERNS if p not in ("expanded", "all")],
            ["sgd-damp", "adamw-ams", "adagrad-decay", "rmsprop-mom"],
        ),
        3,
    ),
    ids="-".join,
)
def test_gradient_patterns(cell):
    pattern, name = cell
    pair = twins(BY_NAME[name], ((5, 3), (7,), (), (7,)), backend="auto")
    for k in range(7):
        changes.PATTERNS[pattern](pair, k)
        pair.step()


def test_a_parameter_that_joins_later_counts_its_own_steps():
    pair = twins(BY_NAME["adam"], ((5,), (3,), (2,)))
    for k in range(4):
        pair.draw()
        changes.drop(pair, lambda i: i == 2 and k < 2)  # noqa: B023
        pair.step()
    for opt in pair.both():
        opt.add_param_group({"params": parameters(drawn([(4,)], torch.float64, 8)), "lr": 0.02})
    pair.run(2)
    assert [int(pair.ours.state[p]["step"]) for p in members(pair.ours)] == [6, 6, 4, 2]


def test_the_first_gradient_of_a_tensor_is_not_dampened():
    assert_first_gradient_is_whole("triton", drawn)


def test_a_buffer_of_none_is_a_first_step():
    pair = twins(BY_NAME["sgd-damp"])
    for opt in pair.both():
        for p in members(opt):
            opt.state[p]["momentum_buffer"] = None
    pair.run(3)


def test_memory_that_nothing_has_written_is_not_computed_with(monkeypatch):
    empty_like = torch.empty_like

    def garbage(like, **options):
        tensor = empty_like(like, **options)
        tensor.view(torch.int64).fill_(0x7FF4 << 48)  # a signaling NaN
        return tensor

    monkeypatch.setattr(torch, "empty_like", garbage)
    pair = twins(BY_NAME["sgd-nest-wd"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.run(2)


def test_3000_tensors():
    shapes = [(1 + i % 7,) for i in range(3000)]
    pair = twins(BY_NAME["sgd-wd"], shapes)
    pair.draw()
    pair.step()


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=contract.name_of)
def test_counters_of_many_tensors(default):
    """More counters than one program of `advance` takes; empty tensors need no other program."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)  # torch's dtype for counters
    try:
        pair = twins(BY_NAME["adam"], [(3,), *[(0,)] * 700, (2,)])
        pair.run(2)
    finally:
        torch.set_default_dtype(before)
    counters = [pair.ours.state[p]["step"] for p in members(pair.ours)]
    assert {(t.dtype, int(t)) for t in counters} == {(default, 2)}


def test_a_largest_average_that_is_nan_stays():
    pair = twins(BY_NAME["adamw-ams"])
    pair.run(1)
    for opt in pair.both():
        opt.state[members(opt)[1]]["max_exp_avg_sq"][2] = math.nan
    pair.run(2)
    assert members(pair.ours)[1].isnan().nonzero().tolist() == [[2]]


def test_an_average_of_the_last_gradient_alone_is_that_gradient():
    (p,) = parameters(drawn([(3,)], torch.float32))
    opt = wrapped(torch.optim.Adam([p], lr=0.1, betas=(0.0, 0.9)), backend="triton")
    for value in (1e10, 1e-10):
        p.grad = torch.full_like(p, value)
        opt.step()
    assert torch.equal(opt.state[p]["exp_avg"], p.grad)


@kernels
def test_several_dtypes_share_one_position(case):
    values = drawn([(5, 3)], torch.float64)
    dtypes = DTYPES if case is KERNELS[0] else DTYPES[1:3]
    mixed = case.ours([p for d in dtypes for p in parameters(values, d)], backend="triton")
    alone = [case.ours(parameters(values, d), backend="triton") for d in dtypes]
    for k in range(3):
        for p, single in zip(members(mixed), alone, strict=True):
            (p.grad,) = drawn([(5, 3)], p.dtype, seed=k)
            members(single)[0].grad = p.grad.clone()
            single.step()
        mixed.step()
    for p, single, state in zip(members(mixed), alone, held(mixed), strict=True):
        assert torch.equal(p, members(single)[0])
        for (_, a), (_, b) in zip(state, held(single)[0], strict=True):
            assert torch.equal(a, b)


def test_a_launch_for_each_bucket_and_one_more(launches):
    update, advance = launches
    dtypes = (torch.float32, torch.bfloat16)
    params = [p for d in dtypes for p in parameters(drawn([(5,), (4, 2), (9000,)], d))]
    opt = wrapped(torch.optim.AdamW(params, lr=0.1), backend="triton", max_grad_norm=1.0)
    for k in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        # A program per chunk: the largest tensors have two chunks.
        assert update.taken() == [(4,), (4,)], k
        assert advance.taken() == [(1,)], k
    for p in params[:3]:
        p.grad = None
    params[3].grad = None
    opt.step()
    assert (update.taken(), advance.taken()) == ([(3,)], [(1,)])
    opt.zero_grad()
    opt.step()
    assert update.taken() == []
    assert opt.iteration == 5


def test_settings_do_not_split_a_bucket(launches):
    groups = [
        {"params": parameters(drawn([(3,)], torch.float64)), **own}
        for own in (
            {}, {"lr": 0.2}, {"betas": (0.5, 0.6)}, {"eps": 0.1, "weight_decay": 0.1},
            {"maximize": True},
        )
    ]  # fmt: skip
    opt = wrapped(torch.optim.Adam(groups, lr=0.1), backend="triton")
    for p in members(opt):
        p.grad = torch.ones_like(p)
    opt.step()
    assert [counted.taken() for counted in launches] == [[(5,)], [(1,)]]


def test_auto_returns_to_the_kernels(launches):
    pair = twins(BY_NAME["sgd-mom"], backend="auto")
    pair.run(1)
    changes.PATTERNS["other_layout"](pair, 1)
    pair.step()
    launches[0].taken()
    pair.run(1)
    assert launches[0].taken() == [(2,)]


# ---- groups


@pytest.mark.parametrize("name", MIXED_GROUPS)
def test_groups(name):
    pair = Twins(many_groups(*MIXED_GROUPS[name], draw=drawn), backend="auto")
    for k in range(5):
        pair.draw()
        changes.drop(pair, lambda i: (i + k) % 4 == 0)  # noqa: B023
        pair.step()


@pytest.mark.parametrize("name", ["sgd-mom", "adamw"])
def test_parameters_that_share_memory(name):
    def make():
        (base, other) = drawn([(24,), (3,)], torch.float64)
        views = [torch.nn.Parameter(base[:16]), torch.nn.Parameter(base[8:])]
        return BY_NAME[name].make([*views, *parameters([other])])

    Twins(make, backend="auto").run(3)


# ---- clipping


@pytest.mark.parametrize("limit", [1e-3, 1.0, math.inf])
@pytest.mark.parametrize("name", ["sgd-wd", "adamw-ams", "rmsprop-mom-cent-max"])
def test_clipping(name, limit):
    pair = twins(BY_NAME[name], ((5, 3), (7,), ()), max_grad_norm=limit)
    contract.assert_clips(pair, limit, steps=4)


def test_clipping_where_there_is_no_gradient():
    pair = twins(BY_NAME["adam"], max_grad_norm=1.0)
    pair.step()
    assert float(pair.ours.grad_norm) == 0.0
    assert pair.ours.iteration == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam-wd"])
def test_clipping_nan_and_inf(name, value):
    contract.assert_clips_nan_and_inf(twins(BY_NAME[name], max_grad_norm=1.0), value, steps=3)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=contract.name_of)
def test_clipping_in_other_dtypes(dtype):
    contract.assert_clips_in_another_dtype(
        dtype, backend="triton", draw=drawn, tolerance=4 * torch.finfo(dtype).eps
    )


def test_clipping_one_norm_over_both_backends():
    contract.assert_one_norm_over_both_backends(Twins, draw=drawn, steps=3)
