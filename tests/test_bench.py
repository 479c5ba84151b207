"""The throughput benchmark: what it counts, computes, writes, refuses. No test looks at a time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from PIL import Image

from clr_optim import cli, plotting
from clr_optim.bench import machine, report, throughput
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
    monkeypatch.setattr(throughput, "Limit", lambda: real(2**12))
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
    monkeypatch.setattr(throughput, "_MOST_ROUNDS", 12)
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = throughput.interleave(steps, lambda: calls.append("|"), 60.0)
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 12)
    assert calls[::2] == ["|"] * (len(calls) // 2)
    taken = "".join(calls[1::2])
    rounds = [taken[i : i + 3] for i in range(6, len(taken), 3)]  # after the warm-up
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) == 6


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
    assert set(results) == {"machine", "gradients", "limit_gbps", "limit", "rows"}
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
        (["--device", "cuda"], "not yet"),
        (["--device", "cuda:1"], "not yet"),
        (["--device", "abacus"], "must be cpu, got 'abacus'"),
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
        cli.main(["bench", "--device", "cuda"])
    assert "not yet" in capsys.readouterr().err


def test_python_m():
    done = subprocess.run(
        [sys.executable, "-m", "clr_optim.bench", "--device", "cuda"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "not yet" in done.stderr


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
