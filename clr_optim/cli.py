"""The command ``clr-optim``: demo, pictures, benchmark, and what this installation can do."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from clr_optim import backends, schedule
from clr_optim._version import __version__
from clr_optim.backends.native import BuildError, library
from clr_optim.bench import throughput
from clr_optim.kernels.native import build as native_build

__all__ = ["main"]

#: What ``plot --policy`` draws. A policy takes the options that its constructor has parameters for.
_POLICIES: dict[str, Callable[..., schedule.Schedule]] = {
    "triangular": schedule.triangular,
    "triangular2": schedule.triangular2,
    "exp_range": schedule.exp_range,
    "exp_range_bounds": schedule.exp_range_bounds,
    "one_cycle": schedule.one_cycle,
    "warm_restarts": schedule.warm_restarts,
}
_SHAPE_OPTIONS = ("step_size_up", "step_size_down", "gamma", "window", "period")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; ``None`` takes them from ``sys.argv``.

    Returns:
        The exit code. Wrong arguments exit by :class:`SystemExit` with code 2, as argparse does.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        code: int | None = args.run(args)
    except (_ArgumentError, argparse.ArgumentError, ImportError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells have it
    return code or 0


class _ArgumentError(Exception):
    """What the user typed cannot be done; the message says why."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clr-optim", description="Cyclical learning rates inside the optimizer's step."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    demo = commands.add_parser(
        "demo",
        help="train a small network at a fixed rate and under three policies",
        description="Trains a small network on handwritten digits at a fixed rate and under three "
        "cyclic policies, with SGD and Adam; prints a table and draws two pictures. "
        "Takes about a minute on two cores and downloads nothing.",
    )
    demo.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="first seed (0)")
    demo.add_argument("--seeds", type=_whole(1), metavar="K", help="how many (5; 1 with --quick)")
    demo.add_argument(
        "--out", default="demo-out", metavar="DIR", help="folder for pictures (demo-out)"
    )
    demo.add_argument(
        "--quick", action="store_true", help="a few seconds: one seed, fewer and shorter cycles"
    )
    demo.set_defaults(run=_demo)

    plot = commands.add_parser(
        "plot",
        help="draw the policies, or one schedule of your own",
        description="Without --policy, draws one picture per policy into the folder --out; with "
        "it, one schedule into the file --out.",
    )
    plot.add_argument("--policy", choices=_POLICIES, metavar="NAME", help=", ".join(_POLICIES))
    plot.add_argument("--steps", type=int, metavar="N", help="iterations to draw (20000)")
    plot.add_argument("--step-size-up", type=int, metavar="N", help="rising half of a cycle (2000)")
    plot.add_argument("--step-size-down", type=int, metavar="N", help="falling half (the same)")
    plot.add_argument("--period", type=int, metavar="N", help="of warm_restarts (2000)")
    plot.add_argument("--base-lr", type=float, metavar="LR", help="lower bound (max_lr / 4)")
    plot.add_argument("--max-lr", type=float, metavar="LR", help="upper bound (0.006)")
    plot.add_argument("--gamma", type=float, help="decay per iteration of exp_range (0.99994)")
    plot.add_argument("--window", choices=schedule.WINDOWS, help="shape of a cycle (triangle)")
    plot.add_argument("--out", metavar="PATH", help="folder (docs), or file (NAME.png)")
    plot.set_defaults(run=_plot)

    bench = commands.add_parser(
        "bench",
        help="time steps against torch's own and the memory's bandwidth",
        description=throughput.DESCRIPTION,
    )
    throughput.add_arguments(bench)
    bench.set_defaults(run=_bench)

    build = commands.add_parser(
        "build",
        help="compile the kernels ahead of the first step",
        description="Compiles the C++ kernels for this CPU into the cache, where the first step "
        "of a process finds them, and prints the file and the compiler.",
    )
    build.set_defaults(run=_build)

    info = commands.add_parser(
        "info",
        help="versions, devices, and the backend that each optimizer gets",
        description="Prints versions, devices, and the backend that each optimizer gets, and why.",
    )
    info.set_defaults(run=_info)
    return parser


def _whole(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number from ``minimum`` to what seeds may be."""

    def convert(text: str) -> int:
        number = int(text) if text.strip().isdecimal() else -1
        if not minimum <= number < 2**32:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {minimum}, got {text!r}")
        return number

    return convert


def _demo(args: argparse.Namespace) -> None:
    from clr_optim.demo import run_demo

    run_demo(seed=args.seed, seeds=args.seeds, out=args.out, quick=args.quick)


def _plot(args: argparse.Namespace) -> None:
    from clr_optim import plotting

    given = {
        name: getattr(args, name)
        for name in ("steps", "base_lr", "max_lr", *_SHAPE_OPTIONS)
        if getattr(args, name) is not None
    }
    if args.policy is None:
        if given:
            raise _ArgumentError(f"{_flags(given)}: only together with --policy")
        for path in plotting.plot_policies(args.out or "docs"):
            print(path)
        return
    make = _POLICIES[args.policy]
    steps = given.pop("steps", 20_000)
    max_lr = given.pop("max_lr", 0.006)
    base_lr = given.pop("base_lr", max_lr / 4)
    useless = set(given) - set(inspect.signature(make).parameters)
    if useless:
        raise _ArgumentError(f"{_flags(useless)}: of no effect with --policy {args.policy}")
    lengths = {"one_cycle": {"total_steps": steps}, "warm_restarts": {"period": 2000}}
    options: dict[str, Any] = {**lengths.get(args.policy, {}), **given}
    try:
        figure = plotting.plot_schedule(make(**options), steps, base_lr, max_lr)
        path = plotting.save(figure, Path(args.out or f"{args.policy}.png"))
    except (TypeError, ValueError) as error:  # the schedule's own words, which name the argument
        raise _ArgumentError(str(error)) from error
    print(path)


def _flags(names: Iterable[str]) -> str:
    return ", ".join(sorted(f"--{name.replace('_', '-')}" for name in names))


def _bench(args: argparse.Namespace) -> int:
    return throughput.exit_code(throughput.run(args))


def _build(args: argparse.Namespace) -> int:
    try:
        entry = native_build.compile_ahead()
    except BuildError as error:
        print(f"clr-optim: error: {error}", file=sys.stderr)
        return 1
    described = native_build.describe()
    print(entry)
    print(f"{described['compiler']}: {described['version']}")
    return 0


def _info(args: argparse.Namespace) -> None:
    import platform
    from importlib import metadata

    import numpy as np
    import torch

    from clr_optim.rules import STATE_SLOTS

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = [
        ("clr_optim", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", triton),
        ("numpy", np.__version__),
        ("CPU threads", str(torch.get_num_threads())),
        ("GPU", ", ".join(gpus) or "none"),
        *_kernels(),
    ]
    for cls in STATE_SLOTS:
        make: Callable[..., torch.optim.Optimizer] = cls
        rows.append((cls.__name__, _served(make([torch.zeros(2, 2, requires_grad=True)]))))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _kernels() -> list[tuple[str, str]]:
    """How the C++ kernels are compiled here, or why they are not."""
    import torch

    described = native_build.describe()
    try:
        library()
        state = f"ready, {described['openmp']} for threads"
    except BuildError as error:
        state = f"none: {_line(error)}"
    bits = {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability(), 128)
    if bits == 512 and "512" not in described["flags"]:
        bits = 256  # what compilers prefer unless told otherwise
    return [
        ("kernels", state),
        ("compiler", " ".join(filter(None, (described["compiler"], described["version"])))),
        ("flags", described["flags"]),
        ("vectors", f"{bits} bits, {described['target'] or 'native'}"),
        ("cache", " ".join(filter(None, (described["cache"], described["problem"])))),
    ]


def _served(optimizer: Optimizer) -> str:
    """The backend of an optimizer, and why, as its first step would find out."""
    try:
        backend, reason = backends.resolve("auto", optimizer)
        if backend == "native":
            library()
    except ValueError as error:  # CLR_OPTIM_BACKEND may ask for what cannot be
        return f"none: {_line(error)}"
    except BuildError:
        return "torch: the kernels cannot be compiled, see above"
    return f"{backend}: {reason}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
