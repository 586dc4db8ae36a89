"""What search engines and link previews read: titles, descriptions, cards, a sitemap.

The site's address follows from the repository's, which stands in _config.yml alone.
"""

from __future__ import annotations

import re
import shutil
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging

LENGTHS = range(50, 201)
CARD = "_static/card.png"  # drawn by tools/draw_card.py
CARD_ALT = "The path of a fixed-point iteration between a curve and the diagonal"
# pages that Sphinx makes: (name, title, description)
MADE = [
    (
        r"_modules/index",
        "Source code of the module",
        "The Python files of implicit_layers, the small module that the chapters of"
        " this book share, to be read online.",
    ),
    (
        r"_modules/(.*)/(.*)",
        r"Source code of \1.\2",
        r"The source code of \1.\2, a file of the Python module that the chapters of"
        " this book share.",
    ),
    (
        r"search",
        "Search",
        "Search the chapters, the glossary and the functions of this book on implicit"
        " layers.",
    ),
]

SITEMAP = """<?xml version="1.0" encoding="utf-8"?>
<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">
{}</urlset>
"""

log = logging.getLogger(__name__)


def site_address(repository: str) -> str:
    """Give the address at which GitHub Pages shows a repository."""
    owner, name = repository.rstrip("/").split("/")[-2:]
    host = f"{owner}.github.io"
    return f"https://{host}/" + f"{name}/" * (name.lower() != host.lower())


def set_address(app: Sphinx, config: Config) -> None:
    """Derive the site's address; canonical links and the sitemap start with it."""
    config.html_baseurl = site_address(config.html_theme_options["repository_url"])


def plain(paragraph: nodes.Element) -> str:
    """Give a paragraph's text without citations in brackets, a mark for a formula."""
    parts = []
    for node in paragraph.children:
        if isinstance(node, nodes.math):
            parts.append("\0")
        elif isinstance(node, addnodes.pending_xref) and node["refdomain"] == "cite":
            # a citation that is a part of the sentence is no plain text either
            parts.append("\0" if node["reftype"] == "t" else "")
        elif isinstance(node, nodes.Element) and not isinstance(node, nodes.literal):
            parts.append(plain(node))
        else:
            parts.append(node.astext())
    return "".join(parts)


def describe(paragraph: nodes.Element) -> str:
    """Take whole sentences without formulas, as many as a description has room for."""
    text = " ".join(plain(paragraph).split())
    text = re.sub(r"\s+(?=[,.;:!?])", "", text)
    description = ""
    for sentence in re.findall(r".*?[.!?](?=\s|$)", text):
        longer = f"{description} {sentence.strip()}".strip()
        if "\0" in sentence or len(longer) not in range(LENGTHS.stop):
            break
        description = longer
    return description


def keep_description(app: Sphinx, doctree: nodes.document) -> None:
    """Describe a page by the beginning of the first paragraph below its title."""
    below_title = (
        paragraph
        for paragraph in doctree.findall(nodes.paragraph)
        if type(paragraph.parent) is nodes.section
    )
    paragraph = next(below_title, nodes.paragraph())
    description = describe(paragraph)
    if len(description) not in LENGTHS:
        log.warning(
            "the first paragraph describes the page to search engines, and its whole"
            " sentences before any formula or named source give %d characters: let"
            " them give %d to %d",
            len(description),
            LENGTHS.start,
            LENGTHS.stop - 1,
            location=app.env.docname,
        )
    app.env.metadata[app.env.docname]["description"] = description


def tags(config: Config, title: str, description: str, url: str) -> str:
    """Write the elements of a page's head that describe it to other machines."""
    described = [
        ("name", "description", description),
        ("property", "og:type", "website"),
        ("property", "og:site_name", config.html_title),
        ("property", "og:title", title),
        ("property", "og:description", description),
        ("property", "og:url", url),
        ("property", "og:image", config.html_baseurl + CARD),
        ("property", "og:image:alt", CARD_ALT),
        ("name", "twitter:card", "summary_large_image"),
    ]
    return "".join(
        f'<meta {kind}="{name}" content="{escape(content)}">\n'
        for kind, name, content in described
    )


def add_tags(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Give a page its title and description."""
    for pattern, made, description in MADE:
        if found := re.fullmatch(pattern, pagename):
            title, about = found.expand(made), found.expand(description)
            if pagename != "search":  # whose template has it already
                context["title"] = title
            break
    else:
        title = re.sub("<.*?>", "", context["title"])
        about = app.env.metadata[pagename]["description"]
    own = tags(app.config, title, about, context["pageurl"])
    context["metatags"] = context.get("metatags", "") + own


def drop_source_pages(app: Sphinx) -> None:
    """Have the pages of source code written anew, for Sphinx keeps old ones as is."""
    shutil.rmtree(Path(app.outdir) / "_modules", ignore_errors=True)


def write_sitemap(app: Sphinx, error: Exception | None) -> None:
    """List every page, also those that this build had no need to write."""
    if error or app.builder.format != "html":
        return
    site = Path(app.outdir)
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    # the front page only leads on; _static holds what the theme forgot there
    pages = [p for p in pages if not re.match(r"(index|search)\.html|_static/", p)]
    start = app.config.html_baseurl
    places = "".join(f"<url><loc>{escape(start + p)}</loc></url>\n" for p in pages)
    (site / "sitemap.xml").write_text(SITEMAP.format(places), encoding="utf-8")
    robots = f"User-agent: *\nAllow: /\nSitemap: {start}sitemap.xml\n"
    (site / "robots.txt").write_text(robots, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the steps to the build."""
    app.connect("config-inited", set_address)
    app.connect("doctree-read", keep_description)
    app.connect("html-page-context", add_tags)
    app.connect("builder-inited", drop_source_pages)
    app.connect("build-finished", write_sitemap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
