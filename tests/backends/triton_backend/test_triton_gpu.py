"""The Triton backend on a GPU only: compiled once, streams, several devices, large tensors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from internals import backend_of
from native_helpers import BY_NAME, assert_identical, members, parameters, tensors_of, wrapped
from triton_helpers import (
    DEVICE,
    MARKS,
    SLOW,
    Twins,
    assert_alike,
    choose_triton,
    count_launches,
    drawn,
    kernels,
    on_gpus,
    twins,
)

from clr_optim.core.ordinary import OrdinarySteps

pytestmark = MARKS
_backend = pytest.fixture(autouse=True)(choose_triton)
launches = pytest.fixture(name="launches")(count_launches)


@on_gpus
def test_nothing_is_compiled_anew_as_a_run_goes_on(monkeypatch):
    import triton

    params = parameters(drawn([(33,), (5, 7), (1,)], torch.float32))
    opt = wrapped(
        torch.optim.AdamW(params, lr=0.1), backend="triton", cycle_momentum=True, step_size_up=50
    )
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda *args, **more: compiled.append(more) or False
    )
    grads = [torch.randn_like(p) for p in params]
    at_first = None
    for k in range(200 if SLOW else 1000):
        for i, p in enumerate(params):
            p.grad = None if (k >> i) & 1 and k % 5 else grads[i]
        group = opt.param_groups[0]
        group["weight_decay"] = 0.0 if k % 7 == 0 else 0.01 * k
        group["betas"] = (group["betas"][0], 1.0 if k % 11 == 0 else 0.999 - 1e-4 * k)
        if k % 100 == 0:
            opt.set_bounds(base_lr=0.0, max_lr=0.1 / (1 + k))
        opt.step()
        if k == 0:
            at_first = len(compiled)
    assert len(compiled) == at_first


@on_gpus
def test_a_tensor_of_more_elements_than_an_int32_counts():
    count = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 6 * count:
        pytest.skip("needs 13 GB of the GPU's memory")
    p = torch.nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.ones_like(p)
    p.grad[-5:] = torch.arange(2, 7, device=DEVICE)
    opt = wrapped(torch.optim.SGD([p], lr=0.5), base_lr=0.5, max_lr=0.5, backend="triton")
    opt.step()
    assert p[-5:].tolist() == [-1.0, -1.5, -2.0, -2.5, -3.0]
    assert all(bool((part == -0.5).all()) for part in p.detach()[:-5].split(2**28))


@on_gpus
def test_a_side_stream():
    pair = twins(BY_NAME["adamw-ams"], ((300, 300), (7,)), max_grad_norm=1.0)

    def step():
        pair.draw()
        torch.nn.utils.clip_grad_norm_(members(pair.twin), 1.0)
        pair.step()

    step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    pair.ours.step()


@on_gpus
def test_ordinary_steps_clip_over_several_buckets(monkeypatch):
    """Native code repeats the launches of a step, so nothing else may belong to it."""
    taken, take = [], OrdinarySteps.take
    monkeypatch.setattr(OrdinarySteps, "take", lambda *args: taken.append(take(*args)) or taken[-1])
    params = [p for d in (torch.float32, torch.float64) for p in parameters(drawn([(3,)], d))]
    opt = wrapped(torch.optim.SGD(params, lr=0.1), backend="triton", max_grad_norm=1.0)
    for k in range(1, 7):
        for p in params:
            p.grad = torch.full_like(p, k)
        opt.step()
        assert math.isclose(float(opt.grad_norm), k * math.sqrt(6), rel_tol=1e-6), k
    assert taken[-3:] == [True] * 3


@on_gpus
@pytest.mark.parametrize("asks", [False, True], ids=["blind", "asks"])
@pytest.mark.parametrize("unscales", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("norm", [None, 1.0], ids=["free", "clipped"])
def test_a_grad_scaler_s_steps_are_ordinary(monkeypatch, norm, unscales, asks):
    """Native code takes them, and the device skips those with an overflow: steps 6 and 7."""
    taken, take = [], OrdinarySteps.take
    monkeypatch.setattr(OrdinarySteps, "take", lambda *args: taken.append(take(*args)) or taken[-1])
    on_device = parameters(drawn([(3,), (40, 2)], torch.float32))
    on_host = [torch.nn.Parameter(p.detach().cpu()) for p in on_device]
    ours, twin = (
        wrapped(torch.optim.AdamW(params, lr=0.1, fused=fused), backend=backend, max_grad_norm=norm)
        for params, backend, fused in ((on_device, "triton", True), (on_host, "torch", False))
    )
    scalers = [torch.amp.GradScaler(d, init_scale=8.0, growth_interval=4) for d in ("cuda", "cpu")]
    native = []
    for k in range(14):
        gradients = [torch.full(p.shape, 0.1 * (k + 1)) for p in on_host]
        if k in (6, 7):
            gradients[0][1] = math.inf
        for opt, scaler in zip((ours, twin), scalers, strict=True):
            scale = scaler.scale(torch.ones((), device=members(opt)[0].device))
            for p, g in zip(members(opt), gradients, strict=True):
                p.grad = g.to(p.device) * scale
            if unscales:
                scaler.unscale_(opt)
            taken.clear()
            scaler.step(opt)
            native += taken if opt is ours else []
            scaler.update()
        if asks:
            assert ours.iteration == twin.iteration
            assert ours.get_last_lr() == twin.get_last_lr()
    # A general step makes the state, and another one binds. An answer that the host did not
    # expect needs two more.
    skipped = 2 * asks
    assert native.count(True) >= 14 - 3 - 3 * skipped
    assert native[-2:] == [True, True]
    assert ours.iteration == twin.iteration == 12
    for p, q in zip(on_device, on_host, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-5, atol=1e-6)


@on_gpus
def test_cycle_end_hooks_wait_for_a_grad_scaler_s_answer():
    (p,) = parameters(drawn([(3,)], torch.float32))
    opt = wrapped(torch.optim.SGD([p], lr=0.1), backend="triton", step_size_up=2)
    ends = []
    opt.register_cycle_end_hook(lambda opt: ends.append(opt.iteration))
    for k in range(14):
        p.grad = torch.ones_like(p)
        opt.grad_scale, opt.found_inf = torch.ones(2, device=DEVICE).split(1)
        opt.found_inf.fill_(k in (3, 4))
        opt.step()
    assert ends == [4, 8, 12]


@on_gpus
def test_an_interrupt_before_the_launches_keeps_the_hosts_position():
    (p,) = parameters(drawn([(3,)], torch.float32))
    opt = wrapped(torch.optim.SGD([p], lr=0.1), backend="triton")
    for k in range(5):
        p.grad = torch.ones_like(p)
        opt.step()
        opt.set_iteration(20 + k)  # which the device learns in the next step
        backend_of(opt).doubt(has_begun=False)
        assert opt.iteration == 20 + k


@on_gpus
def test_two_devices(launches):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pair = Twins(
        lambda: torch.optim.Adam(
            [
                torch.nn.Parameter(v.to(f"cuda:{i}"))
                for i, v in enumerate(drawn([(5, 3), (7,)], torch.float64))
            ],
            lr=0.1,
            foreach=False,
        )
    )
    pair.run(4)
    assert [len(counted.taken()) for counted in launches] == [8, 0, 0]


@on_gpus
def test_counters_are_on_the_device_and_in_a_state_dict_on_the_cpu():
    pair = twins(BY_NAME["adam"])
    pair.run(2)
    for p in members(pair.ours):
        assert pair.ours.state[p]["step"].device == DEVICE
    saved = pair.ours.state_dict()
    for state in saved["state"].values():
        assert state["step"].device.type == "cpu"
        assert state["step"].item() == 2
    pair.run(1)


@on_gpus
@kernels
def test_a_checkpoint_moves_from_the_cpu(case):
    def make(device, backend):
        values = [v.to(device) for v in drawn([(5, 3), (7,)], torch.float64)]
        return case.ours(parameters(values), backend=backend)

    there, here = make("cpu", "torch"), make(DEVICE, "triton")

    def step(opt, k):
        for i, p in enumerate(members(opt)):
            p.grad = drawn([p.shape], torch.float64, 10 * k + i)[0].to(p.device)
        opt.step()

    for k in range(3):
        step(there, k)
    # Load a copy, as from a file: torch's loading shares the counters on the CPU.
    here.load_state_dict(copy.deepcopy(there.state_dict()))
    for p, q in zip(members(here), members(there), strict=True):
        p.data.copy_(q.detach())
    assert here.iteration == 3
    for k in range(3, 6):
        step(there, k)
        step(here, k)
    assert_alike(here, there)


@on_gpus
def test_an_amp_overflow_moves_nothing():
    pair = twins(BY_NAME["adam"], max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    opt = pair.ours
    for k in range(4):
        opt.zero_grad()
        scaler.scale(sum((p**2).sum() for p in members(opt))).backward()
        if k == 2:
            members(opt)[0].grad[0, 0] = math.inf
        before, position = copy.deepcopy(tensors_of(opt)), opt.iteration
        scaler.step(opt)
        scaler.update()
        assert opt.iteration == position + (k != 2)
        if k == 2:
            assert all(torch.equal(t, before[key]) for key, t in tensors_of(opt).items())


@on_gpus
def test_equal_runs_give_equal_bits():
    def run():
        case = BY_NAME["adamw-ams"]
        opt = case.ours(parameters(drawn([(9000,), (7,)], torch.float32)), backend="triton")
        for k in range(3):
            for p, g in zip(members(opt), drawn([(9000,), (7,)], torch.float32, k), strict=True):
                p.grad = g
            opt.step()
        return opt

    assert_identical(run(), run())
