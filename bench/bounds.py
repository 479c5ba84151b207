"""Test the suggested bounds: train the digits with them, and at ten fixed rates.

For each optimizer a range test finds the bounds. The same network then trains with cycles between
the bounds, and at each of ten fixed rates over the range of the test, evenly spaced in their
logarithms. All runs start from the same weights and have the same number of iterations.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clr_optim import plotting
from clr_optim.bench.machine import describe_machine
from clr_optim.demo.train import (
    OPTIMIZERS,
    Plan,
    Run,
    Task,
    build_optimizer,
    digits_task,
    search_bounds,
    train,
)
from clr_optim.options import add_json, make_folder, whole

__all__ = ["add_arguments", "report", "run"]

COMPARED = ("SGD", "Adam", "RMSprop", "Adagrad", "Adadelta")
POLICIES = ("triangular", "triangular2")
_RATES = 10

DESCRIPTION = (
    "Finds bounds on the embedded digits by a range test. Trains with them, and at ten fixed rates "
    "over the range of the test, with SGD with momentum, Adam, RMSprop, Adagrad and Adadelta. "
    "Writes bounds.json, bounds.md and the pictures of the range tests."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``clr-optim bench bounds``."""
    add = parser.add_argument
    add(
        "--out", default="bench/results/bounds", metavar="DIR", help="folder (bench/results/bounds)"
    )
    add("--seeds", type=int, default=5, metavar="N", help="how many (5)")
    add("--seed", type=whole(0), default=0, metavar="N", help="the first seed (0)")
    add(
        "--start-lr",
        type=float,
        default=1e-5,
        metavar="LR",
        help="first rate of the range test (1e-5)",
    )
    add("--end-lr", type=float, default=10.0, metavar="LR", help="last rate of the range test (10)")
    add("--steps", type=int, default=500, metavar="N", help="iterations of the range test (500)")
    add("--cycles", type=int, default=4, metavar="N", help="cycles of the training (4)")
    add_json(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write the files, print the table.

    Returns:
        The contents of ``bounds.json``.

    Raises:
        ImportError, OSError: if a picture or file cannot be written, before any training.
        ValueError: if a range or a length is impossible.
    """
    if args.seeds < 1 or args.cycles < 1:
        raise ValueError(f"--seeds {args.seeds}, --cycles {args.cycles}: both must be at least 1")
    folder = make_folder("--out", args.out)
    plotting.check_picture(folder / "range-test.png")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the demo: tensors of this size gain nothing from threads
    try:
        results = _measure(args, digits_task(), Plan(args.cycles), folder)
    finally:
        torch.set_num_threads(threads)
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (folder / "bounds.json").write_text(text, encoding="utf-8")
    text = report(results)
    (folder / "bounds.md").write_text(text, encoding="utf-8")
    print(text)
    return results


def _measure(args: argparse.Namespace, task: Task, plan: Plan, folder: Path) -> dict[str, Any]:
    rates = np.geomspace(args.start_lr, args.end_lr, _RATES).tolist()
    rows = []
    seeds = range(args.seed, args.seed + args.seeds)
    for name in COMPARED:
        # Each seed finds its own bounds: a user has one run as well.
        tests = [
            search_bounds(
                task, name, seed=seed,
                start_lr=args.start_lr, end_lr=args.end_lr, num_steps=args.steps,
            )
            for seed in seeds
        ]  # fmt: skip
        found = [test.suggest() for test in tests]
        figure = plotting.plot_range_test(tests[0], title=f"LR range test, {name} on digits")
        plotting.save(figure, folder / f"range-test-{name.lower()}.png")
        cyclic: dict[str, list[float]] = {
            policy: [
                _accuracy(
                    task, plan, seed,
                    _cyclic(task, name, policy, bounds.base_lr, bounds.max_lr, plan.step_size),
                )
                for seed, bounds in zip(seeds, found, strict=True)
            ]
            for policy in POLICIES
        }  # fmt: skip
        fixed = [
            [_accuracy(task, plan, seed, _fixed(task, name, lr)) for seed in seeds] for lr in rates
        ]
        rows.append(
            {
                "optimizer": name,
                "bounds": [[bounds.base_lr, bounds.max_lr] for bounds in found],
                "confidence": [bounds.confidence for bounds in found],
                "reason": found[0].reason,
                "range_test": tests[0].to_dict(),
                "cyclic": cyclic,
                "fixed": fixed,
            }
        )
    return {
        "machine": describe_machine(),
        "task": task.summary,
        "start_lr": args.start_lr,
        "end_lr": args.end_lr,
        "range_test_steps": args.steps,
        "step_size": plan.step_size,
        "iterations": plan.iterations,
        "seeds": args.seeds,
        "fixed_rates": rates,
        "rows": rows,
    }


_Make = Callable[[torch.nn.Module], torch.optim.Optimizer]


def _cyclic(
    task: Task, name: str, policy: str, base_lr: float, max_lr: float, step_size: int
) -> _Make:
    return lambda model: build_optimizer(
        name, policy, task, model, base_lr=base_lr, max_lr=max_lr, step_size_up=step_size
    )


def _fixed(task: Task, name: str, lr: float) -> _Make:
    return lambda model: OPTIMIZERS[name](task.groups(model), lr)


def _accuracy(task: Task, plan: Plan, seed: int, make: _Make) -> float:
    """Train, and return the accuracy on the test images after the last iteration.

    The seed decides the weights and the batches.
    """
    torch.manual_seed(seed)
    model = task.build()
    measured = Run(plan.iterations)
    train(model, make(model), task, plan.iterations, measured)
    return measured.accuracies[-1]


def report(results: Mapping[str, Any]) -> str:
    """Return the table as Markdown, whichever side wins."""
    rates: Sequence[float] = results["fixed_rates"]
    lines = [
        "# Training with suggested bounds against fixed rates",
        "",
        f"{results['task']}; {results['iterations']} iterations in cycles of 2 × "
        f"{results['step_size']}, the same for the fixed rates; test accuracy in % at the end, "
        f"mean ± standard deviation over {results['seeds']} seeds. The range test: "
        f"{results['range_test_steps']} steps from {results['start_lr']:g} to "
        f"{results['end_lr']:g}, per seed; bounds are shown for the first.",
        "",
        f"| optimizer | bounds | {' | '.join(POLICIES)} | median of {len(rates)} fixed "
        "| best fixed | beats the median | beats the best |",
        "| --- | --- | " + "--- | " * len(POLICIES) + "--- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        means = [float(np.mean(values)) for values in row["fixed"]]
        best = int(np.argmax(means))
        base_lr, max_lr = row["bounds"][0]
        cyclic = {policy: float(np.mean(row["cyclic"][policy])) for policy in POLICIES}
        cells = [
            row["optimizer"],
            f"{base_lr:.2g}–{max_lr:.2g}",
            *(_spread(row["cyclic"][policy]) for policy in POLICIES),
            f"{np.median(means):.2f}",
            f"{_spread(row['fixed'][best])} at {rates[best]:.2g}",
            _which(cyclic, float(np.median(means))),
            _which(cyclic, means[best]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "All fixed rates (mean over seeds):",
        "",
        f"| optimizer | {' | '.join(f'{lr:.2g}' for lr in rates)} |",
        "| --- |" + " --- |" * len(rates),
    ]
    lines += [
        f"| {row['optimizer']} | {' | '.join(f'{np.mean(v):.1f}' for v in row['fixed'])} |"
        for row in results["rows"]
    ]
    machine = results["machine"]
    lines += ["", f"torch {machine['torch']}, {machine['cpu']}; `clr-optim bench bounds`.", ""]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def _which(cyclic: Mapping[str, float], bar: float) -> str:
    winners = [policy for policy, mean in cyclic.items() if mean > bar]
    if len(winners) == len(cyclic):
        return "both"
    return ", ".join(winners) or "neither"
