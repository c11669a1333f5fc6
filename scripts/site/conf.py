"""Settings of Sphinx for `make docs`. The sources are a prepared copy of the repository's pages: see `pages.py`."""

import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[2] / "ingestor/__init__.py"

project = "ingestor"
author = "The maintainers of ingestor"
release = re.findall(r'__version__ = "([^"]+)"', _PACKAGE.read_text(encoding="utf-8"))[0]
extensions = ["myst_parser"]
root_doc = "README"
nitpicky = True  # with --fail-on-warning: a broken link or anchor fails the build
myst_heading_anchors = 4
suppress_warnings = [
    "misc.highlighting_failure",  # JSON and SQL that is cut with an ellipsis
    "myst.header",  # a page may begin with sections of the third level
]

html_theme = "furo"  # light and dark, by the reader's system or choice; it loads nothing from other hosts
html_title = f"ingestor {release}"
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it would fetch the pages, which a browser refuses for files
