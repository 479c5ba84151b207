"""The throughput benchmark on a fake GPU, which runs on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from bench_helpers import TINY, FakeGraph, run_tiny
from PIL import Image

from clr_optim import plotting
from clr_optim.bench import gpu, throughput
from clr_optim.bench.throughput import cells, command, variants
from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.workloads import RULES

pytestmark = pytest.mark.usefixtures("tiny")


def _run_on_gpu(tmp_path, *options):
    return run_tiny(tmp_path, "--device", "cuda", *options)


# The interpreter multiplies the undefined values of a new momentum buffer, and drops the products.
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
        # A GPU captures RMSprop's foreach step too; torch refuses the capture on this CPU.
        graphs = {"fused_graph"} if row["rule"] == "adam" else set()
        fused = set() if row["rule"] == "rmsprop" else {"fused"}
        assert set(row["times"]) == {"default", "forloop", "ours", "ours_graph"} | fused | graphs
        for times in row["times"].values():
            assert set(times) == {
                "device_median_s", "device_p10_s", "device_p90_s", "host_median_s", "waited"
            }  # fmt: skip
            assert all(value > 0 for value in times.values())
            assert times["waited"] == 1.0  # the fake device finishes with the host
        assert set(row["wrong"]) <= {"fused"}  # torch's fused step on a CPU, in 16 bits
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
        assert (
            row["limit_gbps"] is row["fraction_of_limit"] is None
        )  # the caches hold this step's data
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
    """Repeat the test with Triton's interpreter, which must be on before Triton's import."""
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
        assert image.size[0] == 2560  # device beside host
    device, host = plotting.plot_throughput([row]).axes
    assert device.get_title() == "mlp, float32: device"
    assert host.get_title() == "mlp, float32: host"
    speed = row["times"]["default"]["host_median_s"] / row["times"]["ours"]["host_median_s"]
    heights = [bar.get_height() for bar in host.patches]
    assert (
        len(heights) == 3
    )  # for-loop, fused and ours; a graph has no bar, as it would dwarf the others
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
    real = variants.torch_steps

    def without_kernel(*args, **kwargs):
        def fails():
            raise RuntimeError("no kernel")

        return {**real(*args, **kwargs), "fused": fails}

    for module in (variants, cells):
        monkeypatch.setattr(module, "torch_steps", without_kernel)
    (row,) = _run_on_gpu(tmp_path, "--filter", "adagrad/mlp/float32")["rows"]
    assert set(row["times"]) == {"default", "forloop", "ours", "ours_graph"}
    assert "torch's fused of adagrad/mlp/float32: no kernel" in capsys.readouterr().err


def test_a_cell_that_fails_leaves_the_others(tmp_path, capsys, h200, monkeypatch):
    real = cells.measure_cell_on_gpu

    def measure(device, rule, *args):
        if rule == "adam":
            raise torch.OutOfMemoryError("out\nof memory")
        return real(device, rule, *args)

    monkeypatch.setattr(command, "measure_cell_on_gpu", measure)
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

    tensors = Tensors([(3,)], torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        variants.drop_failing_steps({variant: too_much}, [variant], tensors.move_gradients, "cell")


def test_what_is_measured_on_a_gpu_unless_told_otherwise(h200, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "_measure", lambda cells, args: seen.append(cells) or {})
    monkeypatch.setattr(command, "table", lambda results: "")
    for options in (["--device", "cuda"], ["--device", "cuda", "--quick"], []):
        assert throughput.main(options) == 0
    default, quick, on_cpu = (dict.fromkeys(w for w, *_ in cells) for cells in seen)
    assert list(default) == ["1b", "gpt2", "resnet50", "1000x256", "mlp"]
    assert list(quick) == ["mlp", "1000x256", "resnet50"]
    assert list(on_cpu) == ["mlp", "1000x256", "resnet50", "gpt2", "vit_b", "one_33m"]
    assert {dtype for _, dtype, _ in seen[0]} == {"float32", "bfloat16"}


def test_variants_that_the_device_waited_for_are_named(tmp_path, capsys, h200):
    _run_on_gpu(tmp_path, "--workloads", "mlp", "--rules", "sgd", "--dtypes", "float32")
    printed = capsys.readouterr().out
    named = "foreach, for-loop, fused, ours, ours graph"
    assert f"({named}: the device waited for the host)" in printed
