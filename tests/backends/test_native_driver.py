"""Run the native kernels in a separate program, compiled with sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from places import ROOT

from clr_optim.kernels.native import load
from clr_optim.rules import KERNELS

ENVIRONMENT = {"UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The program, with AddressSanitizer and UndefinedBehaviorSanitizer."""
    if shutil.which("g++") is None or shutil.which("cmake") is None:
        pytest.skip("needs CMake, and g++, whose sanitizers it asks for")
    folder = tmp_path_factory.mktemp("driver")
    flags = "-g -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    options = ["-DCLR_DRIVER=ON", "-DCMAKE_CXX_COMPILER=g++", f"-DCMAKE_CXX_FLAGS={flags}"]
    source = ["-S", str(ROOT / "kernels/native"), *options]
    for command in (["cmake", *source, "-B", str(folder)], ["cmake", "--build", str(folder)]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "driver"


def run(driver, *arguments):
    return subprocess.run(
        [str(driver), *arguments], capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )


def sets():
    """Return the sets of kernels that this CPU can run."""
    names = load().kernel_sets()
    return names[: names.index(load().kernel_set()) + 1]


def test_every_kernel_is_clean(driver):
    for name in sets():
        done = run(driver, name)
        assert done.returncode == 0, done.stderr
        # Five formats, with one thread and with three, and two dtypes of the counter but for SGD.
        assert done.stdout == f"{10 * (2 * len(KERNELS) - 2)} runs\n"
        assert done.stderr == ""


def test_a_kernel_beyond_its_tensor_is_found(driver):
    for name in sets():
        done = run(driver, name, "overrun")
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr
