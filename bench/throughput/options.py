"""The options of ``clr-optim bench``, and the cells that they choose."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

import torch

from clr_optim.bench.arguments import device, duration
from clr_optim.bench.workloads import DTYPES, ONLY_ON_GPU, RULES, WORKLOADS

__all__ = ["Cell", "add_arguments", "chosen_cells"]

Cell = tuple[str, str, str]  # workload, dtype, rule

_QUICK = ("mlp", "1000x256", "resnet50")
#: The largest first, so that a run that is short of time measures them.
_WORKLOADS_ON_GPU = ("1b", "gpt2", "resnet50", "1000x256", "mlp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark."""
    add = parser.add_argument
    add("--quick", action="store_true", help=f"under a minute: float32, {', '.join(_QUICK)}")
    add("--rules", type=_names(RULES), metavar="A,B", help=", ".join(RULES))
    add("--workloads", type=_names(WORKLOADS), metavar="A,B", help=", ".join(WORKLOADS))
    add(
        "--dtypes",
        type=_names(DTYPES),
        metavar="A,B",
        help=f"of {', '.join(DTYPES)} (float32,bfloat16; float32 with --quick)",
    )
    add(
        "--filter",
        default="",
        metavar="TEXT",
        help="only cells whose rule/workload/dtype contains it",
    )
    add(
        "--seconds-per-cell",
        type=duration("seconds"),
        metavar="S",
        help="5, or 1 on a GPU, or 0.3 with --quick; at least 5 rounds",
    )
    add(
        "--at-most",
        type=duration("seconds"),
        metavar="S",
        help="begin no cell after so many seconds",
    )
    add(
        "--cells-only",
        action="store_true",
        help="leave out overhead, first step and peak memory, which only a CPU run measures",
    )
    add("--compile", action="store_true", help="measure torch.compile too, which takes minutes")
    add(
        "--gradients",
        choices=("sets", "backward"),
        default="sets",
        help="two sets in turns, or new ones from a backward pass before each step, as in training",
    )
    add("--threads", type=_threads, metavar="N", help=f"of torch ({torch.get_num_threads()})")
    add(
        "--device",
        type=device,
        default="cpu",
        help=f"cpu, or cuda (ROCm too), which measures {', '.join(_WORKLOADS_ON_GPU)}",
    )
    add("--json", metavar="FILE", help="write the results there")
    add("--plot", metavar="FILE", help="draw the results there")


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def convert(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(known)}")
        return [name for name in known if name in names]

    return convert


def _threads(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 4096, got {text!r}")
    return int(text)


def chosen_cells(args: argparse.Namespace) -> list[Cell]:
    """Return the cells that the options choose.

    Raises:
        argparse.ArgumentError: if the options choose no cell.
    """
    cells = [
        (workload, dtype, rule)
        for workload in _workloads(args)
        for dtype in args.dtypes or (["float32"] if args.quick else ["float32", "bfloat16"])
        for rule in args.rules or RULES
        if args.filter in f"{rule}/{workload}/{dtype}"
    ]
    if not cells:
        raise argparse.ArgumentError(None, f"--filter {args.filter}: no cell's name contains it")
    return cells


def _workloads(args: argparse.Namespace) -> Collection[str]:
    if args.device == "cuda":
        return args.workloads or (_QUICK if args.quick else _WORKLOADS_ON_GPU)
    for name in args.workloads or ():
        if name in ONLY_ON_GPU:
            words = f"--workloads {name}: too large for a CPU; add --device cuda"
            raise argparse.ArgumentError(None, words)
    every = [name for name in WORKLOADS if name not in ONLY_ON_GPU]
    return args.workloads or (_QUICK if args.quick else every)
