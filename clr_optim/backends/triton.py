"""The Triton kernels: one launch per bucket updates its tensors at the device's own position.

Everything a kernel reads beside the tensors lies in tables on the device, uploaded only when they
changed: pointers, groups, phases, the position in the schedule. The last is advanced on the device
too, so that nothing has to come from the host for the next step but where the gradients lie.

**Graphs.** A step captured into a CUDA graph cycles at every replay, since the graph reads and
advances the device's position. It goes on reading the tables it was captured with: those that
describe its tensors are left to it for good, and later steps make themselves new ones; position,
bounds and settings it shares with them. What is uploaded while a graph is captured is read from the
host's memory again at every replay: only the gradients' addresses are, which are new by then, from
memory that is left to the graph as well.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.backends.base import Course, Gradients
from clr_optim.backends.native import BuildError, library
from clr_optim.plan import Bucket, Plan
from clr_optim.rules import UpdateRule
from clr_optim.schedule import Schedule, fixed
from clr_optim.sharding import no_sums, sum_over_ranks

__all__ = [
    "DEVICES", "TritonBackend", "is_capturing", "is_interpreted", "try_out", "why_no_triton",
    "why_not_unasked",
]  # fmt: skip

#: Device types that Triton compiles for; ROCm calls itself CUDA.
DEVICES = ("cuda", "xpu")

# Without CUDA or ROCm the function that would be asked is not there.
_HAS_GRAPHS = bool(torch.version.cuda or torch.version.hip)

#: The least that Triton compiles for, as its documentation has it.
_LEAST_CAPABILITY = (8, 0)

#: Where a kernel's own scalars begin in the groups' table, in step with its ``GROUP``.
_OWN = 7

_ADVANCED_AT_ONCE = 256
_SUMMED_AT_ONCE = 1024
# An empty table has no address to load from.
_NO_COUNTER = np.zeros((1, 2), dtype=np.int64)
_NO_RATE = np.zeros((1, 3), dtype=np.int64)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: for tests, not for training."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def why_no_triton() -> str | None:
    """Why there are no Triton kernels here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'clr-optim[triton]'"
    return None


def why_not_unasked(device: torch.device) -> str | None:
    """Why ``backend="auto"`` leaves tensors on a GPU to torch, or None; by name they are served."""
    if is_interpreted():
        return "TRITON_INTERPRET is set, and Triton's interpreter takes CPU tensors only"
    if device.type != "cuda" or torch.version.hip:
        name = "ROCm" if torch.version.hip else device.type.upper()
        return f"no GPU of {name} has run the kernels yet; backend='triton' asks for them"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        least, has = (".".join(map(str, each)) for each in (_LEAST_CAPABILITY, capability))
        return f"Triton compiles for GPUs of compute capability {least} and above, this has {has}"
    return None


def try_out(device: torch.device) -> None:
    """Launch a kernel.

    Raises:
        BuildError: if Triton cannot compile it here, for want of a compiler or of Python's headers.
    """
    try:
        with _guard(device):
            one = torch.ones((), dtype=torch.float32, device=device)
            _open(torch.empty(2, dtype=torch.float64, device=device), one, one - one)
    except Exception as error:  # of whatever kind: of compilers, drivers, Triton's own
        lines = str(error).strip().splitlines() or [""]
        raise BuildError(f"Triton on {device}: {type(error).__name__}: {lines[0]}") from error


def is_capturing() -> bool:
    """Whether what is launched now goes into a graph and is not run."""
    # Where no GPU has been used nothing is captured, and there may not even be a driver to ask.
    if not _HAS_GRAPHS or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return torch.cuda.is_current_stream_capturing()


class _Mirror:
    """A table of the host on the device, uploaded when it has changed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = b""
        self._staged: Tensor | None = None
        self.table: Tensor | None = None

    def put(self, table: npt.NDArray[Any]) -> Tensor:
        """The table on the device; a copy under way does not hold up the host."""
        now = table.tobytes()
        there = self.table is not None and self.table.shape == table.shape
        if there and now == self._last:
            return cast("Tensor", self.table)
        if is_capturing():
            raise RuntimeError(
                "step() cannot be captured now: tensors or settings of the optimizer changed since "
                "its last step, or that was captured itself; take a step, with the same parameters "
                "having gradients, and then capture"
            )
        if not there:
            dtype = torch.from_numpy(np.empty(0, table.dtype)).dtype
            self.table = torch.empty(table.shape, dtype=dtype, device=self._device)
        on_device = cast("Tensor", self.table)
        host = torch.from_numpy(table.copy())
        if self._device.type != "cpu":
            host = host.pin_memory()
        on_device.copy_(host, non_blocking=True)
        self._last = now
        return on_device

    def renew(self, table: npt.NDArray[Any]) -> None:
        """The rows of this table, as many as there is place for; further rows stay."""
        if self.table is None or self.table.shape[1:] != table.shape[1:]:
            return
        rows = np.frombuffer(self._last, table.dtype).reshape(self.table.shape).copy()
        count = min(len(rows), len(table))
        rows[:count] = table[:count]
        self.put(rows)

    def stage(self) -> None:
        """Have memory for :meth:`put_in_graph`, which can allocate none."""
        table = cast("Tensor", self.table)
        if self._staged is None or self._staged.shape != table.shape:
            pinned = self._device.type != "cpu"
            self._staged = torch.empty(
                table.shape, dtype=table.dtype, device="cpu", pin_memory=pinned
            )

    def put_in_graph(self, table: npt.NDArray[Any]) -> Tensor:
        """The table on the device, uploaded at every replay; :meth:`stage` and `give_up` around."""
        staged, on_device = cast("Tensor", self._staged), cast("Tensor", self.table)
        staged.numpy()[...] = table
        return on_device.copy_(staged, non_blocking=True)

    def give_up(self) -> tuple[Tensor | None, Tensor | None]:
        """The table and what it is uploaded from, from now on somebody else's."""
        given = self.table, self._staged
        self.table = self._staged = None
        return given


class _Launch:
    """A bucket's tables: its rows, and which chunks of them there are to update."""

    def __init__(self, bucket: Bucket) -> None:
        from clr_optim.kernels.triton import multi_tensor

        self.bucket = bucket
        block = multi_tensor.shape_of(bucket.dtype.itemsize).block
        self._chunk = block * multi_tensor.BLOCKS_PER_CHUNK
        # Compiled for aligned tensors and for others, though mostly only one of them is.
        self._compiled_for = [
            {
                **multi_tensor.constexprs(
                    bucket.kernel, len(bucket.slots), bucket.dtype, bucket.counter_dtype, aligned
                ),
                **multi_tensor.options(bucket.dtype, _warp(bucket.device)),
            }
            for aligned in (False, True)
        ]
        self._aligned = False
        self._loaded: set[bool] = set()
        self._active = b""
        self._rows = _Mirror(bucket.device)
        self._uploaded = bucket.table[:0]
        self._unchanged = b""
        self._chunks = _Mirror(bucket.device)
        self.chunks: Tensor | None = None
        #: how many programs that takes
        self.count = 0
        #: (address, whether it is a float64) of the step counters that this step moves on
        self.counters = np.zeros((0, 2), dtype=np.int64)

    def refresh(self) -> Tensor:
        """The rows on the device, chunks and counters in step with which of them are active."""
        table = self.bucket.table
        whole = table.tobytes()
        if whole == self._unchanged:  # as nearly all steps find it
            return cast("Tensor", self._rows.table)
        self._unchanged = b""
        active = table["active"]
        now = active.tobytes()
        if now != self._active or self.chunks is None:
            rows = np.flatnonzero(active)
            chunks = -(-table["numel"][rows] // self._chunk)
            first = np.cumsum(chunks) - chunks
            of_row = np.repeat(rows, chunks)
            index = np.arange(len(of_row)) - np.repeat(first, chunks)
            pairs = np.stack([of_row, index], axis=1).astype(np.int32)
            # A capture may refuse this, and then all must stay as it was.
            self.chunks = self._chunks.put(pairs) if len(pairs) else None
            self.count = len(pairs)
            addresses = table["counter"][rows]
            wide = np.full(len(rows), self.bucket.wide_counter, dtype=np.int64)
            self.counters = np.stack([addresses, wide], axis=1)[addresses != 0]
            self._active = now
        if not is_capturing():
            on_device = self._rows.put(_words(table))
            self._rows.stage()
            self._uploaded = table.copy()
            self._unchanged = whole
            return on_device
        # New gradients, which live in the graph's own memory, are all that may be new.
        rest = table.copy()
        rest["grad"] = self._uploaded["grad"] if len(self._uploaded) == len(table) else 0
        on_device = self._rows.put(_words(rest))
        if np.array_equal(rest["grad"], table["grad"]):
            return on_device
        return self._rows.put_in_graph(_words(table))

    def give_up(self) -> list[object]:
        """The tables, which are a graph's from now on."""
        tables = [self._rows.give_up(), self._chunks.give_up()]
        self.chunks = None
        self._unchanged = b""
        return [*tables]

    def choose(self) -> None:
        """Choose the kernels by whether gradients are as aligned as all else.

        Raises:
            RuntimeError: if they were never launched, and this is a capture, which can load none.
        """
        grads = self.bucket.table["grad"]
        self._aligned = self.bucket.aligned and not int(np.bitwise_or.reduce(grads)) & 15
        if is_capturing() and self._aligned not in self._loaded:
            self._aligned = False  # which serve all
            if self._aligned not in self._loaded:
                raise RuntimeError(
                    "step() cannot be captured now: not all gradients begin at multiples of 16 "
                    "bytes, as they did in the steps before; take a step with gradients in the "
                    "memory that the capture gives them, and then capture"
                )
        self._loaded.add(self._aligned)

    @property
    def compiled_for(self) -> dict[str, Any]:
        """Constants and options of the kernel."""
        return self._compiled_for[self._aligned]

    @property
    def squares_compiled_for(self) -> dict[str, Any]:
        """The same of :func:`sum_of_squares`."""
        both = self._compiled_for[self._aligned]
        return {k: v for k, v in both.items() if k not in ("KERNEL", "SLOTS", "COUNTER")}


def _words(table: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return table.view(np.int64).reshape(len(table), -1)


class _Position:
    """The position in the schedule, and the phases, on one device."""

    def __init__(self, device: torch.device, schedule: Schedule) -> None:
        from clr_optim.kernels.triton.schedule import phase_tables

        self.device = device
        self._expected: tuple[int, int] | None = None
        self._control = torch.zeros(2, dtype=torch.int64, device=device)
        self._moving = schedule.scale_fn is None
        upload = [_Mirror(device) for _ in range(4)]
        constant = phase_tables(fixed())
        own = phase_tables(schedule) if self._moving else constant
        self._own = tuple(m.put(t) for m, t in zip(upload[:2], own, strict=True))
        self._constant = tuple(m.put(t) for m, t in zip(upload[2:], constant, strict=True))
        # Rates that the host decides are not to be left where a graph looks for bounds.
        # Those that were too small for a group added later are still some graph's to read.
        self._groups = [[_Mirror(device)] for _ in range(2)]
        self._groups_of: tuple[Any, ...] = ()
        self._counters = _Mirror(device)
        self._counters_of: list[npt.NDArray[np.int64]] = []
        self._rates = _Mirror(device)
        self._limit = _Mirror(device)
        #: scale and overflow where there is no GradScaler, in the dtype in which that has them
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.zero = torch.zeros((), dtype=torch.float32, device=device)
        #: the gate of a step that surely happens, its gradients as they are
        self.open = torch.empty(2, dtype=torch.float64, device=device)
        # By the kernel itself: first launched in a capture, it could not be loaded.
        _open(self.open, self.one, self.zero)
        #: where norms go, of replayed steps too
        self.norm: Tensor | None = None

    def join(self, other: _Position) -> None:
        """Stand where another device does, which may be known to that device alone."""
        self._control.copy_(other._control)
        self._expected = other._expected

    def ask(self) -> int:
        """The position, by the device's own count; waits for it."""
        position = int(self._control[0].item())
        if self._expected is not None:
            self._expected = (position, self._expected[1])
        return position

    def move_to(self, course: Course) -> None:
        """Go somewhere else at once."""
        self._expected = None
        self.control(course)

    @staticmethod
    def _wanted(course: Course) -> tuple[int, int]:
        return course.position, int(course.moves)

    def control(self, course: Course) -> Tensor:
        """``(position, what the step adds to it)``: written only if something else moved it."""
        wanted = self._wanted(course)
        if self._expected != wanted:
            if is_capturing():
                raise RuntimeError(
                    "step() cannot be captured now: the position in the cycle was moved since the "
                    "last step; take a step and then capture"
                )
            # By itself the position stays the device's: it may be another than the host believes.
            for i, value in enumerate(wanted):
                if self._expected is None or self._expected[i] != value:
                    self._control[i].fill_(value)
            self._expected = wanted
        return self._control

    def advanced(self, course: Course) -> None:
        """Remember where the device has gone; as far as the host knows."""
        step = 0 if is_capturing() else int(course.moves)
        if not course.moves:  # a graph's next replay does
            self._control[1].fill_(1)
        self._expected = (course.position + step, 1)

    def decides(self, course: Course) -> bool:
        """Whether the rates are evaluated on the device, not handed down by the host."""
        return self._moving and course.moves

    def groups(
        self, course: Course, scalars: npt.NDArray[np.float64], momentum: int | None
    ) -> Tensor:
        """The groups' table: what the schedule needs of each, and then the kernel's scalars."""
        on_device = self.decides(course)
        mirrors = self._groups[on_device]
        made_of = (
            on_device, tuple(course.bounds if on_device else course.rates), course.momenta,
            scalars[:, 1:].tobytes(), len(scalars),
        )  # fmt: skip
        if made_of == self._groups_of:
            return cast("Tensor", mirrors[-1].table)
        table = np.zeros((len(scalars), scalars.shape[1] + 4))
        table[:, 5:] = scalars[:, 1:]  # without the rate
        # A group may have been added since the last step, which the plan has not seen.
        rates = zip(course.rates, course.bounds, strict=True)
        for i, (rate, bounds) in zip(range(len(table)), rates, strict=False):
            table[i, :2] = bounds if on_device else (rate, rate)
            if course.momenta is not None and on_device:
                table[i, 2:4] = course.momenta[i]
                table[i, 4] = 1.0
                # The group's own follows the cycle; not looked at, it would change the table. Where
                # no kernel serves any group there is none.
                if momentum is not None and _OWN + momentum < table.shape[1]:
                    table[i, _OWN + momentum] = 0.0
        last = mirrors[-1].table
        if last is not None and last.shape != table.shape:
            mirrors.append(_Mirror(self.device))
        for older in mirrors[:-1]:
            older.renew(table)
        found = mirrors[-1].put(table)
        self._groups_of = made_of
        return found

    def counters(self, launches: list[_Launch]) -> tuple[Tensor, int]:
        """The step counters of all tensors that were updated, and how many there are."""
        tables = [launch.counters for launch in launches]
        count = sum(map(len, tables))
        there = self._counters.table
        if there is None or [*map(id, tables)] != [*map(id, self._counters_of)]:
            there = self._counters.put(np.concatenate(tables) if count else _NO_COUNTER)
            self._counters_of = tables
        return there, count

    def rates(self, course: Course) -> tuple[Tensor, int]:
        """Where the learning rates lie that are to be kept current, and how many there are."""
        lines = [
            (lr.data_ptr(), lr.dtype == torch.float64, group)
            for group, lr in course.kept
            if lr.device == self.device and self.decides(course)
        ]
        table = np.array(lines, dtype=np.int64).reshape(-1, 3)
        return self._rates.put(table if lines else _NO_RATE), len(lines)

    def limit(self, max_norm: float) -> Tensor:
        """What norms are clipped to."""
        return self._limit.put(np.array([max_norm]))

    def phases(self, course: Course) -> tuple[Tensor, ...]:
        """The phases' tables: the schedule's own, or those of a rate that is the group's upper."""
        return self._own if self.decides(course) else self._constant

    def give_up(self) -> list[object]:
        """The tables that describe tensors, a graph's from now on; and others, to be kept alive."""
        return [
            self._counters.give_up(),
            self._rates.give_up(),
            *(mirror.table for mirrors in self._groups for mirror in mirrors),
            self._limit.table,
        ]


class TritonBackend:
    """Steps one optimizer with the Triton kernels.

    Args:
        optimizer: the wrapped one.
        rule: its update rule.
        schedule: the policy. One with a ``scale_fn`` is evaluated on the host at each step.
        device: the type of the devices whose tensors it updates.
        lock: held by the thread that steps the optimizer; None makes one.

    Raises:
        BuildError: if the host's part, which looks after the tensors, cannot be compiled here.
    """

    sees_overflows = True

    def __init__(
        self,
        optimizer: Optimizer,
        rule: UpdateRule,
        schedule: Schedule,
        device: str,
        lock: threading.RLock | None = None,
    ) -> None:
        self.plan = Plan(
            optimizer,
            rule,
            library().held,
            device,
            capturable=True,
            by_alignment=True,
            lock=lock,
        )
        self._schedule = schedule
        self._momentum = rule.momentum
        self._launches: list[_Launch] = []
        self._by_device: dict[torch.device, list[_Launch]] = {}
        self._positions: dict[torch.device, _Position] = {}
        self._unsure = False
        # Kept for graphs, whose launches read from them: their number is that of captured steps.
        self._given_up: list[Any] = []

    @property
    def uncertain(self) -> bool:
        """Whether only the device knows the position.

        After steps that it may have skipped, and for good once a step was captured into a graph.
        """
        return bool(self._positions) and (self._unsure or bool(self._given_up))

    def position(self) -> int:
        """The position, by the device's own count; waits for it."""
        found = max(position.ask() for position in self._positions.values())  # all the same
        self._unsure = False  # a capture may have refused to tell
        return found

    def keeps(self, lr: Tensor) -> bool:
        """Whether steps write the next rate into this tensor, as its device takes part in them."""
        return lr.device in self._positions

    def move_to(self, course: Course, *, there: bool = False) -> None:
        """Take in a position and bounds before the next step, which may be a graph's replay.

        Args:
            course: where to go.
            there: whether the device has just told that this is where it is. To tell it so in turn
                might take it back, on another stream than that of its steps.
        """
        self._unsure = False
        with _no_inference_mode():
            for position in self._positions.values():
                with _guard(position.device):
                    if not there:
                        position.move_to(course)
                    position.groups(course, self.plan.scalars, self._momentum)

    def step(self, course: Course, gradients: Gradients) -> Tensor | None:
        """Update all tensors of the plan, which must be fresh: a launch per bucket, and one more.

        Args:
            course: where the schedule stands.
            gradients: what is done to them on their way in; a launch per bucket more and another
                if they are clipped, one if they are only scaled.

        Raises:
            RuntimeError: if this is to be captured and something has to be uploaded for it.
        """
        with _no_inference_mode():
            norm = self._step(course, gradients)
        self.plan.release()
        return norm

    def _step(self, course: Course, gradients: Gradients) -> Tensor | None:
        plan, capturing = self.plan, is_capturing()
        if capturing and not plan.buckets and not self._positions:
            raise RuntimeError(
                "step() cannot be captured now: no parameter has had a gradient yet; take a step "
                "with all gradients and then capture"
            )
        if plan.pending and capturing:
            raise RuntimeError(
                "step() cannot be captured now: it would create the optimizer's state; take a step "
                "with all gradients and then capture"
            )
        if [id(launch.bucket) for launch in self._launches] != [id(b) for b in plan.buckets]:
            self._arrange([_Launch(bucket) for bucket in plan.buckets])
        by_device = self._by_device
        rows = {}
        for device, launches in by_device.items():
            with _guard(device):
                if is_capturing() is not capturing:
                    raise RuntimeError(
                        "step() cannot be captured now: a graph is being captured on one of the "
                        "devices that have parameters and not on another; capture on all or none"
                    )
                for launch in launches:
                    rows[launch] = launch.refresh()
                    launch.choose()
        gates, norm = self._gates(by_device, rows, gradients)
        unsure = self._unsure or (gradients.found_inf is not None and bool(by_device))
        done = 0
        try:
            for device, launches in by_device.items():
                position = self._positions[device]
                with _guard(device):
                    self._step_on(position, launches, rows, course, gates[device])
                    done += 1
                    position.advanced(course)
        except BaseException:
            if done == len(by_device) and not capturing:
                plan.commit()  # the state belongs to the parameters
            raise
        if not capturing:
            plan.tally[0] += 1
            plan.tally[1] += course.moves
        self._unsure = unsure
        if capturing:
            self._given_up.append([launch.give_up() for launch in self._launches])
            self._given_up.append([p.give_up() for p in self._positions.values()])
            # And what their addresses are of: a checkpoint's tensors may take their place.
            self._given_up.append((list(plan.buckets), course.kept, gradients, gates))
        created = plan.pending
        plan.commit()
        if created:  # of which the rows tell: a step that is captured next may upload nothing
            for launch in self._launches:
                with _guard(launch.bucket.device):
                    launch.refresh()
        return norm

    def _arrange(self, launches: list[_Launch]) -> None:
        for device in dict.fromkeys(launch.bucket.device for launch in launches):
            if device not in self._positions:
                others = list(self._positions.values())
                with _guard(device):
                    self._positions[device] = _Position(device, self._schedule)
                if others:
                    self._positions[device].join(others[0])
        by_device: dict[torch.device, list[_Launch]] = {}
        for launch in launches:
            by_device.setdefault(launch.bucket.device, []).append(launch)
        for device in self._positions:  # none may fall behind
            by_device.setdefault(device, [])
        self._launches, self._by_device = launches, by_device

    def _gates(
        self,
        by_device: dict[torch.device, list[_Launch]],
        rows: dict[_Launch, Tensor],
        gradients: Gradients,
    ) -> tuple[dict[torch.device, Tensor], Tensor | None]:
        """Each device's gate, and the norm that gradients are clipped by."""
        from clr_optim.kernels.triton import multi_tensor

        positions = {device: self._positions[device] for device in by_device}
        if all(value is None for value in gradients):
            return {device: position.open for device, position in positions.items()}, None
        scales = {d: _on(gradients.scale, p.one) for d, p in positions.items()}
        sums, count = None, 0
        if gradients.max_norm is not None:
            parts: dict[_Launch, Tensor] = {}
            for device, launches in by_device.items():
                with _guard(device):
                    parts.update(self._squares(device, launches, rows, scales[device]))
            sums = self._together(parts)
            count = len(sums)
        gates: dict[torch.device, Tensor] = {}
        dtype = torch.float64 if self.plan.wide else torch.float32
        norm = None
        if sums is not None and not positions:  # of what other ranks have
            norm = sums.sum().sqrt().to(dtype)
        for device, position in positions.items():
            if gates and norm is not None:  # one device has summed for all
                gates[device] = next(iter(gates.values())).to(device)
                continue
            with _guard(device):
                gates[device] = torch.empty(2, dtype=torch.float64, device=device)
                limit = position.one
                if sums is not None and gradients.max_norm is not None:
                    if position.norm is None or position.norm.dtype != dtype:
                        position.norm = torch.empty((), dtype=dtype, device=device)
                    norm = position.norm
                    limit = position.limit(gradients.max_norm)
                multi_tensor.open_gate[(1,)](
                    position.one if sums is None else sums.to(device), count, limit,
                    scales[device], _on(gradients.found_inf, position.zero),
                    position.one if norm is None else norm, gates[device],
                    CLIPS=sums is not None, BLOCK=_SUMMED_AT_ONCE,
                )  # fmt: skip
        return gates, norm

    def _squares(
        self,
        device: torch.device,
        launches: list[_Launch],
        rows: dict[_Launch, Tensor],
        scale: Tensor,
    ) -> dict[_Launch, Tensor]:
        """Sums of squares of the gradients on one device, one of each chunk, in order."""
        from clr_optim.kernels.triton import multi_tensor

        sums = torch.empty(
            sum(launch.count for launch in launches), dtype=torch.float64, device=device
        )
        counts = [launch.count for launch in launches]
        parts = dict(zip(launches, torch.split(sums, counts), strict=True))
        for launch, part in parts.items():
            if launch.count:
                multi_tensor.sum_of_squares[(launch.count,)](
                    launch.chunks, rows[launch], scale, part, **launch.squares_compiled_for
                )
        return parts

    def _together(self, parts: dict[_Launch, Tensor]) -> Tensor:
        """What there is to be summed, on the first device, of all devices and all ranks."""
        sums = list(parts.values())
        meshes = [spread.mesh.device_type for spread in self.plan.spreads if spread]
        if not meshes and len({part.device for part in sums}) <= 1:
            return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64, device="cpu")
        device = sums[0].device if sums else torch.device(meshes[0])
        by_spread = no_sums(self.plan.spreads, device)
        for launch, part in parts.items():
            total = by_spread[launch.bucket.spread]
            total += part.sum().to(total.device)
        return sum_over_ranks(by_spread).reshape(1)

    def _step_on(
        self,
        position: _Position,
        launches: list[_Launch],
        rows: dict[_Launch, Tensor],
        course: Course,
        gate: Tensor,
    ) -> None:
        from clr_optim.kernels.triton import multi_tensor

        groups = position.groups(course, self.plan.scalars, self._momentum)
        width = groups.shape[1]
        ints, floats = position.phases(course)
        phases = len(ints)
        counters, count = position.counters(launches)
        rates, kept = position.rates(course)
        control = position.control(course)
        for launch in launches:
            if launch.count:
                multi_tensor.multi_tensor[(launch.count,)](
                    launch.chunks, rows[launch], groups, width, ints, floats, phases, control, gate,
                    **launch.compiled_for,
                )  # fmt: skip
        programs = max(1, -(-count // _ADVANCED_AT_ONCE))
        # Ctrl-C may come before the host has made a note of where the device goes: it then asks.
        self._unsure = self._unsure or not is_capturing()
        multi_tensor.advance[(programs,)](
            counters, count, rates, kept, groups, width, ints, floats, phases, control, gate,
            BLOCK=_ADVANCED_AT_ONCE, enable_fp_fusion=False,
        )  # fmt: skip


def _open(gate: Tensor, one: Tensor, zero: Tensor) -> None:
    """Fill the gate of a step that surely happens, its gradients as they are."""
    from clr_optim.kernels.triton import multi_tensor

    multi_tensor.open_gate[(1,)](
        one, 0, one, one, zero, one, gate, CLIPS=False, BLOCK=_SUMMED_AT_ONCE
    )


def _on(tensor: Tensor | None, default: Tensor) -> Tensor:
    """A GradScaler's tensor where it is needed, or what stands for it where there is none."""
    if tensor is None:
        return default
    return tensor.to(default.device, default.dtype, non_blocking=True)


def _no_inference_mode() -> AbstractContextManager[Any]:
    """What is made in it may be written to by later steps, as that of inference mode may not."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _warp(device: torch.device) -> int:
    """Threads of a warp: 64 on most of AMD's GPUs."""
    if device.type == "cuda" and torch.version.hip:
        return int(torch.cuda.get_device_properties(device).warp_size)
    return 32


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    """The device as the current one, which it mostly is already."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)
