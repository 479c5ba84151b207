"""Residual networks, residual networks with stochastic depth, and DenseNets, for 32×32 images.

Inputs are float32 of shape (n, 3, 32, 32), in [0, 255] before the mean was subtracted. The networks
divide them by the standard deviation of each colour. No convolution has a bias, since batch
normalization follows or precedes each. The memory layout is channels last.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clr_optim.bench.paper.noise import GATES, draw

__all__ = ["DenseNet", "ResNet", "densenet", "resnet", "stochastic_resnet"]

#: Standard deviations of red, green and blue over CIFAR-10's training images. Those of CIFAR-100
#: are 5 to 8 % larger, and batch normalization makes up for that.
_DEVIATIONS = (63.0, 62.1, 66.7)
_WIDTHS = (16, 32, 64)
#: the paper's p_L
_LAST_SURVIVAL = 0.5


class _Scaled(nn.Module):
    """Divide each colour by its standard deviation.

    Source: fb.resnet.torch and DenseNet, ``datasets/cifar10.lua``.
    """

    factors: Tensor

    def __init__(self) -> None:
        super().__init__()
        factors = 1.0 / torch.tensor(_DEVIATIONS)
        self.register_buffer("factors", factors[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class _Block(nn.Module):
    """A basic block: two convolutions beside a shortcut without parameters (type A).

    Args:
        inputs: channels of the input.
        outputs: channels of the output; the shortcut fills up with zeros.
        stride: of the first convolution.
        averages: whether the shortcut averages over ``stride`` by ``stride`` pixels, as in
            Stochastic_Depth. Otherwise the shortcut takes one of them, as in fb.resnet.torch.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, averages: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _convolution(inputs, outputs, stride=stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            _convolution(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self._missing, self._stride, self._averages = outputs - inputs, stride, averages

    def forward(self, x: Tensor, factor: Tensor | float | None = None) -> Tensor:
        """Add the branch, times ``factor`` if given, to the shortcut."""
        branch = self.branch(x)
        if factor is not None:
            branch = branch * factor
        if self._stride > 1:
            step = self._stride
            x = functional.avg_pool2d(x, step) if self._averages else x[:, :, ::step, ::step]
        if self._missing:
            x = functional.pad(x, [0, 0, 0, 0, 0, self._missing])
        return functional.relu(branch + x)


class ResNet(nn.Module):
    """A residual network of basic blocks, with or without stochastic depth.

    A first convolution, three groups of blocks with 16, 32 and 64 channels, the mean over all
    pixels, and a linear layer. The first block of the second and of the third group halves the
    image.

    With stochastic depth, block ``l`` of ``L`` survives a training iteration with the probability
    ``1 − l/L·(1 − last_survival)``, one draw for the whole batch. In tests each branch has this
    probability as factor. In training a dropped branch has the factor 0: its gradients are zeros,
    so that momentum and weight decay go on, as in the original. Its batch normalization still
    updates its running averages, which the original skips. A graph cannot leave out a branch, so
    that stochastic depth saves no time here.

    Args:
        depth: 6n + 2 layers with weights, n >= 1.
        classes: how many.
        last_survival: the survival probability of the last block; ``None`` without stochastic
            depth.
        seed: of the draws.

    Sources: K. He and others, *Deep Residual Learning for Image Recognition*, arXiv 1512.03385,
    section 4.2; fb.resnet.torch, ``models/resnet.lua``; G. Huang and others, *Deep Networks with
    Stochastic Depth*, arXiv 1603.09382, section 3; Stochastic_Depth, ``ResidualDrop.lua``.
    """

    draws: Tensor
    _bounds: Tensor

    def __init__(
        self, depth: int, classes: int, last_survival: float | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        count, rest = divmod(depth - 2, 6)
        if rest or count < 1:
            raise ValueError(f"depth must be 6n + 2 with n >= 1, as 20 or 56, got {depth!r}")
        first = _WIDTHS[0]
        self.first = nn.Sequential(
            _Scaled(), _convolution(3, first), nn.BatchNorm2d(first), nn.ReLU(inplace=True)
        )
        averages = last_survival is not None
        self.blocks = nn.ModuleList()
        inputs = first
        for width in _WIDTHS:
            for _ in range(count):
                stride = 2 if width > inputs else 1
                self.blocks.append(_Block(inputs, width, stride, averages))
                inputs = width
        self.last = nn.Linear(inputs, classes)
        self._seed = seed
        total = len(self.blocks)
        #: survival probability of each block; empty without stochastic depth
        self.survival = (
            [1.0 - block / total * (1.0 - last_survival) for block in range(1, total + 1)]
            if last_survival is not None
            else []
        )
        if self.survival:
            # The number of the next draw is on the device, so that a graph counts it up.
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
            bounds = torch.tensor([round(each * 2**32) for each in self.survival])
            self.register_buffer("_bounds", bounds, persistent=False)

    def gates(self) -> Tensor:
        """Draw the gates of the next training iteration: 1.0 for each block that survives."""
        counts = self.draws + torch.arange(len(self.survival), device=self.draws.device)
        self.draws += len(self.survival)
        return (draw(self._seed, GATES, counts) < self._bounds).to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images of shape (n, 3, height, width); return (n, classes)."""
        x = self.first(x)
        factors: list[float] | Tensor = self.survival
        if self.survival and self.training:
            factors = self.gates()
        for number, block in enumerate(self.blocks):
            x = block(x, factors[number]) if self.survival else block(x)
        return self.last(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class DenseNet(nn.Module):
    """A DenseNet without bottlenecks and compression: three blocks, each layer sees all before it.

    A first convolution to 16 channels; three blocks of ``(depth − 4) / 3`` layers, each a batch
    normalization, a ReLU and a convolution to ``growth`` new channels; between blocks a convolution
    of 1×1 and the mean over 2×2 pixels; the mean over all pixels, and a linear layer. With
    augmentation the original has no dropout.

    Args:
        depth: 3n + 4 layers with weights, n >= 1.
        growth: new channels per layer.
        classes: how many.

    Sources: G. Huang and others, *Densely Connected Convolutional Networks*, arXiv 1608.06993,
    section 3; DenseNet (Torch 7), ``models/densenet.lua`` with ``-bottleneck false -reduction 1``.
    Its first convolution has ``2·growth`` channels, as the paper has with bottlenecks only.
    """

    def __init__(self, depth: int, growth: int, classes: int) -> None:
        super().__init__()
        count, rest = divmod(depth - 4, 3)
        if rest or count < 1:
            raise ValueError(f"depth must be 3n + 4 with n >= 1, as 40, got {depth!r}")
        channels = _WIDTHS[0]
        self.first = nn.Sequential(_Scaled(), _convolution(3, channels))
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for number in range(3):
            if number:
                self.transitions.append(
                    nn.Sequential(*_norm(channels), _convolution(channels, channels, size=1),
                                  nn.AvgPool2d(2))
                )  # fmt: skip
            layers = nn.ModuleList()
            for _ in range(count):
                layers.append(nn.Sequential(*_norm(channels), _convolution(channels, growth)))
                channels += growth
            self.blocks.append(layers)
        self.norm = nn.Sequential(*_norm(channels))
        self.last = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images of shape (n, 3, height, width); return (n, classes)."""
        x = self.first(x)
        for number, layers in enumerate(self.blocks):
            if number:
                x = self.transitions[number - 1](x)
            for layer in layers:  # type: ignore[attr-defined]
                x = torch.cat([x, layer(x)], dim=1)
        return self.last(self.norm(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def _norm(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.ReLU(inplace=True)


def resnet(depth: int, classes: int = 10, seed: int = 0) -> nn.Module:
    """Build a residual network, with the first weights of fb.resnet.torch.

    Weights of convolutions are normal with the variance 2 / (outputs·size²). Batch normalization
    begins with scale 1 and shift 0. The linear layer has torch's uniform weights, and bias 0.

    Args:
        depth, classes: as for :class:`ResNet`.
        seed: of the weights.

    Source: fb.resnet.torch, ``models/resnet.lua``.
    """
    return _begun(ResNet(depth, classes), seed, "fan_out")


def stochastic_resnet(depth: int, classes: int = 10, seed: int = 0) -> nn.Module:
    """Build a residual network with stochastic depth, whose last block survives half of the time.

    Weights of convolutions are normal with the variance 2 / (inputs·size²). The rest begins as in
    :func:`resnet`.

    Args:
        depth, classes: as for :class:`ResNet`.
        seed: of weights and draws.

    Source: Stochastic_Depth, ``main.lua`` and ``ResidualDrop.lua``, with ``-deathRate 0.5``.
    """
    return _begun(ResNet(depth, classes, _LAST_SURVIVAL, seed), seed, "fan_in")


def densenet(depth: int, growth: int = 12, classes: int = 10, seed: int = 0) -> nn.Module:
    """Build a DenseNet, whose first weights are as in :func:`resnet`.

    Args:
        depth, growth, classes: as for :class:`DenseNet`.
        seed: of the weights.

    Source: DenseNet (Torch 7), ``models/densenet.lua``.
    """
    return _begun(DenseNet(depth, growth, classes), seed, "fan_out")


def _begun(model: nn.Module, seed: int, fan: Literal["fan_in", "fan_out"]) -> nn.Module:
    """Fill in the first weights; return the model with channels last."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(
                layer.weight, mode=fan, nonlinearity="relu", generator=generator
            )
        elif isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
