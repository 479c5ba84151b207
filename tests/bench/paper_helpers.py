"""Helpers of the tests of the paper's rerun: a small CIFAR-10, runs, results."""

from __future__ import annotations

import json
import signal

import numpy as np

from clr_optim.bench.paper import ROWS, Run
from clr_optim.cli import main

FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


SMALL_BATCH = 10


def write_slice(folder, per_file=100, seed=0):
    """Write a small CIFAR-10 whose classes differ in colour, under much noise."""
    rng = np.random.default_rng(seed)
    records = {}
    folder.mkdir(exist_ok=True)
    for name in FILES:
        labels = rng.integers(0, 10, size=(per_file, 1))
        colour = 20 * np.stack([labels % 5, labels // 2, 9 - labels], axis=1).repeat(1024, axis=2)
        noise = rng.integers(0, 60, size=colour.shape)
        pixels = (colour + noise).reshape(per_file, 3072)
        records[name] = np.concatenate([labels, pixels], axis=1).astype(np.uint8)
        records[name].tofile(folder / name)
    return records


def run_paper(folder, out, *options):
    return main(
        [
            "bench",
            "paper",
            "--data",
            str(folder),
            "--out",
            str(out),
            "--threads",
            "1",
            *map(str, options),
        ]
    )


def results_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# Scale 1/125 turns 25,000 iterations into 200, and the step size 2,000 into 16.
TWO_HUNDRED = ("--scale", "1/125", "--data-note", "made up")


def result_of(
    row="fixed", seed=0, accuracy=80.0, iterations=None, cycles=0.0, finite=True, note=""
):
    iterations = iterations or ROWS[row].iterations
    return {
        "row": row, "seed": seed, "scale": "1", "momentum": "torch", "batch_size": 100,
        "data": "d", "device": "cpu", "test_images": 10_000,
        "iterations": iterations, "cycles": cycles,
        "accuracy": accuracy, "curve": [[iterations // 2, accuracy - 5], [iterations, accuracy]],
        "finite": finite, "training_s": 3700.0, "data_note": note,
        "machine": {"cpu": "abacus", "threads": 2, "torch": "2", "clr_optim": "0"},
    }  # fmt: skip


def stop_at(monkeypatch, *iterations, signals=(signal.SIGTERM,)):
    """Raise signals during these iterations."""
    real = Run.iterate
    left = list(iterations)

    def iterate(run):
        real(run)
        if left and run.iteration == left[0]:
            left.pop(0)
            for number in signals:
                signal.raise_signal(number)

    monkeypatch.setattr(Run, "iterate", iterate)


class FakeGraphs:
    """A fake GPU on a CPU: its graph calls the step, and keeps the step alive."""

    def capture(self, step, warm_up):
        for _ in range(warm_up):
            step()
        return lambda: step()
