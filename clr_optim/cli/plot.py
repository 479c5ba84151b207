"""The command ``plot``: draw all policies, or one schedule."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from clr_optim import plotting, schedule
from clr_optim.cli.outcome import Outcome
from clr_optim.options import OptionError, add_json, flag, library_errors, spelled

__all__ = ["add_plot"]

# Options that go to the policy. An option applies if the policy has an argument of its name.
_SHAPE_OPTIONS = (
    "step_size_up", "step_size_down", "period", "period_multiplier", "warmup", "stable", "decay",
    "shape", "end", "power", "gamma", "window",
)  # fmt: skip


def add_plot(commands: Any) -> None:
    """Add the command ``plot``."""
    parser = commands.add_parser(
        "plot",
        help="draw all policies, or one schedule",
        description="Without --policy, draws one picture per policy into the folder --out. With "
        "--policy, draws one schedule into the file --out.",
    )
    add = parser.add_argument
    add(
        "--policy", type=spelled(schedule.POLICIES), choices=schedule.POLICIES, metavar="NAME",
        help=", ".join(schedule.POLICIES),
    )  # fmt: skip
    add("--steps", type=int, metavar="N", help="iterations to draw (20000)")
    add("--step-size-up", type=int, metavar="N", help="rising half of a cycle (2000)")
    add("--step-size-down", type=int, metavar="N", help="falling half (as --step-size-up)")
    add("--period", type=int, metavar="N", help="first period of warm_restarts (2000)")
    add("--period-multiplier", type=int, metavar="N", help="growth of cycles (1)")
    add("--warmup", type=int, metavar="N", help="warm-up of wsd and inverse_sqrt (a tenth)")
    add("--stable", type=int, metavar="N", help="stable part of wsd")
    add("--decay", type=int, metavar="N", help="decay of wsd (a quarter of the rest)")
    add("--shape", help="shape of wsd's decay: linear, cosine, sqrt, exp (linear)")
    add("--end", type=float, help="last rate divided by --max-lr (0)")
    add("--power", type=float, help="exponent of polynomial (1)")
    add("--base-lr", type=float, metavar="LR", help="lower bound (a quarter of --max-lr)")
    add("--max-lr", type=float, metavar="LR", help="upper bound (0.006)")
    add("--gamma", type=float, help="decay per iteration of exp_range (0.99994)")
    add(
        "--window", type=spelled(schedule.WINDOWS), choices=schedule.WINDOWS,
        help="shape of a cycle (triangle)",
    )  # fmt: skip
    add("--out", metavar="PATH", help="folder (docs), or file (NAME.png)")
    add_json(parser)
    parser.set_defaults(run=_plot)


def _plot(args: argparse.Namespace) -> Outcome:
    given = {
        name: getattr(args, name)
        for name in ("steps", "base_lr", "max_lr", *_SHAPE_OPTIONS)
        if getattr(args, name) is not None
    }
    if args.policy is None:
        if given:
            raise OptionError(f"{_flags(given)}: only together with --policy")
        paths = plotting.plot_policies(args.out or "docs")
        for path in paths:
            print(path)
        return Outcome({"pictures": [str(path) for path in paths]})
    make = schedule.POLICIES[args.policy]
    steps = given.pop("steps", 20_000)
    max_lr = given.pop("max_lr", 0.006)
    base_given = "base_lr" in given
    base_lr = given.pop("base_lr", max_lr / 4)
    unused = set(given) - set(inspect.signature(make).parameters)
    if unused:
        verb = "has" if len(unused) == 1 else "have"
        raise OptionError(f"{_flags(unused)} {verb} no effect with --policy {args.policy}")
    options = {**schedule.arguments_for(make, steps, 2000), **given}
    with library_errors(args):
        drawn = make(**options)
        if base_given and not drawn.reads_base_lr:
            raise OptionError(f"--base-lr has no effect with --policy {args.policy}")
        figure = plotting.plot_schedule(drawn, steps, base_lr, max_lr)
        path = plotting.save(figure, Path(args.out or f"{args.policy}.png"))
    print(path)
    return Outcome(
        {
            "pictures": [str(path)],
            "schedule": drawn.to_dict(),
            "base_lr": base_lr,
            "max_lr": max_lr,
            "lr": drawn(np.arange(steps + 1), base_lr, max_lr).tolist(),
        }
    )


def _flags(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(flag, names)))
