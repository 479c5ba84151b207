"""The command that reruns the paper's tables, and its folder of results."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from paper_helpers import TWO_HUNDRED, result_of, run_paper, write_slice

from clr_optim.bench.cifar10 import cifar10_full
from clr_optim.bench.paper import ROWS, Run, Scale, speed
from clr_optim.bench.paper import data as images
from clr_optim.bench.paper.report import report
from clr_optim.bench.paper.store import Store
from clr_optim.cli import main


def test_a_line_that_was_cut_off_is_not_a_result(tmp_path):
    store = Store(tmp_path)
    assert store.is_empty()
    assert store.read() == []
    store.append(result_of())
    with store.results.open("a") as file:
        file.write('{"row": "exp", "se')
    assert [run["row"] for run in store.read()] == ["fixed"]
    store.append(result_of("decay"))
    assert [run["row"] for run in store.read()] == ["fixed", "decay"]
    assert not store.is_empty()


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"row": "fixed", "seed": 0}\nnonsense\n')
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2: no result of a run"):
        Store(tmp_path).read()


def test_a_row_of_another_version_is_refused(tmp_path):
    Store(tmp_path).append({**result_of(), "row": "of tomorrow"})
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: no result of a run"):
        Store(tmp_path).read()


@pytest.mark.parametrize("contents", [b"", b"no checkpoint", None])
def test_a_checkpoint_of_something_else_is_refused_by_name(
    contents, folder, tmp_path, small, monkeypatch, capsys
):
    out = tmp_path / "out"
    path = Store(out).checkpoint("nesterov-triangular", 0)
    torch.save({"step": 3}, path)
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(SystemExit):
        run_paper(folder, out, "--rows", "nesterov-triangular", *TWO_HUNDRED, "--resume")
    error = capsys.readouterr().err
    assert f"{path}: no checkpoint of a run" in error
    assert "remove it to begin the run anew" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--table", "4"], "no table '4'; there are 1, 2, 3, beyond"),
        (["--rows", "fixed,nonsense"], "no row 'nonsense'; there are fixed, fixed-stepped"),
        ([], "give --table 1, 2, 3 or beyond, or --rows"),
        (["--table", "3", "--rows", "exp"], "--rows exp: not in table 3"),
        (["--table", "1", "--scale", "0.0001"], "turns 5,000 iterations into 0.5"),
        (["--table", "1", "--scale", "1/3"], "a multiple of 0.01 serves all rows"),
        (
            ["--table", "1", "--scale", "-1"],
            "a number above 0 and at most 100, as 0.1 or 1/10, got '-1'",
        ),
        (["--table", "1", "--seeds", "0"], "must be a whole number >= 1, got '0'"),
        (["--table", "resnet", "--range-test", "1"], "must be a whole number >= 2, got '1'"),
        (["--speed", "9", "--checkpoint-every", "0"], "--checkpoint-every has no effect with"),
        (["--report"], "--data has no effect with --report: it trains nothing"),
        (["--speed", "9", "--seeds", "2"], "--seeds has no effect with --speed: it measures"),
        (["--speed", "9", "--range-test", "9"], "--range-test has no effect with --speed"),
        (
            ["--table", "resnet", "--range-test", "9", "--scale", "0.1"],
            "--scale has no effect with --range-test: it trains no row",
        ),
        (["--rows", "adam-fixed", "--caffe-momentum"], "--caffe-momentum has no effect on these"),
        (["--table", "1", "--checkpoint-every", "soon"], "a number of minutes >= 0, got 'soon'"),
        (["--table", "1", "--device", "abacus"], "must be cpu or cuda, got 'abacus'"),
        (["--table", "1", "--together", "2"], "--together 2: only on a GPU; on a CPU start a"),
        (["--figure", "5"], "invalid choice: '5'"),
        (["--figure", "6", "--table", "1,3"], "--figure 6 and --table 1,3: give one of them"),
        (["--figure", "6", "--rows", "fixed"], "--rows fixed: not in figure 6"),
        (["--rows", "one-triangle"], "not in table 1, 3, beyond; add --figure 6"),
        (["--figure", "6", "--scale", "1/9"], "a multiple of 1/7500 serves all rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_are_refused_before_anything_is_trained(options, words, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_paper(folder, tmp_path / "out", *options)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--table", "1"], ["--speed", "9"]])
def test_a_folder_that_takes_no_files_is_refused_before_training(option, folder, tmp_path, capsys):
    out = tmp_path / "a file"
    out.write_text("")
    with pytest.raises(SystemExit):
        run_paper(folder, out, *option)
    assert f"--out {out}: is no folder; give another folder" in capsys.readouterr().err


def test_the_folder_that_is_missing_is_named_by_its_data(capsys):
    for table, name in (("1", "CIFAR-10's"), ("resnet-100", "CIFAR-100's")):
        with pytest.raises(SystemExit):
            main(["bench", "paper", "--table", table])
        assert f"--data is missing: the folder of {name} files" in capsys.readouterr().err


def test_json_has_the_reports_and_the_finished_runs_alone(tmp_path, capsys):
    store = Store(tmp_path)
    store.append({**result_of(), "data_note": "a\u2028b"})
    with store.results.open("a") as file:
        file.write('{"row": "exp", "se')  # a process died here
    (tmp_path / "notes.json").write_text("mine")
    report_ = ["bench", "paper", "--report", "--out", str(tmp_path)]
    assert main(report_) == 0
    capsys.readouterr()
    assert main([*report_, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["results"] == store.read()
    assert set(written) == {"paper", "results"}


def test_results_and_data_that_do_not_go_together_are_refused(folder, tmp_path, small, capsys):
    def error(*options, data=folder):
        with pytest.raises(SystemExit):
            run_paper(data, tmp_path / "out", "--rows", "window-hann", *options)
        return capsys.readouterr().err.splitlines()[-1]

    assert run_paper(folder, tmp_path / "out", "--rows", "window-hann", "--scale", "1/400") == 0
    capsys.readouterr()
    assert "there are results; add --resume" in error("--scale", "1/400")
    assert "has scale '1/400', and this run '1/200'" in error("--scale", "1/200", "--resume")
    assert "has momentum 'torch'" in error("--scale", "1/400", "--resume", "--caffe-momentum")
    write_slice(tmp_path / "other", seed=1)
    assert "has data" in error("--scale", "1/400", "--resume", data=tmp_path / "other")
    assert "CIFAR-10 binary version" in error("--scale", "1/400", data=tmp_path / "nowhere")
    assert "has batch_size 10, and this run 20" in _with_batches(20, error)


def _with_batches(size, error):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "BATCH_SIZE", size)
        return error("--scale", "1/400", "--resume")


def test_another_runs_checkpoint_is_refused(data, tmp_path):
    store = Store(tmp_path)
    store.save(Run(ROWS["window-hann"], 0, Scale(Fraction("1/400")), data))
    other = Run(ROWS["window-hann"], 0, Scale(Fraction("1/200")), data)
    with pytest.raises(ValueError, match=r"checkpoint-window-hann-0\.pt: .* has scale '1/400'"):
        store.load(other)


def test_too_few_images_are_refused(tmp_path, capsys):
    write_slice(tmp_path / "bin", per_file=19)
    with pytest.raises(SystemExit):
        run_paper(tmp_path / "bin", tmp_path / "out", "--table", "1")
    assert "95 training images, fewer than a batch of 100" in capsys.readouterr().err


def test_speed_has_its_variants(folder, tmp_path, small, capsys):
    assert run_paper(folder, tmp_path, "--speed", "10") == 0
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert set(speed["iterations_per_s"]) == {
        "clr_optim", "torch.optim.SGD + CyclicLR", "the same, fused"
    }  # fmt: skip
    assert all(rate > 0 for rate in speed["iterations_per_s"].values())
    Store(tmp_path).append(result_of())
    assert "Iterations per second on cpu: clr_optim" in report(tmp_path)


def test_torchs_iteration_is_the_same_training(data):
    """The speed is compared with an iteration of torch that does the same work."""
    ours = speed._speed_run(data, "cpu")
    models = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            speed, "cifar10_full", lambda seed: models.append(cifar10_full(seed)) or models[-1]
        )
        iterate = speed._torch_iteration(data, "cpu", None)
    for _ in range(5):
        ours.iterate()
        iterate()
    for a, b in zip(ours.model.parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_python_m():
    done = subprocess.run(
        [sys.executable, "-m", "clr_optim", "bench", "paper", "--table", "1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--data is missing" in done.stderr
