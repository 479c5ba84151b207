"""An optimizer on the CPU whose steps make launches on the stub driver."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import stub_helpers
import torch
from internals import backend_of, plan_of

from clr_optim import CyclicalOptimizer

DRIVER = stub_helpers.Stub()
stub_helpers.set_stream()

#: the stub's address of a table of gradients' addresses
TABLE = 0xAB00

LAUNCH, UPLOAD, WAIT = "cuLaunchKernel", "cuMemcpyHtoDAsync_v2", "cuEventSynchronize"

#: the slots of a ring, see ring.h
SLOTS = 8

# The parameters of the kernel.
SIZES = (8, 4, 4, 8)
PARAMETERS = struct.pack("@QIiQ", 0x1234, 7, -7, 0)


def fresh_driver() -> Iterator[stub_helpers.Stub]:
    """Yield the stub driver before any call."""
    DRIVER.reset()
    yield DRIVER
    DRIVER.reset()


class Bound:
    """An optimizer whose plan launches a kernel of the stub instead of the CPU's kernels."""

    def __init__(self, count: int = 3, **options: Any) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(count)]
        self.opt: Any = CyclicalOptimizer(
            torch.optim.SGD(self.params, lr=0.5), "triangular", step_size_up=5, backend="native"
        )
        self.watch: list[object] = []
        self.kernel = DRIVER.function(SIZES)
        self.spare: list[Any] = []  # keeps freed memory from other gradients
        self.move()
        self.opt.step()
        self.opt.step()  # makes the course
        self.launches: Any = None
        self.bind(**options)
        DRIVER.take()

    @property
    def plan(self) -> Any:
        return plan_of(self.opt).native

    @property
    def bucket(self) -> Any:
        (bucket,) = plan_of(self.opt).buckets
        return bucket.native

    @property
    def addresses(self) -> bytes:
        return bytes(self.bucket.gradients())

    def made(self, table: int = TABLE, **options: Any) -> Any:
        """Return new launches: one kernel."""
        lib = plan_of(self.opt).lib
        launches = lib.Launches(0, self.watch, **options)
        launches.add_bucket(self.bucket, table=table)
        self.add(launches)
        return launches

    def add(self, launches: Any, **changes: Any) -> None:
        launch = {
            "function": self.kernel,
            "grid": (5, 1, 1),
            "threads": 256,
            "shared": 16,
            "parameters": PARAMETERS,
            "sizes": SIZES,
            "keep": None,
        }
        launches.add_launch(**{**launch, **changes})

    def bind(self, **options: Any) -> None:
        self.launches = self.made(**options)
        self.plan.bind(self.launches)

    def move(self, *rows: int) -> None:
        """Give the parameters of these rows, or all, gradients in new memory."""
        for i in rows or range(len(self.params)):
            self.spare.append(self.params[i].grad)
            self.params[i].grad = torch.ones(4)

    def step(self) -> int:
        """Take a step in native code; return its outcome."""
        lib = plan_of(self.opt).lib
        outcome = self.plan.step(vars(self.opt))
        if outcome == lib.OUT_OF_VALUES:
            shared = self.opt._shared
            launches = self.plan.launches
            assert shared.ordinary._hand_down(
                backend_of(self.opt), plan_of(self.opt), vars(self.opt)
            )
            assert self.plan.launches is launches
            outcome = self.plan.step(vars(self.opt))
        return outcome

    def outcome(self, name: str) -> int:
        number: int = getattr(plan_of(self.opt).lib, name)
        return number
