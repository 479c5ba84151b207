"""Float32 masters of sharded parameters: the course of a float32 model, and its checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from native_helpers import BY_NAME
from sharded_training import Model, mesh_of_all, whole_copy, wrap_case
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)

STEPS, MORE = 6, 4


def _start(name: str, dtype: torch.dtype, sharded: bool = True, **wrap: Any) -> tuple[Any, Any]:
    model = Model().to(torch.bfloat16).to(dtype)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.first, mesh=mesh_of_all())
        fully_shard(model, mesh=mesh_of_all())
    params = [p for p in model.parameters() if p.requires_grad]
    wrap["master_weights"] = dtype == torch.bfloat16
    return model, wrap_case(BY_NAME[name], params, "native", **wrap)


def _step(model: Any, opt: Any, step: int) -> None:
    """Step with gradients that are bfloat16 numbers, the same for any dtype and division."""
    generator = torch.Generator().manual_seed(step)
    for group in opt.param_groups:
        for p in group["params"]:
            grad = torch.randn(p.shape, generator=generator).to(torch.bfloat16).to(p.dtype)
            if hasattr(p, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
    opt.step()


def _whole(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole_copy(value).float() for name, value in values.items()}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [*found] == [*expected]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def _moments(opt: Any) -> list[dict[str, Tensor]]:
    return [
        {name: whole_copy(value) for name, value in opt.state[p].items() if name != "clr_rest"}
        for group in opt.param_groups
        for p in group["params"]
    ]


def _save(folder: str, name: str) -> Any:
    """Compare each step with the float32 model, and write a checkpoint in the middle."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    (model, opt), (wide, twin) = (_start(name, d) for d in (torch.bfloat16, torch.float32))
    courses = []
    for step in range(STEPS + MORE):
        if step == STEPS:
            parts = get_state_dict(model, opt)
            values = dict(zip(("model", "opt"), parts, strict=True))
            dcp.save(values, checkpoint_id=folder)
            dcp.save(opt.master_state_dict(model), checkpoint_id=f"{folder}-masters")
        _step(model, opt, step)
        _step(wide, twin, step)
        masters = _whole(opt.master_state_dict(model))
        _assert_equal(masters, _whole(wide.state_dict()))
        for mine, other in zip(_moments(opt), _moments(twin), strict=True):
            _assert_equal(mine, other)
        courses.append((masters, _moments(opt)))
    return courses


def _load(folder: str, name: str, sharded: bool) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, opt = _start(name, torch.bfloat16, sharded)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    parts = dict(zip(("model", "opt"), get_state_dict(model, opt), strict=True))
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=parts["model"], optim_state_dict=parts["opt"])
    courses = [(_whole(opt.master_state_dict(model)), _moments(opt))]
    for step in range(STEPS, STEPS + MORE):
        _step(model, opt, step)
        courses.append((_whole(opt.master_state_dict(model)), _moments(opt)))
    # The masters alone, into an optimizer that has not stepped.
    model, opt = _start(name, torch.bfloat16, sharded)
    values = opt.master_state_dict(model)
    dcp.load(values, checkpoint_id=f"{folder}-masters")
    opt.load_master_state_dict(model, values)
    return courses, _whole(opt.master_state_dict(model))


@pytest.mark.parametrize("name", ["adamw", "sgd-mom", "adagrad-decay-start"])
def test_masters_of_two_ranks_equal_a_float32_model_and_merge_on_one(ranks, tmp_path, name):
    folder = str(tmp_path / "checkpoint")
    first, second = ranks.run(2, _save, folder, name)
    for mine, other in zip(first, second, strict=True):
        _assert_equal(mine[0], other[0])
    expected = first[STEPS - 1 :]
    for world, sharded in ((1, False), (3, True)):
        for courses, masters in ranks.run(world, _load, folder, name, sharded):
            for found, wanted in zip(courses, expected, strict=True):
                _assert_equal(found[0], wanted[0])
                for mine, other in zip(found[1], wanted[1], strict=True):
                    _assert_equal(mine, other)
            _assert_equal(masters, expected[0][0])
