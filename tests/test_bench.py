"""The throughput benchmark: what it counts, computes, writes, refuses. No test looks at a time."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from clr_optim import cli, plotting
from clr_optim.backends.triton import is_interpreted
from clr_optim.bench import gpu, machine, report, throughput
from clr_optim.bench.workloads import DTYPES, RULES, WORKLOADS

BYTES = {
    "sgd": 12,
    "sgd_momentum": 20,
    "adam": 28,
    "adamw": 28,
    "adagrad": 20,
    "adadelta": 28,
    "rmsprop": 20,
    "rmsprop_full": 36,
}
FUSED = {"sgd", "sgd_momentum", "adam", "adamw", "adagrad"}
FEW = ("sgd_momentum", "adam", "adadelta", "rmsprop_full")
TINY = ["--seconds-per-cell", "0", "--cells-only", "--threads", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few rounds, and arrays that fit anywhere."""
    real = machine.Limit
    monkeypatch.setattr(throughput, "Limit", lambda *args: real(2**12))
    monkeypatch.setattr(throughput, "_LEAST_ROUNDS", 2)
    monkeypatch.setitem(WORKLOADS, "1000x256", [(3,)] * 4)


def _run(tmp_path, *options):
    path = tmp_path / "results.json"
    assert throughput.main([*TINY, "--json", str(path), *options]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def _error(capsys, *options):
    with pytest.raises(SystemExit) as exit_:
        throughput.main([*TINY, *options])
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("workload", "tensors", "values"),
    [
        ("mlp", 6, 26_122),
        ("resnet50", 161, 25_557_032),
        ("gpt2", 148, 124_439_808),
        ("vit_b", 152, 86_567_656),
        ("one_33m", 1, 33_554_432),
        ("1b", 146, 1_235_814_400),
    ],
)
def test_workloads_have_the_models_sizes(workload, tensors, values):
    shapes = WORKLOADS[workload]
    assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, values)


@pytest.mark.parametrize("rule", RULES)
def test_bytes_per_element_are_counted_from_the_rules_state(rule):
    assert throughput.bytes_per_element(RULES[rule], torch.float32) == BYTES[rule]
    assert throughput.bytes_per_element(RULES[rule], torch.bfloat16) == BYTES[rule] / 2
    (param,) = params = [torch.ones(3, requires_grad=True)]
    optimizer = RULES[rule].optimizer(params, **RULES[rule].settings)
    param.grad = torch.ones(3)
    optimizer.step()
    slots = [v for k, v in optimizer.state[param].items() if k != "step" and v is not None]
    assert BYTES[rule] == 4 * (3 + 2 * len(slots))


@pytest.mark.parametrize("backward", [False, True], ids=["sets", "backward"])
def test_gradients_move_and_hold_what_they_should(backward):
    tensors = throughput.Tensors([(4, 3), (), (5,)], torch.float32, backward=backward)
    values, addresses = [], []
    for _ in range(3):
        tensors.move_gradients()
        grads = [param.grad for param in tensors.params]
        assert all(g.shape == p.shape for g, p in zip(grads, tensors.params, strict=True))
        assert all(g.is_contiguous() for g in grads)
        values.append([g.clone() for g in grads])
        addresses.append({g.data_ptr() for g in grads})
        del grads
    for before, after in pairwise(addresses):
        assert not before & after
    for first, second, third in zip(*values, strict=True):
        assert first.equal(third)
        torch.testing.assert_close(2 * first, second)


def test_every_step_is_taken_equally_often_in_changing_order(monkeypatch):
    monkeypatch.setattr(throughput, "_MOST_ROUNDS", 40)
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = throughput.interleave(steps, lambda: calls.append("|"), 60.0)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 40)
    assert calls[::2] == ["|"] * (len(calls) // 2)
    taken = "".join(calls[1::2])
    rounds = [taken[i : i + 3] for i in range(6, len(taken), 3)]  # after the warm-up
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) == 6
    followed = {before + after for before, after in pairwise(taken[6:])}
    assert len(followed) == 9  # nobody always comes after the same one, nor never after itself


def test_at_least_so_many_rounds_whatever_the_time(monkeypatch):
    monkeypatch.setattr(throughput, "_LEAST_ROUNDS", 3)
    times = throughput.interleave({"a": lambda: None}, lambda: None, 0.0)
    assert len(times["a"]) == 3


@pytest.mark.parametrize("name", ["default", "foreach", "fused", "ours"])
def test_all_variants_take_the_same_steps(name):
    """Torch's default is the reference of the others: same rule, same rates."""

    def after(variant):
        tensors = throughput.Tensors([(4, 3), (5,)], torch.float64)
        own = throughput.ours(RULES["adam"], tensors.params)
        steps = {**throughput.torch_steps(RULES["adam"], tensors.params), "ours": own.step}
        for _ in range(5):
            tensors.move_gradients()
            steps[variant]()
        return tensors.params

    for param, expected in zip(after(name), after("default"), strict=True):
        torch.testing.assert_close(param, expected)


def test_json_of_tiny_cells(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "mlp", [(3, 2), ()])
    results = _run(tmp_path, "--workloads", "mlp,1000x256", "--rules", ",".join(FEW))
    assert set(results) == {"machine", "gradients", "limit_gbps", "limit", "rows", "not_begun"}
    assert results["not_begun"] == 0
    assert results["limit_gbps"] == max(results["limit"].values())
    assert {"copy", "triad", "in_place"} <= set(results["limit"])
    assert results["machine"]["threads"] == 1
    rows = results["rows"]
    cells = [(row["workload"], row["dtype"], row["rule"]) for row in rows]
    dtypes = ("float32", "bfloat16")
    assert cells == [(w, d, r) for w in ("mlp", "1000x256") for d in dtypes for r in FEW]
    for row in rows:
        sizes = [math.prod(shape) for shape in WORKLOADS[row["workload"]]]
        assert (row["tensors"], row["params"]) == (len(sizes), sum(sizes))
        scale = DTYPES[row["dtype"]].itemsize / 4
        assert row["bytes"] == BYTES[row["rule"]] * scale * row["params"]
        fused = {"fused"} if row["rule"] in FUSED else set()
        assert set(row["times"]) == {"default", "foreach", "ours"} | fused
        for times in row["times"].values():
            assert set(times) == {"median_s", "p10_s", "p90_s"}
            assert 0 < times["p10_s"] <= times["median_s"] <= times["p90_s"]
        median = {name: times["median_s"] for name, times in row["times"].items()}
        own = median.pop("ours")
        best = min(time for name, time in median.items() if name not in row["wrong"])
        assert row["ratio_vs_best_torch"] == pytest.approx(best / own)
        assert row["ratio_vs_default_torch"] == pytest.approx(median["default"] / own)
        assert row["limit_gbps"] is row["fraction_of_limit"] is None  # it fits the caches
        assert row["rounds"] == 2
    printed = capsys.readouterr().out
    assert "mlp bfloat16: 2 tensors, 7 values" in printed
    assert "Geometric means:\n  mlp: " in printed


def test_machine_names_neither_host_nor_path():
    described = machine.describe_machine()
    assert {"cpu", "cores", "threads", "ram_gib", "caches", "os", "python", "torch"} <= set(
        described
    )
    assert {"clr_optim", "compiler", "flags", "governor", "date"} <= set(described)
    text = json.dumps(described)
    import platform

    assert platform.node() not in text
    assert str(cli.__file__).rpartition("/")[0] not in text


def test_share_of_the_limit_of_the_same_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "last_level_cache", lambda: 0)
    (row,) = _run(tmp_path, "--workloads", "1000x256", "--rules", "sgd", "--dtypes", "float32")[
        "rows"
    ]
    rate = row["bytes"] / row["times"]["ours"]["median_s"] / 1e9
    assert row["fraction_of_limit"] == pytest.approx(rate / row["limit_gbps"])
    assert set(row["times"]) == {"default", "foreach", "fused", "ours"}


def test_limit_counts_the_bytes_that_move():
    limit = machine.Limit(1000)
    assert limit.gbps(dict.fromkeys(limit.operations, 1e-6)) == {
        "copy": pytest.approx(12.0), "triad": pytest.approx(16.0), "in_place": pytest.approx(8.0)
    }  # fmt: skip
    assert set(limit.best(2)) == set(limit.operations)
    there = machine.Limit(1000, "meta")  # no CPU: what is written is not read first
    assert there.gbps(dict.fromkeys(there.operations, 1e-6)) == {
        "copy": pytest.approx(8.0), "triad": pytest.approx(12.0), "in_place": pytest.approx(8.0)
    }  # fmt: skip
    assert there.best(timed=lambda operation: 1e-6) == there.gbps(
        dict.fromkeys(there.operations, 1e-6)
    )


def test_what_takes_no_step_is_not_among_the_best(monkeypatch):
    rule = throughput.Rule(torch.optim.Adam)
    assert throughput.wrong_variants(rule, torch.float32) == []
    real = throughput.torch_steps

    def one_idle(*args, **kwargs):
        return {**real(*args, **kwargs), "fused": lambda: None}

    monkeypatch.setattr(throughput, "torch_steps", one_idle)
    assert throughput.wrong_variants(rule, torch.float32) == ["fused"]
    monkeypatch.setitem(WORKLOADS, "mlp", [(3, 2), ()])
    tensors = throughput.Tensors(WORKLOADS["mlp"], torch.float32)
    limit = machine.Limit(8)
    row = throughput.measure_cell("adam", "mlp", "float32", tensors, 0.0, limit)
    assert row["wrong"] == ["fused"]
    times = {name: time["median_s"] for name, time in row["times"].items()}
    best = min(times["default"], times["foreach"])
    assert row["ratio_vs_best_torch"] == pytest.approx(best / times["ours"])


def test_filter_and_choices(tmp_path):
    results = _run(tmp_path, "--quick", "--workloads", "1000x256", "--filter", "adam")
    assert [row["rule"] for row in results["rows"]] == ["adam", "adamw"]
    results = _run(tmp_path, "--rules", "sgd", "--workloads", "mlp", "--dtypes", "float64,float16")
    assert [row["dtype"] for row in results["rows"]] == ["float16", "float64"]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--filter", "nonsense"], "--filter nonsense: no cell has it in its name"),
        (["--rules", "adam,nonsense"], "no 'nonsense'; there are sgd, sgd_momentum, adam"),
        (["--workloads", "nonsense"], "no 'nonsense'; there are mlp"),
        (["--dtypes", "int8"], "no 'int8'; there are float32"),
        (["--device", "cuda:1"], "must be cpu or cuda, got 'cuda:1'; CUDA_VISIBLE_DEVICES"),
        (["--device", "abacus"], "must be cpu or cuda, got 'abacus'"),
        (["--workloads", "mlp,1b"], "--workloads 1b: too large for a CPU, only with --device cuda"),
        (["--at-most", "-1"], "a number of seconds >= 0, got '-1'"),
        (["--threads", "0"], "from 1 to 4096, got '0'"),
        (["--seconds-per-cell", "nan"], "a number of seconds >= 0, got 'nan'"),
        (["--seconds-per-cell", "long"], "a number of seconds >= 0, got 'long'"),
        (["--json", "no/such/folder/a.json"], "no/such/folder/a.json"),
        (["--plot", "no/such/folder/a.png"], "no/such/folder/a.png"),
        (["--plot", "a.nonsense"], "a.nonsense: a picture's name must end in one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_before_anything_is_measured(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(throughput, "_measure", lambda *args: pytest.fail("measured"))
    assert words in _error(capsys, *options)
    assert not list(tmp_path.iterdir())


def test_the_command_is_the_same(tmp_path, capsys):
    path = tmp_path / "results.json"
    options = [*TINY, "--filter", "sgd/mlp/float32", "--json", str(path)]
    assert cli.main(["bench", *options]) == 0
    assert [row["rule"] for row in json.loads(path.read_text())["rows"]] == ["sgd"]
    with pytest.raises(SystemExit):
        cli.main(["bench", "--device", "abacus"])
    assert "must be cpu or cuda" in capsys.readouterr().err


def test_python_m():
    done = subprocess.run(
        [sys.executable, "-m", "clr_optim.bench", "--device", "abacus"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "must be cpu or cuda" in done.stderr


def test_no_cell_is_begun_when_the_time_is_up(tmp_path, capsys):
    picture = tmp_path / "nothing.png"
    options = ("--at-most", "0", "--workloads", "mlp", "--rules", "sgd", "--plot", str(picture))
    results = _run(tmp_path, *options)
    assert results["rows"] == []
    assert results["not_begun"] == 2
    assert "Not begun, for lack of time: 2 cells" in capsys.readouterr().out
    assert not picture.exists()
    assert list(throughput._until(None, ["a", "b"])) == ["a", "b"]


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path, monkeypatch):
    measured, done = throughput.measure_cell, []

    def interrupted(*args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.append(measured(*args, **kwargs))
        return done[-1]

    monkeypatch.setattr(throughput, "measure_cell", interrupted)
    monkeypatch.setitem(WORKLOADS, "mlp", [(3, 2), ()])
    path = tmp_path / "results.json"
    options = ("--workloads", "mlp", "--rules", "sgd,adam", "--dtypes", "float32")
    assert throughput.main([*TINY, "--json", str(path), *options]) == 130
    kept = json.loads(path.read_text())
    assert [row["rule"] for row in kept["rows"]] == ["sgd"]
    assert kept["not_begun"] == 1


def test_interrupt_ends_without_traceback(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput, "_measure", interrupted)
    assert throughput.main(TINY) == 130


def _row(
    rule="adam", workload="mlp", ours=1e-3, fused=2e-3, fraction=None, backend="native", wrong=()
):
    times = {"default": 8e-3, "foreach": 4e-3, "fused": fused, "ours": ours}
    return {
        "rule": rule,
        "workload": workload,
        "dtype": "float32",
        "tensors": 6,
        "params": 1000,
        "bytes": 28_000,
        "backend": backend,
        "times": {k: {"median_s": v, "p10_s": v / 2, "p90_s": 2 * v} for k, v in times.items()},
        "wrong": list(wrong),
        "ratio_vs_best_torch": fused / ours,
        "ratio_vs_default_torch": 8e-3 / ours,
        "limit_gbps": None if fraction is None else 50.0,
        "fraction_of_limit": fraction,
    }


def test_table_hides_no_slowdown():
    rows = [
        _row(),
        _row("sgd", fused=0.97e-3),
        _row("adamw", "gpt2", ours=4e-3, fraction=0.456, backend="torch", wrong=["fused"]),
    ]
    results = {"rows": rows, "limit_gbps": 50.0, "limit": {"copy": 40.0, "in_place": 50.0}}
    lines = report.table(results).splitlines()
    adam, sgd, adamw = (
        next(line for line in lines if line.split()[:1] == [rule])
        for rule in ("adam", "sgd", "adamw")
    )
    assert "SLOWER" not in adam
    assert "2.00×" in adam
    assert "500 µs – 2 ms" in adam
    assert sgd.endswith("SLOWER than torch")
    assert "46%" in adamw
    remark = "SLOWER than torch (fused: WRONG results, not counted) [torch backend]"
    assert adamw.endswith(remark)
    text = "\n".join(lines)
    assert f"  mlp: 8.00× torch's default, {math.sqrt(2 * 0.97):.2f}× its best" in text
    assert "Below 0.95 of torch's best: 1 of 3 cells\n  adamw/gpt2/float32: 0.50×" in text
    assert "50.0 GB/s at best (the fastest of copy 40.0, in_place 50.0)" in text


def test_an_optimizer_per_parameter_has_its_four_numbers():
    result = throughput.measure_in_backward(0.0, count=3)
    assert set(result) == {"wrap_s", "first_s", "step_s", "noop_s"}
    assert all(value > 0 for value in result.values())


def test_overhead_has_its_three_numbers():
    overhead = throughput.measure_overhead(0.0)
    assert set(overhead) == {"noop_s", "one_tensor_s", "per_tensor_s"}
    assert all(isinstance(value, float) for value in overhead.values())


def test_first_step_is_measured_in_new_processes(monkeypatch):
    seen = []

    def in_process(function, *, environment):
        assert function == "probe_first_step"
        seen.append((environment["CLR_OPTIM_CACHE_DIR"], environment["CLR_OPTIM_BACKEND"]))
        return {"seconds": float(len(seen)), "backend": environment["CLR_OPTIM_BACKEND"]}

    monkeypatch.setattr(throughput, "_in_process", in_process)
    expected = {"compiled_s": 1.0, "cached_s": 2.0, "torch_s": 3.0}
    assert throughput.measure_first_step() == expected
    assert len({cache for cache, _ in seen}) == 1
    assert [backend for _, backend in seen] == ["native", "native", "torch"]
    no_kernels = {"seconds": 1.0, "backend": "torch"}
    monkeypatch.setattr(throughput, "_in_process", lambda *args, **kwargs: no_kernels)
    assert "do not serve" in throughput.measure_first_step()["skipped"]


def test_a_process_of_its_own_answers():
    settings = {"CLR_OPTIM_BACKEND": "torch"}
    answer = throughput._in_process("probe_first_step", environment=settings)
    assert answer["backend"] == "torch"
    assert answer["seconds"] > 0


def test_a_process_that_fails_is_skipped(monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="MemoryError")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert throughput._in_process("probe_memory", "gpt2") == {
        "skipped": "probe_memory exited with 1"
    }
    assert "MemoryError" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")
def test_peak_memory_of_every_variant():
    measured = throughput.probe_memory("mlp")
    if "skipped" in measured:
        pytest.skip(measured["skipped"])
    sizes = {name: measured[f"{name}_bytes"] for name in ("default", "foreach", "fused", "ours")}
    assert min(sizes.values()) >= 0


def test_memory_is_skipped_where_the_system_cannot_tell(monkeypatch):
    monkeypatch.setattr(throughput.Path, "exists", lambda path: False)
    assert "clear_refs" in throughput.measure_memory("mlp")["skipped"]


def test_compile_that_fails_leaves_the_other_variants(tmp_path, capsys, monkeypatch):
    def refused(step):
        def run():
            raise RuntimeError("no compiler today")

        return run

    monkeypatch.setattr(torch, "compile", refused)
    results = _run(tmp_path, "--compile", "--filter", "sgd/mlp/float32")
    assert set(results["rows"][0]["times"]) == {"default", "foreach", "fused", "ours"}
    assert "torch.compile of sgd/mlp/float32: no compiler today" in capsys.readouterr().err


def test_picture_has_a_panel_per_workload_and_dtype(tmp_path):
    rows = [
        _row(rule, workload) for workload in ("mlp", "gpt2", "vit_b") for rule in ("sgd", "adam")
    ]
    figure = plotting.plot_throughput(rows)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [
        f"{w}, float32" for w in ("mlp", "gpt2", "vit_b")
    ]
    for axes in panels:
        assert [text.get_text() for text in axes.texts] == ["8×", "8×"]
        assert sorted(bar.get_height() for bar in axes.patches) == pytest.approx([1, 1, 3, 3, 7, 7])
    (left_out,) = plotting.plot_throughput([_row(wrong=["fused"])]).axes
    assert sorted(bar.get_height() for bar in left_out.patches) == pytest.approx([1, 7])
    path = plotting.save(figure, tmp_path / "bench.png")
    with Image.open(path) as image:
        assert image.size[0] == 1280


def test_plot_option_writes_the_picture(tmp_path, capsys):
    path = tmp_path / "bench.svg"
    _run(tmp_path, "--filter", "sgd/mlp/float32", "--plot", str(path))
    assert path.read_text().startswith("<?xml")


# ---- a GPU, played on the CPU


class FakeEvent:
    """Knows when it was recorded, which is when all before it is done."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)

    def query(self):
        return True


class FakeGraph:
    """Holds the one optimizer's step that was captured, which has not happened by that."""

    step: Any

    def replay(self):
        params = [p for group in self.step.param_groups for p in group["params"]]
        now = [p.grad for p in params]
        for param, grad in zip(params, self.grads, strict=True):
            param.grad = grad
        self.step.step()
        for param, grad in zip(params, now, strict=True):
            param.grad = grad


@contextmanager
def fake_capture(graph: FakeGraph, stream: object) -> Iterator[None]:
    """As CUDA would: what is captured is not done. Here it is, and then undone."""
    before = {}

    def note(optimizer, args, kwargs):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        before.update(params=params, values=[p.detach().clone() for p in params])
        before.update(state=copy.deepcopy(optimizer.state_dict()))
        graph.step, graph.grads = optimizer, [p.grad for p in params]

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()
    graph.step.load_state_dict(before["state"])
    for param, value in zip(before["params"], before["values"], strict=True):
        param.data.copy_(value)


H200 = SimpleNamespace(
    L2_cache_size=60 * 2**20, total_memory=140 * 2**30, multi_processor_count=132
)


@pytest.fixture
def h200(monkeypatch):
    """``torch.cuda`` as it is where there is a GPU, as far as the benchmark asks it."""
    stream = SimpleNamespace(wait_stream=lambda other: None)

    def unknown_clock():
        raise ModuleNotFoundError("pynvml")

    fakes = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda: "NVIDIA H200",
        "get_device_capability": lambda: (9, 0),
        "get_device_properties": lambda device: H200,
        "clock_rate": unknown_clock,
        "synchronize": lambda: None,
        "Event": FakeEvent,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph": fake_capture,
    }
    # Only for the benchmark: torch itself would take a GPU that it sees for one that it can use.
    cuda = SimpleNamespace(**fakes)
    fake_torch = SimpleNamespace(
        cuda=cuda, version=SimpleNamespace(cuda="12.8", hip=None), __version__="2.11.0"
    )
    if is_interpreted():
        import triton_helpers  # noqa: F401  (which mends the interpreter)
    monkeypatch.setattr(gpu, "torch", fake_torch)
    monkeypatch.setattr(gpu.Gpu, "device", torch.device("cpu"))
    monkeypatch.setattr(gpu.Gpu, "backend", "triton" if is_interpreted() else "torch")
    monkeypatch.setattr(gpu, "_MOST_AHEAD_S", 1e-5)
    monkeypatch.setitem(WORKLOADS, "mlp", [(3, 2), ()])
    return fake_torch


def _run_on_gpu(tmp_path, *options):
    return _run(tmp_path, "--device", "cuda", *options)


# The interpreter multiplies what a new momentum buffer happens to hold, and then does not take it.
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_cells_on_a_gpu(tmp_path, capsys, h200):
    rules = ("sgd_momentum", "adam", "rmsprop")
    results = _run_on_gpu(tmp_path, "--workloads", "mlp", "--rules", ",".join(rules))
    assert results["device"] == "cuda"
    assert results["left_out"] == []
    assert results["not_begun"] == 0
    described = results["machine"]
    assert (described["gpu"], described["target"]) == ("NVIDIA H200", "sm_90")
    assert (described["cuda"], described["hip"], described["clock_mhz"]) == ("12.8", None, None)
    assert {"driver", "triton", "torch", "gpu_memory_gib", "gpu_cache_mib"} <= set(described)
    assert {"copy", "triad", "in_place"} == set(results["limit"])
    rows = results["rows"]
    assert [(row["rule"], row["dtype"]) for row in rows] == [
        (rule, dtype) for dtype in ("float32", "bfloat16") for rule in rules
    ]
    for row in rows:
        assert row["backend"] == gpu.Gpu.backend
        # RMSprop's foreach step is captured too, but not on this CPU, where torch refuses.
        theirs = {"fused_graph"} if row["rule"] == "adam" else set()
        fused = set() if row["rule"] == "rmsprop" else {"fused"}
        assert set(row["times"]) == {"default", "forloop", "ours", "ours_graph"} | fused | theirs
        for times in row["times"].values():
            assert set(times) == {
                "device_median_s", "device_p10_s", "device_p90_s", "host_median_s", "waited"
            }  # fmt: skip
            assert all(value > 0 for value in times.values())
            assert times["waited"] == 1.0  # for this one is no faster than its host
        assert set(row["wrong"]) <= {"fused"}  # on a CPU, of 16 bits
        for where, prefix in (("device", ""), ("host", "host_")):
            median = {n: t[f"{where}_median_s"] for n, t in row["times"].items()}
            own = median["ours"]
            assert row[f"{where}_median_s"] == own
            right = [n for n in ("default", "forloop", *fused) if n not in row["wrong"]]
            best = min(median[n] for n in right)
            assert row[f"{prefix}ratio_vs_best_torch"] == pytest.approx(best / own)
            ratio = row[f"{prefix}ratio_vs_default_torch"]
            assert ratio == pytest.approx(median["default"] / own)
        assert row["graph_median_s"] == row["times"]["ours_graph"]["device_median_s"]
        assert row["limit_gbps"] is row["fraction_of_limit"] is None  # it fits the caches
        assert row["graph_fraction_of_limit"] is None
        assert row["rounds"] == 2
    printed, refused = capsys.readouterr()
    assert "foreach_graph of rmsprop/mlp/float32: " in refused
    assert "capturable" in refused
    assert "mlp bfloat16: 2 tensors, 7 values" in printed
    assert " on the device; " in printed
    assert "the cache's 60.0 MiB has no share" in printed


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, to interpret its kernels")
def test_cells_on_a_gpu_by_the_kernels():
    """The same by what a GPU runs, which Triton interprets only if told before it is imported."""
    done = subprocess.run(
        [
            *[sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
            f"{__file__}::test_cells_on_a_gpu",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_shares_on_a_gpu_of_all_that_the_caches_cannot_hold(tmp_path, h200, monkeypatch):
    monkeypatch.setattr(gpu.Gpu, "cache", lambda self: 0)
    options = ("--workloads", "mlp", "--rules", "adam", "--dtypes", "float32")
    path = tmp_path / "picture.png"
    (row,) = _run_on_gpu(tmp_path, *options, "--gradients", "backward", "--plot", str(path))["rows"]
    for share, median in (("fraction_of_limit", "device"), ("graph_fraction_of_limit", "graph")):
        rate = row["bytes"] / row[f"{median}_median_s"] / 1e9
        assert row[share] == pytest.approx(rate / row["limit_gbps"])
    with Image.open(path) as image:
        assert image.size[0] == 1280  # device beside host
    device, host = plotting.plot_throughput([row]).axes
    assert device.get_title() == "mlp, float32: device"
    assert host.get_title() == "mlp, float32: host"
    speed = row["times"]["default"]["host_median_s"] / row["times"]["ours"]["host_median_s"]
    heights = [bar.get_height() for bar in host.patches]
    assert len(heights) == 3  # for-loop, fused and ours; its graph's would dwarf them
    assert len(device.patches) == 4
    assert pytest.approx(speed - 1) in heights


def test_a_graph_that_does_nothing_is_wrong_and_one_that_fails_is_absent(
    tmp_path, capsys, h200, monkeypatch
):
    options = ("--workloads", "mlp", "--rules", "sgd", "--dtypes", "float32")
    monkeypatch.setattr(FakeGraph, "replay", lambda self: None)
    (row,) = _run_on_gpu(tmp_path, *options)["rows"]
    assert row["wrong"] == ["ours_graph"]
    assert row["graph_median_s"] is row["graph_ratio_vs_best_torch"] is None

    def refuses(graph, stream):
        raise RuntimeError("no capture today")

    monkeypatch.setattr(h200.cuda, "graph", refuses)
    (row,) = _run_on_gpu(tmp_path, *options)["rows"]
    assert set(row["times"]) == {"default", "forloop", "fused", "ours"}
    assert row["wrong"] == []
    assert row["graph_median_s"] is None
    assert "ours_graph of sgd/mlp/float32: no capture today" in capsys.readouterr().err


def test_a_variant_of_torchs_that_fails_is_absent(tmp_path, capsys, h200, monkeypatch):
    real = throughput.torch_steps

    def without_kernel(*args, **kwargs):
        def fails():
            raise RuntimeError("no kernel")

        return {**real(*args, **kwargs), "fused": fails}

    monkeypatch.setattr(throughput, "torch_steps", without_kernel)
    (row,) = _run_on_gpu(tmp_path, "--filter", "adagrad/mlp/float32")["rows"]
    assert set(row["times"]) == {"default", "forloop", "ours", "ours_graph"}
    assert "torch's fused of adagrad/mlp/float32: no kernel" in capsys.readouterr().err


def test_a_cell_that_fails_leaves_the_others(tmp_path, capsys, h200, monkeypatch):
    real = throughput.measure_cell_on_gpu

    def measure(device, rule, *args):
        if rule == "adam":
            raise torch.OutOfMemoryError("out\nof memory")
        return real(device, rule, *args)

    monkeypatch.setattr(throughput, "measure_cell_on_gpu", measure)
    path = tmp_path / "results.json"
    options = ["--workloads", "mlp", "--dtypes", "float32", "--rules", "adam,sgd"]
    assert throughput.main([*TINY, "--device", "cuda", *options, "--json", str(path)]) == 1
    results = json.loads(path.read_text())
    assert [row["rule"] for row in results["rows"]] == ["sgd"]
    why = "OutOfMemoryError: out of memory"
    assert results["left_out"] == [{"cell": "adam/mlp/float32", "why": why}]
    assert f"FAILED adam/mlp/float32: {why}" in capsys.readouterr().out
    results = _run_on_gpu(tmp_path, "--at-most", "0", "--workloads", "mlp")
    assert results["not_begun"] == 2 * len(RULES)
    assert f"for lack of time: {2 * len(RULES)} cells" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["default", "forloop"])
def test_out_of_memory_is_not_taken_for_a_missing_kernel(variant, h200):
    def too_much():
        raise torch.OutOfMemoryError

    tensors = throughput.Tensors([(3,)], torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        throughput._leave_out_failing({variant: too_much}, [variant], tensors, "cell")


def test_what_is_measured_on_a_gpu_unless_told_otherwise(h200, monkeypatch):
    seen = []
    monkeypatch.setattr(throughput, "_measure", lambda cells, args: seen.append(cells) or {})
    monkeypatch.setattr(throughput, "table", lambda results: "")
    for options in (["--device", "cuda"], ["--device", "cuda", "--quick"], []):
        assert throughput.main(options) == 0
    default, quick, on_cpu = (dict.fromkeys(w for w, *_ in cells) for cells in seen)
    assert list(default) == ["1b", "gpt2", "resnet50", "1000x256", "mlp"]
    assert list(quick) == ["mlp", "1000x256", "resnet50"]
    assert list(on_cpu) == ["mlp", "1000x256", "resnet50", "gpt2", "vit_b", "one_33m"]
    assert {dtype for _, dtype, _ in seen[0]} == {"float32", "bfloat16"}


class Clocked:
    """A device with a queue and a host beside it, each with a clock, in milliseconds.

    Args:
        patch: pytest's.
        cuda: what stands for ``torch.cuda``.
        launches: by name, what a call takes the host and then the device.
    """

    def __init__(self, patch, cuda, launches):
        self.launches, self.host, self.device = launches, 0.0, 0.0
        self.calls = []
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                clock.calls.append("|")
                self.at = max(clock.device, clock.host)

            def query(self):
                return self.at <= clock.host

            def elapsed_time(self, other):
                return other.at - self.at

        patch.setattr(cuda, "Event", Event)
        patch.setattr(cuda, "synchronize", self.synchronize)
        patch.setattr(gpu, "perf_counter", lambda: self.host / 1e3)

    def synchronize(self):
        self.host = max(self.host, self.device)

    def __getitem__(self, name):
        def call():
            self.calls.append(name)
            on_host, on_device = self.launches[name]
            self.host += on_host
            if on_device:
                self.device = max(self.device, self.host) + on_device

        return call


def _time(clock, name, again=True, rounds=2):
    watch = gpu.Stopwatch(gpu.Gpu(), clock["busy"], clock["prepare"], again=again)
    clock.calls.clear()
    return watch.interleave({name: clock[name]}, [[name]] * rounds)[name]


@pytest.mark.parametrize(
    ("prepare", "host", "device", "repeats"),
    [
        (0.001, 0.01, 0.5, 1),  # a large model's: the device is the slower one by itself
        (0.001, 0.4, 0.15, 1),
        (0.001, 0.2, 0.01, 10),
        (0.15, 0.007, 0.02, 5),  # a graph of a thousand tensors, whose gradients take the host long
        (0.15, 4.0, 0.03, 4),
    ],
)
def test_a_device_that_is_busy_ahead_does_not_wait_for_the_host(
    prepare, host, device, repeats, h200, monkeypatch
):
    monkeypatch.setattr(gpu, "_MOST_AHEAD_S", 0.1)
    launches = {"busy": (0.005, 0.1), "prepare": (prepare, 0), "step": (host, device)}
    clock = Clocked(monkeypatch, h200.cuda, launches)
    times = _time(clock, "step")
    assert times.device == pytest.approx([device / 1e3] * 2)
    assert times.host == pytest.approx([host / 1e3] * 2)
    assert times.waited == [False, False]
    first = clock.calls.index("|", -clock.calls[::-1].index("busy"))
    begin = ["|", "step", *["prepare", "step"] * (repeats - 1), "|"]
    assert clock.calls[first:] == [*begin, "prepare", "step"]


def test_where_the_queue_is_too_short_it_is_said_that_the_device_waited(h200, monkeypatch):
    monkeypatch.setattr(gpu, "_MOST_AHEAD_S", 0.005)
    launches = {"busy": (0.0, 1.0), "prepare": (0.0, 0), "step": (7.0, 0.1)}
    clock = Clocked(monkeypatch, h200.cuda, launches)
    times = _time(clock, "step")
    assert times.waited == [True, True]
    assert times.device == pytest.approx([2.1e-3] * 2)  # behind 5 ms of the 7
    assert clock.calls[:-2].count("busy") <= 1 + 2 + 4 + 5 + 2 * 5


def test_a_step_that_tells_of_its_gradients_is_taken_once(h200, monkeypatch):
    launches = {"busy": (0.0, 1.0), "prepare": (0.0, 0.2), "step": (0.01, 0.01)}
    clock = Clocked(monkeypatch, h200.cuda, launches)
    times = _time(clock, "step", again=False, rounds=1)
    assert times.device == pytest.approx([1e-5])
    assert clock.calls[-7:] == ["busy", "prepare", "|", "step", "|", "prepare", "step"]


def test_a_host_that_falls_behind_once_has_more_ahead_from_then_on(h200, monkeypatch):
    monkeypatch.setattr(gpu, "_MOST_AHEAD_S", 0.1)
    launches = {"busy": (0.0, 0.1), "prepare": (0.0, 0), "step": (0.05, 0.2)}
    clock = Clocked(monkeypatch, h200.cuda, launches)
    watch = gpu.Stopwatch(gpu.Gpu(), clock["busy"], clock["prepare"])

    def rounds():
        yield ["step"]
        launches["step"] = (1.0, 0.2)
        yield ["step"]
        yield ["step"]

    times = watch.interleave({"step": clock["step"]}, rounds())["step"]
    assert times.device == pytest.approx([2e-4] * 3)
    assert times.waited == [False] * 3
    assert times.host == pytest.approx([5e-5, 1e-3, 1e-3])


def test_variants_that_the_device_waited_for_are_named(tmp_path, capsys, h200):
    _run_on_gpu(tmp_path, "--workloads", "mlp", "--rules", "sgd", "--dtypes", "float32")
    printed = capsys.readouterr().out
    named = "default, forloop, fused, ours, ours_graph"
    assert f"({named}: the device waited for the host)" in printed


def test_without_a_gpu_it_says_what_to_do(capsys, h200, monkeypatch):
    assert gpu.why_no_gpu() is None
    monkeypatch.setattr(gpu, "why_no_triton", lambda: "Triton is not installed")
    assert "Triton is not installed" in _error(capsys, "--device", "cuda")
    monkeypatch.setattr(h200.cuda, "is_available", lambda: False)
    error = _error(capsys, "--device", "cuda")
    assert "--device: 'cuda': torch 2.11.0 finds no GPU here; run this where there is" in error
    assert "--device cpu" in error
    assert gpu.main() == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_names_for_files_and_compilers(capsys, h200, monkeypatch):
    assert gpu.main() == 0
    assert capsys.readouterr().out == "nvidia-h200 sm_90\n"
    assert gpu.slug("AMD Instinct™ MI300X") == "amd-instinct-mi300x"
    assert gpu.slug("™") == "gpu"
    assert gpu.Gpu().cache() == 60 * 2**20
    monkeypatch.setattr(h200.version, "hip", "6.4")
    amd = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", L2_cache_size=4 * 2**20)
    monkeypatch.setattr(h200.cuda, "get_device_properties", lambda device: amd)
    assert gpu.Gpu().target() == "gfx942"
    assert gpu.Gpu().cache() == 256 * 2**20  # its Infinity Cache
    monkeypatch.setattr(h200.version, "hip", None)
    monkeypatch.setattr(h200.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert gpu.Gpu().cache() == 64 * 2**20


@pytest.mark.parametrize(
    ("files", "version"),
    [
        (
            {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Module  570.86.15 T"},
            "570.86.15",
        ),
        ({"/proc/driver/nvidia/version": "NVRM"}, "unknown"),
        ({"/sys/module/amdgpu/version": "6.12.12\n"}, "6.12.12"),
        ({}, "unknown"),
    ],
)
def test_driver(files, version, monkeypatch):
    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert gpu._driver() == version


def test_real_graph_and_event_are_called_as_torch_has_them():
    """What is faked above takes the arguments that torch's own take."""
    import inspect

    inspect.signature(torch.cuda.graph).bind("graph")
    inspect.signature(torch.cuda.stream).bind("stream")
    inspect.signature(torch.cuda.Event.__new__).bind(torch.cuda.Event, enable_timing=True)
    for name in ("get_device_name", "get_device_capability", "clock_rate", "synchronize"):
        inspect.signature(getattr(torch.cuda, name)).bind()
    inspect.signature(torch.cuda.get_device_properties).bind(0)
    assert callable(torch.cuda.CUDAGraph.replay)
    assert callable(torch.cuda.Event.elapsed_time)
