"""One run with growing cycles beside separate runs of the lengths at which its cycles end."""

from __future__ import annotations

import json

import pytest
import torch
from paper_helpers import write_slice
from PIL import Image

from clr_optim import CyclicalOptimizer
from clr_optim.bench import whole_curve
from clr_optim.bench.whole_curve import compare, report
from clr_optim.cli import main
from clr_optim.demo.train import OPTIMIZERS, digits_task, search_bounds

BOUNDS = ("--base-lr", "0.02", "--max-lr", "0.1")
#: lengths of 4, 12 and 28 iterations
SHORT = ("--cycles", "3", "--first-cycle", "4", "--seeds", "2", *BOUNDS)


def bench(out, *options):
    return main(["bench", "curve", "--out", str(out), *options])


def test_the_one_run_and_the_separate_runs_are_what_a_user_would_train(tmp_path, capsys):
    assert bench(tmp_path, *SHORT) == 0
    results = json.loads((tmp_path / "curve.json").read_text())
    assert results["lengths"] == [4, 12, 28]
    curves = {(run["seed"], run["kind"]): run["curve"] for run in results["runs"]}
    assert list(curves) == [
        (seed, kind)
        for seed in (0, 1)
        for kind in ("one run", "4 iterations", "12 iterations", "28 iterations")
    ]
    for seed in (0, 1):
        one = curves[seed, "one run"]
        assert [at for at, _ in one] == [4, 8, 12, 16, 20, 24, 28]
        # Up to its first cycle's end the one run is the first separate run.
        assert curves[seed, "4 iterations"] == one[:1]
    # The same run by CyclicLR, whose triangle of 12 iterations is one cycle.
    task = digits_task()
    torch.manual_seed(1)
    model = task.build()
    sgd = OPTIMIZERS["SGD"](task.groups(model), 0.1)
    scheduler = torch.optim.lr_scheduler.CyclicLR(sgd, 0.02, 0.1, 6, cycle_momentum=False)
    for (inputs, labels), _ in zip(task.batches, range(12), strict=False):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        sgd.step()
        scheduler.step()
    assert curves[1, "12 iterations"] == [[12, pytest.approx(task.accuracy(model), abs=0.4)]]
    text = (tmp_path / "curve.md").read_text()
    assert text == report(results)
    assert text in capsys.readouterr().out
    assert "`triangular` between 0.02 and 0.1." in text
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width == 1400


def test_the_one_runs_cycles_double(tmp_path, monkeypatch):
    ends = []
    real = whole_curve.build_optimizer

    def watch(*args, **options):
        optimizer = real(*args, **options)
        assert isinstance(optimizer, CyclicalOptimizer)
        optimizer.register_cycle_end_hook(lambda opt: ends.append(opt.iteration))
        return optimizer

    monkeypatch.setattr(whole_curve, "build_optimizer", watch)
    assert bench(tmp_path, *SHORT, "--seeds", "1") == 0
    assert ends == [4, 12, 28, 4, 12, 28]  # the one run, then each separate run


def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch):
    assert bench(tmp_path / "whole", *SHORT) == 0
    real, calls = whole_curve.train, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(whole_curve, "train", interrupt)
    assert bench(tmp_path / "parts", *SHORT) == 130
    assert len(json.loads((tmp_path / "parts" / "curve.json").read_text())["runs"]) == 5
    assert bench(tmp_path / "parts", *SHORT) == 0
    assert len(calls) == 6 + 3
    whole, parts = (json.loads((tmp_path / name / "curve.json").read_text())["runs"]
                    for name in ("whole", "parts"))  # fmt: skip
    assert parts == whole


def test_a_range_test_per_seed_finds_the_bounds(tmp_path):
    options = ("--cycles", "2", "--first-cycle", "2", "--seeds", "2")
    assert bench(tmp_path, *options) == 0
    runs = json.loads((tmp_path / "curve.json").read_text())["runs"]
    bounds = {(run["seed"], *run["bounds"]) for run in runs}
    assert len(bounds) == 2
    for seed, low, top in bounds:
        expected = search_bounds(digits_task(), "SGD", seed=seed).suggest()
        assert (low, top) == (expected.base_lr, expected.max_lr)
    assert "(by a range test per seed)" in (tmp_path / "curve.md").read_text()


def test_cifar_10_trains_the_papers_network(tmp_path):
    write_slice(tmp_path / "bin", per_file=40)
    options = ("--data", str(tmp_path / "bin"), "--cycles", "2", "--first-cycle", "2")
    bounds = ("--base-lr", "0.001", "--max-lr", "0.006")
    assert bench(tmp_path / "out", *options, "--seeds", "1", *bounds) == 0
    results = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert "cifar10_full" in results["task"]
    assert results["lengths"] == [2, 6]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--first-cycle", "5"], "--first-cycle 5: must be even, as 6"),
        (["--cycles", "1"], "must be a whole number >= 2, got '1'"),
        (["--base-lr", "0.1"], "give both bounds, or neither"),
        (["--optimizer", "Nonsense"], "invalid choice: 'Nonsense'"),
        (["--cycles", "4", "--first-cycle", "4", *BOUNDS], "give another folder with --out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_fit_are_refused(options, words, tmp_path, capsys):
    settings = {"task": "?", "runs": []}
    (tmp_path / "curve.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        bench(tmp_path, *options)
    assert words in " ".join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / "curve.json").read_text()) == settings


def _run(seed, kind, *points):
    return {"seed": seed, "kind": kind, "bounds": [0.1, 0.2], "curve": [list(p) for p in points]}


RESULTS = {
    "task": "digits; a network", "optimizer": "SGD", "bounds": [0.1, 0.2], "lengths": [4, 12, 28],
    "machine": {"torch": "2", "cpu": "abacus", "threads": 1},
    "runs": [
        _run(0, "one run", (4, 50.0), (8, 55.0), (12, 60.0), (28, 70.0)),
        _run(0, "4 iterations", (4, 50.0)),
        _run(0, "12 iterations", (12, 63.0)),
        _run(0, "28 iterations", (28, 69.0)),
        _run(1, "one run", (4, 52.0), (8, 55.0), (12, 61.0), (28, 72.0)),
        _run(1, "4 iterations", (4, 52.0)),
        _run(1, "12 iterations", (12, 65.0)),
    ],
}  # fmt: skip


def test_differences_are_between_runs_of_one_seed():
    first, second, third = compare(RESULTS)
    assert first == {
        "length": 4, "seeds": 2, "one": 51.0, "separate": 51.0, "difference": 0.0, "same": 0.0
    }  # fmt: skip
    # Differences of −3 and −4: a mean of −3.5, with a standard error of 0.5.
    assert (second["one"], second["separate"], second["difference"]) == (60.5, 64.0, -3.5)
    assert second["same"] == pytest.approx(1.0)
    # The second seed has no separate run of this length.
    assert (third["one"], third["difference"], third["same"]) == (70.0, 1.0, None)


def test_the_report_says_what_is_saved_and_what_is_lost():
    lines = report(RESULTS).splitlines()
    assert "| 12 | 60.50 | 64.00 | -3.50 ± 1.00 | 2 |" in lines
    assert "| 28 | 70.00 | 69.00 | +1.00 | 1 |" in lines
    saved, lost = (line for line in lines if line.startswith("What the one run"))
    assert "28 iterations show 3 lengths, and separate runs take 44 (36% saved)." in saved
    assert "-3.50 points (after 12 iterations) to +1.00 (after 28)" in lost
    assert "1 of 1 differences are losses beyond the noise of the seeds." in lost
    assert "The noise of the other 1, of one seed, is unknown." in lost
    of_one_seed = {**RESULTS, "runs": RESULTS["runs"][:4]}
    assert "With one seed the noise of the seeds is unknown." in report(of_one_seed)
    unfinished = {**RESULTS, "runs": RESULTS["runs"][:3]}
    assert "| 28 | not run | | | |" in report(unfinished)


def test_equal_losses_of_all_seeds_are_losses():
    """Digits have steps of 1/597: two seeds may well lose the same, without any spread."""
    runs = [{**run, "curve": [[at, 50.0 - (run["kind"] == "one run") * (at > 4)] for at, _ in
             run["curve"]]} for run in RESULTS["runs"]]  # fmt: skip
    assert "1 of 1 differences are losses" in report({**RESULTS, "runs": runs})


def test_each_machine_of_the_runs_is_named():
    first, *others = RESULTS["runs"]
    other = {**first, "machine": {"torch": "3", "cpu": "loom", "threads": 2}}
    text = report({**RESULTS, "runs": [other, *others]})
    assert "torch 3, loom, 2 threads; torch 2, abacus, 1 threads; `clr-optim" in text


@pytest.mark.parametrize("contents", ["", "[]", "{}", '{"runs": [3]}'])
def test_a_file_of_something_else_is_refused_by_name(contents, tmp_path, capsys):
    (tmp_path / "curve.json").write_text(contents)
    with pytest.raises(SystemExit):
        bench(tmp_path, *SHORT)
    assert "curve.json has no runs of this command: remove it" in capsys.readouterr().err
