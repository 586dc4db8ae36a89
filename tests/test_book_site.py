"""What the book's own Sphinx extensions do to a page, on documents of a few lines."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from docutils import nodes
from sphinx import addnodes

EXTENSIONS = Path(__file__).resolve().parent.parent / "_ext"
sys.path.insert(0, str(EXTENSIONS))

from page_tags import describe, site_address  # noqa: E402

CONF = f"""
import sys
sys.path.insert(0, {str(EXTENSIONS)!r})
extensions = ["myst_parser", "cross_links", "page_tags"]
myst_enable_extensions = ["dollarmath"]
html_title = "A book"
html_use_index = False
html_theme_options = {{"repository_url": "https://github.com/ada/book"}}
"""
PAGE = r"""# A page

This **fold** says what the page is about. It says so in whole sentences, $x$ or no $x$.

$$ z = f(z) \tag{1} $$

> $$
> g(z) = 0 , \tag{12}
> $$

## By (1)

By (1), and by formula
(12) as well (see (1)): *the slope (1)*. The other's (1), (1) of the introduction, (2),
$p(1) = 1$, $p$(1), f(1), `(1) here` and [by (1)](other.md) lead nowhere.

Two steps: (1) guess, (12) check.

A **Fold** again, *Newton's
method.* and **its sentence**.
"""
GLOSSARY = """# Other

This paragraph says what the page is about, so that it can be found.

```{glossary}
Fold
  Where two solutions meet: a **fold**.

Newton's method
  Repeat.
```
"""


def build(folder: Path, **pages: str) -> str:
    """Build a site of pages; give what Sphinx said."""
    (folder / "conf.py").write_text(CONF)
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text)
    command = [sys.executable, "-m", "sphinx", "-q", folder, folder / "built"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("site")
    assert "equation" not in build(folder, index=PAGE, other=GLOSSARY)
    assert "#term" not in (folder / "built" / "other.html").read_text().split("<h1>")[0]
    return (folder / "built" / "index.html").read_text()


def test_each_numbered_equation_has_an_anchor(page):
    anchors = re.findall(r'<div class="math[^>]* id="([^"]*)">\s*\\\[([^\\]*)', page)
    assert [(anchor, tex.strip()) for anchor, tex in anchors] == [
        ("equation-1", "z = f(z)"),
        ("equation-12", "g(z) = 0 ,"),
    ]


def test_references_to_equations_are_links_and_nothing_else_is(page):
    links = re.findall(r'<a [^>]*href="#equation-(\d+)"[^>]*>(.*?)</a>', page)
    assert links == [("1", "(1)"), ("12", "(12)"), ("1", "(1)"), ("1", "(1)")]
    paragraph = next(text for text in page.split("<p>") if text.startswith("By "))
    assert paragraph.count("equation-") == 4


def test_a_term_leads_to_the_glossary_the_first_time(page):
    links = re.findall(
        r'<(\w+)><a [^>]*href="(other[^"]*#.*?)"[^>]*>(.*?)</a>', page, re.S
    )
    assert [(kind, place) for kind, place, _ in links] == [
        ("strong", "other.html#term-Fold"),
        ("em", "other.html#term-Newton-s-method"),
    ]
    assert links[0][2] == "fold"


def test_maths_and_emphasis_survive_the_linking(page):
    assert page.count('class="math') == 6
    assert "<strong>its sentence</strong>" in page


def test_page_says_what_it_is_and_where(page):
    for tag in [
        '<meta name="description" content="This fold says what the page is about.">',
        '<meta property="og:url" content="https://ada.github.io/book/index.html">',
        '<link rel="canonical" href="https://ada.github.io/book/index.html"',
    ]:
        assert tag in page


def test_a_missing_equation_and_an_empty_beginning_are_named(tmp_path):
    said = build(
        tmp_path, index="# A page\n\nToo short. $$ z \\tag{1} $$\n\nEquation (7)."
    )
    assert (
        "the text names equation (7), but no equation of this page has \\tag{7}" in said
    )
    assert "give 10 characters: let them give 50 to 200" in said


@pytest.mark.parametrize(
    ("repository", "address"),
    [
        ("https://github.com/ada/book", "https://ada.github.io/book/"),
        ("https://github.com/OWNER/REPO/", "https://OWNER.github.io/REPO/"),
        ("https://github.com/Ada/ada.github.io", "https://Ada.github.io/"),
    ],
)
def test_address_of_the_site_follows_from_the_repository(repository, address):
    assert site_address(repository) == address


def test_description_is_whole_sentences_in_plain_words():
    cited = addnodes.pending_xref("", nodes.Text("ada"), refdomain="cite", reftype="p")
    paragraph = nodes.paragraph(
        "", "", nodes.Text("Made\nby "), nodes.strong("", "Ada")
    )
    paragraph += [nodes.Text(" "), cited, nodes.Text(". It is version 1.5. ")]
    assert describe(paragraph) == "Made by Ada. It is version 1.5."
    long = "x" * (200 - len(describe(paragraph)) - 2) + "."
    paragraph += nodes.Text(long)
    assert describe(paragraph).endswith(long)
    paragraph += nodes.Text(" No room for it.")
    assert describe(paragraph).endswith(long)
    paragraph.insert(0, nodes.math("", "x"))
    assert describe(paragraph) == ""
