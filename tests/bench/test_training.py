"""The step in training: turns, clock, files, tables, refusals. No test asserts a time."""

from __future__ import annotations

import json

import pytest
import torch
from bench_helpers import error, row_of, run_tiny

from clr_optim.bench import pages, training_report
from clr_optim.bench.throughput import command, overhead, timing, training
from clr_optim.bench.workloads import IN_TRAINING

pytestmark = pytest.mark.usefixtures("tiny", "short_turns")

NAMES = ["default", "foreach", "fused", "ours"]


@pytest.fixture
def short_turns(monkeypatch):
    for name, count in (("_TURN", 4), ("_UNCOUNTED", 2), ("_LEAST_ROUNDS", 2)):
        monkeypatch.setattr(training, name, count)


class Clock:
    """A clock that only these steps move, and a list of what they did."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def moved(self, name, seconds):
        def act():
            self.calls.append(name)
            self.now += seconds

        return act


def test_the_step_alone_is_timed_and_the_whole_iteration_beside_it(monkeypatch):
    monkeypatch.setattr(timing, "_MOST_ROUNDS", 3)
    clock = Clock()
    passes = training.Passes([], clock.moved("fetch", 1000.0), clock.moved("passes", 100.0))
    variants = {
        name: training.Variant(clock.moved(name, seconds), clock.moved("zero_grad", 0.5))
        for name, seconds in (("a", 1.0), ("b", 2.0))
    }
    steps, iterations = training.time_in_turns(passes, variants, 60.0, clock=clock)
    counted = 3 * (training._TURN - training._UNCOUNTED)
    assert steps == {"a": [1.0] * counted, "b": [2.0] * counted}
    assert iterations == {"a": [101.5] * counted, "b": [102.5] * counted}
    turn = ["zero_grad", *["fetch", "passes", "step", "zero_grad"] * training._TURN]
    calls = [clock.calls[at : at + len(turn)] for at in range(0, len(clock.calls), len(turn))]
    expected = {name: [name if call == "step" else call for call in turn] for name in variants}
    assert sorted(calls) == sorted([*expected.values()] * 3)


@pytest.mark.parametrize("name", IN_TRAINING)
def test_the_passes_give_every_parameter_a_new_gradient(name):
    passes = training.make_passes(name, seed=1)
    grads = []
    for _ in range(2):
        for param in passes.params:
            param.grad = None
        passes.fetch()
        passes.run()
        grads.append([param.grad for param in passes.params])
    assert all(grad is not None and bool(grad.any()) for grad in grads[0])
    assert any(not first.equal(second) for first, second in zip(*grads, strict=True))


def test_the_models_have_the_widths_of_their_names():
    for name, widths in IN_TRAINING.items():
        if widths:
            assert name == "-".join(map(str, widths))
            shapes = [tuple(param.shape) for param in training.make_passes(name).params]
            assert shapes[::2] == list(zip(widths[1:], widths[:-1], strict=True))


def test_json_and_text_of_tiny_runs(tmp_path, capsys):
    results = run_tiny(tmp_path, "--training", "--rules", "adam,rmsprop")
    assert set(results) == {"machine", "rows", "training"}
    assert results["rows"] == []
    assert results["machine"]["threads"] == 1
    cells = [(row["workload"], row["rule"]) for row in results["training"]]
    assert cells == [(name, rule) for name in IN_TRAINING for rule in ("adam", "rmsprop")]
    for row in results["training"]:
        assert list(row["times"]) == [n for n in NAMES if n != "fused" or row["rule"] == "adam"]
        assert row["wrong"] == []
        assert row["rounds"] == 2
        for times in (row["noop"], *row["times"].values()):
            assert set(times) == {"median_s", "p10_s", "p90_s", "iteration_s"}
            assert 0 < times["p10_s"] <= times["median_s"] <= times["p90_s"]
            assert times["median_s"] < times["iteration_s"]
    printed = capsys.readouterr().out
    assert "In training, threads: 1." in printed
    assert "8-64-64-4: 6 tensors" in printed
    assert "One call:" not in printed


def test_calls_are_measured_too_unless_only_cells_are_asked_for(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(overhead, "_IN_A_ROW", 2)
    real = overhead.measure_in_backward
    monkeypatch.setattr(training, "measure_in_backward", lambda seconds: real(seconds, count=3))
    path = tmp_path / "results.json"
    options = ["--training", "8-64-64-4", "--rules", "sgd", "--seconds-per-cell", "0"]
    assert command.main([*options, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert set(results["calls"]) == set(training_report.CALLS)
    assert min(results["calls"].values()) > 0
    printed = capsys.readouterr().out
    for name in training_report.CALLS.values():
        assert name in printed


def test_one_thread_unless_more_are_asked_for(monkeypatch):
    threads = []

    def measured(args):
        threads.append(torch.get_num_threads())
        return {"machine": {"threads": threads[-1]}, "rows": [], "training": []}

    monkeypatch.setattr(command, "measure_training", measured)
    before = torch.get_num_threads()
    assert command.main(["--training"]) == 0
    assert command.main(["--training", "--threads", "2"]) == 0
    assert threads == [1, 2]
    assert torch.get_num_threads() == before


def test_a_call_is_measured_with_the_setting_that_its_name_says(monkeypatch):
    monkeypatch.setattr(overhead, "_IN_A_ROW", 2)
    made = {}
    real = overhead.interleave

    def spied(steps, *args):
        made.update({name: step.__closure__[0].cell_contents[0] for name, step in steps.items()})
        return real(steps, *args)

    monkeypatch.setattr(overhead, "interleave", spied)
    overhead.measure_calls(0.0)
    assert list(made) == ["noop", "plain", "cycled_momentum", "clipping", "tensor_rate"]
    groups = {name: optimizer.param_groups[0] for name, optimizer in made.items()}
    assert [name for name in groups if isinstance(groups[name]["lr"], torch.Tensor)] == [
        "tensor_rate"
    ]
    assert groups["plain"]["momentum"] == groups["clipping"]["momentum"] == 0.9
    assert groups["cycled_momentum"]["momentum"] < 0.9
    assert made["clipping"].grad_norm is not None
    assert made["plain"].iteration == made["tensor_rate"].iteration > 0


def test_a_step_that_does_nothing_does_nothing():
    param = torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    overhead.Noop([param]).step()
    assert param.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--training", "gpt2"], "no 'gpt2'; there are 64-128-128-10"),
        (["--training", "--workloads", "mlp"], "--workloads has no effect with --training"),
        (["--training", "--compile"], "--compile has no effect with --training"),
        (["--training", "--plot", "a.png"], "--plot has no effect with --training"),
        (["--training", "--model", "a:b"], "--training has no effect with --model"),
        (["--training", "--json", "no/such/folder/a.json"], "no/such/folder/a.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_before_anything_is_measured(options, words, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure_training", lambda args: pytest.fail("measured"))
    assert words in error(capsys, *options)


# ---- tables


def trained(rule="adam", workload="8-64-64-4", **changes):
    row = row_of(rule, workload, **changes)
    for times in row["times"].values():
        times["iteration_s"] = times["median_s"] + 1e-3
    return {**row, "noop": {"median_s": 5e-6, "iteration_s": 1.005e-3}}


def results_of(*rows):
    calls = {key: 1e-6 * number for number, key in enumerate(training_report.CALLS, start=1)}
    return {"machine": {"threads": 1}, "rows": [], "training": rows, "calls": calls}


def test_the_text_compares_steps_and_iterations():
    text = training_report.training_table(results_of(trained(), trained("sgd", wrong=["fused"])))
    adam, sgd = (
        next(line for line in text.splitlines() if line.split()[:1] == [r]) for r in ("adam", "sgd")
    )
    for words in ("1 ms/2 ms", "5 µs/1.01 ms", "8.00×", "2.00× fused", "4.50×", "1.50× fused"):
        assert words in adam
    assert "4.00× foreach" in sgd
    assert sgd.endswith("(fused: WRONG results, not counted)")
    assert "one of 1,000 Adams" in text
    assert "[torch backend]" in training_report.training_table(results_of(trained(backend="torch")))


def test_the_page_has_steps_and_whole_iterations_and_calls(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results_of(trained(), trained(fused=9e-4))))
    page = "<!-- table: {} results.json -->\n<!-- end of table -->\n"
    lines = pages.renewed(page.format("training"), tmp_path).split("\n")
    assert lines[1] == "| rule | MLP 8-64-64-4 |"
    assert lines[3] == "| `adam` | 1 ms, **0.90×** fused, 8.00× default |"
    assert lines[4] == "| no-op step | 5 µs |"
    assert lines[6] == "| rule, whole iteration | MLP 8-64-64-4 |"
    assert lines[8] == "| `adam` | 2 ms, **0.95×** fused, 4.50× default |"
    lines = pages.renewed(page.format("calls"), tmp_path).split("\n")
    assert lines[1] == "| one call | time |"
    assert lines[3] == "| no-op Optimizer.step() | 1 µs |"
    assert len(lines) == 3 + len(training_report.CALLS) + 2
