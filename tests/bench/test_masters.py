"""A step with float32 masters beside its alternatives: cells, files, tables. No times."""

from __future__ import annotations

import json

import pytest
import torch
from bench_helpers import error

from clr_optim.bench import masters_report, pages
from clr_optim.bench.throughput import command, masters
from clr_optim.bench.workloads import RULES

pytestmark = pytest.mark.usefixtures("tiny")


def run(tmp_path, *options):
    path = tmp_path / "results.json"
    quick = ["--seconds-per-cell", "0", "--threads", "1"]
    assert command.main([*quick, "--masters", *options, "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_json_text_and_page_of_tiny_runs(tmp_path, capsys):
    results = run(tmp_path, "mlp,1000x256", "--rules", "adamw,sgd")
    cells = [(row["workload"], row["rule"]) for row in results["masters"]]
    assert sorted(cells) == sorted((w, r) for w in ("mlp", "1000x256") for r in ("adamw", "sgd"))
    for row in results["masters"]:
        assert list(row["times"]) == list(row["bytes"]) == list(masters_report.NAMES)
        for times in row["times"].values():
            assert 0 < times["p10_s"] <= times["median_s"] <= times["p90_s"]
    printed = capsys.readouterr().out
    for name in masters_report.NAMES.values():
        assert name in printed
    page = pages.TABLES["masters"](results, "bfloat16")
    assert len(page.splitlines()) == 2 + 3 * len(cells)
    assert len({line.count("|") for line in page.splitlines()}) == 1


def test_bytes_are_those_of_the_tensors():
    """Count what each variant of AdamW holds for 1,000 values."""
    params = [torch.zeros(1000, dtype=torch.bfloat16, requires_grad=True)]
    params[0].grad = torch.zeros_like(params[0])
    expected = {}
    for name, options in (("bfloat16", {}), ("masters", {"master_weights": True})):
        opt = masters.our_optimizer(RULES["adamw"], params, **options)
        opt.step()
        held = [*params, params[0].grad, *opt.state[params[0]].values()]
        expected[name] = sum(t.nbytes for t in held if t.dim()) // 1000
        opt.state.clear()
    found = masters.bytes_of_variants(RULES["adamw"])
    assert {name: found[name]["kept"] for name in expected} == expected
    assert {name: each["moved"] for name, each in found.items()} == {
        "bfloat16": 14, "separate": 40, "masters": 26,
    }  # fmt: skip
    assert found["separate"]["kept"] == 20


def test_a_separate_master_takes_torchs_float32_step():
    params = [torch.linspace(-1, 1, 99).bfloat16().requires_grad_()]
    twin = params[0].detach().float().requires_grad_()
    step = masters._separate_master(RULES["sgd"], params)
    reference = torch.optim.SGD([twin], lr=1e-3 / 4)
    params[0].grad = torch.ones_like(params[0])
    twin.grad = torch.ones_like(twin)
    step()
    reference.step()
    assert torch.equal(params[0], twin.detach().bfloat16())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--masters", "1b"], "no '1b'; there are mlp"),
        (["--masters", "--workloads", "mlp"], "--workloads has no effect with --masters"),
        (["--masters", "--features"], "--masters has no effect with --features"),
        (["--masters", "--training"], "--masters has no effect with --training"),
        (["--masters", "--model", "a:b"], "--masters has no effect with --model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_before_anything_is_measured(options, words, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure_masters", lambda args: pytest.fail("measured"))
    assert words in error(capsys, *options)
