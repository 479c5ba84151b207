"""The rows of the paper's Table 4, as data: residual, stochastic-depth and dense networks.

Each network trains with the initial rates 0.1, 0.2 and 0.3, which fall to a tenth twice, after the
epochs of the original's code. The cycled row has the range 0.1 to 0.3, for the DenseNet 0.1 to 0.2,
and its range falls by the same factors at the same iterations. A cycle is a tenth of the run long,
as in the paper. The fall of the range leaves the position in the cycle unchanged, so that each run
ends at the end of its tenth cycle. All originals have SGD with Nesterov's momentum of 0.9 and
a weight decay of 1e-4 on all parameters.

============== ======================================= ====== ============ ==================
network        epochs at each rate, in all             batch  iterations   training images
============== ======================================= ====== ============ ==================
ResNet         80, 41, 43: 164                         128    64,000       50,000
stochastic     249, 125, 126: 500                      128    176,000      45,000
DenseNet       149, 75, 76: 300                        64     234,000      50,000
============== ======================================= ====== ============ ==================

An epoch is all training images once. The numbers of iterations are rounded by at most 0.2 %, so
that ``--scale 0.01`` and its multiples divide all cycles into whole iterations. The borders between
rates are rounded to the nearest iteration.

The order of the images is that of the seed and the same in each epoch, as in the other tables; the
originals shuffle anew in each epoch. Crops and mirror images are drawn anew each time.

The paper tells no depth. The figures of its ResNet stand beside 20 layers and 56, and those of
stochastic depth as well: the differences between rows of one network are what can be compared. In
the original, stochastic depth has 110 layers. The paper's figures are means of five runs.

Sources: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186v6,
section 4.1.2 and Table 4. fb.resnet.torch: ``opts.lua`` (rate, momentum, decay, epochs, shortcuts
of type A for CIFAR-10), ``train.lua`` (Nesterov; falls from epochs 81 and 122 on) and
``TRAINING.md`` (batches). Stochastic_Depth: ``main.lua`` and ``cifar-dataset.lua``. DenseNet
(Torch 7): ``train.lua``, ``opts.lua`` and the README (batches, epochs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from clr_optim.bench.cifar10 import Batches, Images
from clr_optim.bench.paper.augmentation import AugmentedBatches
from clr_optim.bench.paper.data import Data
from clr_optim.bench.paper.deep_networks import densenet, resnet, stochastic_resnet
from clr_optim.bench.paper.networks import Groups, Network
from clr_optim.bench.paper.rows import Row, Scale, times
from clr_optim.schedule import Phase, Schedule, fixed, sequence

__all__ = ["DATASETS", "RESNET", "DeepNetwork", "Original", "cycled", "deep_groups", "lowered"]

#: the classes of CIFAR-10 and CIFAR-100, by table
DATASETS = {"resnet": 10, "resnet-100": 100}

_RATES = (0.1, 0.2, 0.3)
_WEIGHT_DECAY = 1e-4
_FACTORS = (1.0, 0.1, 0.01)
_CYCLES = 10
#: the accuracies on the way come at the ends of cycles
_EVALUATIONS = _CYCLES


@dataclass(frozen=True)
class DeepNetwork(Network):
    """A network that trains on augmented images, in batches whose size the network decides.

    Args:
        share: the part of the training images to train on, from the first one.
    """

    share: Fraction = Fraction(1)

    def batch_size_on(self, data: Data) -> int:
        """Return the images per batch, which the network decides."""
        return self.batch_size

    def batches(self, data: Data, seed: int, device: torch.device) -> Batches:
        """Make the batches of a run, augmented on the device."""
        count = int(len(data.training) * self.share)
        images = Images(data.training.pixels[:count], data.training.labels[:count])
        return AugmentedBatches(
            images, data.mean, batch_size=self.batch_size, seed=seed, device=device
        )


@dataclass(frozen=True)
class Original:
    """The settings of an original implementation.

    Args:
        iterations: the length of a run, a multiple of 20.
        epochs: the epochs after which the rate falls, and the last epoch.
    """

    iterations: int
    epochs: tuple[int, int, int]

    def half_cycle(self, scale: Scale) -> int:
        """Return the step size: half a cycle, in iterations."""
        return scale.steps(self.iterations // (2 * _CYCLES))

    def borders(self, scale: Scale) -> list[int]:
        """Return the first iteration of each rate, and the length of the run."""
        total = 2 * _CYCLES * self.half_cycle(scale)
        return [0, *(round(Fraction(total * epoch, self.epochs[-1])) for epoch in self.epochs)]


def lowered(original: Original, scale: Scale) -> Schedule:
    """Return the schedule of a fixed row: the initial rate, a tenth, a hundredth of that rate."""
    spans = pairwise(original.borders(scale))
    return sequence(
        [
            (times(factor, fixed()), end - begin)
            for factor, (begin, end) in zip(_FACTORS, spans, strict=True)
        ]
    )


def cycled(original: Original, scale: Scale) -> Schedule:
    """Return the schedule of a cycled row: ten triangles, whose range falls as the rates do."""
    half, spans = original.half_cycle(scale), pairwise(original.borders(scale))
    return sequence(
        [
            part
            for factor, (begin, end) in zip(_FACTORS, spans, strict=True)
            for part in _triangles(half, begin, end, factor)
        ]
    )


def _triangles(half: int, begin: int, end: int, factor: float) -> Iterator[tuple[Schedule, int]]:
    """Yield the parts of an endless triangle from one iteration to another, times a factor."""

    def between(share: float) -> tuple[float, float]:
        """Return the end of a phase at a share of the range."""
        return (factor * (1.0 - share), factor * share)

    while begin < end:
        inside = begin % (2 * half)
        if inside == 0:
            phase = Phase(step_size_up=half, lower=between(0.0), upper=between(1.0))
            stop = end
        else:
            # The rest of a half-cycle is one straight line, and a part of the cycle of before.
            rest = half - inside % half
            settings: dict[str, Any] = {"cycle_start": inside, "cycle_steps": 2 * half}
            if inside < half:
                phase = Phase(step_size_up=rest, step_size_down=0, lower=between(inside / half),
                              upper=between(1.0), **settings)  # fmt: skip
            else:
                phase = Phase(step_size_up=0, step_size_down=rest, lower=between(0.0),
                              upper=between(2.0 - inside / half), **settings)  # fmt: skip
            stop = min(begin + rest, end)
        yield Schedule("triangular", [phase]), stop - begin
        begin = stop


def deep_groups(model: nn.Module, lr: float = 0.1) -> Groups:
    """Return all parameters as one group: the originals decay biases and normalizations too."""
    return [{"params": list(model.parameters()), "lr": lr, "weight_decay": _WEIGHT_DECAY}]


_RESNET = Original(64_000, (80, 121, 164))
_STOCHASTIC = Original(176_000, (249, 374, 500))
_DENSENET = Original(234_000, (149, 224, 300))

Builder = Callable[[int, int], nn.Module]

#: name, original, batch size, share of the training images, upper end of the range, builder of
#: (classes, seed)
_NETWORKS: tuple[tuple[str, Original, int, Fraction, float, Builder], ...] = (
    ("resnet-20", _RESNET, 128, Fraction(1), 0.3, partial(resnet, 20)),
    ("resnet-56", _RESNET, 128, Fraction(1), 0.3, partial(resnet, 56)),
    ("stochastic-20", _STOCHASTIC, 128, Fraction(9, 10), 0.3, partial(stochastic_resnet, 20)),
    ("stochastic-56", _STOCHASTIC, 128, Fraction(9, 10), 0.3, partial(stochastic_resnet, 56)),
    ("densenet-40", _DENSENET, 64, Fraction(1), 0.2, partial(densenet, 40, 12)),
)

#: Table 4, in percent: at the initial rates 0.1, 0.2 and 0.3, and with cycles
_PUBLISHED: dict[tuple[str, int], tuple[float, float, float, float]] = {
    ("resnet", 10): (92.8, 93.3, 91.8, 93.6),
    ("resnet", 100): (71.2, 71.6, 71.9, 72.5),
    ("stochastic", 10): (94.6, 94.5, 94.2, 94.5),
    ("stochastic", 100): (75.2, 75.2, 74.6, 75.4),
    ("densenet", 10): (94.5, 94.5, 94.2, 94.9),
    ("densenet", 100): (75.2, 75.3, 74.5, 75.9),
}


def _rows(table: str, classes: int) -> Iterator[Row]:
    for name, original, batch_size, share, top, build in _NETWORKS:
        network = DeepNetwork(
            name,
            partial(build, classes),
            deep_groups,
            (1.0,),
            batch_size,
            share=share,
        )
        published = _PUBLISHED[name.partition("-")[0], classes]
        prefix = name if classes == 10 else f"cifar100-{name}"
        fixed_rows = tuple(f"{prefix}-{rate:g}" for rate in _RATES)
        bounds = [*((rate, rate) for rate in _RATES), (_RATES[0], top)]
        names = (*fixed_rows, f"{prefix}-clr")
        for row, ends, accuracy in zip(names, bounds, published, strict=True):
            is_cycled = row not in fixed_rows
            yield Row(
                table,
                row,
                "nesterov",
                ends,
                original.iterations,
                partial(cycled if is_cycled else lowered, original),
                accuracy,
                fixed_rows if is_cycled else (),
                network,
                evaluations=_EVALUATIONS,
            )


RESNET: dict[str, Row] = {
    row.name: row for table, classes in DATASETS.items() for row in _rows(table, classes)
}
