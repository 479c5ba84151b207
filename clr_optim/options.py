"""Parts that all command lines share: the parser, one spelling of names, and ``--json``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "OptionError", "Parser", "add_json", "check_json", "flag", "library_errors", "make_folder",
    "name_options", "spelled", "text_beside_json", "whole", "write_json",
]  # fmt: skip

#: arguments of the library that have another name on the command line
_OTHER_NAMES = {
    "num_steps": "steps",
    "total_steps": "steps",
    "epochs": "epochs_per_step_size",
}


class OptionError(Exception):
    """Options that argparse accepts and the library refuses; the message says why."""


class _Formatter(argparse.HelpFormatter):
    """Wrap text, except for text of several lines, such as examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors of one line instead of the usage and a line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options})

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def flag(name: str) -> str:
    """Return the option of an argument: ``--base-lr`` for ``base_lr``."""
    return f"--{name.replace('_', '-')}"


def spelled(names: Iterable[str]) -> Callable[[str], str]:
    """Make an argparse type that finds a name in any case, with ``-`` for ``_``.

    An unknown name passes unchanged, so that ``choices`` can refuse it.
    """
    known = {_plain(name): name for name in names}
    return lambda text: known.get(_plain(text), text)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def whole(minimum: int) -> Callable[[str], int]:
    """Make an argparse type for a whole number from ``minimum`` to 2³² − 1, the largest seed."""

    def convert(text: str) -> int:
        number = int(text) if text.strip().isdecimal() else -1
        if not minimum <= number < 2**32:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {minimum}, got {text!r}")
        return number

    return convert


@contextlib.contextmanager
def library_errors(args: argparse.Namespace) -> Iterator[None]:
    """Turn the library's errors into errors that name the options of the command.

    Raises:
        OptionError: instead of a TypeError or ValueError.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise OptionError(name_options(str(error), args)) from error


def name_options(message: str, args: argparse.Namespace) -> str:
    """Return a message of the library with the command's options in place of arguments.

    A name of one word may be an ordinary word. Such a name is replaced only if ``=`` or "must"
    follows.
    """
    options = {name: name for name in vars(args)}
    options |= {name: option for name, option in _OTHER_NAMES.items() if option in options}
    for name, option in options.items():
        after = "" if "_" in name else r"(?==| must\b)"
        message = re.sub(rf"(?<![\w-]){name}\b{after}", flag(option), message)
    return message


def make_folder(option: str, target: str | Path) -> Path:
    """Make the folder of an option, if there is none.

    Raises:
        OSError: naming the option, if no file can be written there, before anything is measured.
    """
    folder = Path(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        words = "is no folder" if isinstance(error, FileExistsError) else "cannot be made"
        raise type(error)(f"{option} {target}: {words}; give another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {target}: no permission to write here")
    return folder


# ---- results as JSON


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--json``."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the results as JSON to FILE; without FILE to standard output, and the text to "
        "standard error",
    )


def text_beside_json(target: str | None) -> contextlib.AbstractContextManager[Any]:
    """Send printed text to standard error if the JSON goes to standard output."""
    if target == "-":
        return contextlib.redirect_stdout(sys.stderr)
    return contextlib.nullcontext()


def check_json(target: str | None) -> None:
    """Raise an OSError if the file cannot be written, before anything is measured."""
    if target is None or target == "-":
        return
    folder = Path(target).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"--json {target}: there is no such folder")
    if Path(target).is_dir() or not os.access(folder, os.W_OK):
        raise PermissionError(f"--json {target}: no permission to write this file")


def write_json(target: str | None, results: Mapping[str, Any]) -> None:
    """Write results to a file, or to standard output for ``"-"``, or nowhere for None.

    An interruption leaves the old file whole.
    """
    if target is None:
        return
    text = json.dumps(results, indent=1, ensure_ascii=target == "-") + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    beside = Path(f"{target}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(target)
