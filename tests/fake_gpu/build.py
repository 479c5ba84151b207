"""Build the library of the fake device: ``python build.py OUT/libcuda.so.1``."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DRIVER = Path(__file__).parent / "driver"
HEADERS = ("cuda.h", "cuda_runtime_api.h")


def places() -> Iterator[Path]:
    """Yield folders that may hold CUDA's headers: a toolkit's, Triton's, those of pip packages."""
    for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if root:
            yield Path(root) / "include"
    for package, pattern in (("triton", "backends/nvidia/include"), ("nvidia", "*/include")):
        found = importlib.util.find_spec(package)
        for folder in (found and found.submodule_search_locations) or ():
            yield from sorted(Path(folder).glob(pattern))


def includes() -> list[str]:
    """Return the compiler's flags for one folder with all headers, else for one per header."""
    folders = [folder for folder in places() if folder.is_dir()]
    for folder in folders:
        if all((folder / header).exists() for header in HEADERS):
            return [f"-I{folder}"]
    chosen = [next((f for f in folders if (f / h).exists()), None) for h in HEADERS]
    if None in chosen:
        sys.exit(f"CUDA's headers {HEADERS} are missing: set CUDA_HOME to a toolkit of CUDA 13")
    return [f"-I{folder}" for folder in chosen]


def main(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O2", "-Wall", "-Wextra",
        "-shared", "-fPIC", *includes(), "-Wl,-soname,libcuda.so.1",
        f"-Wl,--version-script={DRIVER / 'exports.map'}", "-o", str(target),
        *map(str, sorted(DRIVER.glob("*.cpp"))), "-ldl",
    ]  # fmt: skip
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
