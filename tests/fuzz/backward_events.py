"""Events in which our parameters are updated by hooks in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from internals import drop_pass
from native_helpers import failure, members

from fuzz.events import FLAG, SEEDS, WHICH, event
from fuzz.step_events import StepEvents


class BackwardEvents(StepEvents):
    """Step in backward, once or until further notice. The twin takes ordinary steps."""

    @event(1.0)
    def turn_hooks_on_or_off(self) -> bool | None:
        if self.in_backward:
            self.handle.remove()
            return None
        if isinstance(failure(self._begin, self.ours), ValueError):
            return False  # no kernel serves, or gradients are clipped
        return None

    def _begin(self, opt: Any) -> None:
        self.handle = opt.step_in_backward()

    @event(6.0, seed=SEEDS, left_out=WHICH, leaves_one=FLAG, waits=(False, False, True))
    def train_in_backward(
        self, seed: int, left_out: int, leaves_one: bool, waits: bool
    ) -> bool | None:
        """Give gradients by autograd. One parameter may get none, or have one before the pass."""
        if not self.in_backward:
            self.turn_hooks_on_or_off()
        if not self.in_backward:
            return False
        self.zero_grad(True)
        self.fill(self.twin, seed)
        self.stale = 0
        ours, twins = members(self.ours), members(self.twin)
        chosen = left_out % len(ours)
        if leaves_one:
            twins[chosen].grad = None
        terms = []
        for i, (p, q) in enumerate(zip(ours, twins, strict=True)):
            if q.grad is None:
                continue
            if waits and i == chosen:
                p.grad = q.grad.clone()  # as if set by other code, for the step
            else:
                terms.append((p * q.grad).sum().double())
        before = self.expected.position

        def call(opt: Any) -> None:
            try:
                if terms:
                    torch.stack(terms).sum().backward()
                opt.step()
            except Exception:
                drop_pass(opt)  # the caller restores all tensors
                raise

        self.take(call)
        if self.expected.position > before:
            for p in twins:
                p.grad = None
            for p in ours:
                p.grad = None
        return None

    @event(0.5, seed=SEEDS)
    def refuse_a_second_gradient(self, seed: int) -> bool | None:
        """The second of two backward passes raises, and writes nothing."""
        if not self.in_backward or seed % 2:
            return False
        before = [self.snapshot(opt) for opt in self.pair()]
        self.zero_grad(True)
        self.fill(self.twin, seed)
        some = [
            (p, q.grad)
            for p, q in zip(members(self.ours), members(self.twin), strict=True)
            if q.grad is not None and p._post_accumulate_grad_hooks
        ]
        if not some:
            return False
        error = None
        for _ in range(2):
            loss = torch.stack([(p * g).sum().double() for p, g in some]).sum()
            error = failure(lambda _, loss=loss: loss.backward(), self.ours)  # type: ignore[misc]
        is_left = any(p.grad is not None for p, _ in some)
        assert isinstance(error, RuntimeError) or is_left, error
        drop_pass(self.ours)
        for opt, saved in zip(self.pair(), before, strict=True):
            self.restore(opt, saved)
        return None
