"""DTensors of every make: a rank's steps equal those of torch's own optimizer.

A job runs on each rank with two equal optimizers: ours, and torch's for-loop step. Gradients are
drawn whole, and each rank takes its part.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dtensor_helpers import (
    BY_COLUMN,
    EMPTY,
    LAYOUTS,
    PLAIN,
    SCALAR,
    UNEVEN,
    WHOLE,
    Pair,
    dtensors,
    local,
    spread,
)
from internals import count_builds_of
from native_helpers import BY_NAME, KERNELS, feed, members
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
)

# ---- the scan: no stale pointer is used


def _renewed(tensor: DTensor) -> None:
    """Move a DTensor to new memory, and spoil the old memory for stale pointers."""
    old = tensor._local_tensor
    tensor._local_tensor = old.clone()
    old.fill_(float("nan"))


ATTACKS: dict[str, Callable[[Pair], object]] = {"as_it_was": lambda pair: None}


def _attack(change: Callable[[Pair], None]) -> Callable[[Pair], None]:
    """Register a change to both optimizers. It comes after the next step's gradients are set."""
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
    pair.step()  # the same gradients, scanned twice
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
    """Move the gradient to a mesh with other names. torch refuses to mix the two meshes."""
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
                p.grad = spread(whole, p.device_mesh, *placements)

        pair.on(of, change)

    return attack


@_attack
def _gradient_awaited(pair: Pair) -> None:
    def wrap(_: Any, p: Any) -> None:
        p.grad._local_tensor = AsyncCollectiveTensor(p.grad._local_tensor)

    pair.on(UNEVEN, wrap)


class Odd(Tensor):
    """A subclass that changes nothing. The scan cannot know that."""


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
    """Negate the part lazily. The scan must see the bit of the part, not of the whole."""

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
    pair.on(PLAIN, lambda _, p: setattr(p, "grad", spread(p.grad, mesh, Shard(0))))


@_attack
def _added_group(pair: Pair) -> None:
    mesh = members(pair.ours)[UNEVEN].device_mesh
    more = torch.linspace(-1, 1, 6, dtype=torch.float64)
    pair.each(
        lambda opt: opt.add_param_group(
            {"params": [nn.Parameter(spread(more.clone(), mesh, Shard(0)))], "lr": 0.02}
        )
    )
    pair.draw()


@_attack
def _loaded(pair: Pair) -> None:
    def reload(opt: Any) -> None:
        saved = copy.deepcopy(opt.state_dict())
        opt.step()
        opt.load_state_dict(saved)

    feed(pair.twin, pair.ours)
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
        torch.utils.swap_tensors(p, nn.Parameter(spread(values, p.device_mesh, *p.placements)))

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
    """Lay a part into a plain parameter's memory. torch updates one after the other."""

    def share(opt: Any, p: Any) -> None:
        p._local_tensor = members(opt)[PLAIN].detach()[:3]

    pair.on(WHOLE, share)


@_attack
def _copied(pair: Pair) -> None:
    """Go on with a copy, and spoil the memory of the original."""
    grads = [[p.grad for p in members(opt)] for opt in (pair.ours, pair.twin)]
    before = [*members(pair.ours), *members(pair.twin)]
    pair.ours, pair.twin = copy.deepcopy(pair.ours), copy.deepcopy(pair.twin)
    for opt, own in zip((pair.ours, pair.twin), grads, strict=True):
        for p, grad in zip(members(opt), own, strict=True):
            p.grad = copy.deepcopy(grad)
    with torch.no_grad():
        for p in before:
            local(p).fill_(float("nan"))


@_attack
def _pickled(pair: Pair) -> None:
    pair.ours, pair.twin = (pickle.loads(pickle.dumps(opt)) for opt in (pair.ours, pair.twin))
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
    pair = Pair(BY_NAME["adamw-ams"], lambda: dtensors(mesh))
    pair.run(2)
    pair.draw()
    ATTACKS[name](pair)
    if pair.step():  # if torch raised, its parameters are half stepped
        pair.run(2)


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_stale_is_used(ranks, name):
    ranks.run(2, _attacked, name)


# ---- state, and how often a plan is built


def _stepped(name: str, dtype: torch.dtype, tolerance: float) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    pair = Pair(BY_NAME[name], lambda: dtensors(mesh, dtype))
    builds = count_builds_of(pair.plan)
    idle: list[Sequence[int]] = [(UNEVEN, PLAIN), (), (), (EMPTY,), (), range(len(LAYOUTS)), ()]
    for missing in idle:
        pair.draw(missing)
        pair.step(tolerance)
        assert not pair.plan.fallback
        # One build more, for parameters that come later.
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
    """Return reference counts before and after, the number of new objects, and memory's growth."""
    mesh = init_device_mesh("cpu", (1,))
    params = [nn.Parameter(spread(torch.ones(3, 2), mesh, Shard(0))) for _ in range(2)]
    opt = BY_NAME["adamw-ams"].ours(params)
    same = [torch.ones_like(p) for p in params]
    # A different spec, as tensor parallelism gives to gradients.
    other = [DTensor.from_local(torch.ones(3, 2), mesh, [Shard(0)]) for _ in params]
    # Gradients that the scan refuses, each at another check.
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
    assert memory < 1.02  # one leaked object per step would be more
