"""The directive `live-output`: a live figure of a chapter, on another page."""

from __future__ import annotations

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class LiveOutput(SphinxDirective):
    """Show the HTML that the cell with an id stored: path of the notebook, id."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        """Return the output as raw HTML."""
        path, name = self.arguments
        _, file = self.env.relfn2path(path)
        self.env.note_dependency(file)
        cells = nbformat.read(file, as_version=4).cells  # type: ignore[no-untyped-call]
        data = [
            output.get("data", {})
            for cell in cells
            if cell.get("id") == name
            for output in cell.outputs
        ]
        html = [kinds["text/html"] for kinds in data if "text/html" in kinds]
        if len(html) != 1:
            raise self.error(f"{path} has {len(html)} HTML outputs in cell {name!r}")
        return [nodes.raw("", html[0], format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("live-output", LiveOutput)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
