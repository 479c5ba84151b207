"""Read the data that all runs share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clr_optim.bench.cifar10 import Images, mean_image, read_cifar10, read_cifar100

__all__ = ["Data", "digest", "read"]

#: Images per batch of the paper's tables.
BATCH_SIZE = 100


@dataclass(frozen=True)
class Data:
    """The data of all runs.

    Args:
        training: the images to train on, on the device.
        test: the images to test with, on the device.
        mean: the mean over the training images.
        digest: a fingerprint of all images and labels.
        batch_size: images per batch.
    """

    training: Images
    test: Images
    mean: Tensor
    digest: str
    batch_size: int


def read(
    folder: str | Path,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    classes: int = 10,
) -> Data:
    """Read CIFAR-10 or CIFAR-100 from its official binary layout.

    Args:
        folder: with the official files.
        device: of the images.
        batch_size: images per batch; ``None`` is that of the paper's tables.
        classes: 10, or 100 for CIFAR-100.

    Raises:
        FileNotFoundError, ValueError: as the readers of :mod:`clr_optim.bench.cifar10`, and if
            there are fewer training images than a batch has.
    """
    batch_size = batch_size or BATCH_SIZE
    training, test = (read_cifar10 if classes == 10 else read_cifar100)(folder)
    if len(training) < batch_size:
        raise ValueError(
            f"{folder}: {len(training)} training images, fewer than a batch of {batch_size}"
        )
    fingerprint = digest([training.pixels, training.labels, test.pixels, test.labels])
    mean = mean_image(training)  # on the host: the same bits for every device
    return Data(training.to(device), test.to(device), mean, fingerprint, batch_size)


def digest(tensors: Sequence[Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
