"""A short run of the fuzzer for each backend, and every divergence it has ever found."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from internals import overlook_outside_writes
from native_helpers import members
from places import TESTS
from triton_helpers import INTERPRETED

from fuzz import run
from fuzz.machine import EVENTS, Machine
from fuzz.setups import BACKENDS, TOLERANCES, load_kernels, setups

FOUND = sorted((TESTS / "fuzz" / "found").glob("*.json"))
#: Seeds that are played here, and events of each.
SHORT = {"native": (range(12), 60), "torch": (range(12), 60), "triton": (range(6), 40)}


def _only_here(backend: str) -> None:
    """Skip unless this process runs the backend. Triton decides at import whether to interpret."""
    if (backend == "triton") is not INTERPRETED:
        value = "1" if backend == "triton" else "0"
        pytest.skip(f"needs TRITON_INTERPRET={value}")
    load_kernels(backend)


@pytest.mark.parametrize(
    ("backend", "seed"), [(backend, s) for backend in BACKENDS for s in SHORT[backend][0]]
)
def test_a_short_run(backend, seed):
    _only_here(backend)
    assert run.play(*run.drawn(backend, seed, SHORT[backend][1])) > 20


@pytest.mark.parametrize("file", FOUND, ids=lambda file: file.stem)
def test_what_was_found_is_mended(file):
    found = json.loads(file.read_text())
    _only_here(found["setup"]["backend"])
    run.play(found["setup"], found["events"])


def test_a_seed_is_always_the_same_and_a_plain_text():
    for backend in BACKENDS:
        setup, events = run.drawn(backend, 3)
        assert (setup, events) == run.drawn(backend, 3)
        assert json.loads(json.dumps([setup, events]))[0] == setup
        assert {name for name, _ in events} <= set(EVENTS)
        assert set(setup) == set(setups(backend))


def test_a_position_that_is_not_noticed_is_found(monkeypatch):
    """The fuzzer finds a position that the library overlooks."""
    _only_here("torch")
    overlook_outside_writes(monkeypatch)
    setup = {"backend": "torch", "case": "sgd-mom", "seed": 1}
    events = [["train", {"seed": 1}], ["write_position", {"to": 4000}], ["train", {"seed": 2}]]
    with pytest.raises(AssertionError):
        run.play(setup, events)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["adam-wd", "sgd-mom"])
def test_one_value_that_is_off_is_found(case, dtype, capsys):
    """The fuzzer finds one wrong value. Rounding of a gradient does not excuse it."""
    _only_here("native")
    machine = Machine(backend="native", case=case, dtype=dtype, big=True, seed=1)
    machine.train(seed=1)
    assert machine.doubt is None
    step = machine.ours.step

    def off():
        step()
        p = members(machine.ours)[-1]
        i = p.detach().abs().argmax()
        p.data[i] *= 1 + 4 * TOLERANCES[p.dtype]

    machine.ours.step = off
    with run.surroundings("native"), pytest.raises(AssertionError, match=r"^\(3, "):
        machine.train(seed=2)
    assert "part by" not in capsys.readouterr().out


def test_what_diverges_is_cut_short(monkeypatch):
    """A divergence is cut to the events that it needs."""
    events = [["step", {"number": n}] for n in range(40)]

    def goes_wrong(setup, tried):
        numbers = [arguments["number"] for _, arguments in tried]
        if 7 in numbers and 31 in numbers[numbers.index(7) :]:
            return {"kind": "AssertionError"}
        return {"kind": "another"} if 12 in numbers else None

    monkeypatch.setattr(run, "trial", goes_wrong)
    short = run.shrunk({}, events, "AssertionError")
    assert [arguments["number"] for _, arguments in short] == [7, 31]


def test_the_command_goes_on_where_it_was(tmp_path):
    """The command forks its processes, so it must run in a process that computes nothing."""
    command = [sys.executable, "-m", "fuzz", "--backend", "torch", "--events", "60"]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--length", "30", "--folder", str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(TESTS)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "torch.json").read_text())
    assert told["events"] >= 120
    assert told["next_seed"] >= 4
    assert f"next seed is {told['next_seed']}" in done.stdout
