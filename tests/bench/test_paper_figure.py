"""Figure 6 of the paper: its network, its rows, its runs and its report."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from paper_helpers import SMALL_BATCH, result_of, results_of, run_paper
from torch import nn

from clr_optim.bench.cifar10 import accuracy
from clr_optim.bench.paper import FIGURE_6, Run, Scale, command, one_run
from clr_optim.bench.paper.figure_6 import CONSTANT, CYCLED, DECAYING
from clr_optim.bench.paper.networks import (
    SIGMOID,
    batch_statistics,
    cifar10_sigmoid,
    sigmoid_groups,
)
from clr_optim.bench.paper.quarters import conclusions, summarize_quarters
from clr_optim.bench.paper.readme import END, figure_mark
from clr_optim.bench.paper.report import report
from clr_optim.bench.paper.store import Store
from clr_optim.bench.paper.training import train
from clr_optim.cli import main

#: 8 iterations, the shortest length that all rows have
SHORTEST = Scale(Fraction("1/7500"))


def test_the_network_is_caffes():
    model = cifar10_sigmoid(3)
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == [
        "Conv2d", "MaxPool2d", "BatchNorm2d", "Sigmoid",
        "Conv2d", "BatchNorm2d", "Sigmoid", "AvgPool2d",
        "Conv2d", "BatchNorm2d", "Sigmoid", "AvgPool2d", "Flatten", "Linear",
    ]  # fmt: skip
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    layers = [layer for layer in model if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer, std in zip(layers, (1e-4, 0.01, 0.01, 0.01), strict=True):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not layer.bias.any()
    for norm in (layer for layer in model if isinstance(layer, nn.BatchNorm2d)):
        assert (norm.weight == 1).all()
        assert (norm.bias == torch.tensor(0.001)).all()
        assert norm.eps == 1e-9
    for pool in (model[1], model[7], model[11]):
        assert (pool.kernel_size, pool.stride, pool.ceil_mode) == (3, 2, True)
    again = cifar10_sigmoid(3)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert not torch.equal(model[0].weight, cifar10_sigmoid(4)[0].weight)


def test_the_groups_have_caffes_rates():
    model = cifar10_sigmoid(0)
    groups = sigmoid_groups(model, 0.5)
    rate = {id(param): group["lr"] for group in groups for param in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    expected = {"0.bias": 1.0, "4.bias": 1.0, "13.bias": 0.1}
    for name, param in model.named_parameters():
        assert rate[id(param)] == pytest.approx(expected.get(name, 0.5)), name
    assert not any("weight_decay" in group for group in groups)


def test_batch_statistics_are_those_of_training_and_change_nothing(data):
    model = cifar10_sigmoid(0)
    inputs = torch.randn(20, 3, 32, 32) * 60
    model(inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    by_averages = model(inputs)
    with batch_statistics(model):
        by_batch = model(inputs)
        accuracy(model, data.test, data.mean, 50)
    assert torch.equal(model(inputs), by_averages)
    assert not torch.equal(by_batch, by_averages)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(by_batch, model.train()(inputs))
    with pytest.raises(ZeroDivisionError), batch_statistics(model):
        1 / 0  # noqa: B018
    assert model[2].running_mean is not None


def _triangle(t, step_size, low, top):
    cycle = math.floor(1 + t / (2 * step_size))
    x = abs(t / step_size - 2 * cycle + 1)
    return low + (top - low) * max(0, 1 - x)


RATES = {
    **{name: lambda t, name=name: float(name.split("-")[1]) for name in CONSTANT},
    DECAYING: lambda t: 0.01 - (0.01 - 0.0005) * t / 1_200,
    "triangular": lambda t: _triangle(t, 150, 0.001, 0.01),
    "one-triangle": lambda t: _triangle(t, 600, 0.0005, 0.01),
}


@pytest.mark.parametrize("name", RATES)
def test_rates_for_every_group(name, data):
    run = Run(FIGURE_6[name], 0, Scale(Fraction("1/50")), data)
    assert run.iterations == 1_200
    for t in (0, 1, 149, 150, 299, 300, 750, 1_199):
        expected = [RATES[name](t) * ratio for ratio in (1, 2, 0.2)]
        assert run.optimizer.lr_at(t) == pytest.approx(expected, rel=1e-9)


def test_the_rows_are_those_of_the_paper_and_its_neighbours():
    assert tuple(FIGURE_6) == (*CONSTANT, DECAYING, *CYCLED)
    published = {row.name: row.published for row in FIGURE_6.values() if row.published}
    assert published["constant-0.001"] == 60.8
    assert {published[name] for name in CYCLED} == {72.2}
    assert all(row.iterations == 60_000 for row in FIGURE_6.values())
    assert all(row.network.batch_size == 111 for row in FIGURE_6.values())


def test_a_range_test_finds_bounds_and_leaves_no_trace(data):
    run, other = (Run(FIGURE_6["triangular-found"], 0, SHORTEST, data) for _ in range(2))
    run.prepare()
    low, top = run.range_test["bounds"]
    assert 0 < low < top < 0.5
    assert 10 < run.range_test["steps"] <= 300
    assert run.range_test["seconds"] > 0
    # The step size is one iteration at this length.
    assert run.optimizer.lr_at(0) == pytest.approx([low, 2 * low, 0.2 * low])
    assert run.optimizer.lr_at(1) == pytest.approx([top, 2 * top, 0.2 * top])
    for a, b in zip(
        run.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert run.batches.position == 0


def _fake_range_test(monkeypatch, bounds=(0.002, 0.02)):
    calls = []

    def find(model, optimizer, batches):
        calls.append(model)
        return {
            "bounds": list(bounds), "confidence": 1.0, "reason": "", "steps": 9, "seconds": 3.0
        }  # fmt: skip

    monkeypatch.setattr(one_run, "find_bounds", find)
    monkeypatch.setattr(command, "SIGMOID", replace(SIGMOID, batch_size=SMALL_BATCH))
    return calls


def test_accuracies_come_at_quarters_too(data, monkeypatch):
    _fake_range_test(monkeypatch)
    run = Run(FIGURE_6["constant-0.01"], 0, Scale(Fraction("1/1500")), data)
    tested = []
    real = one_run.accuracy

    def count(model, images, *rest):
        tested.append((len(images), *rest[1:]))
        return real(model, images, *rest)

    monkeypatch.setattr(one_run, "accuracy", count)
    monkeypatch.setattr(one_run, "_ON_THE_WAY", 30)
    assert not train([run], lambda run: None, lambda: 0, lambda run: None, 1e9)
    assert [at for at, _ in run.by_averages] == [10, 20, 30, 40]
    assert {at for at, _ in run.curve} >= {10, 20, 30, 40}
    # At a quarter: Caffe's batches of all images, then torch's running averages.
    assert tested.count((100, 1_000)) == tested.count((100,)) == 4
    assert tested.count((30, 1_000)) == len(run.curve) - 4


def test_the_figure_is_run_resumed_and_reported(folder, tmp_path, monkeypatch, capsys):
    calls = _fake_range_test(monkeypatch)
    options = ("--figure", "6", "--scale", "1/7500", "--data-note", "made up")
    assert run_paper(folder, tmp_path / "whole", *options) == 0
    text = capsys.readouterr().out
    results = results_of(tmp_path / "whole")
    assert [run["row"] for run in results] == list(FIGURE_6)
    found = next(run for run in results if run["row"] == "triangular-found")
    assert found["range_test"]["bounds"] == [0.002, 0.02]
    assert {run["batch_size"] for run in results} == {SMALL_BATCH}
    assert {run["network"] for run in results} == {"cifar10_full_sigmoid_bn"}
    assert text.strip() == (tmp_path / "whole" / "figure-6.md").read_text().strip()
    assert "| row, % after | 2 | 4 | 6 | 8 | seeds | time |" in text
    assert "Data: made up" in text
    assert "Unfinished" not in text
    assert "a range test of 3 s found (0.002 to 0.02)" in text
    whole = json.loads((tmp_path / "whole" / "figure-6.json").read_text())
    assert [row["row"] for row in whole["rows"]] == list(FIGURE_6)
    assert len(whole["runs"]) == 8
    assert (tmp_path / "whole" / "figure-6.svg").read_text().startswith("<?xml")

    real = Run.iterate

    def stop_once(run):
        real(run)
        if run.iteration == 5:
            monkeypatch.setattr(Run, "iterate", real)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "iterate", stop_once)
    options = (*options, "--rows", "triangular-found")
    assert run_paper(folder, tmp_path / "parts", *options) == 128 + signal.SIGTERM
    assert len(calls) == 2
    assert run_paper(folder, tmp_path / "parts", *options, "--resume") == 0
    assert len(calls) == 2  # the checkpoint has the bounds
    (resumed,) = results_of(tmp_path / "parts")
    for key in ("weights", "curve", "by_averages", "accuracy", "range_test"):
        assert resumed[key] == found[key], key


def test_a_folder_of_the_tables_is_refused(folder, tmp_path, small, capsys):
    assert run_paper(folder, tmp_path, "--rows", "window-hann", "--scale", "1/400") == 0
    capsys.readouterr()
    options = ("--rows", "constant-0.01", "--scale", "1/400", "--resume")
    with pytest.raises(SystemExit):
        run_paper(folder, tmp_path, "--figure", "6", *options)
    assert "has batch_size 10, and this run 111" in capsys.readouterr().err


def _figure_result(row, values, seed=0, averages=None, bounds=None):
    at = [300, 600, 900, 1_200]
    return {
        **result_of("fixed", seed, values[-1], 1_200),
        "row": row,
        "batch_size": 111,
        "training_images": 50_000,
        "bounds": None if bounds else [0.001, 0.01],
        "range_test": bounds and {"bounds": bounds, "seconds": 4.0},
        "curve": [list(point) for point in zip(at, values, strict=True)],
        "by_averages": [list(point) for point in zip(at, averages or values, strict=True)],
    }


RESULTS = [
    _figure_result("constant-0.001", [30.0, 40.0, 45.0, 46.0]),
    _figure_result("constant-0.01", [35.0, 39.0, 47.0, 50.0], averages=[30.0, 30.0, 30.0, 44.0]),
    _figure_result("triangular", [40.0, 45.0, 50.0, 57.0], 0),
    _figure_result("triangular", [44.0, 47.0, 52.0, 59.0], 1),
    _figure_result("triangular-found", [41.0, 44.0, 47.0, 50.5], bounds=[0.0002, 0.012]),
]


def test_sentences_compare_cycles_with_the_best_constant_rate():
    rows = {row["row"]: row for row in summarize_quarters(RESULTS)}
    assert list(rows) == list(FIGURE_6)
    triangular = rows["triangular"]
    assert (triangular["accuracy"], triangular["seeds"]) == (58.0, 2)
    assert triangular["spread"] == pytest.approx(math.sqrt(2))
    assert [quarter["accuracy"] for quarter in triangular["quarters"]] == [42.0, 46.0, 51.0, 58.0]
    # Two standard errors: of 10,000 images at 58 and 50 %, and of two seeds.
    same = 2 * math.sqrt(0.58 * 0.42 + 0.5 * 0.5 + 2 / 2)
    assert triangular["relation"] == (
        "`triangular`: 58.0 % after 1,200 iterations; more accurate than the best constant rate, "
        f"`constant-0.01` (50.0 %, +8.0, within {same:.1f} being the same); against the best "
        "constant rate of its time +7.0 after the first quarter, +6.0 after the second quarter, "
        "+4.0 after the third quarter."
    )
    found = rows["triangular-found"]["relation"]
    assert "between bounds that a range test of 4 s found (0.0002 to 0.012)" in found
    assert "as accurate as the best constant rate" in found
    assert rows["constant-0.001"]["relation"].endswith("(the paper: 60.8 % after 60,000).")
    assert "relation" not in rows["one-triangle"]


def test_conclusions_count_both_ways_to_test():
    by_batch, by_averages, lag, papers = conclusions(summarize_quarters(RESULTS))
    assert "as in Caffe, 1 of 2 cycled rows end more accurate than" in by_batch
    assert by_batch.endswith("+0.5 points (`triangular-found`) to +8.0 (`triangular`).")
    assert "running averages, 2 of 2 cycled rows" in by_averages
    assert "`constant-0.001` (46.0 %)" in by_averages
    assert "change the best constant accuracy by -4.0 points, and the cycled rows by +0.0" in lag
    assert "the gain is +4.5 to +12.0 points" in papers
    assert "72.2 against 60.8 %" in papers
    assert conclusions(summarize_quarters(RESULTS[:2])) == [
        "Constant rates and cycles were not both run: there is nothing to compare yet."
    ]


def test_without_constant_rates_there_is_nothing_to_compare():
    decays = _figure_result(DECAYING, [30.0, 40.0, 50.0, 57.5])
    assert conclusions(summarize_quarters([decays, RESULTS[2]])) == [
        "Constant rates and cycles were not both run: there is nothing to compare yet."
    ]


def test_a_decaying_rate_is_compared_with_the_cycles():
    decays = _figure_result(DECAYING, [30.0, 40.0, 50.0, 57.5])
    *_, sentence, _ = conclusions(summarize_quarters([*RESULTS, decays]))
    assert sentence.startswith("A rate that only decays, `linear-decay`, ends at 57.5 %: ")
    same = 2 * math.sqrt(0.58 * 0.42 + 0.575 * 0.425 + 2 / 2)
    assert f"`triangular` is as accurate as it (+0.5, within {same:.1f} being the same)" in sentence
    assert "`triangular-found` is less accurate than it (-7.0" in sentence


def test_the_report_drops_no_row_and_renews_a_table(tmp_path, capsys):
    store = Store(tmp_path)
    for result in RESULTS:
        store.append(result)
    readme = tmp_path / "readme.md"
    readme.write_text(f"above\n{figure_mark(1_200)}\nold\n{END}\nbelow\n")
    command = ["bench", "paper", "--report", "--out", str(tmp_path), "--readme", str(readme)]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == report(tmp_path).strip()
    above, mark, *lines, end, below = readme.read_text().splitlines()
    assert (above, mark, end, below) == ("above", figure_mark(1_200), END, "below")
    assert [line.split()[1] for line in lines[2:]] == list(FIGURE_6)
    assert (
        "| triangular | 42.0 ± 2.8 | 46.0 ± 1.4 | 51.0 ± 1.4 | 58.0 ± 1.4 | 2 | 1:01:40 |" in lines
    )
    assert "| one-triangle | not run | | | | | |" in lines
    assert "Unfinished: the rows have 0 to 2 seeds so far." in report(tmp_path)
    assert {line.count("|") for line in lines} == {8}
    readme.write_text("nothing")
    with pytest.raises(SystemExit):
        main(command)
    assert f"add these two lines: {figure_mark(1_200)}" in capsys.readouterr().err
