"""The options of ``clr-optim bench paper``, and the rows that they choose."""

from __future__ import annotations

import argparse
from contextlib import suppress
from fractions import Fraction

import torch

from clr_optim.bench.arguments import device, duration, refuse_options
from clr_optim.bench.paper.figure_6 import FIGURE, FIGURE_6
from clr_optim.bench.paper.known import KNOWN
from clr_optim.bench.paper.optimizers import CAFFE_RULES
from clr_optim.bench.paper.resnet import DATASETS, RESNET
from clr_optim.bench.paper.rows import ROWS, Row, Scale
from clr_optim.options import flag, whole

__all__ = ["add_arguments", "check_mode", "chosen_rows"]

#: defaults of options other than None, False and an empty text
_DEFAULTS = {"scale": Scale(), "seeds": 1, "device": "cpu", "together": 1, "checkpoint_every": 3.0}

_OF_TRAINING = ("scale", "seeds", "together", "resume", "checkpoint_every", "caffe_momentum")

#: options that replace the training, why others have no effect beside them, and which
_MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "report": (
        "it trains nothing",
        (
            "speed", "range_test", *_OF_TRAINING, "data", "data_note", "table", "figure", "rows",
            "device", "threads",
        ),
    ),
    "speed": (
        "it measures cifar10_full",
        ("range_test", *_OF_TRAINING, "data_note", "table", "figure", "rows"),
    ),
    "range_test": ("it trains no row", ("figure", *_OF_TRAINING)),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``clr-optim bench paper``."""
    add = parser.add_argument
    add(
        "--data",
        metavar="DIR",
        help="folder of CIFAR-10's binary version, unpacked; for table resnet-100, CIFAR-100's",
    )
    add(
        "--table",
        type=_tables,
        metavar="1|2|3|beyond|resnet|resnet-100",
        help="one or several, as 1,3; 2 is a row of 1; resnet is Table 4, alone",
    )
    add(
        "--figure",
        choices=("6",),
        help="constant rates and cycles on Caffe's sigmoid network; --scale 1/50: 1,200 iterations",
    )
    add(
        "--rows",
        type=_row_names,
        metavar="A,B",
        help=f"only these rows: {', '.join(ROWS)}; of figure 6: {', '.join(FIGURE_6)}; "
        f"of resnet and resnet-100: {', '.join(RESNET)}",
    )
    add(
        "--scale",
        type=_scale,
        default=_DEFAULTS["scale"],
        metavar="F",
        help="multiply lengths and step sizes by F, as 0.1 or 1/10 (1)",
    )
    add(
        "--seeds",
        type=whole(1),
        default=_DEFAULTS["seeds"],
        metavar="N",
        help="how many seeds, from 0 (1)",
    )
    add("--device", type=device, default=_DEFAULTS["device"], help="cpu, or cuda (ROCm too)")
    add("--threads", type=whole(1), metavar="N", help=f"of torch ({torch.get_num_threads()})")
    add(
        "--together",
        type=whole(1),
        default=_DEFAULTS["together"],
        metavar="N",
        help="rows to train beside each other on a GPU, which one network does not fill (1)",
    )
    add(
        "--out",
        default="paper-out",
        metavar="DIR",
        help="folder of results and checkpoints (paper-out)",
    )
    add("--resume", action="store_true", help="continue the runs in --out")
    add(
        "--checkpoint-every",
        type=duration("minutes"),
        default=_DEFAULTS["checkpoint_every"],
        metavar="MIN",
        help="minutes between checkpoints (3)",
    )
    add(
        "--caffe-momentum",
        action="store_true",
        help="SGD keeps the rate inside the momentum buffer, as in Caffe",
    )
    add(
        "--data-note",
        default="",
        metavar="TEXT",
        help="a note on the data, printed with the results",
    )
    add("--report", action="store_true", help="train nothing, only report on the results in --out")
    add(
        "--readme",
        metavar="FILE",
        help="with --report: renew the table between its two marks in FILE",
    )
    add(
        "--speed",
        type=whole(1),
        metavar="N",
        help="train nothing, only measure iterations per second over N iterations",
    )
    add(
        "--range-test",
        type=whole(2),
        metavar="N",
        help="only find the bounds of the chosen networks of table resnet, in N iterations",
    )


def _tables(text: str) -> list[str]:
    known = ("1", "2", "3", "beyond", *DATASETS)
    tables = text.split(",")
    for table in tables:
        if table not in known:
            raise argparse.ArgumentTypeError(f"no table {table!r}; there are {', '.join(known)}")
        if table in DATASETS and len(tables) > 1:
            raise argparse.ArgumentTypeError(f"{table} stands alone: it has a report for itself")
    return tables


def _row_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in KNOWN:
            raise argparse.ArgumentTypeError(f"no row {name!r}; there are {', '.join(KNOWN)}")
    return names


def _scale(text: str) -> Scale:
    with suppress(ValueError, ZeroDivisionError):
        if 0 < Fraction(text) <= 100:
            return Scale(Fraction(text))
    words = f"must be a number above 0 and at most 100, as 0.1 or 1/10, got {text!r}"
    raise argparse.ArgumentTypeError(words)


def check_mode(args: argparse.Namespace) -> None:
    """Refuse an option that has no effect beside one that replaces the training.

    Raises:
        argparse.ArgumentError: naming both.
    """
    mode = next((name for name in _MODES if getattr(args, name)), None)
    if mode is None:
        return
    reason, names = _MODES[mode]
    words = f"{flag(mode)}: {reason}; leave it out"
    refuse_options(args, names, words, _DEFAULTS)


def chosen_rows(args: argparse.Namespace) -> list[Row]:
    """Return the rows that the options choose.

    Raises:
        argparse.ArgumentError: if no row is chosen, or the scale does not suit a row.
    """
    if args.table is None and args.rows is None and args.figure is None:
        raise argparse.ArgumentError(
            None,
            "give --table 1, 2, 3 or beyond, or --rows, or --figure 6, or --table resnet",
        )
    if args.figure and args.table:
        raise argparse.ArgumentError(
            None, f"--figure {args.figure} and --table {','.join(args.table)}: give one of them"
        )
    tables = args.table or ([FIGURE] if args.figure else ["1", "3", "beyond"])
    rows = [
        row
        for row in KNOWN.values()
        if row.table in tables or ("2" in tables and row.name == "triangular2")
    ]
    if args.rows is not None:
        for name in args.rows:
            if KNOWN[name] not in rows:
                where = FIGURE if args.figure else f"table {', '.join(tables)}"
                if name in FIGURE_6:
                    where += "; add --figure 6"
                elif name in RESNET:
                    where += f"; add --table {RESNET[name].table}"
                raise argparse.ArgumentError(None, f"--rows {name}: not in {where}")
        rows = [row for row in rows if row.name in args.rows]
    if args.caffe_momentum and not any(row.rule in CAFFE_RULES for row in rows):
        words = "--caffe-momentum has no effect on these rows: none of them is of SGD; leave it out"
        raise argparse.ArgumentError(None, words)
    for row in rows:
        _check_lengths(row, args.scale)
    return rows


def _check_lengths(row: Row, scale: Scale) -> None:
    try:
        scale.steps(row.iterations)
        row.schedule(scale)
    except ValueError as error:
        serves = "1/7500" if row.table == FIGURE else "0.01"
        words = f"{error}, for row {row.name}: a multiple of {serves} serves all rows"
        raise argparse.ArgumentError(None, words) from error
