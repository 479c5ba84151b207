"""The tasks, the optimizers and the training loop of the demo and the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from clr_optim import CyclicalOptimizer
from clr_optim.bench.workloads import RULES, Rule
from clr_optim.checks import check_bounds, check_number
from clr_optim.range_test import DEFAULT_RANGE, DEFAULT_STEPS, RangeTest, lr_range_test
from clr_optim.schedule import Schedule

__all__ = [
    "OPTIMIZERS",
    "Digits",
    "Plan",
    "Run",
    "Task",
    "accuracy",
    "build_network",
    "build_optimizer",
    "cifar10_task",
    "digits_task",
    "load_digits",
    "search_bounds",
    "split_digits",
    "train",
]

_Params = list[dict[str, Any]]

#: Update rules of :data:`~clr_optim.bench.workloads.RULES` that share a class with another rule.
_SETTINGS = ("sgd", "rmsprop_full")


def _constructor(rule: Rule) -> Callable[[_Params, float], torch.optim.Optimizer]:
    def make(params: _Params, lr: float) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = rule.optimizer(params, lr=lr, **rule.settings)
        return optimizer

    return make


#: Constructors by torch's names. Settings are torch's defaults, except for SGD's momentum.
OPTIMIZERS: dict[str, Callable[[_Params, float], torch.optim.Optimizer]] = {
    rule.optimizer.__name__: _constructor(rule)
    for name, rule in RULES.items()
    if name not in _SETTINGS
}

_TRAIN_PER_DIGIT = 120


class Loader(Protocol):
    """Batches of (inputs, labels); each iteration over the loader is one epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Args:
        summary: a line on data and network.
        batches: the training data.
        build: makes a new network, with first weights from torch's global generator.
        groups: returns the network's parameters as an optimizer's groups, without rates.
        accuracy: measures the accuracy on the test images, in percent.
    """

    summary: str
    batches: Loader
    build: Callable[[], nn.Module]
    groups: Callable[[nn.Module], _Params]
    accuracy: Callable[[nn.Module], float]


@dataclass(frozen=True)
class Digits:
    """Images, float32 of shape (n, 1, 8, 8) in [0, 1], and their labels, int64 of shape (n,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Plan:
    """The length of a training in the paper's terms.

    The paper advises a step size of 2 to 10 epochs.
    """

    cycles: int = 4
    epochs_per_step_size: int = 4
    iterations_per_epoch: int = 24
    evaluations_per_cycle: int = 8
    left_at_end: float = 0.1  # of exp_range's amplitude

    @property
    def step_size(self) -> int:
        """Iterations of half a cycle."""
        return self.epochs_per_step_size * self.iterations_per_epoch

    @property
    def iterations(self) -> int:
        """Iterations of a run, which ends with a whole cycle."""
        return self.cycles * 2 * self.step_size

    @property
    def evaluate_every(self) -> int:
        """Iterations between two evaluations. Every cycle ends with an evaluation."""
        return max(1, 2 * self.step_size // self.evaluations_per_cycle)

    @property
    def cycle_ends(self) -> list[int]:
        """The iterations at which a cycle ends."""
        return [2 * self.step_size * (i + 1) for i in range(self.cycles)]

    @property
    def gamma(self) -> float:
        """The decay of exp_range per iteration. (The paper's 0.99994 suits 70,000 iterations.)"""
        return float(self.left_at_end ** (1 / self.iterations))


@dataclass
class Run:
    """The measurements of one training run.

    Per iteration: ``rates``, the learning rate; ``losses``, the batch's loss before the step;
    ``step_seconds``, the time of ``step()``. Every ``evaluate_every`` iterations: ``accuracies``,
    in percent on the test images.
    """

    evaluate_every: int = 0
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    @property
    def evaluated(self) -> list[int]:
        """The iterations before each of the accuracies."""
        return [self.evaluate_every * (i + 1) for i in range(len(self.accuracies))]


def load_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Load the package's 1,797 handwritten digits.

    Returns:
        Images, uint8 of shape (1797, 8, 8) with values 0 to 16, and labels, uint8 of shape (1797,).

    Source: E. Alpaydin, C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine
    Learning Repository, https://doi.org/10.24432/C50P49 (CC BY 4.0).
    """
    path = resources.files("clr_optim.demo") / "digits.npz"
    with path.open("rb") as file, np.load(file) as data:
        return data["images"], data["labels"]


def split_digits() -> tuple[Digits, Digits]:
    """Return 1,200 images to train on and 597 to test with, the same ones each time.

    The first 120 images of each digit are for training, in the file's order. The order is not
    shuffled, so that the task stays hard enough for a network to make errors.
    """
    pixels, digits = load_digits()
    images = torch.from_numpy(pixels).to(torch.float32).div(16).unsqueeze(1)
    labels = torch.from_numpy(digits).to(torch.int64)
    training = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        training[torch.nonzero(labels == digit).flatten()[:_TRAIN_PER_DIGIT]] = True
    return Digits(images[training], labels[training]), Digits(images[~training], labels[~training])


def build_network() -> nn.Module:
    """Build a convolutional network from (n, 1, 8, 8) to (n, 10), with 6,090 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Return the share of ``data`` that ``model`` classifies correctly, in percent."""
    right = int((model(data.images).argmax(dim=1) == data.labels).sum())
    return 100.0 * right / len(data.labels)


class _Shuffled:
    """The digits in batches, in a new order each epoch, from torch's global generator."""

    def __init__(self, data: Digits, batch_size: int) -> None:
        self._data = data
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._data.labels) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        labels = self._data.labels
        order = torch.randperm(len(labels)).to(labels.device)
        for rows in torch.split(order, self._batch_size):
            yield self._data.images[rows], labels[rows]


def digits_task(batch_size: int = 50, device: torch.device | str = "cpu") -> Task:
    """Return the task of the embedded digits and :func:`build_network`."""
    training, test = (Digits(d.images.to(device), d.labels.to(device)) for d in split_digits())
    if not 1 <= batch_size <= len(training.labels):
        raise ValueError(
            f"batch_size must be from 1 to {len(training.labels)}, the number of training images, "
            f"got {batch_size!r}"
        )

    return Task(
        summary=f"{len(training.labels):,} images of digits to train on, {len(test.labels)} to "
        f"test with; a network of {sum(p.numel() for p in build_network().parameters()):,} "
        "parameters",
        batches=_Shuffled(training, batch_size),
        build=lambda: build_network().to(device),
        groups=lambda model: [{"params": list(model.parameters())}],
        accuracy=lambda model: accuracy(model, test),
    )


def cifar10_task(
    folder: str | Path, batch_size: int = 100, device: torch.device | str = "cpu"
) -> Task:
    """Return the task of CIFAR-10 and the paper's network, Caffe's ``cifar10_full``.

    The weight decay is the paper's. Biases have the rate of the weights, since there is one pair of
    bounds; in Caffe biases have twice that rate. The order of the images is that of seed 0 and the
    same in each epoch, as in Caffe.

    Args:
        folder: of the binary version, see :func:`~clr_optim.bench.cifar10.read_cifar10`.
        batch_size: 100 in the paper.
        device: of images and network.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing or no CIFAR-10.
    """
    from clr_optim.bench import cifar10

    training, test = (images.to(device) for images in cifar10.read_cifar10(folder))
    mean = cifar10.mean_image(training)

    def groups(model: nn.Module) -> _Params:
        return [
            {key: value for key, value in group.items() if key != "lr"}
            for group in cifar10.parameter_groups(model)
        ]

    return Task(
        summary=f"{len(training):,} images of CIFAR-10 to train on, {len(test):,} to test with; "
        "Caffe's cifar10_full, 89,578 parameters",
        batches=cifar10.Batches(training, mean, batch_size=batch_size, device=device),
        build=lambda: cifar10.cifar10_full().to(device),
        groups=groups,
        accuracy=lambda model: cifar10.accuracy(model, test, mean),
    )


def build_optimizer(
    name: str,
    policy: str | Schedule,
    task: Task,
    model: nn.Module,
    *,
    base_lr: float,
    max_lr: float,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build the optimizer ``name`` with a policy that cycles between the bounds.

    ``"fixed"`` is torch's own optimizer at the geometric mean of the bounds, the best guess at a
    single rate.

    Raises:
        TypeError, ValueError: if a bound is no finite number >= 0, or base_lr is above max_lr.
    """
    if policy == "fixed":
        base_lr, max_lr = check_number("base_lr", base_lr), check_number("max_lr", max_lr)
        check_bounds(base_lr, max_lr)
        return OPTIMIZERS[name](task.groups(model), (base_lr * max_lr) ** 0.5)
    optimizer = OPTIMIZERS[name](task.groups(model), max_lr)
    # The only line that clr_optim adds:
    return CyclicalOptimizer(optimizer, policy, base_lr=base_lr, max_lr=max_lr, **options)


def search_bounds(
    task: Task,
    name: str,
    *,
    seed: int = 0,
    start_lr: float = DEFAULT_RANGE[0],
    end_lr: float = DEFAULT_RANGE[1],
    num_steps: int = DEFAULT_STEPS,
    **options: Any,
) -> RangeTest:
    """Run the LR range test of an optimizer, from rates far too small to rates far too large.

    Args:
        task: the network and its data.
        name: a key of :data:`OPTIMIZERS`.
        seed: for torch's global generator.
        start_lr, end_lr, num_steps, options: as in :func:`~clr_optim.lr_range_test`.
    """
    torch.manual_seed(seed)
    model = task.build()
    return lr_range_test(
        model,
        OPTIMIZERS[name](task.groups(model), end_lr),
        task.batches,
        functional.cross_entropy,
        start_lr=start_lr,
        end_lr=end_lr,
        num_steps=num_steps,
        **{"mode": "exponential", **options},
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    iterations: int,
    run: Run,
    on_iteration: Callable[[], object] = lambda: None,
) -> None:
    """Train and measure.

    Args:
        model: the network to train, from ``task.build``.
        optimizer: of the model's parameters, cyclical or not.
        task: the model's task.
        iterations: the number of iterations.
        run: receives each measurement at once, so that an interruption loses none.
        on_iteration: called after each iteration.
    """
    for inputs, labels in _endless(task.batches, iterations):
        run.rates.append(float(optimizer.param_groups[0]["lr"]))  # the rate of this step

        loss = functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        start = perf_counter()
        optimizer.step()  # there is no scheduler: the step advances the cycle
        run.step_seconds.append(perf_counter() - start)

        run.losses.append(float(loss.detach()))
        if len(run.losses) % run.evaluate_every == 0:
            run.accuracies.append(task.accuracy(model))
        on_iteration()


def _endless(batches: Loader, iterations: int) -> Iterator[tuple[Tensor, Tensor]]:
    left = iterations
    while left:
        for batch in batches:
            yield batch
            left -= 1
            if not left:
                return
