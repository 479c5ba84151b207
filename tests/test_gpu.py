"""The contract on a GPU, run by `make gpu-check`."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BY_NAME, EVERY_CLASS, Problem, assert_equals_torch_fed_our_rates, assert_same

from clr_optim import CyclicalOptimizer
from clr_optim.range_test import lr_range_test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("no_environment"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]
backends = pytest.mark.parametrize("backend", ["torch", "auto"])


def test_auto_is_triton_with_the_kernels_numbers():
    runs = []
    for backend in ("auto", "triton"):
        problem = Problem(BY_NAME["adam"], device="cuda")
        opt = CyclicalOptimizer(BY_NAME["adam"].make(problem.params), backend=backend)
        assert opt.explain().startswith("triton: ")
        problem.run(opt, range(5))
        runs.append(problem.values())
    assert_same(*runs)


@pytest.mark.parametrize("case", EVERY_CLASS, ids=lambda c: c.name)
def test_bit_identical_to_plain_torch_fed_our_rates(case, monkeypatch):
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "torch")
    if case.name == "adagrad-fused":
        problem = Problem(case, device="cuda")
        try:
            problem.step(case.make(problem.params), 0)
        except RuntimeError as error:
            pytest.skip(f"this torch has none on a GPU: {error}")
    assert_equals_torch_fed_our_rates(case, torch.float32, "cuda", steps=50)


@backends
def test_a_tensor_lr_on_the_device_is_filled(backend):
    case = BY_NAME["adam"]
    problem = Problem(case, device="cuda")
    lr = torch.tensor(0.5, device="cuda")
    inner = torch.optim.Adam(problem.params, lr=lr, capturable=True)
    opt = CyclicalOptimizer(inner, base_lr=0.1, step_size_up=2, backend=backend)
    for k in range(6):
        assert opt.param_groups[0]["lr"] is lr
        assert lr.item() == pytest.approx(opt.lr_at(k)[0], rel=1e-6)
        problem.step(opt, k)


@backends
@pytest.mark.parametrize("name", ["adam", "adam-fused"])
def test_an_amp_overflow_moves_nothing(name, backend):
    case = BY_NAME[name]
    problem = Problem(case, device="cuda")
    opt = CyclicalOptimizer(
        case.make(problem.params), step_size_up=2, max_grad_norm=1.0, backend=backend
    )
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    for k in range(5):
        opt.zero_grad()
        scaler.scale(problem.loss(k)).backward()
        if k == 2:
            problem.params[0].grad[0, 0] = float("inf")
        before, position = problem.values(), opt.iteration
        scaler.step(opt)
        scaler.update()
        assert opt.iteration == position + (k != 2)
        if k == 2:
            assert_same(problem.values(), before)


@backends
def test_a_checkpoint_moves_from_the_cpu(backend):
    case = BY_NAME["adam"]
    there, here = Problem(case), Problem(case, device="cuda")
    opt = CyclicalOptimizer(case.make(there.params), step_size_up=2)
    there.run(opt, range(5))
    moved = CyclicalOptimizer(case.make(here.params), step_size_up=2, backend=backend)
    moved.load_state_dict(opt.state_dict())
    assert moved.iteration == 5
    here.run(moved, range(5, 8))
    assert moved.state[here.params[0]]["exp_avg"].device.type == "cuda"


@pytest.mark.parametrize("offload", [False, True])
def test_a_range_test_leaves_random_state_and_tensors_as_before(offload):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3)
    ).cuda()
    data = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(4)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = copy.deepcopy([*model.state_dict().values(), torch.cuda.get_rng_state()])
    result = lr_range_test(
        model, optimizer, data, torch.nn.functional.cross_entropy, start_lr=0, end_lr=0.1,
        num_steps=20, offload=offload, amp_dtype=torch.float16,
    )  # fmt: skip
    assert len(result.lrs) == 20
    after = [*model.state_dict().values(), torch.cuda.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not optimizer.state
