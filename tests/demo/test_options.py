"""Options that all commands share: names in any case, errors that name options, ``--json``."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch

from clr_optim import cli, options
from clr_optim.bench.workloads import RULES
from clr_optim.cli.outcome import Outcome
from clr_optim.demo.train import OPTIMIZERS
from clr_optim.options import name_options, spelled
from clr_optim.schedule import POLICIES


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "name"),
    [("adamw", "AdamW"), ("ADAMW", "AdamW"), ("SGD", "SGD"), ("sgd-nesterov", "sgd-nesterov")],
)
def test_a_name_is_found_in_any_case(text, name):
    assert spelled(OPTIMIZERS)(text) == name


@pytest.mark.parametrize("text", ["Warm-Restarts", "warm_restarts", " WARM_RESTARTS "])
def test_a_policy_is_found_in_any_case(text, capsys):
    assert cli.main(["plot", "--policy", text, "--steps", "9", "--period", "3"]) == 0
    assert capsys.readouterr().out == "warm_restarts.png\n"


def test_optimizers_and_rules_are_one_table():
    for name, make in OPTIMIZERS.items():
        optimizer = make([{"params": [torch.zeros(1)]}], 0.5)
        rules = [rule for rule in RULES.values() if rule.optimizer is type(optimizer)]
        assert type(optimizer).__name__ == name
        assert optimizer.defaults["lr"] == 0.5
        assert any(
            all(optimizer.defaults[key] == value for key, value in rule.settings.items())
            for rule in rules
        )
    assert OPTIMIZERS["SGD"]([{"params": [torch.zeros(1)]}], 0.5).defaults["momentum"] == 0.9
    assert {rule.optimizer.__name__ for rule in RULES.values()} == set(OPTIMIZERS)


# (message of the library, options, message of the command)
MESSAGES = [
    ("base_lr=2.0 is above max_lr=1.0", "base_lr max_lr", "--base-lr=2.0 is above --max-lr=1.0"),
    ("base_lr=2.0 is above max_lr=1.0", "base_lr", "--base-lr=2.0 is above max_lr=1.0"),
    ("raise end_lr, not min_end_lr", "end_lr", "raise --end-lr, not min_end_lr"),
    ("steps must be whole steps", "steps", "--steps must be whole steps"),
    ("num_steps must be >= 2", "steps", "--steps must be >= 2"),
    ("window='x' in a window", "window", "--window='x' in a window"),
    ("--base-lr 0 is no rate", "base_lr", "--base-lr 0 is no rate"),
]


@pytest.mark.parametrize(("message", "names", "expected"), MESSAGES)
def test_errors_name_options(message, names, expected):
    assert name_options(message, Namespace(**dict.fromkeys(names.split()))) == expected


def test_json_alone_goes_to_standard_output_and_text_to_standard_error(capsys):
    assert cli.main(["info", "--json"]) == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert results["torch"] == torch.__version__
    assert set(results["optimizers"]) > {"Adam", "AdamW"}
    assert "clr_optim" in printed.err


def test_json_of_a_picture_has_the_rates(tmp_path, capsys):
    options = ["--policy", "Triangular", "--step-size-up", "2", "--steps", "4", "--max-lr", "0.4"]
    assert cli.main(["plot", *options, "--json", "rates.json"]) == 0
    results = json.loads((tmp_path / "rates.json").read_text())
    assert results["lr"] == pytest.approx([0.1, 0.25, 0.4, 0.25, 0.1])
    assert results["schedule"]["name"] == "triangular"
    assert results["pictures"] == ["triangular.png"] == capsys.readouterr().out.split()
    assert cli.main(["plot", "--json", "all.json"]) == 0
    assert len(json.loads((tmp_path / "all.json").read_text())["pictures"]) == len(POLICIES) + 5


def test_json_of_a_range_test_and_of_a_training(tmp_path, capsys):
    argv = ["range-test", "--optimizer", "ADAM", "--threads", "1", "--steps", "120", "--json"]
    assert cli.main([*argv, "test.json"]) == 0
    found = json.loads((tmp_path / "test.json").read_text())
    assert found["optimizer"] == "Adam"
    assert 0 < found["base_lr"] < found["max_lr"]
    assert found["reason"] in capsys.readouterr().out
    assert len(found["curve"]["lrs"]) == len(found["curve"]["values"])
    flat = ["--start-lr", "1e-8", "--end-lr", "1e-7", "--steps", "60"]
    assert cli.main(["range-test", *flat, "--threads", "1", "--json", "flat.json"]) == 1
    assert "raise --end-lr" in json.loads((tmp_path / "flat.json").read_text())["no_bounds"]
    argv = ["train", "--base-lr", "0.02", "--max-lr", "0.2", "--cycles", "1", "--threads", "1"]
    argv += ["--epochs-per-step-size", "1", "--policy", "TRIANGULAR"]
    assert cli.main([*argv, "--json", "train.json", "--save", "saved.json"]) == 0
    trained = json.loads((tmp_path / "train.json").read_text())
    assert trained["policy"] == "triangular"
    assert len(trained["loss"]) == 48
    assert trained == json.loads((tmp_path / "saved.json").read_text())


def test_json_of_the_demo(tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["policy"] for row in rows[:4]] == [
        "fixed",
        "triangular",
        "triangular2",
        "exp_range",
    ]
    for row in rows:
        assert len(row["accuracies"]) == 1
        assert len(row["accuracies"][0]) == len(row["iterations"])
        assert row["step_s"] > 0


def test_every_command_has_json():
    parser = cli.command.make_parser()
    lines = [
        ["demo"], ["range-test"], ["train"], ["plot"], ["info"], ["bench"],
        ["bench", "bounds"], ["bench", "curve"], ["bench", "paper"], ["bench", "long"],
    ]  # fmt: skip
    for line in lines:
        assert parser.parse_args([*line, "--json"]).json == "-", line
        assert parser.parse_args([*line, "--json", "a.json"]).json == "a.json"
        assert parser.parse_args(line).json is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(options.json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        options.write_json(str(path), {})
    assert path.read_text() == "old"


def test_a_file_that_cannot_be_written_is_found_before_the_work(tmp_path, capsys, monkeypatch):
    from clr_optim.cli import info

    monkeypatch.setattr(info, "_info", lambda args: pytest.fail("ran"))
    (tmp_path / "folder").mkdir()
    for target in ("folder", "absent/a.json"):
        with pytest.raises(SystemExit):
            cli.main(["info", "--json", target])
        assert capsys.readouterr().err.startswith(f"clr-optim: error: --json {target}: ")


def test_results_of_the_paper_are_those_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "speed.json").write_text('{"a": 1}')
    runs = [{"row": "fixed", "seed": 2}, {"row": "fixed", "seed": 3}]
    lines = "".join(f"{json.dumps(run)}\n" for run in runs)
    (tmp_path / "out" / "results.jsonl").write_text(lines)
    monkeypatch.setattr(cli.command.paper, "run", lambda args: 0)
    outcome = cli.command._paper(Namespace(out=tmp_path / "out", json="-"))
    assert outcome == Outcome({"speed": {"a": 1}, "results": runs}, 0)
