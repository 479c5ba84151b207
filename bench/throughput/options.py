"""Options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from contextlib import suppress

import torch

from clr_optim.bench.gpu import why_no_gpu
from clr_optim.bench.workloads import DTYPES, ONLY_ON_GPU, RULES, WORKLOADS

__all__ = ["Cell", "add_arguments", "chosen_cells"]

Cell = tuple[str, str, str]  # workload, dtype, rule


_QUICK = ("mlp", "1000x256", "resnet50")
#: The largest first: they are what must not be missing where time is short.
_WORKLOADS_ON_GPU = ("1b", "gpt2", "resnet50", "1000x256", "mlp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    add = parser.add_argument
    add("--quick", action="store_true", help=f"under a minute: float32, {', '.join(_QUICK)}")
    add("--rules", type=_names(RULES), metavar="A,B", help=", ".join(RULES))
    add("--workloads", type=_names(WORKLOADS), metavar="A,B", help=", ".join(WORKLOADS))
    add(
        "--dtypes",
        type=_names(DTYPES),
        metavar="A,B",
        help=f"float32,bfloat16 unless told otherwise; of {', '.join(DTYPES)}",
    )
    add("--filter", default="", metavar="TEXT", help="only cells whose rule/workload/dtype has it")
    add(
        "--seconds-per-cell",
        type=_seconds,
        metavar="S",
        help="5, or 1 on a GPU, or 0.3 with --quick; there are 5 rounds at least",
    )
    add("--at-most", type=_seconds, metavar="S", help="begin no cell after so many seconds")
    add(
        "--cells-only",
        action="store_true",
        help="no overhead, first step and peak memory, of which on a GPU there are none",
    )
    add("--compile", action="store_true", help="torch.compile too, which takes minutes")
    add(
        "--gradients",
        choices=("sets", "backward"),
        default="sets",
        help="two sets in turn, or new ones from a backward pass before each step, as in training",
    )
    add("--threads", type=_threads, metavar="N", help=f"({torch.get_num_threads()})")
    add(
        "--device",
        type=_device,
        default="cpu",
        help=f"cpu, or cuda, which is ROCm's name too: {', '.join(_WORKLOADS_ON_GPU)}",
    )
    add("--json", metavar="FILE", help="write the results")
    add("--plot", metavar="FILE", help="draw them")


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def convert(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(known)}")
        return [name for name in known if name in names]

    return convert


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of seconds >= 0, got {text!r}")


def _threads(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 4096, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        hint = "; CUDA_VISIBLE_DEVICES chooses among GPUs" if text.startswith("cuda:") else ""
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}{hint}")
    if text == "cuda" and (problem := why_no_gpu()):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return text


def chosen_cells(args: argparse.Namespace) -> list[Cell]:
    """The cells that the options ask for.

    Raises:
        argparse.ArgumentError: the options leave nothing to measure.
    """
    cells = [
        (workload, dtype, rule)
        for workload in _workloads(args)
        for dtype in args.dtypes or (["float32"] if args.quick else ["float32", "bfloat16"])
        for rule in args.rules or RULES
        if args.filter in f"{rule}/{workload}/{dtype}"
    ]
    if not cells:
        raise argparse.ArgumentError(None, f"--filter {args.filter}: no cell has it in its name")
    return cells


def _workloads(args: argparse.Namespace) -> Collection[str]:
    if args.device == "cuda":
        return args.workloads or (_QUICK if args.quick else _WORKLOADS_ON_GPU)
    for name in args.workloads or ():
        if name in ONLY_ON_GPU:
            words = f"--workloads {name}: too large for a CPU, only with --device cuda"
            raise argparse.ArgumentError(None, words)
    every = [name for name in WORKLOADS if name not in ONLY_ON_GPU]
    return args.workloads or (_QUICK if args.quick else every)
