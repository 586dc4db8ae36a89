"""Every chapter asks questions in the agreed form, and each rule can fail."""

from pathlib import Path

import pytest
from questions import MIN_QUESTIONS, problems, read_questions
from test_notebooks import NOTEBOOKS, read

CHOICE = """\
Some text before it.

**Question.** Where does $z$ go
if nobody looks?

- to zero
- to one,
  or beyond
- nowhere

<details>
<summary>Answers</summary>

- *No.* Zero pushes it away, as said.
- *Yes.* It is drawn there,
  and stays.
- *No.* It must go somewhere, by (2).

</details>

Some text after it.
"""
NUMBER = """\
**Question.** How many steps? Give a number.

<details>
<summary>Answers</summary>

- *43 to 45: yes.* A step takes off a tenth.
- *-1e-3 to .5: no.* You took the reciprocal.
- *21: no.* You took the root of the radius.
- *Else: no.* Take logarithms of both sides.

</details>
"""


def notebook(*sources: str) -> dict:
    cells = [{"cell_type": "markdown", "source": [text]} for text in sources]
    return {"cells": [*cells, {"cell_type": "code", "source": ["**Question.**"]}]}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_asks_questions(path: Path) -> None:
    questions = read_questions(read(path))
    found = {question.text: [*problems(question)] for question in questions}
    assert found == {question.text: [] for question in questions}
    assert len(found) >= MIN_QUESTIONS, f"{len(found)} questions in {path.stem}"
    assert {bool(question.options) for question in questions} == {True, False}


def test_questions_are_read_as_they_stand() -> None:
    choice, number = read_questions(notebook("# Title", CHOICE, NUMBER))
    assert choice.text == "Where does $z$ go\nif nobody looks?\n"
    assert choice.options == ["to zero", "to one,\n  or beyond", "nowhere"]
    assert [answer.right for answer in choice.answers] == [False, True, False]
    assert choice.answers[1].why == "It is drawn there,\n  and stays."
    assert number.options == []
    bounds = [(answer.low, answer.high) for answer in number.answers]
    assert bounds == [(43, 45), (-1e-3, 0.5), (21, 21), (None, None)]
    assert [*problems(choice), *problems(number)] == []


def test_a_number_meets_its_answer() -> None:
    (number,) = read_questions(notebook(NUMBER))
    values = (43, 44.5, 45, 45.01, -1e-3, 0.5, 21, 20.99, 1e300)
    met = [number.answers.index(number.answer_to(value)) for value in values]
    assert met == [0, 0, 0, 3, 1, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("sample", "old", "new", "says"),
    [
        (CHOICE, "*No.* Zero", "*Yes.* Zero", "2 answers are right"),
        (CHOICE, "*Yes.*", "*No.*", "0 answers are right"),
        (CHOICE, "by (2).", "by (2).\n- *No.* One answer too many here.", "4 answers"),
        (CHOICE, "- nowhere\n", "", "2 options, expected 3"),
        (CHOICE, "- nowhere\n", "", "2 options, 3 answers"),
        (CHOICE, "Zero pushes it away, as said.", "It does not.", "explains too litt"),
        (CHOICE, "*No.* Zero", "*0 to 1: no.* Zero", "begins with a number"),
        (CHOICE, "*No.* Zero", "*Else: no.* Zero", "begins with a number"),
        (NUMBER, "21: no", "21: yes", "2 answers are right"),
        (NUMBER, "*21:", "*44 to 46:", "two ranges share a number"),
        (NUMBER, "*21:", "*45:", "two ranges share a number"),
        (NUMBER, "43 to 45", "45 to 43", "ends below its start"),
        (NUMBER, "*Else: no.*", "*50: no.*", "last answer is not"),
        (NUMBER, "Else: no", "Else: yes", "last answer is not"),
        (NUMBER, "*21: no.*", "*No.*", "no number to go with"),
    ],
)
def test_a_broken_rule_is_named(sample: str, old: str, new: str, says: str) -> None:
    assert old in sample
    (question,) = read_questions(notebook(sample.replace(old, new)))
    assert says in "\n".join(problems(question))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("*21: no.*", "*about 21: no.*"),
        ("*21: no.*", "*21: perhaps.*"),
        ("*21: no.*", "21: no."),
        ("*21: no.* You took the root of the radius.", "*21: no.*"),
        ("</details>", "More to read.\n\n</details>"),
        ("<summary>Answers</summary>", "<summary>Answer</summary>"),
        ("**Question.**", "**Question**"),
        ("\n<details>", "\nAnother paragraph.\n\n<details>"),
    ],
)
def test_what_is_no_question_is_not_passed_over(old: str, new: str) -> None:
    assert old in NUMBER
    with pytest.raises(ValueError, match=r"an answer is|not in the form"):
        read_questions(notebook(NUMBER.replace(old, new)))
