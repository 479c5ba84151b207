"""The commands ``range-test`` and ``train``, and ``bench bounds``."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from clr_optim import RangeTest
from clr_optim.cli import main
from clr_optim.demo import commands
from clr_optim.demo.train import cifar10_task, digits_task, search_bounds

SHORT = ["--cycles", "1", "--epochs-per-step-size", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


@pytest.fixture
def cifar10(tmp_path):
    """Write six files in the official layout, of 40 images each: one grey level per class."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = np.empty((40, 3073), np.uint8)
        records[:, 0] = random.integers(0, 10, 40)
        records[:, 1:] = 20 * records[:, :1] + random.integers(0, 10, (40, 3072))
        records.tofile(folder / name)
    return folder


def _error(capsys, argv):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()  # no usage text
    return line


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_range_test_prints_bounds_reason_and_what_to_do_with_them(name, capsys):
    assert main(["range-test", "--optimizer", name, "--threads", "1", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    bounds = search_bounds(digits_task(), name, seed=3).suggest()
    both = f"base_lr={bounds.base_lr:.3g}, max_lr={bounds.max_lr:.3g}"
    assert f"base_lr {bounds.base_lr:.3g}, max_lr {bounds.max_lr:.3g} (confidence" in out
    assert bounds.reason in out
    assert f'CyclicalOptimizer(opt, "triangular2", {both}, step_size_up=96)' in out
    assert f"clr-optim train --optimizer {name} --base-lr {bounds.base_lr:.3g} --max-lr" in out
    assert out.splitlines()[-1] == "range-test.png"
    with Image.open("range-test.png") as image:
        assert image.size == (1280, 640)


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_range_test_keeps_its_curve(kind, tmp_path, capsys):
    options = ["--mode", "linear", "--start-lr", "0", "--end-lr", "0.5", "--metric", "accuracy"]
    assert main(["range-test", *options, "--steps", "150", "--save", f"curve.{kind}"]) == 0
    result = search_bounds(
        digits_task(), "SGD", start_lr=0, end_lr=0.5, num_steps=150, mode="linear",
        metric="accuracy",
    )  # fmt: skip
    if kind == "json":
        kept = RangeTest.from_dict(json.loads((tmp_path / "curve.json").read_text()))
        assert kept == result
    else:
        rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
        assert [float(row["lr"]) for row in rows] == result.lrs
        assert [float(row["accuracy"]) for row in rows] == result.values
    assert capsys.readouterr().out.splitlines()[-1] == f"curve.{kind}"


def test_range_test_by_another_method(capsys):
    options = ["--method", "valley", "--base", "max/3"]
    assert main(["range-test", *options, "--out", "a.svg"]) == 0
    bounds = search_bounds(digits_task(), "SGD").suggest("valley", base="max/3")
    assert f"base_lr {bounds.base_lr:.3g}, max_lr {bounds.max_lr:.3g}" in capsys.readouterr().out


def test_a_curve_without_bounds_is_drawn_and_kept_and_fails(tmp_path, capsys):
    options = ["--start-lr", "1e-8", "--end-lr", "1e-7", "--steps", "60", "--save", "curve.json"]
    assert main(["range-test", *options]) == 1
    out = capsys.readouterr().out
    assert "no bounds: the curve is flat" in out
    assert "raise --end-lr" in out
    assert (tmp_path / "range-test.png").exists()
    assert len(json.loads((tmp_path / "curve.json").read_text())["lrs"]) == 60


def test_train_goes_through_whole_cycles_and_keeps_its_history(tmp_path, capsys):
    options = ["--base-lr", "0.02", "--max-lr", "0.2", "--cycles", "2"]
    options += ["--epochs-per-step-size", "2", "--threads", "1"]
    assert main(["train", *options, "--save", "history.csv"]) == 0
    out = capsys.readouterr().out
    assert "2 cycles of 2 × 48 iterations (2 epochs each way), 192 in all." in out
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [int(row["iteration"]) for row in rows] == list(range(1, 193))
    rates = [float(row["lr"]) for row in rows]
    assert rates[0] == rates[96] == 0.02
    assert rates[48] == 0.2
    assert rates[96 + 48] == pytest.approx(0.11)  # triangular2
    measured = {int(r["iteration"]): float(r["test_accuracy"]) for r in rows if r["test_accuracy"]}
    assert list(measured) == list(range(12, 193, 12))
    assert measured[192] > 70
    for cycle, iteration in ((1, 96), (2, 192)):
        assert f"{cycle:5}  {iteration:9,}  {measured[iteration]:18.2f}" in out
    with Image.open("train.png") as image:
        assert image.size == (1280, 1140)


def test_train_finds_bounds_by_itself(tmp_path, capsys):
    options = ["--optimizer", "Adam", "--policy", "exp_range", "--save", "history.json"]
    assert main(["train", *SHORT, *options]) == 0
    bounds = search_bounds(digits_task(), "Adam").suggest()
    assert bounds.reason in capsys.readouterr().out
    kept = json.loads((tmp_path / "history.json").read_text())
    assert (kept["base_lr"], kept["max_lr"]) == (bounds.base_lr, bounds.max_lr)
    assert kept["lr"][0] == bounds.base_lr
    assert len(kept["loss"]) == 48


@pytest.mark.parametrize(
    ("policy", "extra", "rates"),
    [
        ("fixed", [], [0.06] * 48),
        ("triangular", ["--window", "welch"], None),
        ("exp_range_bounds", ["--gamma", "0.9"], None),
    ],
)
def test_train_under_every_kind_of_policy(policy, extra, rates, tmp_path):
    options = ["--policy", policy, "--base-lr", "0.02", "--max-lr", "0.18", *extra]
    assert main(["train", *SHORT, *options, "--save", "history.json"]) == 0
    kept = json.loads((tmp_path / "history.json").read_text())["lr"]
    if rates is None:
        from clr_optim import schedule

        make = {"triangular": schedule.triangular, "exp_range_bounds": schedule.exp_range_bounds}
        shape = {"window": "welch"} if policy == "triangular" else {"gamma": 0.9}
        rates = make[policy](24, **shape)(np.arange(48), 0.02, 0.18).tolist()
    assert kept == pytest.approx(rates, rel=1e-12)


def test_both_commands_read_cifar10(cifar10, tmp_path, capsys):
    options = ["--data", str(cifar10), "--batch-size", "20", "--threads", "1"]
    search = ["--mode", "linear", "--start-lr", "0", "--end-lr", "1e-5", "--steps", "12"]
    assert main(["range-test", *options, *search, "--save", "curve.json"]) in (0, 1)
    out = capsys.readouterr().out
    assert "200 images of CIFAR-10 to train on, 40 to test with" in out
    assert len(json.loads((tmp_path / "curve.json").read_text())["lrs"]) == 12
    bounds = ["--base-lr", "1e-4", "--max-lr", "1e-3"]
    assert main(["train", *options, *bounds, *SHORT, "--save", "history.json"]) == 0
    kept = json.loads((tmp_path / "history.json").read_text())
    assert len(kept["loss"]) == 20
    assert kept["lr"][10] == 1e-3
    # Weight decays are the paper's; all groups have one rate.
    task = cifar10_task(cifar10, batch_size=20)
    groups = task.groups(task.build())
    assert [group["weight_decay"] for group in groups] == [0.004, 0.004, 1.0, 0.0]
    assert all("lr" not in group for group in groups)


def test_an_interrupted_training_is_kept_and_drawn(tmp_path, monkeypatch, capsys):
    def interrupted(model, optimizer, task, iterations, run, on_iteration):
        run.rates += [0.1, 0.2]
        run.losses += [2.0, 1.0]
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train", interrupted)
    options = ["--base-lr", "0.02", "--max-lr", "0.2", "--save", "history.csv"]
    assert main(["train", *SHORT, *options]) == 130
    assert "interrupted after 2 of 48 iterations" in capsys.readouterr().out
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 3
    assert (tmp_path / "train.png").exists()


# (options of range-test and train, part of the message)
IMPOSSIBLE = [
    (["--data", "no-such-folder"], "no-such-folder: there is no data_batch_1.bin"),
    (["--device", "abacus"], "--device abacus"),
    (["--batch-size", "5000"], "--batch-size must be from 1 to 1200"),
    (["--save", "curve.txt"], "--save must end in .json or .csv, got 'curve.txt'"),
    (
        ["--save", "nowhere/curve.csv"],
        "nowhere/curve.csv: the folder does not exist; give a path in an existing one",
    ),
    (["--out", "nowhere/a.png"], "nowhere/a.png: there is no such folder"),
    (["--out", "a.docx"], "a.docx: a picture's name must end in one of"),
    (["--optimizer", "LBFGS"], "invalid choice: 'LBFGS'"),
]


@pytest.mark.parametrize("command", ["range-test", "train"])
@pytest.mark.parametrize(("options", "words"), IMPOSSIBLE)
def test_options_that_cannot_be_met_are_refused_before_training(
    command, options, words, capsys, tmp_path
):
    assert words in _error(capsys, [command, *options])
    assert not list(tmp_path.iterdir())


# (command line, part of the message)
CONTRADICTIONS = [
    (["range-test", "--start-lr", "1", "--end-lr", "0.5"], "--start-lr=1.0 must be below"),
    (["range-test", "--start-lr", "0"], "--start-lr must be a finite number > 0"),
    (["range-test", "--epochs-per-step-size", "11"], "--epochs-per-step-size must be"),
    (["range-test", "--steps", "1"], "must be a whole number >= 2, got '1'"),
    (["train", "--base-lr", "0.1"], "give both bounds, or neither"),
    (["train", "--base-lr", "2", "--max-lr", "1"], "--base-lr=2.0 is above --max-lr=1.0"),
    (["train", "--policy", "fixed", "--base-lr", "0", "--max-lr", "1"], "--base-lr 0"),
    (["train", "--gamma", "0.9"], "--gamma has no effect with --policy triangular2"),
    (["train", "--policy", "fixed", "--backend", "native", "--base-lr", "0.1", "--max-lr", "0.1"],
     "--backend native has no effect with --policy fixed and bounds"),
    (["train", "--backend", "triton"], "backend='triton'"),
    *(
        (["train", "--policy", "fixed", "--base-lr", low, "--max-lr", top], words)
        for low, top, words in (
            ("0.1", "nan", "--max-lr must be a finite number >= 0, got nan"),
            ("-1", "-1", "--base-lr must be a finite number >= 0, got -1.0"),
            ("0.5", "0.1", "--base-lr=0.5 is above --max-lr=0.1"),
        )
    ),
    (["range-test", "--model", "mine"], "--model must be MODULE:FUNCTION, as in train:make_model"),
    (["range-test", "--model", "absent:net"], "there is no module 'absent'; give a module in "),
    (["range-test", "--model", "absent:net", "--data", "a"], "--data has no effect with --model"),
    (["bench", "--model", "absent:net", "--dtypes", "float32"], "--dtypes has no effect with"),
    (["bench", "--json", "no-such-folder/a.json"], "--json no-such-folder/a.json: there is no"),
    (["info", "--json", "no-such-folder/a.json"], "--json no-such-folder/a.json: there is no"),
    (["train", "--policy", "fixed", "--window", "hann"],
     "--window has no effect with --policy fixed"),
    (["train", "--policy", "exp_range", "--gamma", "2", "--base-lr", "1", "--max-lr", "2"],
     "error: --gamma must be a finite number"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "words"), CONTRADICTIONS)
def test_options_that_contradict_are_refused(argv, words, capsys, tmp_path):
    assert words in _error(capsys, argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["range-test", "train"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert f"clr-optim {command} --data cifar-10-batches-bin" in out


def test_bench_bounds_measures_and_reports_every_outcome(tmp_path, capsys, monkeypatch):
    from clr_optim.bench import bounds

    monkeypatch.setattr(bounds, "COMPARED", ("SGD", "Adam"))
    monkeypatch.setattr(bounds, "_RATES", 3)
    monkeypatch.setattr(bounds.Plan, "epochs_per_step_size", 1)
    assert main(["bench", "bounds", "--seeds", "2", "--cycles", "1", "--out", "results"]) == 0
    kept = json.loads((tmp_path / "results" / "bounds.json").read_text())
    assert kept["fixed_rates"] == pytest.approx([1e-5, 1e-2, 10])
    for row in kept["rows"]:
        assert np.shape(row["fixed"]) == (3, 2)
        assert np.shape(row["cyclic"]["triangular"]) == (2,)
        assert (tmp_path / "results" / f"range-test-{row['optimizer'].lower()}.png").exists()
    text = (tmp_path / "results" / "bounds.md").read_text()
    assert text in capsys.readouterr().out
    assert text == bounds.report(kept)


def test_bench_bounds_names_the_winner():
    from clr_optim.bench import bounds

    row = {
        "optimizer": "SGD",
        "bounds": [[0.01, 0.2], [0.02, 0.3]],
        "cyclic": {"triangular": [80.0, 90.0], "triangular2": [60.0, 70.0]},
        "fixed": [[10.0, 12.0], [81.0, 83.0], [66.0, 64.0]],
    }
    results = {
        "machine": {"torch": "2", "cpu": "a CPU"}, "task": "digits", "iterations": 8,
        "step_size": 4, "seeds": 2, "range_test_steps": 9, "start_lr": 0.1, "end_lr": 10.0,
        "fixed_rates": [0.1, 1.0, 10.0], "rows": [row],
    }  # fmt: skip
    line = next(line for line in bounds.report(results).splitlines() if line.startswith("| SGD"))
    assert line == (
        "| SGD | 0.01–0.2 | 85.00 ± 7.07 | 65.00 ± 7.07 | 65.00 | 82.00 ± 1.41 at 1 "
        "| triangular | triangular |"
    )
