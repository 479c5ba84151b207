"""Whole iterations with steps in backward: variants, files, tables. No times."""

from __future__ import annotations

import json

import pytest
import torch
from bench_helpers import error

from clr_optim.bench import backward_report
from clr_optim.bench.throughput import command, processes, step_in_backward


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(step_in_backward, "_LAYERS", 2)
    monkeypatch.setitem(step_in_backward._WIDTHS, "linear", 8)


def test_json_and_text_of_a_tiny_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        step_in_backward, "measure_iteration_memory", lambda *_: {"peak_bytes": 2**20}
    )
    path = tmp_path / "results.json"
    options = ["--seconds-per-cell", "0", "--threads", "1", "--json", str(path)]
    assert command.main([*options, "--step-in-backward"]) == 0
    (row,) = json.loads(path.read_text(encoding="utf-8"))["step_in_backward"]
    assert row["values"] == 2 * (8 * 8 + 8)
    assert row["gradient_bytes"] == 4 * row["values"]
    assert set(row["times"]) == set(row["memory"]) == set(backward_report.NAMES)
    printed = capsys.readouterr().out
    assert all(words in printed for words in backward_report.NAMES.values())


@pytest.mark.parametrize("name", backward_report.NAMES)
def test_each_variant_trains_the_model(name):
    params, variants = step_in_backward.make_variants("linear")
    before = [p.detach().clone() for p in params]
    with variants[name]() as iterate:
        iterate()
        assert all((p.grad is None) is name.endswith("in_backward") for p in params)
    assert not any(map(torch.equal, before, params))
    assert not any(p._post_accumulate_grad_hooks for p in params)


@pytest.mark.parametrize("name", backward_report.NAMES)
def test_gradients_that_are_alive_are_counted(name):
    counted = processes.probe_iteration_memory("linear", name, 0)
    whole = 4 * 2 * (8 * 8 + 8)
    assert counted["gradients_alive_bytes"] == (0 if name.endswith("in_backward") else whole)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--step-in-backward", "mlp"], "no 'mlp'; there are linear, linear_100m, gpt2"),
        (["--step-in-backward", "--rules", "sgd"], "--rules has no effect"),
        (["--step-in-backward", "--training"], "--training has no effect"),
        (["--step-in-backward", "--masters"], "--masters has no effect"),
    ],
)
def test_options_without_effect_are_refused(options, text, capsys):
    assert text in error(capsys, *options)
