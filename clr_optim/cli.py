"""The command ``clr-optim``: demo, range test, training, pictures, benchmarks, build and info."""

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
from clr_optim.bench import bounds, long_run, paper, throughput
from clr_optim.console import printing
from clr_optim.demo.train import OPTIMIZERS
from clr_optim.kernels.native import build as native_build
from clr_optim.range_test import BASES, METHODS, METRICS, MODES

__all__ = ["main"]

#: The policies that ``plot --policy`` draws. An option applies if the constructor has it.
_POLICIES: dict[str, Callable[..., schedule.Schedule]] = {
    **schedule.POLICIES,
    "one_cycle": schedule.one_cycle,
    "warm_restarts": schedule.warm_restarts,
}
#: The policies of ``train --policy``: a fixed rate, and cycles of one length.
_TRAINED = ("fixed", *schedule.POLICIES)
_POLICIES_HELP = f"{', '.join(_TRAINED)} (triangular2)"
_OPTIMIZERS_HELP = f"{', '.join(OPTIMIZERS)} (SGD, with momentum 0.9)"
_SHAPE_OPTIONS = ("step_size_up", "step_size_down", "gamma", "window", "period")


@printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; ``None`` takes them from ``sys.argv``.

    Returns:
        The exit code. Wrong arguments raise :class:`SystemExit` with code 2, as argparse does.
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
        return 130  # 128 + SIGINT, the shells' convention
    return code or 0


class _ArgumentError(Exception):
    """Arguments that argparse accepts and the library refuses; the message says why."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clr-optim", description="Cyclical learning rates inside the optimizer step."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    demo = commands.add_parser(
        "demo",
        help="find bounds, and train at a fixed rate and under three policies",
        description="Finds the bounds of the learning rate by a range test. Then trains a small "
        "network on handwritten digits, with SGD and Adam, at a fixed rate and under three cyclic "
        "policies. Prints a table and draws four pictures. Takes about a minute on two cores and "
        "downloads nothing.",
    )
    demo.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="first seed (0)")
    demo.add_argument(
        "--seeds", type=_whole(1), metavar="K", help="how many seeds (5; 1 with --quick)"
    )
    demo.add_argument(
        "--out", default="demo-out", metavar="DIR", help="folder for pictures (demo-out)"
    )
    demo.add_argument(
        "--quick", action="store_true", help="a few seconds: one seed, fewer and shorter cycles"
    )
    demo.set_defaults(run=_demo)

    _add_range_test(commands)
    _add_train(commands)

    plot = commands.add_parser(
        "plot",
        help="draw all policies, or one schedule",
        description="Without --policy, draws one picture per policy into the folder --out. With "
        "--policy, draws one schedule into the file --out.",
    )
    plot.add_argument("--policy", choices=_POLICIES, metavar="NAME", help=", ".join(_POLICIES))
    plot.add_argument("--steps", type=int, metavar="N", help="iterations to draw (20000)")
    plot.add_argument("--step-size-up", type=int, metavar="N", help="rising half of a cycle (2000)")
    plot.add_argument(
        "--step-size-down", type=int, metavar="N", help="falling half (as --step-size-up)"
    )
    plot.add_argument(
        "--period", type=int, metavar="N", help="first period of warm_restarts (2000)"
    )
    plot.add_argument("--base-lr", type=float, metavar="LR", help="lower bound (max_lr / 4)")
    plot.add_argument("--max-lr", type=float, metavar="LR", help="upper bound (0.006)")
    plot.add_argument("--gamma", type=float, help="decay per iteration of exp_range (0.99994)")
    plot.add_argument("--window", choices=schedule.WINDOWS, help="shape of a cycle (triangle)")
    plot.add_argument("--out", metavar="PATH", help="folder (docs), or file (NAME.png)")
    plot.set_defaults(run=_plot)

    bench = commands.add_parser(
        "bench",
        help="time our steps, torch's, and the memory's bandwidth",
        description=throughput.DESCRIPTION,
    )
    throughput.add_arguments(bench)
    bench.set_defaults(run=_bench)
    others = bench.add_subparsers(metavar="OTHER", title="other measurements")
    of_bounds = others.add_parser(
        "bounds",
        help="train with suggested bounds and at ten fixed rates",
        description=bounds.DESCRIPTION,
    )
    bounds.add_arguments(of_bounds)
    of_bounds.set_defaults(run=_bench_bounds)
    of_paper = others.add_parser(
        "paper", help="rerun the paper's tables and Figure 6", description=paper.DESCRIPTION
    )
    paper.add_arguments(of_paper)
    of_paper.set_defaults(run=paper.run)

    of_long = others.add_parser(
        "long",
        help="take millions of steps: drift, memory, speed",
        description=long_run.DESCRIPTION,
    )
    long_run.add_arguments(of_long)
    of_long.set_defaults(run=_bench_long)

    build = commands.add_parser(
        "build",
        help="compile the kernels ahead of the first step",
        description="Compiles the C++ kernels for this CPU into the cache, for the first step of "
        "later processes. Prints the file and the compiler.",
    )
    build.set_defaults(run=_build)

    info = commands.add_parser(
        "info",
        help="print versions, devices, and each optimizer's backend",
        description="Prints versions, devices, and each optimizer's backend with the reason.",
    )
    info.set_defaults(run=_info)
    return parser


_Commands = Any  # argparse has no public name for what add_subparsers returns

_RANGE_TEST_EXAMPLES = """examples:
  clr-optim range-test --optimizer Adam
  clr-optim range-test --mode linear --start-lr 0 --end-lr 1 --metric accuracy --save curve.csv
  clr-optim range-test --data cifar-10-batches-bin --steps 2000
"""

_TRAIN_EXAMPLES = """examples:
  clr-optim train --optimizer Adam                         # bounds by a range test
  clr-optim train --base-lr 0.012 --max-lr 0.26 --policy triangular --save history.csv
  clr-optim train --data cifar-10-batches-bin --base-lr 0.001 --max-lr 0.006 --cycles 2
"""


def _add_range_test(commands: _Commands) -> None:
    parser = commands.add_parser(
        "range-test",
        help="find both bounds of the learning rate, and draw the reason",
        description="Trains for a while with a rising learning rate and reads both bounds of a "
        "cycle from the curve. Prints the reason and draws the curve. Trains on handwritten "
        "digits, or on CIFAR-10 with the network of Smith's paper.",
        epilog=_RANGE_TEST_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_task(parser)
    add = parser.add_argument
    add("--start-lr", type=float, default=1e-5, metavar="LR", help="first rate (1e-5)")
    add("--end-lr", type=float, default=10.0, metavar="LR", help="last rate (10)")
    add("--mode", choices=MODES, default="exponential", help="how the rate rises (exponential)")
    add("--steps", type=_whole(2), default=500, metavar="N", help="iterations (500)")
    add("--metric", choices=METRICS[:2], default="loss", help="the curve to read (loss)")
    add("--method", choices=METHODS, default="range", help="rule for max_lr (range)")
    add("--base", choices=BASES, default="curve", help="rule for base_lr (curve)")
    add("--epochs-per-step-size", type=_whole(2), default=4, metavar="N", help="2 to 10 (4)")
    add("--out", default="range-test.png", metavar="FILE", help="picture (range-test.png)")
    add("--save", metavar="FILE", help="write the curve as .csv or .json")
    parser.set_defaults(run=_range_test)


def _add_train(commands: _Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a whole number of cycles",
        description="Trains a whole number of cycles, on handwritten digits or on CIFAR-10 with "
        "the network of Smith's paper. Prints the accuracy at the end of each cycle and draws "
        "loss, accuracy and learning rate. If no bounds are given, a range test finds them.",
        epilog=_TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_task(parser)
    add = parser.add_argument
    add("--policy", choices=_TRAINED, default="triangular2", metavar="NAME", help=_POLICIES_HELP)
    add("--base-lr", type=float, metavar="LR", help="lower bound")
    add("--max-lr", type=float, metavar="LR", help="upper bound; fixed takes the geometric mean")
    add("--cycles", type=_whole(1), default=4, metavar="N", help="how many cycles (4)")
    add("--epochs-per-step-size", type=_whole(1), default=4, metavar="N", help="2 to 10 (4)")
    add("--gamma", type=float, help="of exp_range (leaves a tenth of the amplitude)")
    add("--window", choices=schedule.WINDOWS, help="shape of a cycle (triangle)")
    add("--out", default="train.png", metavar="FILE", help="picture (train.png)")
    add("--save", metavar="FILE", help="rate, loss and accuracy per iteration, as .csv or .json")
    parser.set_defaults(run=_train)


def _add_task(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        metavar="DIR",
        help="folder of CIFAR-10's binary version, unpacked (the embedded digits)",
    )
    add("--optimizer", choices=OPTIMIZERS, default="SGD", metavar="NAME", help=_OPTIMIZERS_HELP)
    add("--batch-size", type=_whole(1), metavar="N", help="images (50, or 100 with --data)")
    add("--seed", type=_whole(0), default=0, metavar="N", help="of weights and batches (0)")
    add("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    add("--backend", choices=backends.BACKENDS, default="auto", help="(auto)")
    add("--threads", type=_whole(1), metavar="N", help="of torch")


def _whole(minimum: int) -> Callable[[str], int]:
    """Make an argparse type for a whole number from ``minimum`` to 2³² − 1, the largest seed."""

    def convert(text: str) -> int:
        number = int(text) if text.strip().isdecimal() else -1
        if not minimum <= number < 2**32:
            raise argparse.ArgumentTypeError(f"must be a whole number >= {minimum}, got {text!r}")
        return number

    return convert


def _demo(args: argparse.Namespace) -> None:
    from clr_optim.demo import run_demo

    run_demo(seed=args.seed, seeds=args.seeds, out=args.out, quick=args.quick)


def _range_test(args: argparse.Namespace) -> int:
    from clr_optim.demo.commands import range_test

    return _run(range_test, args)


def _train(args: argparse.Namespace) -> int:
    from clr_optim.demo.commands import train_once

    if args.gamma is not None and not args.policy.startswith("exp_range"):
        raise _ArgumentError(f"--gamma has no effect with --policy {args.policy}")
    if args.window is not None and args.policy == "fixed":
        raise _ArgumentError("--window has no effect with --policy fixed")
    return _run(train_once, args)


def _run(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command, and turn the library's ValueError into a message on the arguments."""
    try:
        return command(args)
    except ValueError as error:
        raise _ArgumentError(str(error)) from error


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
    unused = set(given) - set(inspect.signature(make).parameters)
    if unused:
        verb = "has" if len(unused) == 1 else "have"
        raise _ArgumentError(f"{_flags(unused)} {verb} no effect with --policy {args.policy}")
    lengths = {"one_cycle": {"total_steps": steps}, "warm_restarts": {"period": 2000}}
    options: dict[str, Any] = {**lengths.get(args.policy, {}), **given}
    try:
        figure = plotting.plot_schedule(make(**options), steps, base_lr, max_lr)
        path = plotting.save(figure, Path(args.out or f"{args.policy}.png"))
    except (TypeError, ValueError) as error:  # the message names the argument
        raise _ArgumentError(str(error)) from error
    print(path)


def _flags(names: Iterable[str]) -> str:
    return ", ".join(sorted(f"--{name.replace('_', '-')}" for name in names))


def _bench(args: argparse.Namespace) -> int:
    return throughput.exit_code(throughput.run(args))


def _bench_bounds(args: argparse.Namespace) -> int:
    def run(args: argparse.Namespace) -> int:
        bounds.run(args)
        return 0

    return _run(run, args)


def _bench_long(args: argparse.Namespace) -> int:
    def run(args: argparse.Namespace) -> int:
        long_run.run(args)
        return 0

    return _run(run, args)


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
    """Return how the C++ kernels are compiled here, or why they cannot be."""
    import torch

    described = native_build.describe()
    try:
        library()
        state = f"ready, {described['openmp']} for threads"
    except BuildError as error:
        state = f"none: {_line(error)}"
    bits = {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability(), 128)
    if bits == 512 and "512" not in described["flags"]:
        bits = 256  # compilers prefer 256 bits by default
    return [
        ("kernels", state),
        ("compiler", " ".join(filter(None, (described["compiler"], described["version"])))),
        ("flags", described["flags"]),
        ("vectors", f"{bits} bits, {described['target'] or 'native'}"),
        ("cache", " ".join(filter(None, (described["cache"], described["problem"])))),
    ]


def _served(optimizer: Optimizer) -> str:
    """Return the backend of an optimizer's first step, and the reason."""
    try:
        backend, reason = backends.resolve("auto", optimizer)
        if backends.is_fused(backend):
            library()
    except ValueError as error:  # CLR_OPTIM_BACKEND may name a backend that cannot serve
        return f"none: {_line(error)}"
    except BuildError:
        return "torch: the kernels cannot be compiled, see above"
    return f"{backend}: {reason}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
