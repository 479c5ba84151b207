"""Print to stdout and stderr, whatever their encoding, and if they are closed or missing."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator

__all__ = ["printing", "show_progress", "shows_progress"]

# Replacements for signs that an encoding lacks. Other signs are shown by their number.
_PLAIN = {
    "±": "+-", "×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "µ": "u", "…": "...",
    "²": "^2", "→": "->", "≤": "<=", "≥": ">=", "’": "'", "“": '"', "”": '"',
}  # fmt: skip
# Error handlers of streams that raise an error for a sign that the encoding lacks.
_STRICT = ("strict", "surrogateescape")


def _replace_sign(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return the replacement of a sign that an encoding lacks, and the place to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":  # a byte of a file's name that is not text
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    return _PLAIN.get(sign, ascii(sign)[1:-1]), error.start + 1


codecs.register_error("clr_optim.replace", _replace_sign)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Make both standard streams accept every sign, and restore them at the end.

    Closed or missing streams are replaced by ``os.devnull``.
    """
    with contextlib.ExitStack() as after:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None or getattr(
                stream, "closed", False
            ):  # as under pythonw, and in daemons
                setattr(sys, name, after.enter_context(open(os.devnull, "w", encoding="utf-8")))
                after.callback(setattr, sys, name, stream)
            elif isinstance(stream, io.TextIOWrapper) and stream.errors in _STRICT:
                after.callback(_reset, stream, stream.errors)
                stream.reconfigure(errors="clr_optim.replace")
        yield


def _reset(stream: io.TextIOWrapper, errors: str) -> None:
    with contextlib.suppress(ValueError):  # the stream was closed meanwhile
        stream.reconfigure(errors=errors)


def shows_progress() -> bool:
    """Return whether standard error is a terminal."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return bool(sys.stderr.isatty())
    return False


def show_progress(text: str) -> None:
    """Write to standard error, if possible. Without a terminal a measurement must go on."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
