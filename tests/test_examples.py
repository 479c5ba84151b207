"""The examples, run as a user runs them: interrupted, killed, and continued on other ranks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from places import ROOT

from clr_optim.schedule import triangular2

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available() or not dist.is_gloo_available(),
    reason="this torch has no gloo, or this system no process groups",
)

EXAMPLES = ROOT / "examples"
FSDP2 = EXAMPLES / "torchrun_fsdp2.py"
TIMEOUT_S = 120.0

#: Cycles are 20 steps long. The checkpoint of step 24 is on the second one's way up, that of step
#: 36 on its way down; the run is killed while it writes the latter.
SAVED, KILLED, END = 24, 36, 40
OPTIONS = ["--steps", END, "--step-size", 10]

#: In place of the example: every rank is killed when its part of a checkpoint is half written, and
#: their launcher, so that nobody is left to clean up.
KILLED_WHILE_SAVING = f"""
import contextlib, os, runpy, signal
from torch.distributed.checkpoint import FileSystemWriter

launcher, write_data = os.getppid(), FileSystemWriter.write_data

def write_half(self, plan, planner):
    written = write_data(self, plan, planner)
    if self.path.name == "step-{KILLED}":
        for part in self.path.glob(plan.storage_data.prefix + "*"):
            os.truncate(part, part.stat().st_size // 2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(launcher, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return written

FileSystemWriter.write_data = write_half
runpy.run_path({str(FSDP2)!r}, run_name="__main__")
"""


@dataclass
class Output:
    returncode: int
    stdout: str
    stderr: str

    @property
    def steps(self) -> list[dict[str, str]]:
        """What was printed of each step, by name."""
        lines = [line for line in self.stdout.splitlines() if line.startswith("step ")]
        return [dict(re.findall(r"(\w+) ([\d.]+)", line)) for line in lines]

    @property
    def accuracy(self) -> float:
        return float(re.findall(r"test accuracy ([\d.]+)", self.stdout)[-1])


def _run(world: int, script: Path, *args: object, launched: bool = False) -> Output:
    """On so many ranks; a single one without torchrun, unless told otherwise."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    launcher = torchrun if world > 1 or launched else []
    command = [sys.executable, *launcher, str(script), *map(str, args)]
    # Three ranks do not fit on one GPU, nor three times all threads on the cores.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    except BaseException:
        _end(process)
        raise
    return Output(process.returncode, stdout, stderr)


def _end(process: subprocess.Popen[str]) -> None:
    """The launcher ends its ranks when asked to: they are in sessions of their own."""
    process.terminate()
    try:
        process.wait(timeout=40)  # it gives them 30 seconds
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()
    process.stderr.close()


def _train(world: int, folder: Path, save_every: int) -> Output:
    """To the end, from the latest checkpoint if there is one."""
    output = _run(world, FSDP2, *OPTIONS, "--checkpoint", folder, "--save-every", save_every)
    assert output.returncode == 0, output.stderr
    assert "warning" not in output.stderr.lower()
    assert (folder / "latest").read_text() == f"step-{END}"
    return output


def _checkpoint(folder: Path) -> dict[str, Any]:
    """The latest one, whole."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder / (folder / "latest").read_text(), folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Output, dict[str, Any]]:
    """What a run on two ranks prints and comes to that does not even save on its way."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return _train(2, folder, END), _checkpoint(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The folder that a run on two ranks has left."""
    folder = tmp_path_factory.mktemp("killed")
    script = folder / "killed.py"
    script.write_text(KILLED_WHILE_SAVING)
    output = _run(2, script, *OPTIONS, "--checkpoint", folder, "--save-every", SAVED // 2)
    assert output.returncode == -signal.SIGKILL, output.stderr
    assert [step["step"] for step in output.steps] == ["10", "20", "30"]
    assert len(list((folder / f"step-{KILLED}").glob("*.distcp"))) == 2
    assert (folder / "latest").read_text() == f"step-{SAVED}"
    return folder


@pytest.mark.parametrize("world", [2, 3, 1])
def test_a_killed_run_goes_on_with_any_number_of_ranks(uninterrupted, killed, tmp_path, world):
    expected, whole = uninterrupted
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    if world == 1:
        # Killed a moment later, with all parts written: it still does not count.
        shutil.rmtree(folder / f"step-{KILLED}")
        shutil.copytree(folder / f"step-{SAVED // 2}", folder / f"step-{KILLED}")
    output = _train(world, folder, SAVED // 2)
    ours = _checkpoint(folder)

    # Positions and rates to the last bit; with other numbers of ranks gradients are summed in
    # another order.
    assert ours["opt"]["param_groups"] == whole["opt"]["param_groups"]
    assert ours["opt"]["param_groups"][0]["clr_step"] == END
    assert [step["step"] for step in output.steps] == ["30", "40"]
    for our, their in zip(output.steps, expected.steps[-2:], strict=True):
        assert (our["cycle"], our["lr"]) == (their["cycle"], their["lr"])
        for name in ("loss", "norm"):
            assert float(our[name]) == pytest.approx(float(their[name]), rel=1e-3)
    assert output.accuracy == pytest.approx(expected.accuracy, abs=0.5)
    if world == 2:
        assert output.steps == expected.steps[-2:]
        for kind in ("model", "opt"):
            state, other = (c[kind].get("state", c[kind]) for c in (ours, whole))
            torch.testing.assert_close(state, other, rtol=0.0, atol=0.0)


def test_the_plain_loop_goes_on_where_it_was(tmp_path):
    """In cycles of 96 steps, 24 an epoch: the second run begins with the second cycle."""
    parts = [
        _run(1, EXAMPLES / "plain_loop.py", "--cycles", cycles, "--checkpoint", tmp_path / "run.pt")
        for cycles in (1, 4)
    ]
    for part in parts:
        assert part.returncode == 0, part.stderr
        assert not part.stderr
    shown = [step for part in parts for step in part.steps]
    assert [int(step["step"]) for step in shown] == [24 * (i + 1) for i in range(16)]
    for step in shown:
        k = int(step["step"])
        assert float(step["cycle"]) == k / 96
        assert float(step["lr"]) == pytest.approx(triangular2(48)(k - 1, 0.005, 0.02), abs=1e-6)
    assert parts[1].accuracy > 90


DDP = EXAMPLES / "torchrun_ddp.py"


def _ddp(world: int, cycles: int, checkpoint: Path) -> Output:
    output = _run(world, DDP, "--cycles", cycles, "--checkpoint", checkpoint, launched=True)
    assert output.returncode == 0, output.stderr
    assert "warning" not in output.stderr.lower()
    return output


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> tuple[Output, dict[str, Any], Path]:
    """Two cycles on two ranks, what they come to, and the checkpoint of a run of only one."""
    folder = tmp_path_factory.mktemp("ddp")
    whole = _ddp(2, 2, folder / "whole.pt")
    first = _ddp(2, 1, folder / "first.pt")
    assert [step["step"] for step in whole.steps] == ["40", "80"]
    assert first.steps == whole.steps[:1]
    return whole, torch.load(folder / "whole.pt", weights_only=True), folder / "first.pt"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ddp_goes_on_where_it_was_on_any_number_of_ranks(ddp, tmp_path, world):
    whole, expected, first = ddp
    run = Path(shutil.copy(first, tmp_path))
    (last,) = _ddp(world, 2, run).steps
    assert (last["step"], last["cycle"]) == ("80", "2.00")
    assert last["lr"] == whole.steps[1]["lr"]
    assert float(last["lr"]) == pytest.approx(triangular2(20)(79, 0.025, 0.1), abs=1e-6)
    found = torch.load(run, weights_only=True)
    # With other numbers of ranks gradients are summed in another order.
    exact = {"rtol": 0.0, "atol": 0.0} if world == 2 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found["model"], expected["model"], **exact)
    assert found["opt"]["param_groups"] == expected["opt"]["param_groups"]


def test_the_snapshot_ensemble_prints_the_table_of_the_docs():
    """The figures depend on the machine's order of sums. The committed table has ten seeds."""
    options = ["--seeds", 2, "--cycles", 2, "--epochs", 1]
    output = _run(1, EXAMPLES / "snapshot_ensemble.py", *options)
    assert output.returncode == 0, output.stderr
    assert not output.stderr
    head, line, one, last, half, whole = output.stdout.splitlines()
    page = (ROOT / "docs/cycle_ends.md").read_text("utf-8")
    assert f"\n{head}\n{line}\n| one cosine run |" in page
    assert float(one.split("|")[2].split()[0]) > 50
    # One snapshot is no ensemble.
    assert last.split("|")[2:] == half.split("|")[2:]
    assert "| ensemble of 2 |" in whole


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(script):
    """The one of FSDP2 is a whole run with its checkpoints, and no introduction."""
    longest = 130 if script == FSDP2 else 60
    assert len(script.read_text().splitlines()) <= longest
