"""Plans: which tensors one kernel call updates, kept from step to step while nothing changes.

What torch does at every step (collect, group, check, allocate) is done once per plan. Each step
asks only whether anything it was built from is still the same, down to the pointers; if not, the
plan is built anew. A pointer that is not known to be right is never used.
"""

from __future__ import annotations

import ctypes
import operator
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.plan.eligible import DTYPES, is_plain, why_not
from clr_optim.plan.overlap import Memory, sharing
from clr_optim.rules import KERNELS, Slot, UpdateRule
from clr_optim.sharding import DTensor, Spread, is_wide, local_part, spread_of, spreads

__all__ = ["Bucket", "Plan", "View"]


def _int64s(*names: str) -> np.dtype[np.void]:
    return np.dtype([(name, np.int64) for name in names])


# In step with Row and Bucket in scan.h.
_ROW = _int64s(
    "param", "grad", "state0", "state1", "state2", "counter", "numel", "group", "first", "active"
)
_BUCKET = _int64s("scan", "rows", "count", "active", "kernel", "dtype", "wide_counter", "held")

# In step with Answer in multi_tensor.cpp.
_ALL_ACTIVE, _SETTINGS_CHANGED, _SOME_IDLE = 0, 1, 2
_CHANGED, _BUSY, _GROUPS_CHANGED, _STATE_CHANGED, _WOKEN, _NESTED = -1, -2, -3, -4, -5, -6

_PAUSE_S = 1e-4

# So few rows are replaced one by one within one step; for more the plan is made anew.
_FEW_ROWS = 8

# So few parameters are taken out of a list one by one, more by making the list anew.
_FEW = 16

# How often a plan that other code changes while it is made is made within one step.
_BUILDS = 3

# DLPack's code and bits of DTYPES.
_DLPACK = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
}


def _find_words() -> tuple[int, int]:
    """Which word of a tensor's object points to its implementation, and of that to its storage.

    Both 0 if one is not found: a scan then looks at every tensor without looking ahead.
    """
    tensor = torch.empty(1, device="cpu")
    try:
        impl, storage = tensor._cdata, tensor.untyped_storage()._cdata
        words = ctypes.c_void_p * 4  # no object of theirs is smaller
        found = (
            words.from_address(id(tensor))[:].index(impl),
            words.from_address(impl)[:].index(storage),
        )
    except (AttributeError, ValueError):
        return 0, 0
    return found


_WORDS = _find_words()


def _find_negation(impl: int) -> tuple[int, int]:
    """Which word of a tensor's implementation holds its dispatch keys, and a lazy negation's bit.

    Found by comparing tensors with their negations. Both 0 if that is not clear: a scan then asks
    torch about every gradient.

    Args:
        impl: which word of a tensor's object points to its implementation, 0 if unknown.
    """
    words = ctypes.c_uint64 * 22  # an implementation has no fewer
    candidates: set[tuple[int, int]] | None = None
    try:
        for dtype in DTYPES if impl else ():
            plain, other = (torch.empty(3, dtype=dtype, device="cpu") for _ in range(2))
            negated = torch._neg_view(other)
            before, after = (words.from_address(t._cdata)[:] for t in (plain, negated))
            found = {
                (index, changed)
                for index, (was, now) in enumerate(zip(before, after, strict=True))
                if (changed := was ^ now).bit_count() == 1 and now & changed
            }
            candidates = found if candidates is None else candidates & found
    except AttributeError:
        return 0, 0
    return candidates.pop() if candidates and len(candidates) == 1 else (0, 0)


_NEGATION = _find_negation(_WORDS[0])


class _Scan(ctypes.Structure):
    """In step with Scan in scan.h."""

    _fields_ = [
        *(
            (name, ctypes.py_object)
            for name in (
                "params",
                "dicts",
                "keys",
                "tensors",
                "grad",
                "none",
                "capsule",
                "tensor",
                "parameter",
                "is_neg",
                "no",
                "dtensor",
                "specs",
                "local",
                "spec",
                "placements",
                "mesh",
                "grads",
                "nones",
            )
        ),
        ("layout", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                "slots",
                "code",
                "bits",
                "counter_bits",
                "device_type",
                "device_id",
                "impl",
                "storage",
                "key_set",
            )
        ),
        ("negative", ctypes.c_uint64),
    ]


class View(ctypes.Structure):
    """In step with View in scan.h."""

    _fields_ = [
        *(
            (name, ctypes.py_object)
            for name in (
                "groups", "members", "keys", "settings", "state", "dicts", "idle",
                "params", "grad", "none", "has_mode", "no",
            )
        ),
        ("buckets", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("tally", ctypes.c_void_p),
        ("busy", ctypes.c_int64),
        ("ready", ctypes.c_int64),
        ("bucket", ctypes.c_int64),
        ("row", ctypes.c_int64),
    ]  # fmt: skip

    # Who holds the view may use all of it though another thread has the plan rebuilt.
    address = 0  #: its own
    scalars = np.zeros((0, 0))  #: :attr:`Plan.scalars`
    scalars_address = 0
    memory: object = None  #: what it points to


@dataclass(eq=False)
class Row:
    """A parameter of a bucket, with its state."""

    param: Tensor
    group: int
    slots: list[Tensor]
    counter: Tensor | None
    pending: dict[str, Tensor]  #: state that torch would create in this step
    first: bool  #: its first slot holds nothing yet

    @property
    def held(self) -> list[Tensor]:
        """Its slots, and its step counter if it has one."""
        return self.slots if self.counter is None else [*self.slots, self.counter]


class _Key(NamedTuple):
    """What the tensors of one bucket have in common."""

    kernel: str
    dtype: torch.dtype
    wide_counter: bool
    device: torch.device
    aligned: bool
    spread: Spread | None


@dataclass(eq=False)
class Bucket:
    """Tensors that one kernel call updates: same kernel, dtype, counters, device and spread."""

    kernel: str
    dtype: torch.dtype
    wide_counter: bool  #: ``state["step"]`` is float64
    device: torch.device
    #: all tensors began at a multiple of 16 bytes when the plan was built, where that is a matter
    aligned: bool
    spread: Spread | None  #: how its DTensors are divided over ranks, if that is what they are
    slots: tuple[Slot, ...]
    rows: list[Row] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    #: gradients that the rows point to, kept alive until the step is over; None where there is none
    grads: list[Tensor | None] = field(default_factory=list)
    scan: _Scan = field(init=False)
    # Arrays with room for more rows than there are.
    _table: np.ndarray[Any, np.dtype[np.void]] = field(init=False)
    _layout: np.ndarray[Any, np.dtype[np.int64]] = field(init=False)
    _begins: list[int] = field(default_factory=list)  # where each row's layout begins
    _words: int = field(init=False, default=0)  # of the layout

    @property
    def table(self) -> np.ndarray[Any, np.dtype[np.void]]:
        """What kernels read: a line per row."""
        return self._table[: len(self.rows)]

    @property
    def memory(self) -> tuple[object, ...]:
        """What native code points to."""
        return (self.scan, self._table, self._layout)

    def begin(self, first: Row) -> None:
        """Make the bucket ready for its first row, which tells what the others are like."""
        counters = [] if first.counter is None else ["step"]
        device_type, device_id = local_part(first.param).__dlpack_device__()
        code, bits = _DLPACK[self.dtype]
        more: dict[str, Any] = {}
        if self.spread is not None:
            more = {
                "dtensor": DTensor,
                "specs": [],
                "local": "_local_tensor",
                "spec": "_spec",
                "placements": "placements",
                "mesh": "mesh",
            }
        impl, storage = _WORDS
        key_set, negative = _NEGATION if impl else (0, 0)
        self._table = np.zeros(1, dtype=_ROW)
        self._layout = np.zeros(8, dtype=np.int64)
        self.scan = _Scan(
            params=self.params,
            dicts=[],
            keys=[slot.name for slot in self.slots] + counters,
            tensors=[],
            grad="grad",
            none=None,
            capsule=Tensor.__dlpack_c_exchange_api__,
            tensor=Tensor,
            parameter=torch.nn.Parameter,
            is_neg="is_neg",
            no=False,
            grads=self.grads,
            nones=[],
            slots=len(self.slots),
            code=code,
            bits=bits,
            counter_bits=64 if self.wide_counter else 32,
            device_type=int(device_type),
            device_id=int(device_id),
            impl=impl,
            # Nothing of a DTensor's own object is needed but its attributes.
            storage=0 if more else storage,
            key_set=key_set,
            negative=negative,
            **more,
        )

    def add(self, row: Row, grad: Tensor | None, entry: dict[str, Any]) -> None:
        """Append a row.

        Args:
            row: the parameter with its state.
            grad: its gradient.
            entry: the dictionary that holds its state.
        """
        count, words = len(self.rows), _layout_of(row.param)
        self._table = _with_room(self._table, count + 1)
        self._layout = _with_room(self._layout, self._words + len(words))
        self._table[count] = self._line(row, grad)
        self._layout[self._words : self._words + len(words)] = words
        self._begins.append(self._words)
        self._words += len(words)
        scan = self.scan
        scan.layout = self._layout.ctypes.data
        if scan.keys:
            scan.dicts.append(entry)
            scan.tensors.extend(row.held)
        if self.spread is not None:
            scan.specs.extend(_specs_of(row))
        scan.nones.append(None)
        self.grads.append(grad)
        self.params.append(row.param)
        self.rows.append(row)

    def replace(self, index: int, row: Row, grad: Tensor, entry: dict[str, Any]) -> bool:
        """Put a row in the place of another one of the same parameter; False if it does not fit.

        Args:
            index: the place.
            row: the parameter with its state.
            grad: its gradient.
            entry: the dictionary that holds its state.
        """
        begin, words, line = self._begins[index], _layout_of(row.param), self._line(row, grad)
        if self._layout[begin] != words[0] or self._table["numel"][index] != line[6]:
            return False
        self._layout[begin : begin + len(words)] = words
        self._table[index] = line
        scan, keys = self.scan, len(self.scan.keys)
        if keys:
            scan.dicts[index] = entry
            scan.tensors[index * keys : (index + 1) * keys] = row.held
        if self.spread is not None:
            specs = _specs_of(row)
            scan.specs[index * len(specs) : (index + 1) * len(specs)] = specs
        self.grads[index] = grad
        self.rows[index] = row
        return True

    def spans(self, index: int) -> list[tuple[int, int]]:
        """The memory that a row points to: parameter, slots and counter."""
        line = self._table[index]
        size = int(line["numel"]) * self.dtype.itemsize
        names = ("param", "state0", "state1", "state2")
        spans = [(int(line[name]), int(line[name]) + size) for name in names if size]
        counter = int(line["counter"])
        spans.append((counter, counter + (8 if self.wide_counter else 4)))
        return [span for span in spans if span[0]]

    def fill(self, index: int, entry: dict[str, Any]) -> None:
        """Take note that a row's pending state was filled and is now in this dictionary."""
        row = self.rows[index]
        row.pending, row.first = {}, False
        self._table["first"][index] = 0
        if self.scan.keys:
            self.scan.dicts[index] = entry

    @property
    def counter_dtype(self) -> torch.dtype | None:
        """The dtype of ``state["step"]``, or None if the rule counts no steps."""
        counter = self.rows[0].counter
        return None if counter is None else counter.dtype

    @staticmethod
    def _line(row: Row, grad: Tensor | None) -> tuple[int, ...]:
        """A line of the table."""
        slots = [local_part(tensor).data_ptr() for tensor in row.slots]
        part = local_part(row.param)
        return (
            part.data_ptr(),
            0 if grad is None else local_part(grad).data_ptr(),
            *slots,
            *[0] * (3 - len(slots)),
            0 if row.counter is None else row.counter.data_ptr(),
            part.numel(),
            row.group,
            row.first,
            grad is not None,
        )

    def header(self) -> tuple[int, ...]:
        """The bucket's line in the plan's table."""
        return (
            ctypes.addressof(self.scan),
            self._table.ctypes.data,
            len(self.rows),
            int(self.table["active"].sum()),
            KERNELS.index(self.kernel),
            DTYPES.index(self.dtype),
            self.wide_counter,
            1,
        )

    def release(self) -> None:
        """Let go of the gradients."""
        self.grads[:] = [None] * len(self.grads)


def _is_other(now: object, before: object) -> bool:
    """Whether contents have changed, or cannot be compared (arrays in a list)."""
    try:
        return bool(now != before)
    except (ValueError, TypeError, RuntimeError):
        return True


def _layout_of(param: Tensor) -> tuple[int, ...]:
    """Dimensions, sizes and strides, as the scan compares them."""
    part = local_part(param)
    return (part.dim(), *part.shape, *part.stride())


def _specs_of(row: Row) -> list[Any]:
    """What says how a row's DTensors are divided over the ranks."""
    tensors: list[Any] = [row.param, *row.slots]
    return [tensor._spec for tensor in tensors]


_Array = TypeVar("_Array", bound=np.ndarray[Any, Any])


def _with_room(array: _Array, count: int) -> _Array:
    """The array, or a copy of it with room for ``count`` items and as many again."""
    if count <= len(array):
        return array
    larger = np.zeros(2 * count, dtype=array.dtype)
    larger[: len(array)] = array
    return cast("_Array", larger)


class _Reading(NamedTuple):
    """A group's settings, all read at once: other threads may change them at any time."""

    # These two decide about buckets, all else is data.
    why: str | None  #: why no kernel serves the group
    kernel: str
    slots: tuple[Slot, ...]
    scalars: tuple[float, ...]  #: the kernel's, the learning rate left out; empty without one
    fused: bool  #: torch's flag
    keys: list[str]  #: names of the settings, see :attr:`UpdateRule.settings`
    values: list[Any]  #: and what they are


# Types of settings that cannot change within themselves.
_IMMUTABLE = frozenset({bool, int, float, complex, str, bytes, tuple, type(None)})


def _contents(setting: Any) -> Any:
    """What is in a setting that may change within itself (a list of betas, say), else None."""
    if type(setting) in _IMMUTABLE:
        return None
    if isinstance(setting, np.ndarray):
        return setting.tolist()
    return list(setting) if isinstance(setting, Sequence) else None


class Plan:
    """The buckets of one optimizer.

    Args:
        optimizer: the wrapped one, of the class of ``rule``.
        rule: its update rule.
        lib: the compiled kernels, loaded so that the GIL is kept during a call.
        device: the type of the devices whose tensors are planned for; others are left to torch.
        capturable: whether the kernels can be captured into a graph.
        by_alignment: whether tensors that all begin at a multiple of 16 bytes have buckets of their
            own.
        lock: lets one thread at a time make the plan anew; None makes one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: UpdateRule,
        lib: ctypes.PyDLL,
        device: str,
        *,
        capturable: bool = False,
        by_alignment: bool = False,
        lock: threading.RLock | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._rule = rule
        self._lib = lib
        self._device = device
        self._capturable = capturable
        self._by_alignment = by_alignment
        self._lock = threading.RLock() if lock is None else lock
        self.buckets: list[Bucket] = []
        self._by_key: dict[_Key, Bucket] = {}
        self._params: list[Tensor] = []  # of all buckets
        #: parameters with a gradient that torch's own step must serve, and why
        self.rest: list[tuple[Tensor, str]] = []
        # Whether a parameter's state is the reason for one of them.
        self._left_by_state = False
        #: those of them whose own gradient or layout is the reason
        self._odd: list[tuple[Tensor, str]] = []
        # Parameters without a gradient and the numbers of their groups.
        self._idle: list[Tensor] = []
        self._idle_groups: list[int] = []
        self._memory = Memory()
        # None while the plan is not made, or is to be made anew.
        self._groups: Sequence[dict[str, Any]] | None = None
        self._members: list[list[Tensor]] = []
        self._readings: list[_Reading] = []
        # What the scan compares: the names and values of each group's settings, and the states.
        self._keys: list[list[str]] = []
        self._settings: list[list[Any]] = []
        self._dicts: list[Any] = []
        self._lists: list[tuple[Any, Any]] = []
        #: a row of the kernel's scalars per group, the learning rate to be filled in
        self.scalars = np.zeros((0, 0))
        #: whether the next step creates state
        self.pending = False
        self._unfilled: list[tuple[Bucket, int]] = []
        self._state: Any = None
        #: how the parameters, those of the rest too, are divided over ranks
        self.spreads: list[Spread | None] = []
        #: whether they are all float64
        self.wide = False
        #: whether a parameter of the buckets lacks a gradient
        self.partial = False
        #: a line per bucket
        self.table = np.zeros(0, dtype=_BUCKET)
        self.view = View()
        #: how many kernel calls there were, and how many of them were steps of the schedule
        self.tally = (ctypes.c_int64 * 2)()
        self._calls_before_pending = 0
        self._answer = 0

    # ---- is it still right?

    def refresh(self) -> None:
        """Bring the plan up to date: at least the gradients' pointers, at most all of it."""
        with self._lock:
            builds = replaced = 0
            while builds < _BUILDS:
                if self._odd and self._rest_changed():
                    self._groups = None
                if self.is_current():
                    return
                replaced += self._answer == _CHANGED
                if self._groups is None or replaced > _FEW_ROWS or not self._adopt():
                    builds += 1
                    self._build()
                    if self._groups is None:
                        return  # nothing for a kernel to do
            # Other threads change things all the time. Each row is right for one reading of them.
            self._build()
            self.view.ready = 1

    def forget(self) -> None:
        """Have the next :meth:`refresh` build the plan anew."""
        with self._lock:
            self._groups = None
            self.release()

    def release(self) -> None:
        """Let go of the gradients, if after a :meth:`refresh` no step is to be taken."""
        with self._lock:
            if not self.view.busy:
                self.view.ready = 0
                self.table["held"] = 0
                for bucket in self.buckets:
                    bucket.release()

    def after_fork(self, lock: threading.RLock) -> None:
        """Start anew in a forked process, where no other thread ends what it was doing."""
        self._lock = lock
        self.view.busy = 0
        self.forget()

    def _rest_changed(self) -> bool:
        """Whether a gradient that no kernel could take has become another."""
        return any(
            grad is not None and why_not(p, grad, self._device) != why
            for p, why, grad in ((p, why, p.grad) for p, why in self._odd)
        )

    def is_current(self) -> bool:
        """Whether all that the plan was built from is as it was.

        Takes in the gradients' pointers on the way, which move at every ``zero_grad``.
        """
        optimizer = self._optimizer
        self._answer = 0
        if optimizer.state is not self._state or not self._are_planned(optimizer.param_groups):
            return False
        # A list (of betas, say) may change within itself, which no comparison of objects shows.
        changed = self._lists and any(_is_other(_contents(now), was) for now, was in self._lists)
        if changed and not self._take_settings():
            return False
        answer = self._ask()
        if answer == _SETTINGS_CHANGED and self._take_settings():
            answer = self._ask()
        self.partial = answer == _SOME_IDLE
        if (
            self.pending
            and self.partial
            and not all(bucket.table["active"][index] for bucket, index in self._unfilled)
        ):
            return False  # a row whose state was not filled yet has lost its gradient
        self._answer = answer
        return answer in (_ALL_ACTIVE, _SOME_IDLE)

    def _are_planned(self, groups: Any) -> bool:
        """Whether these are the plan's groups; another list of the same ones is taken in."""
        known = self._groups
        if groups is known or known is None:
            return known is not None
        if type(groups) not in (list, tuple) or len(groups) != len(known):
            return False
        if not all(map(operator.is_, groups, known)):
            return False
        self._groups = self.view.groups = groups
        return True

    def _ask(self) -> int:
        """What ``clr_current`` says, once no other thread is in the middle of a step."""
        view = self.view
        while True:
            answer: int = self._lib.clr_current(view.address)
            if answer == _NESTED:
                raise RuntimeError(
                    "step() was called within a step of the same optimizer, by a finalizer or a "
                    "signal handler: call it after that step"
                )
            if answer != _BUSY:
                return answer
            time.sleep(_PAUSE_S)

    # ---- taking in what has changed

    def _take_settings(self) -> bool:
        """Take in changed settings of the groups; whether the buckets stay as they are."""
        readings = [self._read(group) for group in list(self._optimizer.param_groups)]
        # The scan compares settings by the keys that there were.
        known = self._readings
        if len(readings) != len(known) or any(
            now[:2] != was[:2] or now.keys != was.keys
            for now, was in zip(readings, known, strict=True)
        ):
            return False
        self._readings = readings
        for i, reading in enumerate(readings):
            if reading.scalars:
                self.scalars[i] = reading.scalars
        self._settings[:] = [reading.values for reading in readings]
        self._lists = self._copy_lists(readings)
        return True

    def _adopt(self) -> bool:
        """Take in parameters, groups or state that were added; False if all must be made anew."""
        adopt = {
            _GROUPS_CHANGED: self._adopt_members,
            _STATE_CHANGED: self._adopt_state,
            _WOKEN: self._adopt_gradients,
            _CHANGED: self._adopt_row,
        }.get(self._answer)
        if adopt is None:
            return False
        self.view.ready = 0  # no step begins while the tables grow
        while self.view.busy:
            time.sleep(_PAUSE_S)
        # An interrupt may leave it half done anywhere: then all is made anew.
        groups, self._groups = self._groups, None
        if not adopt():
            return False
        self._groups = groups
        return True

    def _adopt_members(self) -> bool:
        """Take in groups at the end of all groups, and parameters at the end of a group's."""
        groups = list(self._optimizer.param_groups)
        readings = [self._read(group) for group in groups[len(self._members) :]]
        members = [list(group["params"]) for group in groups]
        if len(groups) < len(self._members) or any(reading.why for reading in readings):
            return False
        known = [*self._members, *([] for _ in readings)]
        for was, now in zip(known, members, strict=True):
            if len(now) < len(was) or not all(map(operator.is_, was, now)):
                return False
        for number, (was, now) in enumerate(zip(known, members, strict=True)):
            added = now[len(was) :]
            if not added:
                continue
            self._idle += added
            self._idle_groups += [number] * len(added)
            self.spreads = list(dict.fromkeys([*self.spreads, *map(spread_of, added)]))
            self.wide = self.wide and is_wide(added)
        self._members[:] = members
        self._readings += readings
        self._keys += [reading.keys for reading in readings]
        self._settings += [reading.values for reading in readings]
        self._lists += self._copy_lists(readings)
        self._write_scalars(self.view)
        return True

    def _adopt_row(self) -> bool:
        """Take in other tensors of the row at which the scan stopped."""
        return self._replace(self.buckets[self.view.bucket], self.view.row)

    def _adopt_state(self) -> bool:
        """Take in state that was made, replaced or taken away; of a few rows, or of none."""
        state = self._optimizer.state
        entries = list(state.values())
        others = [
            (bucket, index)
            for bucket in self.buckets
            if bucket.scan.keys
            for index, (row, entry) in enumerate(zip(bucket.rows, bucket.scan.dicts, strict=True))
            if state.get(row.param) is not entry and not row.pending
        ]
        if self._left_by_state or len(others) > _FEW_ROWS:
            return False  # other state may let a kernel serve what was left to torch
        if not all(self._replace(*other) for other in others):
            return False
        self._dicts[:] = entries
        return True

    def _replace(self, bucket: Bucket, index: int) -> bool:
        """Look at a row's parameter again; False if that leads to another bucket, or to none."""
        old = bucket.rows[index]
        grad = old.param.grad
        # A captured launch remembers more of a row than its line.
        if self._capturable or old.pending or grad is None:
            return False
        row = self._place(old.param, grad, old.group)
        if row is None or self._by_key.get(self._key_of(row, grad)) is not bucket:
            return False
        tensors = [row.param, *row.held]
        if not (self._memory.remove(bucket.spans(index)) and self._memory.add(tensors)):
            return False
        if not bucket.replace(index, row, grad, self._entry_of(row)):
            return False
        self._note_pending(row, bucket, index)
        return True

    def _adopt_gradients(self) -> bool:
        """Take in parameters whose first gradient has come."""
        found = [(i, p.grad) for i, p in enumerate(self._idle) if p.grad is not None]
        woken = [(self._idle[i], self._idle_groups[i], grad) for i, grad in found]
        if len(found) > _FEW:
            kept = sorted({*range(len(self._idle))} - {i for i, _ in found})
            self._idle[:] = [self._idle[i] for i in kept]
            self._idle_groups = [self._idle_groups[i] for i in kept]
        else:
            for i, _ in reversed(found):
                del self._idle[i], self._idle_groups[i]
        for param, number, grad in woken:
            if grad is None:  # another thread has just taken it away
                self._idle.append(param)
                self._idle_groups.append(number)
                continue
            row = self._place(param, grad, number)
            tensors = [param] if row is None else [param, *row.held]
            here = local_part(param).device.type == self._device
            if here and not self._memory.add(tensors):
                return False
            if row is not None:
                self._append(row, grad)
        self._point_to_buckets(self.view)
        return True

    # ---- building it

    def _read(self, group: Mapping[str, Any]) -> _Reading:
        settings, rule = dict(group), self._rule
        why = rule.not_fused(settings, capturable=self._capturable)
        own = {name: value for name, value in settings.items() if name in rule.settings}
        slots = rule.slots(settings) if why is None else ()
        return _Reading(
            why,
            rule.kernel(settings),
            slots,
            rule.row(settings) if why is None else (),
            bool(settings.get("fused")),
            list(own),
            list(own.values()),
        )

    @staticmethod
    def _copy_lists(readings: Iterable[_Reading]) -> list[tuple[Any, Any]]:
        pairs = ((value, _contents(value)) for r in readings for value in r.values)
        return [(value, contents) for value, contents in pairs if contents is not None]

    def _build(self) -> None:
        optimizer = self._optimizer
        self._groups = None  # not current, should anything below raise
        groups, state = optimizer.param_groups, optimizer.state
        why = _why_unreadable(groups, state)
        snapshot = list(groups)
        unread = _Reading(why, "", (), (), False, [], [])
        self._readings = [self._read(group) if why is None else unread for group in snapshot]
        self._members = [list(group["params"]) for group in snapshot]
        self.buckets, self._by_key, self._params = [], {}, []
        self._unfilled, self.pending = [], False
        self.rest, self._odd, self._idle, self._idle_groups = [], [], [], []
        self._left_by_state = False
        placed: list[tuple[Row, Tensor]] = []
        for number, members in enumerate(self._members):
            for param in members:
                grad = param.grad
                if why is not None:
                    if grad is not None:
                        self.rest.append((param, why))
                elif grad is None:
                    self._idle.append(param)
                    self._idle_groups.append(number)
                else:
                    row = self._place(param, grad, number)
                    if row is not None:
                        placed.append((row, grad))
        placed = self._leave_shared_memory(placed)
        for row, grad in placed:
            self._append(row, grad)
        self.spreads = spreads(param for members in self._members for param in members)
        self.wide = is_wide(param for members in self._members for param in members)
        self._lists = self._copy_lists(self._readings)
        self._index(groups if why is None else [], state if why is None else {})
        if why is None:
            self._groups, self._state = groups, state

    def _place(self, param: Tensor, grad: Tensor, number: int) -> Row | None:
        """The parameter's row, or None if it is left to torch's own step, which is noted."""
        reading = self._readings[number]
        own = None if reading.why else why_not(param, grad, self._device)
        row = None if reading.why or own else self._row(param, number, reading)
        if isinstance(row, Row):
            return row
        self.rest.append((param, reading.why or own or row or ""))
        if own:
            self._odd.append((param, own))
        self._left_by_state = self._left_by_state or row is not None
        return None

    def _row(self, param: Tensor, number: int, reading: _Reading) -> Row | str:
        """The row of a parameter that has a gradient, or why it has none."""
        rule, optimizer = self._rule, self._optimizer
        # Not optimizer.state[param]: that would create an entry earlier than torch does.
        state = optimizer.state.get(param, {})
        tensors: list[Tensor] = []
        pending: dict[str, Tensor] = {}
        counter = None
        if not isinstance(state, dict):
            return "state that is no dictionary"
        fresh = len(state) == 0
        if rule.has_step:
            if fresh:
                # As torch's _get_scalar_dtype: float64 only where that is the default dtype.
                wide = torch.get_default_dtype() == torch.float64 and not reading.fused
                counter = torch.zeros(
                    (), dtype=torch.float64 if wide else torch.float32, device=param.device
                )
                pending["step"] = counter
            else:
                counter = state.get("step")
                if (
                    type(counter) is not Tensor
                    or counter.device.type not in ("cpu", self._device)
                    or counter.dim() != 0
                    or counter.is_neg()
                    or counter.dtype not in (torch.float32, torch.float64)
                ):
                    return "a step counter that is no float tensor on the CPU"
                if counter.device != param.device:
                    # Where the kernel counts; a state dict has it where torch would.
                    counter = state["step"] = counter.to(param.device)
        first = False
        for slot in reading.slots:
            tensor: Any = state.get(slot.name)
            if tensor is None and (fresh or slot.fill is None):
                if slot.fill is None:
                    tensor, first = torch.empty_like(param, requires_grad=False), True
                else:
                    tensor = torch.full_like(
                        param, slot.fill(optimizer.defaults), requires_grad=False
                    )
                pending[slot.name] = tensor
            elif not is_plain(tensor, param):
                return f"state[{slot.name!r}] of another layout, dtype or type than its parameter"
            tensors.append(tensor)
        ordered = {name: pending[name] for name in rule.state_order if name in pending}
        return Row(param, number, tensors, counter, ordered, first)

    def _leave_shared_memory(self, placed: list[tuple[Row, Tensor]]) -> list[tuple[Row, Tensor]]:
        """Leave to torch what shares memory: it goes one by one, a kernel all at once."""
        others = [p for p, _ in self.rest if local_part(p).device.type == self._device]
        owners = [*([p] for p in others), *([row.param, *row.held] for row, _ in placed)]
        shared = sharing(owners)
        self._memory = Memory(tensor for tensors in owners for tensor in tensors)
        own: list[tuple[Row, Tensor]] = []
        for index, (row, grad) in enumerate(placed, len(others)):
            if index in shared:
                self.rest.append((row.param, "tensors that share memory"))
                self._left_by_state = True
            else:
                own.append((row, grad))
        return own

    def _append(self, row: Row, grad: Tensor) -> None:
        """Put a row into its bucket."""
        key = self._key_of(row, grad)
        bucket = self._by_key.get(key)
        if bucket is None:
            bucket = self._by_key[key] = Bucket(*key, self._readings[row.group].slots)
            bucket.begin(row)
            self.buckets.append(bucket)
        self._note_pending(row, bucket, len(bucket.rows))
        self._params.append(row.param)
        bucket.add(row, grad, self._entry_of(row))

    def _key_of(self, row: Row, grad: Tensor) -> _Key:
        param = row.param
        wide = row.counter is not None and row.counter.dtype == torch.float64
        aligned = self._by_alignment and _is_aligned(row, grad)
        kernel = self._readings[row.group].kernel
        return _Key(kernel, param.dtype, wide, param.device, aligned, spread_of(param))

    def _entry_of(self, row: Row) -> dict[str, Any]:
        """The dictionary of a row's state, or what will be in it once it is filled."""
        state: dict[str, Any] = self._optimizer.state.get(row.param, {})
        return {**state, **row.pending} if row.pending else state

    def _note_pending(self, row: Row, bucket: Bucket, index: int) -> None:
        """Remember a row whose state the next step fills."""
        if row.pending:
            if not self.pending:
                self.pending, self._calls_before_pending = True, self.tally[0]
            self._unfilled.append((bucket, index))

    def _write_scalars(self, view: View) -> None:
        """Write the kernel's scalars, a row per group."""
        rows = [reading.scalars for reading in self._readings]
        width = max([1, *map(len, rows)])  # the learning rate has its place even if none is fused
        scalars = np.array([row or (0.0,) * width for row in rows], dtype=np.float64)
        self.scalars = scalars.reshape(len(rows), width)  # of no groups, too
        view.scalars, view.scalars_address = self.scalars, self.scalars.ctypes.data

    def _point_to_buckets(self, view: View) -> None:
        """Have a view point to the buckets as they now are."""
        self.table = np.array([bucket.header() for bucket in self.buckets], dtype=_BUCKET)
        view.buckets, view.count = self.table.ctypes.data, len(self.buckets)
        view.memory = [self.table, self.tally, *(bucket.memory for bucket in self.buckets)]

    def _index(self, groups: Sequence[dict[str, Any]], state: dict[Tensor, Any]) -> None:
        """Make the view that the scan is given."""
        self._keys = [reading.keys for reading in self._readings]
        self._settings = [reading.values for reading in self._readings]
        self._dicts = list(state.values())
        view = View(
            groups=groups,
            members=self._members,
            keys=self._keys,
            settings=self._settings,
            state=state,
            dicts=self._dicts,
            idle=self._idle,
            params="params",
            grad="grad",
            none=None,
            has_mode=torch._C._is_torch_function_mode_enabled,
            no=False,
            tally=ctypes.addressof(self.tally),
        )
        view.address = ctypes.addressof(view)
        view.ready = 1
        self._write_scalars(view)
        self._point_to_buckets(view)
        self.view = view  # another thread may take it up at once

    # ---- a step

    def active_params(self) -> list[Tensor]:
        """All parameters of the buckets that have a gradient."""
        if not self.partial:
            return self._params
        return [
            bucket.params[i]
            for bucket in self.buckets
            for i in np.flatnonzero(bucket.table["active"]).tolist()
        ]

    def commit(self) -> None:
        """Say that a step was taken, and hand over the state it created, under torch's names."""
        # As after any in-place update: a backward through an older graph must raise.
        torch.autograd.graph.increment_version(self.active_params())
        if not self.pending:
            return
        with self._lock:
            state = self._optimizer.state
            for bucket, index in self._unfilled:
                row = bucket.rows[index]
                entry = state[row.param]
                entry.update(row.pending)
                bucket.fill(index, entry)
            self._unfilled, self.pending = [], False
            self._dicts[:] = state.values()
            self.release()

    def commit_if_called(self) -> None:
        """:meth:`commit` after an exception, if the kernel was called before it."""
        if not self.pending or self.tally[0] != self._calls_before_pending:
            self.commit()


def _is_aligned(row: Row, grad: Tensor) -> bool:
    tensors = (row.param, grad, *row.slots)
    return not any(local_part(tensor).data_ptr() % 16 for tensor in tensors)


def _why_unreadable(groups: object, state: object) -> str | None:
    """Why native code cannot look through these groups and this state, or None."""
    if not _reads_as_a_dict(state):
        return f"state in a {type(state).__name__}, which is no plain dict"
    if not isinstance(groups, (list, tuple)):
        return f"param_groups in a {type(groups).__name__}, which is no list"
    for group in groups:
        if not _reads_as_a_dict(group) or hasattr(type(group), "__missing__"):
            return f"a parameter group that is a {type(group).__name__} and no plain dict"
        if not isinstance(group["params"], (list, tuple)):
            return f"params in a {type(group['params']).__name__}, which is no list"
    return None


def _reads_as_a_dict(value: object) -> bool:
    """Whether native code, which looks past methods of a class's own, finds what Python finds."""
    return isinstance(value, dict) and type(value).__getitem__ is dict.__getitem__
