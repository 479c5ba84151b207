"""The result of a range test: what it refuses, and how it is saved and loaded."""

from __future__ import annotations

import base64
import csv
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from range_test_helpers import accuracy_curve
from torch import nn

from clr_optim import CyclicalOptimizer
from clr_optim.range_test import Bounds, RangeTest

# Written before `clr_optim.range_test` became a package.
OLD_PICKLE = (
    "gASVnAEAAAAAAACMFGNscl9vcHRpbS5yYW5nZV90ZXN0lIwJUmFuZ2VUZXN0lJOUKYGUfZQojANscnOUXZQoRz+EeuFH"
    "rhR7Rz+UeuFHrhR7Rz+keuFHrhR7ZYwGdmFsdWVzlF2UKEdAIAAAAAAAAEsGR0ASAAAAAAAAZYwFc3RlcHOUXZQoSwBL"
    "AUsCZYwEbW9kZZSMC2V4cG9uZW50aWFslIwGbWV0cmljlIwPdmFsaWRhdGlvbl9sb3NzlIwJbnVtX3N0ZXBzlEsyjAhk"
    "aXZlcmdlZJSIjAtpbnRlcnJ1cHRlZJSJjAlzbW9vdGhpbmeURz+pmZmZmZmajAZyYXRpb3OUXZQoRz+5mZmZmZmaRz/w"
    "AAAAAAAAZXViaACMBkJvdW5kc5STlCmBlH2UKIwHYmFzZV9scpRHP4R64UeuFHuMBm1heF9scpRHP6R64UeuFHtoE0c/"
    "8AAAAAAAAEc/4AAAAAAAAIaUjApjb25maWRlbmNllEc/4AAAAAAAAIwGcmVhc29ulIwDd2h5lIwGbWV0aG9klIwGdmFs"
    "bGV5lHVihpQu"
)
OLD_JSON = """{
 "format": 1,
 "lrs": [
  0.01,
  0.02,
  0.04
 ],
 "values": [
  8.0,
  6,
  4.5
 ],
 "steps": [
  0,
  1,
  2
 ],
 "mode": "exponential",
 "metric": "validation_loss",
 "num_steps": 50,
 "diverged": true,
 "interrupted": false,
 "smoothing": 0.05,
 "ratios": [
  0.1,
  1.0
 ]
}
"""
OLD_CSV = """step,lr,validation_loss,smoothed
0,0.01,8.0,8.0
1,0.02,6,6.05325348946
2,0.04,4.5,4.5
"""
OLD_CURVE = RangeTest(
    [0.01, 0.02, 0.04], [8.0, 6, 4.5], mode="exponential", metric="validation_loss",
    num_steps=50, diverged=True, ratios=[0.1, 1.0],
)  # fmt: skip
OLD_BOUNDS = Bounds(0.01, 0.04, (1.0, 0.5), 0.5, "why", "valley")


def test_an_old_pickle_loads_and_a_new_one_names_the_public_module():
    assert pickle.loads(base64.b64decode(OLD_PICKLE)) == (OLD_CURVE, OLD_BOUNDS)
    written = pickle.dumps((OLD_CURVE, OLD_BOUNDS), protocol=4)
    assert set(re.findall(rb"clr_optim[.a-z_]*", written)) == {b"clr_optim.range_test"}


def test_old_files_load_and_new_ones_equal_them(tmp_path: Path):
    assert RangeTest.from_dict(json.loads(OLD_JSON)) == OLD_CURVE
    for name, text in (("curve.json", OLD_JSON), ("curve.csv", OLD_CSV)):
        OLD_CURVE.save(tmp_path / name)
        assert (tmp_path / name).read_text() == text


def test_a_result_is_saved_and_loaded(tmp_path):
    result = accuracy_curve(30, noise=1.0)
    result.interrupted = True
    assert RangeTest.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    result.save(tmp_path / "curve.json")
    assert RangeTest.from_dict(json.loads((tmp_path / "curve.json").read_text())) == result
    result.save(str(tmp_path / "curve.csv"))
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == result.lrs
    assert [float(row["accuracy"]) for row in rows] == result.values
    assert [int(row["step"]) for row in rows] == result.steps
    assert [float(row["smoothed"]) for row in rows] == result.smoothed()
    with pytest.raises(ValueError, match=r"\.json or \.csv, got 'curve.txt'"):
        result.save("curve.txt")
    with pytest.raises(TypeError, match="path must be a string or a Path, got None"):
        result.save(None)
    with pytest.raises(ValueError, match=r"steps_per_epoch must be an integer <= 2\*\*63 - 1"):
        RangeTest.suggest_step_size(10**400)


@pytest.mark.parametrize(
    ("change", "ending"),
    [
        ({}, "30 of 30 steps, complete)"),
        ({"diverged": True, "num_steps": 99}, "30 of 99 steps, diverged)"),
        ({"interrupted": True, "num_steps": 123_456}, "30 of 123456 steps, interrupted)"),
        ({"lrs": [], "values": [], "steps": []}, "RangeTest(loss, no measurements, complete)"),
    ],
    ids=["complete", "diverged", "interrupted", "empty"],
)
def test_a_repr_fits_on_a_line(change, ending):
    curve = {"lrs": [1.2345678e-5 * (i + 1) for i in range(30)], "values": [-1.23456e-7] * 30}
    text = repr(RangeTest(**{**curve, **change}))
    assert text.endswith(ending)
    assert text.startswith("RangeTest(loss")
    assert "\n" not in text
    assert len(text) <= 120


def test_an_exponential_curve_has_no_rate_of_zero():
    with pytest.raises(ValueError, match="above 0"):
        RangeTest([0.0, 2.0], [1.0, 2.0], mode="exponential")
    with pytest.raises(TypeError, match="to_dict"):
        RangeTest.from_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": [0, 0, 0]}, r"steps must rise: \[0, 0, 0\]"),
        ({"steps": [2, 1, 0]}, r"steps must rise: \[2, 1, 0\]"),
        ({"steps": [0, 4, 8], "num_steps": 8}, "num_steps=8 is below the 9 steps of the meas"),
    ],
)
def test_steps_rise_up_to_their_number(change, words):
    with pytest.raises(ValueError, match=words):
        RangeTest([0.1, 0.2, 0.3], [2.0, 1.0, 1.5], **change)


def test_numbers_of_any_type_are_kept_as_pythons(tmp_path):
    result = RangeTest(
        [np.float32(0.5), np.float64(1.0)], [torch.tensor(2.0), 1], diverged=np.bool_(True)
    )
    assert (result.lrs, result.values, result.diverged) == ([0.5, 1.0], [2.0, 1.0], True)
    result.save(tmp_path / "a.json")
    assert RangeTest.from_dict(json.loads((tmp_path / "a.json").read_text())) == result


def test_step_size_and_length_follow_the_paper():
    assert RangeTest.suggest_step_size(500) == 2000
    assert RangeTest.suggest_step_size(500, epochs=2) == 1000
    assert accuracy_curve().suggest_step_size(24, epochs=2.5) == 60
    assert RangeTest.total_steps(3, 500, epochs=8) == 3 * 2 * 4000
    for epochs in (1, 11):
        with pytest.raises(ValueError, match="epochs must be"):
            RangeTest.suggest_step_size(500, epochs=epochs)
    with pytest.raises(ValueError, match="cycles"):
        RangeTest.total_steps(0, 500)
    with pytest.raises(ValueError, match="method must be one of"):
        accuracy_curve().suggest("knee")
    with pytest.raises(ValueError, match="base must be one of"):
        accuracy_curve().suggest(base="max/2")


def test_the_optimizer_takes_the_bounds():
    result = accuracy_curve()
    result.ratios = [0.1, 1.0]
    bounds = result.suggest()
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    inner = torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0)
    opt = CyclicalOptimizer(inner, "triangular2", **bounds.asdict())
    assert opt.lr_at(0) == pytest.approx([bounds.base_lr / 10, bounds.base_lr])
    assert opt.lr_at(2000) == pytest.approx([bounds.max_lr / 10, bounds.max_lr])
    assert Bounds(0.1, 0.4).asdict() == {"base_lr": 0.1, "max_lr": 0.4}


# (error, pattern, keys of a result's dictionary)
NO_RESULTS = [
    (ValueError, "format=2", {"format": 2}),
    (ValueError, r"unknown \['x'\]", {"x": 1}),
    (ValueError, "mode must be one of", {"mode": "log"}),
    (ValueError, "metric must be one of", {"metric": "f1"}),
    (ValueError, "values has 1 entries", {"values": [1.0]}),
    (ValueError, "finite", {"values": [math.nan, 1.0]}),
    (ValueError, "lrs must rise", {"lrs": [2.0, 1.0]}),
    (TypeError, "lrs must be a list of numbers, got 3", {"lrs": 3}),
    (TypeError, "values must be a list of numbers, got None", {"values": None}),
    (TypeError, r"values\[1\] must be a number, got 'x'", {"values": [1.0, "x"]}),
    (TypeError, "steps must be a list of numbers, got 'ab'", {"steps": "ab"}),
    (ValueError, r"steps\[0\] must be an integer >= 0, got -1", {"steps": [-1, 2]}),
    (TypeError, "num_steps must be an integer >= 0", {"num_steps": torch.ones(2)}),
    (TypeError, "diverged must be True or False", {"diverged": 1}),
    (TypeError, r"ratios\[0\] must be a number", {"ratios": [None]}),
    (ValueError, "format=tensor", {"format": torch.ones(2)}),
    (ValueError, r"unknown \['3'\]", {3: 1}),
]


@pytest.mark.parametrize(("error", "message", "change"), NO_RESULTS)
def test_a_wrong_dictionary_is_refused(error, message, change):
    with pytest.raises(error, match=message):
        RangeTest.from_dict({**RangeTest([1.0, 2.0], [1.0, 2.0]).to_dict(), **change})
