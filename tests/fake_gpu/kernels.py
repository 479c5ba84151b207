"""Run queued Triton kernels by Triton's interpreter, on the kernels' own source.

Triton compiles and launches each kernel as on a GPU. When the stream reaches the launch, the
device hands over the packed parameters. The interpreter then runs a twin of the compiled
function: the same source, in whose globals all compiled functions are twins too.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
from mended_interpreter import mend_the_interpreter
from triton.compiler.compiler import CompiledKernel
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from fake_gpu import device

__all__ = ["install", "run"]


# ---- twins


# By id(), since Triton hashes a function by its whole source. The functions live as long as these.
_twins: dict[int, tuple[JITFunction, interpreter.InterpretedFunction]] = {}
_globals: dict[int, dict[str, Any]] = {}


def twin_of(value: Any) -> Any:
    """Return the interpreted twin of a compiled function; map the members of tuples too."""
    if isinstance(value, tl.constexpr):
        return twin_of(value.value)
    if isinstance(value, JITFunction):
        if id(value) not in _twins:
            _twins[id(value)] = value, _make_twin(value.fn)
        return _twins[id(value)][1]
    if isinstance(value, tuple):
        members = [twin_of(member) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    return value


def _make_twin(function: types.FunctionType) -> interpreter.InterpretedFunction:
    twin = types.FunctionType(
        function.__code__, _twin_globals(function.__globals__), function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    twin.__annotations__ = function.__annotations__
    twin.__kwdefaults__ = function.__kwdefaults__
    return interpreter.InterpretedFunction(twin)


def _twin_globals(names: dict[str, Any]) -> dict[str, Any]:
    """Return a module's globals, in which twins stand for the compiled functions."""
    if id(names) not in _globals:
        copied = _globals[id(names)] = dict(names)
        for name, value in names.items():
            if isinstance(value, JITFunction):
                copied[name] = twin_of(value)
    return _globals[id(names)]


def _compiled_language() -> list[tuple[Any, str, JITFunction]]:
    """Return the functions of Triton's language that are written in the language."""
    owners = (tl, tl.core, tl.math, tl.random, tl.standard, tl.tensor)
    return [
        (owner, name, value)
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, JITFunction)
    ]


_LANGUAGE = _compiled_language()
# The interpreter prepares the modules that a function names, and never undoes what it prepares for
# functions called by kernels.
_NAMES_BOTH = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})


@contextmanager
def interpreted_language() -> Iterator[None]:
    """Make Triton's language that of the interpreter, and afterwards that of the compiler."""
    scope = interpreter._patch_lang(_NAMES_BOTH)
    try:
        for owner, name, function in _LANGUAGE:
            setattr(owner, name, twin_of(function))
        yield
    finally:
        for owner, name, function in _LANGUAGE:
            setattr(owner, name, function)
        scope.restore()


# ---- parameters


class Parameter(NamedTuple):
    """A parameter of a compiled kernel: the place in its arguments, type, place in the bytes."""

    path: tuple[int, ...]
    type: tl.dtype
    offset: int


class Kernel(NamedTuple):
    """A compiled kernel, as far as the device needs it."""

    twin: interpreter.InterpretedFunction
    constants: dict[tuple[int, ...], Any]
    parameters: list[Parameter]


_kernels: dict[int, Kernel] = {}


def _leaves(types_: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield path and type of each argument that is passed at run time."""
    for i, each in enumerate(types_):
        if isinstance(each, (tuple, list)):
            yield from _leaves(each, (*path, i))
        elif each != "constexpr":
            yield (*path, i), each


def _register(compiled: CompiledKernel) -> None:
    """Note what a function's handle stands for, once Triton has loaded the function."""
    source = compiled.src
    parameters = []
    offset = ctypes.c_size_t()
    # The kernel's scratch memory follows the arguments; the kernels of the project use none.
    for number, (path, name) in enumerate(_leaves(source.signature.values())):
        handle = ctypes.c_void_p(compiled.function)
        if device.library.cuFuncGetParamInfo(
            handle, ctypes.c_size_t(number), ctypes.byref(offset), None
        ):
            raise RuntimeError(f"{compiled.name} has fewer parameters than its signature")
        parameters.append(Parameter(path, tl.str_to_ty(name, None), offset.value))
    constants = {path: twin_of(value) for path, value in source.constants.items()}
    _kernels[compiled.function] = Kernel(twin_of(source.fn), constants, parameters)


def _read(address: int, kind: tl.dtype) -> tl.tensor:
    """Return a parameter in the form that interpreted kernels take."""
    number = np.dtype(np.uint64 if kind.is_ptr() else interpreter._get_np_dtype(kind))
    value = np.frombuffer(ctypes.string_at(address, number.itemsize), number).copy()
    return tl.tensor(interpreter.TensorHandle(value, kind), kind)


def _arguments(kernel: Kernel, address: int) -> list[Any]:
    """Return the kernel's arguments: constants, and parameters from the packed bytes."""
    found: dict[tuple[int, ...], Any] = dict(kernel.constants)
    for path, kind, offset in kernel.parameters:
        found[path] = _read(address + offset, kind)

    def build(path: tuple[int, ...]) -> Any:
        if path in found:
            return found[path]
        inner = {p[len(path)] for p in found if p[: len(path)] == path and len(p) > len(path)}
        return tl.tuple([build((*path, i)) for i in sorted(inner)])

    return [build((i,)) for i in range(len(kernel.twin.arg_names))]


# ---- runs


def run(function: int, grid: tuple[int, int, int], address: int) -> None:
    """Run a kernel on the memory of the device; parameters lie packed at an address."""
    kernel = _kernels[function]
    with np.errstate(all="ignore"), interpreted_language():
        kernel.twin[grid](*_arguments(kernel, address))


def _astray(addresses: np.ndarray[Any, Any], size: int) -> int | None:
    """Return an address of so many bytes that is not the device's, or None."""
    if device.is_device_memory(int(addresses.min()), int(addresses.max()) + size):
        return None
    # The elements may lie in several allocations.
    for address in addresses.ravel().tolist():
        if not device.is_device_memory(address, address + size):
            return address
    return None


def _watch(method: Callable[..., Any], writes: bool) -> Callable[..., Any]:
    """Refuse accesses to memory that is not the device's: they could end the process."""

    def watched(builder: Any, pointers: Any, *others: Any) -> Any:
        mask, addresses = others[1 if writes else 0].data, pointers.data
        if not mask.all():
            addresses = addresses[np.broadcast_to(mask, addresses.shape)]
        if addresses.size:
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            address = _astray(addresses, size)
            if address is not None:
                verb = "writes" if writes else "reads"
                raise RuntimeError(f"a kernel {verb} memory that is not the device's: {address:#x}")
        return method(builder, pointers, *others)

    return watched


def install() -> Callable[[int, int, int, int, int], None]:
    """Prepare Triton; return the function that runs a kernel for the device."""
    mend_the_interpreter()
    builder = interpreter.InterpreterBuilder
    for name, writes in (("create_masked_load", False), ("create_masked_store", True)):
        setattr(builder, name, _watch(getattr(builder, name), writes))
    load = CompiledKernel._init_handles

    def load_and_register(compiled: CompiledKernel) -> None:
        if compiled.module is None:
            load(compiled)
            _register(compiled)

    CompiledKernel._init_handles = load_and_register

    def run_for_the_device(function: int, x: int, y: int, z: int, address: int) -> None:
        try:
            run(function, (x, y, z), address)
        except Exception as error:
            device.add_violation(f"{_kernels[function].twin.fn.__name__}: {error}")

    return run_for_the_device
