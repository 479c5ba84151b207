"""The benchmark's workloads, machine, table and picture."""

from __future__ import annotations

import json
import math

import pytest
from bench_helpers import row_of
from PIL import Image

import clr_optim
from clr_optim import plotting
from clr_optim.bench import machine, report
from clr_optim.bench.workloads import WORKLOADS


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


def test_machine_names_neither_host_nor_path():
    described = machine.describe_machine()
    assert {"cpu", "cores", "threads", "ram_gib", "caches", "os", "python", "torch"} <= set(
        described
    )
    assert {"clr_optim", "kernels", "governor", "date"} <= set(described)
    text = json.dumps(described)
    import platform

    assert platform.node() not in text
    assert str(clr_optim.__file__).rpartition("/")[0] not in text


def test_limit_counts_the_bytes_that_move():
    limit = machine.Limit(1000)
    assert limit.gbps(dict.fromkeys(limit.operations, 1e-6)) == {
        "copy": pytest.approx(12.0), "triad": pytest.approx(16.0), "in_place": pytest.approx(8.0)
    }  # fmt: skip
    assert set(limit.best(2)) == set(limit.operations)
    elsewhere = machine.Limit(1000, "meta")  # only a CPU reads memory before it writes there
    assert elsewhere.gbps(dict.fromkeys(elsewhere.operations, 1e-6)) == {
        "copy": pytest.approx(8.0), "triad": pytest.approx(12.0), "in_place": pytest.approx(8.0)
    }  # fmt: skip
    assert elsewhere.best(timed=lambda operation: 1e-6) == elsewhere.gbps(
        dict.fromkeys(elsewhere.operations, 1e-6)
    )


def test_table_hides_no_slowdown():
    rows = [
        row_of(),
        row_of("sgd", fused=0.97e-3),
        row_of("adamw", "gpt2", ours=4e-3, fraction=0.456, backend="torch", wrong=["fused"]),
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


def test_picture_has_a_panel_per_workload_and_dtype(tmp_path):
    rows = [
        row_of(rule, workload) for workload in ("mlp", "gpt2", "vit_b") for rule in ("sgd", "adam")
    ]
    figure = plotting.plot_throughput(rows)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [
        f"{w}, float32" for w in ("mlp", "gpt2", "vit_b")
    ]
    for axes in panels:
        assert [text.get_text() for text in axes.texts] == ["8×", "8×"]
        assert sorted(bar.get_height() for bar in axes.patches) == pytest.approx([1, 1, 3, 3, 7, 7])
    (left_out,) = plotting.plot_throughput([row_of(wrong=["fused"])]).axes
    assert sorted(bar.get_height() for bar in left_out.patches) == pytest.approx([1, 7])
    path = plotting.save(figure, tmp_path / "bench.png")
    with Image.open(path) as image:
        assert image.size[0] == 2560
