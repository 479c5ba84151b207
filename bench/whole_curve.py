"""Read accuracy against length from one run with growing cycles, beside separate runs.

In the one run each cycle is twice as long as the cycle before. The ends of its cycles lie at 1, 3,
7, 15, ... times the first cycle. A separate run of each of these lengths is one triangle between
the same bounds. Both begin with the same weights and batches, so that the first end equals the
first separate run.

Source: J. Portes and others, *Fast Benchmarking of Accuracy vs. Training Time with Cyclic Learning
Rates*, arXiv 2206.00832.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clr_optim import plotting
from clr_optim.bench.machine import describe_machine
from clr_optim.demo.train import (
    OPTIMIZERS,
    Run,
    Task,
    build_optimizer,
    cifar10_task,
    digits_task,
    search_bounds,
    train,
)
from clr_optim.options import add_json, make_folder, spelled, whole
from clr_optim.schedule import Schedule, triangular

__all__ = ["add_arguments", "compare", "report", "run"]

DESCRIPTION = (
    "Trains one run whose cycles double in length, and a separate run of each length at which one "
    "of its cycles ends. Compares the accuracies: what the one run saves and what it loses. "
    "Without --base-lr and --max-lr a range test per seed finds the bounds. Writes curve.json "
    "after each run, curve.md and curve.png; the same command continues after an interruption."
)

#: epochs of the first cycle, by default
_EPOCHS = 4
_ONE = "one run"
Point = tuple[int, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``clr-optim bench curve``."""
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder of CIFAR-10's binary version (the embedded digits)")
    add("--out", default="curve-out", metavar="DIR", help="folder (curve-out)")
    add(
        "--optimizer",
        type=spelled(OPTIMIZERS),
        choices=sorted(OPTIMIZERS),
        default="SGD",
        metavar="NAME",
        help=f"{', '.join(sorted(OPTIMIZERS))} (SGD)",
    )
    add("--base-lr", type=float, metavar="LR", help="lower bound (by a range test)")
    add("--max-lr", type=float, metavar="LR", help="upper bound (by a range test)")
    add("--cycles", type=whole(2), default=5, metavar="N", help="cycles of the one run (5)")
    add(
        "--first-cycle",
        type=whole(2),
        metavar="N",
        help=f"iterations of the first cycle, an even number ({_EPOCHS} epochs)",
    )
    add("--seeds", type=whole(1), default=3, metavar="N", help="how many, from 0 (3)")
    add("--threads", type=whole(1), default=1, metavar="N", help="of torch (1)")
    add_json(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, write the files, print the table.

    Returns:
        The contents of ``curve.json``.

    Raises:
        ImportError, OSError: if a picture or file cannot be written, before any training.
        ValueError: if ``--first-cycle`` is odd, one bound is missing, or ``--out`` has runs with
            other options or something else.
    """
    if (args.base_lr is None) != (args.max_lr is None):
        raise ValueError(
            f"base_lr={args.base_lr!r} and max_lr={args.max_lr!r}: give both bounds, or neither "
            "for a range test"
        )
    task = digits_task() if args.data is None else cifar10_task(args.data)
    first = args.first_cycle or _EPOCHS * len(task.batches)
    if first % 2:
        raise ValueError(f"--first-cycle {first}: must be even, as {first + 1}: two equal halves")
    folder = make_folder("--out", args.out)
    plotting.check_picture(folder / "curve.png")
    lengths = [first * (2**cycle - 1) for cycle in range(1, args.cycles + 1)]
    settings = {
        "task": task.summary,
        "optimizer": args.optimizer,
        "bounds": None if args.base_lr is None else [args.base_lr, args.max_lr],
        "lengths": lengths,
    }
    results = _kept(folder / "curve.json", settings)
    machine = {**describe_machine(), "threads": args.threads}
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        _train_all(task, results, args.seeds, machine, lambda: _write(folder, results))
    finally:
        torch.set_num_threads(threads)
    text = report(results)
    (folder / "curve.md").write_text(text, encoding="utf-8")
    plotting.save(plotting.plot_paper_curves(_panels(results)), folder / "curve.png")
    print(text)
    return results


def _kept(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of an earlier run with the same options, or results without runs."""
    if not path.exists():
        return {**settings, "runs": []}
    try:
        results: dict[str, Any] = json.loads(path.read_text("utf-8"))
        _ = [(run["seed"], run["kind"], run["bounds"], run["curve"]) for run in results["runs"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} has no runs of this command: remove it, or give another folder with --out"
        ) from error
    for key, value in settings.items():
        if results.get(key) != value:
            raise ValueError(
                f"{path} has {key} {results.get(key)!r}, and this run {value!r}: repeat the "
                "options of the first run, or give another folder with --out"
            )
    return results


def _write(folder: Path, results: Mapping[str, Any]) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    new = folder / "curve.new"
    new.write_text(text, encoding="utf-8")
    new.replace(folder / "curve.json")  # an interruption leaves the old file whole


def _train_all(
    task: Task,
    results: dict[str, Any],
    seeds: int,
    machine: Mapping[str, Any],
    write: Callable[[], None],
) -> None:
    """Train what the results lack, and write them after each run."""
    lengths, runs = results["lengths"], results["runs"]
    done = {(run["seed"], run["kind"]) for run in runs}
    for seed in range(seeds):
        missing = [
            (kind, iterations, schedule)
            for kind, iterations, schedule in _kinds(lengths)
            if (seed, kind) not in done
        ]
        if not missing:
            continue
        bounds = _bounds(task, results, seed)
        for kind, iterations, schedule in missing:
            every = lengths[0] if kind == _ONE else iterations
            curve = _accuracies(
                task, results["optimizer"], seed, bounds, schedule, iterations, every
            )
            runs.append(
                {
                    "seed": seed,
                    "kind": kind,
                    "bounds": bounds,
                    "curve": curve,
                    "machine": machine,
                }
            )
            write()


def _kinds(lengths: Sequence[int]) -> Iterator[tuple[str, int, Schedule]]:
    """Yield name, length and schedule of each run at a seed."""
    yield _ONE, lengths[-1], triangular(lengths[0] // 2, period_multiplier=2)
    for length in lengths:
        yield f"{length} iterations", length, triangular(length // 2)


def _bounds(task: Task, results: Mapping[str, Any], seed: int) -> list[float]:
    """Return the bounds of a seed: given ones, those of its runs, or those of a range test."""
    if results["bounds"] is not None:
        return list(results["bounds"])
    for other in results["runs"]:
        if other["seed"] == seed:
            return list(other["bounds"])
    found = search_bounds(task, results["optimizer"], seed=seed).suggest()
    return [found.base_lr, found.max_lr]


def _accuracies(
    task: Task,
    optimizer: str,
    seed: int,
    bounds: Sequence[float],
    schedule: Schedule,
    iterations: int,
    every: int,
) -> list[Point]:
    """Train, and return the accuracy on the test images after each multiple of ``every``."""
    torch.manual_seed(seed)
    model = task.build()
    base_lr, max_lr = bounds
    made = build_optimizer(optimizer, schedule, task, model, base_lr=base_lr, max_lr=max_lr)
    measured = Run(every)
    train(model, made, task, iterations, measured)
    return list(zip(measured.evaluated, measured.accuracies, strict=True))


def compare(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare the one run with the separate runs, at each length.

    Returns:
        Dictionaries with ``"length"`` (iterations), ``"seeds"`` (how many have both runs), and, for
        at least one seed, ``"one"`` and ``"separate"`` (mean accuracies in percent),
        ``"difference"`` (the mean over seeds, points) and ``"same"`` (two standard errors of this
        difference, over seeds; None for one seed).
    """
    curves = {(run["seed"], run["kind"]): dict(map(tuple, run["curve"])) for run in results["runs"]}
    rows = []
    for length in results["lengths"]:
        pairs = [
            (curves[seed, _ONE][length], curves[seed, f"{length} iterations"][length])
            for seed, kind in curves
            if kind == _ONE and (seed, f"{length} iterations") in curves
        ]
        row: dict[str, Any] = {"length": length, "seeds": len(pairs)}
        if pairs:
            gaps = [one - separate for one, separate in pairs]
            row.update(
                one=statistics.fmean(one for one, _ in pairs),
                separate=statistics.fmean(separate for _, separate in pairs),
                difference=statistics.fmean(gaps),
                same=2 * statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None,
            )
        rows.append(row)
    return rows


def report(results: Mapping[str, Any]) -> str:
    """Return the table and two sentences as Markdown: what the one run saves, and what it loses."""
    rows = compare(results)
    lines = [
        "# One run, the whole curve",
        "",
        f"{results['task']}; {results['optimizer']}, `triangular` between {_between(results)}. In "
        "the one run each cycle is twice as long as the cycle before. A separate run is one "
        "triangle. Test accuracy in %, mean over seeds; the difference ± two standard errors over "
        "seeds, whose runs have the same bounds, first weights and batches.",
        "",
        "| iterations | one run | separate runs | difference | seeds |",
        "| --- | --- | --- | --- | --- |",
        *map(_line, rows),
        "",
    ]
    lengths = results["lengths"]
    total = sum(lengths)
    lines.append(
        f"What the one run saves: {lengths[-1]:,} iterations show {len(lengths)} lengths, and "
        f"separate runs take {total:,} ({1 - lengths[-1] / total:.0%} saved)."
    )
    later = [row for row in rows[1:] if row["seeds"]]
    if later:
        least, most = (pick(later, key=lambda row: float(row["difference"])) for pick in (min, max))
        lines.append(
            "What the one run loses: from the second length on its accuracy differs by "
            f"{least['difference']:+.2f} points (after {least['length']:,} iterations) to "
            f"{most['difference']:+.2f} (after {most['length']:,}). {_losses(later)} At the first "
            "length both are the same run."
        )
    return "\n".join([*lines, "", f"{_machines(results)}; `clr-optim bench curve`.", ""])


def _losses(rows: Sequence[Mapping[str, Any]]) -> str:
    """Count the differences that are losses beyond the noise of the seeds."""
    known = [row for row in rows if row["same"] is not None]
    if not known:
        return "With one seed the noise of the seeds is unknown."
    losses = sum(row["difference"] < -row["same"] for row in known)
    text = f"{losses} of {len(known)} differences are losses beyond the noise of the seeds."
    if len(known) < len(rows):
        text += f" The noise of the other {len(rows) - len(known)}, of one seed, is unknown."
    return text


def _machines(results: Mapping[str, Any]) -> str:
    """Name the machines of the runs. Files of earlier versions have one for all runs."""
    machines = [run.get("machine") or results["machine"] for run in results["runs"]]
    words = [f"torch {one['torch']}, {one['cpu']}, {one['threads']} threads" for one in machines]
    return "; ".join(dict.fromkeys(words))


def _between(results: Mapping[str, Any]) -> str:
    """Say the bounds in words."""
    pairs = dict.fromkeys(tuple(run["bounds"]) for run in results["runs"])
    words = ", ".join(f"{low:.2g} and {top:.2g}" for low, top in pairs)
    how = "" if results["bounds"] is not None else " (by a range test per seed)"
    return words + how


def _line(row: Mapping[str, Any]) -> str:
    if not row["seeds"]:
        return f"| {row['length']:,} | not run | | | |"
    noise = "" if row["same"] is None else f" ± {row['same']:.2f}"
    return (
        f"| {row['length']:,} | {row['one']:.2f} | {row['separate']:.2f} | "
        f"{row['difference']:+.2f}{noise} | {row['seeds']} |"
    )


def _panels(results: Mapping[str, Any]) -> dict[str, dict[str, list[Point]]]:
    """Return the curves of the picture: the ends of cycles beside the separate runs."""
    rows = [row for row in compare(results) if row["seeds"]]
    curves = {
        label: [(row["length"], row[key]) for row in rows]
        for label, key in (("one run, at the ends of its cycles", "one"),
                           ("separate runs", "separate"))
    }  # fmt: skip
    return {results["task"].partition(";")[0]: curves}
