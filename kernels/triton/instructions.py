"""The instructions of an update kernel: how many compute in float64, and how many per element.

NVIDIA's instructions come from the disassembled cubin (SASS), AMD's from the assembly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["counts"]

# Arithmetic in float64, conversions to and from it included.
_FLOAT64 = re.compile(
    r"\b(?:D(?:FMA|MUL|ADD|SETP|MNMX)|DMMA|MUFU\.\w*64H|[FI]2[FI]\.\S*F64)\b|\bv_\w+_f64"
)
# Stores of a full block, by their bytes per thread.
_STORES = {
    16: re.compile(r"\bSTG\S*\.128|\bglobal_store_dwordx4"),
    8: re.compile(r"\bSTG\S*\.64|\bglobal_store_dwordx2"),
    4: re.compile(r"\bSTG\.E\s|\bglobal_store_dword\s"),
}
_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
_SASS_BRANCH = re.compile(r"\bBRA\S*\s+(?:!?U?P\d+,\s*)?0x([0-9a-f]+)")
_GCN_LABEL = re.compile(r"(\.LBB\d+_\d+):")
_GCN = re.compile(r"\s+([a-z]\w*\b.*)")
_GCN_BRANCH = re.compile(r"s_c?branch\S*\s+(\.LBB\d+_\d+)")


class _Instruction(NamedTuple):
    text: str
    at: int
    target: int | None  # of a branch


def counts(assembly: str, tensors: int, elements: int, size: int) -> dict[str, float]:
    """Return the columns ``float64`` and ``per_element`` of the report.

    The latter is 0 if no loop stores full blocks by wide accesses.

    Args:
        assembly: SASS or AMD's assembly.
        tensors: how many tensors the kernel writes.
        elements: elements of each tensor that a thread updates per block.
        size: bytes of an element.
    """
    store = _STORES[elements * size]
    found = list(_sass(assembly)) or list(_gcn(assembly))
    loops = [
        body
        for end, each in enumerate(found)
        if each.target is not None and each.target <= each.at
        for body in [[one for one in found[: end + 1] if one.at >= each.target]]
        if sum(bool(store.search(one.text)) for one in body) >= tensors
    ]
    body = min(loops, key=len, default=[])
    blocks = sum(bool(store.search(one.text)) for one in body) // tensors
    return {
        "float64": sum(bool(_FLOAT64.search(one.text)) for one in found),
        "per_element": round(len(body) / (blocks * elements), 1) if loops else 0.0,
    }


def _sass(assembly: str) -> Iterator[_Instruction]:
    for place, text in _SASS.findall(assembly):
        branch = _SASS_BRANCH.search(text)
        yield _Instruction(text, int(place, 16), int(branch[1], 16) if branch else None)


def _gcn(assembly: str) -> Iterator[_Instruction]:
    labels: dict[str, int] = {}
    for at, line in enumerate(assembly.splitlines()):
        if label := _GCN_LABEL.match(line):
            labels[label[1]] = at
        elif instruction := _GCN.match(line):
            branch = _GCN_BRANCH.match(instruction[1])
            yield _Instruction(instruction[1], at, labels.get(branch[1]) if branch else None)
