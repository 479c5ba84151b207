"""Plans: which tensors one kernel call updates, kept from step to step while nothing changes.

What torch does at every step (collect, group, check, allocate) is done once per plan. Each step
asks only whether anything it was built from is still the same, down to the pointers; if not, the
plan is built anew. A pointer that is not known to be right is never used.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.rules import KERNELS, Slot, UpdateRule
from clr_optim.sharding import (
    DTensor,
    Spread,
    is_wide,
    local_part,
    same_spread,
    spread_of,
    spreads,
    why_not_local,
)

__all__ = ["DTYPES", "Bucket", "Plan", "View", "classify"]

#: Storage dtypes in the order by which native code knows them.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _int64s(*names: str) -> np.dtype[np.void]:
    return np.dtype([(name, np.int64) for name in names])


# In step with Row and Bucket in scan.h.
_ROW = _int64s(
    "param", "grad", "state0", "state1", "state2", "counter", "numel", "group", "first", "active"
)
_BUCKET = _int64s("scan", "rows", "count", "active", "kernel", "dtype", "wide_counter", "held")

# Answers of clr_current.
_ALL_ACTIVE, _SETTINGS_CHANGED, _SOME_IDLE, _BUSY = 0, 1, 2, -2
_PAUSE_S = 1e-4

# Keys of a group that change at every step.
_MOVING = frozenset({"params", "lr", "clr_step"})

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
            )
        ),
    ]


class View(ctypes.Structure):
    """In step with View in scan.h."""

    _fields_ = [
        *(
            (name, ctypes.py_object)
            for name in (
                "groups", "members", "keys", "settings", "state", "dicts", "idle",
                "params", "grad", "none",
            )
        ),
        ("buckets", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("busy", ctypes.c_int64),
        ("done", ctypes.c_int64),
    ]  # fmt: skip

    # Who holds the view may use all of it though another thread has the plan rebuilt.
    address = 0  #: its own
    scalars = np.zeros((0, 0))  #: :attr:`Plan.scalars`
    scalars_address = 0
    memory: object = None  #: what it points to


@dataclass(eq=False)
class Row:
    """A parameter of a bucket while the plan is built."""

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
    table: np.ndarray[Any, np.dtype[np.void]] = field(init=False)  #: a row per tensor
    params: list[Tensor] = field(init=False)
    layout: np.ndarray[Any, np.dtype[np.int64]] = field(init=False)
    scan: _Scan = field(init=False)
    #: what the rows point to, kept alive until the step is over; None where that is not needed
    grads: list[Tensor | None] | None = field(init=False, default=None)

    def finish(self, state: dict[Tensor, dict[str, Any]], *, holds: bool) -> None:
        """Write the table that kernels read, and what :meth:`Plan.is_current` compares."""
        self.params = [row.param for row in self.rows]
        grads = [p.grad for p in self.params]
        self.grads = grads if holds else None
        self.table = np.array([*map(self._line, self.rows, grads)], dtype=_ROW)
        counters = ["step"] if self.rows and self.rows[0].counter is not None else []
        keys = [slot.name for slot in self.slots] + counters
        parts = [local_part(p) for p in self.params]
        self.layout = np.array(
            [n for p in parts for n in (p.dim(), *p.shape, *p.stride())], dtype=np.int64
        )
        code, bits = _DLPACK[self.dtype]
        device_type, device_id = parts[0].__dlpack_device__()
        more: dict[str, Any] = {}
        if self.spread is not None:
            tensors: list[Any] = [t for row in self.rows for t in (row.param, *row.slots)]
            more = {
                "dtensor": DTensor,
                "specs": [tensor._spec for tensor in tensors],
                "local": "_local_tensor",
                "spec": "_spec",
                "placements": "placements",
                "mesh": "mesh",
            }
        # Of a DTensor's own object nothing is needed but its attributes.
        words = (0, 0) if more else _WORDS
        if self.grads is not None:
            more |= {"grads": self.grads, "nones": [None] * len(self.grads)}
        self.scan = _Scan(
            params=self.params,
            dicts=[state[p] for p in self.params] if keys else [],
            keys=keys,
            tensors=[tensor for row in self.rows for tensor in row.held],
            grad="grad",
            none=None,
            capsule=Tensor.__dlpack_c_exchange_api__,
            tensor=Tensor,
            is_neg="is_neg",
            no=False,
            layout=self.layout.ctypes.data,
            slots=len(self.slots),
            code=code,
            bits=bits,
            counter_bits=64 if self.wide_counter else 32,
            device_type=int(device_type),
            device_id=int(device_id),
            impl=words[0],
            storage=words[1],
            **more,
        )

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
            self.table.ctypes.data,
            len(self.rows),
            int(self.table["active"].sum()),
            KERNELS.index(self.kernel),
            DTYPES.index(self.dtype),
            self.wide_counter,
            self.grads is not None,
        )

    def release(self) -> None:
        """Let go of the gradients."""
        if self.grads is not None:
            self.grads[:] = [None] * len(self.grads)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory without gaps or overlaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_layout(tensor: Tensor, param: Tensor) -> bool:
    if tensor.shape != param.shape:
        return False
    if param.is_contiguous():
        return tensor.is_contiguous()
    return tensor.stride() == param.stride()


def _is_plain(tensor: object, param: Tensor) -> bool:
    """Whether a kernel may walk this tensor beside its parameter."""
    if not isinstance(tensor, Tensor) or not same_spread(tensor, param):
        return False
    tensor, param = local_part(tensor), local_part(param)
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device == param.device
        and tensor.dtype == param.dtype
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and _same_layout(tensor, param)
    )


def _is_aligned(row: Row) -> bool:
    tensors = [row.param, *row.slots, *([] if row.param.grad is None else [row.param.grad])]
    return not any(local_part(tensor).data_ptr() % 16 for tensor in tensors)


def _why_not(param: Tensor, device: str) -> str | None:
    """Why a kernel cannot serve this parameter with the gradient it has, or None."""
    why, grad = why_not_local(param), param.grad
    if why is not None:
        return why
    whole, param = param, local_part(param)
    if type(param) not in (Tensor, torch.nn.Parameter):
        return f"tensors of type {type(param).__name__}"
    if param.device.type != device:
        return f"tensors on {param.device.type}"
    if param.layout is not torch.strided or param.dtype not in DTYPES:
        return f"{str(param.dtype).removeprefix('torch.')} {param.layout} tensors"
    if not _is_dense(param):
        return "parameters whose memory has gaps or overlaps"
    if grad is None or _is_plain(grad, whole):
        return None
    if not same_spread(grad, whole):
        return "gradients divided over the ranks in another way than their parameter"
    if grad.layout is not torch.strided:
        return "sparse gradients"
    return "gradients of another layout, dtype or type than their parameter"


def classify(
    optimizer: Optimizer, rule: UpdateRule, device: str, *, capturable: bool = False
) -> dict[str | None, list[Tensor]]:
    """Parameters by the reason why no kernel serves them; those that one does under None."""
    reasons: dict[str | None, list[Tensor]] = {}
    for group in optimizer.param_groups:
        why = rule.not_fused(group, capturable=capturable)
        for param in group["params"]:
            reasons.setdefault(why or _why_not(param, device), []).append(param)
    return reasons


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
        holds: whether gradients that were looked at are kept alive until ``clr_step`` is over or
            :meth:`release` is called, as another thread may drop them meanwhile.
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
        holds: bool = False,
    ) -> None:
        self._optimizer = optimizer
        self._rule = rule
        self._lib = lib
        self._device = device
        self._capturable = capturable
        self._by_alignment = by_alignment
        self._holds = holds
        self.buckets: list[Bucket] = []
        #: parameters with a gradient that torch's own step must serve, and why
        self.rest: list[tuple[Tensor, str]] = []
        #: those of them whose own gradient or layout is the reason
        self._odd: list[tuple[Tensor, str]] = []
        self._idle: list[Tensor] = []
        # Another thread may ask for a new plan while this one builds it.
        self._turn = threading.RLock()
        self._groups: list[dict[str, Any]] | None = None
        self._members: list[list[Tensor]] = []
        self._settings: list[list[Any]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._flags: list[tuple[str | None, str]] = []
        #: a row of the kernel's scalars per group, the learning rate to be filled in
        self.scalars = np.zeros((0, 0))
        #: whether the next step creates state
        self.pending = False
        self._state: Any = None
        self._params: list[Tensor] = []
        #: how the parameters, those of the rest too, are divided over ranks
        self.spreads: list[Spread | None] = []
        #: whether they are all float64
        self.wide = False
        #: whether a parameter of the buckets lacks a gradient
        self.partial = False
        #: a line per bucket
        self.table = np.zeros(0, dtype=_BUCKET)
        self.view = View()

    def refresh(self) -> None:
        """Bring the plan up to date: at least the gradients' pointers, at most all of it."""
        if (self._odd and self._rest_changed()) or not self.is_current():
            with self._turn:
                self._build()

    def forget(self) -> None:
        """Have the next :meth:`refresh` build the plan anew."""
        with self._turn:
            self._groups = None
            self.release()

    def release(self) -> None:
        """Let go of the gradients, if after a :meth:`refresh` no step is to be taken."""
        with self._turn:
            if not self.view.busy:
                self.table["held"] = 0
                for bucket in self.buckets:
                    bucket.release()

    def _rest_changed(self) -> bool:
        """Whether a gradient that no kernel could take has become another."""
        return any(p.grad is not None and _why_not(p, self._device) != why for p, why in self._odd)

    def is_current(self) -> bool:
        """Whether all that the plan was built from is as it was.

        Takes in the gradients' pointers on the way, which move at every ``zero_grad``.
        """
        optimizer = self._optimizer
        groups = optimizer.param_groups
        if groups is not self._groups or optimizer.state is not self._state:
            return False
        if len(groups) != len(self._members):
            return False
        # A list (of betas, say) may change within itself, which no comparison of objects shows.
        changed = self._lists and any(now != then for now, then in self._lists)
        if changed and not self._take_settings():
            return False
        answer = self._ask()
        if answer == _SETTINGS_CHANGED and self._take_settings():
            answer = self._ask()
        self.partial = answer == _SOME_IDLE
        return answer in (_ALL_ACTIVE, _SOME_IDLE)

    def _ask(self) -> int:
        """What ``clr_current`` says, once no other thread is in the middle of a step."""
        view = self.view
        while True:
            answer: int = self._lib.clr_current(view.address)
            if answer != _BUSY:
                return answer
            time.sleep(_PAUSE_S)

    def _take_settings(self) -> bool:
        """Take in changed settings of the groups; whether the buckets stay as they are."""
        groups = self._optimizer.param_groups
        if [self._flags_of(group) for group in groups] != self._flags:
            return False
        if [self._keys_of(group) for group in groups] != self.view.keys:
            return False  # the scan compares settings by the keys that there were
        for i, group in enumerate(groups):
            if self._flags[i][0] is None:
                self.scalars[i] = self._rule.row(group)
        self._settings[:] = [self._settings_of(group) for group in groups]
        self._lists = self._copy_lists()
        return True

    def _copy_lists(self) -> list[tuple[list[Any], list[Any]]]:
        return [(v, list(v)) for row in self._settings for v in row if isinstance(v, list)]

    def active_params(self) -> list[Tensor]:
        """All parameters of the buckets that have a gradient."""
        if not self.partial:
            return self._params
        return [
            param
            for bucket in self.buckets
            for param, active in zip(bucket.params, bucket.table["active"].tolist(), strict=True)
            if active
        ]

    def commit(self) -> None:
        """Say that a step was taken, and hand over the state it created, under torch's names."""
        # As after any in-place update: a backward through an older graph must raise.
        torch.autograd.graph.increment_version(self.active_params())
        if not self.pending:
            return
        with self._turn:
            state = self._optimizer.state
            for bucket in self.buckets:
                for row in bucket.rows:
                    if row.pending:
                        state[row.param].update(row.pending)
                        row.pending, row.first = {}, False
            self.pending = False
            self._index()
            self.release()

    @staticmethod
    def _settings_of(group: dict[str, Any]) -> list[Any]:
        """All of a group but what changes at every step anyway."""
        return [value for key, value in group.items() if key not in _MOVING]

    @staticmethod
    def _keys_of(group: dict[str, Any]) -> list[str]:
        """Of what :meth:`_settings_of` gives."""
        return [key for key in group if key not in _MOVING]

    def _flags_of(self, group: dict[str, Any]) -> tuple[str | None, str]:
        """What of a group's settings decides buckets; all else is data."""
        reason = self._rule.not_fused(group, capturable=self._capturable)
        return (reason, self._rule.kernel(group))

    def _build(self) -> None:
        optimizer, rule = self._optimizer, self._rule
        self._groups = None  # not current, should anything below raise
        self.rest, self._odd, self._idle = [], [], []
        groups = optimizer.param_groups
        self._flags = [self._flags_of(group) for group in groups]
        buckets: dict[tuple[Any, ...], Bucket] = {}
        for number, (group, (reason, kernel)) in enumerate(zip(groups, self._flags, strict=True)):
            slots = rule.slots(group) if reason is None else ()
            for param in group["params"]:
                own = None if reason else _why_not(param, self._device)
                why = reason or own
                row = None if why else self._row(param, number, slots)
                if isinstance(row, str):
                    why, row = row, None
                if row is not None:
                    wide = row.counter is not None and row.counter.dtype == torch.float64
                    aligned = self._by_alignment and _is_aligned(row)
                    key = (kernel, param.dtype, wide, param.device, aligned, spread_of(param))
                    buckets.setdefault(key, Bucket(*key, slots)).rows.append(row)
                elif param.grad is not None:
                    self.rest.append((param, why or ""))
                    if own:
                        self._odd.append((param, own))
                else:
                    self._idle.append(param)
        self._leave_shared_memory(buckets.values())
        self.buckets = [bucket for bucket in buckets.values() if bucket.rows]
        self._members = [list(group["params"]) for group in groups]
        self.spreads = spreads(param for members in self._members for param in members)
        self.wide = is_wide(param for members in self._members for param in members)
        self._settings = [self._settings_of(group) for group in groups]
        self._lists = self._copy_lists()
        self.pending = any(row.pending for b in self.buckets for row in b.rows)
        rows = [
            rule.row(group) if reason is None else ()
            for group, (reason, _) in zip(groups, self._flags, strict=True)
        ]
        width = max([1, *map(len, rows)])  # the learning rate has its place even if none is fused
        scalars = np.array([row or (0.0,) * width for row in rows], dtype=np.float64)
        self.scalars = scalars.reshape(len(rows), width)  # of no groups, too
        self._index()
        self._groups = groups

    def _row(self, param: Tensor, group: int, slots: tuple[Slot, ...]) -> Row | str | None:
        """The parameter's row; why it has none; or None while it has neither gradient nor state."""
        rule, optimizer = self._rule, self._optimizer
        # Not optimizer.state[param]: that would create an entry earlier than torch does.
        state = optimizer.state.get(param, {})
        tensors: list[Tensor] = []
        pending: dict[str, Tensor] = {}
        counter = None
        if not isinstance(state, dict):
            return "state that is no dictionary"
        fresh = len(state) == 0
        if fresh and param.grad is None and (slots or rule.has_step):
            return None
        if rule.has_step:
            if fresh:
                # As torch's _get_scalar_dtype: float64 only where that is the default dtype.
                wide = torch.get_default_dtype() == torch.float64
                wide = wide and not optimizer.param_groups[group].get("fused")
                counter = torch.zeros(
                    (), dtype=torch.float64 if wide else torch.float32, device=param.device
                )
                pending["step"] = counter
            else:
                counter = state.get("step")
                if (
                    type(counter) is not Tensor
                    or counter.device.type not in ("cpu", self._device)
                    or counter.numel() != 1
                    or counter.dtype not in (torch.float32, torch.float64)
                ):
                    return "a step counter that is no float tensor on the CPU"
                if counter.device != param.device:
                    # Where the kernel counts; a state dict has it where torch would.
                    counter = state["step"] = counter.to(param.device)
        first = False
        for slot in slots:
            tensor: Any = state.get(slot.name)
            if tensor is None and (fresh or slot.fill is None):
                if param.grad is None:
                    return None
                if slot.fill is None:
                    tensor, first = torch.empty_like(param, requires_grad=False), True
                else:
                    tensor = torch.full_like(
                        param, slot.fill(optimizer.defaults), requires_grad=False
                    )
                pending[slot.name] = tensor
            elif not _is_plain(tensor, param):
                return f"state[{slot.name!r}] of another layout, dtype or type than its parameter"
            tensors.append(tensor)
        ordered = {name: pending[name] for name in rule.state_order if name in pending}
        return Row(param, group, tensors, counter, ordered, first)

    def _leave_shared_memory(self, buckets: Iterable[Bucket]) -> None:
        """Leave to torch what shares memory: it goes one by one, a kernel all at once."""
        spans: list[tuple[int, int, Row | None]] = []
        for param in (local_part(param) for param, _ in self.rest):
            where = param.device.type
            if param.layout is torch.strided and where == self._device and param.numel():
                reach = 1 + sum(
                    (n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True)
                )
                begin = param.data_ptr()
                spans.append((begin, begin + reach * param.element_size(), None))
        for bucket in buckets:
            for row in bucket.rows:
                for tensor in map(local_part, (row.param, *row.held)):
                    if tensor.numel():
                        begin = tensor.data_ptr()
                        spans.append((begin, begin + tensor.nbytes, row))
        spans.sort(key=lambda span: span[:2])
        shared: dict[int, Row] = {}
        last: float = -math.inf
        owner: Row | None = None
        for begin, end, this in spans:
            if begin < last:
                shared.update({id(row): row for row in (this, owner) if row is not None})
            if end > last:
                last, owner = end, this
        if not shared:
            return
        for bucket in buckets:
            bucket.rows = [row for row in bucket.rows if id(row) not in shared]
        for row in shared.values():
            if row.param.grad is not None:
                self.rest.append((row.param, "tensors that share memory"))
            else:
                self._idle.append(row.param)

    def _index(self) -> None:
        state, groups = self._optimizer.state, self._optimizer.param_groups
        for bucket in self.buckets:
            states = {row.param: state.get(row.param, {}) for row in bucket.rows}
            bucket.finish(states, holds=self._holds)
        self.table = np.array([bucket.header() for bucket in self.buckets], dtype=_BUCKET)
        self._params = [param for bucket in self.buckets for param in bucket.params]
        self.partial = int(self.table["active"].sum()) < len(self._params)
        self._state = state
        view = View(
            groups=groups,
            members=self._members,
            keys=[self._keys_of(group) for group in groups],
            settings=self._settings,
            state=state,
            dicts=list(state.values()),
            idle=self._idle,
            params="params",
            grad="grad",
            none=None,
            buckets=self.table.ctypes.data,
            count=len(self.buckets),
        )
        view.address = ctypes.addressof(view)
        view.scalars, view.scalars_address = self.scalars, self.scalars.ctypes.data
        view.memory = [
            self.table, *((bucket.scan, bucket.table, bucket.layout) for bucket in self.buckets)
        ]  # fmt: skip
        self.view = view  # another thread may take it up at once
