"""How Sphinx renders the pages and the reference: `make docs`, into build/docs."""

import re
from typing import Any

import clr_optim

project = "clr_optim"
author = "The clr_optim developers"
copyright = author
version = release = clr_optim.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook holds its outputs; a test runs its cells

html_theme = "furo"
html_title = f"clr_optim {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
toc_object_entries_show_parents = "hide"

autodoc_default_options = {
    "members": True,
    "special-members": "__call__",
    "member-order": "bysource",
}
# One parameter a line where they do not fit on one.
python_maximum_signature_line_length = 110
python_use_unqualified_type_names = True
napoleon_custom_sections = [("Source", "notes_style")]

# A reference that leads nowhere is an error, except to what other projects document.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|np|npt|matplotlib|collections|os|pathlib|typing)\..*|Figure|Path"),
    (r"py:.*", r"clr_optim\.core\.(wrapper|in_backward)\.\w+"),
]


def link_papers(
    _app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]
) -> None:
    """Make links of the papers that docstrings name as ``arXiv 1506.01186``."""
    lines[:] = [
        re.sub(r"arXiv (\d{4}\.\d{5})", r"`arXiv \1 <https://arxiv.org/abs/\1>`__", line)
        for line in lines
    ]


def hide_factories(
    _app: Any, _what: str, _name: str, _obj: Any, _options: Any, signature: str | None, returns: Any
) -> tuple[str | None, Any]:
    """Give a dataclass's default_factory as ``...``: what it is called by is no Python."""
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", hide_factories)
    app.connect("autodoc-process-docstring", link_papers)
