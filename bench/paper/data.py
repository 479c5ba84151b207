"""CIFAR-10 for all runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clr_optim.bench.cifar10 import Images, mean_image, read_cifar10

__all__ = ["Data", "digest", "read"]

BATCH_SIZE = 100


@dataclass(frozen=True)
class Data:
    """What all runs share: images on the device, the training images' mean, a fingerprint."""

    training: Images
    test: Images
    mean: Tensor
    digest: str
    batch_size: int


def read(folder: str | Path, device: torch.device | str = "cpu") -> Data:
    """CIFAR-10 from its official binary layout; errors as in :func:`read_cifar10`."""
    training, test = read_cifar10(folder)
    if len(training) < BATCH_SIZE:
        raise ValueError(
            f"{folder}: {len(training)} training images, fewer than a batch of {BATCH_SIZE}"
        )
    fingerprint = digest([training.pixels, training.labels, test.pixels, test.labels])
    mean = mean_image(training)  # on the host, so that it is the same wherever one trains
    return Data(training.to(device), test.to(device), mean, fingerprint, BATCH_SIZE)


def digest(tensors: Sequence[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
