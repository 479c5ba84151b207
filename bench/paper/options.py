"""Options."""

from __future__ import annotations

import argparse
import math
from contextlib import suppress
from fractions import Fraction

import torch

from clr_optim.bench.gpu import why_no_gpu
from clr_optim.bench.paper.rows import ROWS, Row, Scale

__all__ = ["add_arguments", "chosen_rows"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--data", metavar="DIR", help="CIFAR-10, binary version, unpacked")
    add("--table", type=_tables, metavar="1|2|3|beyond", help="or several, as 1,3; 2 is one of 1")
    add("--rows", type=_row_names, metavar="A,B", help=f"only these: {', '.join(ROWS)}")
    add(
        "--scale",
        type=_scale,
        default=Scale(),
        metavar="F",
        help="multiplies lengths and step sizes; 0.1 or 1/10",
    )
    add("--seeds", type=_count, default=1, metavar="N", help="how many, from 0 (1)")
    add("--device", type=_device, default="cpu", help="cpu, or cuda, which is ROCm's name too")
    add("--threads", type=_count, metavar="N", help=f"({torch.get_num_threads()})")
    add(
        "--together",
        type=_count,
        default=1,
        metavar="N",
        help="on a GPU, which one such network does not fill: rows trained beside each other (1)",
    )
    add("--out", default="paper-out", metavar="DIR", help="results and checkpoints (paper-out)")
    add("--resume", action="store_true", help="go on with what is in there")
    add("--checkpoint-every", type=_minutes, default=3.0, metavar="MIN", help="minutes (3)")
    add("--caffe-momentum", action="store_true", help="SGD with the rate inside the buffer")
    add("--data-note", default="", metavar="TEXT", help="kept with the results and printed by them")
    add("--report", action="store_true", help="train nothing, only report on what is in --out")
    add("--readme", metavar="FILE", help="with --report: renew the table between its marks in FILE")
    add(
        "--speed",
        type=_count,
        metavar="N",
        help="train nothing, only measure iterations per second over N of them",
    )


def _tables(text: str) -> list[str]:
    known = ("1", "2", "3", "beyond")
    tables = text.split(",")
    for table in tables:
        if table not in known:
            raise argparse.ArgumentTypeError(f"no table {table!r}; there are {', '.join(known)}")
    return tables


def _row_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ROWS:
            raise argparse.ArgumentTypeError(f"no row {name!r}; there are {', '.join(ROWS)}")
    return names


def _scale(text: str) -> Scale:
    with suppress(ValueError, ZeroDivisionError):
        if 0 < Fraction(text) <= 100:
            return Scale(Fraction(text))
    raise argparse.ArgumentTypeError(f"must be a number above 0, as 0.1 or 1/10, got {text!r}")


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 10**6):
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of minutes >= 0, got {text!r}")


def _device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text == "cuda" and (problem := why_no_gpu()):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return text


def chosen_rows(args: argparse.Namespace) -> list[Row]:
    if args.table is None and args.rows is None:
        raise argparse.ArgumentError(None, "give --table 1, 2, 3 or beyond, or --rows")
    tables = args.table or ["1", "3", "beyond"]
    rows = [
        row
        for row in ROWS.values()
        if row.table in tables or ("2" in tables and row.name == "triangular2")
    ]
    if args.rows is not None:
        for name in args.rows:
            if ROWS[name] not in rows:
                raise argparse.ArgumentError(
                    None, f"--rows {name}: not in table {', '.join(tables)}"
                )
        rows = [row for row in rows if row.name in args.rows]
    for row in rows:
        _check_lengths(row, args.scale)
    return rows


def _check_lengths(row: Row, scale: Scale) -> None:
    try:
        scale.steps(row.iterations)
        row.schedule(scale)
    except ValueError as error:
        words = f"{error}, for row {row.name}: a multiple of 0.01 serves all rows"
        raise argparse.ArgumentError(None, words) from error
