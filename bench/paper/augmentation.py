"""Make batches with standard augmentation on the device: random crops, mirrored at random."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clr_optim.bench.cifar10 import Batches
from clr_optim.bench.paper.noise import CROPS, draw

__all__ = ["AugmentedBatches"]

_PADDING = 4


class AugmentedBatches(Batches):
    """Batches whose images are moved by up to four pixels each way, and mirrored half of the time.

    A border of 4 zeros surrounds each image after the mean is subtracted. A crop of the old size is
    drawn from it, and half of the crops are mirrored. The position decides all draws, so that
    a resumed run and a captured graph continue them. An iteration over the object, as a range test
    does, gives the images without augmentation.

    Args:
        images, mean, batch_size, seed, device: as for :class:`~clr_optim.bench.cifar10.Batches`.

    Source: fb.resnet.torch and DenseNet, ``datasets/cifar10.lua``: ``HorizontalFlip(0.5)`` and
    ``RandomCrop(32, 4)``; Stochastic_Depth, ``cifar-dataset.lua``, has the same.
    """

    def sample(self) -> tuple[Tensor, Tensor]:
        """Return the next batch, augmented; shapes and layout as without augmentation."""
        counts = self._position * self.batch_size + self._offsets
        inputs, labels = super().sample()
        return _augmented(inputs, draw(self._seed, CROPS, counts)), labels


def _augmented(inputs: Tensor, numbers: Tensor) -> Tensor:
    """Crop and mirror each image as its number says."""
    size, places = inputs.shape[-1], 2 * _PADDING + 1
    along = torch.arange(size, device=inputs.device)
    down, numbers = numbers % places, numbers // places
    right, numbers = numbers % places, numbers // places
    mirrored = (numbers % 2).bool()[:, None]
    rows = down[:, None] + along
    columns = right[:, None] + torch.where(mirrored, size - 1 - along, along)
    padded = functional.pad(inputs, [_PADDING] * 4).permute(0, 2, 3, 1)
    which = torch.arange(len(inputs), device=inputs.device)
    crops = padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2)
