"""The static page: one HTML file that shows the pictures in the folder beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from zfcuda.demo.folder import write

PAGE = "index.html"


def write_page(folder: Path, content: dict[str, Any]) -> Path:
    """Fill the template; pictures are named by their path from `folder`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("zfcuda.demo"),
        autoescape=jinja2.select_autoescape(("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.j2").render(content)
    path = folder / PAGE
    write(path, lambda part: part.write_text(html, encoding="utf-8"))
    return path
