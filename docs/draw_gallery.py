"""Write the galleries of docs/schedules.md and docs/reference/schedule.rst from the registry."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from clr_optim.schedule import POLICIES

DOCS = Path(__file__).parent

#: The pictures that are no policies, with their descriptions.
OTHERS = {
    "windows": "the windows of cycles",
    "decays": "the shapes of wsd",
    "with_warmup": "three schedules with a warm-up",
    "growing_cycles": "cycles that double in length",
    "sequence": "a sequence: the paper's Table 2",
}


def pictures() -> dict[str, str]:
    """Return the description of each picture by its name."""
    firsts = {name: (inspect.getdoc(make) or "").splitlines()[0] for name, make in POLICIES.items()}
    plain = {name: re.sub(r":\w+:|`", "", first).rstrip(".") for name, first in firsts.items()}
    return {**plain, **OTHERS}


def markdown() -> str:
    """Return the gallery as a table of two columns."""
    cells = [
        f"{f'`{name}`' if name in POLICIES else alt} ![{alt}]({name}.png)"
        for name, alt in pictures().items()
    ]
    cells += [""] * (len(cells) % 2)
    rows = [f"| {left} | {right} |" for left, right in zip(cells[::2], cells[1::2], strict=True)]
    return "\n".join(["| | |", "| --- | --- |", *rows, ""])


def restructured() -> str:
    """Return the gallery as a list-table of two columns."""
    lines = [".. list-table::", "   :header-rows: 0", ""]
    for i, (name, alt) in enumerate(pictures().items()):
        title = f":func:`{name}`" if name in POLICIES else alt
        lines += [
            f"   * - {title}" if i % 2 == 0 else f"     - {title}",
            "",
            f"       .. image:: ../{name}.png",
            f"          :alt: {alt}",
        ]
    if len(pictures()) % 2:
        lines.append("     -")
    return "\n".join([*lines, ""])


def main() -> None:
    """Rewrite both pages."""
    page = DOCS / "schedules.md"
    text = page.read_text()
    before, rest = text.split("<!-- gallery -->\n")
    after = rest.split("<!-- end of gallery -->\n")[1]
    page.write_text(f"{before}<!-- gallery -->\n{markdown()}<!-- end of gallery -->\n{after}")
    page = DOCS / "reference/schedule.rst"
    before = page.read_text().split(".. list-table::")[0]
    page.write_text(before + restructured())


if __name__ == "__main__":
    main()
