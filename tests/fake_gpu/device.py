"""The fake device for Python: its library, the order of its streams, its violations."""

from __future__ import annotations

import ctypes
from enum import IntEnum

__all__ = [
    "Order", "add_violation", "append", "finish", "finish_stream", "is_device_memory",
    "last_graph", "library", "set_order", "take_violations",
]  # fmt: skip

#: The preloaded library.
library = ctypes.CDLL("libcuda.so.1")
library.fake_take_violations.restype = library.fake_last_graph.restype = ctypes.c_char_p
library.fake_set_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
library.fake_finish_stream.argtypes = [ctypes.c_uint64]
library.fake_append.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p]
library.fake_is_device_memory.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
library.fake_add_violation.argtypes = [ctypes.c_char_p]


class Order(IntEnum):
    """When operations run."""

    AT_ONCE = 0
    LATE = 1
    RANDOM = 2

    @classmethod
    def parse(cls, text: str) -> tuple[Order, int]:
        """Return the order and the seed that "0", "1" or "2:SEED" mean."""
        order, _, seed = text.partition(":")
        return cls(int(order)), int(seed or 0)


def set_order(order: Order, seed: int = 0) -> None:
    """Finish all work, then run later operations in another order."""
    library.fake_set_order(order, seed)


def finish() -> None:
    """Run all operations of all streams."""
    library.fake_finish()


def finish_stream(stream: int) -> None:
    """Run all operations of the stream with this handle."""
    library.fake_finish_stream(stream)


def append(stream: int, number: int, name: str) -> bool:
    """Append an operation of Python to a stream; return whether a capture has taken it."""
    return bool(library.fake_append(stream, number, name.encode()))


def is_device_memory(begin: int, end: int) -> bool:
    """Return whether all bytes between the addresses lie in one allocation on the device."""
    return bool(library.fake_is_device_memory(begin, end))


def add_violation(what: str) -> None:
    """Note that the program did something that a real device forbids."""
    library.fake_add_violation(what.encode())


def take_violations() -> list[str]:
    """Return and forget each kind of violation so far, with its number."""
    return library.fake_take_violations().decode().splitlines()


def last_graph() -> list[str]:
    """Return the names of the operations of the last captured graph."""
    return library.fake_last_graph().decode().splitlines()
