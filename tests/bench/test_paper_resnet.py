"""Table 4 of the paper: its rows, its runs and its report."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from paper_helpers import FakeGraphs, result_of, results_of, run_paper, stop_at, write_slice
from PIL import Image

from clr_optim.bench.cifar10 import read_cifar100
from clr_optim.bench.paper import RESNET, Run, Scale, one_run, summarize
from clr_optim.bench.paper.deep_networks import densenet, resnet, stochastic_resnet
from clr_optim.bench.paper.known import KNOWN
from clr_optim.bench.paper.readme import END, resnet_mark
from clr_optim.bench.paper.report import report
from clr_optim.bench.paper.resnet import DATASETS
from clr_optim.bench.paper.store import Store
from clr_optim.bench.paper.training import train
from clr_optim.cli import main

CIFAR10 = [row for row in RESNET.values() if row.table == "resnet"]
NETWORKS = ("resnet-20", "resnet-56", "stochastic-20", "stochastic-56", "densenet-40")
#: the scales of 200 iterations
SCALES = {"resnet-20": "1/320", "stochastic-20": "1/880", "densenet-40": "1/1170"}
SMALL = {
    "resnet-20": partial(resnet, 8),
    "stochastic-20": partial(stochastic_resnet, 8),
    "densenet-40": partial(densenet, 7, 4),
}


def small_row(name):
    """Return a row with a small network and batches of ten."""
    row = RESNET[name]
    build = SMALL[row.network.name]
    classes = DATASETS[row.table]
    network = replace(row.network, build=partial(build, classes), batch_size=10)
    return replace(row, network=network)


@pytest.fixture
def small_networks(monkeypatch):
    for name, row in RESNET.items():
        if row.network.name in SMALL:
            monkeypatch.setitem(KNOWN, name, small_row(name))


# ---- rows

#: the last epochs at each rate, and the whole length, as the originals' code has them
EPOCHS = {"resnet": (80, 121, 164), "stochastic": (249, 374, 500), "densenet": (149, 224, 300)}


def _factor(row, t, iterations):
    first, second, last = EPOCHS[row.name.partition("-")[0]]
    if t < round(iterations * first / last):
        return 1.0
    return 0.1 if t < round(iterations * second / last) else 0.01


def _rate(row, t, iterations):
    """Compute a rate by the paper's code: the triangle, times the factor of the time."""
    low, top = row.bounds
    step_size = iterations / 20
    cycle = math.floor(1 + t / (2 * step_size))
    x = abs(t / step_size - 2 * cycle + 1)
    return _factor(row, t, iterations) * (low + (top - low) * max(0, 1 - x))


@pytest.mark.parametrize("row", CIFAR10, ids=lambda row: row.name)
@pytest.mark.parametrize("scale", ["1", "0.01"])
def test_rates_are_the_originals_at_every_border(row, scale):
    scale = Scale(Fraction(scale))
    schedule, iterations = row.schedule(scale), scale.steps(row.iterations)
    epochs = EPOCHS[row.name.partition("-")[0]]
    borders = [round(iterations * epoch / epochs[-1]) for epoch in epochs[:2]]
    corners = [iterations * k // 20 for k in range(20)]
    near = {at + by for at in (*borders, *corners) for by in (-1, 0, 1)}
    steps = [t for t in sorted({*near, *range(0, iterations, 997), iterations - 1}) if t >= 0]
    expected = [_rate(row, t, iterations) for t in steps]
    assert schedule(steps, *row.bounds).tolist() == pytest.approx(expected, rel=1e-9)
    for at, factor in zip(borders, (0.1, 0.01), strict=True):
        assert _factor(row, at - 1, iterations) == pytest.approx(10 * factor)
        assert _factor(row, at, iterations) == factor


@pytest.mark.parametrize("name", [name for name in RESNET if name.endswith("-clr")])
@pytest.mark.parametrize("scale", ["1", "0.01"])
def test_a_cycled_run_ends_at_the_end_of_its_tenth_cycle(name, scale):
    row, scale = RESNET[name], Scale(Fraction(scale))
    schedule, iterations = row.schedule(scale), scale.steps(row.iterations)
    assert schedule.cycle(iterations) == 10.0
    ends = [iterations * k // 10 for k in range(1, 11)]
    assert [t for t in ends if schedule.is_cycle_end(t)] == ends
    assert schedule(iterations, *row.bounds) == pytest.approx(0.001)


def test_the_lengths_are_the_originals_within_a_five_hundredth():
    lengths = {"resnet": (50_000, 128), "stochastic": (45_000, 128), "densenet": (50_000, 64)}
    for row in CIFAR10:
        network = row.name.partition("-")[0]
        images, batch = lengths[network]
        assert row.network.batch_size == batch
        assert row.network.share == Fraction(images, 50_000)
        epochs = row.iterations * batch / images
        assert epochs == pytest.approx(EPOCHS[network][-1], rel=0.002)


def test_the_rows_are_those_of_table_4():
    """Accuracies in percent at the initial rates 0.1, 0.2, 0.3, and with cycles."""
    published = {
        ("resnet", "resnet"): (92.8, 93.3, 91.8, 93.6),
        ("resnet", "stochastic"): (94.6, 94.5, 94.2, 94.5),
        ("resnet", "densenet"): (94.5, 94.5, 94.2, 94.9),
        ("resnet-100", "resnet"): (71.2, 71.6, 71.9, 72.5),
        ("resnet-100", "stochastic"): (75.2, 75.2, 74.6, 75.4),
        ("resnet-100", "densenet"): (75.2, 75.3, 74.5, 75.9),
    }
    assert len(RESNET) == 40
    for table, prefix in (("resnet", ""), ("resnet-100", "cifar100-")):
        for network in NETWORKS:
            names = [f"{prefix}{network}-{label}" for label in ("0.1", "0.2", "0.3", "clr")]
            rows = [RESNET[name] for name in names]
            kind = network.partition("-")[0]
            assert tuple(row.published for row in rows) == published[table, kind]
            top = 0.2 if kind == "densenet" else 0.3
            bounds = [(0.1, 0.1), (0.2, 0.2), (0.3, 0.3), (0.1, top)]
            assert [row.bounds for row in rows] == bounds
            assert rows[3].references == tuple(names[:3])
            assert {row.table for row in rows} == {table}


@pytest.mark.parametrize("name", SMALL)
def test_the_optimizer_is_that_of_the_papers(name, folder, data):
    run = Run(RESNET[f"{name}-clr"], 0, Scale(Fraction("0.01")), data)
    (group,) = run.optimizer.param_groups
    assert type(run.optimizer.optimizer) is torch.optim.SGD
    assert {key: group[key] for key in ("momentum", "nesterov", "weight_decay", "dampening")} == {
        "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "dampening": 0,
    }  # fmt: skip
    assert len(group["params"]) == len(list(run.model.parameters()))
    share = Fraction(9, 10) if name == "stochastic-20" else 1
    assert run.settings["training_images"] == run.batches.images == 500 * share
    assert run.settings["batch_size"] == (64 if name == "densenet-40" else 128)


# ---- runs


@pytest.mark.parametrize("name", SMALL)
def test_interrupted_and_resumed_gives_the_same_weights(
    name, folder, tmp_path, small_networks, monkeypatch, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    row = f"{name}-clr"
    options = ("--table", "resnet", "--rows", row, "--scale", SCALES[name])
    assert run_paper(folder, whole, *options) == 0
    (expected,) = results_of(whole)
    assert expected["iterations"] == 200
    assert expected["cycles"] == 10.0
    assert [at for at, _ in expected["curve"]] == [*range(20, 201, 20)]
    assert expected["accuracy"] > 20  # the network learns; chance is 10

    stop_at(monkeypatch, 83, 160)
    assert run_paper(folder, parts, *options) == 128 + signal.SIGTERM
    assert "stopped after 83 of 200" in capsys.readouterr().err
    assert run_paper(folder, parts, *options, "--resume") == 128 + signal.SIGTERM
    assert run_paper(folder, parts, *options, "--resume") == 0
    (found,) = results_of(parts)
    for key in ("weights", "curve", "accuracy", "schedule", "data"):
        assert found[key] == expected[key], key


@pytest.mark.parametrize("name", SMALL)
def test_a_captured_iteration_draws_anew_at_each_replay(name, data, monkeypatch):
    """With a fake graph on a CPU: as many iterations and draws as without one."""
    monkeypatch.setattr(one_run, "Gpu", FakeGraphs)
    scale = Scale(10 * Fraction(20, RESNET[f"{name}-clr"].iterations) / 5)
    weights = []
    for on_kernels in (False, True):
        run = Run(small_row(f"{name}-clr"), 0, scale, data)
        run.on_kernels = on_kernels
        assert not train([run], lambda run: None, lambda: 0, lambda run: None, 1e9)
        assert (run.iteration, run.optimizer.iteration, run.batches.position) == (40, 40, 40)
        if name.startswith("stochastic"):
            assert run.model.draws == 40 * 3
        weights.append(run.result()["weights"])
    assert weights[0] == weights[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_a_captured_run_trains_as_an_eager_one(name, folder, monkeypatch):
    """The graph's draws are those of eager iterations: they come from counters on the device."""
    from clr_optim.bench.paper.data import read

    there, scale = read(folder, "cuda"), Scale(Fraction(SCALES[name]))
    accuracies = []
    for on_kernels in (False, True):
        run = Run(small_row(f"{name}-clr"), 0, scale, there, device="cuda")
        run.on_kernels = on_kernels
        assert not train([run], lambda run: None, lambda: 0, lambda run: None, 1e9)
        assert (run.iteration, run.optimizer.iteration, run.batches.position) == (200, 200, 200)
        accuracies.append(run.curve[-1][1])
    assert accuracies[1] == pytest.approx(accuracies[0], abs=15)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--table", "resnet,1"], "resnet stands alone"),
        (["--rows", "resnet-20-clr"], "not in table 1, 3, beyond; add --table resnet"),
        (["--table", "resnet", "--rows", "fixed"], "--rows fixed: not in table resnet"),
        (["--table", "resnet", "--scale", "1/3"], "a multiple of 0.01 serves all rows"),
        (["--table", "resnet", "--figure", "6"], "--figure 6 and --table resnet: give one"),
    ],
    ids=" ".join,
)
def test_options_are_refused_before_anything_is_trained(options, words, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_paper(folder, tmp_path / "out", *options)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", ["fixed", "resnet-20-clr"])
def test_a_folder_of_other_tables_is_refused(kept, folder, tmp_path, capsys):
    Store(tmp_path).append(result_of(kept, iterations=200))
    table = "1" if kept == "resnet-20-clr" else "resnet"
    with pytest.raises(SystemExit):
        run_paper(folder, tmp_path, "--table", table, "--resume")
    there = "resnet" if table == "1" else "1"
    assert f"there are results of table {there}; give another folder" in capsys.readouterr().err


# ---- CIFAR-100


def _write_cifar100(folder, count=60):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name in ("train.bin", "test.bin"):
        records = rng.integers(0, 256, size=(count, 2 + 3072), dtype=np.uint8)
        records[:, 0] %= 20
        records[:, 1] %= 100
        records.tofile(folder / name)
    return records


def test_cifar_100_has_fine_labels(tmp_path):
    records = _write_cifar100(tmp_path / "bin")
    training, test = read_cifar100(tmp_path / "bin")
    assert len(training) == len(test) == 60
    assert test.labels.tolist() == records[:, 1].tolist()
    assert np.array_equal(test.pixels.numpy().reshape(60, -1), records[:, 2:])


def test_other_files_are_refused_by_the_layout_of_cifar_100(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no train\.bin, test\.bin; expected the \"CIFAR-1"
    ):
        read_cifar100(tmp_path)
    _write_cifar100(tmp_path / "bin")
    path = tmp_path / "bin" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut off, or no CIFAR-100"):
        read_cifar100(tmp_path / "bin")
    np.full(3074, 255, dtype=np.uint8).tofile(path)
    with pytest.raises(ValueError, match=r"the label 255, .* are above 99: no CIFAR-100"):
        read_cifar100(tmp_path / "bin")


def test_the_command_in_the_report_runs_cifar_100(tmp_path, small_networks, capsys):
    """The report on CIFAR-10 names the command; it runs on a folder of the official files."""
    Store(tmp_path / "ten").append(_result("resnet-20-0.1", 90.0, scale="1/3200"))
    line = next(line for line in report(tmp_path / "ten").splitlines() if "cifar-100" in line)
    command = line.split("`")[1].split()
    assert command[:3] == ["clr-optim", "bench", "paper"]
    _write_cifar100(tmp_path / "bin")
    words = {"cifar-100-binary": str(tmp_path / "bin"), "resnet-100-out": str(tmp_path / "out")}
    arguments = [words.get(word, word) for word in command[1:]]
    assert main([*arguments, "--rows", "cifar100-resnet-20-clr", "--threads", "1"]) == 0
    (result,) = results_of(tmp_path / "out")
    assert (result["table"], result["iterations"]) == ("resnet-100", 20)
    text = capsys.readouterr().out
    assert "| cifar100-resnet-20-clr | 72.5 at 64,000 | " in text
    assert "| cifar100-resnet-20-0.1 | 71.2 at 64,000 | not run | | | |" in text
    assert "| resnet-20-0.1 | 92.8 at 64,000 | no data here | | | |" in text
    assert "--data cifar-10-batches-bin --table resnet --scale 1/3200" in text


# ---- report


def _result(row, accuracy, seed=0, scale="1/10"):
    iterations = RESNET[row].iterations // 10
    return {
        **result_of("fixed", seed, accuracy, iterations, 10.0 if row.endswith("clr") else 0.0),
        "row": row, "network": RESNET[row].network.name, "scale": scale,
        "batch_size": RESNET[row].network.batch_size, "training_images": 50_000,
    }  # fmt: skip


RESULTS = [
    _result("resnet-20-0.1", 88.5),
    _result("resnet-20-0.2", 89.0),
    _result("resnet-20-0.3", 89.2),
    _result("resnet-20-clr", 89.0),
    _result("resnet-20-clr", 90.0, seed=1),
    _result("densenet-40-clr", 90.0),
]


def test_sentences_say_whether_each_relation_holds():
    rows = {row["row"]: row for row in summarize(RESULTS)}
    assert list(rows) == list(RESNET)
    cycled = rows["resnet-20-clr"]
    assert (cycled["accuracy"], cycled["seeds"]) == (89.5, 2)
    assert cycled["spread"] == pytest.approx(math.sqrt(0.5))
    expected = {each["with"]: (each["expected"], each["holds"]) for each in cycled["comparisons"]}
    # The paper: 93.6 against 92.8, 93.3 and 91.8 %, where 0.7 points are two standard errors.
    assert expected == {
        "resnet-20-0.1": ("more accurate than", False),
        "resnet-20-0.2": ("as accurate as", True),
        "resnet-20-0.3": ("more accurate than", False),
    }
    # Two standard errors: of 10,000 images at 89.5 and 88.5 %, and of two seeds.
    same = 2 * math.sqrt(0.895 * 0.105 + 0.885 * 0.115 + 0.5 / 2)
    assert cycled["relation"].startswith(
        "`resnet-20-clr`: 89.50 % after 6,400 iterations; as accurate as `resnet-20-0.1` (88.50 %, "
        f"+1.00, within {same:.2f} being the same), which in the paper is more accurate than it "
        "(93.6 against 92.8 %): its relation does not hold here; "
    )
    assert rows["resnet-20-0.1"]["relation"].endswith("the others are compared with it.")
    assert rows["densenet-40-clr"]["relation"].endswith("to compare it with: not run.")
    assert "relation" not in rows["resnet-56-clr"]


def test_the_report_drops_no_network(tmp_path, capsys):
    store = Store(tmp_path)
    for result in RESULTS:
        store.append(result)
    readme = tmp_path / "readme.md"
    mark = resnet_mark("resnet", "1/10")
    readme.write_text(f"above\n{mark}\nold\n{END}\nbelow\n")
    command = ["bench", "paper", "--report", "--out", str(tmp_path), "--readme", str(readme)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "resnet.md").read_text().strip()
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("| ") and " at " in line]
    assert [line.split()[1] for line in table] == list(RESNET)
    assert (
        "| resnet-20-clr | 93.6 at 64,000 | 89.50 ± 0.71 | 6,400 (10 cycles) | 2 | 1:01:40 |"
        in lines
    )
    assert "| stochastic-56-clr | 94.5 at 176,000 | not run | | | |" in lines
    assert "| cifar100-densenet-40-clr | 75.9 at 234,000 | no data here | | | |" in lines
    assert "| AlexNet, triangular 0.01 to 0.015 over fixed | +0.4 | no data here |" in lines
    assert "`resnet-20`: 6,400 iterations of 128 images, 16.4 epochs of 50,000." in lines
    (best,) = (line for line in lines if "the best of its three fixed rates" in line)
    assert best.startswith(
        "- `resnet-20-clr` is as accurate as the best of its three fixed rates, "
    )
    assert "`resnet-20-0.3`: +0.30 points" in best
    assert "(+0.3 in the paper)" in best
    whole = json.loads((tmp_path / "resnet.json").read_text())
    assert (len(whole["rows"]), len(whole["runs"])) == (40, 6)
    with Image.open(tmp_path / "resnet.png") as picture:
        assert picture.width == 1400
    above, begin, *shown, end, below = readme.read_text().splitlines()
    assert (above, begin, end, below) == ("above", mark, END, "below")
    assert [line.split()[1] for line in shown[2:]] == [row.name for row in CIFAR10]


def test_the_report_of_a_run_stands_in_its_folder(folder, tmp_path, small_networks, capsys):
    options = ("--table", "resnet", "--rows", "resnet-20-0.1,resnet-20-clr", "--scale", "1/3200")
    assert run_paper(folder, tmp_path, *options, "--data-note", "made up") == 0
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "resnet.md").read_text().strip()
    assert "the originals' × 0.0003125" in text
    assert "Data: made up" in text
    write_slice(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit):
        run_paper(tmp_path / "other", tmp_path, *options, "--resume", "--seeds", "2")
    assert "has data" in capsys.readouterr().err


# ---- range tests


def test_range_test_of_a_network(small_networks, tmp_path, capsys):
    write_slice(tmp_path / "data")
    out = tmp_path / "out"
    options = ("--table", "resnet", "--rows", "resnet-20-0.1,resnet-20-clr", "--range-test", "40")
    assert run_paper(tmp_path / "data", out, *options, "--data-note", "made up") == 0
    whole = json.loads((out / "range-test-resnet-20.json").read_text())
    rates = whole["test"]["lrs"]
    assert len(rates) == 40
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(1)
    assert np.diff(rates) == pytest.approx(1 / 39)
    text = (out / "range-test-resnet-20.md").read_text()
    assert "made up" in text
    assert "| the paper | 0.1 | 0.3 |" in text
    bounds = whole["bounds"]
    cells = f"{bounds['base_lr']:.2g} | {bounds['max_lr']:.2g}" if bounds else "none | none"
    assert f"| suggested | {cells} |" in text
    with Image.open(out / "range-test-resnet-20.png") as picture:
        assert picture.size[0] > 500
    assert text in capsys.readouterr().out
    assert not (out / "results.jsonl").exists()


def test_range_test_of_a_fixed_row_of_cifar_100(small_networks, tmp_path, capsys):
    """The bounds beside the suggestion are those of the cycled row, and the files have a name."""
    _write_cifar100(tmp_path / "data", 130)
    options = ("--table", "resnet-100", "--rows", "cifar100-resnet-20-0.1", "--range-test", "4")
    assert run_paper(tmp_path / "data", tmp_path / "out", *options) == 0
    text = (tmp_path / "out" / "range-test-cifar100-resnet-20.md").read_text()
    assert "| the paper | 0.1 | 0.3 |" in text
    assert "without augmentation; no note on the data" in text


def test_range_test_of_other_tables_is_refused(tmp_path, capsys):
    write_slice(tmp_path / "data")
    with pytest.raises(SystemExit):
        run_paper(tmp_path / "data", tmp_path, "--table", "1", "--range-test", "40")
    assert "--range-test 40: only with --table resnet" in capsys.readouterr().err
