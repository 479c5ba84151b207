"""A watch over the memory that kernels read and write in Triton's interpreter.

The watch does the work of a GPU's sanitizer. Each launch must obey these rules:

- Every element lies in the memory of a living tensor. The watch finds an address past a tensor's
  end or in freed memory, even where a CPU would not fault.
- Every address is a multiple of the element's size, and of the alignment promised to the compiler.
- A launch writes each element at most once. Only the writing lane may read the element, and only
  before the write: a GPU runs programs and their threads at the same time, the interpreter in turn.
- A barrier orders the threads of a program: what one writes before it, the others read after it.
- Each program may take a ticket by an atomic operation. What the program with the last ticket does
  then comes after all that the others did before their tickets.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Addresses = npt.NDArray[np.int64]


class MemoryFaultError(AssertionError):
    """A kernel read or wrote memory that it must not touch."""


def alive() -> tuple[Addresses, Addresses]:
    """Return the begins of all CPU tensors' memory, in order, and the ends."""
    # Avoid isinstance(): it is slow, and asks weak proxies for the class of freed objects.
    kinds = _kinds(torch.Tensor)
    tensors = [t for t in gc.get_objects() if type(t) in kinds]
    tensors += [t for t in (known() for known in _frozen) if t is not None]
    # A gradient that only its parameter refers to may be no Python object yet.
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    found: dict[int, int] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            begin = storage.data_ptr()
            found[begin] = max(found.get(begin, 0), begin + storage.nbytes())
    begins = np.array(sorted(found), dtype=np.int64)
    return begins, np.array([found[b] for b in begins.tolist()], dtype=np.int64)


#: Tensors that :func:`freeze` has hidden from the next scans.
_frozen: list[weakref.ref[torch.Tensor]] = []


def freeze() -> None:
    """Exclude the present objects, modules and collected tests, from the scans for tensors."""
    gc.collect()
    kinds = _kinds(torch.Tensor)
    _frozen.extend(weakref.ref(t) for t in gc.get_objects() if type(t) in kinds)
    gc.freeze()


def _kinds(of: type) -> set[type]:
    return {of}.union(*(_kinds(kind) for kind in type.__subclasses__(of)))


class Launch:
    """The elements that the programs of one launch have read and written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.begins, self.ends = alive()
        #: per access: whether it writes, program, size of an element, addresses, lanes, and how
        #: many barriers the program has passed
        self.touched: list[tuple[bool, int, int, Addresses, Addresses, int]] = []
        self.barriers: Counter[int] = Counter()
        #: the programs that have taken a ticket, and whether each access came after its ticket
        self.tickets: list[int] = []
        self.late: list[bool] = []

    def touch(
        self, program: int, at: Addresses, size: int, lane: Addresses, *, writes: bool
    ) -> None:
        """Check and note an access: elements of ``size`` bytes at these addresses and lanes."""
        astray = at % size != 0
        if astray.any():
            raise MemoryFaultError(
                f"{self.name}: program {program} {'writes' if writes else 'reads'} {size} bytes at "
                f"{int(at[astray][0]):#x}, which is not a multiple of that"
            )
        below = np.searchsorted(self.begins, at, side="right") - 1
        outside = (below < 0) | (at + size > self.ends[np.maximum(below, 0)])
        if outside.any():
            where, near = int(at[outside][0]), int(below[outside][0])
            tensor = "below all tensors"
            if near >= 0:
                tensor = f"{where - self.ends[near]} bytes past the end of the nearest tensor below"
            raise MemoryFaultError(
                f"{self.name}: program {program} {'writes' if writes else 'reads'} {size} bytes "
                f"at {where:#x}, {tensor}; in all {int(outside.sum())} elements"
            )
        self.touched.append((writes, program, size, at, lane, self.barriers[program]))
        self.late.append(program in self.tickets)

    def check(self) -> None:
        """Check that each element is written once, and read only before, by the same lane."""
        pairs = list(zip(self.touched, self.late, strict=True))
        last = self.tickets[-1] if self.tickets else None
        self._check([each for each, late in pairs if not (late and each[1] == last)])
        self._check([each for each, late in pairs if late])

    def _check(self, touched: list[tuple[bool, int, int, Addresses, Addresses, int]]) -> None:
        # The smallest element: the places that the check tells apart.
        grain = min((size for _, _, size, *_ in touched), default=1)
        written, read = (_joined(touched, grain, writes=writes) for writes in (True, False))
        if (written[0, 1:] < written[0, :-1]).any():
            written = written[:, np.argsort(written[0], kind="stable")]
        for i in np.flatnonzero(written[0, 1:] == written[0, :-1])[:1]:
            (place, _, *first, _), (_, _, *second, _) = written[:, i : i + 2].T.tolist()
            raise MemoryFaultError(
                f"{self.name}: {_program(*first)} and {_program(*second)} write to the same place, "
                f"{place * grain:#x}"
            )
        place = np.searchsorted(written[0], read[0])
        there = place < written.shape[1]
        read, write = read[:, there], written[:, place[there]]
        same = read[0] == write[0]
        fine = (read[1] < write[1]) & (read[2:4] == write[2:4]).all(axis=0)
        fine |= (read[2] == write[2]) & (read[4] != write[4])
        for i in np.flatnonzero(same & ~fine)[:1]:
            (place, _, *reader, _), (_, _, *writer, _) = read[:, i].tolist(), write[:, i].tolist()
            raise MemoryFaultError(
                f"{self.name}: {_program(*reader)} reads what {_program(*writer)} writes, "
                f"at {place * grain:#x}"
            )


def _joined(
    touched: list[tuple[bool, int, int, Addresses, Addresses, int]], grain: int, *, writes: bool
) -> Addresses:
    """Return places, order, programs, lanes and barriers of all reads or all writes."""
    parts = [np.empty((5, 0), dtype=np.int64)]
    for order, (writing, program, size, at, lane, barriers) in enumerate(touched):
        if writing is writes:
            each = size // grain
            part = np.empty((5, at.size * each), dtype=np.int64)
            part[0] = (at[:, None] // grain + np.arange(each)).reshape(-1)
            part[1], part[2], part[3], part[4] = order, program, lane.repeat(each), barriers
            parts.append(part)
    return np.concatenate(parts, axis=1)


def _program(program: int, lane: int) -> str:
    return f"lane {lane} of program {program}"


def watch() -> None:
    """Check every launch from now on."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic, barrier = builder.create_atomic_rmw, builder.create_barrier
    set_attribute = interpreter.TensorHandle.set_attr
    call = interpreter.GridExecutor.__call__
    launches: list[Launch] = []

    def note(pointers: Any, mask: Any, *, writes: bool) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        lane = np.flatnonzero(mask.data)
        at = pointers.data.reshape(-1)[lane].astype(np.int64)
        launches[-1].touch(builder.grid_idx[0], at, size, lane, writes=writes)

    def masked_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        note(pointers, mask, writes=False)
        return load(pointers, mask, *rest, **named)

    def masked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask, writes=True)
        return store(pointers, value, mask, *rest)

    def watched(executor: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(Launch(executor.fn.__name__))
        try:
            done = call(executor, *args, **kwargs)
            launches[-1].check()
        finally:
            launches.pop()
        return done

    def told(handle: Any, key: str, values: Any) -> None:
        # The compiler makes wide loads of this promise, and the interpreter ignores it.
        if key == "tt.divisibility" and (handle.data % handle.data.dtype.type(values[0])).any():
            raise MemoryFaultError(f"{launches[-1].name}: no multiples of {values[0]}, as promised")
        set_attribute(handle, key, values)

    def ticket(how: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].tickets.append(builder.grid_idx[0])
        return atomic(how, pointers, value, mask, *rest)

    def passed() -> Any:
        launches[-1].barriers[builder.grid_idx[0]] += 1
        return barrier()

    def unknown(*args: Any) -> Any:
        raise NotImplementedError("the watch does not know this atomic operation")

    interpreter.TensorHandle.set_attr = told
    builder.create_atomic_cas, builder.create_atomic_rmw = unknown, ticket
    builder.create_barrier = passed
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    interpreter.GridExecutor.__call__ = watched
    freeze()
