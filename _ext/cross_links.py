"""Links that the notebooks do not have to write: to equations and glossary entries.

In Colab a directive or a role would show as raw text. So a chapter numbers an equation
with ``\\tag{5}`` and says "by (5)", and sets a term in bold where it introduces it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.std import StandardDomain
from sphinx.util import logging

TAG = re.compile(r"\\tag\{(\d+)\}")
# "(5)" after a space or a bracket, unless the words around it speak of another page
REFERENCE = re.compile(
    r"(?<=[\s(])(?<!['’]s\s)\((\d+)\)"
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


def passages(doctree: nodes.document) -> Iterator[tuple[nodes.Element, str]]:
    """Find the stretches of plain text, with the element that holds each."""
    for element in [*doctree.findall(nodes.TextElement)]:
        holder: nodes.Element | None = element
        while holder is not None and not isinstance(holder, SKIPPED):
            holder = holder.parent
        if holder is None and not ENUMERATION.search(element.astext()):
            # a line's end divides text into several nodes
            children = element.children
            element.children = []
            for is_text, group in groupby(children, lambda n: isinstance(n, nodes.Text)):
                text = "".join(group) if is_text else ""
                element.extend([nodes.Text(text)] if is_text else group)
            yield from ((element, n) for n in element.children if type(n) is nodes.Text)


def linked(text: str, numbers: set[str], doctree: nodes.document) -> list[nodes.Node]:
    """Turn references to equations within a text into links."""
    parts: list[nodes.Node] = []
    end = 0
    for found in REFERENCE.finditer(text):
        if found[1] in numbers:
            place = {"refid": f"equation-{found[1]}", "reftitle": f"Equation {found[1]}"}
            parts.append(nodes.Text(text[end : found.start()]))
            parts.append(nodes.reference("", found[0], internal=True, **place))
            end = found.end()
        elif NAMED.search(text[: found.start()]):
            log.warning(
                "the text names equation %s, but no equation of this page has"
                " \\tag{%s}: correct the number, or say of which page it is",
                found[0],
                found[1],
                location=doctree,
            )
    return [*parts, nodes.Text(text[end:])]


def link_equations(app: Sphinx, doctree: nodes.document) -> None:
    """Number a page's equations and lead from the text to them."""
    numbers = number_equations(doctree)
    for element, text in [*passages(doctree)]:
        element.replace(text, linked(text, numbers, doctree))


def link_terms(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Lead from a term in bold or italics, where it first is, to the glossary."""
    standard = app.env.domains["std"]
    assert isinstance(standard, StandardDomain)
    terms = {
        name.lower(): place
        for (kind, name), place in standard.objects.items()
        if kind == "term" and place[0] != docname
    }
    for element in [*doctree.findall(lambda n: type(n) in {nodes.strong, nodes.emphasis})]:
        name = " ".join(element.astext().replace("’", "'").split()).rstrip(".").lower()
        if (place := terms.get(name)) and not next(element.findall(nodes.reference), None):
            page, anchor = place
            address = app.builder.get_relative_uri(docname, page) + f"#{anchor}"
            link = nodes.reference("", "", internal=True, refuri=address, classes=["term"])
            link.extend(element.children)
            element.children = []
            element += link
            terms = {n: p for n, p in terms.items() if p != place}


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the steps to the build."""
    # the search gives glossary entries themselves, which Sphinx leaves to whole pages
    StandardDomain.object_types["term"].attrs["searchprio"] = 1
    app.connect("doctree-read", link_equations)
    app.connect("doctree-resolved", link_terms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
