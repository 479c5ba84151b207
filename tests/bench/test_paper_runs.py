"""Runs of the paper's rows: interrupted, resumed, beside each other, captured."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from fractions import Fraction

import pytest
import torch
from paper_helpers import TWO_HUNDRED, FakeGraphs, results_of, run_paper, stop_at

from clr_optim.bench.paper import FIGURE_6, ROWS, Run, Scale, one_run
from clr_optim.bench.paper import data as images
from clr_optim.bench.paper.store import Store
from clr_optim.bench.paper.training import train


@pytest.mark.parametrize("row", ["nesterov-triangular", "adam-triangular"])
def test_interrupted_and_resumed_gives_the_same_weights(
    row, folder, tmp_path, small, monkeypatch, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--rows", row, *TWO_HUNDRED)
    assert run_paper(folder, whole, *options) == 0
    (expected,) = results_of(whole)
    assert expected["iterations"] == 200
    assert max(value for _, value in expected["curve"]) > 20  # it learns; chance is 10
    assert [point[0] for point in expected["curve"]] == [*range(8, 200, 8), 200]

    stop_at(monkeypatch, 83, 160)
    assert run_paper(folder, parts, *options) == 128 + signal.SIGTERM
    assert "stopped after 83 of 200" in capsys.readouterr().err
    assert os.listdir(parts) == [f"checkpoint-{row}-0.pt"]
    assert run_paper(folder, parts, *options, "--resume") == 128 + signal.SIGTERM
    assert run_paper(folder, parts, *options, "--resume") == 0
    (found,) = results_of(parts)
    for key in ("weights", "curve", "accuracy", "schedule", "data", "data_note"):
        assert found[key] == expected[key], key
    assert not list(parts.glob("checkpoint*"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_resume_does_what_is_left(folder, tmp_path, small, monkeypatch, capsys):
    options = ("--rows", "window-welch,window-hann", "--scale", "1/400")
    stop_at(monkeypatch, 30, signals=(signal.SIGINT,))
    assert run_paper(folder, tmp_path, *options) == 128 + signal.SIGINT
    assert run_paper(folder, tmp_path, *options, "--resume", "--seeds", "2") == 0
    done = [(run["row"], run["seed"]) for run in results_of(tmp_path)]
    assert done == [(row, seed) for seed in (0, 1) for row in ("window-welch", "window-hann")]
    weights = {run["weights"] for run in results_of(tmp_path)}
    assert len(weights) == 4
    capsys.readouterr()
    taken = []
    monkeypatch.setattr(Run, "iterate", taken.append)
    assert run_paper(folder, tmp_path, *options, "--resume") == 0
    assert not taken
    assert "| window-hann | – |" in capsys.readouterr().out


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_signal_ends_it_at_once(folder, tmp_path, small, monkeypatch):
    stop_at(monkeypatch, 3, signals=(signal.SIGINT, signal.SIGINT))
    options = ("--rows", "window-hann", "--scale", "1/400")
    assert run_paper(folder, tmp_path, *options) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_request_to_end_may_come_twice(folder, tmp_path, small, monkeypatch):
    """``timeout`` sends SIGTERM to the process and to its group."""
    stop_at(monkeypatch, 3, signals=(signal.SIGTERM, signal.SIGTERM))
    options = ("--rows", "window-hann", "--scale", "1/400")
    assert run_paper(folder, tmp_path, *options) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == ["checkpoint-window-hann-0.pt"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_checkpoints_come_by_the_clock_and_whole(data, tmp_path, monkeypatch):
    store = Store(tmp_path)
    run = Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), data)
    saved = []

    def save(run):
        store.save(run)
        saved.append(run.iteration)

    assert not train([run], save, lambda: 0, lambda run: None, 0.0)
    assert saved[:6] == [0, 1, 2, 3, 3, 4]  # before each iteration and each evaluation
    before = store.checkpoint("window-hann", 0).read_bytes()

    def torn(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space left"):
        store.save(run)
    assert store.checkpoint("window-hann", 0).read_bytes() == before


def test_runs_beside_each_other_are_those_alone(data, tmp_path):
    """Three of four runs take turns; the fourth begins when another one has ended."""
    names = ("window-hann", "adam-triangular", "one_cycle", "window-welch")
    scale = Scale(Fraction("1/500"))
    order, weights = [], {}

    def finish(run):
        weights.setdefault(run.row.name, []).append(run.result()["weights"])

    for together in (1, 3):
        runs = (Run(ROWS[name], 0, scale, data) for name in names)
        del order[:]
        left = train(
            runs, lambda run: None, lambda: 0, lambda run: order.append(run.row.name), 1e9,
            together, finish,
        )  # fmt: skip
        assert left == []
    assert order[:6] == [*names[:3]] * 2
    assert len(weights) == 4
    assert all(alone == beside for alone, beside in weights.values())


def test_all_runs_under_way_are_saved_and_gone_on_with(data, tmp_path):
    store, scale = Store(tmp_path), Scale(Fraction("1/500"))

    def runs():
        for name in ("window-hann", "one_cycle", "window-welch"):
            run = Run(ROWS[name], 0, scale, data)
            store.load(run)
            yield run

    stops = iter([0] * 20 + [15])
    show = lambda run: None  # noqa: E731
    left = train(runs(), store.save, lambda: next(stops), show, 1e9, together=2)
    assert [run.row.name for run in left] == ["window-hann", "one_cycle"]
    assert all(0 < run.iteration < run.iterations for run in left)
    finished = []
    assert train(runs(), store.save, lambda: 0, show, 1e9, 2, finished.append) == []
    assert sorted(run.row.name for run in finished) == ["one_cycle", "window-hann", "window-welch"]
    alone = Run(ROWS["one_cycle"], 0, scale, data)
    assert train([alone], store.save, lambda: 0, show, 1e9) == []
    (resumed,) = (run for run in finished if run.row.name == "one_cycle")
    assert resumed.result()["weights"] == alone.result()["weights"]


def test_a_captured_iteration_is_counted_as_any_other(data, monkeypatch):
    """With a fake graph on a CPU: as many iterations, batches and steps as without one."""

    monkeypatch.setattr(one_run, "Gpu", FakeGraphs)
    runs = []
    for on_kernels in (False, True):
        run = Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), data)
        run.on_kernels = on_kernels
        assert not train([run], lambda run: None, lambda: 0, lambda run: None, 1e9)
        assert (run.iteration, run.optimizer.iteration, run.batches.position) == (60, 60, 60)
        runs.append(run)
    plain, captured = (run.result() for run in runs)
    assert plain["weights"] == captured["weights"]
    assert plain["curve"] == captured["curve"]


def test_a_resumed_run_captures_after_an_evaluation_that_is_near(data, monkeypatch):
    """The iterations before a capture count: they must not pass the place of an accuracy."""
    monkeypatch.setattr(one_run, "Gpu", FakeGraphs)
    whole = Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), data)
    assert not train([whole], lambda run: None, lambda: 0, lambda run: None, 1e9)
    places = [at for at, _ in whole.curve]
    begun = Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), data)
    while begun.iteration < places[0] - 1:
        begun.iterate()
    resumed = Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), data)
    resumed.on_kernels = True
    resumed.load_state_dict(begun.state_dict())
    assert not resumed.can_capture
    captured = []
    monkeypatch.setattr(
        Run, "capture", lambda run, real=Run.capture: captured.append(run.iteration) or real(run)
    )
    assert not train([resumed], lambda run: None, lambda: 0, lambda run: None, 1e9)
    assert resumed.curve == whole.curve
    assert resumed.result()["weights"] == whole.result()["weights"]
    assert captured


def test_a_row_whose_definition_has_changed_is_not_gone_on_with(folder, tmp_path, small, capsys):
    options = ("--rows", "window-hann", "--scale", "1/400")
    assert run_paper(folder, tmp_path, *options) == 0
    (result,) = results_of(tmp_path)
    text = json.dumps({**result, "bounds": [0.001, 0.5]}) + "\n"
    (tmp_path / "results.jsonl").write_text(text)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_paper(folder, tmp_path, *options, "--resume", "--seeds", "2")
    error = capsys.readouterr().err
    assert "results.jsonl, row window-hann, has bounds [0.001, 0.5], and this run" in error


def test_a_range_test_without_bounds_names_row_and_seed(data, monkeypatch):
    def none(*_):
        raise ValueError("the loss fell nowhere")

    monkeypatch.setattr(one_run, "find_bounds", none)
    run = Run(FIGURE_6["triangular-found"], 3, Scale(Fraction("1/7500")), data)
    words = "row triangular-found, seed 3: its range test found no bounds: the loss fell nowhere"
    with pytest.raises(ValueError, match=words):
        run.prepare()


@pytest.mark.parametrize("on_kernels", [False, True])
def test_a_finished_run_is_gone_with_its_images(on_kernels, data, monkeypatch):
    """Python frees the run at once: each of 72 runs has its own copy of 154 MB."""

    monkeypatch.setattr(one_run, "Gpu", FakeGraphs)
    finished = []

    def runs():
        for name in ("window-hann", "one_cycle"):
            run = Run(ROWS[name], 0, Scale(Fraction("1/400")), data)
            run.on_kernels = on_kernels
            yield run

    def finish(run):
        finished.append((weakref.ref(run), weakref.ref(run.batches._rows)))

    gc.collect()
    gc.disable()
    try:
        assert not train(runs(), lambda run: None, lambda: 0, lambda run: None, 1e9, 1, finish)
        assert [ref() for refs in finished for ref in refs] == [None] * 4
    finally:
        gc.enable()


def test_the_last_accuracy_is_over_all_test_images(data, monkeypatch):
    monkeypatch.setattr(one_run, "_ON_THE_WAY", 30)
    counts = []
    monkeypatch.setattr(one_run, "accuracy", lambda model, images, mean: counts.append(len(images)))
    run = Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), data)
    monkeypatch.setattr(run, "_iterate_eagerly", lambda: None)
    assert not train([run], lambda run: None, lambda: 0, lambda run: None, 1e9)
    assert counts == [30] * 19 + [100]  # 60 iterations, an accuracy after every third


def test_the_same_seed_is_the_same_weights_and_batches_for_all_rows(data):
    one, other = (Run(ROWS[name], 4, Scale(), data) for name in ("fixed", "adam-fixed"))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.batches.sample()[0], other.batches.sample()[0])


def test_caffes_momentum_is_said_and_does_something(folder, tmp_path, small, capsys):
    options = ("--rows", "one_cycle", "--scale", "1/400")
    assert run_paper(folder, tmp_path / "torch", *options) == 0
    assert "Momentum as in torch" in capsys.readouterr().out
    assert run_paper(folder, tmp_path / "caffe", *options, "--caffe-momentum") == 0
    assert "Momentum as in Caffe" in capsys.readouterr().out
    (plain,), (caffe,) = results_of(tmp_path / "torch"), results_of(tmp_path / "caffe")
    assert (plain["momentum"], caffe["momentum"]) == ("torch", "caffe")
    assert plain["weights"] != caffe["weights"]


@pytest.mark.gpu
def test_a_captured_run_trains_as_an_eager_one(data, folder):
    there = images.read(folder, "cuda")
    accuracies = []
    for on_kernels in (False, True):
        run = Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), there, device="cuda")
        run.on_kernels = on_kernels  # without kernels there is no graph
        graphs = []
        show = lambda run: graphs.append(run._graph is not None)  # noqa: E731, B023
        assert not train([run], lambda run: None, lambda: 0, show, 1e9)
        assert any(graphs) is on_kernels
        assert (run.iteration, run.optimizer.iteration, run.batches.position) == (60, 60, 60)
        accuracies.append([value for _, value in run.curve])
    # cuDNN's convolutions may differ from run to run.
    assert accuracies[1] == pytest.approx(accuracies[0], abs=10)


@pytest.mark.gpu
def test_captured_runs_beside_each_other_are_those_alone(folder, monkeypatch):
    """Each run has its own stream, and reads no tensor that another run writes."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    there = images.read(folder, "cuda")
    names = ("window-hann", "adam-triangular", "one_cycle", "window-welch", "nesterov-triangular")
    found = {name: [] for name in names}
    for together in (1, 5):
        runs = (
            Run(ROWS[name], 0, Scale(Fraction("1/500")), there, device="cuda") for name in names
        )
        left = train(
            runs, lambda run: None, lambda: 0, lambda run: None, 1e9, together,
            lambda run: found[run.row.name].append(run.curve),
        )  # fmt: skip
        assert left == []
    for alone, beside in found.values():
        assert len(alone) > 10
        for (at, value), (same, other) in zip(alone, beside, strict=True):
            assert at == same
            assert other == pytest.approx(value, abs=10)


@pytest.mark.gpu
def test_a_captured_run_resumes(folder, small, tmp_path):
    there = images.read(folder, "cuda")
    store = Store(tmp_path)
    scale = Scale(Fraction("1/400"))
    first = Run(ROWS["window-hann"], 0, scale, there, device="cuda")
    stops = iter([0] * 30 + [15] * 100)
    left = train([first], store.save, lambda: next(stops), lambda run: None, 1e9)
    assert left == [first]
    second = Run(ROWS["window-hann"], 0, scale, there, device="cuda")
    assert store.load(second)
    assert second.optimizer.iteration == second.batches.position == first.iteration
    assert not train([second], store.save, lambda: 0, lambda run: None, 1e9)
    assert (second.iteration, second.optimizer.iteration, second.batches.position) == (60, 60, 60)
