"""Sphinx: the pages of this folder, and the API reference from the docstrings. Built offline, read offline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zfcuda

project = "zfcuda"
author = "The zfcuda authors"
copyright = author
version = release = zfcuda.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.viewcode", "numpydoc", "myst_parser"]
html_theme = "furo"
html_title = f"zfcuda {version}"
html_static_path = ["static"]
html_css_files = ["custom.css"]

default_role = "code"
highlight_language = "none"
myst_heading_anchors = 3
autosummary_generate = False
autodoc_use_type_comments = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# Every function and module that a docstring or a page refers to must exist. Classes are in annotations too, where many
# are other libraries' or private.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|copy)\b.*"), ("py:class", r"(?!zfcuda\.(nn|ops|rewrite\.report)\.).*")]


# Formulas as MathML, which browsers render by themselves: no script, no network.


html_math_renderer = "mathml"


def _inline(self: Any, node: Any) -> None:
    self.body.append(convert(node.astext()))
    raise SkipNode


def _display(self: Any, node: Any) -> None:
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def _skip(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples have no docstrings but Python's: "Alias for field number 0"."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field") else None


def setup(app: Any) -> None:
    """What Sphinx calls first."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.connect("autodoc-skip-member", _skip)
