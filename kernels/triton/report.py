"""Registers, stack and memory accesses of the compiled kernels, on a machine without a GPU.

    python -m clr_optim.kernels.triton.report --target sm_90 [--average own] [--masters]
        [--json FILE]

The report compiles every kernel for every dtype, as a launch of ``multi_tensor`` does, without
averages or with averages in the dtype of the parameters (``own``) or in another one. With masters
the report compiles for bfloat16 alone, the only dtype of parameters with masters. Registers and
stack come from cuobjdump's resource usage (NVIDIA) or from the code object's metadata (AMD).

**The accesses** are the loads and stores of full blocks, which have no mask and update nearly all
elements. Triton's IR names them: a load or store by a tensor of pointers, without a mask. (Kernels
read tables by scalar pointers.) The assembly repeats the lines of the source, which identify the
same accesses there. LLVM may give a load the line that uses its value, so an access of the same
basic block counts too. The instruction tells the width. Fewer accesses than in the IR are an error.
NVIDIA's assembly is the input of ptxas, which keeps widths and may unroll further.

The columns, as in the JSON's rows:

- ``registers`` per thread; ``stack``, in bytes per thread.
- ``spills``: spilled registers (AMD), or instructions that access the stack (NVIDIA: ptxas spills
  only to the stack).
- ``loads_16b``, ``stores_16b``: instructions of the full width, 16 bytes per thread, or 8 bytes
  where that would need too many registers. ``loads_narrow``, ``stores_narrow``: all others.
- ``float64``: instructions that compute in float64. Many GPUs compute that slowly.
- ``per_element``: instructions of the loop over full blocks, per element of the parameter. For a
  rule without state that is the shorter of two loops: the update's, or the one over the averages.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clr_optim.rules import KERNELS, SHIPPED

__all__ = ["DTYPES", "ReportError", "main", "rows"]

#: The dtypes of the report, by torch's names.
DTYPES = ("float32", "float64", "bfloat16", "float16")

# The types of a launch's arguments. All other parameters are constants.
_SIGNATURE = {
    "chunks": "*i32",
    "rows": "*i64",
    "gradients": "*i64",
    "constants": "*fp32",
    "blocks": "i32",
}
_COLUMNS = (
    "registers", "stack", "spills", "loads_16b", "loads_narrow", "stores_16b", "stores_narrow",
    "float64", "per_element",
)  # fmt: skip

# The IR's operands come before the colon: a pointer, the stored value, and a mask if any.
_IR_ACCESS = re.compile(
    r"\btt\.(load|store)\b([^:\n]*?):\s*(tensor<)?.*\bloc\((#loc\d*)\)\s*$", re.M
)
_IR_PLACE = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.M)
_LEAF = re.compile(r'"([^"]+)":(\d+):\d+')
# Of both assemblies: `.file 1 "path"`, `.file 1 "folder" "name"`, `.loc 1 94 23`.
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"(?:[^"]*/)?([^"/]+)"', re.M)
_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)\s")
_BLOCK = re.compile(r"(?:\$L__|\.L)BB\d+_\d+:|\s*(?://|;) %bb\.\d+:")
_PTX_ACCESS = re.compile(r"\b(ld|st)\.(?:\w+\.)*?global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s")
_GCN_ACCESS = re.compile(r"\b(?:global|flat|buffer)_(load|store)_(?:dword(?:x(\d))?|b(\d+)|\w+)\b")


class ReportError(RuntimeError):
    """The report cannot compile here, or not for this target; the message names the remedy."""


class _Place(NamedTuple):
    """A line of source. No two kernel files share a name."""

    file: str
    line: int


class _Access(NamedTuple):
    """An instruction that reads or writes memory, and its bytes per thread."""

    kind: str  # "load" or "store"
    place: _Place
    block: int  # number of its basic block
    width: int  # 0 if unknown


def rows(
    target: str, average: str | None = None, *, masters: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a row per rule and dtype, each as soon as its kernel is compiled.

    Args:
        target: ``sm_NN`` or ``gfxNNN``.
        average: the dtype of averages, by torch's name, or ``"own"`` for that of the parameters;
            None for kernels without averages.
        masters: whether the parameters have masters: bfloat16 alone.

    Raises:
        ReportError: the target is neither, Triton is missing or interprets, or a kernel does not
            compile.
    """
    named = re.fullmatch(r"sm_(\d+)|(gfx\d+[0-9a-f]{2})", target)
    if named is None:
        raise ReportError(f"target {target!r} is neither sm_NN (NVIDIA) nor gfxNNN (AMD)")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ReportError(
            "TRITON_INTERPRET is set: Triton then interprets kernels and compiles none; unset it"
        )
    if importlib.util.find_spec("triton") is None:
        raise ReportError("triton is not installed: pip install triton")
    from triton.backends.compiler import GPUTarget

    from clr_optim.kernels.triton import multi_tensor
    from clr_optim.kernels.triton.instructions import counts

    if named[1]:
        gpu = GPUTarget("cuda", int(named[1]), 32)
    else:
        gpu = GPUTarget("hip", target, 64 if int(target[3:-2]) < 10 else 32)
    names = ("bfloat16",) if masters else DTYPES
    for (rule, (slots, numbers)), name in itertools.product(_kernels().items(), names):
        dtype: torch.dtype = getattr(torch, name)
        averages = dtype if average == "own" else getattr(torch, average or "", None)
        try:
            compiled = _compile(
                rule, slots, dtype, [torch.float32] * numbers, averages, masters, gpu
            )
        except Exception as error:  # each stage of Triton's has its own
            words = " ".join(str(error).partition("Repro command")[0].split())
            raise ReportError(
                f"{rule} of {name} does not compile for {target}, if this Triton knows it at all: "
                f"{type(error).__name__}: {words}"
            ) from error
        resources, instructions = _resources(compiled)
        found: dict[str, Any] = dict(resources)
        block, threads = multi_tensor.shape_of(slots, dtype.itemsize, masters)
        width = block * dtype.itemsize // threads
        found |= _widths(compiled, width)
        stores = 1 + slots
        if masters:  # 16 bytes of float32 state are 8 bytes of the parameter
            stores = 2 + (2 * slots if width == 16 else 0)
        found |= counts(instructions, stores, block // threads, dtype.itemsize)
        yield {"rule": rule, "dtype": name, **{column: found[column] for column in _COLUMNS}}


def _kernels() -> dict[str, tuple[int, int]]:
    """Return each kernel's number of state slots, and its number of states of one element."""
    numbers = {name: len(rule.numbers) for rule in SHIPPED.values() for name in rule.kernels}
    return {name: (len(slots), numbers[name]) for name, slots in KERNELS.items()}


def _compile(
    rule: str,
    slots: int,
    dtype: torch.dtype,
    numbers: Sequence[torch.dtype],
    average: torch.dtype | None,
    masters: bool,
    gpu: Any,
) -> Any:
    import triton
    from triton.compiler import ASTSource, make_backend

    from clr_optim.kernels.triton import multi_tensor

    kernel = multi_tensor.multi_tensor
    compiled_for = multi_tensor.constants_for(
        rule, slots, dtype, numbers, average, masters, gpu.warp_size
    )
    names = {parameter.name for parameter in kernel.params}
    constants = {k: v for k, v in compiled_for.multi_tensor.items() if k in names}
    options = {k: v for k, v in compiled_for.multi_tensor.items() if k not in names}
    signature = {**_SIGNATURE, **dict.fromkeys(constants, "constexpr")}
    if dtype == torch.float64:
        signature["constants"] = "*fp64"
    # Tell the compiler what a launch would tell: tables are aligned and smaller than 2 GB.
    backend = make_backend(gpu)
    attributes = {
        (p.num,): backend.parse_attr("S" if p.do_not_specialize_on_alignment else "DS")
        for p in kernel.params
        if signature[p.name].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, attributes)
    with contextlib.redirect_stdout(io.StringIO()):  # Triton prints a failed kernel's source
        return triton.compile(source, target=gpu, options=options)


def _resources(compiled: Any) -> tuple[dict[str, int], str]:
    """Return registers, stack and spills, and the instructions that the GPU runs."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def value(key: str) -> int:
            return int(_search(rf"^\s*\.{key}:\s+(\d+)$", text)[0])

        return {
            "registers": value("vgpr_count"),
            "stack": value("private_segment_fixed_size"),
            "spills": value("vgpr_spill_count") + value("sgpr_spill_count"),
        }, text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage, code = (_cuobjdump(option, path) for option in ("-res-usage", "-sass"))
    # Do not read LOCAL: it stays 0 even if registers spill.
    registers, stack = map(int, _search(r"\bREG:(\d+) STACK:(\d+)", usage))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code)) if stack else 0
    return {"registers": registers, "stack": stack, "spills": spills}, code


def _cuobjdump(option: str, path: Path) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, option, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReportError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _search(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text, re.M)
    if found is None:
        raise ReportError(f"this Triton's tools are unknown: {pattern!r} not found in their output")
    return found.groups()


def _widths(compiled: Any, meant: int) -> dict[str, int]:
    """Count the accesses of full blocks, those of the meant width and narrower ones."""
    full, others = _in_ir(compiled.asm["ttgir"])
    if not full or full.keys() & others:
        raise _lost(f"share their lines with others in the IR: {[*full]}")
    if "amdgcn" in compiled.asm:
        accesses = list(_instructions(compiled.asm["amdgcn"], _gcn))
    else:
        accesses = list(_instructions(compiled.asm["ptx"], _ptx))
    blocks = {access.block for access in accesses if (access.kind, access.place) in full}
    there = [
        access
        for access in accesses
        if access.block in blocks and (access.kind, access.place) not in others
    ]
    counts = Counter((access.kind, access.width >= meant) for access in there)
    for kind in ("load", "store"):
        wanted = sum(n for (of, _), n in full.items() if of == kind)
        if counts[kind, True] + counts[kind, False] < wanted:
            raise _lost(f"are {wanted} {kind}s in the IR, and fewer in the assembly")
    return {
        f"{kind}s_{name}": counts[kind, wide]
        for kind in ("load", "store")
        for wide, name in ((True, "16b"), (False, "narrow"))
    }


def _lost(what: str) -> ReportError:
    return ReportError(f"the accesses of full blocks {what}; is TRITON_DISABLE_LINE_INFO set?")


def _in_ir(ir: str) -> tuple[Counter[tuple[str, _Place]], set[tuple[str, _Place]]]:
    """Return kind and place of accesses by tensors of pointers without a mask, and of others."""
    places = dict(_IR_PLACE.findall(ir))
    full: Counter[tuple[str, _Place]] = Counter()
    others = set()
    for kind, operands, tensor, name in _IR_ACCESS.findall(ir):
        access = (kind, _innermost(name, places))
        if tensor and operands.count("%") == (1 if kind == "load" else 2):
            full[access] += 1
        else:
            others.add(access)
    return full, others


def _innermost(name: str, places: Mapping[str, str]) -> _Place:
    """Return a location's place in the source: the called function's line, not the caller's."""
    text = places[name]
    while not (leaf := _LEAF.match(text)):
        inner = re.search(r"#loc\d*", text)
        if inner is None:
            return _Place("unknown", 0)
        text = places[inner[0]]
    return _Place(Path(leaf[1]).name, int(leaf[2]))


def _instructions(
    assembly: str, parse: Callable[[str], tuple[str, int] | None]
) -> Iterator[_Access]:
    files = dict(_FILE.findall(assembly))
    place = _Place("unknown", 0)
    block = 0
    for line in assembly.splitlines():
        if at := _LOC.match(line):
            place = _Place(files.get(at[1], "unknown"), int(at[2]))
        elif _BLOCK.match(line):
            block += 1
        elif found := parse(line):
            kind, width = found
            yield _Access(kind, place, block, width)


def _ptx(line: str) -> tuple[str, int] | None:
    if not (found := _PTX_ACCESS.search(line)):
        return None
    kind, lanes, bits = found.groups()
    return "load" if kind == "ld" else "store", int(lanes or 1) * int(bits) // 8


def _gcn(line: str) -> tuple[str, int] | None:
    if not (found := _GCN_ACCESS.search(line)):
        return None
    kind, dwords, bits = found.groups()
    return kind, int(dwords) * 4 if dwords else int(bits or 0) // 8


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and return the exit code of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m clr_optim.kernels.triton.report",
        description="Compile the Triton kernels without a GPU, and show their costs.",
    )
    parser.add_argument(
        "--target", required=True, metavar="ARCH", help="sm_80, sm_90, gfx942 or a similar name"
    )
    parser.add_argument(
        "--average", choices=("own", *DTYPES), help="the dtype of averages, if kernels keep them"
    )
    parser.add_argument(
        "--masters", action="store_true", help="parameters with masters: bfloat16 alone"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    args = parser.parse_args(argv)
    width = max(map(len, KERNELS))
    done: list[dict[str, Any]] = []
    try:
        for row in rows(args.target, args.average, masters=args.masters):
            if not done:
                print(f"{'rule':{width}}  {'dtype':8}", *_COLUMNS, sep="  ")
            cells = (f"{row[column]:>{len(column)}}" for column in _COLUMNS)
            print(f"{row['rule']:{width}}  {row['dtype']:8}", *cells, sep="  ", flush=True)
            done.append(row)
        if args.json:
            args.json.write_text(json.dumps(done, indent=1) + "\n")
    except (ReportError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
