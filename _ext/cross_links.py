"""Links that the notebooks do not have to write: to equations and glossary entries.

In Colab a directive or a role would show as raw text. So a chapter numbers an equation
with ``\\tag{5}`` and says "by (5)", and sets a term in bold where it introduces it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.std import StandardDomain
from sphinx.util import logging

TAG = re.compile(r"\\tag\{(\d+)\}")
# "(5)" after a space or a bracket, unless the words around it speak of another page
REFERENCE = re.compile(
    r"(?<=[\s(])(?<!['\u2019]s\s)\((\d+)\)"
    r"(?!\s+(?:of|in|from)\s+(?:the|chapter|another)\b)(?!\s+(?:of|in|from)\s*$)"
)
ENUMERATION = re.compile(r"(?:^|:\s+)\(1\)")
# said so, it must be there
NAMED = re.compile(r"(?:[Ee]quation|[Ff]ormula)\s+$")
SKIPPED = (
    nodes.title,
    nodes.literal,
    nodes.literal_block,
    nodes.math,
    nodes.math_block,
    nodes.reference,
    nodes.raw,
    addnodes.pending_xref,
)

log = logging.getLogger(__name__)


def number_equations(doctree: nodes.document) -> set[str]:
    """Give each numbered equation an anchor; return the numbers."""
    numbers = set()
    for block in doctree.findall(nodes.math_block):
        for number in TAG.findall(block.astext()):
            block["ids"].append(f"equation-{number}")
            numbers.add(number)
    return numbers


def line(node: nodes.Element | None) -> Iterator[nodes.Element]:
    """Go from an element through all that hold it."""
    while node is not None:
        yield node
        node = node.parent


def passages(doctree: nodes.document) -> Iterator[tuple[nodes.Element, nodes.Text]]:
    """Find the stretches of plain text, with the element that holds each."""
    for element in [*doctree.findall(nodes.TextElement)]:
        skipped = any(isinstance(holder, SKIPPED) for holder in line(element))
        if not skipped and not ENUMERATION.search(element.astext()):
            join_lines(element)
            yield from ((element, n) for n in element.children if type(n) is nodes.Text)


def join_lines(element: nodes.Element) -> None:
    """Make one text of those that lines' ends have divided."""
    joined: list[nodes.Node] = []
    for child in element.children:
        if (
            joined
            and isinstance(child, nodes.Text)
            and isinstance(joined[-1], nodes.Text)
        ):
            child = nodes.Text(joined.pop().astext() + child.astext())
        joined.append(child)
    element.children = []
    element.extend(joined)


def linked(text: str, numbers: set[str], docname: str) -> list[nodes.Node]:
    """Turn references to equations within a text into links."""
    parts: list[nodes.Node] = []
    end = 0
    for found in REFERENCE.finditer(text):
        if found[1] in numbers:
            place = {
                "refid": f"equation-{found[1]}",
                "reftitle": f"Equation {found[1]}",
            }
            parts.append(nodes.Text(text[end : found.start()]))
            parts.append(nodes.reference("", found[0], internal=True, **place))
            end = found.end()
        elif NAMED.search(text[: found.start()]):
            log.warning(
                "the text names equation %s, but no equation of this page has"
                " \\tag{%s}: correct the number, or say of which page it is",
                found[0],
                found[1],
                location=docname,
            )
    return [*parts, nodes.Text(text[end:])]


def link_equations(app: Sphinx, doctree: nodes.document) -> None:
    """Number a page's equations and lead from the text to them."""
    numbers = number_equations(doctree)
    for element, text in [*passages(doctree)]:
        element.replace(text, linked(text, numbers, app.env.docname))


def link_terms(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Lead from a term in bold or italics, where it first is, to the glossary."""
    standard = app.env.domains["std"]
    assert isinstance(standard, StandardDomain)
    terms = {
        name.lower(): place
        for (kind, name), place in standard.objects.items()
        if kind == "term" and place[0] != docname
    }
    for element in [*doctree.findall(emphasised)]:
        words = element.astext().replace("\u2019", "'").rstrip(".").lower().split()
        if place := terms.get(" ".join(words)):
            address = app.builder.get_relative_uri(docname, place[0]) + f"#{place[1]}"
            link = nodes.reference("", "", internal=True, refuri=address)
            link["classes"].append("term")
            link.extend(element.children)
            element.children = [link]
            link.parent = element
            terms = {n: p for n, p in terms.items() if p != place}


def emphasised(node: nodes.Node) -> bool:
    """Tell whether a node is bold or italic text within a paragraph, and no link."""
    return (
        isinstance(node, nodes.strong | nodes.emphasis)
        and isinstance(node.parent, nodes.paragraph)
        and next(iter(node.findall(nodes.reference)), None) is None
        # a parameter of a function may be called like a term
        and not any(isinstance(holder, addnodes.desc) for holder in line(node))
    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the steps to the build."""
    # the search gives glossary entries themselves, which Sphinx leaves to whole pages
    StandardDomain.object_types["term"].attrs["searchprio"] = 1
    app.connect("doctree-read", link_equations)
    app.connect("doctree-resolved", link_terms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
