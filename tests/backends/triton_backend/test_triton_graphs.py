"""Steps captured into a graph, overflows that only the device sees.

On a GPU these are CUDA's graphs, in the interpreter graphs that :mod:`graph_helpers` plays.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from graph_helpers import Graph, Run, assert_together, nothing_waits, scaled
from internals import device_position_writes
from native_helpers import BY_NAME, KERNELS, assert_identical, tensors_of, unaligned
from torch import Tensor
from triton_helpers import DEVICE, INTERPRETED, RUNS, SLOW

from clr_optim import CyclicalOptimizer
from clr_optim.backends import device as current

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not RUNS, reason="needs TRITON_INTERPRET=1 or a GPU"),
    # The interpreter computes with an SGD's unfilled first buffer, and numpy warns of its NaNs.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def on_gpus(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED, reason="runs compiled, on a GPU")(test))


GRAPHED = [*KERNELS, BY_NAME["adam-cycled"], BY_NAME["sgd-nest-cycled"]]


@pytest.mark.parametrize("case", GRAPHED, ids=lambda case: case.name)
def test_replays_walk_the_cycle(case):
    replayed, eager = Run(case), Run(case)
    for k in range(2):
        replayed.eager(k)
        eager.eager(k)
    graph = replayed.capture()
    for k in range(2, 12 if SLOW else 502):
        replayed.replay(graph, k)
        eager.eager(k)
    assert_together(replayed, eager)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam-cycled"])
def test_replays_and_eager_steps_take_turns(name, max_grad_norm):
    case = BY_NAME[name]
    mixed, eager = (Run(case, max_grad_norm=max_grad_norm) for _ in range(2))
    mixed.eager(0)
    graph = mixed.capture()
    for k in range(1, 14):
        (mixed.eager if k in (4, 5, 9) else lambda k: mixed.replay(graph, k))(k)
    for k in range(14):
        eager.eager(k)
    assert_together(mixed, eager)


def test_two_graphs_of_one_optimizer():
    mixed, eager = Run(BY_NAME["adam-wd"]), Run(BY_NAME["adam-wd"])
    mixed.eager(0)
    graphs = []
    for _ in range(2):
        graphs.append((mixed.capture(), mixed.static))
        mixed.eager(len(graphs))
    for k in range(3, 9):
        graph, mixed.static = graphs[k % 2]
        mixed.replay(graph, k)
    for k in range(9):
        eager.eager(k)
    assert_together(mixed, eager)


def test_a_graph_keeps_what_it_reads_from():
    """Eager steps with other gradients must not change or free a graph's tables."""
    mixed, eager = Run(BY_NAME["adagrad-decay"]), Run(BY_NAME["adagrad-decay"])
    for run in (mixed, eager):
        run.eager(0)
    graph = mixed.capture()
    for run in (mixed, eager):  # other chunks, other counters
        for i, (param, grad) in enumerate(zip(run.params, run.draw(1), strict=True)):
            param.grad = grad if i == 1 else None
        run.opt.step()
    mixed.replay(graph, 2)
    eager.eager(2)
    assert_together(mixed, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, None])
@pytest.mark.parametrize("name", ["adam-wd", "rmsprop-mom-cent", "adadelta"])
def test_capturable_keeps_lr_on_the_device(name, dtype):
    case = BY_NAME[name]
    lr = case.lr if dtype is None else torch.tensor(case.lr, dtype=dtype, device=DEVICE)
    plain = Run(case, lr=float(lr))
    run = Run(case, capturable=True, lr=lr)
    run.eager(0)
    held = run.opt.param_groups[0]["lr"]
    assert isinstance(held, Tensor)
    assert dtype is None or held is lr
    assert held.dtype == (dtype or torch.float32)
    graph = run.capture()
    plain.eager(0)
    for k in range(1, 9):
        run.replay(graph, k) if k % 3 else run.eager(k)
        plain.eager(k)
        assert run.opt.param_groups[0]["lr"] is held
        # Read before the host asks the device: asking may write lr.
        assert held.item() == pytest.approx(plain.opt.param_groups[0]["lr"], rel=1e-6)
    assert run.opt.get_last_lr() == plain.opt.get_last_lr()
    for a, b in zip(run.params, plain.params, strict=True):
        assert torch.equal(a, b)


def test_save_after_replays_and_resume_eagerly():
    straight, resumed = Run(BY_NAME["adamw-ams"]), Run(BY_NAME["adamw-ams"])
    straight.eager(0)
    graph = straight.capture()
    for k in range(1, 6):
        straight.replay(graph, k)
    saved = copy.deepcopy(straight.opt.state_dict())
    assert saved["param_groups"][0]["clr_step"] == 6
    assert saved["param_groups"][0]["lr"] == straight.opt.lr_at(6)[0]
    for p, q in zip(resumed.params, straight.params, strict=True):
        p.data.copy_(q.detach())
    resumed.opt.load_state_dict(saved)
    for k in range(6, 11):
        straight.replay(graph, k)
        resumed.eager(k)
    assert_together(straight, resumed)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_new_course_reaches_the_replays(capturable):
    run, plain = (
        Run(BY_NAME["adam-wd"], capturable=flag) for flag in (capturable, False)
    )  # fmt: skip
    run.eager(0)
    plain.eager(0)
    graph = run.capture()
    for k in range(1, 5):
        run.replay(graph, k)
        plain.eager(k)
    for opt in (run.opt, plain.opt):
        opt.set_iteration(1)  # the position that the host believes
        opt.set_bounds(base_lr=0.001, max_lr=0.02)
    for k in range(5, 12):
        run.replay(graph, k)
        plain.eager(k)
    assert run.opt.iteration == plain.opt.iteration == 8
    for a, b in zip(run.params, plain.params, strict=True):
        assert torch.equal(a, b)


def refusal(run: Run) -> str:
    before = (run.opt.iteration, copy.deepcopy(tensors_of(run.opt)))
    with warnings.catch_warnings():
        # torch warns of the empty graph of the refused capture.
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")
        with pytest.raises(RuntimeError) as error, Graph().capture():
            run.opt.step()
    assert run.opt.iteration == before[0]
    after = tensors_of(run.opt)
    assert all(torch.equal(before[1][key], after[key]) for key in before[1])
    return str(error.value)


def test_what_cannot_be_captured_says_why():
    def warm(name: str = "adam-wd", **options: Any) -> Run:
        run = Run(BY_NAME[name], **options)
        run.eager(0)
        return run

    fresh = Run(BY_NAME["adam-wd"])
    for param, grad in zip(fresh.params, fresh.draw(0), strict=True):
        param.grad = grad
    assert "create the optimizer's state; take a step" in refusal(fresh)

    run = warm()
    run.opt.register_cycle_end_hook(print)
    assert "cycle-end hooks" in refusal(run)

    run = warm()
    run.opt.set_iteration(5)
    assert "position in the cycle was moved" in refusal(run)

    run = warm()
    run.opt.param_groups[0]["weight_decay"] = 0.5
    assert "settings of the optimizer changed" in refusal(run)

    run = warm()
    run.params[1].data = run.params[1].data.clone()
    assert "tensors or settings" in refusal(run)

    run = warm()
    inner = BY_NAME["adam-wd"].make(run.params)
    run.opt = CyclicalOptimizer(inner, scale_fn=lambda x: 1.0, backend="triton")
    run.eager(1)
    assert "a scale_fn runs on the host" in refusal(run)

    run = warm()
    inner = BY_NAME["sgd-mom"].make(run.params)
    run.opt = CyclicalOptimizer(
        inner, cycle_momentum=True, base_momentum=0.0, step_size_up=3, backend="triton"
    )
    run.eager(1)
    assert "momentum cycles down to 0" in refusal(run)

    run = warm()
    run.opt = CyclicalOptimizer(run.opt.optimizer, backend="torch", step_size_up=3)
    run.eager(1)
    message = refusal(run)
    assert "on backend 'torch'" in message
    assert "use backend='triton'" in message

    # Eager steps go on undisturbed: two steps since the optimizer was wrapped again.
    run.eager(2)
    assert run.opt.iteration == 2


def warm_pair() -> tuple[Run, Run]:
    """Return two equal runs after one step, which created the state."""
    both = Run(BY_NAME["adam-wd"]), Run(BY_NAME["adam-wd"])
    for run in both:
        run.eager(0)
    return both


def test_two_steps_in_one_capture():
    """As torch's steps: with the same gradients, whose addresses are arguments of the kernel."""
    replayed, eager = warm_pair()
    graph = replayed.capture(steps=2)
    for k in range(1, 4):
        replayed.replay(graph, k)
        eager.eager(k)
        eager.eager(k)
    assert_together(replayed, eager)


def test_a_parameter_without_a_gradient_is_idle_in_a_graph():
    replayed, eager = warm_pair()
    graph = replayed.capture(idle=1)
    for k in range(1, 4):
        replayed.replay(graph, k)
        eager.eager(k, idle=1)
    for run in (replayed, eager):
        run.eager(4)
    assert_together(replayed, eager)
    assert int(replayed.opt.state[replayed.params[1]]["step"]) == 2


@pytest.mark.parametrize("first", [unaligned, torch.clone])
def test_gradients_aligned_otherwise_than_before_can_be_captured(first):
    replayed, eager = Run(BY_NAME["adam-wd"]), Run(BY_NAME["adam-wd"])
    for run in (replayed, eager):
        for param, grad in zip(run.params, run.draw(0), strict=True):
            param.grad = first(grad)
        run.opt.step()
    full_like = torch.full_like if first is unaligned else lambda *a: unaligned(torch.full_like(*a))
    graph = replayed.capture(full_like)
    for k in range(1, 4):
        replayed.replay(graph, k)
        eager.eager(k)
    assert_together(replayed, eager)


def test_a_capture_must_cover_all_devices(monkeypatch):
    """Whether a capture is under way depends on the current device."""
    run = Run(BY_NAME["adam-wd"])
    run.eager(0)
    elsewhere = []

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        elsewhere.append(device)
        yield
        elsewhere.pop()

    monkeypatch.setattr(current, "guard", guard)
    monkeypatch.setattr(current, "is_capturing", lambda: not elsewhere)
    for param, grad in zip(run.params, run.draw(1), strict=True):
        param.grad = grad
    before = copy.deepcopy(tensors_of(run.opt))
    with pytest.raises(RuntimeError, match="capture on all or none"):
        run.opt.step()
    after = tensors_of(run.opt)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_groups_bounds_reach_a_graph_of_more_groups():
    run = Run(BY_NAME["adam-wd"])
    inner = torch.optim.Adam([{"params": [p]} for p in run.params], lr=0.1)
    run.opt = CyclicalOptimizer(inner, backend="triton", step_size_up=4)
    run.eager(0)
    graph = run.capture()
    run.replay(graph, 1)
    run.opt.param_groups.pop()
    run.eager(2)
    run.opt.set_bounds(base_lr=0.0, max_lr=0.0)
    before = [p.detach().clone() for p in run.params]
    run.replay(graph, 3)
    for then, now in zip(before, run.params, strict=True):
        assert torch.equal(then, now)


def test_to_ask_moves_nothing():
    """On another stream the device's answer may be a moment old."""
    run = Run(BY_NAME["adam-wd"], capturable=True)
    run.eager(0)
    graph = run.capture()
    run.replay(graph, 1)
    before = device_position_writes(run.opt)
    assert run.opt.iteration == 2
    assert run.opt.get_last_lr() == pytest.approx([run.opt.param_groups[0]["lr"].item()])
    assert device_position_writes(run.opt) == before
    run.replay(graph, 2)
    run.eager(3)
    assert run.opt.iteration == 4


# ---- AMP


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam-cycled", "adamw-ams", "adagrad-decay"])
def test_fifty_overflows_move_nothing_and_nothing_waits(name, max_grad_norm):
    case = BY_NAME[name]
    amp, plain = (Run(case, max_grad_norm=max_grad_norm, shapes=[(5, 3), (40,)]) for _ in range(2))
    chance = random.Random(1)
    tries = [True] * 50 + [False] * 12
    chance.shuffle(tries)
    taken = 0
    created = False
    for overflow in tries:
        scaled(amp, taken, 2.0 ** chance.randrange(20), overflow)
        if created:  # the host must know whether the step that creates state happened
            with nothing_waits():
                amp.opt.step()
        else:
            amp.opt.step()
        created = created or not overflow
        if not overflow:
            plain.eager(taken)
            taken += 1
    assert taken == 12
    assert_together(amp, plain)
    if max_grad_norm:
        assert torch.equal(amp.opt.grad_norm, plain.opt.grad_norm) or tries[-1]


@pytest.mark.parametrize("capturable", [False, True])
def test_unscaling_clipping_and_skipping_in_a_graph(capturable):
    case = BY_NAME["adam-wd"]
    amp, plain = (Run(case, max_grad_norm=0.5, capturable=flag) for flag in (capturable, False))
    amp.eager(0)
    plain.eager(0)
    amp.opt.grad_scale = torch.ones((), device=DEVICE)
    amp.opt.found_inf = torch.zeros((), device=DEVICE)
    graph = amp.capture()
    taken = 1
    for k in range(12):
        scale, overflow = 2.0**k, k % 3 == 1
        amp.opt.grad_scale.fill_(scale)
        amp.opt.found_inf.fill_(float(overflow))
        for static, grad in zip(amp.static, amp.draw(taken), strict=True):
            static.copy_(grad * scale)
        if overflow:
            amp.static[0][0, 0] = float("inf")
        graph.replay()
        if not overflow:
            plain.eager(taken)
            taken += 1
        lr = amp.opt.param_groups[0]["lr"]
        if capturable:
            assert lr.item() == pytest.approx(plain.opt.param_groups[0]["lr"], rel=1e-6)
    assert amp.opt.iteration == plain.opt.iteration == taken
    for a, b in zip(amp.params, plain.params, strict=True):
        assert torch.equal(a, b)
    for p, q in zip(amp.params, plain.params, strict=True):
        assert amp.opt.state[p]["step"].item() == plain.opt.state[q]["step"].item() == taken


@pytest.mark.parametrize("how", ["cycle-end hook", "scale_fn"])
def test_where_the_host_must_know_it_asks(how):
    case = BY_NAME["adam-wd"]
    run, plain = Run(case), Run(case)
    ends: list[int] = []
    options: Any = {"step_size_up": 3, "backend": "triton"}
    if how == "scale_fn":
        options |= {"scale_fn": lambda x: 0.9**x, "scale_mode": "iterations"}
    for r in (run, plain):
        r.opt = CyclicalOptimizer(case.make(r.params), **options)
    if how != "scale_fn":
        run.opt.register_cycle_end_hook(lambda opt: ends.append(opt.iteration))
    taken = 0
    for k in range(18):
        scaled(run, taken, 8.0, k % 3 == 2)
        run.opt.step()
        if k % 3 != 2:
            plain.eager(taken)
            taken += 1
    assert_together(run, plain)
    assert ends == ([6, 12] if how != "scale_fn" else [])


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.RMSprop])
def test_overflows_where_momentum_cycles_down_to_0(cls):
    """A step without momentum leaves the buffer alone, and another kernel takes it."""
    found = []
    for with_overflows in (True, False):
        param = torch.nn.Parameter(torch.ones(5, device=DEVICE))
        opt = CyclicalOptimizer(
            cls([param], lr=0.1, momentum=0.9), step_size_up=2, cycle_momentum=True,
            base_momentum=0.0, max_momentum=0.9, backend="triton",
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for k in range(14):
            grad = torch.randn(5, generator=generator).to(DEVICE)
            overflow = k in (3, 4, 8)
            if overflow and not with_overflows:
                continue
            param.grad = grad / 0.0 if overflow else grad
            if with_overflows:
                opt.grad_scale = torch.ones((), device=DEVICE)
                opt.found_inf = torch.full((), float(overflow), device=DEVICE)
            opt.step()
        assert opt.iteration == 11
        found.append(param.detach())
    assert torch.equal(*found)


def test_equal_runs_clip_to_equal_bits():
    def run() -> Run:
        r = Run(BY_NAME["adamw-ams"], max_grad_norm=0.1, shapes=[(9000,), (33, 7), (5,)])
        for k in range(3):
            r.eager(k)
        return r

    a, b = run(), run()
    assert_identical(a.opt, b.opt)
    assert torch.equal(a.opt.grad_norm, b.opt.grad_norm)


# ---- on a GPU


def _pull(params: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return a loss whose gradients have the same bits on every device."""
    return sum(((p - t) ** 2).sum() for p, t in zip(params, targets, strict=True))


@on_gpus
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_a_whole_training_step_in_a_graph(case):
    """The backward pass writes gradients into the graph's memory."""
    runs = [Run(case, max_grad_norm=10.0) for _ in range(2)]
    targets = [torch.zeros_like(p) for p in runs[0].params]

    def step(run: Run) -> None:
        run.opt.zero_grad()
        _pull(run.params, targets).backward()
        run.opt.step()

    def feed(k: int) -> None:
        for target, value in zip(targets, runs[0].draw(k), strict=True):
            target.copy_(value)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for k in range(3):
            feed(k)
            for run in runs:
                step(run)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    runs[0].opt.zero_grad()
    with torch.cuda.graph(graph):
        step(runs[0])
    for k in range(3, 503):
        feed(k)
        graph.replay()
        step(runs[1])
    assert_together(*runs)


@on_gpus
@pytest.mark.parametrize("name", ["adam-wd", "sgd-nest-wd", "adagrad-decay"])
def test_a_gradscalers_fused_path(name):
    """Neither the scaler nor our step waits for the device."""
    amp, plain = (Run(BY_NAME[name], fused=True, foreach=False) for _ in range(2))
    if not getattr(amp.opt, "_step_supports_amp_scaling", False):
        pytest.skip("this torch has its GradScaler decide for it, as 2.11's for Adagrad")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30, growth_interval=4)
    taken = 0
    for k in range(40):
        overflow = k % 3 == 1
        for param, grad in zip(amp.params, amp.draw(taken), strict=True):
            param.grad = scaler.scale(grad)
        if overflow:
            amp.params[0].grad[0, 0] = float("nan")
        if k > 1:
            with nothing_waits():
                scaler.step(amp.opt)
                scaler.update()
        else:
            scaler.step(amp.opt)
            scaler.update()
        if not overflow:
            plain.eager(taken)
            taken += 1
    assert_together(amp, plain)


@on_gpus
def test_a_steady_step_does_not_wait():
    run = Run(BY_NAME["adamw-ams"], max_grad_norm=0.5)
    for k in range(3):
        run.eager(k)
    for k in range(3, 20):
        for param, grad in zip(run.params, run.draw(k), strict=True):
            param.grad = grad
        with nothing_waits():
            run.opt.step()
            run.opt.zero_grad()


@on_gpus
# torch warns when a thread of autograd is the first to multiply matrices.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA")
def test_beside_other_users_of_graphs():
    """``make_graphed_callables`` and ``reduce-overhead`` around the model, our step outside."""
    torch.manual_seed(0)
    for wrap in (
        lambda m: torch.cuda.make_graphed_callables(m, (torch.randn(8, 20, device=DEVICE),)),
        lambda m: torch.compile(m, mode="reduce-overhead"),
    ):
        plain = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 2)).to(DEVICE)
        graphed = copy.deepcopy(plain)
        case = BY_NAME["adam-wd"]
        pairs = [
            (wrap(graphed), case.ours(graphed.parameters(), backend="triton")),
            (plain, case.ours(plain.parameters(), backend="triton")),
        ]
        for k in range(6):
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(k)).to(DEVICE)
            for model, opt in pairs:
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()
        for a, b in zip(graphed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b)
