"""DTensors of every make: what a rank steps is what torch's own step makes of it.

A job runs on each rank with two equal optimizers, ours and torch's for-loop step, or with one whose
course one process has computed before. Gradients are drawn whole, and each rank takes its part.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import Ranks
from internals import count_builds_of, plan_of
from native_helpers import BY_NAME, KERNELS, Case, assert_close, failure, feed, held, members
from torch import Tensor, nn

from clr_optim.plan import Plan

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

STEPS = 5
BOTH = pytest.mark.parametrize("backend", ["native", "torch"])


# ---- two optimizers on one rank


def _spread(values: Tensor, mesh: DeviceMesh, *placements: Any) -> DTensor:
    """This rank's part of what every rank holds whole; no rank hears from another."""
    return distribute_tensor(values, mesh, placements, src_data_rank=None)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _assert_same(ours: Any, theirs: Any, tolerance: float, what: object) -> None:
    """The same kind of object, divided in the same way; its values on this rank."""
    assert type(ours) is type(theirs), what
    if not isinstance(theirs, Tensor):
        assert ours == theirs, what
        return
    assert ours.requires_grad == theirs.requires_grad, what
    assert ours.shape == theirs.shape, what
    if isinstance(theirs, DTensor):
        assert ours.device_mesh == theirs.device_mesh, what
        assert ours.placements == theirs.placements, what
        assert ours.stride() == theirs.stride(), what
        ours, theirs = ours._local_tensor, theirs._local_tensor
        assert type(ours) is type(theirs), what
    assert ours.stride() == theirs.stride(), what
    assert_close(ours, theirs, tolerance, what)


class Pair:
    """Ours and torch's own on equal parameters, as :class:`native_helpers.Twins`.

    Args:
        make: makes equal optimizers with parameters of their own at each call.
        case: tells both how to step.
    """

    def __init__(self, case: Case, make: Callable[[], Any], **wrap: Any) -> None:
        self.theirs = case.make(make())
        self.ours = case.ours(make(), **{"step_size_up": 3, **wrap})
        self.generator = torch.Generator().manual_seed(5)

    @property
    def plan(self) -> Plan:
        return plan_of(self.ours)

    def each(self, change: Callable[[Any], object]) -> bool:
        """Do the same to both; what torch raises, ours must raise too. Whether they did not."""
        theirs, ours = failure(change, self.theirs), failure(change, self.ours)
        if type(ours) is not type(theirs):
            raise AssertionError(f"torch raises {theirs!r}, ours {ours!r}") from ours
        return theirs is None

    def on(self, index: int, change: Callable[[Any, Any], object]) -> None:
        """``change(optimizer, parameter)`` on the parameter of this number of both."""
        assert self.each(lambda opt: change(opt, members(opt)[index]))

    def draw(self, idle: Sequence[int] = ()) -> None:
        """New gradients for all but some parameters, the same for both, divided as they are."""
        for i, pair in enumerate(zip(members(self.ours), members(self.theirs), strict=True)):
            values = torch.randn(pair[0].shape, generator=self.generator, dtype=torch.float64)
            for p in pair:
                whole = values.to(p.dtype, copy=True)
                if isinstance(p, DTensor):
                    whole = _spread(whole, p.device_mesh, *p.placements)
                p.grad = None if i in idle or not p.requires_grad else whole

    def step(self, tolerance: float = 1e-12) -> bool:
        """One step of both, which then must be alike; or false if both raised."""
        feed(self.theirs, self.ours)
        good = self.each(lambda opt: opt.step())
        if good:
            self.compare(tolerance)
        return good

    def compare(self, tolerance: float = 1e-12) -> None:
        for i, (p, q) in enumerate(zip(members(self.ours), members(self.theirs), strict=True)):
            _assert_same(p, q, tolerance, i)
        for i, (mine, other) in enumerate(zip(held(self.ours), held(self.theirs), strict=True)):
            assert [name for name, _ in mine] == [name for name, _ in other], i
            for (name, a), (_, b) in zip(mine, other, strict=True):
                _assert_same(a, b, tolerance, (i, name))

    def run(self, steps: int, idle: Sequence[int] = ()) -> None:
        for _ in range(steps):
            self.draw(idle)
            self.step()


#: Shapes and placements: uneven, empty on some rank, one element, a scalar, plain.
LAYOUTS: list[tuple[tuple[int, ...], Any]] = [
    ((5, 3), Shard(0)),
    ((1,), Shard(0)),
    ((2, 4), Shard(1)),
    ((), Replicate()),
    ((3,), Replicate()),
    ((4,), None),
]
UNEVEN, EMPTY, BY_COLUMN, SCALAR, WHOLE, PLAIN = range(len(LAYOUTS))


def _parameters(mesh: DeviceMesh, dtype: torch.dtype = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s, _ in LAYOUTS]
    return [
        nn.Parameter(x.to(dtype) if place is None else _spread(x.to(dtype), mesh, place))
        for x, (_, place) in zip(drawn, LAYOUTS, strict=True)
    ]


# ---- the scan: nothing stale


def _renewed(tensor: DTensor) -> None:
    """Other memory beneath a DTensor; the old is spoilt for whoever still reads it."""
    old = tensor._local_tensor
    tensor._local_tensor = old.clone()
    old.fill_(float("nan"))


ATTACKS: dict[str, Callable[[Pair], object]] = {"as_it_was": lambda pair: None}


def _attack(change: Callable[[Pair], None]) -> Callable[[Pair], None]:
    """What happens to both between two steps, the gradients of the next one being there."""
    ATTACKS[change.__name__.strip("_")] = change
    return change


@_attack
def _local_of_parameter(pair: Pair) -> None:
    for i in (UNEVEN, EMPTY, SCALAR):
        pair.on(i, lambda _, p: _renewed(p))


@_attack
def _local_of_state(pair: Pair) -> None:
    pair.on(UNEVEN, lambda opt, p: _renewed(opt.state[p]["exp_avg"]))
    pair.on(WHOLE, lambda opt, p: _renewed(opt.state[p]["max_exp_avg_sq"]))


@_attack
def _local_of_gradient(pair: Pair) -> None:
    for i in (UNEVEN, BY_COLUMN, SCALAR):
        pair.on(i, lambda _, p: _renewed(p.grad))


@_attack
def _local_of_a_kept_gradient(pair: Pair) -> None:
    pair.step()  # the gradients that there are, scanned twice
    _local_of_gradient(pair)


@_attack
def _local_in_another_layout(pair: Pair) -> None:
    def transposed(_: Any, p: Any) -> None:
        p._local_tensor = p._local_tensor.t().contiguous().t()

    pair.on(UNEVEN, transposed)


@_attack
def _local_in_another_dtype(pair: Pair) -> None:
    def narrowed(opt: Any, p: Any) -> None:
        p._local_tensor = p._local_tensor.float()

    pair.on(WHOLE, narrowed)


@_attack
def _equal_spec(pair: Pair) -> None:
    def copied(_: Any, p: Any) -> None:
        p._spec = copy.copy(p._spec)
        p.grad._spec = copy.copy(p.grad._spec)

    pair.on(UNEVEN, copied)


@_attack
def _equal_mesh(pair: Pair) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def moved(_: Any, p: Any) -> None:
        p.grad = DTensor.from_local(p.grad.to_local(), mesh, [Replicate()], run_check=False)

    pair.on(WHOLE, moved)


@_attack
def _named_mesh(pair: Pair) -> None:
    """Of other names: not equal, and torch will not mix them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("named",))

    def moved(_: Any, p: Any) -> None:
        p.grad = DTensor.from_local(p.grad.to_local(), mesh, [Replicate()], run_check=False)

    pair.on(WHOLE, moved)


@_attack
def _parameter_gathered(pair: Pair) -> None:
    def gather(_: Any, p: Any) -> None:
        other = p.detach().redistribute(placements=[Replicate()])
        p._local_tensor, p._spec = other._local_tensor.clone(), other._spec

    pair.on(UNEVEN, gather)


@_attack
def _state_gathered(pair: Pair) -> None:
    def gather(opt: Any, p: Any) -> None:
        state = opt.state[p]["exp_avg"]
        other = state.redistribute(placements=[Replicate()])
        state._local_tensor, state._spec = other._local_tensor.clone(), other._spec

    pair.on(EMPTY, gather)


def _gradient_as(*placements: Any, of: int) -> Callable[[Pair], None]:
    def attack(pair: Pair) -> None:
        def change(_: Any, p: Any) -> None:
            whole = p.grad.full_tensor()
            if placements[0].is_partial():
                p.grad = DTensor.from_local(
                    whole / dist.get_world_size(), p.device_mesh, placements, run_check=False
                )
            else:
                p.grad = _spread(whole, p.device_mesh, *placements)

        pair.on(of, change)

    return attack


@_attack
def _gradient_awaited(pair: Pair) -> None:
    def wrap(_: Any, p: Any) -> None:
        p.grad._local_tensor = AsyncCollectiveTensor(p.grad._local_tensor)

    pair.on(UNEVEN, wrap)


class Odd(Tensor):
    """A subclass that changes nothing, which nobody can know."""


@_attack
def _gradient_of_a_subclass(pair: Pair) -> None:
    def wrap(_: Any, p: Any) -> None:
        p.grad._local_tensor = p.grad._local_tensor.as_subclass(Odd)

    pair.on(UNEVEN, wrap)


@_attack
def _gradient_with_gaps(pair: Pair) -> None:
    def spaced(_: Any, p: Any) -> None:
        part = p.grad._local_tensor
        p.grad._local_tensor = torch.stack([part, part.clone().fill_(9)], dim=-1)[..., 0]

    for i in (UNEVEN, BY_COLUMN, WHOLE):
        pair.on(i, spaced)


@_attack
def _gradient_transposed(pair: Pair) -> None:
    def transposed(_: Any, p: Any) -> None:
        p.grad._local_tensor = p.grad._local_tensor.t().contiguous().t()

    pair.on(BY_COLUMN, transposed)


@_attack
def _gradient_negated(pair: Pair) -> None:
    """Lazily: the scan must see the bit of the part, not of the whole."""

    def negated(_: Any, p: Any) -> None:
        part = p.grad._local_tensor
        p.grad._local_tensor = torch._neg_view(part)

    pair.on(SCALAR, negated)


@_attack
def _plain_gradient(pair: Pair) -> None:
    pair.on(UNEVEN, lambda _, p: setattr(p, "grad", p.grad.full_tensor()))


@_attack
def _sharded_gradient_of_a_plain_one(pair: Pair) -> None:
    mesh = members(pair.ours)[UNEVEN].device_mesh
    pair.on(PLAIN, lambda _, p: setattr(p, "grad", _spread(p.grad, mesh, Shard(0))))


@_attack
def _added_group(pair: Pair) -> None:
    mesh = members(pair.ours)[UNEVEN].device_mesh
    more = torch.linspace(-1, 1, 6, dtype=torch.float64)
    pair.each(
        lambda opt: opt.add_param_group(
            {"params": [nn.Parameter(_spread(more.clone(), mesh, Shard(0)))], "lr": 0.02}
        )
    )
    pair.draw()


@_attack
def _loaded(pair: Pair) -> None:
    def reload(opt: Any) -> None:
        saved = copy.deepcopy(opt.state_dict())
        opt.step()
        opt.load_state_dict(saved)

    feed(pair.theirs, pair.ours)
    assert pair.each(reload)


@_attack
def _replaced_state(pair: Pair) -> None:
    def replace(opt: Any, p: Any) -> None:
        opt.state[p]["exp_avg"] = torch.ones_like(opt.state[p]["exp_avg"])

    def rebuild(opt: Any, p: Any) -> None:
        opt.state[p] = {name: copy.deepcopy(value) for name, value in opt.state[p].items()}

    pair.on(UNEVEN, replace)
    pair.on(WHOLE, rebuild)


@_attack
def _state_of_whole_tensors(pair: Pair) -> None:
    def replace(opt: Any, p: Any) -> None:
        opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].full_tensor()

    pair.on(SCALAR, replace)


@_attack
def _forgotten_state(pair: Pair) -> None:
    pair.on(UNEVEN, lambda opt, p: opt.state.pop(p))


@_attack
def _data_set(pair: Pair) -> None:
    def change(_: Any, p: Any) -> None:
        p.data = (p.detach() * 2).data

    pair.on(UNEVEN, change)


@_attack
def _swapped(pair: Pair) -> None:
    def swap(_: Any, p: Any) -> None:
        p.grad = None
        values = p.detach().full_tensor() * 2
        torch.utils.swap_tensors(p, nn.Parameter(_spread(values, p.device_mesh, *p.placements)))

    pair.on(UNEVEN, swap)
    pair.on(SCALAR, swap)
    pair.draw()


@_attack
def _idle_for_a_while(pair: Pair) -> None:
    pair.run(2, idle=(UNEVEN, EMPTY, PLAIN))
    pair.run(1, idle=range(len(LAYOUTS)))
    pair.draw(idle=(SCALAR,))


@_attack
def _frozen_for_a_while(pair: Pair) -> None:
    pair.on(UNEVEN, lambda _, p: p.requires_grad_(False))
    pair.run(2)
    pair.on(UNEVEN, lambda _, p: p.requires_grad_(True))
    pair.draw()


@_attack
def _shared_memory(pair: Pair) -> None:
    """A part within a plain parameter: torch updates one after the other."""

    def share(opt: Any, p: Any) -> None:
        p._local_tensor = members(opt)[PLAIN].detach()[:3]

    pair.on(WHOLE, share)


@_attack
def _copied(pair: Pair) -> None:
    """The copy goes on for the original, whose memory is spoilt."""
    grads = [[p.grad for p in members(opt)] for opt in (pair.ours, pair.theirs)]
    before = [*members(pair.ours), *members(pair.theirs)]
    pair.ours, pair.theirs = copy.deepcopy(pair.ours), copy.deepcopy(pair.theirs)
    for opt, own in zip((pair.ours, pair.theirs), grads, strict=True):
        for p, grad in zip(members(opt), own, strict=True):
            p.grad = copy.deepcopy(grad)
    with torch.no_grad():
        for p in before:
            _local(p).fill_(float("nan"))


@_attack
def _pickled(pair: Pair) -> None:
    pair.ours, pair.theirs = (pickle.loads(pickle.dumps(opt)) for opt in (pair.ours, pair.theirs))
    pair.draw()


@_attack
def _saved(pair: Pair) -> None:
    def reload(opt: Any) -> None:
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        opt.load_state_dict(torch.load(file, weights_only=False))

    assert pair.each(reload)


ATTACKS |= {
    "gradient_replicated": _gradient_as(Replicate(), of=UNEVEN),
    "gradient_replicated_of_an_empty_part": _gradient_as(Replicate(), of=EMPTY),
    "gradient_sharded": _gradient_as(Shard(0), of=WHOLE),
    "gradient_sharded_otherwise": _gradient_as(Shard(0), of=BY_COLUMN),
    "gradient_summands": _gradient_as(Partial(), of=WHOLE),
    "gradient_summands_of_shards": _gradient_as(Partial(), of=UNEVEN),
}


def _attacked(name: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    pair = Pair(BY_NAME["adamw-ams"], lambda: _parameters(mesh))
    pair.run(2)
    pair.draw()
    ATTACKS[name](pair)
    if pair.step():  # else who knows which parameters torch has come to
        pair.run(2)


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_stale_is_used(ranks, name):
    ranks.run(2, _attacked, name)


# ---- state, and how often a plan is built


def _stepped(name: str, dtype: torch.dtype, tolerance: float) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    pair = Pair(BY_NAME[name], lambda: _parameters(mesh, dtype))
    builds = count_builds_of(pair.plan)
    idle: list[Sequence[int]] = [(UNEVEN, PLAIN), (), (), (EMPTY,), (), range(len(LAYOUTS)), ()]
    for missing in idle:
        pair.draw(missing)
        pair.step(tolerance)
        assert not pair.plan.rest
        # One more at most, for parameters that come later.
        assert len(builds) <= 2
    assert "torch:" not in pair.ours.explain()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_state_is_what_torch_makes(ranks, case, world):
    ranks.run(world, _stepped, case.name, torch.float64, 1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)],
    ids=str,
)
def test_state_in_other_dtypes(ranks, dtype, tolerance):
    ranks.run(2, _stepped, "adamw-ams", dtype, tolerance)


# ---- leaks


def _references(opt: Any) -> list[int]:
    counts = []
    for p in members(opt):
        found = [p, p._spec, p._local_tensor, p.grad, p.grad._spec, p.grad._local_tensor]
        for value in opt.state[p].values():
            found += [
                value,
                *([value._spec, value._local_tensor] if type(value) is DTensor else []),
            ]
        counts += [sys.getrefcount(x) for x in [*found, p._spec.mesh, p._spec.placements, p.dtype]]
    return [*counts, sys.getrefcount(DTensor), sys.getrefcount(Tensor), sys.getrefcount(p._spec)]


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _leaked(steps: int) -> tuple[list[int], list[int], int, float]:
    """Counts of references before and after, objects more, and growth of the peak of memory."""
    mesh = init_device_mesh("cpu", (1,))
    params = [nn.Parameter(_spread(torch.ones(3, 2), mesh, Shard(0))) for _ in range(2)]
    opt = BY_NAME["adamw-ams"].ours(params)
    same = [torch.ones_like(p) for p in params]
    # A spec of its own, as tensor parallel gradients have.
    other = [DTensor.from_local(torch.ones(3, 2), mesh, [Shard(0)]) for _ in params]
    # What the scan turns away at one place or another.
    odd: list[Any] = [DTensor.from_local(torch.ones(3, 2), mesh, [Replicate()]) for _ in params]
    wrong = [DTensor.from_local(torch.ones(2, 3).t(), mesh, [Shard(0)]) for _ in params]

    def run(count: int) -> None:
        for _ in range(count // 2):
            for grads in (same, other):
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad
                opt.step()
        for _ in range(count // 400):
            for grads in (same, odd, other, wrong, [None, same[1]]):
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad
                opt.step()

    def settle() -> list[int]:
        for p, grad in zip(params, same, strict=True):
            p.grad = grad
        opt.step()
        gc.collect()
        return _references(opt)

    run(2000)
    before, objects, memory = settle(), len(gc.get_objects()), _peak()
    run(steps)
    after = settle()
    return before, after, len(gc.get_objects()) - objects, _peak() / memory


def test_nothing_leaks(ranks):
    pytest.importorskip("resource")
    ((before, after, objects, memory),) = ranks.run(1, _leaked, 100_000)
    assert after == before
    assert objects < 50
    assert memory < 1.02  # a leaked object a step would be more


# ---- what one process computes


class Block(nn.Module):
    """Layers to divide by rows, by columns, or not at all; a norm's weights, whole on each rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(self.norm(torch.tanh(self.up(x))))))


def _loss(model: nn.Module, step: int, part: int = 0, parts: int = 1) -> Tensor:
    """Of this part of the step's batch."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(12, 4, 6, generator=generator)
    y = torch.randn(12, 4, 1, generator=generator)
    mine = slice(part * 12 // parts, (part + 1) * 12 // parts)
    return ((model(x[mine]) - y[mine]) ** 2).mean()


def _divided_by_tensor(model: nn.Module, mesh: DeviceMesh) -> None:
    plan = {
        "up": ColwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "down": RowwiseParallel(input_layouts=Shard(1)),
    }
    parallelize_module(model, mesh, plan)


def _divided(how: str, shape: tuple[int, ...], **options: Any) -> tuple[Any, int, int]:
    """``(model, which part of the batch is this rank's, of how many)``."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # views, left as they are
    model = Block()
    if how == "tp":
        _divided_by_tensor(model, init_device_mesh("cpu", shape))
        return model, 0, 1
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
    if how == "hsdp":
        fully_shard(model.down, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
        return model, dist.get_rank(), dist.get_world_size()
    _divided_by_tensor(model, mesh["inner"])
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh["outer"], **options)
    return model, mesh.get_local_rank("outer"), shape[0]


Run = tuple[list[float], list[Tensor]]  # norms, and parameters at the end


def _train(opt: Any, model: nn.Module, part: int = 0, parts: int = 1, steps: int = STEPS) -> Run:
    norms = []
    for step in range(steps):
        opt.zero_grad()
        _loss(model, step, part, parts).backward()
        opt.step()
        norms.append(opt.grad_norm.item() if opt.grad_norm is not None else 0.0)
    return norms, [_full(p) for p in model.parameters()]


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _undivided(name: str, max_norm: float | None) -> Run:
    """One process with the plain torch optimizer, fed our rates."""
    model, case = Block(), BY_NAME[name]
    inner = case.make(model.parameters())
    ours = case.ours(copy.deepcopy(model).parameters(), backend="torch", step_size_up=3)
    norms = []
    for step in range(STEPS):
        ours.set_iteration(step)
        feed(inner, ours)
        inner.zero_grad()
        _loss(model, step).backward()
        clip = max_norm is not None
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item() if clip else 0.0)
        inner.step()
    return norms, [p.detach() for p in model.parameters()]


def _trained(how: str, shape: tuple[int, ...], name: str, backend: str, max_norm: float | None):
    model, part, parts = _divided(how, shape)
    opt = BY_NAME[name].ours(
        model.parameters(), backend=backend, step_size_up=3, max_grad_norm=max_norm
    )
    norms, params = _train(opt, model, part, parts)
    kinds = {p for w in model.parameters() if type(w) is DTensor for p in w.placements}
    return norms, params, opt.explain(), {str(type(kind).__name__) for kind in kinds}


def _assert_trained(results: list[Any], expected: Run) -> None:
    for norms, params, *_ in results:
        assert norms == results[0][0]
        assert norms == pytest.approx(expected[0], rel=1e-5)
        for ours, theirs in zip(params, expected[1], strict=True):
            torch.testing.assert_close(ours, theirs)


COURSES = pytest.mark.parametrize(
    ("name", "max_norm"), [("sgd-nest-wd", None), ("adamw-ams", 0.1)], ids=["sgd", "adamw-clipped"]
)


@COURSES
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("how", "shape"),
    [("tp", (2,)), ("fsdp+tp", (2, 1)), ("fsdp+tp", (1, 2)), ("hsdp", (2, 1)), ("hsdp", (1, 2))],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_divided_models_train_as_undivided_ones(ranks, how, shape, backend, name, max_norm):
    results = ranks.run(2, _trained, how, shape, name, backend, max_norm)
    _assert_trained(results, _undivided(name, max_norm))
    if backend == "auto":
        # Of a norm's weights, with nothing but tensor parallelism, torch leaves sums to be made.
        assert [("torch: 2 param" in r[2], "torch:" in r[2]) for r in results] == (
            [(how == "tp", how == "tp")] * 2
        )
    if shape == (1, 2) and how == "fsdp+tp":
        assert "_StridedShard" in results[0][3]


def test_both_dimensions_of_a_mesh(tmp_path):
    four = Ranks(4, tmp_path)
    try:
        for how, name, max_norm in (("fsdp+tp", "adamw-ams", 0.1), ("hsdp", "sgd-nest-wd", 0.1)):
            results = four.run(4, _trained, how, (2, 2), name, "native", max_norm)
            _assert_trained(results, _undivided(name, max_norm))
        assert all(four.run(4, _orders))
    finally:
        four.close()


def _orders() -> bool:
    """Placements that are equal, of parts dealt out in another order: not one beside the other."""
    mesh = init_device_mesh("cpu", (2, 2))
    case = BY_NAME["adamw-ams"]
    pair = Pair(
        case, lambda: [nn.Parameter(_spread(torch.ones(8).double(), mesh, Shard(0), Shard(0)))]
    )
    pair.run(1)
    pair.draw()

    def other(_: Any, p: Any) -> None:
        turned = _spread(p.grad.full_tensor(), _transposed(mesh), Shard(0), Shard(0))
        spec = copy.copy(p.grad._spec)
        spec.shard_order = (type(spec.shard_order[0])(0, (1, 0)),)
        p.grad = DTensor(turned._local_tensor, spec, requires_grad=False)

    pair.on(0, other)
    pair.step()
    return True


def _transposed(mesh: DeviceMesh) -> DeviceMesh:
    return DeviceMesh("cpu", mesh.mesh.t().contiguous())


# ---- FSDP2 in all its ways, beside torch's own step


class Mixed(Block):
    """Its first layer in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.up.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x.to(torch.bfloat16))).float()
        return self.head(torch.tanh(self.down(self.norm(h))))


FSDP: dict[str, dict[str, Any]] = {
    "reshard": {"reshard_after_forward": True},
    "keep": {"reshard_after_forward": False},
    "half": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
    "half-sums": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "by-column": {"shard_placement_fn": lambda p: Shard(p.dim() - 1)},
    "mixed": {},
    "frozen": {},
    "compiled": {},
}


def _beside_torch(how: str, name: str, backend: str) -> None:
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    warnings.filterwarnings("ignore", message="The .grad attribute")  # torch.compile looks at it
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    models: list[nn.Module] = []

    def make() -> Any:
        model = Mixed() if how == "mixed" else Block()
        if how == "frozen":
            model.down.requires_grad_(False)
        for module in (model.up, model.down, model):
            fully_shard(module, mesh=mesh, **FSDP[how])
        models.append(torch.compile(model, backend="eager") if how == "compiled" else model)
        return model.parameters()

    pair = Pair(BY_NAME[name], make, backend=backend)
    for step in range(4):
        for model in models:
            model.zero_grad()
            _loss(model, step, rank, world).backward()
        pair.step(2e-2 if how == "mixed" else 1e-5)


@pytest.mark.parametrize(
    ("how", "world"), [*((how, 2) for how in FSDP), ("reshard", 3), ("mixed", 3)]
)
def test_fsdp_beside_torch(ranks, how, world):
    ranks.run(world, _beside_torch, how, "adamw-ams", "native")


# ---- the norm, and who takes part in it


def _several_meshes(world: int) -> list[tuple[tuple[int, ...], Any, list[Any]]]:
    line = init_device_mesh("cpu", (world,))
    named = init_device_mesh("cpu", (world,), mesh_dim_names=("named",))
    flat = init_device_mesh("cpu", (world, 1))
    return [
        ((4, 3), None, []),
        ((5, 3), line, [Shard(0)]),
        ((4,), line, [Replicate()]),
        ((1,), named, [Shard(0)]),
        ((3, 5), named, [Shard(1)]),
        ((7,), flat, [Shard(0), Replicate()]),
        ((7,), flat, [Shard(0), Shard(0)]),
        ((2, 2), flat, [Replicate(), Replicate()]),
    ]


def _clipped(
    backends: Sequence[str],
    dtype: torch.dtype,
    missing: Sequence[tuple[int, int]] = (),
    spaced: Sequence[int] = (),
    huge: float = 1.0,
) -> tuple[Any, ...]:
    """Steps' norms, what they should be and their dtypes, on ranks that may lack gradients.

    Args:
        backends: one per rank.
        dtype: of all parameters.
        missing: ``(rank, number of parameter)`` of gradients that are not there.
        spaced: ranks on which a gradient lies in memory with gaps, which no kernel takes.
        huge: one element of a gradient, on one rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    layouts = _several_meshes(world)
    idle = [i for r, i in missing if r == rank]

    def make() -> list[Any]:
        drawn = [torch.ones(shape, dtype=dtype) for shape, _, _ in layouts]
        return [
            nn.Parameter(x if mesh is None else _spread(x, mesh, *places))
            for x, (_, mesh, places) in zip(drawn, layouts, strict=True)
        ]

    pair = Pair(BY_NAME["adamw-ams"], make, backend=backends[rank], max_grad_norm=0.5)
    answers = []
    for _ in range(3):
        pair.draw(idle)
        for p, q in zip(members(pair.ours), members(pair.theirs), strict=True):
            if p.grad is not None and p.shape == (5, 3) and rank == world - 1:
                for grad in (p.grad, q.grad):
                    grad._local_tensor[0, 0] = huge
        squares = torch.zeros(len(layouts), dtype=torch.float64)
        for i, p in enumerate(members(pair.ours)):
            if p.grad is not None:
                squares[i] = _local(p.grad).double().square().sum()
        everywhere = squares.clone()
        dist.all_reduce(everywhere)
        whole = [
            mesh is None or not any(p.is_shard() for p in places) for _, mesh, places in layouts
        ]
        norm = torch.where(torch.tensor(whole), squares, everywhere).sum().sqrt()
        for q in members(pair.theirs):
            if q.grad is not None:
                _local(q.grad).mul_(torch.clamp(0.5 / (norm + 1e-6), max=1.0))
        if rank in spaced:
            for p in members(pair.ours)[:2]:
                part = _local(p.grad)
                gaps = torch.stack([part, part], dim=-1)[..., 0]
                if isinstance(p, DTensor):
                    p.grad._local_tensor = gaps
                else:
                    p.grad = gaps
        mine = [p.grad for p in members(pair.ours)]
        kept = [None if g is None else _local(g).clone() for g in mine]
        if dtype == torch.bfloat16:  # whose factors torch rounds
            pair.ours.step()
        else:
            pair.step(1e-12 if dtype == torch.float64 else 1e-4)  # sums that cancel
        for p, grad, values in zip(members(pair.ours), mine, kept, strict=True):
            assert p.grad is grad
            assert grad is None or torch.equal(_local(grad).nan_to_num(), values.nan_to_num())
        answers.append((pair.ours.grad_norm.item(), norm.item(), str(pair.ours.grad_norm.dtype)))
    return tuple(answers)


def _assert_norms(results: list[Any], rel: float, *, exactly: bool = True) -> None:
    for result in results:
        for (norm, expected, dtype), (first, _, first_dtype) in zip(
            result, results[0], strict=True
        ):
            assert norm == pytest.approx(expected, rel=rel, nan_ok=True)
            assert dtype == first_dtype
            assert norm == first if exactly else norm == pytest.approx(first, rel=rel)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@BOTH
def test_the_norm_over_several_meshes_and_plain_tensors(ranks, backend, dtype, world):
    results = ranks.run(world, _clipped, [backend] * 3, dtype)
    _assert_norms(results, 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("huge", [float("inf"), float("nan"), 1e30])
@BOTH
def test_a_norm_that_is_not_finite(ranks, backend, huge):
    """On one rank's part, yet all ranks know; 1e30 squared is only so in float32."""
    results = ranks.run(2, _clipped, [backend] * 2, torch.float64, (), (), huge)
    expected = [answer[1] for answer in results[0]]
    for result in results:
        assert [answer[0] for answer in result] == pytest.approx(expected, nan_ok=True)


#: All of the sharded ones' on a rank, one's, and whatever it has.
MISSING = {
    "one": [(1, 1)],
    "sharded": [(1, i) for i in (1, 3, 4, 5, 6)],
    "different": [(0, 1), (1, 4), (1, 6)],
}


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
@BOTH
def test_ranks_without_some_gradients_join_the_norm(ranks, backend, missing):
    results = ranks.run(2, _clipped, [backend] * 2, torch.float32, missing)
    _assert_norms(results, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@BOTH
def test_a_rank_without_any_gradient_joins_the_norm(ranks, backend, dtype):
    missing = [(1, i) for i in range(8)]
    results = ranks.run(2, _clipped, [backend] * 2, dtype, missing)
    assert [r[0][2] for r in results] == [str(dtype)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("backends", "spaced"),
    [(("auto", "auto"), (1,)), (("native", "torch"), ()), (("torch", "auto"), (1,))],
    ids=["rest", "backends", "both"],
)
def test_ranks_on_different_paths_make_the_same_collectives(ranks, backends, spaced, dtype):
    """And come to the same norm, or copies that they hold of one parameter would part."""
    results = ranks.run(2, _clipped, backends, dtype, (), spaced)
    _assert_norms(results, 1e-6, exactly=False)


def _elsewhere(backend: str, max_norm: float | None) -> tuple[list[float], list[float]]:
    """A parameter on a mesh that has only the first rank, as between stages of a pipeline."""
    mesh, first = init_device_mesh("cpu", (2,)), DeviceMesh("cpu", [0])
    part = _spread(torch.ones(2), first, Shard(0))
    params = [nn.Parameter(_spread(torch.ones(4), mesh, Shard(0))), nn.Parameter(part)]
    opt = BY_NAME["sgd-wd"].ours(params, backend=backend, max_grad_norm=max_norm)
    for _ in range(2):
        params[0].grad = torch.ones_like(params[0])
        if dist.get_rank() == 0:
            params[1].grad = torch.ones_like(params[1])
        opt.step()
    return [_local(p).tolist() for p in params]


@pytest.mark.parametrize("max_norm", [None, 100.0], ids=["", "clipped"])
@BOTH
def test_a_mesh_without_this_rank(ranks, backend, max_norm):
    with_it, without = ranks.run(2, _elsewhere, backend, max_norm)
    assert with_it[0] == without[0]
    assert with_it[1] == with_it[0]
    assert without[1] == []


# ---- steps that are none


def _at_zero(zero: bool, missing: bool) -> list[int]:
    """Positions after a step with rate 0, the first rank's gradients being 0 in any case."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    params = _parameters(mesh)
    opt = BY_NAME["adam-wd"].ours(params, max_grad_norm=1.0)
    positions = []
    for _ in range(2):
        for i, p in enumerate(params):
            p.grad = torch.zeros_like(p)
            if rank == 1 and not zero and isinstance(p, DTensor):
                _local(p.grad).fill_(1.0)
            if missing and rank == i % 2:
                p.grad = None
        for group in opt.param_groups:
            group["lr"] = 0.0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="lr was written from outside")
            opt.step()
        positions.append(opt.iteration)
    return positions


@pytest.mark.parametrize("missing", [False, True], ids=["", "missing"])
@pytest.mark.parametrize("zero", [True, False])
def test_ranks_agree_on_steps_at_rate_zero(ranks, zero, missing):
    """A checkpointer's step has no gradient but zeros, on any rank."""
    expected = [0, 0] if zero else [1, 2]
    assert ranks.run(2, _at_zero, zero, missing) == [expected] * 2


# ---- what cannot be served, and who says so


def _summands() -> tuple[str, str]:
    """A parameter whose ranks hold summands: ``(explained, what a forced kernel raises)``."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def make() -> list[Any]:
        values = torch.ones(3, dtype=torch.float64)
        part = DTensor.from_local(values, mesh, [Partial()], run_check=False)
        return [nn.Parameter(part), nn.Parameter(_spread(values.clone(), mesh, Shard(0)))]

    opt = BY_NAME["sgd-wd"].ours(make(), backend="native", max_grad_norm=1.0)
    for p in members(opt):
        p.grad = torch.ones_like(p)
    before = [_local(p).clone() for p in members(opt)]
    error = failure(lambda opt: opt.step(), opt)
    assert isinstance(error, RuntimeError), error
    assert opt.iteration == 0
    assert all(torch.equal(_local(p), q) for p, q in zip(members(opt), before, strict=True))
    pair = Pair(BY_NAME["sgd-wd"], make)
    for own in (pair.ours, pair.theirs):
        for p in members(own):
            p.grad = torch.ones_like(p)
    pair.step()
    return opt.explain(), str(error)


def test_a_forced_kernel_says_why_it_cannot(ranks):
    for explained, error in ranks.run(2, _summands):
        assert explained.splitlines() == [
            "torch: 1 parameter tensors, 3 values, SGD: DTensors whose ranks hold summands",
            "native: 1 parameter tensors, 3 values, SGD: asked for by backend='native'",
        ]
        assert "backend='native' cannot serve 1 of the parameters: DTensors whose" in error
