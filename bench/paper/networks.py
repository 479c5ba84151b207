"""The networks of the rows: Caffe's ``cifar10_full``, and its relative with sigmoids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clr_optim.bench.cifar10 import RATE_RATIOS, Batches, cifar10_full, parameter_groups
from clr_optim.bench.paper.data import Data

__all__ = [
    "FULL",
    "SIGMOID",
    "SIGMOID_RATIOS",
    "Network",
    "batch_statistics",
    "cifar10_sigmoid",
    "sigmoid_groups",
]

#: The learning rates of the groups of :func:`sigmoid_groups`, as multiples of the network's.
SIGMOID_RATIOS = (1.0, 2.0, 0.2)

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Network:
    """A network, with its training settings.

    Args:
        name: as in its source.
        build: makes the network from a seed.
        groups: returns the parameter groups of a network for a rate.
        ratios: the rates of the groups, as multiples of the network's rate.
        batch_size: images per batch.
        test_batch: test images per batch that are normalized by their own statistics; ``None`` for
            a network without batch normalization.
    """

    name: str
    build: Callable[[int], nn.Module]
    groups: Callable[[nn.Module, float], Groups]
    ratios: tuple[float, ...]
    batch_size: int
    test_batch: int | None = None

    def batch_size_on(self, data: Data) -> int:
        """Return the images per batch of a run: the data decide, for the networks of Caffe."""
        return data.batch_size

    def batches(self, data: Data, seed: int, device: torch.device) -> Batches:
        """Make the batches of a run."""
        return Batches(
            data.training,
            data.mean,
            batch_size=self.batch_size_on(data),
            seed=seed,
            device=device,
        )


def cifar10_sigmoid(seed: int | None = None) -> nn.Module:
    """Build Caffe's sigmoid network with batch normalization, from (n, 3, 32, 32) to (n, 10).

    Weights are normal with the standard deviations 1e-4, 0.01, 0.01 and 0.01; biases are 0. The
    normalization begins with scale 1 and shift 0.001, and adds 1e-9 to variances. The memory layout
    is channels last, which halves the time on a CPU.

    Args:
        seed: of the weights; ``None`` draws from torch's global generator.

    Source: Caffe's ``cifar10_full_sigmoid_train_test_bn.prototxt`` and ``bn_layer.cpp``.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 32, kernel_size=5, padding=2),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.BatchNorm2d(32, eps=1e-9),
        nn.Sigmoid(),
        nn.Conv2d(32, 32, kernel_size=5, padding=2),
        nn.BatchNorm2d(32, eps=1e-9),
        nn.Sigmoid(),
        nn.AvgPool2d(3, stride=2, ceil_mode=True),
        nn.Conv2d(32, 64, kernel_size=5, padding=2),
        nn.BatchNorm2d(64, eps=1e-9),
        nn.Sigmoid(),
        nn.AvgPool2d(3, stride=2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, std in zip(_layers(model), (1e-4, 0.01, 0.01, 0.01), strict=True):
            layer.weight.normal_(0.0, std, generator=generator)
            layer.bias.zero_()
        for norm in _norms(model):
            norm.bias.fill_(0.001)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def sigmoid_groups(model: nn.Module, lr: float = 0.001) -> Groups:
    """Return the parameters of :func:`cifar10_sigmoid` as groups with Caffe's rates.

    The biases of the first two convolutions have twice the rate, and the bias of the linear layer
    has a fifth. No parameter has weight decay: in Caffe's solver its line is a comment. The rates
    of the groups are ``lr`` times :data:`SIGMOID_RATIOS`. Multiply bounds in the same way, one per
    group.

    Args:
        model: from :func:`cifar10_sigmoid`.
        lr: learning rate.

    Source: Caffe's ``cifar10_full_sigmoid_train_test_bn.prototxt`` and
    ``cifar10_full_sigmoid_solver_bn.prototxt``.
    """
    conv1, conv2, _, linear = _layers(model)
    fast, slow = [conv1.bias, conv2.bias], [linear.bias]
    others = {id(bias) for bias in (*fast, *slow)}
    plain = [param for param in model.parameters() if id(param) not in others]
    return [
        {"params": params, "lr": lr * ratio}
        for params, ratio in zip((plain, fast, slow), SIGMOID_RATIOS, strict=True)
    ]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Normalize each batch by its statistics in eval mode too, as Caffe's layer does.

    Source: Caffe's ``bn_layer.cpp``, which has no running averages.
    """
    kept = [(norm, norm.running_mean, norm.running_var) for norm in _norms(model)]
    for norm, _, _ in kept:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, mean, variance in kept:
            norm.running_mean, norm.running_var = mean, variance


FULL = Network("cifar10_full", cifar10_full, parameter_groups, RATE_RATIOS, 100)
SIGMOID = Network(
    "cifar10_full_sigmoid_bn", cifar10_sigmoid, sigmoid_groups, SIGMOID_RATIOS, 111, 1_000
)
