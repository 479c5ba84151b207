"""Standard output and error as terminals have them: of any encoding, closed, or missing."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator

__all__ = ["printing", "show_progress", "shows_progress"]

# For terminals that lack a sign; any other sign is shown by its number.
_PLAIN = {
    "±": "+-", "×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "µ": "u", "…": "...",
    "²": "^2", "→": "->", "≤": "<=", "≥": ">=", "’": "'", "“": '"', "”": '"',
}  # fmt: skip
# How a stream is opened that raises an error for a sign that its encoding lacks.
_STRICT = ("strict", "surrogateescape")


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":  # a byte of a file's name that is no text
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    return _PLAIN.get(sign, ascii(sign)[1:-1]), error.start + 1


codecs.register_error("clr_optim.plainly", _plainly)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Let both standard streams take every sign that is printed, and be there; then as before."""
    with contextlib.ExitStack() as after:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):  # pythonw, daemons
                setattr(sys, name, after.enter_context(open(os.devnull, "w", encoding="utf-8")))
                after.callback(setattr, sys, name, stream)
            elif isinstance(stream, io.TextIOWrapper) and stream.errors in _STRICT:
                after.callback(_reset, stream, stream.errors)
                stream.reconfigure(errors="clr_optim.plainly")
        yield


def _reset(stream: io.TextIOWrapper, errors: str) -> None:
    with contextlib.suppress(ValueError):  # closed meanwhile
        stream.reconfigure(errors=errors)


def shows_progress() -> bool:
    """Whether standard error is a terminal."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return bool(sys.stderr.isatty())
    return False


def show_progress(text: str) -> None:
    """Write to standard error if that can be: a measurement does not end for want of a terminal."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
