"""The prose of the sources is plain: it has none of the phrases that readers have to decipher.

CONTRIBUTING.md has the rules of style. This file enforces the part that a search can enforce.
"""

from __future__ import annotations

import pathlib
import re

import pytest
from places import ROOT

#: phrase (a regular expression; a space matches a line break too) -> what to write instead
INSTEAD = {
    "(some|any)body": "the noun: the user, a caller, other code",
    "nobody": "the noun with a negation: no caller, no other code",
    "whoever": "the noun: the user, the caller",
    "([a-z]+_)?theirs(_[a-z]+)?": "the noun: torch's optimizer, the user's function",
    "of (its|their|his|her) own": "'its own …' or 'a separate …' before the noun",
    "as it is": "'unchanged', or the noun and its state",
    "by then": "the condition: 'if …', or the event: 'before the step'",
    r"(?<!so\s)that there (is|are)": "the noun alone: 'each device', 'all parameters'",
    "the very": "'the same', or nothing",
    "in step with": "'equal to', 'agrees with', or one place for the fact",
    "(is|are|was|were|be|been) told": "'gets', 'receives', or the active verb with its subject",
    "told otherwise": "'by default'",
    "(has|have|had|must|can) come to": "the event: 'ended at', 'reached', 'equals'",
    "(comes|came|coming) to": "the event: 'ends at', 'reaches', 'equals'",
    "of no effect": "'has no effect'",
    "the ones? that": "the noun: 'the tensor that', 'the rows that'",
    "what there (is|are|was)": "the noun: 'the groups', 'the old file'",
    "what (is|are|was|were) ([a-z]+ed|done|made|kept|held|seen|left|said|there)": (
        "the noun: 'the table to upload', 'the new values'"
    ),
    "what [a-z]+ makes of": "the result: 'the compiler's report'",
    "for (the )?want of": "'without', or 'because … is missing'",
    "save that": "'except that'",
    "lest": "'so that … not'",
    "none of (its|ours|theirs) business": "the reason",
}

SOURCES = ("clr_optim/**/*.py", "bench/**/*.py", "kernels/**/*.py", "kernels/**/*.h",
           "kernels/**/*.cpp")  # fmt: skip
OTHERS = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "tests/bench/bench_helpers.py",
    "tests/bench/paper_helpers.py",
    "tests/bench/test_bench.py",
    "tests/bench/test_bench_gpu.py",
    "tests/bench/test_cifar10.py",
    "tests/demo/test_cli.py",
    "tests/demo/test_commands.py",
    "tests/demo/test_demo.py",
    "tests/bench/test_paper.py",
    "tests/bench/test_paper_figure.py",
    "tests/bench/test_paper_networks.py",
    "tests/bench/test_paper_report.py",
    "tests/bench/test_paper_resnet.py",
    "tests/bench/test_paper_rows.py",
    "tests/bench/test_paper_runs.py",
    "tests/bench/test_throughput.py",
    "tests/bench/test_throughput_gpu.py",
    "tests/bench/test_training.py",
    "tests/bench/test_whole_curve.py",
)

# Between two words: spaces, or a line break with the signs of comments and split strings around it.
_GAP = r"""(?:[ \t]+|[ \t]*["']?[ \t]*\n[ \t]*(?:\#:?|//+|\*|f?["'])?[ \t]*)"""


def _pattern(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{phrase.replace(' ', _GAP)})\b", re.IGNORECASE)


PATTERNS = {_pattern(phrase): remedy for phrase, remedy in INSTEAD.items()}


def findings(text: str, name: str) -> list[str]:
    """One line per forbidden phrase: file, line number, phrase, remedy."""
    found = []
    for pattern, remedy in PATTERNS.items():
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            phrase = " ".join(re.findall(r"[A-Za-z]+", match[0]))
            found.append(f"{name}:{line}: {phrase!r}; write instead: {remedy}")
    return found


def files() -> list[str]:
    globs = (*SOURCES, "README.md", "docs/*.md")
    found = [str(path.relative_to(ROOT)) for glob in globs for path in ROOT.glob(glob)]
    return sorted((*found, *OTHERS))


#: names that no test may give to a thing, alone or as a part of a name -> what to write instead
NAMES = {"theirs": "twin (torch's optimizer), expected (its values)"}


def test_the_tests_name_things_by_nouns():
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path != pathlib.Path(__file__):
            text = path.read_text("utf-8")
            for name, remedy in NAMES.items():
                for match in re.finditer(rf"(?<![a-z]){name}(?![a-z])", text, re.IGNORECASE):
                    line = text.count("\n", 0, match.start()) + 1
                    found.append(f"{path.relative_to(ROOT)}:{line}: {name}; write: {remedy}")
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_the_sources_have_none_of_the_phrases():
    found = [line for name in files() for line in findings((ROOT / name).read_text("utf-8"), name)]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize(
    ("text", "line", "phrase"),
    [
        ("x = 1\n# as if nobody asked\n", 2, "nobody"),
        ('"""A list of\n    its own."""', 1, "of its own"),
        ("// one that is in\n//   step with the other\n", 1, "in step with"),
        ('raise E("the lock of "\n      "their own")', 1, "of their own"),
        ("#: What is\n#: uploaded goes first\n", 1, "What is uploaded"),
        ("All devices that\nthere are", 1, "that there are"),
    ],
)
def test_a_phrase_is_found_across_lines(text, line, phrase):
    (found,) = findings(text, "a.py")
    assert found.startswith(f"a.py:{line}: {phrase!r}; write instead: ")


def test_words_that_only_look_like_a_phrase_pass():
    assert not findings("its own list; welcome to it; a nobody_ else; everybody's", "a.py")


def test_every_file_by_name_exists():
    assert all((ROOT / name).is_file() for name in OTHERS)
    assert "bench/throughput/cells.py" in files()


def test_every_file_on_the_map_of_contributing_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"`((?:clr_optim|kernels|bench|tests|docs)/[\w/.]*)`", text)
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []
