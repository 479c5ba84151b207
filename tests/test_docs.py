"""README and docs pages are true: their code runs, tables equal results, links lead somewhere."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from places import ROOT

import clr_optim
from clr_optim.bench import pages, paper, whole_curve
from clr_optim.bench.paper.readme import BEGIN, END, resnet_mark
from clr_optim.bench.report import time_in_words, whole_iterations

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
TEXTS = {page: (ROOT / page).read_text("utf-8") for page in PAGES}
README = TEXTS["README.md"]


def blocks_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TEXTS[page], flags=re.S | re.M)


def run(page: str) -> dict[str, Any]:
    """Run the blocks of a page in their order, as pasted into an empty interpreter."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        exec(compile(block, page, "exec"), space)
    return space


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_the_code_of_a_page_runs_as_pasted(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_the_cells_of_the_notebook_run_in_order():
    pytest.importorskip("matplotlib")
    notebook = json.loads((ROOT / "docs/five_minutes.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    space: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        exec("".join(cell["source"]), space)
    assert space["opt"].cycle == 2.0
    assert all(cell["outputs"] for cell in cells if cell is not cells[0])  # run `make notebook`


def test_pages_have_code():
    assert sum(len(blocks_of(page)) for page in PAGES) > 35
    assert len(blocks_of("README.md")) == 2


def test_the_readmes_run_ends_a_cycle():
    space = run("README.md")
    assert isinstance(space["opt"], clr_optim.CyclicalOptimizer)
    assert space["result"].suggest().base_lr < space["result"].suggest().max_lr


@pytest.mark.gpu
def test_the_captured_step_of_the_docs():
    space = run("docs/cuda_graphs.md")
    assert space["optimizer"].iteration == 100
    assert space["run"] == space["graph"].replay


# ---- links


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST name them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = folder / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors_of(file.read_text("utf-8")), f"{page}: {target}"


def test_every_page_is_in_the_table_of_contents():
    index = TEXTS["docs/index.md"]
    listed = set(re.findall(r"^([\w/]+)$", index, flags=re.M))
    assert {page.removeprefix("docs/").removesuffix(".md") for page in PAGES[1:]} - listed == {
        "index"
    }
    for name in re.findall(r"\{doc\}`([\w/]+)`", "".join(TEXTS.values())):
        assert name in listed


# ---- figures


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- table: " in TEXTS[page]])
def test_tables_are_of_the_committed_results(page):
    assert pages.renewed(TEXTS[page], ROOT) == TEXTS[page], "run `make tables`"


@pytest.mark.parametrize(
    ("report", "table", "mark"),
    [("paper-gpu/paper", None, BEGIN),
     ("table-4/resnet", "resnet", resnet_mark("resnet", "1/100"))],
)  # fmt: skip
def test_the_papers_tables_are_of_the_committed_results(report, table, mark):
    whole = json.loads((ROOT / f"bench/results/{report}.json").read_text())
    rows = paper.summarize(whole["runs"])
    rows = [row for row in rows if table in (None, row["table"])]
    lines = "\n".join(paper.readme_table(rows))
    assert f"{mark}\n{lines}\n{END}" in TEXTS["docs/paper.md"]
    assert json.loads(json.dumps(paper.summarize(whole["runs"]))) == whole["rows"]


def test_the_readmes_figures_of_training_stand_in_the_results():
    section = README.partition("## Does cycling train better?")[2].partition("\n## ")[0]
    for iterations, gains, verdicts, over_decay in (
        (1200, ("1.3", "2.6"), ("more accurate than",) * 2, ("2.6", "3.9")),
        (12000, ("0.2", "1.8"), ("as accurate as", "more accurate than"), ("0.9", "2.5")),
    ):
        figure = (ROOT / f"bench/results/figure-6/{iterations}/figure-6.md").read_text("utf-8")
        for gain in gains:
            assert gain in section
            assert f"+{gain} " in figure
        for verdict, gain in zip(verdicts, over_decay, strict=True):
            assert gain in section
            assert f"is {verdict} it (+{gain}, within" in figure
    for gain, shown in (("2.2", "+2.2 points"), ("1.4", "-1.4 points")):
        assert gain in section
        assert shown in TEXTS["docs/paper.md"]


@pytest.mark.parametrize(("data", "saved"), [("digits", "46%"), ("cifar10", "42%")])
def test_the_figures_of_growing_cycles_stand_in_the_results(data, saved):
    section = TEXTS["docs/schedules.md"].partition("### Cycles that grow")[2].partition("### ")[0]
    section = " ".join(section.partition(f"whole-curve/{data}/")[2].partition("- On")[0].split())
    folder = ROOT / "bench/results/whole-curve" / data
    results = json.loads((folder / "curve.json").read_text("utf-8"))
    text = (folder / "curve.md").read_text("utf-8")
    assert text == whole_curve.report(results)
    differences = [row["difference"] for row in whole_curve.compare(results)[1:]]
    assert f"{-min(differences):.2f} to {-max(differences):.2f} points less accurate" in section
    assert f"saves {saved} of the iterations" in section
    assert f"({saved} saved)" in text


def test_the_readmes_iterations_and_memory_stand_in_the_results():
    section = " ".join(README.partition("## Speed")[2].partition("\n## ")[0].split())
    results = json.loads((ROOT / "bench/results/cpu-2-threads-xeon.json").read_text("utf-8"))
    of = {row["workload"]: row for row in results["iterations"]}

    def whole(workload: str, step: str) -> str:
        return time_in_words(whole_iterations(of[workload])[0][step])

    assert f"the MLP takes {whole('mlp', 'ours')}, and {whole('mlp', 'fused')} with" in section
    assert f"GPT-2 takes {whole('gpt2', 'ours')} and {whole('gpt2', 'fused')}:" in section
    gpt2, memory = of["gpt2"], results["memory"]
    share = gpt2["step_s"]["ours"] / (gpt2["forward_backward_s"] + gpt2["step_s"]["ours"])
    assert f"its step is {share:.0%} of".replace("%", " %") in section
    assert memory["ours_bytes"] < 1e6
    assert memory["fused_bytes"] < 1e6
    default = memory["default_bytes"] - memory["ours_bytes"]
    assert f"takes {default / 1e6:.0f} MB more" in section


def test_versions_agree():
    assert f"version: {clr_optim.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {clr_optim.__version__}" in (ROOT / "CHANGELOG.md").read_text()


# ---- a README for a reader with three minutes


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a page's prose, without code, tables, comments and addresses."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"^(\||#|    ).*$", "", text, flags=re.M)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return [s for part in text.split("\n\n") for s in re.split(r"(?<=[.:?!])\s", part) if s.strip()]


def test_the_readme_is_short():
    assert README.count("\n") <= 180


def test_the_readmes_sentences_are_short():
    long = [s for s in sentences_of(README) if len(s.split()) > 30]
    assert not long, long
