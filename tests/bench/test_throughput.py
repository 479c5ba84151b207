"""The throughput benchmark on a CPU: figures, files, refusals. No test asserts a time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from bench_helpers import TINY, error, run_tiny
from native_helpers import NUMBERS

from clr_optim import cli
from clr_optim.bench import machine, throughput
from clr_optim.bench.throughput import cells, command, overhead, processes, timing, variants
from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.workloads import DTYPES, RULES, WORKLOADS, Rule

pytestmark = pytest.mark.usefixtures("tiny")


BYTES = {
    "sgd": 12,
    "sgd_momentum": 20,
    "adam": 28,
    "adamw": 28,
    "adagrad": 20,
    "adadelta": 28,
    "rmsprop": 20,
    "rmsprop_full": 36,
    "adamax": 28,
    "radam": 28,
    "nadam": 28,
}


FUSED = {"sgd", "sgd_momentum", "adam", "adamw", "adagrad"}


FEW = ("sgd_momentum", "adam", "adadelta", "rmsprop_full")


@pytest.mark.parametrize("rule", RULES)
def test_bytes_per_element_are_counted_from_the_rules_state(rule):
    assert cells.bytes_per_element(RULES[rule], torch.float32) == BYTES[rule]
    assert cells.bytes_per_element(RULES[rule], torch.bfloat16) == BYTES[rule] / 2
    (param,) = params = [torch.ones(3, requires_grad=True)]
    optimizer = RULES[rule].optimizer(params, **RULES[rule].settings)
    param.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state[param].items()
    slots = [v for k, v in state if k not in NUMBERS and v is not None]
    assert BYTES[rule] == 4 * (3 + 2 * len(slots))


@pytest.mark.parametrize("backward", [False, True], ids=["sets", "backward"])
def test_gradients_move_and_hold_what_they_should(backward):
    tensors = Tensors([(4, 3), (), (5,)], torch.float32, backward=backward)
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
    monkeypatch.setattr(timing, "_MOST_ROUNDS", 40)
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleave(steps, lambda: calls.append("|"), 60.0)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 40)
    assert calls[::2] == ["|"] * (len(calls) // 2)
    taken = "".join(calls[1::2])
    rounds = [taken[i : i + 3] for i in range(6, len(taken), 3)]  # after the warm-up
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) == 6
    followed = {before + after for before, after in pairwise(taken[6:])}
    assert len(followed) == 9  # every pair of neighbours, a step after itself too


def test_at_least_so_many_rounds_whatever_the_time(monkeypatch):
    monkeypatch.setattr(timing, "_LEAST_ROUNDS", 3)
    times = timing.interleave({"a": lambda: None}, lambda: None, 0.0)
    assert len(times["a"]) == 3


@pytest.mark.parametrize("name", ["default", "foreach", "fused", "ours"])
def test_all_variants_take_the_same_steps(name):
    """torch's default is the reference: the others have the same rule and the same rates."""

    def after(variant):
        tensors = Tensors([(4, 3), (5,)], torch.float64)
        own = variants.our_optimizer(RULES["adam"], tensors.params)
        steps = {**variants.torch_steps(RULES["adam"], tensors.params), "ours": own.step}
        for _ in range(5):
            tensors.move_gradients()
            steps[variant]()
        return tensors.params

    for param, expected in zip(after(name), after("default"), strict=True):
        torch.testing.assert_close(param, expected)


def test_json_of_tiny_cells(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "mlp", [(3, 2), ()])
    results = run_tiny(tmp_path, "--workloads", "mlp,1000x256", "--rules", ",".join(FEW))
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
        assert (
            row["limit_gbps"] is row["fraction_of_limit"] is None
        )  # the caches hold this step's data
        assert row["rounds"] == 2
    printed = capsys.readouterr().out
    assert "mlp bfloat16: 2 tensors, 7 values" in printed
    assert "Geometric means:\n  mlp: " in printed


def test_share_of_the_limit_of_the_same_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "last_level_cache", lambda: 0)
    (row,) = run_tiny(tmp_path, "--workloads", "1000x256", "--rules", "sgd", "--dtypes", "float32")[
        "rows"
    ]
    rate = row["bytes"] / row["times"]["ours"]["median_s"] / 1e9
    assert row["fraction_of_limit"] == pytest.approx(rate / row["limit_gbps"])
    assert set(row["times"]) == {"default", "foreach", "fused", "ours"}


def test_what_takes_no_step_is_not_among_the_best(monkeypatch):
    rule = Rule(torch.optim.Adam)
    assert variants.wrong_variants(rule, torch.float32) == []
    real = variants.torch_steps

    def one_idle(*args, **kwargs):
        return {**real(*args, **kwargs), "fused": lambda: None}

    for module in (variants, cells):
        monkeypatch.setattr(module, "torch_steps", one_idle)
    assert variants.wrong_variants(rule, torch.float32) == ["fused"]
    monkeypatch.setitem(WORKLOADS, "mlp", [(3, 2), ()])
    tensors = Tensors(WORKLOADS["mlp"], torch.float32)
    limit = machine.Limit(8)
    row = cells.measure_cell("adam", "mlp", "float32", tensors, 0.0, limit)
    assert row["wrong"] == ["fused"]
    times = {name: time["median_s"] for name, time in row["times"].items()}
    best = min(times["default"], times["foreach"])
    assert row["ratio_vs_best_torch"] == pytest.approx(best / times["ours"])


def test_filter_and_choices(tmp_path):
    results = run_tiny(tmp_path, "--quick", "--workloads", "1000x256", "--filter", "adam")
    assert [row["rule"] for row in results["rows"]] == [
        "adam", "adamw", "adamax", "radam", "nadam",
    ]  # fmt: skip
    results = run_tiny(
        tmp_path, "--rules", "sgd", "--workloads", "mlp", "--dtypes", "float64,float16"
    )
    assert [row["dtype"] for row in results["rows"]] == ["float16", "float64"]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--filter", "nonsense"], "--filter nonsense: no cell's name contains it"),
        (["--rules", "adam,nonsense"], "no 'nonsense'; there are sgd, sgd_momentum, adam"),
        (["--workloads", "nonsense"], "no 'nonsense'; there are mlp"),
        (["--dtypes", "int8"], "no 'int8'; there are float32"),
        (["--device", "cuda:1"], "must be cpu or cuda, got 'cuda:1'; CUDA_VISIBLE_DEVICES"),
        (["--device", "abacus"], "must be cpu or cuda, got 'abacus'"),
        (["--workloads", "mlp,1b"], "--workloads 1b: too large for a CPU; add --device cuda"),
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
    monkeypatch.setattr(command, "_measure", lambda *args: pytest.fail("measured"))
    assert words in error(capsys, *options)
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
    results = run_tiny(tmp_path, *options)
    assert results["rows"] == []
    assert results["not_begun"] == 2
    assert "Not begun, for lack of time: 2 cells" in capsys.readouterr().out
    assert not picture.exists()
    assert list(command._until(None, ["a", "b"])) == ["a", "b"]


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path, monkeypatch):
    measured, done = cells.measure_cell, []

    def interrupted(*args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.append(measured(*args, **kwargs))
        return done[-1]

    monkeypatch.setattr(command, "measure_cell", interrupted)
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

    monkeypatch.setattr(command, "_measure", interrupted)
    assert throughput.main(TINY) == 130


def test_an_optimizer_per_parameter_has_its_four_numbers():
    result = overhead.measure_in_backward(0.0, count=3)
    assert set(result) == {"wrap_s", "first_s", "step_s", "noop_s"}
    assert all(value > 0 for value in result.values())


def test_overhead_has_its_three_numbers():
    measured = overhead.measure_overhead(0.0)
    assert set(measured) == {"noop_s", "one_tensor_s", "per_tensor_s"}
    assert all(isinstance(value, float) for value in measured.values())


def test_first_step_is_measured_in_new_processes(monkeypatch):
    seen = []

    def in_process(function, *, environment):
        assert function == "probe_first_step"
        seen.append(environment["CLR_OPTIM_BACKEND"])
        return {"seconds": float(len(seen)), "backend": environment["CLR_OPTIM_BACKEND"]}

    monkeypatch.setattr(processes, "_in_process", in_process)
    expected = {"native_s": 1.0, "torch_s": 2.0}
    assert processes.measure_first_step() == expected
    assert seen == ["native", "torch"]
    no_kernels = {"seconds": 1.0, "backend": "torch"}
    monkeypatch.setattr(processes, "_in_process", lambda *args, **kwargs: no_kernels)
    assert "do not serve" in processes.measure_first_step()["skipped"]


def test_a_process_of_its_own_answers():
    settings = {"CLR_OPTIM_BACKEND": "torch"}
    answer = processes._in_process("probe_first_step", environment=settings)
    assert answer["backend"] == "torch"
    assert answer["seconds"] > 0


def test_a_process_that_fails_is_skipped(monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="MemoryError")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert processes._in_process("probe_memory", "gpt2") == {
        "skipped": "probe_memory exited with 1"
    }
    assert "MemoryError" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")
def test_peak_memory_of_every_variant():
    measured = processes.probe_memory("mlp")
    if "skipped" in measured:
        pytest.skip(measured["skipped"])
    sizes = {name: measured[f"{name}_bytes"] for name in ("default", "foreach", "fused", "ours")}
    assert min(sizes.values()) >= 0


def test_memory_is_skipped_where_the_system_cannot_tell(monkeypatch):
    monkeypatch.setattr(processes.Path, "exists", lambda path: False)
    assert "clear_refs" in processes.measure_memory("mlp")["skipped"]


def test_compile_that_fails_leaves_the_other_variants(tmp_path, capsys, monkeypatch):
    def refused(step):
        def run():
            raise RuntimeError("no compiler today")

        return run

    monkeypatch.setattr(torch, "compile", refused)
    results = run_tiny(tmp_path, "--compile", "--filter", "sgd/mlp/float32")
    assert set(results["rows"][0]["times"]) == {"default", "foreach", "fused", "ours"}
    assert "torch.compile of sgd/mlp/float32: no compiler today" in capsys.readouterr().err


def test_plot_option_writes_the_picture(tmp_path, capsys):
    path = tmp_path / "bench.svg"
    run_tiny(tmp_path, "--filter", "sgd/mlp/float32", "--plot", str(path))
    assert path.read_text().startswith("<?xml")
