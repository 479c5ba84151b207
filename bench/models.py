"""Models with the parameters of the workloads, and random batches: whole iterations run these."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MODELS", "Training", "make_training"]


class Training(NamedTuple):
    """A model, a function that returns the loss of a batch, and the batch's shape in words."""

    model: nn.Module
    loss: Callable[[], Tensor]
    batch: str


class _Transposed(nn.Module):
    """A linear layer whose weight has the shape (inputs, outputs), as in GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.02)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class _Block(nn.Module):
    """Attention and an MLP four times as wide, each after a norm and around a shortcut."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        linear: Callable[[int, int], nn.Module] = _Transposed if causal else nn.Linear
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        y: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return y


class _Gpt2(nn.Module):
    """GPT-2 small. The output shares the weight of the embedding."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50257, width), nn.Embedding(1024, width)
        self.blocks = nn.Sequential(*(_Block(width, 12, causal=True) for _ in range(12)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.tokens(tokens) + self.places(places))
        y: Tensor = self.norm(x) @ self.tokens.weight.T
        return y


class _VitB(nn.Module):
    """ViT-B/16."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        self.patches = nn.Conv2d(3, width, kernel_size=16, stride=16)
        self.blocks = nn.Sequential(*(_Block(width, 12, causal=False) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        y: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return y


class _Bottleneck(nn.Module):
    """Three convolutions around a shortcut, as in ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, width, 1), nn.ReLU(),
            *_convolution(width, width, 3, stride), nn.ReLU(),
            *_convolution(width, 4 * width, 1),
        )  # fmt: skip
        changes = stride > 1 or inputs != 4 * width
        self.shortcut = nn.Sequential(
            *_convolution(inputs, 4 * width, 1, stride) if changes else ()
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def _resnet50() -> nn.Module:
    layers: list[nn.Module] = [*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers.append(_Bottleneck(inputs, width, 2 if block == 0 and width > 64 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


#: by workload: the model, the shape of a batch on a CPU and on a GPU, and the number of classes.
#: Batches of whole numbers, which are tokens, have the shape (sequences, length).
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], int]] = {
    "mlp": (_mlp, (128, 64), (1024, 64), 10),
    "resnet50": (_resnet50, (4, 3, 224, 224), (64, 3, 224, 224), 1000),
    "gpt2": (_Gpt2, (1, 256), (8, 1024), 50257),
    "vit_b": (_VitB, (2, 3, 224, 224), (64, 3, 224, 224), 1000),
}


def make_training(workload: str, device: torch.device | str = "cpu", seed: int = 0) -> Training:
    """Make a workload's model, with random weights and one random batch."""
    torch.manual_seed(seed)
    make, on_cpu, on_gpu, classes = MODELS[workload]
    model = make().to(device)
    shape = on_cpu if torch.device(device).type == "cpu" else on_gpu
    words = " × ".join(map(str, shape))
    if workload == "gpt2":
        tokens = torch.randint(classes, shape, device=device)

        def loss() -> Tensor:
            scores = model(tokens[:, :-1]).flatten(0, 1)
            return functional.cross_entropy(scores, tokens[:, 1:].flatten())

        return Training(model, loss, f"{words} tokens")
    inputs = torch.randn(shape, device=device)
    labels = torch.randint(classes, shape[:1], device=device)
    return Training(model, lambda: functional.cross_entropy(model(inputs), labels), words)
