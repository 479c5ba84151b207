"""Tables of results in pages say what the results say."""

from __future__ import annotations

import json

from clr_optim.bench import pages

PAGE = "Before.\n<!-- table: {name} results.json -->\nold\n<!-- end of table -->\nAfter.\n"


def row(rule, ours, default, fused, wrong=()):
    times = {"default": default, "fused": fused, "ours": ours}
    return {
        "rule": rule, "workload": "mlp", "dtype": "float32", "wrong": list(wrong),
        "times": {name: {"median_s": seconds} for name, seconds in times.items()},
    }  # fmt: skip


def renewed(tmp_path, name, *rows):
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    text = pages.renewed(PAGE.format(name=name), tmp_path)
    assert text.startswith(f"Before.\n<!-- table: {name} results.json -->\n|")
    assert text.endswith("|\n<!-- end of table -->\nAfter.\n")
    return text.split("\n")[4]


def test_a_slower_cell_is_bold_and_names_the_faster_step(tmp_path):
    line = renewed(tmp_path, "adamw", row("adamw", 2e-5, 4e-5, 1e-5))
    assert line == "| MLP, 6 tensors | 40 µs | 10 µs | 20 µs | **0.50×** fused |"
    line = renewed(tmp_path, "rules", row("sgd", 1e-3, 2e-3, 4e-3))
    assert line == "| `sgd` | 1 ms, 2.00× for-loop |"


def test_a_level_cell_is_not_bold(tmp_path):
    line = renewed(tmp_path, "rules", row("sgd", 1.0, 0.9999, 2.0))
    assert line == "| `sgd` | 1.00 s, 1.00× for-loop |"


def test_a_wrong_step_does_not_count(tmp_path):
    line = renewed(tmp_path, "adamw", row("adamw", 2e-5, 4e-5, 1e-5, wrong=["fused"]))
    assert line == "| MLP, 6 tensors | 40 µs | wrong | 20 µs | 2.00× for-loop |"
    line = renewed(tmp_path, "adamw", row("adamw", 2e-5, 4e-5, 1e-5, wrong=["fused", "default"]))
    assert line == "| MLP, 6 tensors | wrong | wrong | 20 µs | – |"


def test_whole_iterations_add_forward_and_backward_to_each_step(tmp_path):
    steps = {"default": 3e-3, "foreach": 4e-3, "fused": 1e-3, "ours": 1.1e-3}
    measured = {"workload": "mlp", "batch": "8 × 4", "forward_backward_s": 2e-3, "step_s": steps}
    results = {"rows": [], "iterations": [measured]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    line = pages.renewed(PAGE.format(name="iterations"), tmp_path).split("\n")[4]
    assert line == "| MLP, 6 tensors, 8 × 4 | 2 ms | 5 ms | 3 ms | 3.1 ms | **0.97×** fused |"
