"""Threads, forks and signals run other code during a step. No step is half done.

A long native step releases the GIL. The kernel's memory must then stay alive, whichever tensors
another thread drops. An interrupt must find the step done or not begun.
"""

from __future__ import annotations

import _thread
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import pytest
import torch
from internals import (
    act_before_native_steps,
    backend_of,
    bare_native_backend,
    bare_step,
    fail_native_launches,
    plan_of,
)
from native_helpers import (
    BY_NAME,
    KERNELS,
    assert_alike,
    assert_identical,
    drawn,
    feed,
    members,
    parameters,
    threads,
    wrapped,
)

from clr_optim import CyclicalOptimizer
from clr_optim.plan import Bucket, Plan

#: Long enough for the GIL to be released and for other threads to run.
LONG = 1 << 22
PATIENCE_S = 60.0


def view(opt):
    """Return the native plan, which tells whether a step uses it."""
    return plan_of(opt).native


def given(opt, seed=1):
    """Give gradients to all parameters."""
    for p, grad in zip(
        members(opt), drawn([p.shape for p in members(opt)], p0(opt).dtype, seed), strict=True
    ):
        p.grad = grad


def p0(opt):
    return members(opt)[0]


@contextmanager
def beside(work):
    """Run other work in another thread. Its exception is raised here."""
    raised = []

    def caught():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=caught, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


def in_turns(*works):
    """Run all of them at once, each in another thread."""
    raised = []
    gate = threading.Barrier(len(works))

    def caught(work):
        try:
            gate.wait(PATIENCE_S)
            work()
        except BaseException as error:
            raised.append(error)

    running = [threading.Thread(target=caught, args=(work,), daemon=True) for work in works]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


def seen_busy(opt):
    """Wait until another thread's step has released the GIL. Return False if no step did."""
    deadline = time.monotonic() + PATIENCE_S
    while not view(opt).busy:
        if time.monotonic() > deadline:
            return False
    return True


# ---- gradients that another thread drops


@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clipped"])
def test_gradients_dropped_while_a_step_reads_them(clip):
    """The gradients live until the step is over, and no longer."""
    shapes = [(LONG,), (LONG // 2,), (7,)]
    ours = BY_NAME["sgd-mom"].ours(parameters(drawn(shapes, torch.float32)), max_grad_norm=clip)
    calm = BY_NAME["sgd-mom"].ours(parameters(drawn(shapes, torch.float32)), max_grad_norm=clip)
    for opt in (ours, calm):
        given(opt)
        opt.step()
    dropped = []

    def drop():
        assert seen_busy(ours)
        grads = [weakref.ref(p.grad) for p in members(ours)]
        for p in members(ours):
            p.grad = None
        # A step takes milliseconds, this takes longer. Only what happens within the step counts.
        alive = all(grad() is not None for grad in grads)
        if view(ours).busy:
            dropped.append((alive, grads))

    deadline = time.monotonic() + PATIENCE_S
    seed = 2
    while not dropped:
        assert time.monotonic() < deadline, "no step was long enough to be seen"
        for opt in (ours, calm):
            given(opt, seed)
        seed += 1
        with beside(drop):
            while not view(ours).busy and not dropped:
                if p0(ours).grad is None:  # dropped after the step was over
                    break
                ours.step()
                calm.step()
        assert_identical(ours, calm)
    [(alive, grads)] = dropped
    assert alive
    assert all(grad() is None for grad in grads)


@pytest.mark.parametrize("size", [5, LONG // 64], ids=["short", "long"])
@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clipped"])
def test_gradients_dropped_before_the_kernels_look_at_them(size, clip, monkeypatch):
    """Another thread may drop them in the middle of step(), and write to freed memory at once.

    They then count as dropped before the step.
    """
    ours, calm = (
        BY_NAME["adam-wd"].ours(
            parameters(drawn([(size,)] * 20, torch.float64)), max_grad_norm=clip
        )
        for _ in range(2)
    )
    swept = []

    def zero_grad_of_another_thread(backend):
        if backend is backend_of(ours):
            dropped = members(ours)[len(swept) :: 2]
            for p in dropped:
                p.grad = None
            swept.append([torch.full((size,), float("nan"), dtype=torch.float64) for _ in dropped])

    act_before_native_steps(monkeypatch, zero_grad_of_another_thread)
    for seed in range(4):  # the first one builds the plan
        for opt in (ours, calm):
            given(opt, seed)
        for p in members(calm)[seed::2]:
            p.grad = None
        ours.step()
        calm.step()
        # The rows have another order, and so have the squares in the sum of a norm.
        (assert_identical if clip is None else assert_alike)(ours, calm)
        assert ours.iteration == calm.iteration == seed + 1
    assert len(swept) == 4


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_nothing_holds_a_gradient_after_the_step(case):
    opt = case.ours(parameters(drawn([(4, 3), (5,), ()], torch.float64)))
    for seed in range(3):
        given(opt, seed)
        grads = [weakref.ref(p.grad) for p in members(opt)]
        opt.step()
        opt.zero_grad()
        assert [grad() for grad in grads] == [None] * 3


def test_a_forgotten_plan_holds_no_gradient():
    opt = BY_NAME["adam-wd"].ours(parameters(drawn([(4,)], torch.float64)))
    given(opt)
    opt.step()
    plan = plan_of(opt)
    for let_go in (plan.forget, plan.release):
        given(opt)
        plan.refresh()
        grad = weakref.ref(p0(opt).grad)
        opt.zero_grad()
        assert grad() is not None
        let_go()
        assert grad() is None


@pytest.mark.parametrize("how", ["overflow", "exception"])
def test_a_step_that_was_not_taken_holds_no_gradient(how, monkeypatch):
    opt = BY_NAME["adam-wd"].ours(parameters(drawn([(4,)], torch.float64)))
    given(opt)
    opt.step()
    given(opt)
    grad = weakref.ref(p0(opt).grad)
    if how == "overflow":
        opt.found_inf = torch.ones(())  # as a GradScaler's fused path says it
        opt.step()
        del opt.found_inf
    else:
        act_before_native_steps(monkeypatch, lambda backend: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opt.step()
    assert grad() is not None
    opt.zero_grad()
    assert grad() is None
    assert opt.iteration == 1


# ---- several threads, several optimizers


def run(opt, steps=40):
    for seed in range(steps):
        given(opt, seed)
        opt.step()
    return opt


@pytest.mark.parametrize("size", [30, 40_000], ids=["short", "long"])
def test_two_optimizers_in_two_threads(size):
    def make(name):
        return BY_NAME[name].ours(parameters(drawn([(size,), (7, 3)], torch.float32)))

    names = ("adamw-ams", "sgd-nest-wd")
    alone, together = ([make(name) for name in names] for _ in range(2))
    with threads(2):
        for opt in alone:
            run(opt)
        in_turns(*(lambda opt=opt: run(opt) for opt in together))
    for one, two in zip(alone, together, strict=True):
        assert_identical(one, two)
        assert one.iteration == two.iteration == 40


@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clipped"])
def test_a_model_trained_by_several_optimizers(clip):
    """The optimizers take turns. Each has its own state, as with torch's."""
    names = ("sgd-mom", "adam-wd", "rmsprop-cent")
    params, twin_params = (parameters(drawn([(4, 3), (5,), ()], torch.float64)) for _ in range(2))
    mine = [BY_NAME[name].ours(params, max_grad_norm=clip) for name in names]
    torchs = [BY_NAME[name].make(twin_params) for name in names]
    for seed in range(30):
        i = seed % 3
        for opt in (mine[i], torchs[i]):
            given(opt, seed)
        feed(torchs[i], mine[i])
        mine[i].step()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(twin_params, clip)
        torchs[i].step()
        assert_alike(mine[i], torchs[i])
    assert [opt.iteration for opt in mine] == [10] * 3


@pytest.mark.parametrize("size", [9, 100_000], ids=["short", "long"])
def test_a_model_trained_by_several_optimizers_at_once(size):
    """Values race, as with torch's own. Optimizers, their state and their counters do not.

    The gradients are not replaced: torch 2.13 itself crashes when a thread reads ``p.grad`` while
    another replaces it, without any code of ours in the process.
    """
    params = parameters(drawn([(size,), (9,)], torch.float32))
    for p in params:
        p.grad = torch.ones_like(p)
    opts = [BY_NAME[name].ours(params) for name in ("adam", "adamw-ams", "sgd-mom")]

    def train(opt):
        for _ in range(60):
            opt.step()

    in_turns(*(lambda opt=opt: train(opt) for opt in opts))
    assert [opt.iteration for opt in opts] == [60] * 3
    assert all(p.isfinite().all() for p in params)
    for opt in opts[:2]:
        assert {opt.state[p]["step"].item() for p in params} == {60}
    # Without weight decay the state depends on the gradients alone.
    alone = BY_NAME["sgd-mom"].ours(parameters(drawn([(size,), (9,)], torch.float32)))
    for p in members(alone):
        p.grad = torch.ones_like(p)
    train(alone)
    for p, q in zip(params, members(alone), strict=True):
        one, two = opts[2].state[p]["momentum_buffer"], alone.state[q]["momentum_buffer"]
        assert torch.equal(one, two)


@pytest.mark.parametrize("size", [5, 100_000], ids=["short", "long"])
@pytest.mark.parametrize("clip", [None, 1e9], ids=["", "clipped"])
def test_one_optimizer_in_several_threads(size, clip):
    """The steps take turns: each is counted, none is lost, none sees another half-way."""
    params = parameters([torch.zeros(size, dtype=torch.float64), torch.zeros(3)], torch.float64)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.Adam(params, lr=1.0, eps=0.0)
    backend = bare_native_backend(optimizer)

    def train():
        for _ in range(50):
            backend.plan.refresh()
            bare_step(backend, 0.5, max_norm=clip)

    train()  # creates the state
    in_turns(train, train, train)
    for p in params:
        assert optimizer.state[p]["step"].item() == 200
        torch.testing.assert_close(p.detach(), torch.full_like(p, -100.0), rtol=1e-9, atol=0)


def test_threads_that_change_an_optimizer_while_another_steps_it():
    """The running step keeps the memory it works on. The next step sees the change."""
    params = parameters([torch.zeros(LONG // 8), torch.zeros(3)])
    optimizer = torch.optim.SGD(params, lr=1.0, momentum=0.5)
    backend = bare_native_backend(optimizer)
    done = threading.Event()

    def train():
        for _ in range(40):
            for p in params:
                p.grad = torch.ones_like(p)
            backend.plan.refresh()
            bare_step(backend, 0.5)
        done.set()

    def change():
        while not done.is_set():
            backend.plan.forget()
            optimizer.state = type(optimizer.state)(dict, optimizer.state)
            optimizer.param_groups[0]["momentum"] = 0.5
            time.sleep(0.001)

    in_turns(train, change)
    for p in params:
        assert (p == p.flatten()[0]).all()
        assert p.isfinite().all()


def test_a_save_waits_for_state_that_torchs_step_creates():
    """torch's own step runs without the lock, so the state may grow while a save reads it."""
    (weight,) = parameters(drawn([(3,)], torch.float32))
    inner = torch.optim.Adamax([weight])
    opt = CyclicalOptimizer(inner, backend="torch")
    whole, calls = inner.state_dict, []

    def growing():
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("dictionary changed size during iteration")
        return whole()

    inner.state_dict = growing
    assert opt.state_dict()["param_groups"][0]["clr_step"] == 0
    assert len(calls) == 3


def test_a_plan_that_is_forgotten_while_it_is_built_is_built_again(monkeypatch):
    """Its buckets are not complete yet, and the demand for a new plan must not be lost."""
    params = parameters([torch.zeros(5), torch.zeros(3)])
    optimizer = torch.optim.SGD(params, lr=1.0)
    backend = bare_native_backend(optimizer)
    for p in params:
        p.grad = torch.ones_like(p)
    begin, forgetting = Bucket.begin, []

    def beside_another(bucket, *args):
        if not forgetting:
            forgetting.append(pool.submit(backend.plan.forget))
            wait(forgetting, timeout=0.2)
        begin(bucket, *args)

    monkeypatch.setattr(Bucket, "begin", beside_another)
    with ThreadPoolExecutor() as pool:
        backend.plan.refresh()
        forgetting[0].result(PATIENCE_S)
    assert not backend.plan.is_current()
    backend.plan.refresh()
    bare_step(backend, 0.5)
    for p in params:
        assert torch.equal(p.detach(), torch.full_like(p, -0.5))


def test_the_number_of_threads_may_change_between_steps():
    for name in ("adam-wd", "rmsprop-mom-cent"):
        runs = []
        for counts in ([1], [1, 2, 3, 1, 4]):
            opt = BY_NAME[name].ours(
                parameters(drawn([(50_000,), (77,)], torch.float32)), max_grad_norm=0.5
            )
            for seed in range(10):
                given(opt, seed)
                with threads(counts[seed % len(counts)]):
                    opt.step()
            runs.append(opt)
        assert_identical(*runs)


# ---- the number of threads

_COUNT_THREADS = """
import json, os, sys, torch
from clr_optim import CyclicalOptimizer

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
counts = {"at first": count()}
big = torch.ones(1 << 20)

def step():
    p = torch.nn.Parameter(torch.zeros(1 << 20))
    p.grad = torch.ones_like(p)
    opt = CyclicalOptimizer(torch.optim.Adam([p]), max_grad_norm=1.0, backend="native")
    for _ in range(3):
        opt.step()

def multiply():
    for _ in range(3):
        big.mul(2.0).add_(1.0)

for name in sys.argv[1:]:
    {"step": step, "multiply": multiply}[name]()
    counts[name] = count()
print(json.dumps(counts))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="/proc is Linux's")
def test_our_threads_are_torchs():
    counts = {}
    for order in (("multiply", "step"), ("step", "multiply")):
        done = subprocess.run(
            [sys.executable, "-c", _COUNT_THREADS, *order],
            capture_output=True,
            text=True,
            check=True,
        )
        counts[order] = json.loads(done.stdout)
    for order, count in counts.items():
        assert count[order[0]] == count["at first"] + 1, counts
        assert count[order[1]] == count[order[0]], counts


# ---- processes


class Stepping(torch.utils.data.Dataset):
    """A dataset whose worker has inherited an optimizer and steps its copy."""

    def __init__(self, opt=None):
        self.opt = opt

    def __len__(self):
        return 24

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        moved = torch.zeros(())
        if self.opt is not None and torch.utils.data.get_worker_info() is not None:
            before = p0(self.opt).detach().clone()
            for p in members(self.opt):
                p.grad = torch.ones_like(p)
            self.opt.step()
            moved = (p0(self.opt) - before).abs().sum().detach()
        return torch.randn(6, generator=generator), moved


@pytest.mark.parametrize("inherits", [False, True], ids=["data", "stepping"])
def test_dataloader_workers_forked_after_a_step(inherits):
    """The thread pool does not outlive a fork. A worker must not wait for it."""

    def train(workers):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8_000), torch.nn.Linear(8_000, 1))
        opt = wrapped(torch.optim.Adam(model.parameters(), lr=0.01), max_grad_norm=1.0)
        data = Stepping(opt if inherits else None)
        for _ in range(2):
            loader = torch.utils.data.DataLoader(
                data,
                batch_size=4,
                num_workers=workers,
                multiprocessing_context="fork" if workers else None,
                timeout=PATIENCE_S if workers else 0,
            )
            opt.zero_grad()
            model(torch.ones(1, 6)).sum().backward()
            opt.step()  # the pool has threads now
            for inputs, moved in loader:
                assert not (inherits and workers) or (moved > 0).all()
                opt.zero_grad()
                model(inputs).square().sum().backward()
                opt.step()
        return opt

    with threads(2), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        plain, forked = train(0), train(2)
    assert plain.iteration == forked.iteration == 14
    assert_identical(plain, forked)


def _step_on(opt, results):
    torch.set_num_threads(1)
    given(opt, 2)
    opt.step()
    results.put((opt.iteration, p0(opt).detach().numpy()))


def test_a_fork_goes_on_with_its_own_copy():
    opt = BY_NAME["adam-wd"].ours(parameters(drawn([(40_000,)], torch.float32)))
    with threads(2):
        given(opt, 1)
        opt.step()
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            child = context.Process(target=_step_on, args=(opt, results))
            child.start()
        iteration, value = results.get(timeout=PATIENCE_S)
        child.join(PATIENCE_S)
        assert child.exitcode == 0
        assert opt.iteration == 1
        given(opt, 2)
        opt.step()
    assert iteration == opt.iteration
    assert torch.equal(torch.from_numpy(value), p0(opt).detach())


# ---- signals


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("signalled", ["process", "main thread"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_ctrl_c_during_a_step_finds_it_done(name, signalled):
    """The signal comes while the kernel runs.

    Then every value of every tensor has made the step.
    """
    size = LONG // 2
    params = parameters([torch.zeros(size), torch.zeros(size // 2), torch.zeros(3)])
    for p in params:
        p.grad = torch.ones_like(p)
    options = {"eps": 0.0} if name == "adam" else {}
    cls = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    opt = wrapped(cls(params, lr=1.0, **options), base_lr=1.0)
    opt.step()
    interrupted = 0
    sent = []

    def interrupt():
        if seen_busy(opt):
            sent.append(view(opt).busy)
            if signalled == "process":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                _thread.interrupt_main()

    steps = 1
    for _ in range(5):
        with beside(interrupt) as thread:
            deadline = time.monotonic() + PATIENCE_S
            try:
                while time.monotonic() < deadline:
                    opt.step()
                    steps += 1
                    if not thread.is_alive():
                        time.sleep(0.01)  # the signal is on its way
            except KeyboardInterrupt:
                interrupted += 1
        moved = {round(-p.detach().min().item(), 3) for p in params}
        moved |= {round(-p.detach().max().item(), 3) for p in params}
        assert len(moved) == 1, moved
        [moved] = moved
        # Whether the interpreter looked for signals before or after the kernel.
        assert moved in (steps, steps + 1)
        assert opt.iteration == opt.param_groups[0]["clr_step"] == moved
        if name == "adam":
            assert {opt.state[p]["step"].item() for p in params} == {moved}
        steps = int(moved)
    assert interrupted == len(sent) == 5


def test_ctrl_c_during_the_first_step_keeps_the_state_that_it_filled(monkeypatch):
    """The state is created before the kernel and handed over after it."""
    ours, calm = (
        BY_NAME["adam"].ours(parameters(drawn([(9,), (4,)], torch.float64))) for _ in "ab"
    )
    for opt in (ours, calm):
        given(opt)
    commit = Plan.commit

    def interrupted(self):
        monkeypatch.setattr(Plan, "commit", commit)
        raise KeyboardInterrupt

    monkeypatch.setattr(Plan, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours.step()
    calm.step()
    assert_identical(ours, calm)
    assert ours.iteration == calm.iteration == 1
    for opt in (ours, calm):
        opt.step()
    assert_identical(ours, calm)


def test_an_exception_before_the_kernel_leaves_no_state(monkeypatch):
    ours = BY_NAME["adam"].ours(parameters(drawn([(9,)], torch.float64)))
    before = p0(ours).detach().clone()
    given(ours)
    with monkeypatch.context() as patch:
        fail_native_launches(patch, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            ours.step()
    assert len(ours.state) == 0
    assert torch.equal(p0(ours), before)
    ours.step()
    assert ours.state[p0(ours)]["step"].item() == 1
