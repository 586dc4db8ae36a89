"""The questions of the built site, answered in a real browser, right and wrong.

    python -m pytest tests/site_questions.py

What the page says to each answer is compared with the notebook that asks.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page
from questions import Answer, Question, read_questions
from site_check import ROOT, SITE, browser, served
from test_notebooks import NOTEBOOKS, read

__all__ = ["browser"]

SCRIPT = (ROOT / "_ext" / "questions.js").read_text(encoding="utf-8")
MATHJAX = re.compile(r'<script defer="defer" src="[^"]*tex-mml-chtml[^>]*></script>')
# the answers that the forms show at the moment, one list a form, without formulas
SAID = """forms => forms.map((form) => [...form.querySelectorAll("[role=status] li")]
  .filter((item) => item.checkVisibility())
  .map((item) => {
    const walk = document.createTreeWalker(item, NodeFilter.SHOW_TEXT);
    let text = "";
    while (walk.nextNode()) {
      const parent = walk.currentNode.parentElement;
      if (parent.checkVisibility() && !parent.closest(".math"))
        text += walk.currentNode.data;
    }
    return text;
  }))"""
# formulas in the forms, and how many of them are typeset, each once
FORMULAS = """async () => {
  await MathJax.startup.promise;
  const all = [...document.querySelectorAll("form.question .math")];
  const set = all.filter((box) => box.querySelectorAll("mjx-container").length === 1);
  return [all.length, set.length];
}"""
RESET = """forms => forms.forEach((form) => {
  form.reset();
  form.dispatchEvent(new Event("input"));
})"""
Asked = tuple[Page, list[Question]]


def plain(text: str) -> str:
    """Return text as letters alone: no formulas, no markup, one kind of quotes."""
    text = re.sub(r"\$[^$]+\$|[*`]", "", text)
    text = re.sub("[\u2018\u2019]", "'", re.sub("[\u201c\u201d]", '"', text))
    return " ".join(text.split())


def reply(answer: Answer) -> str:
    return plain(f"{'✓ Right.' if answer.right else '✗ Wrong.'} {answer.why}")


def said(tab: Page) -> list[list[str]]:
    found = tab.locator("form.question").evaluate_all(SAID)
    return [[plain(text) for text in texts] for texts in found]


def hint(form: Locator) -> str:
    return form.get_by_role("status").locator(".hint").inner_text()


def choose(form: Locator, i: int, keyboard: bool) -> None:
    """Choose an option and check it, with the mouse or without."""
    if not keyboard:
        form.locator(".options label").nth(i).click()
        form.get_by_role("button", name="Check").click()
        return
    form.get_by_role("radio").first.focus()
    for key in ("Space", *["ArrowDown"] * i, "Enter"):
        form.page.keyboard.press(key)


def enter(form: Locator, text: str, keyboard: bool) -> None:
    field = form.get_by_role("textbox", name="Your number")
    field.fill(text)
    if keyboard:
        field.press("Enter")
    else:
        form.get_by_role("button", name="Check").click()


def numbers(question: Question) -> Iterator[float]:
    """Yield the bounds of each range and what lies beyond."""
    for answer in question.answers:
        if answer.low is not None and answer.high is not None:
            low, high = answer.low, answer.high
            step = (high - low) / 100 or abs(high) * 1e-6 or 1e-9
            yield from (low, high, low - step, high + step)
    yield from (-98765.0, 98765.0)


def spellings(value: float) -> Iterator[str]:
    """Yield a number as people type it."""
    decimal = f"{value:.10f}"
    yield from (repr(value), f" {value!r} ", decimal, f"{value:.12e}", f"{value:.12E}")
    yield from (decimal.replace(".", ","), decimal.replace("-", "\u2212"))
    yield decimal if value < 0 else f"+{decimal}"
    yield f"{value * 8!r}/8"


def page_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix(".html").as_posix()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with served(SITE) as address:
        yield address


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def opened(
    request: pytest.FixtureRequest, browser: Browser, site: str
) -> Iterator[Asked]:
    """A page, and the questions of its notebook."""
    tab = browser.new_page()
    tab.goto(site + page_of(request.param))
    tab.evaluate("MathJax.startup.promise")
    yield tab, read_questions(read(request.param))
    tab.close()


@pytest.fixture
def asked(opened: Asked) -> Asked:
    """The same, with no question answered yet."""
    tab, _ = opened
    tab.emulate_media(media="screen")
    tab.set_viewport_size({"width": 1280, "height": 800})
    tab.locator("form.question").evaluate_all(RESET)
    return opened


def test_each_question_is_a_form(asked: Asked) -> None:
    tab, questions = asked
    forms = tab.locator("form.question")
    assert forms.count() == len(questions) > 0
    for form, question in zip(forms.all(), questions, strict=True):
        assert form.get_by_role("radio").count() == len(question.options)
        assert form.get_by_role("textbox").count() == (not question.options)
    assert said(tab) == [[] for _ in questions]
    assert tab.locator("article summary", has_text="Answers").count() == 0


@pytest.mark.parametrize("keyboard", [False, True], ids=["mouse", "keyboard"])
def test_each_option_is_answered(asked: Asked, keyboard: bool) -> None:
    tab, questions = asked
    for n, question in enumerate(questions):
        for i in range(len(question.options)):
            choose(tab.locator("form.question").nth(n), i, keyboard)
            assert said(tab)[n] == [reply(question.answers[i])]


def test_each_number_is_answered(asked: Asked) -> None:
    tab, questions = asked
    for n, question in enumerate(questions):
        met = set()
        for i, value in enumerate([] if question.options else numbers(question)):
            form = tab.locator("form.question").nth(n)
            enter(form, repr(value), keyboard=i % 3 > 0)
            answer = question.answer_to(value)
            assert said(tab)[n] == [reply(answer)], f"{value!r} in {question.text}"
            met.add(answer.why)
        assert question.options or len(met) == len(question.answers)


def test_a_number_may_be_typed_in_many_ways(asked: Asked) -> None:
    tab, questions = asked
    n = next(n for n, question in enumerate(questions) if not question.options)
    form, question = tab.locator("form.question").nth(n), questions[n]
    for answer in question.answers[:-1]:
        value = (answer.low + answer.high) / 2
        if not answer.right and value > 0:
            continue  # the same once more
        for text in spellings(value):
            enter(form, text, keyboard=True)
            assert said(tab)[n] == [reply(answer)], text


RUBBISH = ("abc", "", " ", "1e", "e5", "--3", "4 3", "0x10", "Infinity", "1.2.3", "1/0")
AMBIGUOUS = ("1,234", "-12,345")


def test_what_is_no_number_gets_a_hint(asked: Asked) -> None:
    tab, questions = asked
    texts = [*RUBBISH, *AMBIGUOUS]
    for n, question in enumerate(questions):
        if question.options:
            continue
        form = tab.locator("form.question").nth(n)
        field = form.get_by_role("textbox")
        while texts:
            enter(form, text := texts.pop(), keyboard=len(texts) % 3 > 0)
            assert len(hint(form)) > 10 and said(tab)[n] == [], text
            assert field.evaluate("field => field === document.activeElement")
            assert field.get_attribute("aria-invalid") == "true"
        enter(form, "0,1234", keyboard=False)
        assert hint(form) == "" and len(said(tab)[n]) == 1
        assert field.get_attribute("aria-invalid") == "false"
        texts = ["abc", ""]


def test_no_choice_gets_a_hint(asked: Asked) -> None:
    tab, questions = asked
    for n, question in enumerate(questions):
        if question.options:
            form = tab.locator("form.question").nth(n)
            form.get_by_role("button", name="Check").click()
            assert len(hint(form)) > 10 and said(tab)[n] == []
            choose(form, 0, keyboard=False)
            assert hint(form) == ""


def test_a_new_try_takes_the_old_answer_away(asked: Asked) -> None:
    tab, questions = asked
    for n, question in enumerate(questions):
        form = tab.locator("form.question").nth(n)
        if question.options:
            choose(form, 0, keyboard=False)
            form.locator("label").nth(1).click()
        else:
            enter(form, "98765", keyboard=True)
            form.get_by_role("textbox").press("1")
        assert said(tab)[n] == []


def test_questions_do_not_disturb_each_other(asked: Asked) -> None:
    tab, questions = asked
    expected: list[list[str]] = [[] for _ in questions]
    for n, question in enumerate(questions):
        form = tab.locator("form.question").nth(n)
        if question.options:
            choose(form, n % 3, keyboard=False)
            expected[n] = [reply(question.answers[n % 3])]
        else:
            enter(form, "98765", keyboard=False)
            expected[n] = [reply(question.answer_to(98765))]
        assert said(tab) == expected
    for n, question in enumerate(questions):
        form = tab.locator("form.question").nth(n)
        assert form.locator("input:checked").count() == bool(question.options)


def test_paper_shows_question_and_answers(asked: Asked) -> None:
    tab, questions = asked
    tab.emulate_media(media="print")
    forms = tab.locator("form.question")
    answers = [question.answers for question in questions]
    assert said(tab) == [[plain(f"{a.key} {a.why}") for a in some] for some in answers]
    for shown in ("legend", ".options label", ".key"):
        there = forms.locator(shown)
        assert there.count() == there.locator("visible=true").count() > 0, shown
    gone = forms.locator("input, button, .number, .hint, .verdict")
    assert gone.count() > 0 == gone.locator("visible=true").count()


def test_everything_fits_a_phone(asked: Asked) -> None:
    tab, _ = asked
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.evaluate("document.querySelectorAll('form li').forEach(i => i.hidden = false)")
    boxes = "form.question, form.question *:not(.math):not(.math *)"
    wide = tab.locator(boxes).evaluate_all(
        "all => all.filter((box) => box.getBoundingClientRect().right > 390)"
        ".map((box) => box.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_without_script_the_text_stays(browser: Browser, site: str, path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(site + page_of(path))
    folds = tab.locator("article details", has=tab.get_by_text("Answers", exact=True))
    questions = read_questions(read(path))
    assert folds.count() == len(questions)
    for fold, question in zip(folds.all(), questions, strict=True):
        assert fold.locator("summary").is_visible()
        assert fold.locator("ul > li").count() == len(question.answers)
    assert tab.locator("form.question").count() == 0
    context.close()


@pytest.mark.parametrize("mathjax_first", [True, False])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_formulas_are_typeset_whoever_comes_first(
    browser: Browser, site: str, path: Path, mathjax_first: bool
) -> None:
    address, tab = site + page_of(path), browser.new_page()
    page = (SITE / page_of(path)).read_text(encoding="utf-8")
    late = SCRIPT if mathjax_first else MATHJAX.search(page)[0]
    assert page.count(late) == 1
    body = page.replace(late, "")
    tab.route(address, lambda route: route.fulfill(body=body, content_type="text/html"))
    tab.goto(address)
    if mathjax_first:
        tab.evaluate("MathJax.startup.promise")
        tab.add_script_tag(content=SCRIPT)
    else:
        choose(tab.locator("form:has(.options)").first, 1, keyboard=False)
        tab.add_script_tag(url=f"{site}_mathjax/tex-mml-chtml.js")
    parts = [
        text
        for question in read_questions(read(path))
        for text in (
            question.text,
            *question.options,
            *(a.why for a in question.answers),
        )
    ]
    expected = sum(text.count("$") for text in parts) // 2
    assert tab.evaluate(FORMULAS) == [expected, expected] != [0, 0]
    tab.close()
