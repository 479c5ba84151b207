"""The native backend against torch's own for-loop step: every rule, flag, dtype, layout and event.

The contract. In float64 a whole run agrees to 1e-12 relative to a tensor's largest value. In
float32 each step, taken from torch's state, agrees to `FEW` float32 ulps of the largest update,
and one ulp of the parameter, to which it is rounded. In bfloat16 and float16 the reference is
torch's float64 step from the same state, rounded: ours computes in float32 and rounds then, so that
the two roundings can end one ulp of the 16 bits apart, and no more.

How far 300 free steps drift from torch's is recorded for each case (`record_property`), and
``pytest tests/test_native.py -k contract -rP`` prints the largest for each dtype.
"""

from __future__ import annotations

import copy
import ctypes
import io
import math
import pickle
import sys
import warnings
from collections import OrderedDict, UserDict
from types import SimpleNamespace

import pytest
import torch
from native_helpers import (
    BY_NAME,
    CASES,
    DTYPES,
    HALF,
    KERNELS,
    MIXED_GROUPS,
    Twins,
    assert_alike,
    assert_close,
    assert_first_gradient_is_whole,
    assert_identical,
    assert_nan_and_inf_where_torch_has_them,
    assert_no_nan_at_a_rate_beyond_all_floats,
    assert_pattern,
    drawn,
    feed,
    held,
    like,
    many_groups,
    members,
    parameters,
    strides,
    tensors_of,
    threads,
    twins,
    wrapped,
)

from clr_optim import CyclicalOptimizer
from clr_optim.kernels.native import build
from clr_optim.plan import plan, words
from clr_optim.plan.eligible import DTYPES as NATIVE_DTYPES

FEW = 4
ULP32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    """Without the kernels these tests would compare torch with itself."""
    build.load()


@pytest.fixture(autouse=True)
def _backend(monkeypatch):
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "native")  # what "auto" means here


def name_of(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value.name


cases = pytest.mark.parametrize("case", CASES, ids=name_of)
kernels = pytest.mark.parametrize("case", KERNELS, ids=name_of)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


# ---- the contract


class Contract:
    """Runs one case beside torch, each step from torch's state, and compares at the end.

    Args:
        case: the optimizer.
        dtype: of the parameters.
        values: what they start as, in the layouts to use.
        free: whether a third optimizer runs beside them that is never set back.
    """

    def __init__(self, case, dtype, values, free=False):
        self.case, self.dtype = case, dtype
        wide = torch.float64 if dtype in HALF else dtype
        self.ours = case.ours(parameters(values, dtype), backend="native")
        self.theirs = case.make(parameters([v.to(dtype) for v in values], wide))
        self.free = case.ours(parameters(values, dtype), backend="native") if free else None
        #: a segment for each set of state tensors, which grows while first gradients come
        self.segments = []
        self._take()

    def step(self, grads, wide_grads=None):
        """One step with these gradients, in their parameters' layout; None for no gradient."""
        if wide_grads is None:
            wide_grads = [g if g is None or self.dtype not in HALF else g.double() for g in grads]
        for optimizer, given in (
            (self.ours, grads), (self.free, grads), (self.theirs, wide_grads),
        ):  # fmt: skip
            if optimizer is not None:
                for p, g in zip(members(optimizer), given, strict=True):
                    p.grad = g
        feed(self.theirs, self.ours)
        for optimizer in (self.ours, self.theirs, self.free):
            if optimizer is not None:
                optimizer.step()
        self._log()

    def _take(self):
        """A new segment: all tensors that there are now, and their values."""
        mine, reference = tensors_of(self.ours), tensors_of(self.theirs)
        assert list(mine) == list(reference)
        keys = [key for key in mine if key[1] != "step"]
        for key in keys:
            assert strides(mine[key]) == strides(reference[key])
            assert mine[key].dtype == self.dtype
        self.keys = keys
        self.count = sum(len(state) for state in self.theirs.state.values())
        self.mine, self.reference = [mine[k] for k in keys], [reference[k] for k in keys]
        # State that has just come has nothing before it.
        last = self.last() if self.segments else {}
        before = flat([last.get(k, t) for k, t in zip(keys, self.reference, strict=True)])
        self.segments.append((keys, [before], [], []))

    def last(self):
        """What the last step, or the start, left."""
        keys, before, _, _ = self.segments[-1]
        found = tensors_of(self.ours)
        return dict(zip(keys, before[-1].split([found[key].numel() for key in keys]), strict=True))

    def _log(self):
        if sum(len(state) for state in self.theirs.state.values()) != self.count:
            self._take()
        _, before, mine, reference = self.segments[-1]
        theirs = flat(self.reference)
        if self.dtype in HALF:
            rounded = [t.to(self.dtype) for t in self.reference]
        else:
            rounded = self.reference
        mine.append(flat(self.mine))
        reference.append(theirs)
        before.append(flat(rounded))
        if self.dtype != torch.float64:
            torch._foreach_copy_(self.mine, rounded)
        if self.dtype in HALF:
            torch._foreach_copy_(self.reference, rounded)

    def compare(self):
        """All steps so far, each within the bound of the dtype."""
        found = tensors_of(self.ours)
        for key, t in tensors_of(self.theirs).items():
            if key[1] == "step":
                assert (found[key].dtype, found[key].item()) == (t.dtype, t.item())
        for keys, before, mine, reference in self.segments:
            if not mine:
                continue
            sizes = [found[key].numel() for key in keys]
            columns = [torch.stack(c).split(sizes, 1) for c in (before[:-1], mine, reference)]
            for key, old, ours, wide in zip(keys, *columns, strict=True):
                if ours.numel():
                    self.bound(key, old.double(), ours, wide.double())

    def bound(self, key, before, ours, wide):
        """A row for each step."""
        error = (ours.double() - wide.to(self.dtype).double()).abs()
        size = torch.maximum(wide.abs(), before.abs())
        if self.dtype == torch.float64:
            allowed = 1e-12 * wide.abs().amax(1, keepdim=True)
        elif self.dtype == torch.float32:
            # State is compared with the tensor's largest value: sums of both signs cancel.
            largest = (wide - before).abs() if key[1] == "" else size
            allowed = FEW * ULP32 * largest.amax(1, keepdim=True)
            if key[1] == "":
                allowed = allowed + ULP32 * wide.abs()
        else:
            near = (ordered(ours) - ordered(wide.to(self.dtype))).abs() <= 1
            # Where a sum is nearly 0 its error is that of float32's rounding of its terms.
            terms = FEW * ULP32 * size.amax(1, keepdim=True)
            assert (near | (error <= terms)).all(), (key, ours, wide)
            return
        assert (error <= allowed).all(), (key, (error / allowed).max())

    def deviation(self):
        """Of the run that was never set back: the largest, relative to the tensor's largest."""
        free, reference = tensors_of(self.free or self.ours), tensors_of(self.theirs)
        return max(
            ((free[key].double() - t.double()).abs().max() / t.abs().max()).item()
            for key, t in reference.items()
            if key[1] == "" and t.numel()
        )


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def ordered(x):
    """16-bit floats as integers in their order, neighbours one apart."""
    bits = x.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


_deviations = {}


STEPS = 300


@pytest.fixture(scope="module")
def gradients():
    """For each dtype 300 gradients of a transposed matrix and of a vector, and their doubles."""
    found = {}
    for dtype in DTYPES:
        matrices, vectors = drawn([(STEPS, 4, 9), (STEPS, 17)], dtype, seed=1)
        found[dtype] = [
            ([m.t(), v], [m.double().t(), v.double()])
            for m, v in zip(matrices, vectors, strict=True)
        ]
        found[dtype] = [
            # The vector's first gradient comes late and every third is missing: it counts for
            # itself.
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
    """Prints what 300 free steps came to: a report, not a check."""
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
    """Memory in which a tensor starts where no vector does, between values to be left alone."""

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
    # Around a pair, a vector, and float16's block of 512.
    sizes = [(n,) for n in (1, 2, 3, 4, 5, 7, 9, 15, 17, 33, 511, 512, 513, 1023, 1025)]
    island = Island()
    contract = Contract(case, dtype, drawn(sizes, torch.float64))
    for p in members(contract.ours):
        p.data = island(p.data)
    contract._take()
    for k in range(4):
        grads = drawn(sizes, dtype, seed=k + 1)
        # Beside their parameters at odd addresses, and then not.
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
        _, _, mine, theirs = contract.segments[-1]
        assert_pattern(mine[-1], theirs[-1].to(dtype), k)
        # torch's own step in 16 bits may overflow on the way where float64 does not.
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
    # The least that several threads share, and one value less; small tensors and one alone.
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


# ---- the scan looks ahead


def test_the_words_are_found_in_this_torch():
    impl, storage = words.find_pointers()
    assert (impl, storage) == words.known_words()[:2] != (0, 0)
    # A parameter with a gradient is laid out as the plain tensor that they were found in.
    p = torch.nn.Parameter(torch.ones(3).t())
    p.grad = torch.ones(3)
    for tensor in (p, p.grad):
        four_words = ctypes.c_void_p * 4
        assert four_words.from_address(id(tensor))[impl] == tensor._cdata
        found = four_words.from_address(tensor._cdata)[storage]
        assert found == tensor.untyped_storage()._cdata


def test_without_the_words_it_does_not_look_ahead(monkeypatch):
    for storage in (SimpleNamespace(), SimpleNamespace(_cdata=8)):
        monkeypatch.setattr(torch.Tensor, "untyped_storage", lambda self, s=storage: s)
        assert words.find_pointers() == (0, 0)


sight = pytest.mark.parametrize("blind", [False, True], ids=["ahead", "blind"])
# Fewer rows than are looked at ahead (gradients 8, objects 12), just as many, and more.
rows = pytest.mark.parametrize("count", [1, 2, 4, 7, 8, 9, 11, 12, 13, 16, 17, 40])


def many(name, count, **wrap):
    return twins(BY_NAME[name], [(3, 2)] * count, **wrap)


@sight
@rows
@pytest.mark.parametrize("name", ["sgd", "adamw-ams"])
def test_looking_ahead(name, count, blind, monkeypatch):
    if blind:
        monkeypatch.setattr(words, "_WORDS", words.Words())
    pair = many(name, count)
    pair.run(2)
    for k in range(5):
        pair.draw()
        if k % 2:
            drop(pair, lambda i, k=k: (i + k) % 3 == 0)
        versions = [p._version for p in members(pair.ours)]
        given = [p.grad is not None for p in members(pair.ours)]
        pair.step()
        moved = [p._version > v for p, v in zip(members(pair.ours), versions, strict=True)]
        assert moved == given


def counts(tensors):
    return [sys.getrefcount(t) for t in tensors]


def _strided(pair, i):
    for opt in pair.both():
        p = members(opt)[i]
        p.grad = p.grad.t().contiguous().t()


def _sparse(pair, i):
    for opt in pair.both():
        p = members(opt)[i]
        p.grad = sparse(p.grad, 1)


def _subclass(pair, i):
    for opt in pair.both():
        p = members(opt)[i]
        p.grad = Odd.subclass(p, p.grad)


def _moved(pair, i):
    for opt in pair.both():
        p = members(opt)[i]
        p.data = p.data.clone()


def _replaced_state(pair, i):
    for opt in pair.both():
        state = opt.state.get(members(opt)[i], {})
        state.update({k: t.clone() for k, t in state.items()})


def _no_gradient(pair, i):
    for opt in pair.both():
        members(opt)[i].grad = None


CUTS = {f.__name__.strip("_"): f for f in (
    _strided, _sparse, _subclass, _moved, _replaced_state, _no_gradient,
)}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@sight
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("count", [5, 8, 30])
def test_a_scan_cut_short_keeps_no_gradient(cut, count, blind, monkeypatch):
    if blind:
        monkeypatch.setattr(words, "_WORDS", words.Words())
    pair = many("sgd-mom" if cut != "sparse" else "sgd", count)
    pair.run(2)
    for i in (0, 1, count // 2, count - 1):
        pair.draw()
        CUTS[cut](pair, i)
        grads = [p.grad for p in members(pair.ours) if p.grad is not None]
        before = counts(grads)
        pair.step()
        assert counts(grads) == before
        pair.draw()
        pair.step()


@pytest.mark.parametrize("at", [0, 3, 8, 19])
def test_an_exception_in_a_scan_keeps_no_gradient_and_is_forgotten(at):
    pair = many("sgd-mom", 20)
    pair.run(2)
    pair.draw()
    chosen = members(pair.ours)[at]
    raised = []

    class Fails(torch.overrides.TorchFunctionMode):
        """The first look at the gradient raises, which is the scan's; the plan is built anew."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            if name == "__get__" and args[0] is chosen and not raised:
                raised.append(func)
                raise ZeroDivisionError
            return func(*args, **(kwargs or {}))

    grads = [p.grad for p in members(pair.ours)]
    before = counts(grads)
    feed(pair.theirs, pair.ours)
    with Fails():
        pair.ours.step()
    assert raised
    pair.theirs.step()
    assert_alike(*pair.both())
    assert counts(grads) == before
    pair.run(2)


# ---- gradients that come and go


def _all(pair, k):
    pair.draw()


def _alternating(pair, k):
    pair.draw()
    drop(pair, lambda i: (i + k) % 2)


def _none(pair, k):
    pair.draw()
    drop(pair, lambda i: k % 3 == 1)


def _never(pair, k):
    pair.each(lambda opt: opt.zero_grad())


def _zeroed(pair, k):
    if k == 0:
        pair.draw()
    pair.each(lambda opt: opt.zero_grad(set_to_none=False))
    for p, q in zip(*map(members, pair.both()), strict=True):
        p.grad.add_(k - 2.5)
        q.grad.add_(k - 2.5)


def _late(pair, k):
    pair.draw()
    drop(pair, lambda i: i == 1 and k < 5)


def _other_layout(pair, k):
    pair.draw()
    if k % 2:
        for opt in pair.both():
            p = members(opt)[0]
            p.grad = p.grad.t().contiguous().t()
            assert p.grad.stride() != p.stride()


def _expanded(pair, k):
    pair.draw()
    if k % 2:
        for opt in pair.both():
            for p in members(opt):
                p.grad = torch.full((), 0.5 + k, dtype=p.dtype).expand(p.shape)


def _one_tensor_for_two(pair, k):
    pair.draw()
    for opt in pair.both():
        members(opt)[3].grad = members(opt)[1].grad


def drop(pair, which):
    for opt in pair.both():
        for i, p in enumerate(members(opt)):
            if which(i):
                p.grad = None


PATTERNS = {
    f.__name__.strip("_"): f
    for f in (
        _all, _alternating, _none, _never, _zeroed, _late, _other_layout, _expanded,
        _one_tensor_for_two,
    )
}  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@kernels
def test_gradient_patterns(case, pattern):
    pair = twins(case, ((5, 3), (7,), (), (7,)))
    for k in range(9):
        PATTERNS[pattern](pair, k)
        pair.step()


# torch's own, once per process, from within its step on sparse gradients.
quiet = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


def sparse(grad, k):
    rows = torch.tensor([k % grad.shape[0], 0, k % grad.shape[0]])
    return torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape, check_invariants=True)


@quiet
@pytest.mark.parametrize("name", ["sgd", "sgd-mom", "adagrad-decay", "adagrad-init"])
def test_sparse_gradients_beside_dense(name):
    pair = twins(BY_NAME[name], ((5, 3), (7,), (4, 2)))
    for k in range(9):
        pair.draw()
        for opt in pair.both():
            p = members(opt)[0]
            p.grad = sparse(p.grad, k)
            if k % 4 == 3:
                p.grad = None
        pair.step()


@quiet
@pytest.mark.parametrize("name", ["sgd", "sgd-mom", "adam", "adadelta", "rmsprop", "adagrad"])
def test_gradients_that_turn_sparse_and_dense_again(name):
    # SGD's sparse buffer takes no dense gradient, and Adam no sparse one: torch's error is ours.
    pair = twins(BY_NAME[name], ((5, 3), (7,)))
    for k in range(9):
        pair.draw()
        if k % 3 == 1:
            for opt in pair.both():
                p = members(opt)[0]
                p.grad = sparse(p.grad, k)
        pair.step()


def test_a_gradient_that_is_its_parameter():
    pair = twins(BY_NAME["adam-wd"])
    for _ in range(3):
        for opt in pair.both():
            for p in members(opt):
                p.grad = p.detach()
        pair.step()


# ---- groups


@pytest.mark.parametrize("name", MIXED_GROUPS)
def test_groups(name):
    pair = Twins(many_groups(*MIXED_GROUPS[name]))
    for k in range(12):
        pair.draw()
        drop(pair, lambda i: (i + k) % 4 == 0)  # noqa: B023
        pair.step()


@kernels
def test_several_dtypes_in_one_optimizer(case):
    values = drawn([(5, 3)] * 4, torch.float64)
    mixed = case.ours([p for d in DTYPES for p in parameters(values[:1], d)], backend="native")
    alone = [case.ours(parameters(values[:1], d), backend="native") for d in DTYPES]
    for k in range(6):
        for p, single in zip(members(mixed), alone, strict=True):
            grad = drawn([(5, 3)], p.dtype, seed=k)[0]
            p.grad, members(single)[0].grad = grad, grad.clone()
            single.step()
        mixed.step()
    for i, single in enumerate(alone):
        (mine,), theirs = held(single), held(mixed)[i]
        for (_, a), (_, b) in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(members(mixed)[i], members(single)[0])


@pytest.mark.parametrize("name", ["sgd-mom", "adamw", "adagrad", "rmsprop-mom"])
def test_a_parameter_given_twice(name):
    def make():
        p, q = parameters(drawn(((4, 3), (5,)), torch.float64))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            return BY_NAME[name].make([p, q, p])

    Twins(make).run(5)


@pytest.mark.parametrize("kind", ["all-of-it", "part", "neighbours"])
@kernels
def test_parameters_that_share_memory(case, kind):
    def make():
        base = drawn([(24,)], torch.float64)[0]
        views = {
            "all-of-it": [base, base.view(4, 6)],
            "part": [base[:16], base[8:]],
            "neighbours": [base[:8], base[8:]],
        }[kind]
        (other,) = parameters(drawn([(3,)], torch.float64))
        return case.make([*map(torch.nn.Parameter, views), other])

    Twins(make).run(6)


@pytest.mark.parametrize("gaps_first", [True, False])
@pytest.mark.parametrize("name", ["adamw", "sgd-wd", "rmsprop-mom"])
def test_parameters_that_share_memory_with_one_left_to_torch(name, gaps_first):
    def make():
        base = drawn([(4, 6)], torch.float64)[0]
        pair = [torch.nn.Parameter(base), torch.nn.Parameter(base[:, :3])]
        case = BY_NAME[name]
        return case.make(pair[::-1] if gaps_first else pair, lr=0.5, weight_decay=0.5)

    Twins(make).run(4)


@kernels
def test_parameters_with_gaps(case):
    def make():
        base = drawn([(4, 6)], torch.float64)[0]
        gaps = torch.nn.Parameter(base[:, ::2])
        assert not gaps.is_contiguous()
        return case.make([gaps, *parameters(drawn([(5,)], torch.float64))])

    pair = Twins(make)
    pair.run(5)
    assert "gaps" in pair.ours.explain()


def test_an_overlapping_parameter():
    def make():
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(1).expand(3))], lr=0.1, foreach=False)

    pair = Twins(make)
    pair.draw()
    for opt in pair.both():
        members(opt)[0].grad = torch.ones(3)
    pair.step()


# ---- clipping


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e6, math.inf])
@kernels
def test_clipping(case, limit):
    pair = twins(case, max_grad_norm=limit)
    assert pair.ours.grad_norm is None
    for k in range(6):
        pair.draw()
        drop(pair, lambda i: i == k % 4)  # noqa: B023
        kept = [(p, p.grad, p.grad.clone()) for p in members(pair.ours) if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(members(pair.theirs), limit)
        pair.step()
        assert_close(pair.ours.grad_norm, norm, 1e-12)
        for p, grad, values in kept:
            assert p.grad is grad
            assert torch.equal(grad, values)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=name_of)
def test_clipping_in_other_dtypes(dtype):
    case = BY_NAME["adam-wd"]
    values = drawn(((5, 3), (300,)), dtype)
    ours = case.ours(parameters(values), backend="native", max_grad_norm=0.5)
    theirs = case.make(parameters(values, torch.float64))
    for k in range(3):
        for p, q, g in zip(*map(members, (ours, theirs)), drawn(((5, 3), (300,)), dtype, k + 9)):  # noqa: B905
            p.grad, q.grad = g.clone(), g.double()
        norm = torch.nn.utils.clip_grad_norm_(members(theirs), 0.5)
        feed(theirs, ours)
        theirs.step()
        ours.step()
        assert ours.grad_norm.dtype == torch.float32
        assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        for p, q in zip(*map(members, (ours, theirs)), strict=True):
            assert_close(p, q.to(dtype), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
@kernels
def test_clipping_nan_and_inf(case, value):
    pair = twins(case, max_grad_norm=1.0)
    for k in range(4):
        pair.draw()
        if k != 1:
            for opt in pair.both():
                members(opt)[0].grad[0, 0] = value
        norm = torch.nn.utils.clip_grad_norm_(members(pair.theirs), 1.0)
        pair.step()
        assert_close(pair.ours.grad_norm, norm, 1e-12)


def test_clipping_one_norm_over_both_backends():
    pair = Twins(
        many_groups(*MIXED_GROUPS["adamw-differentiable"]),
        max_grad_norm=0.5,
    )
    for _ in range(5):
        pair.draw()
        kept = [(p, p.grad, p.grad.clone()) for p in members(pair.ours)]
        norm = torch.nn.utils.clip_grad_norm_(members(pair.theirs), 0.5)
        pair.step()
        assert_close(pair.ours.grad_norm, norm, 1e-12)
        assert all(p.grad is g and torch.equal(g, values) for p, g, values in kept)


def test_clipping_sparse_gradients_fails_as_in_torch_and_changes_nothing():
    pair = twins(BY_NAME["sgd-mom"], ((5, 3), (7,)), max_grad_norm=0.5)
    pair.draw()
    torch.nn.utils.clip_grad_norm_(members(pair.theirs), 0.5)
    pair.step()
    pair.draw()
    p, q = members(pair.ours)
    p.grad = sparse(p.grad, 2)
    grads = p.grad, q.grad
    before = copy.deepcopy(tensors_of(pair.ours))
    try:
        torch.nn.utils.clip_grad_norm_([p, q], 0.5)
    except NotImplementedError:
        with pytest.raises(NotImplementedError, match=r"max_grad_norm=0\.5 cannot clip sparse"):
            pair.ours.step()
    else:
        pytest.skip("this torch clips sparse gradients")
    assert (p.grad, q.grad) == grads
    assert pair.ours.iteration == 1
    assert all(torch.equal(t, before[k]) for k, t in tensors_of(pair.ours).items())


@pytest.mark.parametrize("backend", ["auto", "native", "torch"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_clipping_sparse_gradients_says_what_to_do(backend, with_closure):
    rows, dense = torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(3))
    adagrad = torch.optim.Adagrad([rows, dense], lr=0.1)
    opt = CyclicalOptimizer(adagrad, max_grad_norm=2.0, backend=backend)
    rows.grad = sparse(torch.ones(4, 2), 1)
    dense.grad = torch.ones(3)
    before = copy.deepcopy(opt.state_dict())
    message = r"max_grad_norm=2\.0 cannot clip sparse .*shape \[4, 2\].*without max_grad_norm"
    with pytest.raises(NotImplementedError, match=message):
        opt.step(*([lambda: torch.ones(())] if with_closure else []))
    assert str(opt.state_dict()) == str(before)
    assert (rows.tolist(), dense.tolist()) == ([[1.0] * 2] * 4, [1.0] * 3)
    assert rows.grad.layout is torch.sparse_coo


# ---- conversions


def rounded(dtype, values):
    """Through the library's own store and load."""
    out = torch.empty_like(values)
    call = build.load().clr_round
    call.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    call.restype = None
    call(NATIVE_DTYPES.index(dtype), values.data_ptr(), out.data_ptr(), values.numel())
    return out


def assert_rounds(dtype, values):
    values = values.contiguous()
    ours, theirs = rounded(dtype, values), values.to(dtype).float()
    wrong = ~((ours == theirs) & (ours.signbit() == theirs.signbit()))
    wrong &= ~(ours.isnan() & theirs.isnan())
    assert not wrong.any(), (values[wrong][:5], ours[wrong][:5], theirs[wrong][:5])


def patterns(dtype):
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_every_16_bit_pattern_survives(dtype):
    assert_rounds(dtype, patterns(dtype).float())


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_every_16_bit_pattern_is_loaded_by_a_step(dtype):
    values = patterns(dtype)
    p = torch.nn.Parameter(torch.zeros_like(values))
    p.grad = values.clone()
    opt = wrapped(torch.optim.SGD([p], lr=1.0, momentum=0.5), base_lr=1.0, backend="native")
    opt.step()
    buffer = opt.state[p]["momentum_buffer"]
    assert torch.equal(buffer.isnan(), values.isnan())
    assert torch.equal(buffer.nan_to_num(), values.nan_to_num())
    assert torch.equal(p.nan_to_num(), (-values).nan_to_num())


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_rounding_halfway_between_neighbours(dtype):
    low = patterns(dtype).float()
    low = low[low.isfinite()].sort().values
    halves = (low[:-1].double() + low[1:].double()).mul(0.5).float()
    for towards in (-math.inf, math.inf):
        assert_rounds(dtype, torch.nextafter(halves, torch.tensor(towards)))
    assert_rounds(dtype, halves)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_rounding_at_the_ends(dtype):
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal
    steps = torch.linspace(-2, 2, 40001)
    edges = [math.inf, math.nan, 0.0, 3.4e38, 1e-45, 65504, 65519.996, 65520, 65536, 2**-25, 2**-24]
    values = torch.cat([steps * tiny, torch.tensor(edges), steps[steps.abs() <= 1] * largest])
    assert_rounds(dtype, torch.cat([values, -values]))
    near = torch.tensor([largest], dtype=torch.float64) * torch.linspace(0.99, 1.01, 20001)
    assert_rounds(dtype, near.float())


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_rounding_any_float(dtype):
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator)
    assert_rounds(dtype, bits.to(torch.int32).view(torch.float32))
    normal = torch.randn(1 << 18, generator=generator)
    for scale in (1e-7, 1e-4, 1.0, 1e4):
        assert_rounds(dtype, normal * scale)


@pytest.mark.parametrize("rate", [0.3, 1.7, 3e-4])
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_a_step_rounds_alike_in_vectors_and_tails(dtype, rate):
    # Processors' instructions in the one, integer arithmetic in the other; both to nearest.
    values = patterns(dtype)
    expected = (values.float() * torch.tensor(-rate)).to(dtype)
    for length in (len(values), 7):
        params = [torch.nn.Parameter(torch.zeros_like(v)) for v in values.split(length)]
        for p, g in zip(params, values.split(length), strict=True):
            p.grad = g
        wrapped(torch.optim.SGD(params, lr=rate), base_lr=rate, backend="native").step()
        found = torch.cat([p.detach() for p in params])
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_float16s_subnormals_count_where_float32s_are_flushed():
    # They are normal numbers in float32, of which torch loses none then.
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        results = []
        for backend in ("native", "torch"):
            p = torch.nn.Parameter(torch.zeros(19, dtype=torch.float16))
            p.grad = torch.full((19,), 3 * 2.0**-24).half()
            inner = torch.optim.SGD([p], lr=1.0, foreach=False)
            opt = wrapped(inner, base_lr=1.0, backend=backend, max_grad_norm=1.0)
            opt.step()
            results.append((p.detach(), opt.grad_norm))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(results[0][0], torch.full((19,), -3 * 2.0**-24).half())
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].item() == pytest.approx(math.sqrt(19) * 3 * 2.0**-24)


# ---- state, checkpoints and everything that can change beneath a plan


@cases
def test_state_appears_when_torchs_does(case):
    pair = twins(case)
    assert_alike(*pair.both())
    pair.ours.zero_grad()
    pair.step()
    pair.draw()
    drop(pair, lambda i: i == 1)
    pair.step()
    if case.cls is not torch.optim.Adagrad:  # which has state from the start
        assert not held(pair.ours)[1]
    pair.run(2)


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=name_of)
def test_the_counters_dtype_follows_torchs_default(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        pair = twins(BY_NAME["adam"])
        pair.run(3)
        assert pair.ours.state[members(pair.ours)[0]]["step"].dtype == default
        torch.set_default_dtype(torch.float32)
        for opt in pair.both():
            opt.add_param_group({"params": parameters(drawn([(3,)], torch.float64))})
        pair.run(3)
    finally:
        torch.set_default_dtype(before)


def reload(opt, backend):
    """A checkpoint written, read and loaded by a new optimizer of the given backend."""
    file = io.BytesIO()
    torch.save({"params": members(opt), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [torch.nn.Parameter(p.detach().clone()) for p in saved["params"]]
    defaults = {k: v for k, v in opt.defaults.items() if k not in ("lr", "decoupled_weight_decay")}
    new = wrapped(type(opt.optimizer)(params, lr=opt.defaults["lr"], **defaults), backend=backend)
    new.load_state_dict(saved["opt"])
    return new


@kernels
def test_a_run_may_change_backend_at_checkpoints(case):
    pair = twins(case, backend="native")
    for backend in ("torch", "native", "auto", "torch"):
        pair.run(4)
        pair.ours = reload(pair.ours, backend)
        assert_alike(*pair.both())
    pair.run(3)


def through_pickle(opt):
    return pickle.loads(pickle.dumps(opt))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@kernels
def test_a_copy_and_the_original_go_on(case, duplicate):
    pair = twins(case)
    pair.run(3)
    other = Twins.__new__(Twins)
    other.theirs, other.ours = duplicate(pair.theirs), duplicate(pair.ours)
    other.generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        pair.run(1)
        other.run(2)
    assert not torch.equal(members(pair.ours)[0], members(other.ours)[0])


def swap_data(opt):
    for p in members(opt):
        p.data = like(p.detach() * 2, p)


def swap_layout(opt):
    p = members(opt)[0]
    p.data = p.detach().t().contiguous().t()


def swap_shape(opt):
    p = members(opt)[0]
    p.grad = None
    p.data = drawn([(2, 6)], p.dtype)[0]


def shrink(opt):
    """The same pointer, fewer elements: what a pointer alone does not tell."""
    p = members(opt)[1]
    p.grad = None
    p.data = p.detach()[:4]
    for name, t in opt.state[p].items():
        if name != "step":
            opt.state[p][name] = t[:4]


def shrink_in_place(opt):
    p = members(opt)[1]
    p.grad = None
    p.data = p.detach().resize_(4)
    for name, t in opt.state[p].items():
        if name != "step":
            t.resize_(4)


def shrink_the_parameter_alone(opt):
    p = members(opt)[1]
    p.grad = None
    p.data = p.detach()[:4]


def grow(opt):
    p = members(opt)[1]
    p.grad = None
    p.data = torch.cat([p.detach(), p.detach()])
    for name, t in opt.state[p].items():
        if name != "step":
            opt.state[p][name] = torch.cat([t, t])


def replace_state(opt):
    for state in opt.state.values():
        for name in list(state):
            state[name] = state[name] + 1


def swap_state_data(opt):
    for state in opt.state.values():
        for name, t in state.items():
            t.data = state[name].detach() * 0.5 if name != "step" else t + 2


def transpose_state(opt):
    state = opt.state[members(opt)[0]]
    for name, t in state.items():
        if t.dim() == 2:
            state[name] = t.t().contiguous().t()


def widen_counters(opt):
    for state in opt.state.values():
        if "step" in state:
            state["step"] = state["step"].double()


def half_the_counters(opt):
    state = opt.state[members(opt)[0]]
    if "step" in state:
        state["step"] = state["step"].bfloat16()


def one_counter_for_two(opt):
    one, two = (opt.state[p] for p in members(opt)[:2])
    if "step" in one:
        two["step"] = one["step"]


def one_buffer_for_two(opt):
    one, two = members(opt)[1], members(opt)[3]
    for name, t in opt.state[one].items():
        opt.state[two][name] = t


def delete_state_tensor(opt):
    state = opt.state[members(opt)[0]]
    state.pop(next(reversed(list(state))))


def none_in_state(opt):
    state = opt.state[members(opt)[0]]
    state[next(reversed(list(state)))] = None


def delete_state_of_one(opt):
    del opt.state[members(opt)[0]]


def clear_state_of_one(opt):
    opt.state[members(opt)[0]].clear()


def clear_state(opt):
    opt.state.clear()


def new_state_dicts(opt):
    for p in list(opt.state):
        opt.state[p] = {name: t.clone() for name, t in opt.state[p].items()}


def new_state_object(opt):
    inner = getattr(opt, "optimizer", opt)
    inner.state = copy.copy(inner.state)


def load_own(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def load_other(opt):
    other = copy.deepcopy(opt)
    for p in members(other):
        p.grad = like(torch.ones(p.shape), p)
    other.step()
    opt.load_state_dict(other.state_dict())


def to_float32(opt):
    for p in members(opt):
        p.grad = None
        p.data = p.detach().float()


def to_float32_and_back(opt):
    to_float32(opt)
    for p in members(opt):
        p.data = p.detach().double()


def cast_with_state(opt):
    to_float32(opt)
    for state in opt.state.values():
        for name, t in state.items():
            state[name] = t.float()


def cast_one(opt):
    p = members(opt)[0]
    p.grad = None
    p.data = p.detach().float()


def add_group(opt):
    opt.add_param_group({"params": parameters(drawn(((3, 2), ()), torch.float64, 8)), "lr": 0.02})


def append_in_place(opt):
    opt.param_groups[0]["params"].extend(parameters(drawn([(3,)], torch.float64, 8)))


def remove_in_place(opt):
    del opt.param_groups[0]["params"][1]


def replace_in_place(opt):
    opt.param_groups[0]["params"][1] = parameters(drawn([(6,)], torch.float64, 8))[0]


def reverse_in_place(opt):
    opt.param_groups[0]["params"].reverse()


def new_list(opt):
    opt.param_groups[0]["params"] = list(opt.param_groups[0]["params"])[::-1]


def a_tuple(opt):
    opt.param_groups[0]["params"] = tuple(opt.param_groups[0]["params"])


def new_group_dict(opt):
    opt.param_groups[0] = dict(opt.param_groups[0])


def freeze(opt):
    members(opt)[0].requires_grad_(False)


def gaps(opt):
    p = members(opt)[0]
    p.grad = None
    p.data = drawn([(5, 6)], p.dtype)[0][:, ::2]


def share_memory(opt):
    params = members(opt)
    params[3].data = params[1].detach()


EVENTS = [
    swap_data, swap_layout, swap_shape, shrink, shrink_in_place, shrink_the_parameter_alone,
    grow, replace_state, swap_state_data, transpose_state, widen_counters,
    half_the_counters, one_counter_for_two, one_buffer_for_two, delete_state_tensor, none_in_state,
    delete_state_of_one, clear_state_of_one, clear_state, new_state_dicts, new_state_object,
    load_own, load_other, to_float32, to_float32_and_back, cast_with_state, cast_one, add_group,
    append_in_place, remove_in_place, replace_in_place, reverse_in_place, new_list, a_tuple,
    new_group_dict, freeze, gaps, share_memory,
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@kernels
def test_events(case, event):
    pair = twins(case, ((5, 3), (7,), (), (7,)))
    # In float32, as some events leave it, the two differ by roundings.
    tolerance = 1e-5 if event in (to_float32, cast_with_state, cast_one) else 1e-12
    pair.run(3)
    pair.each(event)
    pair.step(tolerance)  # with what gradients are left
    if event in (shrink_the_parameter_alone, swap_shape) and pair.theirs.state:
        refused(pair)
        return
    pair.run(3, tolerance)
    pair.each(event)
    pair.run(2, tolerance)


def refused(pair):
    """What torch cannot do ours refuses too; torch then stops half-way, ours before the rest."""
    pair.draw()
    feed(pair.theirs, pair.ours)
    before = pair.ours.iteration
    for _ in range(2):
        pair.each(lambda opt: opt.step())
    assert pair.ours.iteration == before


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", ["sgd-mom", "adam", "adagrad", "rmsprop-mom"])
def test_a_module_cast_in_mid_run(name, dtype):
    case = BY_NAME[name]

    def make():
        torch.manual_seed(4)
        self = torch.nn.Linear(3, 2, dtype=torch.float64)
        modules.append(self)
        return case.make(self.parameters())

    modules = []
    pair = Twins(make)
    pair.run(2)
    for module in modules:
        module.zero_grad()
        module.to(dtype)
    # Of state in another dtype torch allows some: then both go through torch's own step.
    pair.run(3, 8 * torch.finfo(dtype).eps)


SETTINGS = {
    "betas": {"betas": (0.3, 0.7)},
    "amsgrad-on": {"amsgrad": True},
    "amsgrad-off": {"amsgrad": False},
    "momentum-0": {"momentum": 0},
    "momentum-0.5": {"momentum": 0.5},
    "nesterov": {"nesterov": True},
    "dampening": {"dampening": 0.5},
    "weight-decay": {"weight_decay": 0.5},
    "weight-decay-0": {"weight_decay": 0},
    "tensor-weight-decay": {"weight_decay": torch.tensor(0.25, dtype=torch.float64)},
    "maximize": {"maximize": True},
    "eps": {"eps": 0.5},
    "lr-decay": {"lr_decay": 0.5},
    "rho": {"rho": 0.2},
    "alpha": {"alpha": 0.2},
    "centered": {"centered": True},
    "not-centered": {"centered": False},
    "decoupled": {"decoupled_weight_decay": True},
    "differentiable": {"differentiable": True},
    "foreach": {"foreach": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@kernels
def test_settings_changed_in_mid_run(case, setting):
    # Some have no meaning for the class, and some torch cannot change without the state for it.
    pair = twins(case)
    pair.run(2)
    before = dict(pair.theirs.param_groups[0])
    for _ in range(2):
        for opt in pair.both():
            for key, value in SETTINGS[setting].items():
                if key in opt.defaults:
                    opt.param_groups[0][key] = value
        pair.run(3)
        for opt in pair.both():
            for key in SETTINGS[setting]:
                if key in before:
                    opt.param_groups[0][key] = before[key]
        pair.run(2)


@pytest.mark.parametrize("name", ["sgd-mom", "rmsprop"])
def test_momentum_switched_on_and_off(name):
    pair = twins(BY_NAME[name])
    for momentum in (0, 0.9, 0, 0.5, 0):
        for opt in pair.both():
            opt.param_groups[0]["momentum"] = momentum
        pair.run(3)


def test_amsgrad_switched_off_and_on():
    pair = twins(BY_NAME["adam-ams"])
    for amsgrad in (True, False, True):
        for opt in pair.both():
            opt.param_groups[0]["amsgrad"] = amsgrad
        pair.run(3)


@pytest.mark.parametrize("kind", [OrderedDict, UserDict])
@pytest.mark.parametrize("at", [0, 5, 19])
def test_state_in_a_dictionary_of_another_kind(kind, at):
    # One that is no dict at all has nothing at the addresses where a scan looks.
    pair = many("adamw", 20)
    pair.run(2)
    for opt in pair.both():
        p = members(opt)[at]
        opt.state[p] = kind(opt.state[p])
    pair.run(3)
    for opt in pair.both():
        p = members(opt)[at]
        opt.state[p] = dict(opt.state[p])
    pair.run(2)


def test_betas_changed_within_a_list():
    pair = Twins(
        lambda: torch.optim.Adam(
            parameters(drawn([(5,)], torch.float64)), betas=[0.9, 0.99], foreach=False
        )
    )
    pair.run(2)
    for opt in pair.both():
        opt.param_groups[0]["betas"] = [0.9, 0.99]
    pair.run(2)
    for opt in pair.both():
        opt.param_groups[0]["betas"][0] = 0.2
    pair.run(2)


@kernels
def test_bounds_changed_in_mid_run(case):
    pair = twins(case)
    pair.run(3)
    pair.ours.set_bounds(base_lr=0.1, max_lr=0.3)
    pair.run(3)
    pair.ours.set_iteration(100)
    pair.run(3)


# ---- gradients that only look like plain memory


class Odd:
    """Gradients that a pointer does not tell the whole of."""

    @staticmethod
    def negated(p, values):
        return torch.complex(values, -values).conj().imag

    @staticmethod
    def zeros(p, values):
        return torch._efficientzerotensor(p.shape, dtype=p.dtype)

    @staticmethod
    def wrapper(p, values):
        from torch.testing._internal.two_tensor import TwoTensor

        return TwoTensor(values, values.clone())

    @staticmethod
    def subclass(p, values):
        class Doubled(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                def plain(x):
                    return x.as_subclass(torch.Tensor) * 2 if isinstance(x, Doubled) else x

                with torch._C.DisableTorchFunctionSubclass():
                    return func(*map(plain, args), **(kwargs or {}))

        return values.as_subclass(Doubled)


@pytest.mark.parametrize("kind", ["negated", "zeros", "wrapper", "subclass"])
@pytest.mark.parametrize("warm", [True, False], ids=["later", "at-once"])
def test_a_gradient_that_is_not_plain_memory(kind, warm):
    # Of one element: only there the strides of an imaginary part are as good as any.
    pair = twins(BY_NAME["sgd"], ((1,), (), (5, 3), (7,)))
    if warm:
        pair.run(2)
    for _ in range(2):
        pair.draw()
        for opt in pair.both():
            for p in members(opt)[: 2 if kind == "negated" else 3]:
                p.grad = getattr(Odd, kind)(p, p.grad)
        pair.step()
        pair.run(1)


def test_autograd_may_hand_over_a_negated_view():
    # The gradient of a phase: one element, so its strides tell nothing.
    pair = twins(BY_NAME["sgd"], ((1,),))
    pair.run(2)
    for _ in range(2):
        for opt in pair.both():
            (p,) = members(opt)
            p.grad = None
            (torch.complex(torch.zeros_like(p), p).conj() * (1 + 2j)).abs().sum().backward()
        pair.step()


# ---- autograd


@kernels
def test_a_backward_through_an_older_graph_raises(case):
    for opt in twins(case, ((3, 3), (3,))).both():
        weight, idle = members(opt)
        weight.grad = torch.ones_like(weight)
        for _ in range(2):
            loss = (weight @ weight).sum()
            other = (idle**2).sum()
            versions = weight._version, idle._version
            opt.step()
            assert weight._version > versions[0]
            assert idle._version == versions[1]
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            idle.grad = None
            other.backward()  # it had no gradient, so nothing moved it
            idle.grad = None


def test_the_step_needs_no_grad_mode_and_leaves_leaves():
    pair = twins(BY_NAME["adam"])
    pair.draw()
    with torch.no_grad():
        pair.step()
    pair.draw()
    with torch.enable_grad():
        pair.step()
    for p in members(pair.ours):
        assert p.is_leaf
        assert p.requires_grad


# ---- the first step


@pytest.mark.parametrize("name", ["sgd-mom", "sgd-damp", "adam", "adagrad", "rmsprop-mom"])
def test_a_step_that_fails_leaves_no_state(name):
    pair = twins(BY_NAME[name])
    pair.draw()

    def fails(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pair.ours.step(fails)
    handle = pair.ours.register_step_pre_hook(fails)
    with pytest.raises(ZeroDivisionError):
        pair.ours.step()
    handle.remove()
    handle = pair.ours.optimizer.register_step_pre_hook(fails)
    with pytest.raises(ZeroDivisionError):
        pair.ours.step()
    handle.remove()
    assert pair.ours.iteration == 0
    assert_alike(*pair.both())
    pair.run(3)


@pytest.mark.parametrize("name", ["sgd-mom", "adam"])
def test_a_first_step_refused_by_torch_leaves_no_state(name):
    pair = twins(BY_NAME["adam"], ((5, 3), (7,)))
    pair.draw()
    before = copy.deepcopy(tensors_of(pair.ours))
    for opt in pair.both():
        p = members(opt)[0]
        p.grad = sparse(p.grad, 1)
        with pytest.raises(RuntimeError, match="sparse gradients"):
            opt.step()
    assert all(torch.equal(t, before[k]) for k, t in tensors_of(pair.ours).items())
    assert pair.ours.iteration == 0
    assert all(not state for state in held(pair.ours))
    pair.run(2)


def test_dampening_does_not_touch_the_first_gradient():
    assert_first_gradient_is_whole("native")


def test_a_buffer_of_none_is_a_first_step():
    # As checkpoints of older versions of torch have it.
    pair = twins(BY_NAME["sgd-damp"])
    for opt in pair.both():
        for p in members(opt):
            opt.state[p]["momentum_buffer"] = None
    pair.run(4)


def test_a_buffer_is_a_copy_of_the_gradient():
    pair = twins(BY_NAME["sgd-mom"])
    pair.draw()
    pair.step()
    for p in members(pair.ours):
        assert pair.ours.state[p]["momentum_buffer"].data_ptr() != p.grad.data_ptr()


# ---- asked for by name


def test_by_name_it_refuses_other_optimizers():
    inner = torch.optim.NAdam(parameters(drawn([(3,)], torch.float32)))
    groups = str(inner.param_groups)
    with pytest.raises(ValueError, match="no fused kernel for NAdam"):
        CyclicalOptimizer(inner, backend="native")

    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(ValueError, match="no fused kernel for Mine"):
        CyclicalOptimizer(Mine(parameters(drawn([(3,)], torch.float32))), backend="native")
    assert str(inner.param_groups) == groups


@pytest.mark.parametrize("name", ["sgd-mom", "adagrad"])
@pytest.mark.parametrize("warm", [0, 2])
def test_by_name_it_refuses_what_only_torch_can_do_and_changes_nothing(name, warm):
    pair = twins(BY_NAME[name], ((5, 3), (7,)), backend="native")
    pair.run(warm)
    pair.draw()
    p = members(pair.ours)[0]
    dense_grad = p.grad
    for odd, why in (
        (sparse(dense_grad, 1), "sparse gradients"),
        (dense_grad.t().contiguous().t(), "another layout"),
    ):
        p.grad = odd
        before = copy.deepcopy(tensors_of(pair.ours))
        rate = pair.ours.param_groups[0]["lr"]
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"backend='native' cannot serve 1 .*{why}"):
                pair.ours.step()
        assert why.split()[-1] in pair.ours.explain()
        assert pair.ours.iteration == warm
        assert pair.ours.param_groups[0]["lr"] == rate
        assert list(tensors_of(pair.ours)) == list(before)
        assert all(torch.equal(t, before[k]) for k, t in tensors_of(pair.ours).items())
        assert p.grad is odd
    p.grad = dense_grad  # and then it serves again
    pair.step()
    pair.run(2)


def test_auto_returns_to_the_kernels(monkeypatch):
    pair = twins(BY_NAME["sgd-mom"], ((5, 3), (7,)))
    pair.run(1)
    _other_layout(pair, 1)
    pair.step()
    pair.run(1)

    def refuse(*args, **kwargs):
        raise AssertionError("torch's step ran")

    monkeypatch.setattr(torch.optim.SGD, "_init_group", refuse)
    pair.draw()
    pair.ours.step()


def test_explain_names_the_reasons():
    gapped = torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
    plain, odd, rows = parameters(drawn(((5, 3), (5, 3), (5, 3)), torch.float32))
    imaginary = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    (decayed,) = parameters(drawn([(3,)], torch.float32))
    for p in (plain, gapped, odd, rows, imaginary, decayed):
        p.grad = torch.ones_like(p)
    odd.grad = torch.ones(3, 5).t()
    rows.grad = sparse(torch.ones(5, 3), 1)
    groups = [
        {"params": [plain, gapped, odd, rows, imaginary]},
        {"params": [decayed], "weight_decay": torch.tensor(0.1)},
    ]
    opt = wrapped(torch.optim.SGD(groups, lr=0.1, foreach=False))
    lines = opt.explain().splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("native: 1 parameter tensors, 15 values, SGD")
    for why in ("gaps", "another layout", "sparse", "complex64", "weight_decay is a tensor"):
        assert sum(line.startswith("torch: 1 ") and why in line for line in lines) == 1, why
    opt.step()
    assert "asked for by" in wrapped(torch.optim.SGD([plain], lr=0.1), backend="torch").explain()


# ---- auto never changes the numbers beyond rounding


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@kernels
def test_what_the_wrapped_optimizer_was_built_with_does_not_matter(case, flag):
    values = drawn(((5, 3), (7,)), torch.float64)
    theirs = case.make(parameters(values))
    try:
        inner = case.cls(parameters(values), **{"lr": case.lr, **case.options, flag: True})
    except TypeError:
        pytest.skip(f"{case.cls.__name__} has no {flag}")
    pair = Twins(lambda: theirs)
    pair.ours = wrapped(inner)
    pair.run(6)


@kernels
def test_training_a_model(case):
    def make(backend):
        torch.manual_seed(6)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
        ).double()
        model = model.to(memory_format=torch.channels_last)
        return model, case.ours(model.parameters(), backend=backend, max_grad_norm=1.0)

    runs = [make("torch"), make("auto")]
    generator = torch.Generator().manual_seed(11)
    for _ in range(10):
        x = torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (8,), generator=generator)
        for model, opt in runs:
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
    assert_alike(runs[1][1], runs[0][1], 1e-10)


def test_no_warning_and_no_state_on_an_idle_step():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = BY_NAME["adam"].ours(parameters(drawn([(3,)], torch.float32)), backend="native")
        opt.step()
        assert opt.iteration == 1
        assert not opt.state


def test_a_plan_shows_no_view_that_is_not_whole(monkeypatch):
    """Another thread may take a step with it at once."""
    pair = Twins(lambda: torch.optim.SGD(parameters(drawn([(8,)], torch.float64)), lr=0.1))
    pair.draw()
    pair.step()
    ours = pair.ours._shared.fused.plan
    seen = []

    class Watched(plan.View):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            seen.append(bool(ours.view.address) and ours.view.scalars.size > 0)

    monkeypatch.setattr(plan, "View", Watched)
    ours.forget()
    pair.draw()
    pair.step()
    assert seen
    assert all(seen)
    assert type(ours.view) is Watched
