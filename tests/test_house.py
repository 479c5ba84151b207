"""The house: imports run one way, files and classes are small, backends are known by traits."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT, TESTS

#: from the ground up: a module may import modules of its own floor and of lower floors
FLOORS = (
    ("_version", "checks", "console", "keys", "options", "pictures"),
    ("gate", "rules", "schedule", "sharding"),
    ("averages", "from_torch", "kernels", "masters"),
    ("plan",),
    ("backends",),
    ("core",),
    ("optimizer",),
    ("range_test", "snapshots"),
    ("", "plotting"),  # "" is the face of clr_optim
    ("bench", "demo"),
    ("__main__", "cli"),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}

#: the public class holds a docstring and an example for each method
PUBLIC_FACE, CLASS, FILE, TEST_FILE = 450, 300, 500, 700


def module_of(path: Path) -> str:
    """Return the dotted name of a file below ``clr_optim``, "" for the face."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "clr_optim" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    return sorted(
        path for name in ("clr_optim", "kernels", "bench") for path in (ROOT / name).rglob("*.py")
    )


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of ours that a file imports, by their names below ``clr_optim``."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("clr_optim."))
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "clr_optim":
                known = (alias.name if alias.name in FLOOR_OF else "" for alias in node.names)
                yield from (f"clr_optim.{name}" for name in known)
            elif node.module.startswith("clr_optim."):
                yield node.module


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = module_of(path).split(".")[0]
    if own == "":
        return  # the face imports what it shows
    for name in imported(path):
        other = name.removeprefix("clr_optim.").split(".")[0]
        assert FLOOR_OF[other] <= FLOOR_OF[own], f"{module_of(path)} imports {name}, which is above"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_classes_are_small(path):
    text = path.read_text("utf-8")
    assert text.count("\n") <= FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            limit = PUBLIC_FACE if node.name == "CyclicalOptimizer" else CLASS
            assert node.end_lineno - node.lineno + 1 <= limit, node.name


@pytest.mark.parametrize("pattern", ["kernels/native/*.h", "kernels/native/*.cpp"])
def test_a_file_of_c_is_small(pattern):
    for path in ROOT.glob(pattern):
        assert path.read_text("utf-8").count("\n") <= FILE, path.name


def test_a_file_of_tests_is_small():
    for path in TESTS.rglob("*.py"):
        assert path.read_text("utf-8").count("\n") <= TEST_FILE, path.name


def texts_in(node: ast.expr) -> Iterator[object]:
    """Yield the constants that an operand of a comparison may be, or hold."""
    if isinstance(node, ast.Constant):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from texts_in(node.body)
        yield from texts_in(node.orelse)
    elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        for each in node.elts:
            yield from texts_in(each)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_package_compares_with_the_name_of_a_backend(path):
    if module_of(path).startswith("backends"):
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Compare):
            operands = (node.left, *node.comparators)
            compared = {value for each in operands for value in texts_in(each)}
            assert not compared & {"native", "triton"}, f"line {node.lineno}"
