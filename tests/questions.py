"""The questions of a notebook, read from its Markdown."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# a paragraph, a list of options or none, and the fold with the answers
QUESTION = re.compile(
    r"^\*\*Question\.\*\* (?P<text>(?:.+\n)+)\n"
    r"(?P<options>(?:- (?:.+\n)+)+\n)?"
    r"<details>\n<summary>Answers</summary>\n\n"
    r"(?P<answers>(?:- (?:.+\n)+)+)\n</details>$",
    re.MULTILINE,
)
BEGIN = re.compile(r"^\*\*Question\.?\*\*|^<summary>Answers</summary>", re.MULTILINE)
DECIMAL = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
KEY = rf"(?:(?P<low>{DECIMAL})(?: to (?P<high>{DECIMAL}))?: |(?P<other>Else: ))?"
ANSWER = re.compile(
    rf"\*(?P<key>{KEY}(?P<verdict>[Yy]es|[Nn]o)\.)\* (?P<why>.+)", re.DOTALL
)
MIN_QUESTIONS, MIN_OPTIONS, MIN_WHY = 3, 3, 20


@dataclass
class Answer:
    """One answer: to an option, to the numbers from low to high, or to all others."""

    key: str
    right: bool
    why: str
    low: float | None = None
    high: float | None = None
    other: bool = False

    def holds(self, value: float) -> bool:
        if self.low is None or self.high is None:
            return self.other
        return self.low <= value <= self.high


@dataclass
class Question:
    """One question; without options it asks for a number."""

    text: str
    options: list[str]
    answers: list[Answer]

    def answer_to(self, value: float) -> Answer:
        return next(answer for answer in self.answers if answer.holds(value))


def items(block: str | None) -> list[str]:
    return [item.strip() for item in re.split(r"^- ", block or "", flags=re.M)[1:]]


def read_answer(item: str) -> Answer:
    match = ANSWER.fullmatch(item)
    if match is None:
        raise ValueError(f"an answer is {item[:40]!r}, expected '*No.* Because ...'")
    low = high = None
    if match["low"]:
        low, high = float(match["low"]), float(match["high"] or match["low"])
    right = match["verdict"].lower() == "yes"
    return Answer(match["key"], right, match["why"], low, high, bool(match["other"]))


def read_questions(notebook: Any) -> list[Question]:
    """Return the questions of a notebook in their order."""
    found = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            matches = [*QUESTION.finditer(text)]
            if 2 * len(matches) != len(BEGIN.findall(text)):
                raise ValueError(f"not in the form of a question: {text!r}")
            for match in matches:
                answers = [*map(read_answer, items(match["answers"]))]
                question = Question(match["text"], items(match["options"]), answers)
                found.append(question)
    return found


def choice_problems(question: Question) -> Iterator[str]:
    """Say what is wrong with a question that has options."""
    if len(question.options) < MIN_OPTIONS:
        yield f"{len(question.options)} options, expected {MIN_OPTIONS} or more"
    if len(question.answers) != len(question.options):
        yield f"{len(question.options)} options, {len(question.answers)} answers"
    if any(answer.low is not None or answer.other for answer in question.answers):
        yield "an answer to an option begins with a number or Else"


def number_problems(question: Question) -> Iterator[str]:
    """Say what is wrong with a question that asks for a number."""
    *ranges, last = question.answers
    if not last.other or last.right:
        yield "the last answer is not '*Else: no.*'"
    if not ranges or any(answer.low is None for answer in ranges):
        yield "an answer but the last has no number to go with"
        return
    bounds = sorted((answer.low, answer.high) for answer in ranges)
    if any(low > high for low, high in bounds):
        yield "a range ends below its start"
    if any(after <= before for (_, before), (after, _) in pairwise(bounds)):
        yield "two ranges share a number"


def problems(question: Question) -> Iterator[str]:
    """Say what is wrong with a question; nothing if it keeps every rule."""
    right = sum(answer.right for answer in question.answers)
    if right != 1:
        yield f"{right} answers are right, expected one"
    for answer in question.answers:
        if len(answer.why) < MIN_WHY:
            yield f"{answer.why!r} explains too little"
    yield from (choice_problems if question.options else number_problems)(question)
