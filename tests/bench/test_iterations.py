"""Whole iterations: the models have the workloads' parameters, and the table adds up."""

from __future__ import annotations

import json

import pytest
import torch
from bench_helpers import TINY, row_of, run_tiny, shrink
from places import ROOT

from clr_optim.bench import models, report
from clr_optim.bench.throughput import iterations
from clr_optim.bench.workloads import WORKLOADS


@pytest.mark.parametrize("workload", models.MODELS)
def test_a_model_has_the_parameters_of_its_workload(workload):
    with torch.device("meta"):
        model = models.MODELS[workload][0]()
    shapes = sorted(tuple(param.shape) for param in model.parameters())
    assert shapes == sorted(WORKLOADS[workload])


@pytest.mark.parametrize("workload", models.MODELS)
def test_every_parameter_gets_a_gradient(workload, monkeypatch):
    if workload in ("resnet50", "vit_b"):
        small = (1, 3, 224, 224)
    else:
        small = (1, 64) if workload == "mlp" else (1, 8)
    make, _, on_gpu, classes = models.MODELS[workload]
    monkeypatch.setitem(
        models.MODELS, workload, (make, (2 * small[0], *small[1:]), on_gpu, classes)
    )
    training = models.make_training(workload)
    loss = training.loss()
    loss.backward()
    assert loss.shape == ()
    assert all(param.grad is not None for param in training.model.parameters())


def test_iterations_are_measured_in_parts(monkeypatch):
    monkeypatch.setattr(iterations, "_LEAST_ROUNDS", 2)
    row = iterations.measure_workload_iterations("mlp", "adamw", 0.0, device="cpu", seed=0)
    assert (row["workload"], row["batch"], row["rule"]) == ("mlp", "128 × 64", "adamw")
    assert set(row["step_s"]) == {"default", "foreach", "fused", "ours"}
    assert row["rounds"] == 2
    assert min(row["forward_backward_s"], *row["step_s"].values()) > 0


def test_all_variants_train_the_same_model(monkeypatch):
    monkeypatch.setattr(iterations, "_LEAST_ROUNDS", 2)
    model = torch.nn.Linear(2, 1)
    batches = []

    def fetch():
        batches.append(len(batches))
        return torch.ones(1, 2)

    iterations.measure_iterations(model, fetch, lambda x: model(x).sum(), "sgd", 0.0)
    # Four variants, once to warm up and in two rounds; first, the fused one is tried.
    assert len(batches) == 4 + 4 * 2 + 1


def test_the_option_adds_a_section(tmp_path, capsys, monkeypatch):
    shrink(monkeypatch)
    monkeypatch.setitem(WORKLOADS, "mlp", [(3, 2), ()])
    options = ("--iterations", "--workloads", "mlp,1000x256", "--rules", "SGD", "--seed", "3")
    results = run_tiny(tmp_path, *options, "--dtypes", "float32")
    (row,) = results["iterations"]
    assert (row["workload"], row["rule"]) == ("mlp", "sgd")
    out = capsys.readouterr().out
    assert "Whole iterations, forward, backward and step:" in out
    assert "128 × 64" in out
    assert TINY[0] == "--seconds-per-cell"


def test_the_table_of_iterations_adds_forward_backward_and_step():
    row = {
        "workload": "mlp", "batch": "8 × 4", "rule": "adamw", "forward_backward_s": 9e-3,
        "step_s": {"default": 6e-3, "foreach": 3e-3, "ours": 1e-3},
    }  # fmt: skip
    *_, header, line = report.iterations_table([row], on_gpu=False)
    assert "for-loop (default)" in header
    for words in ("9 ms", "15 ms", "12 ms", "10 ms", "10%", "1.50×", "1.20× foreach"):
        assert words in line


# ---- labels of the table


def test_the_best_variant_of_torch_is_named_in_each_cell():
    rows = [row_of(), row_of("sgd", wrong=["fused"]), row_of("adagrad", wrong=["fused", "foreach"])]
    results = {"rows": rows, "limit_gbps": 50.0, "limit": {"copy": 50.0}}
    lines = report.table(results).splitlines()
    assert "for-loop (default)  foreach  " in lines[0]
    for rule, words in (("adam", "2.00× fused"), ("sgd", "× foreach"), ("adagrad", "× for-loop")):
        line = next(line for line in lines if line.split()[:1] == [rule])
        assert words in line
    assert "torch's best: fused in 1, foreach in 1, for-loop (default) in 1" in lines


def test_a_share_above_the_limit_is_explained_and_not_printed():
    rows = [row_of(fraction=1.13), row_of("sgd", fraction=1.004)]
    results = {"rows": rows, "limit_gbps": 50.0, "limit": {"copy": 50.0}}
    text = report.table(results)
    adam, sgd = (
        next(line for line in text.splitlines() if line.split()[:1] == [r]) for r in ("adam", "sgd")
    )
    assert adam.endswith("100%*")
    assert sgd.endswith("100%")
    assert "*: the step moved its bytes up to 13% faster" in text
    assert "113%" not in text
    rows[0]["fraction_of_limit"] = 0.9
    assert "*" not in report.table(results)


RESULTS = ROOT / "bench/results"
COMMITTED = [*sorted(RESULTS.glob("cpu-2-threads*.json")), RESULTS / "nvidia-h200.json"]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_read_and_their_best_variant_is_the_one_of_the_ratio(path):
    results = json.loads(path.read_text(encoding="utf-8"))
    text = report.table(results)
    key = "device_median_s" if "device" in results else "median_s"
    for row in results["rows"]:
        best = row["times"][report.best_of_torch(row, key)][key]
        assert best / row["times"]["ours"][key] == pytest.approx(row["ratio_vs_best_torch"])
    assert "{" not in text
    assert "torch's best: " in text
