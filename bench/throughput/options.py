"""The options of ``clr-optim bench``, and the cells that they choose."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

import torch

from clr_optim.bench.arguments import device, duration, refuse_options
from clr_optim.bench.models import MODELS
from clr_optim.bench.workloads import (
    DTYPES,
    IN_BACKWARD,
    IN_TRAINING,
    ONLY_ON_GPU,
    RULES,
    WORKLOADS,
)
from clr_optim.options import add_json, flag, spelled, whole

__all__ = [
    "EXAMPLES", "Cell", "add_arguments", "chosen_cells", "chosen_mode", "seconds_per_cell",
]  # fmt: skip

Cell = tuple[str, str, str]  # workload, dtype, rule

#: These options concern the cells alone.
_ONLY_OF_CELLS = (
    "workloads", "dtypes", "device", "filter", "plot", "at_most", "iterations",
)  # fmt: skip
#: The options that have other things measured than cells; for each the reason why options of cells
#: have no effect, and further options that have none.
_MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "model": ("the parameters are those of your function", ()),
    "step_in_backward": (
        "it measures few models by AdamW, in float32, on the CPU", ("rules", "compile"),
    ),
    "training": ("its models are small, in float32, on the CPU", ("compile",)),
    "features": ("it measures few workloads, in float32, on the CPU", ("compile",)),
    "masters": ("it measures few workloads, in bfloat16, on the CPU", ("compile",)),
}  # fmt: skip
_QUICK = ("mlp", "1000x256", "resnet50")
_WITH_FEATURES = ("mlp", "1000x256", "resnet50", "gpt2")
_WITH_MASTERS = ("resnet50", "gpt2")
#: The largest first, so that a run that is short of time measures them.
_WORKLOADS_ON_GPU = ("1b", "gpt2", "resnet50", "1000x256", "mlp")


EXAMPLES = """examples:
  clr-optim bench --quick
  clr-optim bench --rules AdamW --workloads gpt2 --dtypes float32 --cells-only
  clr-optim bench --iterations --workloads mlp --rules adamw --cells-only
  clr-optim bench --training --rules adam,adamw
  clr-optim bench --features mlp,gpt2
  clr-optim bench --masters resnet50
  clr-optim bench --step-in-backward linear,gpt2
  clr-optim bench --model mine:task

--model takes MODULE:FUNCTION. The function takes no arguments and returns an nn.Module, or an
iterable of parameters. If it returns (model, loss_fn, loader), as for range-test, whole iterations
are measured too. For the last example, mine.py:

  import torch

  def task():
      return torch.nn.Linear(20, 3)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark."""
    add = parser.add_argument
    add("--model", metavar="MODULE:FUNCTION", help="measure your parameters (see below)")
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
    add(
        "--iterations",
        action="store_true",
        help="measure whole iterations too, forward, backward and step, by AdamW or --rules: of "
        f"{', '.join(MODELS)} or the chosen --workloads; a minute each",
    )
    add(
        "--training",
        nargs="?",
        const=list(IN_TRAINING),
        type=_names(IN_TRAINING),
        metavar="A,B",
        help="measure the step in training instead, between backward and zero_grad, with one "
        f"thread, and single calls: {', '.join(IN_TRAINING)}; 4 minutes, or 2 with "
        "--quick",
    )
    add(
        "--features",
        nargs="?",
        const=list(_WITH_FEATURES),
        type=_names([name for name in WORKLOADS if name not in ONLY_ON_GPU]),
        metavar="A,B",
        help="measure instead what clipping, skip_above and averages add to the step: "
        f"{', '.join(_WITH_FEATURES)}; by Adam or --rules, in float32",
    )
    add(
        "--masters",
        nargs="?",
        const=list(_WITH_MASTERS),
        type=_names([name for name in WORKLOADS if name not in ONLY_ON_GPU]),
        metavar="A,B",
        help="measure instead a step with float32 masters, beside bfloat16 alone and a separate "
        f"master: {', '.join(_WITH_MASTERS)}; by AdamW or --rules",
    )
    add(
        "--step-in-backward",
        nargs="?",
        const=["linear"],
        type=_names(IN_BACKWARD),
        metavar="A,B",
        help="measure instead whole iterations by AdamW whose updates come in the backward pass: "
        f"{', '.join(IN_BACKWARD)} (linear); a minute each",
    )
    add("--seed", type=whole(0), default=0, metavar="N", help="of values, order and weights (0)")
    add(
        "--threads",
        type=_threads,
        metavar="N",
        help=f"of torch ({torch.get_num_threads()}, or 1 with --training)",
    )
    add(
        "--device",
        type=device,
        help=f"cpu, or cuda (ROCm too), which measures {', '.join(_WORKLOADS_ON_GPU)}",
    )
    add_json(parser)
    add("--plot", metavar="FILE", help="draw the results there")


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    find = spelled(known)

    def convert(text: str) -> list[str]:
        names = [find(name) for name in text.split(",")]
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


def chosen_mode(args: argparse.Namespace) -> str | None:
    """Return the name of the option that has other things measured than cells, or None.

    Raises:
        argparse.ArgumentError: naming an option that has no effect beside it.
    """
    mode = next((name for name in _MODES if getattr(args, name)), None)
    if mode is not None:
        reason, names = _MODES[mode]
        others = [name for name in _MODES if name != mode]
        refuse_options(args, (*_ONLY_OF_CELLS, *names, *others), f"{flag(mode)}: {reason}")
    return mode


def seconds_per_cell(args: argparse.Namespace, usual: float = 5.0) -> float:
    """Return the seconds that the options give to each cell."""
    if args.seconds_per_cell is None:
        return 0.3 if args.quick else usual
    return float(args.seconds_per_cell)


def _workloads(args: argparse.Namespace) -> Collection[str]:
    if args.device == "cuda":
        return args.workloads or (_QUICK if args.quick else _WORKLOADS_ON_GPU)
    for name in args.workloads or ():
        if name in ONLY_ON_GPU:
            words = f"--workloads {name}: too large for a CPU; add --device cuda"
            raise argparse.ArgumentError(None, words)
    every = [name for name in WORKLOADS if name not in ONLY_ON_GPU]
    return args.workloads or (_QUICK if args.quick else every)
