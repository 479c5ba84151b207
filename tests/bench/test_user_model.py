"""``--model MODULE:FUNCTION``: what the function may return, and the table of its parameters."""

from __future__ import annotations

import importlib
import json
import re
import sys
import textwrap
from argparse import Namespace

import pytest
import torch
from bench_helpers import play_h200

from clr_optim import cli
from clr_optim.bench import model_report, user_model
from clr_optim.bench.gpu import Gpu
from clr_optim.bench.throughput import cells, one_model, timing
from clr_optim.bench.user_model import load_model
from clr_optim.options import OptionError

SOURCE = """
    import torch

    def net():
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))

    def parameters():
        frozen = torch.zeros(2)
        return (p for p in [torch.ones(2, 3, requires_grad=True), frozen])

    def mixed():
        return [torch.ones(8, requires_grad=True),
                torch.ones(4, 2, dtype=torch.bfloat16, requires_grad=True)]

    def task():
        model = torch.nn.Linear(4, 3)
        data = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(5)]
        return model, torch.nn.functional.cross_entropy, data

    def with_optimizer():
        model, loss_fn, data = task()
        groups = [{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.5}]
        return model, loss_fn, data, torch.optim.SGD(groups)

    def once():
        model, loss_fn, data = task()
        return model, loss_fn, iter(data)

    def pair():
        return task()[:2]

    def no_optimizer():
        return (*task(), "Adam")

    def frozen():
        return torch.nn.Linear(2, 1).requires_grad_(False)

    def number():
        return 3

    def words():
        return ["a", "b"]

    def fails():
        raise ValueError("no data here")

    not_a_function = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module of the user in the present folder."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(SOURCE))
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield
    for name in ("mine", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("net", [(3, 4), (3,), (3,), (3,)]),
        ("parameters", [(2, 3)]),
        ("mixed", [(8,), (4, 2)]),
        ("task", [(3, 4), (3,)]),
        ("with_optimizer", [(3, 4), (3,)]),
    ],
)
def test_the_function_returns_a_model_parameters_or_a_training(name, shapes):
    given = load_model(f"mine:{name}", 0)
    assert [tuple(param.shape) for param in given.params] == shapes
    assert (given.loader is not None) == (name in ("task", "with_optimizer"))
    assert (given.optimizer is not None) == (name == "with_optimizer")


def test_the_seed_decides_the_first_weights():
    first, second, other = (load_model("mine:net", seed).params[0] for seed in (1, 1, 2))
    assert first.equal(second)
    assert not first.equal(other)


# (--model, part of the message)
WRONG_MODELS = [
    ("mine", "--model must be MODULE:FUNCTION, as in train:make_model, got 'mine'"),
    ("mine:", "--model must be MODULE:FUNCTION"),
    ("absent:net", "there is no module 'absent'; give a module in "),
    ("mine.py:net", "there is no module 'mine.py'; give a module in "),
    ("mine:nett", "mine has no function 'nett'; there are net, parameters, mixed, task"),
    ("mine:not_a_function", "mine has no function 'not_a_function'"),
    ("mine:frozen", "there is no parameter with requires_grad"),
    ("mine:number", "must return a torch.nn.Module, an iterable of parameters, or .*, got int"),
    ("mine:words", r"must return parameters as tensors, got \(str, str\)"),
    ("mine:pair", r"must return \(model, loss_fn, loader\) .*, got \(Linear, function\)"),
    ("mine:no_optimizer", "the fourth item must be a torch.optim.Optimizer, got str"),
    ("mine:fails", "--model mine:fails: ValueError in the function"),
]


@pytest.mark.parametrize(("text", "words"), WRONG_MODELS)
def test_another_function_is_refused(text, words):
    with pytest.raises(OptionError, match=words):
        load_model(text, 0)


def test_a_module_that_cannot_import_another_one_says_which():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_model("broken:net", 0)


def test_an_error_in_the_function_shows_its_traceback(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--model", "mine:fails"])
    shown = capsys.readouterr().err
    assert "ValueError: no data here" in shown
    assert (
        shown.splitlines()[-1] == "clr-optim: error: --model mine:fails: ValueError in the function"
    )


QUICK = ["--seconds-per-cell", "0", "--threads", "1"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "_LEAST_ROUNDS", 2)
    measured = {"default_bytes": 3e6, "foreach_bytes": 2e6, "fused_bytes": 0, "ours_bytes": 0}
    monkeypatch.setattr(one_model, "measure_model_memory", lambda *args: measured)


def test_bench_measures_the_users_parameters(quick, tmp_path, capsys):
    assert cli.main(["bench", "--model", "mine:task", *QUICK, "--json", "out.json"]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    (row,) = results["rows"]
    assert row["rule"] == "adamw"
    assert (row["tensors"], row["params"], row["bytes"]) == (2, 15, 15 * 28)
    assert set(row["times"]) == {"default", "foreach", "fused", "ours"}
    assert set(row["iteration"]["step_s"]) == set(row["times"])
    assert row["iteration"]["forward_backward_s"] > 0
    assert row["state_bytes"] == 2 * 15 * 4 + 2 * 4  # two moments, and a counter per tensor
    assert results["summary"] == "mine:task: 2 tensors, 15 values, float32, on cpu"
    out = capsys.readouterr().out
    for words in ("torch for-loop (default)", "torch foreach", "torch fused", "ours ("):
        assert words in out
    assert "ours saves in 1,000 steps" in out
    assert "whole iteration" in out
    assert "3 MB" in out
    assert "< 1 MB" in out


def test_bench_measures_several_rules_and_dtypes(quick, capsys):
    options = ["--rules", "SGD-Momentum,Adadelta", "--json"]
    assert cli.main(["bench", "--model", "mine:mixed", *QUICK, *options]) == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert [row["rule"] for row in results["rows"]] == ["sgd_momentum", "adadelta"]
    assert results["rows"][0]["bytes"] == 8 * 20 + 8 * 10
    assert results["rows"][0]["iteration"] is None
    assert "whole iteration" not in printed.err
    assert "adadelta" in printed.err


def _row(ours, wrong=(), iteration=None):
    times = {"default": 8e-3, "foreach": 4e-3, "fused": 2e-3, "ours": ours}
    return {
        "rule": "adamw",
        "backend": "native",
        "times": {n: {"median_s": t, "p10_s": t / 2, "p90_s": 2 * t} for n, t in times.items()},
        "wrong": list(wrong),
        "memory": {"skipped": "no Linux"},
        "state_bytes": 2048,
        "iteration": iteration,
    }


def test_the_table_says_what_is_saved_and_hides_no_loss():
    iteration = {"forward_backward_s": 9e-3, "step_s": {"default": 8e-3, "ours": 1e-3}}
    rows = [_row(1e-3, iteration=iteration), _row(4e-3, wrong=["foreach"])]
    results = {"summary": "mine:net", "machine": {"threads": 2}, "device": "cpu", "rows": rows}
    first, second = model_report.model_table(results).split("\nadamw")[1:]
    saved = re.search(r"torch for-loop \(default\) .* (\S+ \S+)\n", first)
    assert saved
    assert saved[1] == "7.00 s"
    assert (
        "Our step is 8.00× as fast as torch's default, and 2.00× as fast as torch's best" in first
    )
    assert "forward and backward take 9 ms; our step is 10.0% of an iteration" in first
    assert "17 ms" in first
    assert "Memory was not measured: no Linux." in first
    assert "−2.00 s" in second
    assert "and SLOWER, 0.50× as fast as torch's best, fused." in second
    assert "WRONG results, not counted" in second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workloads", "mlp"], "--workloads has no effect with --model"),
        (["--dtypes", "float32"], "--dtypes has no effect"),
        (["--device", "cpu"], "--device has no effect"),
        (["--iterations"], "--iterations has no effect"),
        (["--plot", "a.png"], "--plot has no effect"),
    ],
)
def test_options_without_effect_are_refused(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(user_model, "load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(SystemExit):
        cli.main(["bench", "--model", "mine:net", *options])
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_the_memory_of_the_users_step_is_measured_in_a_new_process():
    measured = one_model.measure_model_memory("mine:task", "sgd", 0)
    if "skipped" in measured:
        pytest.skip(measured["skipped"])
    assert set(measured) == {"default_bytes", "foreach_bytes", "fused_bytes", "ours_bytes"}


@pytest.mark.parametrize(
    ("name", "options", "step_size"),
    [
        ("task", ["--optimizer", "adamw"], "step_size_up=20)"),
        ("with_optimizer", [], "step_size_up=20)"),
    ],
)
def test_range_test_of_the_users_model(name, options, step_size, capsys, tmp_path):
    argv = ["range-test", "--model", f"mine:{name}", *options, "--threads", "1", "--json", "r.json"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "2 tensors, 15 values, float32, on cpu" in out
    assert step_size in out
    assert "clr-optim train" not in out
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["optimizer"] == ("SGD" if name == "with_optimizer" else "AdamW")
    assert results["curve"]["num_steps"] == 500
    if name == "with_optimizer":
        assert results["max_lr"][1] == results["max_lr"][0] / 2
        assert f"max_lr=[{results['max_lr'][0]:.3g}, {results['max_lr'][1]:.3g}]" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "mine:net"], r"must return (model, loss_fn, loader), got Sequential"),
        (["--model", "mine:task", "--data", "x"], "--data has no effect with --model"),
        (["--model", "mine:task", "--device", "cpu"], "--device has no effect with --model"),
        (["--model", "mine:task", "--batch-size", "3"], "--batch-size has no effect"),
        (["--model", "mine:with_optimizer", "--optimizer", "sgd"], "--optimizer has no effect"),
        (["--model", "mine:once"], "ended after 5 batches and cannot be started again"),
    ],
)
def test_range_test_refuses_what_does_not_go_together(options, words, capsys):
    with pytest.raises(SystemExit):
        cli.main(["range-test", *options, "--threads", "1"])
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["range-test", "bench"])
def test_the_example_in_the_help_runs(command, quick, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    (line,) = re.findall(rf"clr-optim ({command} --model .*)", text)
    (tmp_path / "mine.py").write_text(textwrap.dedent(text[text.index("  import torch") :]))
    options = QUICK if command == "bench" else ["--threads", "1"]
    # The labels are random: the curve may have no bounds.
    assert cli.main([*line.split(), *options]) in (0, 1)
    assert "63 values" in capsys.readouterr().out


def test_all_dtypes_of_the_parameters_are_checked_for_wrong_variants(monkeypatch):
    asked = []

    def wrong(rule, dtype, *where):
        asked.append(dtype)
        return ["fused"] if dtype is torch.bfloat16 else ["foreach", "fused"]

    monkeypatch.setattr(cells, "wrong_variants", wrong)
    given = load_model("mine:mixed", 0)
    tensors = one_model.Tensors.of(given.params)
    assert cells._wrong(cells.RULES["sgd"], tensors) == ["foreach", "fused"]
    assert asked == [torch.float32, torch.bfloat16]


def test_parameters_on_a_gpu_are_measured_there(quick, monkeypatch, capsys):
    play_h200(monkeypatch)
    small = one_model.Limit(2**12)
    monkeypatch.setattr(one_model, "Limit", lambda *args: small)
    given = load_model("mine:net", 0)
    tensors = one_model.Tensors.of(given.params)
    args = Namespace(compile=False, gradients="sets", seed=0)
    row = one_model._measure_rule("adamw", given, tensors, Gpu(), 0.0, args)
    assert {"default", "forloop", "fused", "ours"} <= set(row["times"])
    assert row["bytes"] == 21 * 28
    row |= {"memory": {"skipped": "no GPU"}, "iteration": None}
    results = {"summary": "net", "machine": {"threads": 1}, "device": "cuda", "rows": [row]}
    text = model_report.model_table(results)
    for words in ("step on the device", "step on the host", "torch foreach (default)"):
        assert words in text


def test_the_memory_of_a_step_on_a_gpu_is_its_peak(monkeypatch):
    held = iter(range(100, 10_000, 100))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(held))
    taken = one_model._memory_on_gpu("sgd", one_model.Tensors.of(load_model("mine:net", 0).params))
    assert taken == dict.fromkeys(
        ("default_bytes", "forloop_bytes", "fused_bytes", "ours_bytes"), 100
    )
