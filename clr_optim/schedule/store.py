"""A schedule as text: its dictionary and JSON for checkpoints, its repr."""

from __future__ import annotations

import json
import pickle
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from clr_optim.schedule.phase import Phase, ScaleFn, ScaleFns

#: Version of the dictionary that :func:`to_dict` writes.
FORMAT_VERSION = 1


def to_dict(name: str, phases: Sequence[Phase]) -> dict[str, Any]:
    """Return a schedule as a dictionary; a ``scale_fn`` is replaced by its name."""
    rows = []
    for phase in phases:
        row = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in _settings(phase).items()
        }
        if phase.scale_fn is not None:
            row["scale_fn"] = describe_callable(phase.scale_fn)
        rows.append(row)
    return {"format": FORMAT_VERSION, "name": name, "phases": rows}


def from_dict(data: Mapping[str, Any], scale_fn: ScaleFns) -> tuple[str, list[Phase]]:
    """Return the name and the phases of the schedule that :func:`to_dict` wrote."""
    if not isinstance(data, Mapping):
        raise TypeError(f"data must be a dictionary from Schedule.to_dict, got {data!r}")
    version = data.get("format")
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise ValueError(
            f"data has format={version!r}, and this version reads "
            f"{FORMAT_VERSION}: take a dictionary from Schedule.to_dict of this version, or "
            "update clr_optim"
        )
    rows = data.get("phases")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"data['phases'] must be a list of dictionaries, got {rows!r}")
    functions = _functions([row["scale_fn"] for row in rows if "scale_fn" in row], scale_fn)
    phases = [_read_phase(row, f"data['phases'][{i}]", functions) for i, row in enumerate(rows)]
    return data.get("name", ""), phases


def _functions(names: Sequence[object], scale_fn: ScaleFns) -> dict[str, ScaleFn]:
    """Return the functions by the names that the phases have."""
    known = list(dict.fromkeys(map(str, names)))
    if scale_fn is None:
        return {}
    if isinstance(scale_fn, Mapping):
        unknown = [name for name in scale_fn if name not in known]
        if unknown:
            raise ValueError(f"scale_fn has {unknown}, and data has the functions {known}")
        return dict(scale_fn)
    if not known:
        raise ValueError(
            f"scale_fn={describe_callable(scale_fn)} has no effect: data names no function; "
            "leave it out"
        )
    if len(known) > 1:
        raise ValueError(
            f"data has several functions: give scale_fn a dictionary with the names {known}"
        )
    return {known[0]: scale_fn}


def _read_phase(row: Mapping[Any, Any], where: str, functions: Mapping[str, ScaleFn]) -> Phase:
    known = {f.name for f in fields(Phase)}
    unknown = sorted(map(str, set(row) - known))
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known: {sorted(known)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    if "scale_fn" in values:
        name = values["scale_fn"]
        if str(name) not in functions:
            raise ValueError(
                f"{where} had scale_fn={name!r}, and code is not "
                "stored: pass it as from_dict(data, scale_fn=...)"
            )
        values["scale_fn"] = functions[str(name)]
    return Phase(**values)


def to_json(data: Mapping[str, Any]) -> str:
    """Return the dictionary of a schedule as one line of JSON, with sorted keys."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def from_json(text: str) -> Any:
    """Return the value that a JSON text holds."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"text is no JSON of a schedule: {reprlib.repr(text)}; give what "
            "Schedule.to_json() returned"
        ) from error


def to_repr(name: str, phases: Sequence[Phase]) -> str:
    """Return the Python expression that makes a schedule."""
    calls = []
    for phase in phases:
        settings = ", ".join(f"{key}={value!r}" for key, value in _settings(phase).items())
        calls.append(f"Phase({settings})")
    return f"Schedule({name!r}, [{', '.join(calls)}])"


def check_picklable(phases: Sequence[Phase]) -> None:
    """Raise if pickle cannot store a ``scale_fn``."""
    for phase in phases:
        if phase.scale_fn is not None:
            try:
                pickle.dumps(phase.scale_fn)
            except Exception as error:
                raise pickle.PicklingError(
                    f"scale_fn={describe_callable(phase.scale_fn)} cannot be pickled: define "
                    "it with `def` at the top of a module, or as an instance of a class there"
                ) from error


def describe_callable(function: Callable[..., Any]) -> str:
    """Return ``module.name`` of a callable, for messages and checkpoints."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', None) or type(function).__module__}.{name}"


def _settings(phase: Phase) -> dict[str, Any]:
    """Return the settings of a phase that differ from their defaults."""
    values = {f.name: (getattr(phase, f.name), f.default) for f in fields(Phase)}
    return {name: value for name, (value, default) in values.items() if value != default}
