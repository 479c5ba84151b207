"""Prebound launches: kernels that Triton has launched once, for native code to launch again.

Triton's launcher takes about 10 µs of Python per launch. After a step through Triton, :func:`bind`
packs the arguments of the launches. Later ordinary steps are one native call each, which launches
the same kernels through the GPU's driver (``kernels/native/launches.h``). If Triton may do more
than launch, or packs arguments in an unknown way, Triton's launcher remains.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clr_optim.plan import Bucket, Plan

__all__ = ["AddressTable", "Call", "RowCall", "bind", "bind_rows", "launch", "pack"]

#: Versions of Triton whose order and layout of parameters a test has compared with ours.
KNOWN_TRITONS = ((3, 6), (3, 7), (3, 8), (3, 9))

# Types of arguments, in the letters of struct. Pointers begin with "*".
_LETTERS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "f32": "f", "fp64": "d", "f64": "d",
}  # fmt: skip
_POINTER = "Q"

# Behind the arguments Triton passes two addresses of scratch memory, null for kernels without any.
_SCRATCH = (_POINTER, _POINTER)


class Call(NamedTuple):
    """A launch that Triton has made."""

    #: the kernel, as ``kernel[grid](...)`` has returned it
    compiled: Any
    #: the numbers of programs, up to three
    grid: tuple[int, ...]
    #: the arguments in the kernel's order; constants at the end may be missing
    arguments: Sequence[Any]
    #: a bucket of up to eight rows whose gradients' addresses are arguments, and the name of the
    #: first of these arguments
    gradients: tuple[Bucket, str] | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    compiled_for: Mapping[str, Any],
    gradients: tuple[Bucket, str] | None = None,
) -> Call:
    """Launch a kernel through Triton, and return the call for :func:`bind`.

    Args:
        kernel: a function of Triton.
        grid, arguments, gradients: as in :class:`Call`.
        compiled_for: the constants that the kernel is compiled for, and the compiler's options.
    """
    return Call(kernel[grid](*arguments, **compiled_for), grid, arguments, gradients)


class AddressTable(NamedTuple):
    """The addresses of a bucket's gradients, as the kernels read them."""

    bucket: Bucket
    #: the table on the device, or None if the addresses travel as arguments
    table: Tensor | None = None


class RowCall(NamedTuple):
    """A launch that updates any row of a bucket, see :func:`bind_rows`."""

    #: the launch for any of the rows; the arguments ``row``, ``gradient`` and ``blocks`` vary
    call: Call
    bucket: Bucket
    #: returns the number of programs and the value of ``blocks`` for the number of a row
    shape_of: Callable[[int], tuple[int, int]]


class Packed(NamedTuple):
    """Arguments as a kernel receives them."""

    parameters: bytes
    #: the bytes of each parameter
    sizes: list[int]
    #: where each argument begins, by name
    offsets: dict[str, int]


def bind(
    plan: Plan,
    device: torch.device,
    tables: Sequence[AddressTable],
    calls: Sequence[Call],
    *,
    clips: bool = False,
    signals: Collection[str] = (),
    counted: int | None = None,
) -> str | None:
    """Have the ordinary steps of a plan repeat launches that Triton has just made.

    Call this after a step that was not captured, with the device as the current one. The device
    must agree with the plan: rows, settings, and the position, which the host must know. The
    launches keep the kernels and the arguments' tensors alive.

    The binding ends at the next general step, and whenever the plan is built anew; see
    ``Plan.bind`` in ``kernels/native/module.pyi``. If a table on the device moves at another time,
    call ``plan.native.bind(None)``. Before the host uploads addresses itself,
    ``launches.addresses(bucket)`` tells which the device has. If a step raises, the host must
    ask the device for the position, and upload every table again.

    Args:
        plan: the plan.
        device: the only device of the plan.
        tables: all buckets of the plan.
        calls: the launches of a whole step, in order.
        clips: whether the launches clip the gradients.
        signals: the kernels' arguments that each step takes from a GradScaler, by name.
        counted: the plan's count of calls after the step. If a signal handler or a finalizer has
            taken another step, nothing is bound. None: do not compare.

    Returns:
        Why Triton must launch, or None.
    """
    watch = _watched(calls)
    if isinstance(watch, str):
        return watch
    try:
        launches = plan.lib.Launches(device.index or 0, watch, clips=clips)
    except RuntimeError as error:  # no driver that native code knows, as on Intel's GPUs
        return str(error)
    for bucket, table in tables:
        launches.add_bucket(bucket.native, table=0 if table is None else table.data_ptr())
    keep = tuple(each.table for each in tables)
    for call in calls:
        why_not = _add(launches, call, keep, signals)
        if why_not:
            return why_not
    try:
        plan.native.bind(launches, plan.native.calls if counted is None else counted)
    except RuntimeError as error:  # no pinned memory is left
        return str(error)
    return None


def bind_rows(lib: Any, device: torch.device, calls: Sequence[RowCall]) -> Any:
    """Return native launches that update one row each, or why Triton must launch.

    Their method ``run_row`` takes the numbers of a launch and of a row. The launches serve the
    current stream, as long as the buckets' rows on the device are these.

    Args:
        lib: the compiled extension.
        device: the device of all rows, which must be the current one.
        calls: a launch for each bucket of the plan, in order.
    """
    watch = _watched([each.call for each in calls])
    if isinstance(watch, str):
        return watch
    try:
        launches = lib.Launches(device.index or 0, watch)
    except RuntimeError as error:
        return str(error)
    for each in calls:
        why_not = _add(launches, each.call, None, (), each)
        if why_not:
            return why_not
    return launches


def _add(
    launches: Any,
    call: Call,
    keep: object,
    signals: Collection[str],
    rows: RowCall | None = None,
) -> str | None:
    """Add a launch, and what to keep alive; return None, or why native code cannot make it."""
    packed = pack(call.compiled, call.arguments)
    if isinstance(packed, str):
        return packed
    compiled, metadata = call.compiled, call.compiled.metadata
    gradients = None
    if call.gradients is not None:
        bucket, name = call.gradients
        gradients = bucket.native, packed.offsets[name]
    of_rows = None
    if rows is not None:
        places = (packed.offsets[name] for name in ("row", "gradient", "blocks"))
        shapes = (n for row in range(len(rows.bucket.rows)) for n in rows.shape_of(row))
        of_rows = (rows.bucket.native, *places, tuple(shapes))
    try:
        launches.add_launch(
            function=compiled.function,
            grid=(*call.grid, 1, 1)[:3],
            threads=metadata.num_warps * metadata.target.warp_size,
            shared=metadata.shared,
            parameters=packed.parameters,
            sizes=packed.sizes,
            keep=(compiled, tuple(call.arguments), keep),
            gradients=gradients,
            rows=of_rows,
            **{name: packed.offsets[name] for name in signals if name in packed.offsets},
        )
    except ValueError as error:  # the driver expects other parameters
        return f"{metadata.name}: {error}"
    return None


def _watched(calls: Sequence[Call]) -> list[object] | str:
    """Return what tells at each step that Triton would only launch, or why Triton does more.

    Returns:
        The argument ``watch`` of ``Launches`` in ``kernels/native/module.pyi``.
    """
    import triton
    from triton import knobs

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version not in KNOWN_TRITONS:
        return f"Triton {triton.__version__} may pass other parameters than those known"
    watch: list[object] = [(knobs.compilation, "instrumentation_mode")]
    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(knobs.runtime, name)
        hooks = getattr(chain, "calls", None)
        if type(hooks) is not list:
            return "Triton's launch hooks are of an unknown kind"
        watch += [hooks, (knobs.runtime, name, chain)]
    functions = {id(call.compiled.src.fn): call.compiled.src.fn for call in calls}.values()
    return watch + [function.pre_run_hooks for function in functions]


def _why_not(metadata: Any) -> str | None:
    """Return why only Triton can launch a kernel with this metadata, or None."""
    reasons = {
        "several programs share a cluster": metadata.num_ctas != 1,
        "its grid is cooperative": metadata.launch_cooperative_grid,
        "it starts before the last launch ends": metadata.launch_pdl,
        "it needs scratch memory": metadata.global_scratch_size or metadata.profile_scratch_size,
        "it is instrumented": getattr(metadata, "instrumentation_mode", ""),
    }
    for reason, applies in reasons.items():
        if applies:
            return f"{metadata.name}: {reason}"
    return None


def pack(compiled: Any, arguments: Sequence[Any]) -> Packed | str:
    """Return a kernel's arguments as Triton packs them, or why their layout is unknown.

    Args:
        compiled: the compiled kernel.
        arguments: its arguments in order; constants at the end may be missing.
    """
    why_not = _why_not(compiled.metadata)
    if why_not:
        return why_not
    signature: Mapping[str, Any] = compiled.src.signature
    given = dict(zip(signature, arguments, strict=False))
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    letters, values = [], []
    for name in names:
        letter = _letter(signature[name])
        if letter is None or name not in given:
            return f"{compiled.metadata.name}: argument {name} is of an unknown kind"
        letters.append(letter)
        value = given[name]
        values.append(value.data_ptr() if isinstance(value, Tensor) else value)
    # In native mode struct aligns each number to its size, as the kernels do.
    layout = "@" + "".join((*letters, *_SCRATCH))
    ends = [struct.calcsize("@" + "".join(letters[:i])) for i in range(1, len(letters) + 1)]
    sizes = [struct.calcsize(letter) for letter in (*letters, *_SCRATCH)]
    offsets = {name: end - size for name, end, size in zip(names, ends, sizes, strict=False)}
    empty = itertools.repeat(0, len(_SCRATCH))
    return Packed(struct.pack(layout, *values, *empty), sizes, offsets)


def _letter(kind: object) -> str | None:
    """Return the letter of struct for a type of Triton, or None for a type that we do not pack."""
    if not isinstance(kind, str):
        return None
    return _POINTER if kind.startswith("*") else _LETTERS.get(kind)
