"""One run."""

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
_ON_THE_WAY = 2_000  # test images


#: Iterations before the one that is captured into a graph.
WARM_UP = 3


class Run:
    """A row at one seed: model, optimizer, batches, and what was measured so far.

    The seed decides the weights and the order of the images; the same one means the same of both
    for every row.

    Args:
        row: what to train.
        seed: as above.
        scale: of lengths and step sizes.
        data: to train on and to test with.
        device: where.
        caffe: whether SGD has the rate inside the momentum buffer, as Caffe.
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
        #: whether Triton's kernels serve, so that a graph can be captured
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
        #: ``(iterations, accuracy in percent after so many)``
        self.curve: list[tuple[int, float]] = []
        self.training_s = self.evaluation_s = 0.0
        self._graph: Callable[[], object] | None = None
        self._stream = None
        if self.device.type == "cuda":
            self._stream = Gpu().stream()
            self._stream.wait_stream(torch.cuda.current_stream())

    def apart(self) -> AbstractContextManager[object]:
        """On a GPU the run's own stream, on which all of it happens: others may be beside it."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @property
    def is_done(self) -> bool:
        """Whether the last iteration has been, and its accuracy measured."""
        return bool(self.curve) and self.curve[-1][0] == self.iterations

    def _one(self) -> None:
        inputs, labels = self.batches.sample()
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def capture(self) -> None:
        """Make the iteration a graph, after a few that are taken as all others."""
        # Positions of batches and cycle lie on the device: the host only counts.
        self._graph = Gpu().capture(self._one, warm_up=WARM_UP)
        self.iteration += WARM_UP

    def iterate(self) -> None:
        """One iteration: a batch, forward, backward, a step."""
        (self._graph or self._one)()
        self.iteration += 1

    @property
    def next_evaluation(self) -> int:
        """The iteration after which accuracy is measured: at equal distances, and at the end."""
        return min((self.curve[-1][0] if self.curve else 0) + self.every, self.iterations)

    def evaluate(self) -> None:
        """Measure the accuracy: at the end on all test images, before on the first 2,000."""
        begin = perf_counter()
        test = self.data.test
        if self.iteration < self.iterations:
            test = Images(test.pixels[:_ON_THE_WAY], test.labels[:_ON_THE_WAY])
        value = accuracy(self.model, test, self.data.mean)
        self.curve.append((self.iteration, value))
        if self.is_done:  # a run that its graph keeps alive would keep its copy of the images
            self._graph = None
        self.evaluation_s += perf_counter() - begin

    def synchronize(self) -> None:
        """Wait until the device has done all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on as if nothing had been."""
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
        """Go on from a checkpoint.

        Raises:
            ValueError: if it is another run's.
        """
        check_settings(self.settings, state["settings"], "the checkpoint")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.position = state["position"]
        torch.set_rng_state(state["random"])
        self.iteration, self.curve = state["iteration"], list(state["curve"])
        self.training_s, self.evaluation_s = state["training_s"], state["evaluation_s"]

    def result(self) -> dict[str, Any]:
        """A finished run as a line of the results."""
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


def check_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any], whose: str) -> None:
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise ValueError(
                f"{whose} has {key} {theirs.get(key)!r}, and this run {value!r}: give the options "
                "that it was made with, or another folder with --out"
            )
