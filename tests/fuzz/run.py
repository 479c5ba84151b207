"""The fuzzer: random events for a given time. A divergence is shortened and kept.

    make fuzz MINUTES=10 BACKEND=native
    make fuzz REPLAY=build/fuzz/native-123.json

A seed decides the setup and the list of events, so that the seed alone reproduces a run. Other
processes play the runs: a stale pointer may kill them, and a deadlock makes them silent. This
process never computes anything, so that it can be forked.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fuzz.machine import EVENTS, Machine
from fuzz.setups import BACKENDS, load_kernels, setups, surroundings

Events = list[list[Any]]

#: Events of one run. The next seed starts with a new setup.
LENGTH = 120
#: Seconds of silence after which a process is taken to hang.
PATIENCE_S = 300.0

_FORK = multiprocessing.get_context("fork")


def drawn(backend: str, seed: int, length: int = LENGTH) -> tuple[dict[str, Any], Events]:
    """Return the setup and the events of a seed."""
    chance = random.Random(f"{backend} {seed}")
    setup = {name: chance.choice(values) for name, values in setups(backend).items()}
    names, weights = list(EVENTS), [event.weight for event in EVENTS.values()]
    events = [
        [name, {k: chance.choice(values) for k, values in EVENTS[name].arguments.items()}]
        for name in chance.choices(names, weights, k=length)
    ]
    return setup, events


def play(setup: dict[str, Any], events: Events) -> int:
    """Play the events. Return how many of them changed something.

    Raises:
        Exception: from the library, or an AssertionError if the two optimizers differ. A note names
            the last event.
    """
    done = 0
    at: Any = ("setup", setup)
    with surroundings(setup["backend"]):
        try:
            machine = Machine(**setup)
            for number, (name, arguments) in enumerate(events):
                at = number, name, arguments
                if getattr(machine, name)(**arguments) is not False:
                    done += 1
                    machine.check()
            machine.look()
        except Exception as error:
            error.add_note(f"at {at}")
            raise
    return done


# ---- in other processes


def _described(error: BaseException) -> dict[str, str]:
    notes = " ".join(getattr(error, "__notes__", []))
    return {"kind": type(error).__name__, "text": f"{error} {notes}"[:4000]}


def _play_seeds(pipe: Any, backend: str, seeds: Sequence[int], length: int) -> None:
    torch.set_num_threads(1)
    for seed in seeds:
        pipe.send(("begins", seed))
        try:
            pipe.send(("done", play(*drawn(backend, seed, length))))
        except Exception as error:
            pipe.send(("diverged", _described(error)))


def _play_once(pipe: Any, setup: dict[str, Any], events: Events) -> None:
    torch.set_num_threads(1)
    try:
        play(setup, events)
        pipe.send(None)
    except Exception as error:
        pipe.send(_described(error))


def _ended(process: Any) -> dict[str, str]:
    """Return why a process is silent: it died, or it hangs, and is then killed."""
    process.join(timeout=5)
    if process.is_alive():
        process.kill()
        process.join()
        return {"kind": "stuck", "text": f"silent for {PATIENCE_S:g} s"}
    return {"kind": "died", "text": f"exit code {process.exitcode}"}


def trial(setup: dict[str, Any], events: Events) -> dict[str, str] | None:
    """Return what goes wrong with these events, or None."""
    here, there = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_play_once, args=(there, setup, events))
    process.start()
    there.close()
    try:
        result: dict[str, str] | None = here.recv() if here.poll(PATIENCE_S) else _ended(process)
    except EOFError:
        result = _ended(process)
    process.join()
    return result


def shrunk(setup: dict[str, Any], events: Events, kind: str, at_most_s: float = 120.0) -> Events:
    """Return fewer events that go wrong in the same way."""
    until = time.monotonic() + at_most_s
    size = max(1, len(events) // 2)
    while time.monotonic() < until:
        before = len(events)
        start = 0
        while start < len(events) and time.monotonic() < until:
            fewer = events[:start] + events[start + size :]
            found = trial(setup, fewer)
            if found is not None and found["kind"] == kind:
                events = fewer
            else:
                start += size
        if size == 1 and len(events) == before:
            break
        size = max(1, size // 2)
    return events


# ---- for long


def _begin_anew_for(backend: str, arguments: Sequence[str]) -> None:
    """Start a new process, as Triton decides at import whether to interpret."""
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "fuzz", *arguments])


class Progress:
    """The seeds of a backend that have been played, in a file."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.file = folder / f"{backend}.json"
        known = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.seed = known.get("next_seed", 0)
        self.total = known.get("events", 0)
        self.seconds = known.get("seconds", 0.0)

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        told = {"next_seed": self.seed, "events": self.total, "seconds": round(self.seconds, 1)}
        beside = self.file.with_suffix(".tmp")
        beside.write_text(json.dumps(told) + "\n")
        beside.replace(self.file)


def report(backend: str, seed: int, length: int, found: dict[str, str], folder: Path) -> None:
    """Shorten a divergence, keep it in a file and print it."""
    setup, events = drawn(backend, seed, length)
    again = trial(setup, events)
    if again is not None:
        events = shrunk(setup, events, again["kind"])
        found = trial(setup, events) or found
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{backend}-{seed}.json"
    kept = {"why": found["text"][:300], "setup": setup, "events": events}
    file.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\n{backend} diverged with seed {seed}: {found['kind']}: {found['text']}")
    print(f"setup: {json.dumps(setup)}")
    print(f"{len(events)} events" + ("" if again else ", which alone do not do it"))
    for name, arguments in events:
        print(f"  {name} {json.dumps(arguments)}")
    print(f"again: make fuzz REPLAY={file}", flush=True)


def fuzz(
    backend: str,
    *,
    until: Callable[[int], bool],
    folder: Path,
    seed: int | None = None,
    length: int = LENGTH,
    most: int = 5,
) -> int:
    """Play seeds until told to stop. Return how many diverged.

    Args:
        backend: the backend under test.
        until: gets the number of events so far, and returns whether that is enough.
        folder: for progress and divergences.
        seed: the first seed; None goes on where the last call ended.
        length: events of a seed.
        most: divergences after which to stop.
    """
    load_kernels(backend)
    progress = Progress(folder, backend)
    if seed is not None:
        progress.seed = seed
    events, diverged = 0, 0
    began = told = time.monotonic()
    earlier = progress.seconds
    while diverged < most and not until(events):
        # A process plays some seeds only, so that none grows old.
        seeds = range(progress.seed, progress.seed + 200)
        here, there = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=_play_seeds, args=(there, backend, seeds, length))
        process.start()
        there.close()
        found = None
        try:
            while progress.seed < seeds.stop:
                if not here.poll(PATIENCE_S):
                    found = _ended(process)
                    break
                what, value = here.recv()
                if what == "begins":
                    continue
                if what == "diverged":
                    found = value
                    break
                progress.seed += 1
                events += value
                progress.total += value
                if until(events):
                    break
                if time.monotonic() - told > 20:
                    told = time.monotonic()
                    progress.seconds = earlier + told - began
                    progress.write()
                    rate = events / (told - began)
                    print(f"{backend}: {events:,} events, {rate:.0f}/s", flush=True)
        except EOFError:
            found = _ended(process)
        process.kill()
        process.join()
        if found is not None:
            diverged += 1
            report(backend, progress.seed, length, found, folder)
            progress.seed += 1
        progress.seconds = earlier + time.monotonic() - began
        progress.write()
    seconds = time.monotonic() - began
    print(
        f"{backend}: {events:,} events in {seconds:.0f} s, {events / max(seconds, 1e-9):.0f}/s; "
        f"{diverged} diverged; {progress.total:,} events in all runs so far, the next seed is "
        f"{progress.seed}",
        flush=True,
    )
    return diverged


def replay(file: Path, kept: dict[str, Any]) -> int:
    """Play a kept divergence in this process. It raises if the divergence is still there."""
    load_kernels(kept["setup"]["backend"])
    done = play(kept["setup"], kept["events"])
    print(f"{file}: {done} events, no divergence")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, default="native")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--events", type=int, help="stop after so many of them")
    parser.add_argument("--seed", type=int, help="the first; without it, on from the last run")
    parser.add_argument("--length", type=int, default=LENGTH, help="events of a seed")
    parser.add_argument("--most", type=int, default=5, help="stop after so many divergences")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--replay", type=Path, help="a file that an earlier run has kept")
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(arguments)
    kept = json.loads(given.replay.read_text()) if given.replay else None
    _begin_anew_for(kept["setup"]["backend"] if kept else given.backend, arguments)
    if kept:
        return replay(given.replay, kept)
    end = time.monotonic() + 60 * given.minutes

    def until(events: int) -> bool:
        return time.monotonic() > end or (given.events is not None and events >= given.events)

    diverged = fuzz(
        given.backend,
        until=until,
        folder=given.folder,
        seed=given.seed,
        length=given.length,
        most=given.most,
    )
    return 1 if diverged else 0
