"""Train all rows at all seeds, unattended: signals save the runs, and a restart continues them."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from clr_optim.bench.gpu import Gpu
from clr_optim.bench.machine import describe_machine
from clr_optim.bench.paper.data import Data
from clr_optim.bench.paper.known import KNOWN
from clr_optim.bench.paper.one_run import Run, check_settings, row_settings
from clr_optim.bench.paper.progress import Progress
from clr_optim.bench.paper.rows import Row, Scale
from clr_optim.bench.paper.store import Store, key
from clr_optim.bench.paper.training import train

__all__ = ["train_all"]


class _Stop:
    """Note SIGINT and SIGTERM, so that the current runs can be saved.

    A second SIGINT interrupts at once. One request may send SIGTERM twice, as ``timeout`` does.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before.pop(signal.SIGINT))

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def __exit__(self, *error: object) -> None:
        self._restore()


def train_all(
    rows: Sequence[Row], scale: Scale, data: Data, store: Store, args: argparse.Namespace
) -> int:
    """Train every row at every seed, except those in the store.

    Returns:
        The signal that stopped the training, or 0.
    """
    common = {
        "scale": str(scale.factor),
        "momentum": "caffe" if args.caffe_momentum else "torch",
        "data": data.digest,
        "device": args.device,
    }
    finished = set()
    for result in store.read():
        row = KNOWN[result["row"]]
        settings = {
            **common,
            "batch_size": row.network.batch_size_on(data),
            **row_settings(row, scale),
        }
        check_settings(settings, result, f"{store.results}, row {row.name},")
        finished.add(key(result))
        store.drop_checkpoint(*key(result))  # left over if a process ended between the two writes
    # Seeds outermost, so that an early stop leaves all rows at as many seeds as possible.
    jobs = [
        (row, seed)
        for seed in range(args.seeds)
        for row in rows
        if (row.name, seed) not in finished
    ]
    progress = Progress(len(jobs), sum(scale.steps(row.iterations) for row, _ in jobs))
    machine = describe_machine()
    if args.device == "cuda":
        cudnn = torch.backends.cudnn
        switches = {"tf32": cudnn.allow_tf32, "cudnn_benchmark": cudnn.benchmark}
        machine = {**machine, **Gpu().describe(), **switches}
    more = {"data_note": args.data_note, "machine": machine, "together": args.together}

    def begin_runs() -> Iterator[Run]:
        for row, seed in jobs:
            run = Run(row, seed, scale, data, device=args.device, caffe=args.caffe_momentum)
            with run.on_stream():  # on another stream, the run might start before loading ends
                store.load(run)
            progress.begin(run)
            yield run

    def finish(run: Run) -> None:
        store.append({**run.result(), **more})
        store.drop_checkpoint(run.row.name, run.seed)

    with _Stop() as stop:
        left = train(
            begin_runs(),
            store.save,
            lambda: stop.signal,
            progress.show,
            60.0 * args.checkpoint_every,
            args.together,
            finish,
        )
    for run in left:
        print(
            f"\nstopped after {run.iteration:,} of {run.iterations:,} iterations of "
            f"{run.row.name}, seed {run.seed}, and saved: the same command with --resume "
            "continues the run",
            file=sys.stderr,
        )
    return stop.signal if left else 0
