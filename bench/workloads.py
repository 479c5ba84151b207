"""The benchmark's workloads (parameter shapes of well-known models), update rules and dtypes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["DTYPES", "IN_BACKWARD", "IN_TRAINING", "ONLY_ON_GPU", "RULES", "WORKLOADS", "Rule"]

Shape = tuple[int, ...]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Rule:
    """An optimizer class, and the settings that choose its rule; others have torch's defaults."""

    optimizer: Any  # a subclass of torch.optim.Optimizer, whose constructors differ
    settings: dict[str, Any] = field(default_factory=dict)


RULES = {
    "sgd": Rule(torch.optim.SGD),
    "sgd_momentum": Rule(torch.optim.SGD, {"momentum": 0.9}),
    "adam": Rule(torch.optim.Adam),
    "adamw": Rule(torch.optim.AdamW),
    "adagrad": Rule(torch.optim.Adagrad),
    "adadelta": Rule(torch.optim.Adadelta),
    "rmsprop": Rule(torch.optim.RMSprop),
    "rmsprop_full": Rule(torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "adamax": Rule(torch.optim.Adamax),
    "radam": Rule(torch.optim.RAdam),
    "nadam": Rule(torch.optim.NAdam),
}


def _resnet50() -> list[Shape]:
    """ResNet-50 as in torchvision: 161 tensors, 25,557,032 values."""
    shapes: list[Shape] = []

    def convolution(inputs: int, outputs: int, size: int) -> None:
        norm: list[Shape] = [(outputs,), (outputs,)]
        shapes.extend([(outputs, inputs, size, size), *norm])

    convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(inputs, width, 1)
            convolution(width, width, 3)
            convolution(width, 4 * width, 1)
            if block == 0:
                convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def _transformer(layers: int, width: int, transposed: bool) -> list[Shape]:
    """Blocks of two norms, attention and an MLP four times as wide; then a last norm."""
    shapes: list[Shape] = []
    for _ in range(layers):
        for sizes in (
            [(width,), (width, 3 * width), (width, width)],
            [(width,), (width, 4 * width), (4 * width, width)],
        ):
            for size in sizes:
                weight = size[::-1] if transposed else size
                shapes.extend([weight, (size[-1],)])
    return [*shapes, (width,), (width,)]


def _gpt2() -> list[Shape]:
    """GPT-2 small, the output tied to the embedding: 148 tensors, 124,439,808 values."""
    return [(50257, 768), (1024, 768), *_transformer(12, 768, transposed=False)]


def _vit_b() -> list[Shape]:
    """ViT-B/16 as in torchvision: 152 tensors, 86,567,656 values."""
    ends = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,), (1000, 768), (1000,)]
    return [*ends, *_transformer(12, 768, transposed=True)]


def _1b() -> list[Shape]:
    """Llama 3.2 1B, the output tied to the embedding: 146 tensors, 1,235,814,400 values."""
    width, hidden, keys = 2048, 8192, 512
    block: list[Shape] = [
        *[(width, width), (keys, width), (keys, width), (width, width)],
        *[(hidden, width), (hidden, width), (width, hidden)],
        *[(width,), (width,)],
    ]
    return [(128256, width), *block * 16, (width,)]


#: Workloads that would take most of a computer's memory, and minutes per step, on a CPU.
ONLY_ON_GPU = ("1b",)

WORKLOADS: dict[str, list[Shape]] = {
    "mlp": [(128, 64), (128,), (128, 128), (128,), (10, 128), (10,)],
    "1000x256": [(256,)] * 1000,
    "resnet50": _resnet50(),
    "gpt2": _gpt2(),
    "vit_b": _vit_b(),
    "one_33m": [(2**25,)],
    "1b": _1b(),
}

#: Models whose whole iterations are measured with steps in backward, and how many iterations of a
#: turn are timed after how many others.
IN_BACKWARD = {"linear": (8, 4), "linear_100m": (4, 2), "gpt2": (2, 1)}

#: The small models whose step is measured in training, by the widths of their linear layers. No
#: widths: the workload of this name.
IN_TRAINING: dict[str, tuple[int, ...]] = {
    "64-128-128-10": (64, 128, 128, 10),
    "8-64-64-4": (8, 64, 64, 4),
    "1000x256": (),
}
