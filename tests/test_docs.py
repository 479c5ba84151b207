"""What the README says is so: its code is run in its order, its links lead somewhere."""

from __future__ import annotations

import json
import re

import pytest
import torch
from places import ROOT

import clr_optim
from clr_optim.bench import paper
from clr_optim.bench.paper.readme import BEGIN, END

README = (ROOT / "README.md").read_text()


def test_the_readmes_code_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 8
    model = torch.nn.Linear(20, 2)
    space = {"torch": torch, "CyclicalOptimizer": clr_optim.CyclicalOptimizer, "model": model}
    for block in blocks:
        exec(block, space)
    assert space["opt"].cycle == 5.0
    assert space["averaged"].n_averaged == 2
    assert space["table2"](17_000) == 0.0005
    assert space["optimizer"].iteration == 100
    assert space["optimizer"].cycle == 1.0
    assert space["cyclic"].steps_to_cycle_end == 2 * 4 * len(space["loader"])


@pytest.mark.gpu
def test_the_readmes_captured_step():
    recipe = next(b for b in re.findall(r"```python\n(.*?)```", README, flags=re.S) if "graph" in b)
    space = {"torch": torch, "CyclicalOptimizer": clr_optim.CyclicalOptimizer}
    exec(recipe, space)
    assert space["optimizer"].iteration == 100
    assert space["run"] == space["graph"].replay


def test_the_readmes_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_readmes_paper_table_is_of_the_committed_results():
    whole = json.loads((ROOT / "bench/results/paper-gpu/paper.json").read_text())
    table = "\n".join(paper.readme_table(paper.summarize(whole["runs"])))
    assert f"{BEGIN}\n{table}\n{END}" in README


def test_versions_agree():
    assert f"version: {clr_optim.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {clr_optim.__version__}" in (ROOT / "CHANGELOG.md").read_text()
