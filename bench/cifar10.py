"""Read CIFAR-10 and CIFAR-100, and build the network of the paper's tables, ``cifar10_full``.

Sources: A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009; Caffe's
``examples/cifar10/cifar10_full_train_test.prototxt``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "RATE_RATIOS",
    "Batches",
    "Images",
    "LocalResponseNorm",
    "accuracy",
    "cifar10_full",
    "mean_image",
    "parameter_groups",
    "read_cifar10",
    "read_cifar100",
]

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_CLASSES = 10


@dataclass(frozen=True)
class _Layout:
    """The official files of a data set.

    Args:
        name: of the data set.
        training, test: names of the files.
        classes: how many; the last label byte of a record is from 0 to ``classes - 1``.
        label_bytes: before the pixels of each record.
        expected: the records in words.
    """

    name: str
    training: tuple[str, ...]
    test: str
    classes: int
    label_bytes: int
    expected: str

    @property
    def description(self) -> str:
        """Say what the files are and have."""
        first, last = self.training[0], self.training[-1]
        files = first if first == last else f"{first} to {last}"
        return (
            f'the "{self.name} binary version" of https://www.cs.toronto.edu/~kriz/cifar.html, '
            f"unpacked: {files} and {self.test}, each a row of records of {self.expected} and "
            f"{_PIXELS:,} bytes of pixels"
        )


_CIFAR10 = _Layout(
    "CIFAR-10",
    tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test_batch.bin",
    10,
    1,
    "a label byte from 0 to 9",
)
_CIFAR100 = _Layout(
    "CIFAR-100",
    ("train.bin",),
    "test.bin",
    100,
    2,
    "a byte of the coarse label, a byte of the fine label from 0 to 99",
)

#: The learning rates of the groups of :func:`parameter_groups`, as multiples of the network's.
RATE_RATIOS = (1.0, 2.0, 1.0, 2.0)


@dataclass(frozen=True)
class Images:
    """Images: pixels, uint8 of shape (n, 3, 32, 32), and labels, int64 of shape (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """Return the images on ``device``."""
        return Images(self.pixels.to(device), self.labels.to(device))


def read_cifar10(folder: str | Path) -> tuple[Images, Images]:
    """Read the official binary layout.

    A file may hold any number of records (the official files: 10,000). A record is a label byte,
    then 1,024 bytes each of red, green and blue, row by row.

    Args:
        folder: with ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``.

    Returns:
        Training and test images, in the files' order.

    Raises:
        FileNotFoundError: if files are missing; the message names them.
        ValueError: if a file is empty, cut off or no CIFAR-10.
    """
    return _read(folder, _CIFAR10)


def read_cifar100(folder: str | Path) -> tuple[Images, Images]:
    """Read the official binary layout of CIFAR-100, with its fine labels, 0 to 99.

    A record is a byte of the coarse label, a byte of the fine label, then pixels as in CIFAR-10.

    Args:
        folder: with ``train.bin`` and ``test.bin``.

    Returns:
        Training and test images, in the files' order.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_cifar10`.
    """
    return _read(folder, _CIFAR100)


def _read(folder: str | Path, layout: _Layout) -> tuple[Images, Images]:
    folder = Path(folder)
    missing = [name for name in (*layout.training, layout.test) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: there is no {', '.join(missing)}; expected {layout.description}"
        )
    parts = [_read_file(folder / name, layout) for name in layout.training]
    training = Images(
        torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts])
    )
    return training, _read_file(folder / layout.test, layout)


def _read_file(path: Path, layout: _Layout) -> Images:
    size, record = path.stat().st_size, layout.label_bytes + _PIXELS
    if size == 0 or size % record:
        whole, rest = divmod(size, record)
        raise ValueError(
            f"{path} has {size:,} bytes, {whole:,} records of {record:,} and {rest:,} bytes over: "
            f"the file is cut off, or no {layout.name}; expected {layout.description}"
        )
    records = torch.from_numpy(np.fromfile(path, dtype=np.uint8)).view(-1, record)
    labels = records[:, layout.label_bytes - 1].to(torch.int64)
    wrong = torch.nonzero(labels >= layout.classes).flatten()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{path}: record {first} has the label {int(labels[first])}, and {len(wrong):,} of "
            f"{len(labels):,} labels are above {layout.classes - 1}: no {layout.name}; expected "
            f"{layout.description}"
        )
    return Images(records[:, layout.label_bytes :].reshape(-1, *_SHAPE), labels)


def mean_image(images: Images) -> Tensor:
    """Return the mean over all images, float32 of shape (3, 32, 32) in [0, 255]."""
    # Sums of uint8 are exact in float64: every order of summation gives the same result.
    total = torch.zeros(_SHAPE, dtype=torch.float64, device=images.pixels.device)
    for part in torch.split(images.pixels, 10_000):
        total += part.sum(dim=0, dtype=torch.float64)
    return (total / len(images)).to(torch.float32)


class Batches:
    """Make batches on the device, from uint8 images in its memory: subtract the mean, no more.

    The images have one random order, as in Caffe's database. Batches follow that order again and
    again; a batch that reaches the end continues at the beginning. The number of the next batch is
    a tensor on the device, and :meth:`sample` counts it up. A captured graph therefore samples
    another batch at each replay.

    The object is a loader too: ``len()`` whole batches per epoch. An iteration starts with the
    first batch, and does not use or change the number of the next one.

    Args:
        images: the images to draw from.
        mean: of the training images, see :func:`mean_image`.
        batch_size: images per batch, from 1 to ``len(images)``; 100 in the paper.
        seed: decides the order.
        device: of images and batches.
    """

    def __init__(
        self,
        images: Images,
        mean: Tensor,
        *,
        batch_size: int = 100,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= batch_size <= len(images):
            raise ValueError(
                f"batch_size must be from 1 to the number of images, {len(images):,}, "
                f"got {batch_size!r}"
            )
        self.batch_size = batch_size
        # With channels last and one image per row, gathering a batch copies whole rows.
        rows = images.pixels.permute(0, 2, 3, 1).reshape(len(images), _PIXELS)
        self._rows, self._labels = rows.to(device), images.labels.to(device)
        self._mean = mean.to(device).permute(1, 2, 0).reshape(_PIXELS)
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(images), generator=generator).to(device)
        self._offsets = torch.arange(batch_size, device=device)
        self._position = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def images(self) -> int:
        """How many images the batches are drawn from."""
        return len(self._order)

    @property
    def position(self) -> int:
        """Batches sampled so far. Set it to resume. Reading waits for the device."""
        return int(self._position)

    @position.setter
    def position(self, value: int) -> None:
        self._position.fill_(value)

    def sample(self) -> tuple[Tensor, Tensor]:
        """Return the next batch: float32 of shape (batch_size, 3, 32, 32), and its labels.

        The memory layout is channels last.
        """
        places = (self._position * self.batch_size + self._offsets) % len(self._order)
        self._position += 1
        return self._batch(self._order.index_select(0, places))

    def _batch(self, which: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows.index_select(0, which) - self._mean  # uint8 minus float32 gives float32
        height, width = _SHAPE[1:]
        inputs = rows.view(-1, height, width, _SHAPE[0]).permute(0, 3, 1, 2)
        return inputs, self._labels.index_select(0, which)

    def __len__(self) -> int:
        return len(self._order) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for which in torch.split(self._order, self.batch_size)[: len(self)]:
            yield self._batch(which)


class _Normalize(torch.autograd.Function):
    """Compute ``x·s^−β`` with ``s = 1 + α·mean(x²)`` over a window, in half of autograd's passes.

    The window is symmetric, and zeros around the image count. Averaging is therefore its own
    adjoint: ``dx = g·s^−β − 2·α·β·x·mean(g·x·s^(−β−1))``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float) -> Tensor:
        scale = _mean(x * x, size).mul_(alpha).add_(1.0)
        # s^−3/4 by roots: a power takes several times as long.
        root = scale.rsqrt_()
        scale = root.sqrt().mul_(root)
        ctx.save_for_backward(x, root, scale)
        ctx.size, ctx.alpha = size, alpha
        return x * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, root, scale = ctx.saved_tensors
        scaled = gradients[0] * scale
        pulled = _mean((scaled * x).mul_(root).mul_(root), ctx.size)
        return scaled.addcmul_(x, pulled, value=-2.0 * 0.75 * ctx.alpha), None, None


def _mean(x: Tensor, size: int) -> Tensor:
    """Average over windows of ``size`` by ``size``; zeros around the image count, as in Caffe."""
    return functional.avg_pool2d(x, size, stride=1, padding=size // 2)


class LocalResponseNorm(nn.Module):
    """Normalize within each channel, as Caffe's LRN: ``x / (1 + α·mean(x²))^β`` with β = 3/4.

    The mean is over a window of ``size`` by ``size`` around each pixel; zeros around the image
    count. (``torch.nn.LocalResponseNorm`` works across channels.)

    Args:
        size: of the window, odd.
        alpha: the α of the formula.
    """

    def __init__(self, size: int = 3, alpha: float = 5e-5) -> None:
        super().__init__()
        self.size, self.alpha = size, alpha

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape (n, channels, height, width)."""
        normalized: Tensor = _Normalize.apply(x, self.size, self.alpha)  # type: ignore[no-untyped-call]
        return normalized

    def extra_repr(self) -> str:
        """Return the settings, for ``print(model)``."""
        return f"size={self.size}, alpha={self.alpha}"


def cifar10_full(seed: int | None = None) -> nn.Module:
    """Build Caffe's ``cifar10_full``, from (n, 3, 32, 32) to (n, 10), with 89,578 parameters.

    Weights are normal with the standard deviations 1e-4, 0.01, 0.01 and 0.01; biases are 0. The
    memory layout is channels last, which halves the time on a CPU.

    Args:
        seed: of the weights; ``None`` draws from torch's global generator.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 32, kernel_size=5, padding=2),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.ReLU(inplace=True),
        LocalResponseNorm(),
        nn.Conv2d(32, 32, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(3, stride=2, ceil_mode=True),
        LocalResponseNorm(),
        nn.Conv2d(32, 64, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(3, stride=2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, _CLASSES),
    )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, std in zip(_layers(model), (1e-4, 0.01, 0.01, 0.01), strict=True):
            layer.weight.normal_(0.0, std, generator=generator)
            layer.bias.zero_()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def parameter_groups(
    model: nn.Module, lr: float = 0.001, weight_decay: float = 0.004
) -> list[dict[str, Any]]:
    """Return the parameters of :func:`cifar10_full` as groups with Caffe's rates and decays.

    Biases have twice the rate, except that of the third convolution. The linear layer's weight has
    250 times the weight decay, and its bias has none. The groups' rates are ``lr`` times
    :data:`RATE_RATIOS`. Multiply bounds in the same way, one per group.

    Args:
        model: from :func:`cifar10_full`.
        lr: learning rate.
        weight_decay: an L2 penalty, added to the gradient as torch's ``weight_decay`` is.
    """
    conv1, conv2, conv3, linear = _layers(model)
    members = (
        ([conv1.weight, conv2.weight, conv3.weight, conv3.bias], weight_decay),
        ([conv1.bias, conv2.bias], weight_decay),
        ([linear.weight], 250.0 * weight_decay),
        ([linear.bias], 0.0),
    )
    return [
        {"params": params, "lr": lr * ratio, "weight_decay": decay}
        for (params, decay), ratio in zip(members, RATE_RATIOS, strict=True)
    ]


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, mean: Tensor, batch_size: int = 250) -> float:
    """Return the share of ``images`` that ``model`` classifies correctly, in percent.

    Args:
        model: on the device of ``images``. The function sets eval mode and restores the old mode.
        images: all of them count.
        mean: of the training images, see :func:`mean_image`.
        batch_size: images at a time.
    """
    training = model.training
    model.eval()
    mean = mean.to(images.pixels.device)
    right = torch.zeros((), dtype=torch.int64, device=images.pixels.device)
    for pixels, labels in zip(
        torch.split(images.pixels, batch_size),
        torch.split(images.labels, batch_size),
        strict=True,
    ):
        inputs = (pixels - mean).contiguous(memory_format=torch.channels_last)
        right += (model(inputs).argmax(dim=1) == labels).sum()
    model.train(training)
    return 100.0 * int(right) / len(images)
