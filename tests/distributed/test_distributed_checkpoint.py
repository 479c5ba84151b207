"""Checkpoints of several ranks: torch.distributed.checkpoint and ZeroRedundancyOptimizer.

A checkpoint of some ranks is loaded by another number of ranks. Position, bounds, rates and state
must be the same at once. Later the run must come to where an uninterrupted run comes.
"""

from __future__ import annotations

import copy
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import Ranks
from native_helpers import BY_NAME, Case, feed
from sharded_training import Model, loss_of_share, whole_copy, wrap_case

from clr_optim import CyclicalOptimizer

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)

#: Without state; with state that the first step makes; with counters and three tensors.
CASES = ["sgd", "sgd-mom", "adamw-ams"]
TENSOR_RATE = "adamw-tensor-lr"
#: Cycles are six steps long. The checkpoint cuts the second cycle on its way up.
SAVED, MORE = 8, 5
EXACTLY = {"rtol": 0.0, "atol": 0.0}


def _case(name: str) -> Case:
    if name == TENSOR_RATE:  # a new tensor for each, as it is filled in place
        return Case(name, torch.optim.AdamW, {"foreach": False}, lr=torch.tensor(0.01))
    return BY_NAME[name]


def _groups(model: Any) -> list[dict[str, Any]]:
    """Return a group with the optimizer's rate, and one with another rate and a frozen layer."""
    last = [*model.frozen.parameters(), *model.last.parameters()]
    return [{"params": [*model.first.parameters()]}, {"params": last, "lr": 0.03}]


def _model(sharded: bool) -> Any:
    model = Model()
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _start(name: str, backend: str, sharded: bool = True, **wrap: Any) -> tuple[Any, Any]:
    model = _model(sharded)
    return model, wrap_case(_case(name), _groups(model), backend, **wrap)


def _other_start(name: str, backend: str, sharded: bool = True, **wrap: Any) -> tuple[Any, Any]:
    """Change values and bounds, which the checkpoint must replace."""
    warnings.filterwarnings("ignore", "state_dict has (the bounds|base_momentum)", UserWarning)
    bounds: dict[str, Any] = {"base_lr": 0.5, "max_lr": [0.7, 0.9]}
    if wrap.get("cycle_momentum"):
        bounds.update(base_momentum=0.1, max_momentum=0.2)
    model, opt = _start(name, backend, sharded, **bounds, **wrap)
    _forget(model)
    return model, opt


def _plain(name: str) -> tuple[Any, Any, Any]:
    """Return a sharded model, a plain optimizer, and the rates that our wrapper would give it."""
    model, twin = _model(True), wrap_case(_case(name), _groups(Model()), "torch")
    return model, _case(name).make(_groups(model)), twin.lr_at


@torch.no_grad()
def _forget(model: Any) -> None:
    for p in model.parameters():
        p.zero_()


def _train(model: Any, opt: Any, first: int, steps: int, rates: Any = None) -> None:
    """Train on the batches of these steps. Ranks share a batch if the model is sharded.

    Args:
        rates: returns the rates of a step, for an optimizer that does not cycle them.
    """
    share = (dist.get_rank(), dist.get_world_size()) if hasattr(model, "unshard") else (0, 1)
    for step in range(first, first + steps):
        for group, rate in zip(opt.param_groups, rates(step) if rates else (), strict=False):
            group["lr"] = rate
        opt.zero_grad()
        loss_of_share(model, step, *share).backward()
        opt.step()
    opt.zero_grad()


def _course(opt: Any) -> dict[str, Any]:
    """Return the numbers that all ranks must agree on, and that no rounding may change."""
    groups = opt.param_groups
    return {
        "iteration": opt.iteration,
        "rates": opt.get_last_lr(),
        "lr": [float(group["lr"]) for group in groups],
        # torch's whole state dicts turn tuples into lists.
        "momenta": [
            list(group["betas"]) if "betas" in group else group["momentum"] for group in groups
        ],
        "clr": [{k: v for k, v in group.items() if k.startswith("clr_")} for group in groups],
    }


def _values(opt: Any) -> list[dict[str, Any]]:
    """Return each parameter and its state, whole."""
    return [
        {
            "": whole_copy(p),
            **{k: whole_copy(v) for k, v in opt.state.get(p, {}).items() if v is not None},
        }
        for group in opt.param_groups
        for p in group["params"]
    ]


def _assert_same(run: Any, expected: Any, tolerance: Any = EXACTLY) -> None:
    """Compare two courses exactly, and their values within a tolerance."""
    assert run[0] == expected[0]
    torch.testing.assert_close(run[1], expected[1], **tolerance)


# ---- torch.distributed.checkpoint

#: Options of the functions that get and set state dicts, and whether one call takes both model and
#: optimizer.
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "together": (True, {}),
    "apart": (False, {}),
    "flat": (False, {"flatten_optimizer_state_dict": True}),
    "full": (True, {"full_state_dict": True}),
    "rank0": (False, {"full_state_dict": True, "cpu_offload": True}),
    "async": (True, {}),
    "stateful": (True, {}),
}


def _get(way: str, model: Any, opt: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as api

    together, options = WAYS[way]
    chosen = api.StateDictOptions(**options)
    if together:
        parts = api.get_state_dict(model, opt, options=chosen)
    else:
        parts = (
            api.get_model_state_dict(model, options=chosen),
            api.get_optimizer_state_dict(model, opt, options=chosen),
        )
    return dict(zip(("model", "opt"), parts, strict=True))


def _set(way: str, model: Any, opt: Any, values: dict[str, Any], **more: Any) -> None:
    from torch.distributed.checkpoint import state_dict as api

    together, options = WAYS[way]
    chosen = api.StateDictOptions(**options, **more)
    if together:
        api.set_state_dict(
            model,
            opt,
            model_state_dict=values["model"],
            optim_state_dict=values["opt"],
            options=chosen,
        )
    else:
        api.set_model_state_dict(model, values["model"], options=chosen)
        api.set_optimizer_state_dict(model, opt, values["opt"], options=chosen)


def _write(way: str, model: Any, opt: Any, folder: str) -> Any:
    """Save. Return the handle to wait for, if the save is asynchronous."""
    import torch.distributed.checkpoint as dcp

    values = _get(way, model, opt)
    if way == "async":
        # A separate process group: the saving thread and the training both talk to the other ranks.
        group = dist.new_group(backend="gloo")
        return dcp.async_save(values, checkpoint_id=folder, process_group=group)
    if way == "stateful":
        dcp.save({"model": model, "opt": opt}, checkpoint_id=folder)
    elif way != "rank0":
        dcp.save(values, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        torch.save(values, f"{folder}.pt")
    return None


def _read(way: str, model: Any, opt: Any, folder: str, partial: bool = False) -> None:
    import torch.distributed.checkpoint as dcp

    if way == "stateful":
        _get(way, model, opt)  # creates the state to load into
        dcp.load({"model": model, "opt": opt}, checkpoint_id=folder)
        return
    if way != "rank0":
        values = _get(way, model, opt)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=partial)
        dcp.load(values, checkpoint_id=folder, planner=planner)
        _set(way, model, opt, values)
        return
    values = {"model": {}, "opt": {}}
    if dist.get_rank() == 0:
        values = torch.load(f"{folder}.pt", weights_only=True)
    _set(way, model, opt, values, broadcast_from_rank0=True)


def _save(folder: str, name: str, backend: str, way: str) -> dict[str, Any]:
    """Run, and write a checkpoint in the middle."""
    model, opt = _start(name, backend)
    _train(model, opt, 0, SAVED)
    saved = _course(opt), _values(opt)
    future = _write(way, model, opt, folder)
    after = _course(opt), _values(opt)
    _train(model, opt, SAVED, MORE)
    if future is not None:
        future.result()
    return {"saved": saved, "after": after, "end": (_course(opt), _values(opt))}


def _load(folder: str, name: str, backend: str, way: str, sharded: bool, used: int):
    """Run on from the checkpoint, with an optimizer that has already taken some steps."""
    model, opt = _other_start(name, backend, sharded)
    _train(model, opt, 50, used)
    _read(way, model, opt, folder)
    saved = _course(opt), _values(opt)
    _train(model, opt, SAVED, MORE)
    return {"saved": saved, "end": (_course(opt), _values(opt))}


def _save_and_load(*args: Any) -> Any:
    return [_save(*args), _load(*args, True, 0), _load(*args, True, 2)]


def _load_sharded_or_not(*args: Any) -> Any:
    """Load into a sharded model, and on each rank alone into an ordinary model too."""
    ways = (True, False) if dist.get_world_size() == 1 else (True,)
    return [_load(*args, sharded, 0) for sharded in ways]


@pytest.mark.parametrize(
    ("name", "backend", "way"),
    # torch's functions refuse whole tensors if the optimizer has no tensors in its state.
    [("sgd", "native", "together"), ("sgd", "native", "async"), ("sgd-mom", "native", "flat")]
    + [("adamw-ams", "native", way) for way in WAYS]
    + [("sgd", "torch", "flat"), ("sgd-mom", "torch", "full"), ("adamw-ams", "torch", "together")]
    + [("sgd-mom-cycled", "native", "apart"), ("adam-cycled", "native", "flat")]
    + [(TENSOR_RATE, "native", "async"), (TENSOR_RATE, "torch", "stateful")],
)
def test_a_checkpoint_goes_on_with_any_number_of_ranks(ranks, tmp_path, name, backend, way):
    args = str(tmp_path / "checkpoint"), name, backend, way
    results = [(EXACTLY, run) for runs in ranks.run(2, _save_and_load, *args) for run in runs]
    expected = results[0][1]
    assert expected["saved"][0]["iteration"] == SAVED
    _assert_same(expected["after"], expected["saved"])
    # With other numbers of ranks gradients are summed in another order.
    for world in (3, 1):
        answers = ranks.run(world, _load_sharded_or_not, *args)
        results += [({}, run) for runs in answers for run in runs]
    assert len(results) == 2 * 3 + 3 + 2
    for tolerance, run in results:
        _assert_same(run["saved"], expected["saved"])
        _assert_same(run["end"], expected["end"], tolerance)


def _make_state(name: str, backend: str, base_lr: float) -> dict[str, Any]:
    """Have torch create the state of a new optimizer. Here every step completes a cycle."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = _model(True)
    case = _case(name)
    opt = CyclicalOptimizer(
        case.make(_groups(model)),
        base_lr=base_lr,
        step_size_up=1,
        step_size_down=0,
        backend=backend,
        cycle_momentum=True,
        max_grad_norm=1e9,
    )
    fired: list[int] = []
    opt.register_cycle_end_hook(lambda opt: fired.append(opt.iteration))
    before = _course(opt), [whole_copy(p) for p in model.parameters()]
    get_optimizer_state_dict(model, opt)
    after = _course(opt), [whole_copy(p) for p in model.parameters()]
    twin = _model(True)
    plain = case.make(_groups(twin))
    get_optimizer_state_dict(twin, plain)
    made = _values(opt), _values(plain)
    quiet = list(fired)
    feed(plain, opt)
    _train(model, opt, 0, 1)
    _train(twin, plain, 0, 1)
    return {
        "before": before, "after": after, "made": made, "fired": (quiet, fired),
        "course": _course(opt), "stepped": (_values(opt), _values(plain)),
    }  # fmt: skip


@pytest.mark.parametrize("base_lr", [0.001, 0.0])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", ["sgd-mom-wd", "adam-decoupled"])
def test_making_state_is_no_step_on_any_rank(ranks, name, backend, base_lr):
    results = ranks.run(3, _make_state, name, backend, base_lr)
    for result in results:
        _assert_same(result["after"], result["before"])
        torch.testing.assert_close(*result["made"])
        assert result["fired"] == ([], [1])
        assert result["course"] == results[0]["course"]
        assert result["course"]["iteration"] == 1
        torch.testing.assert_close(*result["stepped"])


def _warm_up(backend: str) -> Any:
    """Step at rate 0 of another scheduler. Only one rank's part has a gradient."""
    model, opt = _start("adam-decoupled", backend)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.last.bias.grad = torch.ones_like(model.last.bias)
    for group in opt.param_groups:
        group["lr"] = 0.0
    with pytest.warns(UserWarning, match=r"lr was written from outside in parameter group 0 \(0\)"):
        opt.step()
    return _course(opt)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_gradient_on_one_rank_makes_it_a_step_on_all(ranks, backend):
    courses = ranks.run(3, _warm_up, backend)
    assert courses[0]["iteration"] == 1
    assert courses[1] == courses[2] == courses[0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_tensor_rate_loaded_in_place_is_not_written_from_outside(tmp_path):
    """DCP fills the tensors of a state dict. Afterwards whole tensors are asked for again."""
    import torch.distributed.checkpoint as dcp

    folder = str(tmp_path / "checkpoint")
    model, opt = _start(TENSOR_RATE, "torch", sharded=False)
    _train(model, opt, 0, SAVED)
    dcp.save(_get("full", model, opt), checkpoint_id=folder, no_dist=True)
    saved = _course(opt), _values(opt)
    model, opt = _other_start(TENSOR_RATE, "torch", sharded=False)
    values = _get("full", model, opt)
    dcp.load(values, checkpoint_id=folder, no_dist=True)
    _set("full", model, opt, values)
    _assert_same((_course(opt), _values(opt)), saved)


# ---- checkpoints of the plain optimizer


def _save_plain(folder: str, name: str, way: str) -> Any:
    model, inner, rates = _plain(name)
    _train(model, inner, 0, SAVED, rates)
    saved = _values(inner)
    _write(way, model, inner, folder)
    _train(model, inner, SAVED, MORE, rates)
    return saved, _values(inner)


def _load_from_plain(folder: str, name: str, backend: str, way: str) -> Any:
    """The bounds are those of the constructor. The caller sets the position."""
    model, opt = _start(name, backend)
    _forget(model)
    fresh = _course(opt)
    _read(way, model, opt, folder, partial=True)
    loaded = _course(opt), _values(opt)
    opt.set_iteration(SAVED)
    _train(model, opt, SAVED, MORE)
    return fresh, loaded, (_course(opt), _values(opt))


def _load_into_plain(folder: str, name: str, way: str) -> Any:
    model, inner, rates = _plain(name)
    _forget(model)
    _read(way, model, inner, folder)
    loaded = _values(inner)
    assert [group["lr"] for group in inner.param_groups] == rates(SAVED)
    _train(model, inner, SAVED, MORE, rates)
    return loaded, _values(inner)


@pytest.mark.parametrize(
    ("name", "backend", "way"),
    [
        ("sgd", "native", "together"),
        ("sgd", "torch", "flat"),
        ("sgd-mom", "native", "flat"),
        ("adamw-ams", "native", "together"),
        ("adamw-ams", "torch", "flat"),
    ],
)
def test_plain_checkpoints_and_back(ranks, tmp_path, name, backend, way):
    plain, ours = str(tmp_path / "plain"), str(tmp_path / "ours")
    tolerance = EXACTLY if backend == "torch" else {}
    (saved, end), _ = ranks.run(2, _save_plain, plain, name, way)
    for fresh, loaded, last in ranks.run(2, _load_from_plain, plain, name, backend, way):
        _assert_same(loaded, (fresh, saved))
        assert last[0]["iteration"] == SAVED + MORE
        torch.testing.assert_close(last[1], end, **tolerance)
    run, _ = ranks.run(2, _save, ours, name, backend, way)
    for loaded, last in ranks.run(2, _load_into_plain, ours, name, way):
        torch.testing.assert_close(loaded, run["saved"][1], **EXACTLY)
        torch.testing.assert_close(last, run["end"][1], **tolerance)


# ---- a save that is killed


def _save_to(folder: Path, step: int, model: Any, opt: Any) -> None:
    """Save each checkpoint to a new folder, and name it the last one once it is whole."""
    _write("together", model, opt, str(folder / f"step-{step}"))  # returns after all ranks are done
    if dist.get_rank() == 0:
        (folder / "latest.tmp").write_text(f"step-{step}")
        os.replace(folder / "latest.tmp", folder / "latest")


def _die_in_the_second(folder: Path) -> None:
    from torch.distributed.checkpoint import filesystem

    model, opt = _start("adamw-ams", "native")
    _train(model, opt, 0, SAVED)
    _save_to(folder, SAVED, model, opt)
    _train(model, opt, SAVED, 2)
    written, write = [], filesystem._write_item

    def write_some(*args: Any) -> Any:
        if len(written) == 4 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(write(*args))
        return written[-1]

    filesystem._write_item = write_some
    _save_to(folder, SAVED + 2, model, opt)


def test_a_save_killed_in_the_middle_leaves_the_one_before(ranks, tmp_path):
    mortal = Ranks(2, tmp_path)
    try:
        with pytest.raises(AssertionError, match="rank 1 of 2 died"):
            mortal.run(2, _die_in_the_second, tmp_path)
    finally:
        mortal.close()
    begun = tmp_path / f"step-{SAVED + 2}"
    assert list(begun.glob("__*"))
    assert not (begun / ".metadata").exists()
    latest = (tmp_path / "latest").read_text()
    assert latest == f"step-{SAVED}"
    other = str(tmp_path / "uninterrupted")
    expected, _ = ranks.run(2, _save, other, "adamw-ams", "native", "together")
    load = (str(tmp_path / latest), "adamw-ams", "native", "together", True, 0)
    for result in ranks.run(2, _load, *load):
        _assert_same(result["saved"], expected["saved"])
        _assert_same(result["end"], expected["end"])


# ---- ZeroRedundancyOptimizer


def _zero(where: str, backend: str, name: str, model: Any, **wrap: Any) -> tuple[Any, Any, Any]:
    """Return ``(the object to step, ours, ZeRO)``."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    case = _case(name)
    options = {"lr": case.lr, "foreach": False, **case.options}

    def ours(inner: Any) -> Any:
        return CyclicalOptimizer(inner, step_size_up=3, backend=backend, **wrap)

    if where == "inside":
        zero = ZeroRedundancyOptimizer(
            _groups(model), lambda params, **given: ours(case.cls(params, **given)), **options
        )
        return zero, zero.optim, zero
    zero = ZeroRedundancyOptimizer(_groups(model), case.cls, **options)
    opt = ours(zero)
    return opt, opt, zero


def _zero_run(where, backend, name, file, first) -> dict[str, Any]:
    """Run from the start and save in the middle, or run on from that checkpoint."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Model()
    wrap = {"base_lr": 0.5, "max_lr": [0.7, 0.9]} if first else {}
    warnings.filterwarnings("ignore", "state_dict has (the bounds|base_momentum)", UserWarning)
    opt, ours, zero = _zero(where, backend, name, model, **wrap)
    innermost = ours.optimizer if where == "inside" else zero.optim
    used, exposed, saved = [], [], None
    innermost.register_step_pre_hook(
        lambda optimizer, *_: used.append([group["lr"] for group in optimizer.param_groups])
    )

    def values() -> Any:
        opt.consolidate_state_dict(to=0)
        # The groups of both agree at this point.
        course = _course(ours)
        for optimizer in (zero, zero.optim, innermost):
            for group, lr in zip(optimizer.param_groups, course["lr"], strict=True):
                assert (group["clr_step"], group["lr"]) == (ours.iteration, lr)
        # A copy, since on the CPU this rank's part shares the memory of the live state.
        state = copy.deepcopy(opt.state_dict()) if rank == 0 else None
        return course, [whole_copy(p) for p in model.parameters()], state

    if first:
        _forget(model)
        checkpoint = torch.load(file, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        opt.load_state_dict(checkpoint["opt"])
        saved = values()
    for step in range(first, SAVED + MORE):
        if step == SAVED and not first:
            saved = values()
            if rank == 0:
                torch.save({"model": model.state_dict(), "opt": saved[2]}, file)
        opt.zero_grad()
        loss_of_share(model, step, rank, world).backward()
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= world
        opt.step()
        exposed.append([(g["clr_step"], g["lr"]) for g in opt.param_groups])
    return {"used": used, "exposed": exposed, "saved": saved, "end": values()}


@pytest.mark.parametrize(
    ("name", "where", "backend"),
    [(name, *how) for name in CASES for how in (("inside", "native"), ("around", "auto"))]
    + [("adamw-ams", "inside", "torch")],
)
def test_zero_redundancy_optimizer(ranks, tmp_path, name, where, backend):
    file = str(tmp_path / "checkpoint.pt")
    model = Model()
    opt = wrap_case(_case(name), _groups(model), "torch")
    rates = [opt.lr_at(step) for step in range(SAVED + MORE + 1)]
    _train(model, opt, 0, SAVED + MORE)
    whole = ranks.run(2, _zero_run, where, backend, name, file, 0)
    runs = [(0, EXACTLY, whole)]
    for world in (2, 3, 1):
        resumed = ranks.run(world, _zero_run, where, backend, name, file, SAVED)
        # With other numbers of ranks gradients are summed in another order.
        runs.append((SAVED, EXACTLY if world == 2 else {}, resumed))
    for first, tolerance, results in runs:
        for result in results:
            assert result["used"] == rates[first:-1]
            assert result["exposed"] == [
                [(step + 1, rate) for rate in rates[step + 1]]
                for step in range(first, SAVED + MORE)
            ]
            assert result["end"][0] == _course(opt)
            for ours, reference in zip(result["end"][1], model.parameters(), strict=True):
                torch.testing.assert_close(ours, reference.detach())
            assert result["saved"][0] == whole[0]["saved"][0]
        for when in ("saved", "end"):
            bound = EXACTLY if when == "saved" else tolerance
            for result, expected in zip(results, whole, strict=False):
                torch.testing.assert_close(result[when][1], expected[when][1], **bound)
            ours, reference = results[0][when][2], whole[0][when][2]
            torch.testing.assert_close(ours["state"], reference["state"], **bound)
            assert ours["param_groups"] == reference["param_groups"]


def _join_inside_zero(backend: str) -> Any:
    """Add a group in mid-cycle. Return the warnings, and the groups of both sides in the end."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = Model()
    first, *others = _groups(model)
    zero = ZeroRedundancyOptimizer(
        [first],
        lambda params, **given: CyclicalOptimizer(
            torch.optim.SGD(params, **given), step_size_up=3, backend=backend
        ),
        lr=0.01,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _train(model, zero, 0, 2)
        for group in others:
            zero.add_param_group(group)
        _train(model, zero, 2, 2)
    return [str(w.message) for w in caught], _course(zero.optim)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_group_added_inside_zero_joins_the_cycle(ranks, backend):
    """ZeRO writes the rate again that the group was added with.

    That write is overruled as any other.
    """
    opt = wrap_case(BY_NAME["sgd"], _groups(Model()), "torch")
    opt.set_iteration(4)
    for warned, course in ranks.run(2, _join_inside_zero, backend):
        assert course == _course(opt)
        assert len(warned) == 1
        assert warned[0].startswith("lr was written from outside in parameter group")
