"""On terminals without UTF-8, and without streams, no command loses its result."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from clr_optim import CyclicalOptimizer, lr_range_test
from clr_optim.cli import main
from clr_optim.console import printing

SHORT = ["--cycles", "1", "--epochs-per-step-size", "1", "--threads", "1"]
SEARCH = ["range-test", "--steps", "120", "--threads", "1", "--save", "curve.csv"]
# (command line, words of its output)
COMMANDS = [
    (SEARCH, "base_lr"),
    ([*SEARCH, "--start-lr", "1e-9", "--end-lr", "1e-8"], "noise +- "),
    (["train", *SHORT, "--base-lr", "0.02", "--max-lr", "0.2"], "1 cycles of 2 x 24 iterations"),
    (["train", *SHORT], "base_lr"),
    (["demo", "--quick", "--out", "pictures"], "step() us"),
    (["info"], "clr_optim"),
    (["plot", "--policy", "triangular"], "triangular.png"),
    (["plot", "--policy", "triangular", "--out", "zyklisch-ü-✓.png"], "zyklisch-"),
    (["--help"], "usage"),
    (["bench", "--help"], "usage"),
    (["bench", "paper", "--help"], "usage"),
    (["range-test", "--out", "no-folder-ü/a.png"], "no-folder-"),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(argv):
    try:
        return main(argv)
    except SystemExit as exit_:
        return exit_.code


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
@pytest.mark.parametrize(("argv", "words"), COMMANDS[:3] + COMMANDS[5:])
def test_a_terminal_of_any_encoding_gets_the_result(argv, words, encoding, errors, monkeypatch):
    streams = [
        io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, write_through=True)
        for _ in range(2)
    ]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    code = run(argv)
    printed = b"".join(stream.buffer.getvalue() for stream in streams)
    assert code == (1 if "1e-9" in argv else 2 if "no-folder-ü/a.png" in argv else 0), printed
    if encoding == "ascii" or words.isalpha():
        assert words.encode() in printed
    assert [stream.errors for stream in streams] == [errors] * 2


@pytest.mark.parametrize(
    ("argv", "closed"),
    [
        (argv, closed)
        for argv, _ in COMMANDS
        for closed in (False, True)
        if argv[0] != "demo" or closed
    ],
)
def test_without_a_terminal_a_command_does_its_work(argv, closed, monkeypatch, tmp_path):
    streams = [None, None]
    if closed:
        streams = [io.StringIO(), io.StringIO()]
        for stream in streams:
            stream.close()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    code = run(argv)
    assert code == (1 if "1e-9" in argv else 2 if "no-folder-ü/a.png" in argv else 0)
    assert sys.stdout is streams[0]
    assert sys.stderr is streams[1]
    if "--save" in argv:
        assert (tmp_path / "curve.csv").exists()


def test_a_process_with_an_ascii_terminal_or_none():
    program = "import sys; sys.stdout = sys.stderr = None; from clr_optim.cli import main; "
    program += f"sys.exit(main({SEARCH!r}))"
    narrow = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    narrow["PYTHONIOENCODING"] = "ascii"
    for command, more in (
        ([sys.executable, "-m", "clr_optim", *SEARCH], narrow),
        ([sys.executable, "-c", program], {}),
    ):
        done = subprocess.run(
            command, env={**os.environ, **more}, capture_output=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == b""
        assert (b"max_lr=" in done.stdout) == bool(more)


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def isatty(self):
        return True


class OnlyWrites:
    """Some programs replace standard error by such an object."""

    def write(self, text):
        raise AttributeError


@pytest.mark.parametrize("progress", [None, True])
@pytest.mark.parametrize("stream", [None, Broken(), OnlyWrites(), "closed"])
def test_the_library_needs_no_standard_error(stream, progress, monkeypatch):
    """Progress and warnings work without it."""
    if stream == "closed":
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    if stream is None:
        monkeypatch.setattr(sys, "stdout", None)
    model = nn.Linear(4, 3)
    opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    result = lr_range_test(
        model, opt, [(torch.ones(2, 4), torch.ones(2, 3))], nn.functional.mse_loss,
        start_lr=0, end_lr=0.1, num_steps=5, progress=progress,
    )  # fmt: skip
    assert len(result.lrs) == 5


def test_a_warning_needs_no_standard_error():
    program = (
        "import sys, torch; sys.stdout = sys.stderr = None\n"
        "from clr_optim import CyclicalOptimizer\n"
        "opt = CyclicalOptimizer(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1))\n"
        "for k in range(3):\n"
        "    opt.param_groups[0]['lr'] = 5.0\n"
        "    opt.step()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
    assert done.returncode == 0


def test_signs_that_an_encoding_lacks_are_shown_by_number_and_bytes_of_names_unchanged():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    before, sys.stdout = sys.stdout, stream
    try:
        with printing():
            print("± 1 × 2 ✓ \udcff")
    finally:
        sys.stdout = before
    assert stream.buffer.getvalue() == b"+- 1 x 2 \\u2713 \xff\n"
