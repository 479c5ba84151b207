"""Residual, stochastic-depth and dense networks, their augmentation and their random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from clr_optim.bench.cifar10 import Batches, Images
from clr_optim.bench.paper.augmentation import AugmentedBatches
from clr_optim.bench.paper.deep_networks import (
    DenseNet,
    ResNet,
    densenet,
    resnet,
    stochastic_resnet,
)
from clr_optim.bench.paper.noise import CROPS, GATES, draw

# ---- random numbers


def _murmur(x):
    """MurmurHash3's finalizer in NumPy, whose uint32 wraps around."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


@pytest.mark.parametrize(("seed", "kind"), [(0, CROPS), (0, GATES), (7, CROPS)])
def test_numbers_are_those_of_the_hash(seed, kind):
    counts = np.array([0, 1, 2, 12_345, 2**31, 2**32 - 1], dtype=np.uint32)
    key = _murmur(np.array([2 * seed + kind + 1], dtype=np.uint32))
    expected = _murmur(_murmur(counts) ^ key)
    found = draw(seed, kind, torch.from_numpy(counts.astype(np.int64)))
    assert found.tolist() == expected.tolist()


def test_numbers_are_uniform_and_differ_by_seed_and_kind():
    counts = torch.arange(100_000)
    numbers = [draw(seed, kind, counts) for seed in (0, 1) for kind in (CROPS, GATES)]
    for each in numbers:
        # 162 equally likely values: chi-squared has mean 161 and deviation 18.
        histogram = torch.bincount(each % 162, minlength=162).double()
        expected = len(counts) / 162
        assert ((histogram - expected) ** 2 / expected).sum() < 161 + 5 * 18
    for i, one in enumerate(numbers):
        for other in numbers[:i]:
            assert (one == other).sum() < 5


# ---- augmentation


def _images(count=40):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(count))


MEAN = torch.full((3, 32, 32), 100.5)


def _crops(image):
    """Return all crops of an image with a border of zeros, by (down, right, mirrored)."""
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)))
    crops = {}
    for down in range(9):
        for right in range(9):
            crop = padded[:, down : down + 32, right : right + 32]
            crops[down, right, False], crops[down, right, True] = crop, crop[:, :, ::-1]
    return crops


def test_an_augmented_image_is_a_crop_of_the_image():
    images = _images()
    batches = AugmentedBatches(images, MEAN, batch_size=8, seed=3)
    plain = Batches(images, MEAN, batch_size=8, seed=3)
    for _ in range(3):
        (found, labels), (inputs, expected) = batches.sample(), plain.sample()
        assert torch.equal(labels, expected)
        assert found.shape == inputs.shape
        assert found.is_contiguous(memory_format=torch.channels_last)
        for image, crop in zip(inputs, found, strict=True):
            same = [key for key, each in _crops(image).items() if np.array_equal(each, crop)]
            assert len(same) == 1
    assert batches.position == 3
    for (found, _), (inputs, _) in zip(batches, plain, strict=True):
        assert torch.equal(found, inputs)  # as a loader: without augmentation


def test_each_place_and_mirror_image_is_as_frequent():
    """Images that are 1 at each pixel's own number show where each crop comes from."""
    count = 4_000
    ramp = torch.zeros((1, 3, 32, 32), dtype=torch.uint8)
    ramp[0, 0, 16, 12] = ramp[0, 1, 16, 13] = 1
    images = Images(ramp.expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.int64))
    batches = AugmentedBatches(images, torch.zeros(3, 32, 32), batch_size=count)
    inputs, _ = batches.sample()
    places, neighbours = (inputs[:, colour].flatten(1).argmax(dim=1) for colour in (0, 1))
    mirrored = neighbours < places
    assert mirrored.double().mean().item() == pytest.approx(0.5, abs=0.04)
    rows, columns = places // 32, places % 32
    columns = torch.where(mirrored, 31 - columns, columns)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12, 20, 8, 16)
    for each in (rows, columns):
        frequencies = torch.bincount(each - each.min()).double() / count
        assert frequencies.tolist() == pytest.approx([1 / 9] * 9, abs=0.03)


def test_the_position_decides_the_augmentation():
    whole, resumed = (AugmentedBatches(_images(), MEAN, batch_size=8, seed=3) for _ in range(2))
    inputs = [whole.sample()[0] for _ in range(7)]
    resumed.position = 5
    assert torch.equal(resumed.sample()[0], inputs[5])
    other = AugmentedBatches(_images(), MEAN, batch_size=8, seed=4)
    assert not torch.equal(other.sample()[0], inputs[0])
    # An epoch later the same images have other crops.
    assert not torch.equal(inputs[0], inputs[5])


# ---- networks


@pytest.mark.parametrize(
    ("build", "published", "exact"),
    [
        (lambda: resnet(20), 0.27e6, 269_722),
        (lambda: resnet(56), 0.85e6, 853_018),
        (lambda: resnet(110), 1.7e6, 1_727_962),
        (lambda: stochastic_resnet(20), 0.27e6, 269_722),
        (lambda: stochastic_resnet(110), 1.7e6, 1_727_962),
        (lambda: densenet(40), 1.0e6, 1_019_722),
    ],
    ids=["resnet-20", "resnet-56", "resnet-110", "stochastic-20", "stochastic-110", "densenet-40"],
)
def test_parameters_are_as_many_as_in_the_papers(build, published, exact):
    """Shortcuts of type A have no parameters. The papers round to two digits."""
    count = sum(param.numel() for param in build().parameters())
    assert count == exact
    assert count == pytest.approx(published, rel=0.02)


def test_counts_by_hand():
    """A residual network of 6n + 2 layers, and a DenseNet, from the papers' descriptions."""
    widths, n = (16, 32, 64), 3
    count = 3 * 9 * 16 + 2 * 16
    before = 16
    for width in widths:
        for block in range(n):
            count += 9 * (before if block == 0 else width) * width + 9 * width**2 + 4 * width
        before = width
    assert sum(p.numel() for p in resnet(20).parameters()) == count + 64 * 10 + 10

    channels, growth, layers = 16, 12, 12
    count = 3 * 9 * channels
    for block in range(3):
        if block:
            count += 2 * channels + channels**2
        for _ in range(layers):
            count += 2 * channels + 9 * channels * growth
            channels += growth
    count += 2 * channels + 100 * channels + 100
    assert sum(p.numel() for p in densenet(40, growth, 100).parameters()) == count


@pytest.mark.parametrize("averages", [False, True])
def test_the_shortcut_is_type_a(averages):
    """With a branch of zeros a block shows its shortcut: fewer pixels, and channels of zeros."""
    model = (stochastic_resnet if averages else resnet)(8).eval()
    block = model.blocks[1]
    nn.init.zeros_(block.branch[-1].weight)
    x = torch.rand(2, 16, 8, 8)
    expected = functional.avg_pool2d(x, 2) if averages else x[:, :, ::2, ::2]
    found = block(x)
    assert found.shape == (2, 32, 4, 4)
    assert torch.equal(found[:, :16], expected)
    assert not found[:, 16:].any()


def test_weights_begin_as_in_the_originals():
    for model, by_outputs in ((resnet(20, seed=3), True), (stochastic_resnet(20, seed=3), False)):
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 4_000:
                fan = 9 * (layer.out_channels if by_outputs else layer.in_channels)
                assert layer.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)
            elif isinstance(layer, nn.BatchNorm2d):
                assert (layer.weight == 1).all()
                assert not layer.bias.any()
        assert model.last.weight.abs().max() <= 64**-0.5
        assert not model.last.bias.any()
    first, again, other = (resnet(20, seed=seed).first[1].weight for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_dense_layer_sees_all_before_it():
    model = densenet(40)
    norms = [[layer[0].num_features for layer in layers] for layers in model.blocks]
    assert norms == [[first + 12 * i for i in range(12)] for first in (16, 160, 304)]
    assert [part[2].out_channels for part in model.transitions] == [160, 304]
    assert model.last.in_features == 448
    # Without the weights of the later layers, the first layer's output still arrives.
    model = densenet(7, growth=4).eval()
    x = torch.rand(2, 3, 32, 32)
    before = model(x)
    with torch.no_grad():
        model.blocks[0][0][2].weight.mul_(2)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ResNet(21, 10), "depth must be 6n"),
        (lambda: DenseNet(41, 12, 10), "depth must be 3n"),
    ],
)
def test_other_depths_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# ---- stochastic depth


def test_survival_decays_in_a_line_to_a_half():
    """The paper's p_l = 1 − l/L·(1 − p_L)."""
    model = stochastic_resnet(56)
    expected = 1 - np.arange(1, 28) / 27 * 0.5
    assert model.survival == pytest.approx(expected.tolist())
    gates = torch.stack([model.gates() for _ in range(20_000)])
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    # Five standard errors of a share in 20,000 draws.
    assert gates.mean(dim=0).tolist() == pytest.approx(expected.tolist(), abs=5 * 0.5 / 20_000**0.5)
    # Blocks are dropped independently of each other.
    correlations = np.corrcoef(gates.T.numpy())
    np.fill_diagonal(correlations, 0.0)
    assert np.abs(correlations).max() < 5 / 20_000**0.5


def test_a_test_has_the_expectation_of_training():
    """Where no ReLU cuts off, the mean over training draws is the output in tests."""
    model = stochastic_resnet(14, seed=1).eval()
    x = torch.rand(4, 64, 8, 8) + 50.0
    block, survival = model.blocks[-1], model.survival[-1]
    nn.init.constant_(block.branch[-1].weight, 0.1)  # a branch that is smaller than the shortcut
    with torch.no_grad():
        outputs = torch.stack([block(x, model.gates()[-1]) for _ in range(2_000)])
        assert outputs.min() > 0
        expected = block(x, survival)
        branch = block.branch(x).abs().max()
    # Five standard errors of the mean of 2,000 gates with the variance 1/4.
    error = (outputs.double().mean(dim=0) - expected).abs().max()
    assert error < 5 * branch * 0.5 / 2_000**0.5
    assert (outputs[0] - expected).abs().max() > 10 * error


def test_a_test_draws_no_gate():
    model = stochastic_resnet(8).eval()
    inputs = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(inputs), model(inputs))
    assert model.draws == 0
    model.train()(inputs)
    assert model.draws == len(model.blocks)


def test_the_network_in_tests_scales_each_branch_by_its_survival():
    model = stochastic_resnet(8, seed=1).eval()
    x = torch.rand(2, 3, 32, 32) * 100
    with torch.no_grad():
        hidden = model.first(x)
        for block, survival in zip(model.blocks, model.survival, strict=True):
            branch = survival * block.branch(hidden)
            if branch.shape != hidden.shape:
                hidden = functional.avg_pool2d(hidden, 2)
                hidden = torch.cat([hidden, torch.zeros_like(hidden)], dim=1)
            hidden = functional.relu(branch + hidden)
        expected = model.last(hidden.mean(dim=(2, 3)))
        torch.testing.assert_close(model(x), expected)


def test_a_dropped_branch_has_gradients_of_zeros():
    model = stochastic_resnet(8, seed=1)
    seen = set()
    for _ in range(12):
        model.zero_grad()
        gates = model.gates()
        model.draws -= len(gates)  # the iteration draws the same gates again
        model(torch.rand(4, 3, 32, 32)).sum().backward()
        for gate, block in zip(gates, model.blocks, strict=True):
            weight = block.branch[0].weight
            assert weight.grad is not None
            assert bool(weight.grad.any()) == bool(gate)
        seen.add(tuple(gates.tolist()))
    assert len(seen) > 1


def test_a_checkpoint_has_the_position_of_the_gates():
    one, other = stochastic_resnet(20, seed=5), stochastic_resnet(20, seed=5)
    for _ in range(4):
        one.gates()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.gates(), other.gates())
    numbers = [torch.stack([m.gates() for _ in range(50)]) for m in (one, stochastic_resnet(20))]
    assert not torch.equal(*numbers)  # another seed, other draws
