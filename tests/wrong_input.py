"""All the wrong input that the tests try, and what is said to it.

``make errors`` writes docs/errors.md from the tests' own tables, by trying each row;
tests/test_error_messages.py compares that file with what is said now.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from places import ROOT, TESTS

# The tables stand in the tests of several folders.
sys.path += [
    str(TESTS / folder) for folder in ("backends", "core", "demo", "plotting", "range_test")
]

import test_averages
import test_cli
import test_commands
import test_from_any_scheduler
import test_from_scheduler
import test_hostile_checkpoints as checkpoints
import test_master_weights_refused as master_weights
import test_optimizer_errors as errors
import test_plotting
import test_range_test_arguments as range_test_arguments
import test_range_test_result as range_test_result
import test_register_rule
import test_setting_schedules
import test_skipping
import test_snapshots
import test_uses_in_backward
from cases import BY_NAME
from torch import Tensor

from clr_optim import CyclicalOptimizer, RangeTest, Spike, lr_range_test, plotting, register_rule
from clr_optim.cli import main
from clr_optim.schedule import triangular

PAGE = ROOT / "docs/errors.md"

HEAD = """# Errors on wrong arguments

Written by `make errors` from the tables of the tests, which try each row and check that nothing has
changed. Every message names what was wrong, its value, and what would be right.

"""


class Attempt(NamedTuple):
    public: str
    tried: str
    call: Callable[[], object]


class Said(NamedTuple):
    public: str
    tried: str
    error: str
    message: str


def _command(argv: list[str]) -> Callable[[], object]:
    def call() -> None:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed):
                main(argv)
        except SystemExit as error:
            line = printed.getvalue().splitlines()[-1]
            raise SystemExit(line) from error

    return call


def _brief(value: object) -> str:
    """A value without the numbers of its tensors."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_brief, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_brief(v)}' for k, v in value.items())}}}"
    return repr(value)


def _written(key: str, value: object) -> None:
    opt, _ = errors.trained()
    opt.param_groups[0][key] = value
    opt.step()


def _loaded(attack: Any, **options: Any) -> None:
    opt, _ = checkpoints.started(BY_NAME["adam"], "torch", **options)
    opt.load_state_dict(checkpoints.attacked(opt.state_dict(), attack))


def _from_dict(change: dict[str, Any]) -> None:
    RangeTest.from_dict({**RangeTest([1.0, 2.0], [1.0, 2.0]).to_dict(), **change})


def attempts() -> Iterator[Attempt]:
    """Every row of the tables, as a call."""
    where = "CyclicalOptimizer"
    for name, (make, *_) in errors.UNWRAPPABLE.items():
        yield Attempt(where, f"optimizer: {name}", lambda m=make: CyclicalOptimizer(m()))
    for name, (options, *_) in errors.CONSTRUCTOR.items():
        yield Attempt(where, name, lambda o=options: CyclicalOptimizer(errors.adam(), **o))
    for name, (call, error, _) in test_uses_in_backward.REFUSED.items():
        if error is not RuntimeError:
            yield Attempt("step_in_backward", name, call)
    for options, _ in test_skipping.WRONG_SPIKES:
        yield Attempt("Spike", f"{options!r}", lambda o=options: Spike(**o))
    for name, (schedules, *_) in test_setting_schedules.REFUSED.items():
        yield Attempt(
            f"{where}, schedules of settings",
            name,
            lambda s=schedules: CyclicalOptimizer(errors.adam(), schedules=s),
        )
    for name, (make, *_) in test_averages.WRONG.items():
        yield Attempt("CycleEnd, Ema", name, make)
    for name, (_, make) in master_weights.REFUSED.items():
        yield Attempt(
            f"{where}, master_weights", name, lambda m=make: master_weights.construct(*m())
        )
    for name, (_, change) in master_weights.BAD_LOADS.items():
        yield Attempt(
            f"{where}.load_master_state_dict",
            name,
            lambda c=change: master_weights.load_masters(c, *master_weights.linear()),
        )
    for name, (build, *_) in test_from_scheduler.REFUSED.items():
        yield Attempt(
            f"{where}.from_scheduler",
            name,
            lambda b=build: CyclicalOptimizer.from_scheduler(b(test_from_scheduler.make())),
        )
    for name, (build, *_) in test_from_any_scheduler.REFUSED.items():
        yield Attempt(
            f"{where}.from_scheduler",
            name,
            lambda b=build: CyclicalOptimizer.from_scheduler(b(test_from_any_scheduler.sgd())),
        )
    for name, (call, *_) in errors.METHODS.items():
        yield Attempt(f"{where}, methods", name, lambda c=call: c(errors.trained()[0]))
    for name, (key, value, *_) in errors.WRITTEN.items():
        yield Attempt(
            f"{where}.param_groups, written by others",
            name,
            lambda k=key, v=value: _written(k, v),
        )
    for name, (attack, _) in checkpoints.ATTACKS.items():
        yield Attempt(f"{where}.load_state_dict", name, lambda a=attack: _loaded(a))
    for name, (keys, _) in checkpoints.MOMENTA.items():
        yield Attempt(
            f"{where}.load_state_dict",
            f"bounds of momentum: {name}",
            lambda k=keys: _loaded(checkpoints.set_group(**k), cycle_momentum=True),
        )
    for name, value in test_skipping.HOSTILE.items():
        attack = checkpoints.set_group(clr_skips=value)
        yield Attempt(
            f"{where}.load_state_dict", f"statistics: {name}", lambda a=attack: _loaded(a)
        )
    for name in master_weights.BAD_CHECKPOINTS:
        yield Attempt(
            f"{where}.load_state_dict",
            f"float32 masters: {name}",
            lambda n=name: master_weights.load_checkpoint(n),
        )
    for name, (cls, rule, *_) in test_register_rule.REFUSED.items():
        yield Attempt("register_rule", name, lambda c=cls, r=rule: register_rule(c, r))
    for name, (call, *_) in errors.SCHEDULES.items():
        yield Attempt("clr_optim.schedule", name, call)
    for _, _, change in range_test_arguments.ERRORS:
        yield Attempt(
            "lr_range_test",
            ", ".join(f"{k}={_brief(v)}" for k, v in change.items()),
            lambda c=change: lr_range_test(**range_test_arguments.wrong_arguments(c)[0]),
        )
    for _, _, change in range_test_result.NO_RESULTS:
        yield Attempt("RangeTest.from_dict", f"{change!r}", lambda c=change: _from_dict(c))
    for options, _ in test_plotting.WRONG_SCHEDULE:
        yield Attempt(
            "plotting.plot_schedule",
            f"{options!r}",
            lambda o=options: plotting.plot_schedule(
                **{"schedule": triangular(5), "steps": 10, **o}
            ),
        )
    for curves, ends, _ in test_plotting.WRONG_HISTORY:
        yield Attempt(
            "plotting.plot_history",
            f"{curves!r}, {ends!r}",
            lambda c=curves, e=ends: plotting.plot_history(c, e),
        )
    for name, (call, *_) in test_snapshots.REFUSED.items():
        yield Attempt("Snapshots", name, call)
    lines = [
        *test_cli.WRONG_COMMANDS,
        *(["plot", *options] for options, _ in test_cli.WRONG_PLOTS),
        *(
            [name, *options]
            for options, _ in test_commands.IMPOSSIBLE
            for name in ("range-test", "train")
        ),
        *(argv for argv, _ in test_commands.CONTRADICTIONS),
    ]
    for argv in lines:
        yield Attempt("the command", f"clr-optim {' '.join(argv)}", _command(argv))


def said() -> list[Said]:
    """What each attempt comes to."""
    rows = []
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for public, tried, call in attempts():
                try:
                    call()
                except (Exception, SystemExit) as error:
                    text = str(error).replace(folder, "…")
                    rows.append(Said(public, tried, type(error).__name__, text))
                else:
                    rows.append(Said(public, tried, "nothing", "no error at all"))
        finally:
            os.chdir(before)
    return rows


def page() -> str:
    """docs/errors.md, anew."""
    text, section = HEAD, ""
    for public, tried, error, message in said():
        if public != section:
            text += f"\n## {public}\n\n| tried | error | message |\n| --- | --- | --- |\n"
            section = public
        cells = (_plain(tried), error.replace("SystemExit", "exit status 2"), _plain(message))
        text += f"| {' | '.join(cells)} |\n"
    return text


def _plain(text: str) -> str:
    """In one cell; without what differs from run to run and from one Python to the next."""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    text = re.sub(r" \(choose from .*\)", " (choose from …)", text)
    text = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(page())
