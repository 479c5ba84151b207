"""The demo: data, runs, printed table, pictures."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clr_optim import CyclicalOptimizer
from clr_optim.cli import main
from clr_optim.demo import COMPARED, POLICIES, Bounds, _train_once, load_digits, table, verdict
from clr_optim.demo.train import (
    OPTIMIZERS,
    Plan,
    Run,
    build_network,
    build_optimizer,
    digits_task,
    search_bounds,
    split_digits,
    train,
)

# 48 iterations, 4 evaluations.
SHORT = Plan(cycles=1, epochs_per_step_size=1, evaluations_per_cycle=4)
BOUNDS = Bounds(0.01, 0.04)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_data_is_the_uci_test_set():
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8)
    assert labels.shape == (1797,)
    assert images.dtype == labels.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 16)
    # The counts that were published with the set.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # A blank or repeated image would show a broken file.
    assert len(np.unique(images.reshape(1797, 64), axis=0)) == 1797


def test_split_is_disjoint_complete_stratified_and_fixed():
    training, test = split_digits()
    assert torch.bincount(training.labels).tolist() == [120] * 10
    counts = torch.bincount(test.labels)
    assert counts.sum() == 597
    assert counts.min() >= 54

    def rows(images):
        return {tuple(row) for row in images.flatten(1).mul(16).to(torch.uint8).tolist()}

    # All 1,797 images differ, so these sets are the images themselves.
    assert not rows(training.images) & rows(test.images)
    assert len(rows(training.images) | rows(test.images)) == 1797
    assert training.images.shape == (1200, 1, 8, 8)
    assert training.images.dtype == torch.float32
    assert (training.images.min(), training.images.max()) == (0, 1)
    for first, second in zip((training, test), split_digits(), strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)


@pytest.mark.parametrize("plan", [Plan(), Plan(cycles=2, epochs_per_step_size=2)])
def test_plan_follows_the_papers_advice(plan):
    assert plan.iterations_per_epoch == len(digits_task().batches)
    assert 2 <= plan.epochs_per_step_size <= 10
    assert plan.iterations == plan.cycles * 2 * plan.step_size == plan.cycle_ends[-1]
    assert 2 * plan.step_size % plan.evaluate_every == 0
    assert plan.gamma**plan.iterations == pytest.approx(0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fixed_is_torchs_own_optimizer_at_the_middle_of_the_bounds(name):
    task = digits_task()
    plain = build_optimizer(name, "fixed", task, task.build(), base_lr=0.01, max_lr=0.04)
    assert type(plain) is getattr(torch.optim, name)

    run = _train_once(task, name, "fixed", BOUNDS, SHORT, 3)
    assert run.rates == [pytest.approx(0.02)] * SHORT.iterations

    # The same loop with torch alone.
    data = split_digits()
    torch.manual_seed(3)
    model = build_network()
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=run.rates[0], **options)
    losses = []
    for _ in range(2):
        for rows in torch.randperm(1200).split(50):
            optimizer.zero_grad()
            output = model(data[0].images[rows])
            loss = torch.nn.functional.cross_entropy(output, data[0].labels[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    right = (model(data[1].images).argmax(1) == data[1].labels).sum().item()
    assert run.losses == losses
    assert run.accuracies[-1] == 100.0 * right / 597
    assert run.evaluated == [12, 24, 36, 48]


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "fixed"])
def test_cyclic_runs_go_through_the_library_and_follow_the_schedule(policy):
    task = digits_task()
    optimizer = build_optimizer(
        "SGD", policy, task, task.build(),
        base_lr=0.01, max_lr=0.04, step_size_up=SHORT.step_size, gamma=SHORT.gamma,
    )  # fmt: skip
    assert isinstance(optimizer, CyclicalOptimizer)
    assert type(optimizer.optimizer) is torch.optim.SGD
    run = _train_once(task, "SGD", policy, BOUNDS, SHORT, 0)
    assert run.rates == [optimizer.lr_at(t)[0] for t in range(SHORT.iterations)]
    assert run.rates[0] == 0.01
    assert max(run.rates) <= 0.04


def test_same_seed_same_numbers_and_another_seed_others():
    task = digits_task()
    first, again, other = (
        _train_once(task, "Adam", "exp_range", BOUNDS, SHORT, seed) for seed in (5, 5, 6)
    )
    assert first.accuracies == again.accuracies
    assert first.rates == again.rates
    assert first.losses == again.losses
    assert first.losses != other.losses
    assert len(first.accuracies) == 4
    assert len(first.step_seconds) == len(first.losses) == SHORT.iterations


def test_it_learns():
    plan = Plan(cycles=1, epochs_per_step_size=2)
    bounds = Bounds(0.005, 0.02)
    run = _train_once(digits_task(), "Adam", "triangular", bounds, plan, 0)
    assert run.accuracies[-1] > 80  # chance is 10


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("seed", range(2))
def test_the_range_test_finds_bounds_to_train_with_for_every_optimizer(name, seed):
    task = digits_task()
    bounds = search_bounds(task, name, seed=seed).suggest()
    assert bounds.base_lr < bounds.max_lr / 2
    plan = Plan(cycles=2, epochs_per_step_size=2)
    assert _train_once(task, name, "triangular2", bounds, plan, seed).accuracies[-1] > 75


def test_an_interrupted_training_keeps_what_it_measured():
    task = digits_task()
    model, run = task.build(), Run(evaluate_every=4)
    optimizer = build_optimizer("SGD", "fixed", task, model, base_lr=0.1, max_lr=0.1)

    def interrupt():
        if len(run.losses) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, task, 100, run, interrupt)
    assert len(run.losses) == 10
    assert run.evaluated == [4, 8]


@pytest.mark.parametrize("size", [0, -1, 1201])
def test_batches_that_cannot_be_are_refused(size):
    with pytest.raises(ValueError, match=f"batch_size must be from 1 to 1200.* got {size}"):
        digits_task(batch_size=size)


def test_table_has_cycle_ends_means_spreads_and_times():
    plan = Plan(cycles=2, evaluations_per_cycle=2)
    runs = [
        Run(accuracies=[1, 80, 2, 90], step_seconds=[1e-6, 3e-6, 9e-6]),
        Run(accuracies=[1, 82, 2, 94], step_seconds=[1e-6, 3e-6, 9e-6]),
    ]
    lines = table({("SGD", "fixed"): runs}, plan).splitlines()
    assert "2 seeds" in lines[0]
    assert lines[2].split()[:2] == ["optimizer", "policy"]
    assert lines[-1].split() == ["SGD", "fixed", "81.00", "92.00", "±", "2.83", "3"]
    assert "±" not in table({("SGD", "fixed"): runs[:1]}, plan)


@pytest.mark.parametrize(
    ("finals", "said"),
    [
        (
            {"fixed": [90.0, 91.0], "triangular": [95.0, 96.0], "exp_range": [80.0, 80.0]},
            "SGD: triangular was best, 95.50 % against 90.50 % for the fixed rate (ahead on 2 of 2 "
            "seeds); exp_range lost against the fixed rate.",
        ),
        (
            {"fixed": [95.0, 91.0], "triangular": [90.0, 92.0], "exp_range": [80.0, 80.0]},
            "SGD: the fixed rate was best, 93.00 % against 91.00 % for triangular (ahead on 1 of 2 "
            "seeds; the difference is smaller than its spread over seeds); every cyclic policy "
            "lost against it.",
        ),
        (
            {"fixed": [90.0], "triangular": [91.0], "exp_range": [90.0]},
            "SGD: triangular was best, 91.00 % against 90.00 % for the fixed rate.",
        ),
        (
            {"fixed": [90.0], "triangular": [89.0], "exp_range": [90.0]},
            "SGD: exp_range and the fixed rate came out level, 90.00 %; "
            "triangular lost against the fixed rate.",
        ),
    ],
)
def test_verdict_says_what_was_measured(finals, said):
    assert verdict("SGD", {p: np.array(v) for p, v in finals.items()}) == said


def test_quick_demo_finds_bounds_prints_every_row_and_draws_four_pictures(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert main(["demo", "--quick", "--out", str(tmp_path / "new" / "folder")]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert out.startswith("Quick")
    assert "gamma = 0.988" in out
    assert "luck" in out
    for name in COMPARED:
        bounds = search_bounds(digits_task(), name, seed=0).suggest()
        assert f"{name}: {bounds.base_lr:.2g} to {bounds.max_lr:.2g}; {bounds.reason}." in out
        for policy in POLICIES:
            assert re.search(rf"^{name} +{policy} +\d+\.\d\d +\d+\.\d\d +\d+$", out, re.MULTILINE)
        assert re.search(rf"^{name}: (the fixed|tri|exp).*%", out, re.MULTILINE)
    paths = [Path(line) for line in out.splitlines()[-4:]]
    sizes = {
        "range-test-sgd.png": (1280, 640),
        "range-test-adam.png": (1280, 640),
        "learning-rate.png": (1800, 720),
        "accuracy.png": (1800, 720),
    }
    assert [path.name for path in paths] == list(sizes)
    for path in paths:
        assert path.parent == tmp_path / "new" / "folder"
        with Image.open(path) as image:
            assert image.size == sizes[path.name]
            assert len(np.unique(np.asarray(image.convert("L")))) > 10


@pytest.mark.parametrize(
    "options", [["--seed", "-1"], ["--seed", "x"], ["--seeds", "0"], ["--seeds", "1.5"], ["--fast"]]
)
def test_bad_options_are_named(options, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *options])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert options[0] in error


def test_a_folder_that_cannot_be_made_stops_before_training(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--out", str(file)])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert str(file) in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("missing", ["tqdm", "matplotlib.figure"])
def test_missing_packages_are_named_before_training(missing, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == missing:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert f"pip install {missing.partition('.')[0]}\n" in capsys.readouterr().err
