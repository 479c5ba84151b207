"""Events that step: plain, with closures, hooks and threads, by a GradScaler, at rate 0."""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

import torch
from native_helpers import failure, like, members
from torch import Tensor

from fuzz.events import FLAG, SEEDS, WHICH, BoomError, boom, event
from fuzz.expected import POLICIES
from fuzz.pair import add_cycle_end_hook
from fuzz.tensor_events import TensorEvents


class StepEvents(TensorEvents):
    """Step in every way that torch allows."""

    @event(9.0)
    def step(self) -> None:
        if self.stale > 4:
            self.backward(self.expected.position)
        self.take(lambda opt: opt.step())

    @event(7.0, seed=SEEDS)
    def train(self, seed: int) -> None:
        self.zero_grad(True)
        self.backward(seed)
        self.step()

    @event(2.0, seed=SEEDS, i=WHICH)
    def train_one_alone(self, seed: int, i: int) -> None:
        """Give a gradient to one parameter only, as with an adapter or an expert."""
        self.backward(seed)
        for opt in self.pair():
            chosen = members(opt)[i % len(members(opt))]
            for p in members(opt):
                if p is not chosen:
                    p.grad = None
        self.step()

    @event(0.5, seed=SEEDS)
    def step_while_others_save(self, seed: int) -> bool | None:
        """Save in another thread, as asynchronous checkpointing and logging do."""
        if self.backend == "triton":
            return False
        self.backward(seed)
        raised: list[BaseException] = []
        over = threading.Event()

        def save() -> None:
            try:
                while not over.is_set():
                    groups = self.ours.state_dict()["param_groups"]
                    assert len({group["clr_step"] for group in groups}) <= 1
                    assert self.ours.iteration >= 0
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=save, daemon=True)
        thread.start()
        try:
            for _ in range(3):
                self.take(lambda opt: opt.step())
        finally:
            over.set()
            thread.join()
        if raised:
            raise raised[0]
        return None

    @event(0.2)
    def step_in_a_fork(self) -> bool | None:
        """Step the copy in a fork. Nothing moves in this process."""
        if self.backend == "triton" or not hasattr(os, "fork"):
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            failure(lambda opt: opt.step(), self.ours)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        return None

    @event(1.5, seed=SEEDS)
    def step_with_closure(self, seed: int) -> None:
        def closure() -> float:
            self.fill(self.ours, seed)
            return 2.5

        self.stale = 0
        self.fill(self.twin, seed)

        def call(opt: Any) -> None:
            assert opt.step(closure) == 2.5

        self.take(call)

    @event(0.7, seed=SEEDS)
    def exception_in_closure(self, seed: int) -> None:
        """No step was taken; the gradients are new."""
        self.backward(seed)

        def closure() -> float:
            self.fill(self.ours, seed)
            raise BoomError

        assert type(failure(lambda opt: opt.step(closure), self.ours)) is BoomError

    @event(0.7, inner=FLAG)
    def exception_in_pre_hook(self, inner: bool) -> None:
        handle = (self.ours.optimizer if inner else self.ours).register_step_pre_hook(boom)
        try:
            assert type(failure(lambda opt: opt.step(), self.ours)) is BoomError
        finally:
            handle.remove()

    @event(0.7, inner=FLAG)
    def exception_in_post_hook(self, inner: bool) -> None:
        handle = (self.ours.optimizer if inner else self.ours).register_step_post_hook(boom)
        try:
            self.take(lambda opt: opt.step(), late=True)
        finally:
            handle.remove()

    @event(0.5)
    def exception_in_cycle_end_hook(self) -> None:
        ends = POLICIES[self.expected.policy].schedule.is_cycle_end(self.expected.position + 1)
        handle = add_cycle_end_hook(self.ours, boom)
        try:
            self.take(lambda opt: opt.step(), late=ends)
        finally:
            handle.remove()

    @event(0.5)
    def step_at_rate_zero(self) -> bool | None:
        """Step as torch's distributed checkpoint does to create state."""
        if self.overwritten and self.expected.momenta is not None:
            return False  # the step reads the momentum from the groups, and nothing else
        for opt in self.pair():
            for p in members(opt):
                p.grad = torch.zeros_like(p) if p.requires_grad else None

        def call(opt: Any) -> None:
            lrs = [group["lr"] for group in opt.param_groups]
            for group, lr in zip(opt.param_groups, lrs, strict=True):
                group["lr"] = torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0
            try:
                opt.step()
            finally:
                for group, lr in zip(opt.param_groups, lrs, strict=True):
                    group["lr"] = lr

        self.take(call, rates=[0.0] * len(self.ours.param_groups), moves=False)
        self.expected.feed_rates(self.twin)  # a checkpoint of the twin must hold a rate in use
        return None

    @event(1.5, seed=SEEDS, bad=("inf", "nan", "1e35"))
    def try_a_step_that_is_skipped(self, seed: int, bad: str) -> bool | None:
        """Step with a gradient that ``skip_above`` refuses: nothing moves."""
        if self.skip is None or getattr(self.case, "closure", False):
            return False
        some = [p for p in members(self.ours) if p.requires_grad and p.numel()]
        if not some:
            return False
        self.zero_grad(True)
        self.fill(self.ours, seed)
        grad = some[seed % len(some)].grad
        grad[(0,) * grad.dim()] = float(bad)
        skipped = self.ours.skipped
        error = failure(lambda opt: opt.step(), self.ours)
        if error is not None:
            assert self.masters, error
            assert "its state lacks" in str(error), error
            self.zero_grad(True)
            return False
        assert self.ours.skipped == skipped + 1
        self.zero_grad(True)
        return None

    @event(2.0, seed=SEEDS, overflow=(False, False, True), power=range(4), unscales=FLAG)
    def step_by_grad_scaler(self, seed: int, overflow: bool, power: int, unscales: bool) -> Any:
        """Step by a GradScaler, on the path that the optimizer asks for."""
        if self.in_backward:
            return False
        whole = getattr(self.ours, "_step_supports_amp_scaling", False)
        if torch.float16 in self.dtypes and (unscales or not whole):
            return False  # a GradScaler refuses to unscale float16
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (2 * power))
        scaler.scale(torch.zeros(()))
        self.stale = 0
        for opt, scale in ((self.twin, 1.0), (self.ours, scaler.get_scale())):
            for i, p in enumerate(members(opt)):
                grad = like(self.normal(p.shape, seed + i), p) * scale
                p.grad = grad if p.requires_grad else None
        grads = [p.grad for p in members(self.ours) if p.grad is not None and p.grad.numel()]
        if not grads:
            return False
        if unscales:
            scaler.unscale_(self.ours)
        if overflow:
            if unscales:  # unscale_ has already looked for overflows
                return False
            bad = grads[seed % len(grads)]
            bad[(0,) * bad.dim()] = float("inf")
            scaler.step(self.ours)
        else:
            self.take(lambda opt: scaler.step(opt))
            for name in ("grad_scale", "found_inf"):  # a step that raised has left them
                self.ours.__dict__.pop(name, None)
        for opt in self.pair():
            for p in members(opt):
                p.grad = None
        return None
