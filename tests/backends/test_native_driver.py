"""Run the native kernels in a separate program, compiled with sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from clr_optim.kernels.native import build
from clr_optim.rules import KERNELS

SOURCE = Path(__file__).with_name("native_driver.cpp")
ENVIRONMENT = {"UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The program, with AddressSanitizer and UndefinedBehaviorSanitizer, for this CPU."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++, whose sanitizers it asks for")
    program = tmp_path_factory.mktemp("driver") / "driver"
    flags = [flag for flag in build._FLAGS if flag != "-fPIC"]
    subprocess.run(
        [
            *("g++", *flags, "-O1", "-g", "-march=native", "-fopenmp", str(SOURCE)),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
            *("-o", str(program)),
        ],
        check=True,
    )
    return program


def run(driver, *arguments):
    return subprocess.run(
        [str(driver), *arguments], capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )


def test_every_kernel_is_clean(driver):
    done = run(driver)
    assert done.returncode == 0, done.stderr
    # Four dtypes, with one thread and with three, and two dtypes of the counter but for SGD.
    assert done.stdout == f"{8 * (2 * len(KERNELS) - 2)} runs\n"
    assert done.stderr == ""


def test_a_kernel_beyond_its_tensor_is_found(driver):
    done = run(driver, "overrun")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
