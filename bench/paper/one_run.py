"""One run: a row of the tables at one seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch.nn import functional

from clr_optim import CyclicalOptimizer
from clr_optim.bench.cifar10 import Images, accuracy
from clr_optim.bench.gpu import Gpu
from clr_optim.bench.paper.data import Data, digest
from clr_optim.bench.paper.found_bounds import find_bounds
from clr_optim.bench.paper.networks import batch_statistics
from clr_optim.bench.paper.optimizers import CAFFE_RULES, RULES, CaffeSGD
from clr_optim.bench.paper.rows import Row, Scale

__all__ = ["WARM_UP", "Run", "check_settings", "row_settings"]

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
        self.model = row.network.build(seed).to(self.device)
        self._inner = rules[row.rule](row.network.groups(self.model, max(row.bounds or (1.0,))))
        self._schedule = row.schedule(scale)
        #: whether Triton's kernels serve the row, so that a graph can capture the iteration
        self.on_kernels = self.device.type == "cuda" and not isinstance(self._inner, CaffeSGD)
        #: the range test of a row without bounds, see :func:`find_bounds`
        self.range_test: dict[str, Any] | None = None
        self.optimizer: Any = None
        if row.bounds is not None:
            self._wrap(row.bounds)
        self.batches = row.network.batches(data, seed, self.device)
        self.settings = {
            "row": row.name,
            "seed": seed,
            "scale": str(scale.factor),
            **row_settings(row, scale),
            "optimizer": type(self._inner).__name__,
            "momentum": "caffe" if caffe else "torch",
            "batch_size": self.batches.batch_size,
            "training_images": self.batches.images,
            "test_images": len(data.test),
            "data": data.digest,
            "device": self.device.type,
        }
        self.every = math.ceil(self.iterations / row.evaluations)
        #: iterations before an accuracy on all test images
        self.milestones = [self.iterations]
        if row.quarters:
            self.milestones = [self.iterations * k // 4 for k in (1, 2, 3, 4)]
        self.iteration = 0
        #: the accuracies so far, as ``(iterations, percent)``
        self.curve: list[tuple[int, float]] = []
        #: the same at milestones, where running averages normalize, as in torch
        self.by_averages: list[tuple[int, float]] = []
        self.training_s = self.evaluation_s = 0.0
        self._graph: Callable[[], object] | None = None
        self._stream = None
        if self.device.type == "cuda":
            self._stream = Gpu().stream()
            self._stream.wait_stream(torch.cuda.current_stream())

    def _wrap(self, bounds: Sequence[float]) -> None:
        base_lr, max_lr = ([lr * ratio for ratio in self.row.network.ratios] for lr in bounds)
        self.optimizer = CyclicalOptimizer(
            self._inner,
            self._schedule,
            base_lr=base_lr if self._schedule.reads_base_lr else None,
            max_lr=max_lr,
            backend="triton" if self.on_kernels else "auto",
        )

    def prepare(self) -> None:
        """Find the bounds by a range test, if the row has none. Call this before training.

        Raises:
            ValueError: naming row and seed, if the test finds none.
        """
        if self.optimizer is None:
            try:
                self.range_test = find_bounds(self.model, self._inner, self.batches)
            except ValueError as error:
                raise ValueError(
                    f"row {self.row.name}, seed {self.seed}: its range test found no bounds: "
                    f"{error}; leave the row out with --rows, and add --resume"
                ) from error
            self._wrap(self.range_test["bounds"])

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

    @property
    def can_capture(self) -> bool:
        """Whether the iteration is to be captured now: by kernels, and before an evaluation."""
        is_far = self.next_evaluation - self.iteration >= WARM_UP
        return self.on_kernels and self._graph is None and is_far and not self.is_done

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
        """The iteration before the next accuracy: at equal distances, and at milestones."""
        last = self.curve[-1][0] if self.curve else 0
        return min([last + self.every, *(at for at in self.milestones if at > last)])

    def evaluate(self) -> None:
        """Measure the accuracy: at milestones on all test images, else on the first 2,000."""
        begin = perf_counter()
        test = self.data.test
        if self.iteration not in self.milestones:
            test = Images(test.pixels[:_ON_THE_WAY], test.labels[:_ON_THE_WAY])
        if self.row.network.test_batch is None:
            value = accuracy(self.model, test, self.data.mean)
        else:
            with batch_statistics(self.model):
                value = accuracy(self.model, test, self.data.mean, self.row.network.test_batch)
            if self.iteration in self.milestones:
                by_averages = accuracy(self.model, test, self.data.mean)
                self.by_averages.append((self.iteration, by_averages))
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
            "range_test": self.range_test,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.batches.position,
            "random": torch.get_rng_state(),
            "iteration": self.iteration,
            "curve": self.curve,
            "by_averages": self.by_averages,
            "training_s": self.training_s,
            "evaluation_s": self.evaluation_s,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: if the checkpoint belongs to another run.
        """
        check_settings(self.settings, state["settings"], "the checkpoint")
        self.range_test = state.get("range_test")  # missing in files of earlier versions
        if self.range_test is not None:
            self._wrap(self.range_test["bounds"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.position = state["position"]
        torch.set_rng_state(state["random"])
        self.iteration, self.curve = state["iteration"], list(state["curve"])
        self.by_averages = list(state.get("by_averages", ()))
        self.training_s, self.evaluation_s = state["training_s"], state["evaluation_s"]

    def result(self) -> dict[str, Any]:
        """Return a finished run as an entry of the results."""
        weights = list(self.model.state_dict().values())
        return {
            **self.settings,
            "network": self.row.network.name,
            "range_test": self.range_test,
            "table": self.row.table,
            "published": self.row.published,
            "published_iterations": self.row.iterations,
            "cycles": self.optimizer.schedule.cycle(self.iterations),
            "accuracy": self.curve[-1][1],
            "curve": self.curve,
            "by_averages": self.by_averages,
            "finite": all(bool(w.isfinite().all()) for w in weights),
            "weights": digest(weights),
            "training_s": round(self.training_s, 2),
            "evaluation_s": round(self.evaluation_s, 2),
            "iterations_per_s": round(self.iterations / self.training_s, 2),
        }


def row_settings(row: Row, scale: Scale) -> dict[str, Any]:
    """Return a row's length, bounds and schedule at a scale, as results keep them."""
    return {
        "iterations": scale.steps(row.iterations),
        "bounds": None if row.bounds is None else list(row.bounds),
        "schedule": row.schedule(scale).to_dict(),
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
