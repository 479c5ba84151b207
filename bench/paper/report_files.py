"""Write the files of a report: Markdown, JSON and pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clr_optim import plotting

__all__ = ["write_report"]


def write_report(
    folder: Path, name: str, text: str, whole: Mapping[str, Any], draw: Callable[[Path], None]
) -> str:
    """Write ``<name>.md``, ``<name>.json`` and the pictures into a folder.

    Without matplotlib, the function draws no pictures and says so on stderr. A machine with
    matplotlib can draw them later.

    Args:
        folder: an existing folder.
        name: of the files.
        text: the Markdown.
        whole: the contents of the JSON.
        draw: draws the pictures into the folder.

    Returns:
        The Markdown.
    """
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / f"{name}.json").write_text(
        json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    try:
        plotting.require_matplotlib()
    except ImportError as error:
        print(f"{error}; then --report draws the pictures", file=sys.stderr)
    else:
        draw(folder)
    return text
