"""The commands ``demo``, ``range-test`` and ``train``: their options."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from clr_optim import backends, schedule
from clr_optim.cli.outcome import Outcome
from clr_optim.demo.train import OPTIMIZERS
from clr_optim.options import OptionError, add_json, library_errors, spelled, whole
from clr_optim.range_test import BASES, DEFAULT_RANGE, DEFAULT_STEPS, METHODS, METRICS, MODES

__all__ = ["add_demo", "add_range_test", "add_train"]

_RANGE_TEST_EXAMPLES = """examples:
  clr-optim range-test --optimizer Adam
  clr-optim range-test --mode linear --start-lr 0 --end-lr 1 --metric accuracy --save curve.csv
  clr-optim range-test --data cifar-10-batches-bin --steps 2000
  clr-optim range-test --model mine:task --optimizer AdamW

--model takes MODULE:FUNCTION. The function takes no arguments and returns (model, loss_fn, loader),
as for clr_optim.lr_range_test; with a fourth item, that optimizer. For the last example, mine.py:

  import torch

  def task():
      images, labels = torch.randn(640, 20), torch.randint(0, 3, (640,))
      data = torch.utils.data.TensorDataset(images, labels)
      loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
      return torch.nn.Linear(20, 3), torch.nn.functional.cross_entropy, loader
"""

_TRAIN_EXAMPLES = """examples:
  clr-optim train --optimizer Adam                         # bounds by a range test
  clr-optim train --base-lr 0.012 --max-lr 0.26 --policy triangular --save history.csv
  clr-optim train --data cifar-10-batches-bin --base-lr 0.001 --max-lr 0.006 --cycles 2
"""


def add_demo(commands: Any) -> None:
    """Add the command ``demo``."""
    parser = commands.add_parser(
        "demo",
        help="find bounds, and train at a fixed rate and under three policies",
        description="Finds the bounds of the learning rate by a range test. Then trains a small "
        "network on handwritten digits, with SGD and Adam, at a fixed rate and under three cyclic "
        "policies. Prints a table and draws four pictures. Takes about a minute on two cores and "
        "downloads nothing.",
    )
    add = parser.add_argument
    add("--seed", type=whole(0), default=0, metavar="N", help="first seed (0)")
    add("--seeds", type=whole(1), metavar="K", help="how many seeds (5; 1 with --quick)")
    add("--out", default="demo-out", metavar="DIR", help="folder for pictures (demo-out)")
    add("--quick", action="store_true", help="a few seconds: one seed, fewer and shorter cycles")
    add_json(parser)
    parser.set_defaults(run=_demo)


def add_range_test(commands: Any) -> None:
    """Add the command ``range-test``."""
    parser = commands.add_parser(
        "range-test",
        help="find both bounds of the learning rate, and draw the reason",
        description="Trains for a while with a rising learning rate and reads both bounds of a "
        "cycle from the curve. Prints the reason and draws the curve. Trains your model, or a "
        "network on handwritten digits, or the network of Smith's paper on CIFAR-10.",
        epilog=_RANGE_TEST_EXAMPLES,
    )
    add = parser.add_argument
    add("--model", metavar="MODULE:FUNCTION", help="your model, loss and loader (see below)")
    _add_task(parser)
    start, end = DEFAULT_RANGE
    add("--start-lr", type=float, default=start, metavar="LR", help=f"first rate ({start:g})")
    add("--end-lr", type=float, default=end, metavar="LR", help=f"last rate ({end:g})")
    add("--mode", choices=MODES, default="exponential", help="how the rate rises (exponential)")
    steps = DEFAULT_STEPS
    add("--steps", type=whole(2), default=steps, metavar="N", help=f"iterations ({steps})")
    add("--metric", choices=METRICS[:2], default="loss", help="the curve to read (loss)")
    add("--method", choices=METHODS, default="range", help="rule for max_lr (range)")
    add("--base", choices=BASES, default="curve", help="rule for base_lr (curve)")
    add("--epochs-per-step-size", type=whole(2), default=4, metavar="N", help="2 to 10 (4)")
    add("--out", default="range-test.png", metavar="FILE", help="picture (range-test.png)")
    add("--save", metavar="FILE", help="write the curve as .csv or .json")
    add_json(parser)
    parser.set_defaults(run=_range_test)


def add_train(commands: Any) -> None:
    """Add the command ``train``."""
    parser = commands.add_parser(
        "train",
        help="train a whole number of cycles",
        description="Trains a whole number of cycles, on handwritten digits or on CIFAR-10 with "
        "the network of Smith's paper. Prints the accuracy at the end of each cycle and draws "
        "loss, accuracy and learning rate. If no bounds are given, a range test finds them.",
        epilog=_TRAIN_EXAMPLES,
    )
    _add_task(parser)
    add = parser.add_argument
    add(
        "--policy", type=spelled(schedule.POLICIES), choices=schedule.POLICIES,
        default="triangular2", metavar="NAME",
        help=f"{', '.join(schedule.POLICIES)} (triangular2)",
    )  # fmt: skip
    add("--base-lr", type=float, metavar="LR", help="lower bound")
    add("--max-lr", type=float, metavar="LR", help="upper bound; fixed takes the geometric mean")
    add("--cycles", type=whole(1), default=4, metavar="N", help="how many cycles (4)")
    add("--epochs-per-step-size", type=whole(1), default=4, metavar="N", help="2 to 10 (4)")
    add("--gamma", type=float, help="of exp_range (leaves a tenth of the amplitude)")
    add(
        "--window", type=spelled(schedule.WINDOWS), choices=schedule.WINDOWS,
        help="shape of a cycle (triangle)",
    )  # fmt: skip
    add("--out", default="train.png", metavar="FILE", help="picture (train.png)")
    add("--save", metavar="FILE", help="rate, loss and accuracy per iteration, as .csv or .json")
    add_json(parser)
    parser.set_defaults(run=_train)


def _add_task(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        metavar="DIR",
        help="folder of CIFAR-10's binary version, unpacked (the embedded digits)",
    )
    add(
        "--optimizer", type=spelled(OPTIMIZERS), choices=OPTIMIZERS, metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)} (SGD, with momentum 0.9)",
    )  # fmt: skip
    add("--batch-size", type=whole(1), metavar="N", help="images (50, or 100 with --data)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of weights and batches (0)")
    add("--device", help="cpu, cuda, ... (cpu)")
    add(
        "--backend", type=spelled(backends.BACKENDS), choices=backends.BACKENDS, default="auto",
        help="(auto)",
    )  # fmt: skip
    add("--threads", type=whole(1), metavar="N", help="of torch")


def _demo(args: argparse.Namespace) -> Outcome:
    from clr_optim.demo import as_json, run_demo

    with library_errors(args):
        results = run_demo(seed=args.seed, seeds=args.seeds, out=args.out, quick=args.quick)
    return Outcome(as_json(results))


def _range_test(args: argparse.Namespace) -> Outcome:
    from clr_optim.demo.commands import range_test

    with library_errors(args):
        results, code = range_test(args)
    return Outcome(results, code)


def _train(args: argparse.Namespace) -> Outcome:
    from clr_optim.demo.commands import train_once

    parameters = inspect.signature(schedule.POLICIES[args.policy]).parameters
    for name in ("gamma", "window"):
        if getattr(args, name) is not None and name not in parameters:
            raise OptionError(f"--{name} has no effect with --policy {args.policy}")
    with library_errors(args):
        results, code = train_once(args)
    return Outcome(results, code)
