"""One run: a row of the tables at one seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch.nn import functional

from clr_optim import CyclicalOptimizer
from clr_optim.bench.cifar10 import (
    RATE_RATIOS,
    Batches,
    Images,
    accuracy,
    cifar10_full,
    parameter_groups,
)
from clr_optim.bench.gpu import Gpu
from clr_optim.bench.paper.data import Data, digest
from clr_optim.bench.paper.optimizers import CAFFE_RULES, RULES, CaffeSGD
from clr_optim.bench.paper.rows import Row, Scale

__all__ = ["WARM_UP", "Run", "check_settings"]

_EVALUATIONS = 28
#: Test images for an accuracy before the last iteration.
_ON_THE_WAY = 2_000

#: Eager iterations before the graph is captured.
WARM_UP = 3


class Run:
    """A row at one seed: model, optimizer, batches, and the measurements so far.

    The seed decides the first weights and the order of the images, in the same way for every row.

    Args:
        row: the row to train.
        seed: of weights and batches.
        scale: of lengths and step sizes.
        data: to train on and to test with.
        device: of model and images.
        caffe: whether SGD keeps the rate inside the momentum buffer, as Caffe does.
    """

    def __init__(
        self,
        row: Row,
        seed: int,
        scale: Scale,
        data: Data,
        *,
        device: torch.device | str = "cpu",
        caffe: bool = False,
    ) -> None:
        self.row, self.seed, self.data = row, seed, data
        self.iterations = scale.steps(row.iterations)
        self.device = torch.device(device)
        rules = {**RULES, **CAFFE_RULES} if caffe else RULES
        self.model = cifar10_full(seed).to(self.device)
        base_lr, max_lr = row.bounds
        inner = rules[row.rule](parameter_groups(self.model, max_lr))
        #: whether Triton's kernels serve the row, so that a graph can capture the iteration
        self.on_kernels = self.device.type == "cuda" and not isinstance(inner, CaffeSGD)
        self.optimizer: Any = CyclicalOptimizer(
            inner,
            row.schedule(scale),
            base_lr=[base_lr * ratio for ratio in RATE_RATIOS],
            max_lr=[max_lr * ratio for ratio in RATE_RATIOS],
            backend="triton" if self.on_kernels else "auto",
        )
        self.batches = Batches(
            data.training, data.mean, batch_size=data.batch_size, seed=seed, device=self.device
        )
        self.settings = {
            "row": row.name,
            "seed": seed,
            "scale": str(scale.factor),
            "iterations": self.iterations,
            "bounds": list(row.bounds),
            "schedule": self.optimizer.schedule.to_dict(),
            "optimizer": type(inner).__name__,
            "momentum": "caffe" if caffe else "torch",
            "batch_size": data.batch_size,
            "training_images": len(data.training),
            "test_images": len(data.test),
            "data": data.digest,
            "device": self.device.type,
        }
        self.every = math.ceil(self.iterations / _EVALUATIONS)
        self.iteration = 0
        #: the accuracies so far, as ``(iterations, percent)``
        self.curve: list[tuple[int, float]] = []
        self.training_s = self.evaluation_s = 0.0
        self._graph: Callable[[], object] | None = None
        self._stream = None
        if self.device.type == "cuda":
            self._stream = Gpu().stream()
            self._stream.wait_stream(torch.cuda.current_stream())

    def on_stream(self) -> AbstractContextManager[object]:
        """Enter the run's stream on a GPU. Every call of a run belongs into this context."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @property
    def is_done(self) -> bool:
        """Whether the last iteration is done, and its accuracy is measured."""
        return bool(self.curve) and self.curve[-1][0] == self.iterations

    def _iterate_eagerly(self) -> None:
        inputs, labels = self.batches.sample()
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def capture(self) -> None:
        """Capture the iteration as a graph, after a few eager iterations, which count."""
        # The positions of batches and cycle are on the device; the host only counts.
        self._graph = Gpu().capture(self._iterate_eagerly, warm_up=WARM_UP)
        self.iteration += WARM_UP

    def iterate(self) -> None:
        """Do one iteration: a batch, forward, backward, a step."""
        (self._graph or self._iterate_eagerly)()
        self.iteration += 1

    @property
    def next_evaluation(self) -> int:
        """The iteration before the next accuracy: at equal distances, and at the end."""
        return min((self.curve[-1][0] if self.curve else 0) + self.every, self.iterations)

    def evaluate(self) -> None:
        """Measure the accuracy: on all test images at the end, before that on the first 2,000."""
        begin = perf_counter()
        test = self.data.test
        if self.iteration < self.iterations:
            test = Images(test.pixels[:_ON_THE_WAY], test.labels[:_ON_THE_WAY])
        value = accuracy(self.model, test, self.data.mean)
        self.curve.append((self.iteration, value))
        if self.is_done:
            # The graph keeps the run alive, and with the run its copy of the images.
            self._graph = None
        self.evaluation_s += perf_counter() - begin

    def synchronize(self) -> None:
        """Wait until the device has finished all launched work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for :meth:`load_state_dict`, which continues the run exactly."""
        return {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.batches.position,
            "random": torch.get_rng_state(),
            "iteration": self.iteration,
            "curve": self.curve,
            "training_s": self.training_s,
            "evaluation_s": self.evaluation_s,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: if the checkpoint belongs to another run.
        """
        check_settings(self.settings, state["settings"], "the checkpoint")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.position = state["position"]
        torch.set_rng_state(state["random"])
        self.iteration, self.curve = state["iteration"], list(state["curve"])
        self.training_s, self.evaluation_s = state["training_s"], state["evaluation_s"]

    def result(self) -> dict[str, Any]:
        """Return a finished run as an entry of the results."""
        weights = list(self.model.state_dict().values())
        return {
            **self.settings,
            "table": self.row.table,
            "published": self.row.published,
            "published_iterations": self.row.iterations,
            "cycles": self.optimizer.schedule.cycle(self.iterations),
            "accuracy": self.curve[-1][1],
            "curve": self.curve,
            "finite": all(bool(w.isfinite().all()) for w in weights),
            "weights": digest(weights),
            "training_s": round(self.training_s, 2),
            "evaluation_s": round(self.evaluation_s, 2),
            "iterations_per_s": round(self.iterations / self.training_s, 2),
        }


def check_settings(wanted: Mapping[str, Any], found: Mapping[str, Any], source: str) -> None:
    """Refuse results or a checkpoint that other options made.

    Raises:
        ValueError: naming ``source`` and the setting that differs.
    """
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ValueError(
                f"{source} has {key} {found.get(key)!r}, and this run {value!r}: repeat the "
                "options of the first run, or give another folder with --out"
            )
