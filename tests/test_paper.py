"""The rerun of the paper's tables: data, network, schedules, and runs that survive anything."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clr_optim.bench import paper
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
from clr_optim.bench.paper import ROWS, CaffeSGD, Run, Scale, Store
from clr_optim.cli import main
from clr_optim.range_test import lr_range_test

FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
SMALL_BATCH = 10


def write_slice(folder, per_file=100, seed=0):
    """Classes that differ in colour, so that there is something to learn, under much noise."""
    rng = np.random.default_rng(seed)
    records = {}
    folder.mkdir(exist_ok=True)
    for name in FILES:
        labels = rng.integers(0, 10, size=(per_file, 1))
        colour = 20 * np.stack([labels % 5, labels // 2, 9 - labels], axis=1).repeat(1024, axis=2)
        noise = rng.integers(0, 60, size=colour.shape)
        pixels = (colour + noise).reshape(per_file, 3072)
        records[name] = np.concatenate([labels, pixels], axis=1).astype(np.uint8)
        records[name].tofile(folder / name)
    return records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cifar10") / "bin"
    write_slice(path)
    return path


@pytest.fixture
def small(monkeypatch):
    """Batches that take a tenth of the time."""
    monkeypatch.setattr(paper, "_BATCH_SIZE", SMALL_BATCH)


@pytest.fixture
def data(folder, small):
    return paper.read(folder)


# ---- the data


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
        """Class 3 in eval mode, else class 0."""

        def forward(self, x):
            scores = torch.zeros(len(x), 10)
            scores[:, 0 if self.training else 3] = 1.0
            return scores

    model = Reads()
    assert accuracy(model, images, mean_image(images), batch_size=3) == pytest.approx(100 / 7)
    assert model.training


# ---- the network, against Caffe's definitions


def naive_norm(x, size=3, alpha=5e-5, beta=0.75):
    """Caffe's within-channel LRN: windows reach over the edge, where zeros count."""
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
    """Caffe's 3×3 pooling at every second pixel: ceil, and windows end where the image does."""
    height, width = (math.ceil((size - 3) / 2) + 1 for size in x.shape[2:])
    out = np.empty((*x.shape[:2], height, width))
    for i, j in np.ndindex(height, width):
        out[:, :, i, j] = reduce(x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], axis=(2, 3))
    return out


def test_the_network_is_caffes():
    """Every layer in float64, convolutions by torch in another memory layout."""
    model = cifar10_full(0).double()
    conv1, conv2, conv3 = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    linear = model[-1]
    with torch.no_grad():
        for parameter in model.parameters():  # larger ones, or there would be little to compare
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


# ---- the rows, against the paper's formulas


def cyclic(t, step_size, base_lr, max_lr):
    """The paper's code."""
    number = math.floor(1 + t / (2 * step_size))
    x = abs(t / step_size - 2 * number + 1)
    return base_lr + (max_lr - base_lr) * max(0, 1 - x), number


def triangular(t, step_size=2000, base_lr=0.001, max_lr=0.006):
    return cyclic(t, step_size, base_lr, max_lr)[0]


def triangular2(t, step_size, base_lr, max_lr):
    rate, number = cyclic(t, step_size, base_lr, max_lr)
    return base_lr + (rate - base_lr) / 2 ** (number - 1)


def table2(t):
    if t < 16_000:
        return triangular2(t, 2000, 0.001, 0.005)
    if t < 22_000:
        return triangular2(t - 16_000, 1000, 0.0001, 0.0005)
    return triangular2(t - 22_000, 500, 0.00001, 0.00005)


def exp_range(t):
    return 0.001 + (triangular(t) - 0.001) * 0.99994**t


def windowed(shape):
    return lambda t: 0.001 + 0.005 * shape((triangular(t) - 0.001) / 0.005)


def restarts(t):
    start = 1600 * (2 ** math.floor(math.log2(t / 1600 + 1)) - 1)
    return 0.001 + 0.0025 * (1 + math.cos(math.pi * (t - start) / (start + 1600)))


def one_cycle(t):
    if t <= 21_600:
        return triangular(t, 10_800)
    return 0.001 + (0.001 / 1e4 - 0.001) * (t - 21_600) / 2399


FORMULAS = {
    "fixed": lambda t: 0.001,
    "fixed-stepped": lambda t: 0.001 if t < 60_000 else 0.0001 if t < 65_000 else 0.00001,
    "triangular2": table2,
    "decay": lambda t: max(0.007 - 0.006 * t / 4000, 0.001),
    "exp": lambda t: 0.001 * 0.99994**t,
    "exp_range": exp_range,
    "exp_range_bounds": lambda t: triangular(t) * 0.99994**t,
    "nesterov-fixed": lambda t: 0.001,
    "nesterov-triangular": triangular,
    "adam-fixed": lambda t: 0.0005,
    "adam-triangular": lambda t: triangular(t, 2000, 0.0005, 0.002),
    "adam-triangular-70k": lambda t: triangular(t, 2000, 0.0005, 0.002),
    "rmsprop-fixed": lambda t: 0.0001,
    "rmsprop-triangular": lambda t: triangular(t, 2000, 0.0001, 0.0003),
    "rmsprop-triangular-70k": lambda t: triangular(t, 2000, 0.0001, 0.0003),
    "adagrad-fixed": lambda t: 0.003,
    "adagrad-triangular": lambda t: triangular(t, 2000, 0.003, 0.035),
    "adadelta-fixed": lambda t: 0.01,
    "adadelta-triangular": lambda t: triangular(t, 2000, 0.01, 0.1),
    "window-triangle": triangular,
    "window-welch": windowed(lambda x: 1 - (1 - x) ** 2),
    "window-hann": windowed(lambda x: (1 - math.cos(math.pi * x)) / 2),
    "one_cycle": one_cycle,
    "warm_restarts": restarts,
}


@pytest.mark.parametrize("name", ROWS)
def test_rates_are_the_papers_for_every_group(name, data):
    run = Run(ROWS[name], 0, Scale(), data)
    for t in [*range(0, run.iterations, 777), 15_999, 16_000, 21_999, 22_500, run.iterations - 1]:
        if t < run.iterations:
            expected = [FORMULAS[name](t) * ratio for ratio in (1, 2, 1, 2)]
            assert run.optimizer.lr_at(t) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_scaled_rows_keep_their_shape(name, data):
    whole, tenth = (Run(ROWS[name], 0, Scale(Fraction(f)), data) for f in ("1", "0.1"))
    assert whole.iterations == 10 * tenth.iterations
    steps = range(0, tenth.iterations, 97)
    rates = [tenth.optimizer.lr_at(t)[0] for t in steps]
    # One-cycle's last step is the one that has the last rate, whatever its length.
    tolerance = 2e-2 if name == "one_cycle" else 1e-9
    assert rates == pytest.approx([whole.optimizer.lr_at(10 * t)[0] for t in steps], rel=tolerance)


def test_published_figures():
    """Tables 1 and 3 of the paper, as (iterations, accuracy in percent)."""
    found = {
        name: (row.iterations, row.published) for name, row in ROWS.items() if row.table != "beyond"
    }
    assert found == {
        "fixed": (70_000, 81.4), "fixed-stepped": (70_000, 81.4), "triangular2": (25_000, 81.4),
        "decay": (25_000, 78.5), "exp": (70_000, 79.1),
        "exp_range": (42_000, 82.2), "exp_range_bounds": (42_000, 82.2),
        "nesterov-fixed": (70_000, 82.1), "nesterov-triangular": (25_000, 81.3),
        "adam-fixed": (70_000, 81.4), "adam-triangular": (25_000, 79.8),
        "adam-triangular-70k": (70_000, 81.1),
        "rmsprop-fixed": (70_000, 75.2), "rmsprop-triangular": (25_000, 72.8),
        "rmsprop-triangular-70k": (70_000, 75.1),
        "adagrad-fixed": (70_000, 74.6), "adagrad-triangular": (25_000, 76.0),
        "adadelta-fixed": (70_000, 67.3), "adadelta-triangular": (25_000, 67.3),
    }  # fmt: skip
    assert all(reference in ROWS for row in ROWS.values() for reference in row.references)


@pytest.mark.parametrize("factor", ["1/3", "0.0001"])
def test_scales_that_leave_no_whole_lengths_are_refused(factor):
    with pytest.raises(ValueError, match="must be a whole number >= 1"):
        Scale(Fraction(factor)).steps(2000)


def test_stages_are_table_2_scaled():
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in paper.stages(Scale(Fraction("0.1"))).splitlines()[2:]
    ]
    assert table == [
        ["0.001", "0.005", "200", "0", "1,600"],
        ["0.0001", "0.0005", "100", "1,600", "2,200"],
        ["1e-05", "5e-05", "50", "2,200", "2,500"],
    ]


# ---- Caffe's momentum


@pytest.mark.parametrize("nesterov", [False, True])
def test_caffes_momentum_is_torchs_at_a_constant_rate(nesterov):
    ours, theirs = (torch.tensor([1.0, -2.0], dtype=torch.float64) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
    caffe, plain = CaffeSGD([ours], **options), torch.optim.SGD([theirs], **options)
    for k in range(5):
        for param, optimizer in ((ours, caffe), (theirs, plain)):
            param.grad = torch.tensor([0.5 + k, -1.0], dtype=torch.float64)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("nesterov", "expected"), [(False, -0.36), (True, -0.594)])
def test_caffes_momentum_keeps_the_rate_of_its_time(nesterov, expected):
    """By hand, gradients 1 and 0.85 under rates 0.1 and 0.2: V is 0.1, then 0.09 + 0.17 = 0.26.

    Plain that is −0.1 − 0.26, Nesterov's −1.9·0.1 − (1.9·0.26 − 0.9·0.1).
    """
    param = torch.zeros(1, dtype=torch.float64)
    optimizer = CaffeSGD([param], lr=0.1, momentum=0.9, nesterov=nesterov)
    for lr, grad in ((0.1, 1.0), (0.2, 0.85)):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    assert param.item() == pytest.approx(expected)


# ---- runs


def _main(folder, out, *options):
    return main(
        [
            "bench",
            "paper",
            "--data",
            str(folder),
            "--out",
            str(out),
            "--threads",
            "1",
            *map(str, options),
        ]
    )


def _results(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# 25,000 iterations as 200, step size 2,000 as 16: scale 1/125.
TWO_HUNDRED = ("--scale", "1/125", "--data-note", "made up")


def _stop_at(monkeypatch, *iterations, signals=(signal.SIGTERM,)):
    """Have a signal come in while these iterations are taken."""
    real = Run.iterate
    left = list(iterations)

    def iterate(run):
        real(run)
        if left and run.iteration == left[0]:
            left.pop(0)
            for number in signals:
                signal.raise_signal(number)

    monkeypatch.setattr(Run, "iterate", iterate)


@pytest.mark.parametrize("row", ["nesterov-triangular", "adam-triangular"])
def test_interrupted_and_resumed_gives_the_same_weights(
    row, folder, tmp_path, small, monkeypatch, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--rows", row, *TWO_HUNDRED)
    assert _main(folder, whole, *options) == 0
    (expected,) = _results(whole)
    assert expected["iterations"] == 200
    assert max(value for _, value in expected["curve"]) > 20  # it learns, of ten classes
    assert [point[0] for point in expected["curve"]] == [*range(8, 200, 8), 200]

    _stop_at(monkeypatch, 83, 160)
    assert _main(folder, parts, *options) == 128 + signal.SIGTERM
    assert "stopped after 83 of 200" in capsys.readouterr().err
    assert os.listdir(parts) == [f"checkpoint-{row}-0.pt"]
    assert _main(folder, parts, *options, "--resume") == 128 + signal.SIGTERM
    assert _main(folder, parts, *options, "--resume") == 0
    (found,) = _results(parts)
    for key in ("weights", "curve", "accuracy", "schedule", "data", "data_note"):
        assert found[key] == expected[key], key
    assert not list(parts.glob("checkpoint*"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_resume_does_what_is_left(folder, tmp_path, small, monkeypatch, capsys):
    options = ("--rows", "window-welch,window-hann", "--scale", "1/400")
    _stop_at(monkeypatch, 30, signals=(signal.SIGINT,))
    assert _main(folder, tmp_path, *options) == 128 + signal.SIGINT
    assert _main(folder, tmp_path, *options, "--resume", "--seeds", "2") == 0
    done = [(run["row"], run["seed"]) for run in _results(tmp_path)]
    assert done == [(row, seed) for seed in (0, 1) for row in ("window-welch", "window-hann")]
    weights = {run["weights"] for run in _results(tmp_path)}
    assert len(weights) == 4
    capsys.readouterr()
    taken = []
    monkeypatch.setattr(Run, "iterate", taken.append)
    assert _main(folder, tmp_path, *options, "--resume") == 0
    assert not taken
    assert "| window-hann | – |" in capsys.readouterr().out


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_signal_ends_it_at_once(folder, tmp_path, small, monkeypatch):
    _stop_at(monkeypatch, 3, signals=(signal.SIGINT, signal.SIGINT))
    options = ("--rows", "window-hann", "--scale", "1/400")
    assert _main(folder, tmp_path, *options) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_request_to_end_may_come_twice(folder, tmp_path, small, monkeypatch):
    """As ``timeout`` sends it, to the process and to its group."""
    _stop_at(monkeypatch, 3, signals=(signal.SIGTERM, signal.SIGTERM))
    options = ("--rows", "window-hann", "--scale", "1/400")
    assert _main(folder, tmp_path, *options) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == ["checkpoint-window-hann-0.pt"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_checkpoints_come_by_the_clock_and_whole(data, tmp_path, monkeypatch):
    store = Store(tmp_path)
    run = Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), data)
    saved = []

    def save(run):
        store.save(run)
        saved.append(run.iteration)

    assert not paper.train([run], save, lambda: 0, lambda run: None, 0.0)
    assert saved[:6] == [0, 1, 2, 3, 3, 4]  # before each iteration and each evaluation
    before = store.checkpoint("window-hann", 0).read_bytes()

    def torn(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space left"):
        store.save(run)
    assert store.checkpoint("window-hann", 0).read_bytes() == before


def test_runs_beside_each_other_are_those_alone(data, tmp_path):
    """Iterations in turn, three at a time of four, one of which is begun when there is room."""
    names = ("window-hann", "adam-triangular", "one_cycle", "window-welch")
    scale = Scale(Fraction("1/500"))
    order, weights = [], {}

    def finish(run):
        weights.setdefault(run.row.name, []).append(run.result()["weights"])

    for together in (1, 3):
        runs = (Run(ROWS[name], 0, scale, data) for name in names)
        del order[:]
        left = paper.train(
            runs, lambda run: None, lambda: 0, lambda run: order.append(run.row.name), 1e9,
            together, finish,
        )  # fmt: skip
        assert left == []
    assert order[:6] == [*names[:3]] * 2
    assert len(weights) == 4
    assert all(alone == beside for alone, beside in weights.values())


def test_all_runs_under_way_are_saved_and_gone_on_with(data, tmp_path):
    store, scale = Store(tmp_path), Scale(Fraction("1/500"))

    def runs():
        for name in ("window-hann", "one_cycle", "window-welch"):
            run = Run(ROWS[name], 0, scale, data)
            store.load(run)
            yield run

    stops = iter([0] * 20 + [15])
    show = lambda run: None  # noqa: E731
    left = paper.train(runs(), store.save, lambda: next(stops), show, 1e9, together=2)
    assert [run.row.name for run in left] == ["window-hann", "one_cycle"]
    assert all(0 < run.iteration < run.iterations for run in left)
    finished = []
    assert paper.train(runs(), store.save, lambda: 0, show, 1e9, 2, finished.append) == []
    assert sorted(run.row.name for run in finished) == ["one_cycle", "window-hann", "window-welch"]
    alone = Run(ROWS["one_cycle"], 0, scale, data)
    assert paper.train([alone], store.save, lambda: 0, show, 1e9) == []
    (resumed,) = (run for run in finished if run.row.name == "one_cycle")
    assert resumed.result()["weights"] == alone.result()["weights"]


class FakeGraphs:
    """What stands for a GPU on a CPU: its graph is the step, which it keeps alive."""

    def capture(self, step, warm_up):
        for _ in range(warm_up):
            step()
        return lambda: step()


def test_a_captured_iteration_is_counted_as_any_other(data, monkeypatch):
    """On a CPU, with what stands for the graph: as many iterations, batches and steps."""

    monkeypatch.setattr(paper, "Gpu", FakeGraphs)
    runs = []
    for on_kernels in (False, True):
        run = Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), data)
        run.on_kernels = on_kernels
        assert not paper.train([run], lambda run: None, lambda: 0, lambda run: None, 1e9)
        assert (run.iteration, run.optimizer.iteration, run.batches.position) == (60, 60, 60)
        runs.append(run)
    plain, captured = (run.result() for run in runs)
    assert plain["weights"] == captured["weights"]
    assert plain["curve"] == captured["curve"]


@pytest.mark.parametrize("on_kernels", [False, True])
def test_a_finished_run_is_gone_with_its_images(on_kernels, data, monkeypatch):
    """At once: of the seventy runs of three seeds, each has its own copy of 154 MB."""

    monkeypatch.setattr(paper, "Gpu", FakeGraphs)
    finished = []

    def runs():
        for name in ("window-hann", "one_cycle"):
            run = Run(ROWS[name], 0, Scale(Fraction("1/400")), data)
            run.on_kernels = on_kernels
            yield run

    def finish(run):
        finished.append((weakref.ref(run), weakref.ref(run.batches._rows)))

    gc.collect()
    gc.disable()
    try:
        assert not paper.train(
            runs(), lambda run: None, lambda: 0, lambda run: None, 1e9, 1, finish
        )
        assert [ref() for refs in finished for ref in refs] == [None] * 4
    finally:
        gc.enable()


def test_the_last_accuracy_is_over_all_test_images(data, monkeypatch):
    monkeypatch.setattr(paper, "_ON_THE_WAY", 30)
    counts = []
    monkeypatch.setattr(paper, "accuracy", lambda model, images, mean: counts.append(len(images)))
    run = Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), data)
    monkeypatch.setattr(run, "_one", lambda: None)
    assert not paper.train([run], lambda run: None, lambda: 0, lambda run: None, 1e9)
    assert counts == [30] * 19 + [100]  # 60 iterations, every 3


def test_the_same_seed_is_the_same_weights_and_batches_for_all_rows(data):
    one, other = (Run(ROWS[name], 4, Scale(), data) for name in ("fixed", "adam-fixed"))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.batches.sample()[0], other.batches.sample()[0])


def test_caffes_momentum_is_said_and_does_something(folder, tmp_path, small, capsys):
    options = ("--rows", "one_cycle", "--scale", "1/400")
    assert _main(folder, tmp_path / "torch", *options) == 0
    assert "Momentum as in torch" in capsys.readouterr().out
    assert _main(folder, tmp_path / "caffe", *options, "--caffe-momentum") == 0
    assert "Momentum as in Caffe" in capsys.readouterr().out
    (plain,), (caffe,) = _results(tmp_path / "torch"), _results(tmp_path / "caffe")
    assert (plain["momentum"], caffe["momentum"]) == ("torch", "caffe")
    assert plain["weights"] != caffe["weights"]


# ---- the folder


def _result(row="fixed", seed=0, accuracy=80.0, iterations=None, cycles=0.0, finite=True, note=""):
    iterations = iterations or ROWS[row].iterations
    return {
        "row": row, "seed": seed, "scale": "1", "momentum": "torch", "batch_size": 100,
        "data": "d", "device": "cpu", "test_images": 10_000,
        "iterations": iterations, "cycles": cycles,
        "accuracy": accuracy, "curve": [[iterations // 2, accuracy - 5], [iterations, accuracy]],
        "finite": finite, "training_s": 3700.0, "data_note": note,
        "machine": {"cpu": "abacus", "threads": 2, "torch": "2", "clr_optim": "0"},
    }  # fmt: skip


def test_a_line_that_was_cut_off_is_not_a_result(tmp_path):
    store = Store(tmp_path)
    assert store.is_empty()
    assert store.read() == []
    store.append(_result())
    with store.results.open("a") as file:
        file.write('{"row": "exp", "se')
    assert [run["row"] for run in store.read()] == ["fixed"]
    store.append(_result("decay"))
    assert [run["row"] for run in store.read()] == ["fixed", "decay"]
    assert not store.is_empty()


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"row": "fixed", "seed": 0}\nnonsense\n')
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2: no result of a run"):
        Store(tmp_path).read()


def test_a_row_of_another_version_is_refused(tmp_path):
    Store(tmp_path).append({**_result(), "row": "of tomorrow"})
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: no result of a run"):
        Store(tmp_path).read()


@pytest.mark.parametrize("contents", [b"", b"no checkpoint", None])
def test_a_checkpoint_of_something_else_is_refused_by_name(
    contents, folder, tmp_path, small, monkeypatch, capsys
):
    out = tmp_path / "out"
    path = Store(out).checkpoint("nesterov-triangular", 0)
    torch.save({"step": 3}, path)
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(SystemExit):
        _main(folder, out, "--rows", "nesterov-triangular", *TWO_HUNDRED, "--resume")
    error = capsys.readouterr().err
    assert f"{path}: no checkpoint of a run" in error
    assert "remove it to begin the run anew" in error


def test_to_report_on_nothing_makes_nothing(tmp_path):
    with pytest.raises(ValueError, match="no finished run to report on"):
        paper.report(tmp_path / "not there")
    assert not (tmp_path / "not there").exists()


# ---- the report


def _sentences(results):
    return {row["row"]: row.get("relation") for row in paper.summarize(results)}


def test_relations_that_hold_and_that_do_not():
    results = [
        _result("fixed", accuracy=80.0),
        _result("fixed-stepped", accuracy=81.5),
        _result("triangular2", accuracy=80.2, cycles=10.0),
        _result("decay", accuracy=80.6),
        _result("exp_range", accuracy=78.5, cycles=10.5),
    ]
    sentences = _sentences(results)
    assert sentences["fixed"] == (
        "`fixed`: 80.00 % after 70,000 iterations; the others are compared with it."
    )
    assert sentences["fixed-stepped"] == (
        "`fixed-stepped`: 81.50 % after 70,000 iterations; more accurate than `fixed` (80.00 %, "
        "+1.50, within 1.11 being the same)."
    )
    assert sentences["triangular2"] == (
        "`triangular2`: 80.20 % after 25,000 iterations; as accurate as `fixed` (80.00 %, +0.20, "
        "within 1.13 being the same) in 36% of its iterations, as in the paper (81.4 against "
        "81.4 %): its relation holds here; less accurate than `fixed-stepped` (81.50 %, -1.30, "
        "within 1.11 being the same) in 36% of its iterations, which in the paper is as accurate "
        "as it (81.4 against 81.4 %): its relation does not hold here."
    )
    assert "in the paper is less accurate than it (78.5 against 81.4 %)" in sentences["decay"]
    assert "in the middle of cycle 11; less accurate than `fixed`" in sentences["exp_range"]
    assert sentences["exp"] is None


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (77.5, "as in the paper (78.5 against 81.4 %): its relation holds here"),
        (70.0, "but by another amount: its relation holds here in direction only"),
        (79.5, "in the paper is less accurate than it (78.5 against 81.4 %): its relation does"),
    ],
)
def test_a_difference_of_another_size_holds_in_direction_only(accuracy, words):
    sentences = _sentences([_result("fixed", accuracy=80.0), _result("decay", accuracy=accuracy)])
    assert words in sentences["decay"]


def test_more_than_the_paper_promises_of_fewer_iterations():
    fixed = _result("fixed", accuracy=76.0)
    sentences = _sentences([fixed, _result("triangular2", accuracy=79.0)])
    assert "more accurate than `fixed` (76.00 %, +3.00" in sentences["triangular2"]
    assert sentences["triangular2"].endswith(
        "(81.4 against 81.4 %): its relation holds here, and more."
    )
    # Of as many iterations it is another relation.
    rows = [
        _result("rmsprop-fixed", accuracy=70.0),
        _result("rmsprop-triangular-70k", accuracy=75.0),
    ]
    assert _sentences(rows)["rmsprop-triangular-70k"].endswith("its relation does not hold here.")
    table = paper.readme_table(paper.summarize([fixed, _result("triangular2", accuracy=79.0)]))
    assert any("| holds, and more: more accurate than fixed (+3.0 points" in line for line in table)


def test_spread_over_seeds_widens_what_is_the_same():
    results = [
        _result(row, seed, value)
        for row, values in (("adam-fixed", (78, 82)), ("adam-triangular", (77, 79)))
        for seed, value in enumerate(values)
    ]
    fixed, cyclic = (
        row for row in paper.summarize(results) if "accuracy" in row and "adam" in row["row"]
    )
    assert (fixed["accuracy"], fixed["seeds"]) == (80.0, 2)
    assert fixed["spread"] == pytest.approx(math.sqrt(8))
    # Two standard errors of the difference: by 10,000 images at 80 and 78 %, and by the seeds.
    same = 2 * math.sqrt(0.8 * 0.2 + 0.78 * 0.22 + 8 / 2 + 2 / 2)
    assert f"within {same:.2f} being the same" in cyclic["relation"]
    assert "as accurate as `adam-fixed`" in cyclic["relation"]
    assert cyclic["curve"] == [(12_500, 73.0), (25_000, 78.0)]


def test_curves_whose_points_do_not_all_agree():
    """A resumed run may have been looked at an iteration later."""
    one, other = _result(), _result(seed=1)
    other["curve"] = [[11, 1.0], [35_000, 76.0], [70_000, 80.0]]
    (summary,) = (row for row in paper.summarize([one, other]) if "curve" in row)
    assert summary["curve"] == [(35_000, 75.5), (70_000, 80.0)]


def test_rows_without_their_comparison_and_broken_ones_say_so():
    sentences = _sentences(
        [_result("window-welch", accuracy=70.0), _result("one_cycle", accuracy=10.0, finite=False)]
    )
    assert "`window-triangle` to compare it with: not run" in sentences["window-welch"]
    assert "its weights no longer finite" in sentences["one_cycle"]
    sentences = _sentences([_result("window-triangle"), _result("window-hann", accuracy=78.5)])
    assert sentences["window-hann"].endswith("the windows are not equivalent here.")


def test_report_drops_no_row_and_repeats_the_note(tmp_path, capsys):
    store = Store(tmp_path)
    for seed, value in enumerate((80.0, 81.0)):
        store.append(_result("fixed", seed, value, note="recompressed"))
    store.append(_result("triangular2", 0, 79.0, cycles=10.0, note="recompressed"))
    store.append(_result("adam-fixed", 0, 79.0, note="recompressed"))
    assert main(["bench", "paper", "--report", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "paper.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    lines = text.splitlines()
    assert "| fixed | 81.4 at 70,000 | 80.50 ± 0.71 | 70,000 | 2 | 1:01:40 |" in lines
    assert "| triangular2 | 81.4 at 25,000 | 79.00 | 25,000 (10 cycles) | 1 | 1:01:40 |" in lines
    assert "| exp | 79.1 at 70,000 | not run | | | |" in lines
    assert "Data: recompressed" in lines
    named = [row.name for row in ROWS.values() if row.table != "beyond"]
    assert [line.split()[1] for line in lines if line.startswith("| ") and " at " in line] == named
    whole = json.loads((tmp_path / "paper.json").read_text())
    assert len(whole["runs"]) == 4
    assert whole["runs"][0]["machine"]["cpu"] == "abacus"
    for name in ("table-1.png", "table-3.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width == 700


def test_without_matplotlib_there_are_results_and_no_pictures(tmp_path, capsys, monkeypatch):
    Store(tmp_path).append(_result())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "paper", "--report", "--out", str(tmp_path)]) == 0
    assert "pip install clr-optim[plot]; then --report draws them" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["paper.json", "paper.md", "results.jsonl"]


def test_the_readmes_table_is_renewed_between_its_marks(tmp_path, capsys):
    store = Store(tmp_path / "out")
    for row, value in (("fixed", 80.0), ("triangular2", 80.4), ("decay", 80.6), ("adam-fixed", 7)):
        store.append(_result(row, 0, value))
    store.append(_result("window-welch"))
    readme = tmp_path / "readme.md"
    readme.write_text(f"above\n{paper._BEGIN}\nold\n{paper._END}\nbelow\n")
    options = ["bench", "paper", "--report", "--out", str(store.folder), "--readme"]
    for _ in range(2):  # the second time over its own
        assert main([*options, str(readme)]) == 0
    above, begin, *lines, end, below = readme.read_text().splitlines()
    assert (above, begin, end, below) == ("above", paper._BEGIN, paper._END, "below")
    assert [line.split()[1] for line in lines[2:]] == list(ROWS)  # none is dropped
    assert "| exp | 79.1 (70,000) | not run | |" in lines
    assert "| fixed | 81.4 (70,000) | 80.0 (70,000) |  |" in lines
    for line in (
        "| triangular2 | 81.4 (25,000) | 80.4 (25,000) | holds: as accurate as fixed (+0.4 points, "
        "+0.0 in the paper) |",
        "| decay | 78.5 (25,000) | 80.6 (25,000) | **does not hold**: as accurate as fixed (+0.6 "
        "points, -2.9 in the paper) |",
    ):
        assert line in lines
    readme.write_text("nothing")
    with pytest.raises(SystemExit):
        main([*options, str(readme)])
    assert "has no place for the table: put these lines in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "paper", "--data", "x", "--table", "1", "--readme", str(readme)])
    assert "only with --report" in capsys.readouterr().err


# ---- the command


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--table", "4"], "no table '4'; there are 1, 2, 3, beyond"),
        (["--rows", "fixed,nonsense"], "no row 'nonsense'; there are fixed, fixed-stepped"),
        ([], "give --table 1, 2, 3 or beyond, or --rows"),
        (["--table", "3", "--rows", "exp"], "--rows exp: not in table 3"),
        (["--table", "1", "--scale", "0.0001"], "turns 5,000 iterations into 0.5"),
        (["--table", "1", "--scale", "1/3"], "a multiple of 0.01 serves all rows"),
        (["--table", "1", "--scale", "-1"], "must be a number above 0, as 0.1 or 1/10, got '-1'"),
        (["--table", "1", "--seeds", "0"], "must be a whole number >= 1, got '0'"),
        (["--table", "1", "--checkpoint-every", "soon"], "a number of minutes >= 0, got 'soon'"),
        (["--table", "1", "--device", "abacus"], "must be cpu or cuda, got 'abacus'"),
        (["--table", "1", "--together", "2"], "--together 2: only on a GPU; on a CPU start a"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_are_refused_before_anything_is_trained(options, words, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        _main(folder, tmp_path / "out", *options)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_and_data_that_do_not_go_together_are_refused(folder, tmp_path, small, capsys):
    def error(*options, data=folder):
        with pytest.raises(SystemExit):
            _main(data, tmp_path / "out", "--rows", "window-hann", *options)
        return capsys.readouterr().err.splitlines()[-1]

    assert _main(folder, tmp_path / "out", "--rows", "window-hann", "--scale", "1/400") == 0
    capsys.readouterr()
    assert "there are results; add --resume" in error("--scale", "1/400")
    assert "has scale '1/400', and this run '1/200'" in error("--scale", "1/200", "--resume")
    assert "has momentum 'torch'" in error("--scale", "1/400", "--resume", "--caffe-momentum")
    write_slice(tmp_path / "other", seed=1)
    assert "has data" in error("--scale", "1/400", "--resume", data=tmp_path / "other")
    assert "CIFAR-10 binary version" in error("--scale", "1/400", data=tmp_path / "nowhere")
    assert "has batch_size 10, and this run 20" in _with_batches(20, error)


def _with_batches(size, error):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "_BATCH_SIZE", size)
        return error("--scale", "1/400", "--resume")


def test_another_runs_checkpoint_is_refused(data, tmp_path):
    store = Store(tmp_path)
    store.save(Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), data))
    other = Run(ROWS["window-hann"], 0, Scale(Fraction("1/200")), data)
    with pytest.raises(ValueError, match=r"checkpoint-window-hann-0\.pt: .* has scale '1/400'"):
        store.load(other)


def test_too_few_images_are_refused(tmp_path, capsys):
    write_slice(tmp_path / "bin", per_file=19)
    with pytest.raises(SystemExit):
        _main(tmp_path / "bin", tmp_path / "out", "--table", "1")
    assert "95 training images, fewer than a batch of 100" in capsys.readouterr().err


def test_speed_has_its_variants(folder, tmp_path, small, capsys):
    assert _main(folder, tmp_path, "--speed", "10") == 0
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert set(speed["iterations_per_s"]) == {
        "clr_optim", "torch.optim.SGD + CyclicLR", "the same, fused"
    }  # fmt: skip
    assert all(rate > 0 for rate in speed["iterations_per_s"].values())
    Store(tmp_path).append(_result())
    assert "Iterations per second on cpu: clr_optim" in paper.report(tmp_path)


def test_torchs_iteration_is_the_same_training(data):
    """What the speed is compared with does the same work."""
    ours = paper._speed_run(data, "cpu")
    models = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            paper, "cifar10_full", lambda seed: models.append(cifar10_full(seed)) or models[-1]
        )
        iterate = paper._torch_iteration(data, "cpu", None)
    for _ in range(5):
        ours.iterate()
        iterate()
    for a, b in zip(ours.model.parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_python_m():
    done = subprocess.run(
        [sys.executable, "-m", "clr_optim", "bench", "paper", "--table", "1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--data is missing" in done.stderr


# ---- on a GPU


@pytest.mark.gpu
def test_a_captured_run_trains_as_an_eager_one(data, folder):
    there = paper.read(folder, "cuda")
    accuracies = []
    for on_kernels in (False, True):
        run = Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), there, device="cuda")
        run.on_kernels = on_kernels  # else no graph
        graphs = []
        show = lambda run: graphs.append(run._graph is not None)  # noqa: E731, B023
        assert not paper.train([run], lambda run: None, lambda: 0, show, 1e9)
        assert any(graphs) is on_kernels
        assert (run.iteration, run.optimizer.iteration, run.batches.position) == (60, 60, 60)
        accuracies.append([value for _, value in run.curve])
    # Convolutions need not be the same bits from run to run.
    assert accuracies[1] == pytest.approx(accuracies[0], abs=10)


@pytest.mark.gpu
def test_captured_runs_beside_each_other_are_those_alone(folder, monkeypatch):
    """On streams of their own, none of them reading what another writes."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    there = paper.read(folder, "cuda")
    names = ("window-hann", "adam-triangular", "one_cycle", "window-welch", "nesterov-triangular")
    found = {name: [] for name in names}
    for together in (1, 5):
        runs = (
            Run(ROWS[name], 0, Scale(Fraction("1/500")), there, device="cuda") for name in names
        )
        left = paper.train(
            runs, lambda run: None, lambda: 0, lambda run: None, 1e9, together,
            lambda run: found[run.row.name].append(run.curve),
        )  # fmt: skip
        assert left == []
    for alone, beside in found.values():
        assert len(alone) > 10
        for (at, value), (same, other) in zip(alone, beside, strict=True):
            assert at == same
            assert other == pytest.approx(value, abs=10)


@pytest.mark.gpu
def test_a_captured_run_resumes(folder, small, tmp_path):
    there = paper.read(folder, "cuda")
    store = Store(tmp_path)
    scale = Scale(Fraction("1/400"))
    first = Run(ROWS["window-hann"], 0, scale, there, device="cuda")
    stops = iter([0] * 30 + [15] * 100)
    left = paper.train([first], store.save, lambda: next(stops), lambda run: None, 1e9)
    assert left == [first]
    second = Run(ROWS["window-hann"], 0, scale, there, device="cuda")
    assert store.load(second)
    assert second.optimizer.iteration == second.batches.position == first.iteration
    assert not paper.train([second], store.save, lambda: 0, lambda run: None, 1e9)
    assert (second.iteration, second.optimizer.iteration, second.batches.position) == (60, 60, 60)
