"""The result of a range test: what it refuses, and how it is saved and loaded."""

from __future__ import annotations

import base64
import json
import pickle
import re
from pathlib import Path

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
