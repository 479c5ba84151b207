"""CIFAR-10 and the paper's network, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from paper_helpers import write_slice
from torch import nn

from clr_optim.bench.cifar10 import (
    RATE_RATIOS,
    Batches,
    Images,
    LocalResponseNorm,
    accuracy,
    cifar10_full,
    mean_image,
    parameter_groups,
    read_cifar10,
)
from clr_optim.range_test import lr_range_test


def test_reads_the_official_layout_in_order(tmp_path):
    records = write_slice(tmp_path, per_file=7)
    training, test = read_cifar10(tmp_path)
    assert (len(training), len(test)) == (35, 7)
    assert training.pixels.shape == (35, 3, 32, 32)
    assert (training.pixels.dtype, training.labels.dtype) == (torch.uint8, torch.int64)
    third = records["data_batch_3.bin"]
    assert training.labels[14:21].tolist() == third[:, 0].tolist()
    # Byte 1 + 1024·c + 32·y + x of a record is the pixel (y, x) of the colour c.
    assert int(training.pixels[15, 2, 4, 9]) == third[1, 1 + 2 * 1024 + 4 * 32 + 9]
    assert int(test.pixels[6, 0, 31, 31]) == records["test_batch.bin"][6, 1024]


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("data_batch_2.bin", None, FileNotFoundError, "there is no data_batch_2.bin"),
        ("test_batch.bin", lambda b: b[:-1], ValueError, "4 records of 3,073 and 3,072 bytes over"),
        ("data_batch_4.bin", lambda b: b"", ValueError, "has 0 bytes"),
        ("data_batch_1.bin", lambda b: b"\x0a" + b[1:], ValueError, "record 0 has the label 10"),
        ("data_batch_5.bin", lambda b: b"\x80\x04" * 1000, ValueError, "has 2,000 bytes"),
    ],
    ids=["missing", "truncated", "empty", "label", "foreign"],
)
def test_other_files_are_refused_saying_what_is_expected(tmp_path, name, change, error, words):
    write_slice(tmp_path, per_file=5)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(content))
    with pytest.raises(error) as raised:
        read_cifar10(tmp_path)
    for part in (words, name, "CIFAR-10 binary version", "data_batch_1.bin to data_batch_5.bin"):
        assert part in str(raised.value)


def test_mean_image(folder):
    training, _ = read_cifar10(folder)
    expected = training.pixels.numpy().astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(mean_image(training).numpy(), expected, rtol=1e-7)


def _images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10)


def test_batches_go_through_one_order_again_and_again():
    images = _images(10)
    mean = mean_image(images)
    batches = Batches(images, mean, batch_size=4, seed=3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    for k in range(6):
        inputs, labels = batches.sample()
        which = [order[(4 * k + i) % 10] for i in range(4)]
        assert torch.equal(inputs, images.pixels[which].float() - mean)
        assert torch.equal(labels, images.labels[which])
        assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert batches.position == 6
    resumed = Batches(images, mean, batch_size=4, seed=3)
    resumed.position = 6
    assert torch.equal(resumed.sample()[0], batches.sample()[0])


def test_batches_as_a_loader_start_anew_and_move_nothing():
    images = _images(10)
    batches = Batches(images, mean_image(images), batch_size=4)
    first, again = list(batches), list(batches)
    assert len(first) == len(again) == len(batches) == 2
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    assert batches.position == 0
    assert torch.equal(batches.sample()[0], first[0][0])


@pytest.mark.parametrize("size", [0, 11])
def test_batches_of_no_possible_size_are_refused(size):
    images = _images(10)
    with pytest.raises(ValueError, match=f"from 1 to the number of images, 10, got {size}"):
        Batches(images, mean_image(images), batch_size=size)


def test_a_range_test_takes_batches_as_its_loader():
    images = _images(20)
    batches = Batches(images, mean_image(images), batch_size=10)
    model = cifar10_full(0)
    optimizer = torch.optim.SGD(parameter_groups(model))
    result = lr_range_test(
        model, optimizer, batches, nn.functional.cross_entropy,
        start_lr=0.0, end_lr=1e-3, epochs=5, metric="accuracy",
    )  # fmt: skip
    assert len(result.lrs) == 10
    assert result.ratios == [0.5 * ratio for ratio in RATE_RATIOS]


def test_accuracy_counts_every_image_in_eval_mode():
    images = _images(7)

    class Reads(nn.Module):
        """Answers class 3 in eval mode, else class 0."""

        def forward(self, x):
            scores = torch.zeros(len(x), 10)
            scores[:, 0 if self.training else 3] = 1.0
            return scores

    model = Reads()
    assert accuracy(model, images, mean_image(images), batch_size=3) == pytest.approx(100 / 7)
    assert model.training


def naive_norm(x, size=3, alpha=5e-5, beta=0.75):
    """Compute Caffe's within-channel LRN: windows reach over the edge, where zeros count."""
    half = size // 2
    out = np.empty_like(x)
    for n, c, i, j in np.ndindex(*x.shape):
        window = x[n, c, max(i - half, 0) : i + half + 1, max(j - half, 0) : j + half + 1]
        out[n, c, i, j] = x[n, c, i, j] / (1 + alpha * (window**2).sum() / size**2) ** beta
    return out


@pytest.mark.parametrize(("size", "alpha"), [(3, 5e-5), (5, 0.3)])
def test_norm_is_caffes(size, alpha):
    x = 50 * np.random.default_rng(0).standard_normal((2, 3, 6, 5))
    found = LocalResponseNorm(size, alpha)(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), naive_norm(x, size, alpha), rtol=1e-12)


def test_norms_gradient():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 30.0):
        given = (scale * x).requires_grad_()
        assert torch.autograd.gradcheck(LocalResponseNorm(3, 0.5), (given,))


def naive_pool(x, reduce):
    """Compute Caffe's 3×3 pooling with stride 2: ceil mode, and windows end at the image's edge."""
    height, width = (math.ceil((size - 3) / 2) + 1 for size in x.shape[2:])
    out = np.empty((*x.shape[:2], height, width))
    for i, j in np.ndindex(height, width):
        out[:, :, i, j] = reduce(x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], axis=(2, 3))
    return out


def test_the_network_is_caffes():
    """Every layer equals its definition in float64; convolutions are torch's, contiguous."""
    model = cifar10_full(0).double()
    conv1, conv2, conv3 = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    linear = model[-1]
    with torch.no_grad():
        for parameter in model.parameters():  # larger values, for a sharper comparison
            parameter.mul_(5.0).add_(0.01)
    x = np.random.default_rng(1).uniform(-128, 128, (2, 3, 32, 32))

    def convolve(layer, x):
        weight = layer.weight.detach().contiguous()
        return nn.functional.conv2d(
            torch.from_numpy(x), weight, layer.bias.detach(), padding=2
        ).numpy()

    def relu(x):
        return np.maximum(x, 0)

    y = naive_norm(relu(naive_pool(convolve(conv1, x), np.max)))
    assert y.shape == (2, 32, 16, 16)
    y = naive_norm(naive_pool(relu(convolve(conv2, y)), np.mean))
    assert y.shape == (2, 32, 8, 8)
    y = naive_pool(relu(convolve(conv3, y)), np.mean)
    assert y.shape == (2, 64, 4, 4)
    y = y.reshape(2, -1) @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
    np.testing.assert_allclose(model(torch.from_numpy(x)).detach().numpy(), y, rtol=1e-10)


def test_initial_weights_are_caffes_and_the_seeds():
    model, other = cifar10_full(0), cifar10_full(1)
    stds = {
        name: float(p.detach().std()) for name, p in model.named_parameters() if "weight" in name
    }
    assert list(stds.values()) == pytest.approx([1e-4, 0.01, 0.01, 0.01], rel=0.05)
    assert all(not p.any() for name, p in model.named_parameters() if "bias" in name)
    assert sum(p.numel() for p in model.parameters()) == 89_578
    again = cifar10_full(0)
    for a, b, c in zip(model.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (a.dim() == 1)


def test_rates_and_decays_of_each_parameter_are_caffes():
    model = cifar10_full(0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[p]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, lr=0.5, weight_decay=0.004)
        for p in group["params"]
    }
    once, twice = 0.5, 1.0
    assert found == {
        "0.weight": (once, 0.004), "0.bias": (twice, 0.004),
        "4.weight": (once, 0.004), "4.bias": (twice, 0.004),
        "8.weight": (once, 0.004), "8.bias": (once, 0.004),
        "12.weight": (once, 1.0), "12.bias": (twice, 0.0),
    }  # fmt: skip
