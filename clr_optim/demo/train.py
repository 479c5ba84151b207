"""One training run of the demo: the digits, a small network, the optimizer, the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from clr_optim import CyclicalOptimizer

__all__ = [
    "OPTIMIZERS",
    "POLICIES",
    "Digits",
    "Plan",
    "Run",
    "build_network",
    "build_optimizer",
    "load_digits",
    "split_digits",
    "train",
]

POLICIES = ("fixed", "triangular", "triangular2", "exp_range")

# The paper's guidelines: the top of the cycle is where accuracy stops rising in a range test (8
# epochs, the rate growing in a straight line from 0: it rises until about 0.2 with SGD and 0.02
# with Adam, and hardly beyond); the bottom is the library's default, a quarter of the top.
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.02),
}

_TRAIN_PER_DIGIT = 120


@dataclass(frozen=True)
class Digits:
    """Images, float32 of shape (n, 1, 8, 8) in [0, 1], and their labels, int64 of shape (n,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Plan:
    """How long to train, in the paper's terms: it advises a step size of 2 to 10 epochs."""

    cycles: int = 4
    epochs_per_step_size: int = 4
    batch_size: int = 50
    evaluations_per_cycle: int = 8
    left_at_end: float = 0.1  # of exp_range's amplitude

    @property
    def iterations_per_epoch(self) -> int:
        """Batches in the training images."""
        return -(-10 * _TRAIN_PER_DIGIT // self.batch_size)

    @property
    def step_size(self) -> int:
        """Iterations of half a cycle."""
        return self.epochs_per_step_size * self.iterations_per_epoch

    @property
    def epochs(self) -> int:
        """Length of a run in epochs: it stops at the end of a cycle."""
        return self.cycles * 2 * self.epochs_per_step_size

    @property
    def iterations(self) -> int:
        """Length of a run in iterations."""
        return self.epochs * self.iterations_per_epoch

    @property
    def evaluate_every(self) -> int:
        """Iterations from one evaluation to the next; every cycle ends with one."""
        return 2 * self.step_size // self.evaluations_per_cycle

    @property
    def gamma(self) -> float:
        """exp_range's decay per iteration. The paper's 0.99994 is for runs of 70,000 iterations."""
        return float(self.left_at_end ** (1 / self.iterations))


@dataclass
class Run:
    """What one training run measured.

    ``rates`` has the learning rate of each iteration, ``accuracies`` the test accuracy in percent
    after each ``plan.evaluate_every`` iterations, ``step_seconds`` the time of each ``step()``.
    """

    rates: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


def load_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The 1,797 handwritten digits that come with the package.

    Returns:
        Images, uint8 of shape (1797, 8, 8) with values 0 to 16, and labels, uint8 of shape (1797,).

    Source: E. Alpaydin, C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine
    Learning Repository, https://doi.org/10.24432/C50P49 (CC BY 4.0).
    """
    path = resources.files("clr_optim.demo") / "digits.npz"
    with path.open("rb") as file, np.load(file) as data:
        return data["images"], data["labels"]


def split_digits() -> tuple[Digits, Digits]:
    """The same 1,200 images to train on and 597 to test with each time.

    The first 120 of each digit train, in the file's order and not shuffled: that leaves the network
    something to get wrong.
    """
    pixels, digits = load_digits()
    images = torch.from_numpy(pixels).to(torch.float32).div(16).unsqueeze(1)
    labels = torch.from_numpy(digits).to(torch.int64)
    training = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        training[torch.nonzero(labels == digit).flatten()[:_TRAIN_PER_DIGIT]] = True
    return Digits(images[training], labels[training]), Digits(images[~training], labels[~training])


def build_network() -> nn.Module:
    """A convolutional network from (n, 1, 8, 8) to (n, 10), with 6,090 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def build_optimizer(name: str, policy: str, model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """The optimizer ``name`` for ``model``, cycled by ``policy`` unless that is ``"fixed"``."""
    optimizer = OPTIMIZERS[name](model)
    if policy == "fixed":
        return optimizer
    # The one line that changes:
    return CyclicalOptimizer(optimizer, policy, step_size_up=plan.step_size, gamma=plan.gamma)


def train(
    name: str,
    policy: str,
    seed: int,
    data: tuple[Digits, Digits],
    plan: Plan,
    on_iteration: Callable[[], object] = lambda: None,
) -> Run:
    """Train once and measure.

    Args:
        name: a key of :data:`OPTIMIZERS`.
        policy: one of :data:`POLICIES`.
        seed: of torch's global generator; it decides the first weights and the batches.
        data: training and test images.
        plan: how long, and how large the batches are.
        on_iteration: called after each iteration.
    """
    torch.manual_seed(seed)
    training, test = data
    model = build_network()
    optimizer = build_optimizer(name, policy, model, plan)
    run = Run()
    for images, labels in _batches(training, plan):
        run.rates.append(optimizer.param_groups[0]["lr"])  # what this iteration's step will use

        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        start = perf_counter()
        optimizer.step()  # no scheduler: the cycle moves on in here
        run.step_seconds.append(perf_counter() - start)

        if len(run.rates) % plan.evaluate_every == 0:
            run.accuracies.append(accuracy(model, test))
        on_iteration()
    return run


def _batches(data: Digits, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(plan.epochs):
        for rows in torch.split(torch.randperm(len(data.labels)), plan.batch_size):
            yield data.images[rows], data.labels[rows]


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of ``data`` that ``model`` names right, in percent."""
    right = int((model(data.images).argmax(dim=1) == data.labels).sum())
    return 100.0 * right / len(data.labels)
