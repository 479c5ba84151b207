"""A trainer that is killed at a few moments comes to the same bits. The tool finds mistakes."""

import os
import subprocess
import sys

import pytest
from places import TESTS

from fuzz.kill_and_resume import MOMENTS


def killed(*arguments):
    """Run the tool in another process, whose children may use threads."""
    return subprocess.run(
        [sys.executable, "-m", "fuzz.kill_and_resume", "--fixed", *arguments],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_kills_cost_nothing_but_the_steps_since_the_last_checkpoint():
    done = killed()
    assert done.returncode == 0, done.stderr
    assert f"{len(MOMENTS)} kills survived" in done.stdout
    assert "2 while it saves" in done.stdout


@pytest.mark.parametrize(
    ("saves", "error"),
    [("carelessly", "does not load"), ("forgetfully", "these are others")],
)
def test_what_saves_badly_is_found(saves, error):
    done = killed("--saves", saves)
    assert done.returncode == 1, done.stdout
    assert error in done.stderr
