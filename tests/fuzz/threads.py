"""Threads step, save, add groups, fork and interrupt at once, for a given time.

    make fuzz-threads SECONDS=120

All gradients are 1 and the rate is constant, so that every step moves every value by the same. So
each value tells how many steps it has seen, and a value from freed memory gives itself away. Run it
with ``MALLOC_PERTURB_`` or under AddressSanitizer (CONTRIBUTING.md), which overwrite freed memory.
It looks for values that differ, a position that is not the number of steps, a checkpoint of two
steps at once, and a forked process that hangs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clr_optim import CyclicalOptimizer
from clr_optim.schedule import fixed

LR = 2.0**-10
SIZES = (1, 3, 1, 5_000, 1, 70_000)
#: Seconds after which a forked process is taken to hang.
PATIENCE = 20.0


def tensors(sizes: tuple[int, ...] = SIZES) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size)) for size in sizes]


class Round:
    """One optimizer that all threads use.

    Args:
        seed: decides what the round draws.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        momentum = self.random.choice([0.0, 0.5])
        clip = self.random.choice([None, 1e9])
        self.params = tensors()
        self.opt: Any = CyclicalOptimizer(
            torch.optim.SGD(self.params, lr=LR, momentum=momentum),
            fixed(LR),
            max_grad_norm=clip,
            backend="native",
        )
        self.momentum = momentum
        self.late: list[nn.Parameter] = []
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.steps = 0
        self.counting = threading.Lock()
        for p in self.params:
            p.grad = torch.ones_like(p)

    # ---- what the threads do, again and again

    def step(self) -> None:
        self.opt.step()
        with self.counting:
            self.steps += 1

    def backward(self) -> None:
        """Give new gradients. The old ones are freed, perhaps while a step reads them."""
        for p in (*self.params, *self.late):
            p.grad = torch.ones_like(p)

    def save(self) -> None:
        state = self.opt.state_dict()
        steps = {group["clr_step"] for group in state["param_groups"]}
        assert len(steps) == 1, f"a checkpoint of the steps {steps}"
        assert all(group["lr"] == LR for group in state["param_groups"])

    def ask(self) -> None:
        assert self.opt.get_last_lr()[0] == LR
        assert self.opt.iteration >= 0
        self.opt.explain()

    def add(self) -> None:
        """Add a group, by the wrapper or beneath it."""
        time.sleep(0.01)
        if len(self.late) > 30:
            return
        more = tensors((1, 7))
        if self.random.random() < 0.5:
            self.opt.add_param_group({"params": more, "base_lr": LR, "max_lr": LR})
        else:
            self.opt.optimizer.add_param_group({"params": more})
        self.late += more

    def fork(self) -> None:
        """Fork a child that steps its copy, while the other threads go on."""
        time.sleep(0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pid = os.fork()
        if pid == 0:
            signal.alarm(int(PATIENCE))
            torch.set_num_threads(1)
            self.opt.step()
            self.opt.state_dict()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"a forked process ended with status {status}"

    # ---- the round

    def run(self, seconds: float, works: list[Callable[[], None]]) -> None:
        def loop(work: Callable[[], None]) -> None:
            try:
                while not self.stop.is_set():
                    work()
            except BaseException as error:
                self.errors.append(error)
                self.stop.set()

        running = [threading.Thread(target=loop, args=(work,), daemon=True) for work in works]
        for thread in running:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        for thread in running:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a thread hangs"
        if self.errors:
            raise self.errors[0]

    def check(self) -> None:
        """Check that every value has seen whole steps, and the first tensors all steps."""
        assert self.opt.iteration == self.steps, (self.opt.iteration, self.steps)
        ends = [(float(p.detach().min()), float(p.detach().max())) for p in self.params]
        assert all(low == high for low, high in ends), f"values of one tensor part: {ends}"
        assert len(set(ends)) == 1, f"tensors part: {ends}"
        if not self.momentum:
            units = -ends[0][0] / LR
            assert units == self.steps, f"{units} steps seen and {self.steps} taken"
        for p in self.late:
            assert p.isfinite().all()
            assert (p == p.flatten()[0]).all()


def main(argv: list[str] | None = None) -> int:
    """Run rounds until the time is over. Return the exit code."""
    parser = argparse.ArgumentParser(prog="fuzz.threads", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--round", type=float, default=4.0, help="seconds of one round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-fork", action="store_true", help="sanitizers may not survive a fork")
    args = parser.parse_args(argv)
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    end, seed, steps = time.monotonic() + args.seconds, args.seed, 0
    while time.monotonic() < end:
        turn = Round(seed)
        works = [turn.step, turn.step, turn.backward, turn.save, turn.ask, turn.add]
        works += [] if args.no_fork else [turn.fork]
        left = min(args.round, max(0.1, end - time.monotonic()))
        try:
            turn.run(left, works)
            turn.check()
        except BaseException:
            print(f"seed {seed}", file=sys.stderr, flush=True)
            raise
        steps, seed = steps + turn.steps, seed + 1
    print(f"{seed - args.seed} rounds, {steps} steps, no value, position or checkpoint off")
    return 0


if __name__ == "__main__":
    sys.exit(main())
