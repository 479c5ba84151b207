"""What clipping, skipping and averages add to a step: cells, files, tables. No times."""

from __future__ import annotations

import json

import pytest
import torch
from bench_helpers import error

from clr_optim.bench import features_report, pages
from clr_optim.bench.throughput import command, features

pytestmark = pytest.mark.usefixtures("tiny")

QUICK = ["--seconds-per-cell", "0", "--threads", "1"]


def run(tmp_path, *options):
    path = tmp_path / "results.json"
    assert command.main([*QUICK, "--features", *options, "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_json_text_and_page_of_tiny_runs(tmp_path, capsys):
    results = run(tmp_path, "mlp,1000x256", "--rules", "adam,sgd")
    cells = [(row["workload"], row["rule"]) for row in results["features"]]
    assert sorted(cells) == sorted((w, r) for w in ("mlp", "1000x256") for r in ("adam", "sgd"))
    for row in results["features"]:
        assert list(row["times"]) == [*features.FEATURES, "torch", "torch_ema"]
        for times in row["times"].values():
            assert 0 < times["p10_s"] <= times["median_s"] <= times["p90_s"]
    adam = next(row for row in results["features"] if row["rule"] == "adam")
    # An Adam step moves 28 bytes per float32 value, a norm reads 4 more, and an average moves 8.
    assert adam["moved"]["max_grad_norm"] == adam["moved"]["spike"] == pytest.approx(32 / 28)
    assert adam["moved"]["ema"] == pytest.approx(36 / 28)
    assert adam["moved"]["cycle_end"] == adam["moved"]["plain"] == 1
    printed = capsys.readouterr().out
    for name in features_report.NAMES.values():
        assert name in printed
    page = pages.TABLES["features"](results, "float32")
    assert len(page.splitlines()) == 2 + len(cells)
    assert len({line.count("|") for line in page.splitlines()}) == 1


def test_each_step_is_made_with_the_setting_that_its_name_says(monkeypatch):
    steps = {}
    real = features.interleave

    def spied(given, *args):
        steps.update(given)
        return real(given, *args)

    monkeypatch.setattr(features, "interleave", spied)
    features._measure_cell("adam", "mlp", 0.0, 0)
    made = {name: steps[name].__self__ for name in features.FEATURES}
    assert made["plain"].grad_norm is None
    assert all(
        made[name].grad_norm is not None for name in ("max_grad_norm", "skip_above", "spike")
    )
    averages = {name: opt.param_groups[0].get("clr_averages") for name, opt in made.items()}
    assert [name for name, average in averages.items() if average] == ["ema", "cycle_end"]
    assert {opt.skipped for opt in made.values()} == {0}
    taken = {opt.iteration for opt in made.values()}
    assert len(taken) == 1
    average = steps["torch_ema"].__closure__
    counts = [cell.cell_contents for cell in average if hasattr(cell.cell_contents, "n_averaged")]
    assert counts[0].n_averaged == torch.tensor(taken.pop())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--features", "1b"], "no '1b'; there are mlp"),
        (["--features", "--workloads", "mlp"], "--workloads has no effect with --features"),
        (["--features", "--compile"], "--compile has no effect with --features"),
        (["--features", "--training"], "--features has no effect with --training"),
        (["--features", "--model", "a:b"], "--features has no effect with --model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_before_anything_is_measured(options, words, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure_features", lambda args: pytest.fail("measured"))
    assert words in error(capsys, *options)
