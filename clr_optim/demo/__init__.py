"""The demo: find bounds by a range test, then compare a fixed rate with three cyclic policies.

:func:`run_demo` is the demo. The training loop is in :mod:`clr_optim.demo.train`. The commands
``range-test`` and ``train``, each for one part of the demo, are in :mod:`clr_optim.demo.commands`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clr_optim.console import printing
from clr_optim.demo.train import (
    Plan,
    Run,
    Task,
    build_optimizer,
    digits_task,
    load_digits,
    search_bounds,
    train,
)
from clr_optim.range_test import Bounds, RangeTest

__all__ = [
    "COMPARED", "POLICIES", "Results", "as_json", "load_digits", "run_demo", "table", "verdict",
]  # fmt: skip

POLICIES = ("fixed", "triangular", "triangular2", "exp_range")
COMPARED = ("SGD", "Adam")

#: The runs of each (optimizer, policy), one per seed.
Results = dict[tuple[str, str], list[Run]]


@printing()
def run_demo(
    *, seed: int = 0, seeds: int | None = None, out: str | Path = "demo-out", quick: bool = False
) -> Results:
    """Find bounds, train, and print a table, a sentence per optimizer and the pictures' paths.

    Args:
        seed: the first seed.
        seeds: how many, counted up from ``seed``; ``None`` is 5, or 1 with ``quick``.
        out: folder for the pictures, created if it does not exist.
        quick: train for two cycles of half the length instead of four.

    Returns:
        The measurements of every run.

    Raises:
        ImportError: without tqdm or matplotlib.
        OSError: if ``out`` cannot be created or written.
        ValueError: if a range test finds no bounds.
    """
    # Check packages and folder now, before a minute of training.
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the demo needs tqdm: pip install tqdm") from error
    from clr_optim import plotting

    plotting.require_matplotlib()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"no permission to write into {folder}")
    if seeds is None:
        seeds = 1 if quick else 5
    task = digits_task()
    plan = Plan(cycles=2, epochs_per_step_size=2) if quick else Plan()
    if quick:
        print("Quick: fewer and shorter cycles, and one seed by default.")
    which = f"seed {seed}" if seeds == 1 else f"seeds {seed} to {seed + seeds - 1}"
    print(f"{task.summary}; {which}.\n", flush=True)

    results: Results = {}
    threads = torch.get_num_threads()
    # Tensors of this size gain nothing from threads, and lose much if the cores are busy.
    torch.set_num_threads(1)
    try:
        searches = {name: search_bounds(task, name, seed=seed) for name in COMPARED}
        bounds = {name: search.suggest() for name, search in searches.items()}
        print(_introduction(searches, bounds, plan), flush=True)
        # Seeds outermost, so that a slow moment of the machine slows the steps of all rows.
        jobs = [(n, p, s) for s in range(seed, seed + seeds) for n in COMPARED for p in POLICIES]
        with tqdm(total=len(jobs) * plan.iterations, unit="it", leave=False, disable=None) as bar:
            for name, policy, this_seed in jobs:
                bar.set_description(f"{name} {policy}, seed {this_seed}")
                run = _train_once(task, name, policy, bounds[name], plan, this_seed, bar.update)
                results.setdefault((name, policy), []).append(run)
    finally:
        torch.set_num_threads(threads)

    print(table(results, plan))
    print()
    for name in COMPARED:
        print(verdict(name, {policy: _finals(results[name, policy]) for policy in POLICIES}))
    if seeds == 1:
        print("One seed: which policy came out ahead is that seed's luck.")
    print()
    for path in _draw(searches, results, plan, folder):
        print(path)
    return results


def _train_once(
    task: Task,
    name: str,
    policy: str,
    bounds: Bounds,
    plan: Plan,
    seed: int,
    on_iteration: Callable[[], object] = lambda: None,
) -> Run:
    """Train once; the seed decides the first weights and the order of the batches."""
    torch.manual_seed(seed)
    model = task.build()
    optimizer = build_optimizer(
        name, policy, task, model,
        base_lr=bounds.base_lr, max_lr=bounds.max_lr,
        step_size_up=plan.step_size, gamma=plan.gamma,
    )  # fmt: skip
    run = Run(plan.evaluate_every)
    train(model, optimizer, task, plan.iterations, run, on_iteration)
    return run


def _introduction(
    searches: Mapping[str, RangeTest], bounds: Mapping[str, Bounds], plan: Plan
) -> str:
    test = next(iter(searches.values()))
    rates = [f"{name} {(b.base_lr * b.max_lr) ** 0.5:.2g}" for name, b in bounds.items()]
    return "\n".join(
        [
            f"LR range test, {test.num_steps} steps with rising rate, then the weights as before:",
            *(
                f"{name}: {b.base_lr:.2g} to {b.max_lr:.2g}; {b.reason}."
                for name, b in bounds.items()
            ),
            "",
            f"Step size {plan.step_size} iterations ({plan.epochs_per_step_size} epochs); "
            f"{plan.cycles} cycles, {plan.iterations} iterations.",
            f"fixed is the geometric mean of the bounds: {', '.join(rates)}.",
            f"exp_range: gamma = {plan.gamma:.5f}, which leaves {plan.left_at_end:g} of the "
            "amplitude at the end.\n",
        ]
    )


def _finals(runs: list[Run]) -> npt.NDArray[np.float64]:
    return np.array([run.accuracies[-1] for run in runs])


def table(results: Results, plan: Plan) -> str:
    """Return a table: test accuracy at the end of each cycle, and the time of a step.

    Accuracies are means over seeds. The last one has the standard deviation over seeds beside it
    (of a sample: n − 1). The fixed rate has no cycles; its accuracies are of the same iterations.
    """
    cycles = [f"cycle {i}" for i in range(1, plan.cycles)]
    rows = [["optimizer", "policy", *cycles, f"cycle {plan.cycles}, final", "step() µs"]]
    for (name, policy), runs in results.items():
        accuracies = np.array([run.accuracies for run in runs])
        ends = accuracies[:, plan.evaluations_per_cycle - 1 :: plan.evaluations_per_cycle]
        *means, final = ends.mean(axis=0)
        spread = f" ± {_finals(runs).std(ddof=1):.2f}" if len(runs) > 1 else ""
        step = np.median([run.step_seconds for run in runs]) * 1e6
        rows.append(
            [name, policy, *(f"{m:.2f}" for m in means), f"{final:.2f}{spread}", f"{step:.0f}"]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    seeds = len(next(iter(results.values())))
    over = f", mean over {seeds} seeds (± standard deviation)" if seeds > 1 else ""
    return "\n".join([f"Test accuracy in %{over}:", "", *lines])


def as_json(results: Results) -> dict[str, Any]:
    """Return the results as numbers, texts and lists; accuracies in percent, one list per seed."""
    rows = [
        {
            "optimizer": name,
            "policy": policy,
            "base_lr": min(runs[0].rates),
            "max_lr": max(runs[0].rates),
            "iterations": runs[0].evaluated,
            "accuracies": [run.accuracies for run in runs],
            "step_s": float(np.median([run.step_seconds for run in runs])),
        }
        for (name, policy), runs in results.items()
    ]
    return {"rows": rows}


def verdict(name: str, finals: Mapping[str, npt.NDArray[np.float64]]) -> str:
    """Return a sentence: which policy was best, and which lost against the fixed rate.

    Args:
        name: the optimizer's name.
        finals: final accuracies in percent, shape (seeds,), by policy, with ``"fixed"`` among them.
            The runs of one seed started from the same weights and had the same batches.
    """
    means = {policy: float(values.mean()) for policy, values in finals.items()}
    cyclic = max((policy for policy in means if policy != "fixed"), key=means.__getitem__)
    best, other = sorted(["fixed", cyclic], key=means.__getitem__, reverse=True)
    losers = [policy for policy in means if means[policy] < means["fixed"]]
    lost = f"; {' and '.join(losers)} lost against the fixed rate" if losers else ""
    if means[best] == means[other]:
        return f"{name}: {cyclic} and the fixed rate came out level, {means[best]:.2f} %{lost}."
    label = {"fixed": "the fixed rate", cyclic: cyclic}
    sentence = (
        f"{name}: {label[best]} was best, {means[best]:.2f} % against {means[other]:.2f} % for "
        f"{label[other]}"
    )
    difference = finals[best] - finals[other]
    if len(difference) > 1:
        sentence += f" (ahead on {(difference > 0).sum()} of {len(difference)} seeds"
        if difference.mean() < difference.std(ddof=1):
            sentence += "; the difference is smaller than its spread over seeds"
        sentence += ")"
    return sentence + ("; every cyclic policy lost against it" if best == "fixed" else lost) + "."


def _draw(
    searches: Mapping[str, RangeTest], results: Results, plan: Plan, folder: Path
) -> list[Path]:
    from clr_optim import plotting

    rates = {n: {p: results[n, p][0].rates for p in POLICIES} for n in COMPARED}
    accuracies = {
        n: {p: np.mean([run.accuracies for run in results[n, p]], axis=0) for p in POLICIES}
        for n in COMPARED
    }
    period, seeds = 2 * plan.step_size, len(next(iter(results.values())))
    figures = {
        f"range-test-{name.lower()}": plotting.plot_range_test(
            search, title=f"LR range test, {name}"
        )
        for name, search in searches.items()
    }
    figures["learning-rate"] = plotting.plot_demo_rates(rates, period)
    figures["accuracy"] = plotting.plot_demo_accuracies(
        accuracies, plan.evaluate_every, period, seeds
    )
    return [plotting.save(figure, folder / f"{name}.png") for name, figure in figures.items()]
