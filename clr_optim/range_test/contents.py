"""List the members of a value, and tell whether Python sees all of them."""

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

# Values of these classes have no members, and cannot change.
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
# An object with such an attribute has threads or processes. A copy would not match them.
RUNNING = (
    threading.Thread, type(threading.Lock()), type(threading.RLock()), threading.Condition,
    multiprocessing.process.BaseProcess, concurrent.futures.Executor,
)  # fmt: skip
# Objects of classes from these modules have state that Python cannot see.
_PARTLY_NATIVE = ("torch.distributed.", "torch._dynamo.", "clr_optim.")
# Wrappers of models, and the attributes in which a wrapper holds its model.
_WRAPPERS = ("torch.nn.parallel.distributed", "torch.distributed.fsdp.fully_sharded_data_parallel")
_OF_WRAPPERS = ("_parameters", "_buffers", "_modules", "training")
SOURCES = (DataLoader, Sampler, Dataset)
_WITH_ATTRIBUTES = (Tensor, np.ndarray, nn.Module, Optimizer, *SOURCES, *CONTAINERS)
# Containers without attributes. Their subclasses may have some.
_BARE = frozenset(CONTAINERS)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _cached(function: _Function) -> _Function:
    """Cache the answers about classes."""
    return cast(_Function, functools.lru_cache(maxsize=4096)(function))


@_cached
def is_atom(kind: Any) -> bool:
    """Return whether values of a class have no members, and cannot change."""
    return issubclass(kind, _ATOMS)


@_cached
def is_wrapper(kind: Any) -> bool:
    """Return whether a class wraps a module, and has other state that Python cannot see."""
    return any(base.__module__ in _WRAPPERS for base in kind.__mro__)


def members_of(value: Any) -> list[Any] | None:
    """Return the members of a value; ``None`` if Python may not see all members."""
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
    # By convention, an object does not change if its class defines a hash.
    immutable = kind.__hash__ not in (None, object.__hash__)
    return members if immutable or issubclass(kind, (np.ndarray, *CONTAINERS)) else None


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return the attributes that training may change; ``None`` if Python may not see all."""
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
    """Return whether an object consists of its attributes, and its class defines no copying."""
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
    # As in pickle: an object that is larger than its attributes need has state in C.
    given = len(slots_of(kind)) + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    return bool(kind.__basicsize__ <= object.__basicsize__ + given * struct.calcsize("P"))


def dict_of(value: Any) -> dict[str, Any]:
    """Return a value's ``__dict__``; an empty dictionary if the value has none."""
    try:
        contents: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return contents


@_cached
def slots_of(kind: Any) -> list[str]:
    """Return the names of the attributes in a class's slots."""
    names: list[str] = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    return names


def bytes_of(value: Any) -> int:
    """Return the size of a copy of a value, in bytes, without its members."""
    kind: Any = type(value)
    if issubclass(kind, Tensor):
        return int(value.numel() * value.element_size())
    if issubclass(kind, np.ndarray):
        return int(value.nbytes)
    return 8 * len(value) if issubclass(kind, (*CONTAINERS, *BUFFERS)) else 0
