"""Run ``clr-optim bench paper``: train, report, or measure the speed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clr_optim.bench.paper.data import Data, read
from clr_optim.bench.paper.known import KNOWN
from clr_optim.bench.paper.networks import SIGMOID
from clr_optim.bench.paper.options import check_mode, chosen_rows
from clr_optim.bench.paper.range_tests import measure_range
from clr_optim.bench.paper.readme import renewed_readme
from clr_optim.bench.paper.report import report
from clr_optim.bench.paper.resnet import DATASETS
from clr_optim.bench.paper.rows import Row, stages
from clr_optim.bench.paper.speed import measure_speed
from clr_optim.bench.paper.store import Store
from clr_optim.bench.paper.unattended import train_all

__all__ = ["DESCRIPTION", "run", "written"]

DESCRIPTION = (
    "Reruns the tables of the paper on cyclical learning rates (arXiv 1506.01186): cifar10_full on "
    "CIFAR-10. --table resnet reruns its Table 4: residual networks, stochastic depth and a "
    "DenseNet. --figure 6 reruns its Figure 6: constant rates and cycles on a sigmoid network. "
    "Runs unattended: progress goes to stderr, each finished row goes to a file, and --resume "
    "continues after an interruption."
)


#: the JSON files that reports and measurements write
_JSON_FILES = ("paper", "figure-6", "resnet", "speed", "range-test-*")


@contextmanager
def _torch_settings(threads: int | None) -> Iterator[None]:
    """Set torch's threads and cuDNN's search for the fastest convolutions; restore both."""
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(threads or before[0])
    # All batches have one shape, so that one search serves all of them.
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]


def run(args: argparse.Namespace) -> int:
    """Train the chosen rows, or report on results, or measure the speed.

    Returns:
        The exit code: 0, or 128 + the signal that stopped the training.

    Raises:
        argparse.ArgumentError: if options, data and results do not fit together.
        OSError: if a file cannot be read or written, before any training.
    """
    try:
        check_mode(args)
        if args.report:
            return _report(args)
        if args.readme:
            raise argparse.ArgumentError(None, f"--readme {args.readme}: only with --report")
        if args.data is None:
            name = "CIFAR-100" if args.table == ["resnet-100"] else "CIFAR-10"
            raise argparse.ArgumentError(None, f"--data is missing: the folder of {name}'s files")
        if args.together > 1 and args.device == "cpu":
            words = "only on a GPU; on a CPU start a process for each, with --rows and --threads 1"
            raise argparse.ArgumentError(None, f"--together {args.together}: {words}")
        with _torch_settings(args.threads):
            if args.range_test:
                return _test_ranges(chosen_rows(args), args)
            return _speed(args) if args.speed else _run(chosen_rows(args), args)
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from error


def written(folder: str | Path) -> dict[str, Any]:
    """Return what the command has written into a folder.

    Returns:
        The contents of the JSON files by name, and the finished runs as ``"results"``.
    """
    store = Store(folder, create=False)
    files = [path for name in _JSON_FILES for path in sorted(store.folder.glob(f"{name}.json"))]
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    runs = store.read()
    return {**found, "results": runs} if runs else found


def _report(args: argparse.Namespace) -> int:
    # Check the README's marks before any file changes.
    readme = args.readme and renewed_readme(args.readme, Store(args.out, create=False).read())
    print(report(args.out))
    if args.readme:
        Path(args.readme).write_text(readme, encoding="utf-8")
    return 0


def _speed(args: argparse.Namespace) -> int:
    store = Store(args.out)
    speed = measure_speed(read(args.data, args.device), args.device, args.speed)
    (store.folder / "speed.json").write_text(json.dumps(speed, indent=1) + "\n")
    for name, rate in speed["iterations_per_s"].items():
        print(f"{name}: {rate:g} iterations/s")
    return 0


def _test_ranges(rows: Sequence[Row], args: argparse.Namespace) -> int:
    if rows[0].table not in DATASETS:
        words = "only with --table resnet; clr-optim range-test --data DIR serves cifar10_full"
        raise argparse.ArgumentError(None, f"--range-test {args.range_test}: {words}")
    data, folder = _read(rows, args), Store(args.out).folder
    for row in {row.network.name: row for row in rows}.values():
        print(measure_range(row, data, folder, args.range_test, args.device, args.data_note))
    return 0


def _read(rows: Sequence[Row], args: argparse.Namespace) -> Data:
    batch_size = SIGMOID.batch_size if args.figure else None
    if rows[0].table in DATASETS:
        batch_size = max(row.network.batch_size for row in rows)
    return read(args.data, args.device, batch_size, DATASETS.get(rows[0].table, 10))


def _run(rows: Sequence[Row], args: argparse.Namespace) -> int:
    data = _read(rows, args)
    store = Store(args.out)
    if not args.resume and not store.is_empty():
        raise argparse.ArgumentError(
            None,
            f"--out {args.out}: there are results; add --resume to continue them, or give another "
            "folder",
        )
    kept = {KNOWN[run["row"]].table for run in store.read()}
    if kept and (kept <= DATASETS.keys()) != (rows[0].table in DATASETS):
        raise argparse.ArgumentError(
            None, f"--out {args.out}: there are results of table {min(kept)}; give another folder"
        )
    if args.table and "2" in args.table:
        print(stages(args.scale) + "\n", flush=True)
    stop_signal = train_all(rows, args.scale, data, store, args)
    if store.read():
        print(report(args.out))
    return 128 + stop_signal if stop_signal else 0
