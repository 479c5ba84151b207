"""Snapshots: taken at cycle ends, whole on disk, and averaged without a trace in the model."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from clr_optim import CyclicalOptimizer, Snapshots
from clr_optim.schedule import fixed, one_cycle, triangular, warm_restarts

PERIOD = 4


def softmax(logits):
    return logits.softmax(dim=-1)


class Noisy(nn.Module):
    """All kinds of tensors and modes, and random numbers in each forward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Dropout(0.5).eval()
        self.last = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.fails = False

    def forward(self, inputs, *, scale=1.0):
        if self.fails:
            raise OSError("no forward")
        self.calls += 1
        hidden = self.norm(self.first(inputs)).relu()
        if not self.training:
            hidden = functional.dropout(hidden, 0.25, training=True)
            hidden = hidden + random.random() * np.random.rand()
        return self.last(hidden) * scale


def started(model=None, policy=None, **options):
    torch.manual_seed(0)
    if model is None:
        norm = nn.BatchNorm1d(6)
        model = nn.Sequential(nn.Linear(3, 6), norm, nn.ReLU(), nn.Linear(6, 4))
    sgd = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
    base_lr = None if policy == fixed() else 0.1
    opt = CyclicalOptimizer(sgd, policy or triangular(PERIOD // 2), base_lr=base_lr)
    return model, opt, Snapshots(opt, model, **options)


def batch(step):
    draws = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, generator=draws), torch.randint(4, (8,), generator=draws)


def step_once(model, opt, step):
    inputs, labels = batch(step)
    opt.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    opt.step()


def train(model, opt, steps):
    """Train on. Return a copy of the model after each step, by the position."""
    copies = {}
    for _ in range(steps):
        step_once(model, opt, opt.iteration)
        copies[opt.iteration] = copy.deepcopy(model).eval()
    return copies


def assert_equal_states(found, expected):
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


# ---- which snapshots


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_last_snapshots_of_cycle_ends_stay(tmp_path, on_disk):
    model, opt, snapshots = started(last=3, folder=tmp_path if on_disk else None)
    assert (len(snapshots), snapshots.steps, list(snapshots)) == (0, [], [])
    copies = train(model, opt, 3 * PERIOD - 1)
    assert snapshots.steps == [4, 8]
    copies |= train(model, opt, 2 * PERIOD)
    assert snapshots.steps == [8, 12, 16]
    assert len(snapshots) == 3
    for step, each in zip(snapshots.steps, snapshots, strict=True):
        assert type(each) is type(model)
        assert not any(module.training for module in each.modules())
        assert_equal_states(each.state_dict(), copies[step].state_dict())
    names = [f"snapshot-{step}.pt" for step in (8, 12, 16)] if on_disk else []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("policy", "scheduler"),
    [
        (
            triangular(PERIOD // 2),
            lambda sgd: torch.optim.lr_scheduler.CyclicLR(
                sgd, 0.1, 0.4, PERIOD // 2, cycle_momentum=False
            ),
        ),
        (
            warm_restarts(PERIOD),
            lambda sgd: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
                sgd, PERIOD, eta_min=0.1
            ),
        ),
    ],
    ids=["triangular", "warm_restarts"],
)
def test_a_snapshot_is_of_the_step_before_the_rate_rises_again(policy, scheduler):
    """Against torch's schedulers: the snapshot at the *next* rate's top would be one step late."""
    model, opt, snapshots = started(policy=policy)
    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.4, momentum=0.9)
    torchs = scheduler(sgd)
    train(model, opt, 3 * PERIOD)
    ends = []
    for step in range(3 * PERIOD):
        step_once(twin, sgd, step)
        torchs.step()
        if step % PERIOD == PERIOD - 1:
            ends.append(copy.deepcopy(twin).eval())
    assert len(ends) == len(snapshots)
    for found, expected in zip(snapshots, ends, strict=True):
        torch.testing.assert_close(found.state_dict(), expected.state_dict())
    inputs = batch(99)[0]
    mean = sum(each(inputs) for each in ends) / 3
    torch.testing.assert_close(snapshots.predict(inputs), mean)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_snapshot_removes_those_of_later_steps(tmp_path, on_disk):
    model, opt, snapshots = started(folder=tmp_path if on_disk else None)
    train(model, opt, 3 * PERIOD)
    opt.set_iteration(PERIOD + 1)
    assert snapshots.steps == [4, 8, 12]
    copies = train(model, opt, PERIOD - 1)
    assert snapshots.steps == [4, 8]
    assert_equal_states(list(snapshots)[-1].state_dict(), copies[8].state_dict())


def test_a_step_that_raises_takes_no_snapshot():
    model, opt, snapshots = started()
    train(model, opt, PERIOD - 1)

    def fail(opt, args, kwargs):
        raise OSError("no step")

    handle = opt.register_step_pre_hook(fail)
    with pytest.raises(OSError, match="no step"):
        opt.step()
    handle.remove()
    assert snapshots.steps == []
    train(model, opt, 1)
    assert snapshots.steps == [PERIOD]


# ---- predictions


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("transform", [None, softmax])
def test_predictions_are_the_mean_of_the_models(tmp_path, on_disk, transform):
    model, opt, snapshots = started(
        last=3, folder=tmp_path if on_disk else None, transform=transform
    )
    copies = train(model, opt, 5 * PERIOD)
    inputs = batch(99)[0]
    with torch.no_grad():
        outputs = [copies[step](inputs).numpy() for step in (12, 16, 20)]
    if transform is not None:
        outputs = [np.exp(o) / np.exp(o).sum(axis=1, keepdims=True) for o in outputs]
    found = snapshots.predict(inputs)
    np.testing.assert_allclose(found, np.mean(outputs, axis=0), rtol=2e-6, atol=1e-7)
    assert not found.requires_grad
    by_hand = torch.stack([(transform or nn.Identity())(m(inputs)) for m in snapshots]).mean(dim=0)
    torch.testing.assert_close(found, by_hand)


def test_arguments_reach_the_model():
    model, opt, snapshots = started(Noisy())
    train(model, opt, PERIOD)
    inputs = batch(99)[0]
    once = snapshots.predict(inputs)
    torch.testing.assert_close(snapshots.predict(inputs=inputs, scale=3.0), 3 * once)


def test_bfloat16_is_summed_in_float32():
    model, opt, snapshots = started(nn.Linear(3, 4).bfloat16())
    for step in range(3 * PERIOD):
        opt.zero_grad()
        model(batch(step)[0].bfloat16()).square().mean().backward()
        opt.step()
    inputs = batch(99)[0].bfloat16()
    mean = torch.stack([each(inputs).double() for each in snapshots]).mean(dim=0)
    found = snapshots.predict(inputs)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, mean.bfloat16())


def test_autocast_sees_the_weights_of_each_snapshot():
    """It caches the weights that it casts: one model with changing contents would be stale."""
    model, opt, snapshots = started()
    copies = train(model, opt, 3 * PERIOD)
    inputs, expected = batch(99)[0], []
    for step in (4, 8, 12):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected.append(copies[step](inputs))
    with torch.autocast("cpu", torch.bfloat16):
        found = snapshots.predict(inputs)
    assert len({tuple(each.flatten().tolist()) for each in expected}) == 3
    assert torch.equal(found, torch.stack(expected).float().mean(dim=0).bfloat16())


def test_inference_mode():
    model, opt, snapshots = started()
    train(model, opt, 2 * PERIOD)
    inputs = batch(99)[0]
    expected = snapshots.predict(inputs)
    with torch.inference_mode():
        assert torch.equal(snapshots.predict(inputs), expected)
    train(model, opt, 1)


def everything(model):
    """Bits, versions and places of all tensors, modes, and the random states, to compare by ==."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return (
        [(id(t), t.data_ptr(), t._version, t.detach().numpy().tobytes()) for t in tensors],
        [(id(module), module.training) for module in model.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_prediction_leaves_no_trace(fails):
    model, opt, snapshots = started(Noisy())
    train(model, opt, 2 * PERIOD)
    assert model.training
    assert not model.frozen.training
    pending = functional.cross_entropy(model(batch(0)[0]), batch(0)[1])
    model.fails = fails
    before = everything(model)
    if fails:
        with pytest.raises(OSError, match="no forward"):
            snapshots.predict(batch(99)[0])
    else:
        snapshots.predict(batch(99)[0])
    assert everything(model) == before
    pending.backward()  # its saved tensors are unchanged


def test_a_snapshot_is_no_view_of_the_model():
    model, opt, snapshots = started()
    copies = train(model, opt, PERIOD)
    train(model, opt, PERIOD - 1)
    (only,) = snapshots
    assert_equal_states(only.state_dict(), copies[PERIOD].state_dict())
    with torch.no_grad():
        only[0].weight.zero_()  # the models that iteration yields are the caller's
    assert_equal_states(next(iter(snapshots)).state_dict(), copies[PERIOD].state_dict())


def test_models_in_wrappers_are_taken_out():
    inner = nn.Linear(3, 4)
    compiled = torch.compile(nn.DataParallel(inner), backend="eager")
    _, opt, snapshots = started(compiled)
    for _ in range(PERIOD):
        opt.step()
    (only,) = snapshots
    assert type(only) is nn.Linear
    assert_equal_states(only.state_dict(), inner.state_dict())


# ---- folders


def test_a_resumed_run_keeps_its_snapshots(tmp_path):
    model, opt, snapshots = started(last=3, folder=tmp_path / "new" / "folder")
    copies = train(model, opt, 3 * PERIOD + 1)
    saved = {"model": model.state_dict(), "opt": opt.state_dict()}
    path = tmp_path / "run.pt"
    torch.save(saved, path)

    model, opt, _ = started()
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    again = Snapshots(opt, model, last=3, folder=tmp_path / "new" / "folder")
    assert again.steps == [4, 8, 12]
    inputs = batch(99)[0]
    assert torch.equal(again.predict(inputs), snapshots.predict(inputs))
    copies |= train(model, opt, PERIOD)
    assert again.steps == [8, 12, 16]
    for step, each in zip(again.steps, again, strict=True):
        assert_equal_states(each.state_dict(), copies[step].state_dict())


def test_a_file_loads_in_a_plain_model(tmp_path):
    model, opt, _ = started(folder=tmp_path)
    train(model, opt, PERIOD)
    other = copy.deepcopy(model)
    other[0].weight.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "snapshot-4.pt", weights_only=True))
    assert_equal_states(other.state_dict(), model.state_dict())


def test_a_file_has_no_more_than_the_models_values(tmp_path):
    """A parameter may be a view of a large tensor."""
    model = nn.Linear(3, 4)
    model.weight = nn.Parameter(torch.zeros(1_000_000)[:12].view(4, 3))
    model, opt, _ = started(model, folder=tmp_path)
    for _ in range(PERIOD):
        opt.step()
    assert (tmp_path / "snapshot-4.pt").stat().st_size < 100_000


def test_the_working_directory_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, opt, snapshots = started(folder="here")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    train(model, opt, PERIOD)
    assert len(snapshots) == 1
    assert (tmp_path / "here/snapshot-4.pt").is_file()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from test_snapshots import started, train

torch.set_num_threads(1)  # as in these tests: the sums of more threads differ in the last bits
model, opt, snapshots = started(last=2, folder={folder!r})
train(model, opt, 8)
save = torch.save

def save_half(state, file):
    save(state, file)
    file.flush()
    if {whole}:
        return
    os.truncate(file.fileno(), os.fstat(file.fileno()).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
train(model, opt, 4)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no SIGKILL")
@pytest.mark.parametrize("whole", [False, True])
def test_a_run_killed_while_it_writes_leaves_whole_snapshots(tmp_path, whole):
    folder = tmp_path / "run"
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), whole=whole)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(os.listdir(folder)) == [
        "snapshot-12.pt.tmp", "snapshot-4.pt", "snapshot-8.pt",
    ]  # fmt: skip
    if not whole:
        with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError)):
            torch.load(folder / "snapshot-12.pt.tmp", weights_only=True)

    (folder / "snapshot-3.pt.tmp").touch()  # of an even earlier run

    model, opt, _ = started()
    copies = train(model, opt, 8)
    snapshots = Snapshots(opt, model, last=2, folder=folder)
    assert snapshots.steps == [4, 8]
    for step, each in zip(snapshots.steps, snapshots, strict=True):
        assert_equal_states(each.state_dict(), copies[step].state_dict())
    train(model, opt, PERIOD)
    assert sorted(os.listdir(folder)) == ["snapshot-12.pt", "snapshot-8.pt"]


@pytest.mark.parametrize("when", ["save", "replace"])
def test_a_full_disk_leaves_the_snapshots_and_the_run(tmp_path, monkeypatch, when):
    model, opt, snapshots = started(last=1, folder=tmp_path)
    train(model, opt, 2 * PERIOD - 1)

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((torch, "save") if when == "save" else (Path, "replace")), fail)
        with pytest.raises(OSError, match="No space left"):
            train(model, opt, 1)
    assert os.listdir(tmp_path) == ["snapshot-4.pt"]
    assert opt.iteration == 2 * PERIOD  # the step happened
    train(model, opt, PERIOD)
    assert snapshots.steps == [12]


class Code:
    """A pickle of it makes a folder where it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def torn(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "torn": (torn, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), r"cannot be read \(EOFError\)"),
    "text": (lambda path: path.write_text("no snapshot"), "cannot be read"),
    "pickled code": (
        lambda path: path.write_bytes(pickle.dumps(Code(), protocol=2)),
        r"cannot be read \(UnpicklingError\)",
    ),
    "code in a torch file": (
        lambda path: torch.save({"0.weight": Code()}, path), r"cannot be read \(UnpicklingError\)",
    ),
    "another model": (
        lambda path: torch.save(nn.Linear(3, 4).state_dict(), path),
        "does not fit the model: delete the file or give another folder.*Missing key",
    ),
    "another shape": (
        lambda path: torch.save(
            {k: v.repeat(2) if v.ndim == 1 else v for k, v in torch.load(path).items()}, path
        ),
        "does not fit the model.*size mismatch for 0.bias",
    ),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), "does not fit the model"),
    "a list": (lambda path: torch.save([1, 2], path), "does not fit the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_and_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model, opt, snapshots = started(folder=tmp_path / "run")
    train(model, opt, 2 * PERIOD)
    damage, message = DAMAGE[name]
    damage(tmp_path / "run/snapshot-4.pt")
    before = everything(model)
    with pytest.raises(ValueError, match=rf"snapshot-4\.pt.*{message}") as error:
        snapshots.predict(batch(99)[0])
    assert "weights_only` to `False" not in str(error.value)
    assert everything(model) == before
    assert os.listdir(tmp_path) == ["run"]
    (tmp_path / "run/snapshot-4.pt").unlink()  # the remedy of the message
    assert len(snapshots) == 1
    snapshots.predict(batch(99)[0])


def test_other_files_stay_and_do_not_count(tmp_path):
    names = ["snapshot-04.pt", "snapshot--4.pt", "snapshot-4.pt.bak", "xsnapshot-4.pt", "run.pt",
             "snapshot-4.5.pt", "snapshot-٤.pt", "snapshot-1٤.pt", f"snapshot-{2**63}.pt",
             f"snapshot-{10**30}.pt", "notes.tmp", "snapshot-4.tmp"]  # fmt: skip
    for name in names:
        (tmp_path / name).write_text(name)
    model, opt, snapshots = started(last=1, folder=tmp_path)
    assert snapshots.steps == []
    train(model, opt, 2 * PERIOD)
    assert snapshots.steps == [8]
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "snapshot-8.pt"])
    assert all((tmp_path / name).read_text() == name for name in names)


def test_a_folder_of_a_later_run_warns_before_anything_is_removed(tmp_path):
    model, opt, _ = started(folder=tmp_path)
    train(model, opt, 3 * PERIOD)
    with pytest.warns(UserWarning, match=r"steps \[4, 8, 12\].*load the checkpoint before") as seen:
        model, opt, snapshots = started(folder=tmp_path)
    assert [each.filename for each in seen] == [__file__]
    assert snapshots.steps == [4, 8, 12]
    copies = train(model, opt, PERIOD)
    assert snapshots.steps == [4]
    assert_equal_states(next(iter(snapshots)).state_dict(), copies[4].state_dict())


class WithState(nn.Linear):
    """Has a value of any type in its ``state_dict``."""

    def __init__(self, value):
        super().__init__(3, 4)
        self.value = value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, value):
        self.value = value


def test_values_beside_tensors(tmp_path):
    for folder, value in (
        (None, {"count": 3, "names": ["a"], "path": Path("a")}),
        (tmp_path, {"count": 3, "names": ["a"]}),
    ):
        model, opt, snapshots = started(WithState(value), folder=folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(PERIOD):
                opt.step()
        expected = copy.deepcopy(value)
        model.value["names"].append("b")
        assert next(iter(snapshots)).value == expected


# ---- the end


def test_remove_ends_the_snapshots_and_keeps_those_taken():
    model, opt, snapshots = started()
    train(model, opt, PERIOD)
    snapshots.remove()
    snapshots.remove()
    train(model, opt, PERIOD)
    assert snapshots.steps == [PERIOD]
    assert not opt._cycle_end_hooks
    snapshots.predict(batch(99)[0])


def test_snapshots_keep_no_optimizer_alive():
    model, opt, snapshots = started()
    train(model, opt, PERIOD)
    gone = weakref.ref(opt)
    gc.disable()
    try:
        del opt
        assert gone() is None
    finally:
        gc.enable()
    assert len(snapshots) == 1
    snapshots.remove()


# ---- arguments


def wrong(**change):
    """Call Snapshots with one argument that is wrong, in an empty working directory."""
    model = change.get("model", nn.Linear(3, 4))
    params = [torch.ones(1)] if not isinstance(model, nn.Module) else model.parameters()
    opt = CyclicalOptimizer(torch.optim.SGD(params, lr=0.1))
    try:
        Snapshots(**{"optimizer": opt, "model": model, **change})
    finally:
        assert not opt._cycle_end_hooks


def in_a_used_folder(path, make):
    make(Path(path))
    wrong(folder=path)


#: name -> (call, error, message)
REFUSED = {
    "optimizer: torch's": (
        lambda: wrong(optimizer=torch.optim.SGD([torch.ones(1)])), TypeError,
        r"optimizer must be a CyclicalOptimizer, got SGD: wrap it",
    ),
    "model: a function": (lambda: wrong(model=softmax), TypeError, "model must be .*got function"),
    "model: its state_dict": (
        lambda: wrong(model=nn.Linear(3, 4).state_dict()), TypeError, "got OrderedDict",
    ),
    "last 0": (lambda: wrong(last=0), ValueError, "last must be an integer >= 1, got 0"),
    "last a string": (lambda: wrong(last="all"), TypeError, "last must be an integer"),
    "last broken": (lambda: wrong(last=2.5), ValueError, "last must be"),
    "folder a number": (lambda: wrong(folder=3), TypeError, "folder must be a string or a Path"),
    "folder a file": (
        lambda: in_a_used_folder("file", Path.touch), ValueError,
        "folder must be a folder or a new path, got the file 'file'",
    ),
    "folder with a folder in a file's place": (
        lambda: in_a_used_folder("used", lambda path: os.makedirs(path / "snapshot-7.pt")),
        ValueError, "snapshot-7.pt', which is no file",
    ),
    "model with a value that no safe load accepts": (
        lambda: wrong(model=WithState(Code()), folder="new"), ValueError,
        r"model.state_dict\(\)\['_extra_state'\] is of type Code",
    ),
    "transform a string": (
        lambda: wrong(transform="softmax"), TypeError,
        "transform must be a callable of one output, got 'softmax'",
    ),
    "transform without an argument": (
        lambda: wrong(transform=lambda: 0), TypeError, "transform must be a callable of one output",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_before_anything_has_changed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
    assert os.listdir(tmp_path) in ([], ["file"], ["used"])


@pytest.mark.parametrize(
    ("transform", "got"),
    [
        (lambda logits: logits.argmax(dim=-1), r"of transform .* got a tensor of torch.int64"),
        (lambda logits: [logits], "of transform .* got list"),
    ],
)
def test_an_output_without_a_mean_is_refused(transform, got):
    model, opt, snapshots = started(transform=transform)
    train(model, opt, PERIOD)
    with pytest.raises(TypeError, match=f"{got}: give transform="):
        snapshots.predict(batch(99)[0])


def test_the_output_of_a_model_may_be_anything_that_transform_reads():
    class Dictionary(nn.Linear):
        def forward(self, inputs):
            return {"logits": super().forward(inputs)}

    model, opt, plain = started(Dictionary(3, 4))
    reads = Snapshots(opt, model, transform=lambda output: output["logits"])
    for _ in range(PERIOD):
        opt.step()
    assert reads.predict(batch(99)[0]).shape == (8, 4)
    with pytest.raises(TypeError, match=r"output of model must be .* got dict: give transform="):
        plain.predict(batch(99)[0])


def test_outputs_of_several_shapes_are_refused():
    shapes = iter([(4,), (8, 4)])
    model, opt, snapshots = started(transform=lambda _: torch.ones(next(shapes)))
    train(model, opt, 2 * PERIOD)
    with pytest.raises(ValueError, match=r"step 8 returned the shape \[8, 4\].* \[4\]"):
        snapshots.predict(batch(99)[0])


def test_a_prediction_without_a_snapshot_is_refused():
    _, _, snapshots = started()
    with pytest.raises(RuntimeError, match="no snapshot yet: train to the end of a cycle"):
        snapshots.predict(batch(99)[0])


def test_a_policy_without_cycles_warns():
    with pytest.warns(UserWarning, match="no cycle ends after step 0; use a policy with cycles"):
        started(policy=fixed())


def test_a_finished_run_predicts_from_its_folder(tmp_path):
    model, opt, snapshots = started(policy=one_cycle(PERIOD), folder=tmp_path)
    train(model, opt, PERIOD)
    again = Snapshots(opt, model, folder=tmp_path)  # no warning: pytest makes it an error
    inputs = batch(99)[0]
    assert torch.equal(again.predict(inputs), snapshots.predict(inputs))


def test_a_model_that_is_not_trained_warns_and_one_that_cannot_be_copied_is_named():
    model = torch.nn.Linear(2, 2)
    opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), step_size_up=1)
    with pytest.warns(UserWarning, match="the optimizer trains no parameter of the model"):
        Snapshots(opt, copy.deepcopy(model))
    model.lock = threading.Lock()
    snapshots = Snapshots(opt, model)
    opt.step()
    opt.step()
    with pytest.raises(TypeError, match=r"model cannot be copied \(TypeError: cannot pickle.*load"):
        snapshots.predict(torch.ones(1, 2))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_model_may_have_a_folder(tmp_path):
    model = torch.nn.LazyLinear(2)
    opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), step_size_up=1)
    snapshots = Snapshots(opt, model, folder=tmp_path)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        opt.step()
    assert torch.equal(snapshots.predict(torch.ones(1, 3)), model(torch.ones(1, 3)))
