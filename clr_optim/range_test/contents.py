"""What a value holds, and whether Python sees all of it."""

from __future__ import annotations

import array
import concurrent.futures
import copyreg
import functools
import multiprocessing.process
import random
import struct
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from clr_optim.sharding import DTensor

__all__ = [
    "BUFFERS", "CONTAINERS", "GENERATORS", "RUNNING", "SOURCES", "attributes_of", "bytes_of",
    "dict_of", "is_atom", "is_plain", "is_wrapper", "members_of", "slots_of",
]  # fmt: skip

_ATOMS: tuple[type, ...] = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type, property,
    types.FunctionType, types.BuiltinFunctionType, types.ModuleType,
    weakref.ReferenceType, *weakref.ProxyTypes,
    torch.dtype, torch.layout, torch.memory_format, np.generic, np.memmap,
)  # fmt: skip
GENERATORS = (
    torch.Generator, random.Random, np.random.Generator, np.random.BitGenerator,
    np.random.RandomState,
)  # fmt: skip
CONTAINERS = (dict, list, tuple, deque, set)
BUFFERS = (bytearray, array.array)
# Who owns one of these has other threads or processes, which a copy would contradict.
RUNNING = (
    threading.Thread, type(threading.Lock()), type(threading.RLock()), threading.Condition,
    multiprocessing.process.BaseProcess, concurrent.futures.Executor,
)  # fmt: skip
# Objects of these modules have state that Python does not see.
_PARTLY_NATIVE = ("torch.distributed.", "torch._dynamo.", "clr_optim.")
_WRAPPERS = ("torch.nn.parallel.distributed", "torch.distributed.fsdp.fully_sharded_data_parallel")
_OF_WRAPPERS = ("_parameters", "_buffers", "_modules", "training")
SOURCES = (DataLoader, Sampler, Dataset)
_WITH_ATTRIBUTES = (Tensor, np.ndarray, nn.Module, Optimizer, *SOURCES, *CONTAINERS)
_BARE = frozenset(CONTAINERS)  # without attributes

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _cached(function: _Function) -> _Function:
    """Ask a question about a class once."""
    return cast(_Function, functools.lru_cache(maxsize=4096)(function))


@_cached
def is_atom(kind: Any) -> bool:
    """Whether values of a class hold no others, and do not change."""
    return issubclass(kind, _ATOMS)


@_cached
def is_wrapper(kind: Any) -> bool:
    """Whether a class of modules has, beside the wrapped module, state that Python does not see."""
    return any(base.__module__ in _WRAPPERS for base in kind.__mro__)


def members_of(value: Any) -> list[Any] | None:
    """The values that a value holds; ``None`` where there may be some that Python does not see."""
    kind: Any = type(value)
    if issubclass(kind, (DTensor, *GENERATORS, *BUFFERS)):
        return []
    if kind in _BARE:
        return list(value.values() if kind is dict else value)
    if issubclass(kind, types.MethodType):
        return [value.__self__]
    if issubclass(kind, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    members: list[Any] = []
    if issubclass(kind, dict):
        members += dict.values(value)
    elif issubclass(kind, CONTAINERS):
        members += value
    elif issubclass(kind, np.ndarray) and value.dtype.hasobject:
        members += value.ravel().tolist()
    attributes = attributes_of(value)
    if attributes is not None:
        return [*members, *attributes.values()]
    # By convention an object whose class defines a hash does not change.
    immutable = kind.__hash__ not in (None, object.__hash__)
    return members if immutable or issubclass(kind, (np.ndarray, *CONTAINERS)) else None


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of a value, as far as training may change them; ``None`` if it has none."""
    kind: Any = type(value)
    if kind in _BARE or issubclass(kind, DTensor):
        return {} if kind in _BARE else None
    if not is_plain(kind) and not issubclass(kind, _WITH_ATTRIBUTES):
        return None
    contents = dict_of(value)
    if is_wrapper(kind):
        contents = {name: contents[name] for name in _OF_WRAPPERS}
    slots = {name: getattr(value, name) for name in slots_of(kind) if hasattr(value, name)}
    return {**contents, **slots} if slots else contents


@_cached
def is_plain(kind: Any) -> bool:
    """Whether an object's attributes are all of it, and its class defines no copying."""
    if is_atom(kind) or f"{kind.__module__}.".startswith(_PARTLY_NATIVE):
        return False
    if issubclass(kind, types.SimpleNamespace):
        return True
    if (
        kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__reduce__ is not object.__reduce__
        or hasattr(kind, "__deepcopy__")
    ):
        return False
    # As pickle asks it: an object of C has more in it than what Python gives to each.
    given = len(slots_of(kind)) + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    return bool(kind.__basicsize__ <= object.__basicsize__ + given * struct.calcsize("P"))


def dict_of(value: Any) -> dict[str, Any]:
    """The dictionary of a value's attributes; an empty one where it has none."""
    try:
        contents: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return contents


@_cached
def slots_of(kind: Any) -> list[str]:
    """The names of the attributes that a class's objects have outside of a dictionary."""
    names: list[str] = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    return names


def bytes_of(value: Any) -> int:
    """The memory that a copy of a value itself would take, without what it leads to."""
    kind: Any = type(value)
    if issubclass(kind, Tensor):
        return int(value.numel() * value.element_size())
    if issubclass(kind, np.ndarray):
        return int(value.nbytes)
    return 8 * len(value) if issubclass(kind, (*CONTAINERS, *BUFFERS)) else 0
