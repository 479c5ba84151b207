"""The examples that need a framework, run as a user runs them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from framework_helpers import imported
from places import ROOT

from clr_optim.schedule import triangular2

EXAMPLES = ROOT / "examples"
TIMEOUT_S = 300


def run(folder: Path, *command: object) -> str:
    """Return the output. Files may be left in that folder only."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env["ACCELERATE_USE_CPU"] = "yes"  # without a GPU it misreads torchrun's variables
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "was written from outside" not in done.stderr
    return done.stdout


def steps(output: str) -> list[dict[str, float]]:
    """Return what was printed of each step, by name."""
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    pairs = [re.findall(r"(step|cycle|lr|accuracy) ([\d.]+)", line) for line in lines]
    return [{name: float(value) for name, value in line} for line in pairs]


def check(shown: list[dict[str, float]], half: int, epoch: int) -> None:
    """Check four cycles, shown after each epoch with the rate that its last step used."""
    taken = [epoch * (i + 1) for i in range(16)]
    assert [line["step"] for line in shown] == taken
    assert [line["cycle"] for line in shown] == [step / (2 * half) for step in taken]
    expected = [triangular2(half)(step - 1, 0.005, 0.02) for step in taken]
    assert [line["lr"] for line in shown] == pytest.approx(expected, abs=1e-6)


def test_lightning(tmp_path):
    imported("lightning.pytorch")
    shown = steps(run(tmp_path, EXAMPLES / "lightning_module.py"))
    check(shown, half=48, epoch=24)
    assert shown[-1]["accuracy"] > 90


def test_accelerate_on_one_and_two_processes(tmp_path):
    imported("accelerate")
    script = EXAMPLES / "accelerate_loop.py"
    shown = steps(run(tmp_path, script))
    check(shown, half=24, epoch=12)
    assert shown[-1]["accuracy"] > 85
    assert run(tmp_path, script, "--resume") == ""  # all steps are taken
    # On two ranks an epoch has half as many steps, and a cycle as many as before.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    more = steps(run(tmp_path, *launch, script, "--checkpoint", "two"))
    assert [line["step"] for line in more] == [6.0 * (i + 1) for i in range(32)]
    assert [line["cycle"] for line in more] == pytest.approx(
        [line["step"] / 48 for line in more], abs=0.006
    )
    assert more[-1]["accuracy"] > 85


def test_hf_trainer(tmp_path):
    imported("transformers")
    output = run(tmp_path, EXAMPLES / "hf_trainer.py")
    (last,) = steps(output)
    assert (last["step"], last["cycle"]) == (384, 4)
    assert last["accuracy"] > 90
    printed = [ast.literal_eval(line) for line in output.splitlines() if line.startswith("{")]
    logged = [float(entry["learning_rate"]) for entry in printed if "learning_rate" in entry]
    expected = [triangular2(48)(24 * (i + 1) - 1, 0.005, 0.02) for i in range(16)]
    assert logged == pytest.approx(expected, rel=1e-3)  # four digits
