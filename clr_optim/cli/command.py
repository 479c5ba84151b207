"""Run ``clr-optim``: parse the options, call the command, write its results as JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from clr_optim._version import __version__
from clr_optim.bench import bounds, long_run, paper, throughput, whole_curve
from clr_optim.cli.info import add_info
from clr_optim.cli.outcome import Outcome
from clr_optim.cli.plot import add_plot
from clr_optim.cli.training import add_demo, add_range_test, add_train
from clr_optim.console import printing
from clr_optim.options import (
    OptionError,
    Parser,
    add_json,
    check_json,
    library_errors,
    text_beside_json,
    write_json,
)

__all__ = ["main"]


@printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; ``None`` takes them from ``sys.argv``.

    Returns:
        The exit code. Wrong arguments raise :class:`SystemExit` with code 2, as argparse does.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return _run(args)
    except (OptionError, argparse.ArgumentError, ImportError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, the shells' convention


def _run(args: argparse.Namespace) -> int:
    """Run a command; with ``--json`` alone, standard output gets the JSON and nothing else."""
    check_json(args.json)
    with text_beside_json(args.json):
        outcome: Outcome = args.run(args)
    write_json(args.json, outcome.results)
    return outcome.code


def make_parser() -> Parser:
    """Make the parser of all commands. Each command sets ``run``, which returns an Outcome."""
    parser = Parser(
        prog="clr-optim", description="Cyclical learning rates inside the optimizer step."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    add_demo(commands)
    add_range_test(commands)
    add_train(commands)
    add_plot(commands)
    _add_bench(commands)
    add_info(commands)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time our steps, torch's, and the memory's bandwidth",
        description=throughput.DESCRIPTION,
        epilog=throughput.EXAMPLES,
    )
    throughput.add_arguments(bench)
    bench.set_defaults(run=_throughput)
    others = bench.add_subparsers(metavar="OTHER", title="other measurements")

    def add(name: str, help: str, module: Any, run: Callable[[Any], Outcome]) -> Any:
        other = others.add_parser(name, help=help, description=module.DESCRIPTION)
        module.add_arguments(other)
        other.set_defaults(run=run)
        return other

    add("bounds", "train with suggested bounds and at ten fixed rates", bounds, _bounds)
    add("curve", "one run with growing cycles beside separate runs", whole_curve, _curve)
    add_json(add("paper", "rerun the paper's tables and Figure 6", paper, _paper))
    add("long", "take millions of steps: drift, memory, speed", long_run, _long)


def _throughput(args: argparse.Namespace) -> Outcome:
    with library_errors(args):
        results = throughput.run(args)
    return Outcome(results, throughput.exit_code(results))


def _bounds(args: argparse.Namespace) -> Outcome:
    with library_errors(args):
        return Outcome(bounds.run(args))


def _curve(args: argparse.Namespace) -> Outcome:
    with library_errors(args):
        return Outcome(whole_curve.run(args))


def _long(args: argparse.Namespace) -> Outcome:
    with library_errors(args):
        return Outcome(long_run.run(args))


def _paper(args: argparse.Namespace) -> Outcome:
    """Run the paper's measurements; their results are what stands in the folder ``--out``."""
    code = paper.run(args)
    with library_errors(args):
        return Outcome(paper.written(args.out) if args.json else {}, code)


if __name__ == "__main__":
    sys.exit(main())
