"""The built site in a real browser: `python -m pytest tests/site_check.py`.

Opens every page of _build/html wide and at a phone's width, light and dark, and asks of
each what FACTS reads off it, what axe-core says of it, and how it would print. The last
tests show that each check can fail.
"""

import functools
import gzip
import http.server
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, sync_playwright

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_BROWSER = (
    "the site was not checked: no Chromium was found; on Debian"
    " `apt-get install chromium` brings it, and CHROMIUM=/path/to/it names another"
)
LOOKS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
MAX_BYTES = 1_000_000
FACTS = r"""async () => {
  await window.MathJax?.startup?.promise?.catch(() => "the console tells");
  await document.fonts.ready;
  const all = (what) => [...document.querySelectorAll(what)];
  for (const fold of all("details")) fold.open = true;
  const frame = () => new Promise(requestAnimationFrame);
  await frame().then(frame).then(frame);  // until the page has noticed
  const texts = [document.title];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const skip = "script, style, code, pre, mjx-container";
    if (!walk.currentNode.parentElement.closest(skip))
      texts.push(walk.currentNode.textContent);
  }
  const tex = /\\[()\[\]]|\\begin\{|\$\$|\$[^\s$]([^$]*[^\s$])?\$/;
  const page = document.documentElement;
  return {
    overflow: page.scrollWidth - page.clientWidth,
    raw: texts.filter((text) => tex.test(text)).map((text) => text.trim()),
    unset: all(".math").filter((box) => !box.querySelector("mjx-container"))
      .map((box) => box.textContent.trim()),
    faulty: all("mjx-merror").map((box) => box.dataset.mjxError ?? box.textContent)
      .concat(all("mjx-assistive-mml").map((box) => box.textContent)
        .filter((text) => /\\[a-zA-Z]/.test(text))),
    images: all("img").map((img) => [img.getAttribute("alt") ?? "",
      img.getAttribute("src"), img.complete && img.naturalWidth > 0]),
    links: all("a[href]").map((a) => a.href),
    ids: all("[id]").map((element) => element.id),
    title: document.title,
    head: all("head meta, head link[rel=canonical]").map((tag) => [
      tag.getAttribute("property") ?? tag.name ?? tag.rel,
      tag.content ?? tag.getAttribute("href")]),
    cut: all(".math mjx-container").filter((formula) => {
      const box = formula.closest(".math");
      const wide = box.scrollWidth > box.clientWidth + 4;
      return formula.getBoundingClientRect().left < box.getBoundingClientRect().left - 2
        || wide && !/auto|scroll/.test(getComputedStyle(box).overflowX);
    }).map((formula) => formula.textContent.slice(0, 40)),
    equations: all("article a[href^='#equation-']").map((a) => a.hash.slice(1)),
  };
}"""
# axe-core takes half a minute for a chapter: for the contrast of each word of the code,
# and for the inside of each formula. So a word in the colours of an earlier one
# loses its own element, and formulas after the twentieth become empty boxes of their
# size.
THIN = r"""() => {
  const still = document.createElement("style");
  still.textContent = "* { transition: none !important }";
  document.head.append(still);
  const seen = new Set();
  const plain = [];
  for (const pre of document.querySelectorAll("pre")) {
    let grounds = "";
    for (let box = pre; box; box = box.parentElement)
      grounds += getComputedStyle(box).backgroundColor;
    for (const word of pre.querySelectorAll("span:not(:has(*)):not([id])")) {
      const { color, backgroundColor, fontWeight } = getComputedStyle(word);
      const kind = grounds + color + backgroundColor + fontWeight;
      if (seen.has(kind)) plain.push(word);
      seen.add(kind);
    }
  }
  for (const word of plain) word.replaceWith(...word.childNodes);
  const fits = (box) => box.scrollWidth <= box.clientWidth + 1;
  const formulas = [...document.querySelectorAll("mjx-container")]
    .filter((formula) => fits(formula) && fits(formula.parentElement))
    .filter((formula) => !formula.closest("th"));
  const sizes = formulas.map((formula) => formula.getBoundingClientRect());
  formulas.slice(20).forEach((formula, i) => {
    const { width, height } = sizes[i + 20];
    formula.style.cssText = `display: inline-block; width: ${width}px;
      height: ${height}px; max-width: 100%; min-width: 0; padding: 0`;
    formula.parentElement.style.overflow = "visible";
    formula.replaceChildren();
  });
}"""
A4 = {"width": 718, "height": 1047}  # CSS pixels, within margins of 1 cm
PRINT = r"""async () => {
  await window.MathJax?.startup?.promise?.catch(() => "the console tells");
  const all = (what) => [...document.querySelectorAll(what)];
  const seen = (what) => all(what).filter((element) => element.checkVisibility());
  const wide = (box) => box.scrollWidth > box.clientWidth + 1 && box.clientWidth;
  const light = (colour) => colour.match(/[\d.]+/g).slice(0, 3).every((c) => c > 200);
  const { backgroundColor, color } = getComputedStyle(document.body);
  return [
    ...seen("nav, button, .bd-header, .bd-sidebar, .headerlink")
      .map((box) => `shows ${box.outerHTML.slice(0, 80)}`),
    ...all("html, pre, table, div.math, .pst-scrollable-table-container").filter(wide)
      .map((box) => `cuts off ${box.outerHTML.slice(0, 80)}`),
    ...all("details:not([open])").map((box) => `folds ${box.innerText.slice(0, 40)}`),
    ...(backgroundColor === "rgba(0, 0, 0, 0)" || light(backgroundColor)) &&
      !light(color) ? [] : [`is ${color} on ${backgroundColor}`],
  ];
}"""


@dataclass
class Visit:
    """One page as one reader saw it."""

    page: str
    look: str
    site: str
    requests: list[tuple[str, int]]
    missing: list[str]
    errors: list[str]
    facts: dict[str, Any]


Problems = Iterator[str]


def foreign_requests(visit: Visit) -> Problems:
    yield from (url for url, _ in visit.requests if not url.startswith(visit.site))


def missing_files(visit: Visit) -> Problems:
    yield from visit.missing


def script_errors(visit: Visit) -> Problems:
    yield from visit.errors


def overflow(visit: Visit) -> Problems:
    if visit.facts["overflow"] > 0:
        yield f"{visit.facts['overflow']} px wider than the window"


def raw_tex(visit: Visit) -> Problems:
    yield from visit.facts["raw"]
    yield from visit.facts["unset"]


def faulty_tex(visit: Visit) -> Problems:
    yield from visit.facts["faulty"]


def cut_formulas(visit: Visit) -> Problems:
    """Formulas wider than their place of which a reader cannot reach both ends."""
    yield from visit.facts["cut"]


def bad_images(visit: Visit) -> Problems:
    for alt, src, loaded in visit.facts["images"]:
        if not loaded:
            yield f"{src} does not load"
        if not re.search("[a-z]", alt) or re.search(r"[0-9a-f]{32}|\.\w{3,4}$", alt):
            yield f"{src} has the alt text {alt!r}: describe the picture"


def weight(visit: Visit) -> Problems:
    own = [size for url, size in visit.requests if "/_mathjax/" not in url]
    if sum(own) >= MAX_BYTES:
        yield f"{sum(own):,} bytes beside MathJax; {MAX_BYTES:,} is too much"


def colab_button(visit: Visit) -> Problems:
    source = Path(visit.page).with_suffix(".ipynb")
    if (ROOT / source).exists():
        repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
        address = repository["url"].removeprefix("https://github.com/")
        blob = f"{address}/blob/{repository['branch']}/{source.as_posix()}"
        url = f"https://colab.research.google.com/github/{blob}"
        if url not in visit.facts["links"]:
            yield f"no link to {url}"


def accessibility(visit: Visit) -> Problems:
    yield from visit.facts["axe"]


def printing(visit: Visit) -> Problems:
    yield from visit.facts["print"]


def description(visit: Visit) -> Problems:
    """What search engines and link previews read."""
    head: dict[str, str] = dict(visit.facts["head"])
    if len(visit.facts["title"]) not in range(5, 120):
        yield f"the title {visit.facts['title']!r} has not 5 to 119 characters"
    about = head.get("description", "")
    if len(about) not in range(50, 201) or re.search(r"[$\\<>]|\.\.\.|…", about):
        yield f"the description {about!r} is not 50 to 200 plain characters"
    address = address_of_the_site()
    card = head.get("og:image", "")
    if not (card.startswith(address) and (SITE / card.removeprefix(address)).is_file()):
        yield f"the picture {card!r} is not in the site"
    same = {head.get("og:url"), head.get("canonical"), address + visit.page}
    if len(same) > 1:
        yield f"its own address is {sorted(map(str, same))}"
    if (head.get("og:description"), not head.get("og:title")) != (about, False):
        yield "the preview has no title or another description"


def equations(visit: Visit) -> Problems:
    source = ROOT / Path(visit.page).with_suffix(".ipynb")
    if source.exists():
        numbers = re.findall(r"\\tag\{(\d+)\}", markdown(source))
        anchors = {f"equation-{number}" for number in numbers}
        if missing := anchors - set(visit.facts["ids"]):
            yield f"no anchor {sorted(missing)}"
        if anchors and not visit.facts["equations"]:
            yield "no reference to an equation is a link"


CHECKS: list[Callable[[Visit], Problems]] = [
    foreign_requests,
    missing_files,
    script_errors,
    overflow,
    raw_tex,
    faulty_tex,
    cut_formulas,
    bad_images,
    weight,
    colab_button,
    accessibility,
    printing,
    description,
    equations,
]


def address_of_the_site() -> str:
    """Where GitHub Pages shows the repository that _config.yml names."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    owner, name = config["repository"]["url"].split("/")[-2:]
    folder = "" if name == f"{owner}.github.io" else f"{name}/"
    return f"https://{owner}.github.io/{folder}"


def markdown(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def alike(visits: list[Visit]) -> Problems:
    """Pages that search engines could not tell apart."""
    for what in ("title", "description"):
        texts = [(dict(v.facts["head"]) | v.facts).get(what, "") for v in visits]
        for text in {text for text in texts if texts.count(text) > 1}:
            yield f"more than one page has the {what} {text!r}"


def unlisted(pages: list[str], sitemap: str) -> Problems:
    listed = re.findall("<loc>(.*?)</loc>", sitemap)
    wanted = [address_of_the_site() + page for page in pages if page != "search.html"]
    for url in sorted({*listed, *wanted}):
        if listed.count(url) != (url in wanted):
            yield f"{url} stands in the sitemap {listed.count(url)} times"


def broken_links(visits: list[Visit], folder: Path) -> Problems:
    ids = {visit.page: set(visit.facts["ids"]) for visit in visits}
    for visit in visits:
        for link in visit.facts["links"]:
            if not link.startswith(visit.site):
                continue
            url, anchor = urldefrag(link)
            target = unquote(url.removeprefix(visit.site).split("?")[0])
            if not (folder / target).is_file():
                yield f"{visit.page} links to {target}, which does not exist"
            elif anchor and unquote(anchor) not in ids.get(target, ()):
                yield f"{visit.page} links to {target}#{anchor}: no such place"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends text compressed, as the usual hosts of such a site do."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.suffix not in {".html", ".css", ".js", ".svg"} or not path.is_file():
            super().do_GET()
            return
        body = gzip.compress(path.read_bytes())
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Stay silent."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def print_preview(tab: Page) -> list[str]:
    """Read off how a fresh page would print; it is of no further use."""
    tab.reload(wait_until="networkidle")
    tab.set_viewport_size(A4)
    tab.emulate_media(media="print")
    tab.wait_for_timeout(300)  # until the page has noticed
    problems: list[str] = tab.evaluate(PRINT)
    return problems


def violations(tab: Page, scheme: str) -> Problems:
    """What axe-core finds; the page is of no further use."""
    tab.evaluate(THIN)
    # with preload it would fetch every style sheet again
    options: dict[str, Any] = {"resultTypes": ["violations"], "preload": False}
    if scheme == "dark":  # which differs from light in its colours alone
        rules = ["color-contrast", "link-in-text-block"]
        options["runOnly"] = {"type": "rule", "values": rules}
    for violation in Axe().run(tab, options=options).response["violations"]:
        for node in violation["nodes"]:
            yield f"{violation['help']}: {node['target']} {node['html'][:80]}"


def visit_page(
    browser: Browser, site: str, page: str, width: int = 1280, scheme: Any = "dark"
) -> Visit:
    """Open one page with an empty cache and nothing of the web within reach."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    tab = context.new_page()
    missing: list[str] = []
    errors: list[str] = []
    requests: list[Request] = []
    context.route(lambda url: not url.startswith(site), lambda route: route.abort())
    tab.on("request", lambda request: requests.append(request))
    tab.on("response", lambda r: r.status >= 400 and missing.append(r.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda m: m.type == "error" and errors.append(m.text))
    tab.goto(site + page, wait_until="networkidle")
    facts = tab.evaluate(FACTS) | {"axe": [*violations(tab, scheme)], "print": []}
    sizes = [(r.url, r.sizes()["responseBodySize"]) for r in requests if r.response()]
    aborted = [(r.url, 0) for r in requests if not r.response()]
    if (width, scheme) == (1280, "dark"):
        facts["print"] = print_preview(tab)
    context.close()
    look = f"{width} px, {scheme}"
    return Visit(page, look, site, sizes + aborted, missing, errors, facts)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = (os.environ.get("CHROMIUM"), *BROWSERS)
    path = next((p for p in map(shutil.which, filter(None, names)) if p), None)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NO_BROWSER)
    options = ["--disable-gpu", "--disable-background-networking", "--no-proxy-server"]
    with sync_playwright() as playwright:
        # Playwright adds --no-sandbox; the pages are our own
        chromium = playwright.chromium.launch(executable_path=path, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def visits(browser: Browser) -> list[Visit]:
    pages = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    # index.html only leads on; _static holds what the theme forgot there
    pages = [p for p in pages if p != "index.html" and not p.startswith("_static/")]
    assert pages, "there is no site to check: run `make book` first"
    with served(SITE) as site:
        return [visit_page(browser, site, p, *look) for p in pages for look in LOOKS]


@pytest.mark.parametrize("check", CHECKS)
def test_every_page(visits: list[Visit], check: Callable[[Visit], Problems]) -> None:
    found = [f"{v.page} ({v.look}): {problem}" for v in visits for problem in check(v)]
    assert not found, "\n".join(found)


def test_every_internal_link(visits: list[Visit]) -> None:
    found = sorted(set(broken_links(visits, SITE)))
    assert not found, "\n".join(found)


def test_search_engines_can_tell_pages_apart(visits: list[Visit]) -> None:
    found = [*alike([v for v in visits if v.look == visits[0].look])]
    assert not found, "\n".join(found)


def test_sitemap_lists_every_page(visits: list[Visit]) -> None:
    sitemap = (SITE / "sitemap.xml").read_text()
    found = [*unlisted(sorted({visit.page for visit in visits}), sitemap)]
    assert not found, "\n".join(found)


def test_some_maths_was_seen() -> None:
    assert any('class="math' in p.read_text() for p in SITE.rglob("*.html"))


def test_front_page_leads_to_the_book(browser: Browser) -> None:
    with served(SITE) as site:
        tab = browser.new_page()
        tab.goto(site)
        tab.wait_for_url("**/chapters/index.html")
        assert tab.locator("article h1").inner_text()
        tab.close()


@pytest.mark.parametrize(
    ("words", "page", "place"),
    [
        ("overflow", "chapters/introduction.html", "overflow"),
        ("anderson", "chapters/api.html", "anderson"),
        ("cobweb", "chapters/notation.html", "cobweb"),
    ],
)
def test_search_leads_a_typing_reader_to_the_word(
    browser: Browser, words: str, page: str, place: str
) -> None:
    with served(SITE) as site:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(f"{site}chapters/index.html", wait_until="networkidle")
        tab.keyboard.press("Control+k")
        tab.locator("input[type=search]:focus").wait_for()
        tab.keyboard.type(words)
        tab.keyboard.press("Enter")
        tab.wait_for_url("**/search.html?q=*")
        found = tab.locator(f"#search-results li a[href*='{page}']").first
        found.wait_for()
        tab.locator("#search-results li p").first.wait_for()
        assert "\\(" not in tab.locator("#search-results").inner_text()
        found.focus()
        tab.keyboard.press("Enter")
        tab.wait_for_url(f"**/{page}*")
        assert place in tab.locator("article").inner_text().lower()
        tab.close()


def focus_stops(tab: Page, presses: int) -> list[tuple[str, bool]]:
    """Press the tab key; give the label of each stop, and whether it shows."""
    stops = []
    for _ in range(presses):
        tab.keyboard.press("Tab")
        stops.append(tab.evaluate(FOCUS))
    return [(label, shown) for label, shown in stops]


FOCUS = r"""() => {
  const { activeElement: stop } = document;
  const { outlineStyle, outlineWidth, boxShadow } = getComputedStyle(stop);
  const label = (stop.getAttribute("aria-label") ?? stop.title) || stop.innerText;
  return [stop.tagName + " " + label.trim(),
    outlineStyle !== "none" && parseFloat(outlineWidth) > 0 || boxShadow !== "none"];
}"""


def test_buttons_of_a_notebook_are_within_reach_of_the_keyboard(
    browser: Browser,
) -> None:
    with served(SITE) as site:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(f"{site}chapters/introduction.html", wait_until="networkidle")
        stops = focus_stops(tab, 40)
        assert not [label for label, shown in stops if not shown]
        labels = [label for label, _ in stops]
        assert labels[0].endswith("Skip to main content")
        # its title, "Launch on Colab", or its text once the theme has made tooltips
        assert [label for label in labels if label.endswith("Colab")]
        # formulas stand in the text: no stop for a keyboard
        assert not [label for label in labels if label.startswith("SPAN")]
        tab.locator("summary").first.focus()
        for is_open in (True, False):
            tab.keyboard.press("Enter")
            assert tab.locator("details").first.evaluate("d => d.open") == is_open
        tab.locator("button[aria-label='Download this page']").focus()
        tab.keyboard.press("Enter")
        tab.locator(".btn-download-source-button").wait_for()
        tab.keyboard.press("ArrowDown")
        with tab.expect_download() as download:
            tab.keyboard.press("Enter")
        assert json.loads(download.value.path().read_text())["nbformat"] == 4
        tab.close()


MATHJAX = '<script src="_mathjax/tex-mml-chtml.js"></script>'
FAULTS = {
    foreign_requests: '<script src="https://example.org/a.js"></script>',
    missing_files: '<link rel="stylesheet" href="gone.css">',
    script_errors: "<script>const a = 1;</script><script>const a = 2;</script>",
    overflow: '<p style="width: 2000px">wide</p>',
    raw_tex: r'<p>Let <span class="math">\(z\)</span> be $z^2$.</p>',
    faulty_tex: MATHJAX + r"<p>\(\frac{1}\), \(\nosuchmacro\)</p>",
    cut_formulas: MATHJAX
    + "<div class='math' style='display: flex; justify-content: center; width: 1em;"
    " overflow: auto'>\\(a + b + c + d\\)</div>",
    bad_images: '<img src="a.png" alt="a.png"><img src="gone.png" alt="A picture">',
    weight: "<script>fetch('big.bin').then((answer) => answer.blob())</script>",
    accessibility: "<p style='color: silver'>pale</p><table><tr><th></th></tr></table>",
    printing: "<details>more</details>",
}


@pytest.mark.parametrize("check", FAULTS)
def test_check_fails_on_its_fault(
    browser: Browser, tmp_path: Path, check: Callable[[Visit], Problems]
) -> None:
    (tmp_path / "_mathjax").symlink_to(ROOT / "_vendor" / "mathjax")
    (tmp_path / "big.bin").write_bytes(bytes(MAX_BYTES))
    head = "<title>A page</title><link rel='icon' href='data:,'>"
    start = f"<!DOCTYPE html><html lang='en'>{head}<main><h1>A page</h1>"
    (tmp_path / "good.html").write_text(f"{start}{MATHJAX}<p class='math'>\\(z\\)</p>")
    (tmp_path / "bad.html").write_text(start + FAULTS[check])
    with served(tmp_path) as site:
        assert not [*check(visit_page(browser, site, "good.html"))]
        assert [*check(visit_page(browser, site, "bad.html"))]


def test_printing_fails_on_each_of_its_faults(browser: Browser, tmp_path: Path) -> None:
    faults = {
        "shows": "<nav>pages</nav>",
        "cuts off": f"<pre style='overflow: auto'>{'x' * 999}</pre>",
        "folds": "<details>more</details>",
        "is rgb(255": "<style>body { background: black; color: white }</style>",
    }
    for problem, fault in faults.items():
        (tmp_path / "a.html").write_text(f"<!DOCTYPE html><title>A page</title>{fault}")
        with served(tmp_path) as site:
            (found,) = printing(visit_page(browser, site, "a.html"))
        assert found.startswith(problem)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Visit:
    """A page without fault in a book of its own."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "SITE", tmp_path)
    repository = "repository:\n  url: https://github.com/OWNER/REPO\n"
    (tmp_path / "_config.yml").write_text(repository)
    (tmp_path / "card.png").touch()
    cells = [{"cell_type": "markdown", "source": [r"$$ z = 1 \tag{1} $$"]}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    url, about = "https://OWNER.github.io/REPO/", "A page about something. " * 3
    head = {"description": about, "og:description": about, "og:title": "A page"}
    head |= {"og:url": f"{url}a.html", "canonical": f"{url}a.html"}
    head |= {"og:image": f"{url}card.png"}
    facts = {"title": "A page", "head": [*head.items()], "ids": ["equation-1"]}
    return Visit("a.html", "", "", [], [], [], facts | {"equations": ["equation-1"]})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("description", "Too short."),
        ("description", "It says that $z$ is a solution of the equation above it."),
        ("og:description", "Something else than what the page says of itself above."),
        ("og:image", "https://OWNER.github.io/REPO/gone.png"),
        ("og:url", "https://OWNER.github.io/a.html"),
        ("canonical", "https://OWNER.github.io/REPO/b.html"),
        ("og:title", ""),
    ],
)
def test_description_fails_on_a_fault(
    described: Visit, name: str, content: str
) -> None:
    assert not [*description(described)]
    described.facts["head"].append((name, content))
    assert [*description(described)]


def test_equations_fail_without_anchor_or_link(described: Visit) -> None:
    assert not [*equations(described)]
    described.facts |= {"ids": [], "equations": []}
    assert len([*equations(described)]) == 2


def test_pages_that_look_the_same_are_found(described: Visit) -> None:
    assert not [*alike([described])]
    assert len([*alike([described, described])]) == 2


def test_sitemap_fails_on_its_faults(described: Visit) -> None:
    listed = "".join(
        f"<loc>https://OWNER.github.io/REPO/{page}.html</loc>" for page in "aab"
    )
    assert len([*unlisted(["a.html", "c.html", "search.html"], listed)]) == 3
    assert not [*unlisted(["b.html"], listed[-48:])]


def test_links_fail_on_their_faults(browser: Browser, tmp_path: Path) -> None:
    start = "<!DOCTYPE html><title>A page</title><p id='here'>"
    links = ("a.html#here", "#gone", "gone.html", "a.html", "https://example.org/")
    anchors = "".join(f"<a href='{link}'>link</a>" for link in links)
    (tmp_path / "a.html").write_text(start + anchors)
    with served(tmp_path) as site:
        visit = visit_page(browser, site, "a.html")
    assert [*broken_links([visit], tmp_path)] == [
        "a.html links to a.html#gone: no such place",
        "a.html links to gone.html, which does not exist",
    ]


def test_colab_button_fails_without_its_link(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    repository = "repository:\n  url: https://github.com/OWNER/REPO\n  branch: main\n"
    (tmp_path / "_config.yml").write_text(repository)
    (tmp_path / "a.ipynb").touch()
    blob = "OWNER/REPO/blob/main/a.ipynb"
    links = [f"https://colab.research.google.com/github/{blob}"]
    visit = Visit("a.html", "", "", [], [], [], {"links": links})
    assert not [*colab_button(visit)]
    visit.facts["links"] = []
    assert [*colab_button(visit)] == [f"no link to {links[0]}"]
