"""What the site needs beyond Jupyter Book: its own MathJax, and small repairs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from page_tags import tags
from sphinx.application import Sphinx

HERE = Path(__file__).parent
MATHJAX = HERE.parent / "_vendor" / "mathjax"

# (pattern, replacement) for the theme's HTML; each holds axe-core at zero violations
# or spares the reader a download
REPAIRS = [
    # 1.5 MB of script for icons that the theme's web font has as well
    (r'<script defer src="[^"]*/fontawesome\.js[^"]*"></script>', ""),
    # a label that hides the text which is seen
    (r'(<summary) aria-label="Toggle hidden content"', r"\1"),
    (r'(<button class="btn search-button-field[^>]*) aria-label="Search"', r"\1"),
    # on the landing page the book's title would stand twice
    (r"<title>(.*?) &#8212; \1</title>", r"<title>\1</title>"),
    # the book's title must stand in a landmark
    (
        r'(<div id="pst-primary-sidebar") class',
        r'\1 role="complementary" aria-label="Book" class',
    ),
    # a list whose children are no list items, and a deprecated role
    (r'<div role="list" class="citation-list"', '<div class="citation-list"'),
    (r' role="doc-biblioentry"', ""),
    # some browsers would show a notebook's JSON instead of keeping the file
    (
        r'(<a href="[^"]*") target="_blank"(\s+class="[^"]*btn-download-source)',
        r"\1 download\2",
    ),
    # a corner of a table that heads nothing
    (r'<th( class="[^"]*")?>(<p></p>)?</th>', r"<td\1></td>"),
    # the parameters of a signature stand in a definition list without terms
    (r'<dl>(?=\s*<dd><em class="sig-param">)', '<dl role="presentation">'),
]

FRONT_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<link rel="icon" href="_static/favicon.svg">
<link rel="canonical" href="{url}">
{tags}<meta http-equiv="refresh" content="0; url={page}">
</head>
<body><main><h1>{title}</h1><p><a href="{page}">Open the book</a></p></main></body>
</html>
"""


def copy_mathjax(app: Sphinx) -> None:
    """Copy MathJax to ``_mathjax`` in the built site."""
    if app.builder.format == "html":
        target = Path(app.outdir) / "_mathjax"
        shutil.copytree(MATHJAX, target, dirs_exist_ok=True)


def simplify_buttons(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Show Colab's button itself, and no icon from a second web font."""
    buttons = context.get("header_buttons", [])
    for i, button in enumerate(buttons):
        if button.get("label") == "launch-buttons":
            (colab,) = button["buttons"]
            buttons[i] = colab | {"icon": button["icon"]}
    for button in buttons:
        for part in (button, *button.get("buttons", [])):
            if part.get("icon") == "fab fa-github":
                part["icon"] = "fas fa-code-branch"


def write_front_page(app: Sphinx, error: Exception | None) -> None:
    """Lead from ``index.html`` to the first page, wherever that lies."""
    root, title = app.config.root_doc, app.config.html_title
    if not error and app.builder.format == "html" and root != "index":
        page = f"{root}.html"
        url = app.config.html_baseurl + page
        described = tags(app.config, title, app.env.metadata[root]["description"], url)
        text = FRONT_PAGE.format(title=title, page=page, url=url, tags=described)
        (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")


def repair_pages(app: Sphinx, error: Exception | None) -> None:
    """Apply ``REPAIRS`` to every page of the finished site."""
    if error or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        text = page = path.read_text(encoding="utf-8")
        for pattern, replacement in REPAIRS:
            page = re.sub(pattern, replacement, page)
        if page != text:
            path.write_text(page, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the steps to the build."""
    # before the pages are written, so that the script's address carries its checksum
    app.connect("builder-inited", copy_mathjax)
    app.connect("html-page-context", simplify_buttons, priority=900)
    app.connect("build-finished", write_front_page)
    app.connect("build-finished", repair_pages)
    app.add_js_file(None, body=(HERE / "book_site.js").read_text(encoding="utf-8"))
    app.add_js_file(None, body=(HERE / "questions.js").read_text(encoding="utf-8"))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
