"""The commands ``range-test`` and ``train``, on the digits, on CIFAR-10 or on the user's model."""

from __future__ import annotations

import csv
import inspect
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clr_optim import plotting
from clr_optim.bench.user_model import load_model
from clr_optim.demo.train import (
    OPTIMIZERS,
    Plan,
    Run,
    Task,
    build_optimizer,
    cifar10_task,
    digits_task,
    search_bounds,
    train,
)
from clr_optim.options import OptionError, flag, name_options
from clr_optim.range_test import Bounds, RangeTest, lr_range_test
from clr_optim.schedule import POLICIES, Schedule, arguments_for

__all__ = ["range_test", "train_once"]

#: the optimizer without ``--optimizer``
_DEFAULT = "SGD"


def range_test(args: Namespace) -> tuple[dict[str, Any], int]:
    """Find bounds, print them with the reason, draw and save the curve.

    Args:
        args: the command's options.

    Returns:
        Curve and bounds as numbers and texts, and the exit code: 1 if the curve has no usable
        region, 130 if Ctrl-C ended it early.

    Raises:
        ImportError, OptionError, OSError, ValueError: for impossible options, before any training.
    """
    _check_files(args.out, args.save, (".json", ".csv"))
    with _Threads(args.threads):
        search = _search_model(args) if args.model else _search_task(args)
    result, step_size = search.result, search.step_size
    found: dict[str, Any] = {"optimizer": search.optimizer, "curve": result.to_dict()}
    if args.save and result.lrs:
        result.save(args.save)
    interrupted = 130 if result.interrupted else 0
    try:
        bounds = result.suggest(args.method, base=args.base)
    except ValueError as error:
        if result.lrs and args.out:
            print(plotting.save(plotting.plot_range_test(result), args.out))
        why = name_options(str(error), args)
        print(f"no bounds: {why}")
        return {**found, "no_bounds": why}, interrupted or 1
    print(name_options(_found(result, bounds), args))
    print(f"\nTrain with them, {args.epochs_per_step_size} epochs up and as many down:")
    if not args.model:
        print(
            f"  clr-optim train --optimizer {search.optimizer} --base-lr {bounds.base_lr:.3g} "
            f"--max-lr {bounds.max_lr:.3g}{f' --data {args.data}' if args.data else ''}"
        )
    print(
        f'  opt = CyclicalOptimizer(opt, "triangular2", {_arguments(bounds)}, '
        f"step_size_up={step_size})\n"
    )
    if args.out:
        print(plotting.save(plotting.plot_range_test(result, bounds), args.out))
    if args.save:
        print(args.save)
    found |= {**bounds.asdict(), "confidence": bounds.confidence, "reason": bounds.reason}
    return {**found, "step_size_up": step_size}, interrupted


class _Search(NamedTuple):
    """A finished range test, the optimizer's name, and the step size as Python code."""

    result: RangeTest
    optimizer: str
    step_size: str


def _search_task(args: Namespace) -> _Search:
    """Search with the digits or CIFAR-10."""
    name = args.optimizer or _DEFAULT
    task = _task(args)
    step_size = RangeTest.suggest_step_size(len(task.batches), args.epochs_per_step_size)
    print(f"{name}; {task.summary}.", flush=True)
    return _Search(
        search_bounds(task, name, seed=args.seed, **_range(args)), name, f"{step_size:_}"
    )


def _search_model(args: Namespace) -> _Search:
    """Search with the user's model."""
    for name in ("data", "batch_size", "device"):
        if getattr(args, name) is not None:
            raise OptionError(f"{flag(name)} has no effect with --model: the function decides")
    given = load_model(args.model, args.seed, training=True)
    assert given.model is not None
    if given.optimizer is None:
        name = args.optimizer or _DEFAULT
        optimizer = OPTIMIZERS[name]([{"params": given.params}], args.end_lr)
    elif args.optimizer is not None:
        raise OptionError(
            f"--optimizer has no effect: {args.model} returns an optimizer; leave one of them out"
        )
    else:
        name, optimizer = type(given.optimizer).__name__, given.optimizer
    try:
        batches = len(given.loader)
    except TypeError:  # a loader without a length
        step_size = f"{args.epochs_per_step_size} * steps_per_epoch"
    else:
        suggested = RangeTest.suggest_step_size(batches, args.epochs_per_step_size)
        step_size = f"{suggested:_}"
    print(f"{name}; {given.summary}.", flush=True)
    result = lr_range_test(given.model, optimizer, given.loader, given.loss_fn, **_range(args))
    return _Search(result, name, step_size)


def _range(args: Namespace) -> dict[str, Any]:
    """Return the options of the range test as arguments."""
    return {
        "start_lr": args.start_lr,
        "end_lr": args.end_lr,
        "num_steps": args.steps,
        "mode": args.mode,
        "metric": args.metric,
        "backend": args.backend,
    }


def _arguments(bounds: Bounds) -> str:
    """Return the bounds as Python code, one per group if the groups' rates differ."""

    def code(value: float | list[float]) -> str:
        if isinstance(value, list):
            return f"[{', '.join(f'{rate:.3g}' for rate in value)}]"
        return f"{value:.3g}"

    both = bounds.asdict()
    return f"base_lr={code(both['base_lr'])}, max_lr={code(both['max_lr'])}"


def train_once(args: Namespace) -> tuple[dict[str, Any], int]:
    """Train a whole number of cycles, with bounds given or found by a range test.

    Args:
        args: the command's options.

    Returns:
        The measurements, and the exit code: 130 if Ctrl-C ended it early. Measurements until then
        are saved and drawn.

    Raises:
        ImportError, OSError, ValueError: for impossible options, before any training.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("training needs tqdm: pip install tqdm") from error

    _check_files(args.out, args.save, (".json", ".csv"))
    if (args.base_lr is None) != (args.max_lr is None):
        raise ValueError(
            f"--base-lr {args.base_lr} and --max-lr {args.max_lr}: give both bounds, or neither, "
            "so that a range test finds them"
        )
    if args.policy == "fixed" and args.base_lr == 0.0:
        raise ValueError(
            "--base-lr 0 with --policy fixed: the fixed rate would be 0, the geometric mean of the "
            "bounds; give the rate as both bounds"
        )
    if args.policy == "fixed" and args.base_lr is not None and args.backend != "auto":
        raise ValueError(
            f"--backend {args.backend} has no effect with --policy fixed and bounds: torch's own "
            "optimizer trains, and no range test runs; leave it out"
        )
    name = args.optimizer or _DEFAULT
    with _Threads(args.threads):
        task = _task(args)
        plan = Plan(args.cycles, args.epochs_per_step_size, len(task.batches))
        base_lr, max_lr = args.base_lr, args.max_lr
        policy = _policy(args, plan)
        options = {} if args.policy == "fixed" else {"backend": args.backend}
        if base_lr is not None:  # refuse wrong bounds before the training
            build_optimizer(
                name, policy, task, task.build(),
                base_lr=base_lr, max_lr=max_lr, **options,
            )  # fmt: skip
        print(f"{name}, {args.policy}; {task.summary}.", flush=True)
        if base_lr is None:
            search = search_bounds(task, name, seed=args.seed, backend=args.backend)
            if search.interrupted:
                return {}, 130
            bounds = search.suggest()
            base_lr, max_lr = bounds.base_lr, bounds.max_lr
            print(_found(search, bounds))
        torch.manual_seed(args.seed)
        model = task.build()
        optimizer = build_optimizer(
            name, policy, task, model, base_lr=base_lr, max_lr=max_lr, **options
        )
        print(
            f"{plan.cycles} cycles of 2 × {plan.step_size} iterations "
            f"({plan.epochs_per_step_size} epochs each way), {plan.iterations:,} in all.\n",
            flush=True,
        )
        run = Run(plan.evaluate_every)
        interrupted = False
        with tqdm(total=plan.iterations, unit="it", leave=False, disable=None) as bar:
            try:
                train(model, optimizer, task, plan.iterations, run, bar.update)
            except KeyboardInterrupt:
                interrupted = True
    print(_table(run, plan, interrupted))
    rows = _rows(run)
    settings = {
        "optimizer": name,
        "policy": args.policy,
        "base_lr": base_lr,
        "max_lr": max_lr,
        "seed": args.seed,
    }
    results = {**settings, **({key: [row[key] for row in rows] for key in rows[0]} if rows else {})}
    if args.save:
        _save(Path(args.save), results, rows)
        print(args.save)
    if args.out and run.losses:
        print(plotting.save(_draw(run, plan, f"{name}, {args.policy}"), args.out))
    return results, 130 if interrupted else 0


def _policy(args: Namespace, plan: Plan) -> str | Schedule:
    """Return the policy of a training, of the plan's length."""
    if args.policy == "fixed":
        return "fixed"
    make = POLICIES[args.policy]
    options = arguments_for(make, plan.iterations, plan.step_size)
    if "gamma" in inspect.signature(make).parameters:
        options["gamma"] = plan.gamma if args.gamma is None else args.gamma
    if args.window is not None:
        options["window"] = args.window
    return make(**options)


class _Threads:
    """Set the number of torch's threads, and restore the old number afterwards."""

    def __init__(self, wanted: int | None) -> None:
        self._wanted = wanted
        self._before = torch.get_num_threads()

    def __enter__(self) -> None:
        if self._wanted is not None:
            torch.set_num_threads(self._wanted)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


def _check_files(out: str | None, save: str | None, kinds: Sequence[str]) -> None:
    if out:
        plotting.check_picture(out)
    if save is None:
        return
    path = Path(save)
    if path.suffix not in kinds:
        raise ValueError(f"--save must end in {' or '.join(kinds)}, got {save!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{save}: the folder does not exist; give a path in an existing one"
        )


def _task(args: Namespace) -> Task:
    options = {} if args.batch_size is None else {"batch_size": args.batch_size}
    try:
        device = torch.device(args.device or "cpu")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {' '.join(str(error).split())}") from error
    if args.data is not None:
        return cifar10_task(args.data, device=device, **options)
    return digits_task(device=device, **options)


def _found(result: RangeTest, bounds: Bounds) -> str:
    ended = "interrupted, " if result.interrupted else ""
    return (
        f"LR range test, {ended}{result.steps[-1] + 1:,} of {result.num_steps:,} steps: "
        f"base_lr {bounds.base_lr:.3g}, max_lr {bounds.max_lr:.3g} "
        f"(confidence {bounds.confidence:.2f}).\n{bounds.reason}."
    )


def _table(run: Run, plan: Plan, interrupted: bool) -> str:
    ends = dict(zip(run.evaluated, run.accuracies, strict=True))
    lines = ["cycle  iteration  test accuracy in %"]
    lines += [
        f"{i:5}  {end:9,}  {ends[end]:18.2f}"
        for i, end in enumerate(plan.cycle_ends, 1)
        if end in ends
    ]
    if interrupted:
        lines.append(f"interrupted after {len(run.losses):,} of {plan.iterations:,} iterations")
    return "\n".join(lines)


def _rows(run: Run) -> list[dict[str, Any]]:
    """Return a row per iteration."""
    accuracies = dict(zip(run.evaluated, run.accuracies, strict=True))
    return [
        {"iteration": i, "lr": lr, "loss": loss, "test_accuracy": accuracies.get(i)}
        for i, (lr, loss) in enumerate(zip(run.rates, run.losses, strict=True), 1)
    ]


def _save(path: Path, results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the results as JSON, or the rows as CSV."""
    if path.suffix == ".json":
        path.write_text(json.dumps(results) + "\n")
        return
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["iteration", "lr", "loss", "test_accuracy"])
        table.writeheader()
        table.writerows(rows)


def _draw(run: Run, plan: Plan, title: str) -> Any:
    iterations = list(range(1, len(run.losses) + 1))
    curves: dict[str, tuple[Sequence[int], Sequence[float]]] = {
        "training loss": (iterations, run.losses)
    }
    if run.accuracies:
        curves["test accuracy in %"] = (run.evaluated, run.accuracies)
    curves["learning rate"] = (iterations, run.rates)
    return plotting.plot_history(curves, plan.cycle_ends, title=title)
