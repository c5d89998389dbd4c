"""Which answers are right."""

from __future__ import annotations

import pytest

from distft.config.schema import ExactJudge, NumberJudge
from distft.evaluate.judge import is_right


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("5", "5"), ("the answer is 1,234.", "1234"), ("$1,234.50 in all", "1234.5"), ("12,345,678", "12345678"),
        ("1,00,000", "100000"), ("-3", "-3"), ("x=-3", "-3"), ("\u22125", "-5"), ("+7", "7"), ("7-3", "3"), ("(5)-2", "2"),
        ("7 - 3 = 4", "4"), ("2,3", "3"), ("1,2,3", "3"), ("1e-3", "0.001"), ("2.5e3", "2500"), (".5", "0.5"), ("-.5", "-0.5"),
        ("5.", "5"), ("It is 3.14.", "3.14"), ("1,234,", "1234"), ("10%", "10"), ("first 3, then 4", "4"), ("#### 42", "42"),
        ("18.000", "18"), ("007", "7"), ("**12**", "12"), ("\\boxed{12}", "12"),
    ],
)  # fmt: skip
def test_the_last_number_counts(answer: str, number: str) -> None:
    assert is_right(NumberJudge(kind="number"), answer, number)
    assert not is_right(NumberJudge(kind="number"), answer, str(float(number) + 1))
    assert is_right(NumberJudge(kind="number"), number, answer), "a reference is read as an answer is"


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("", "5"),
        ("none", "5"),
        ("five", "5"),
        ("5", "none"),
        ("", ""),
        ("1e999", "5"),
        ("5", "1e999"),
        ("1e999", "1e999"),
        ("-5", "5"),
    ],
)
def test_what_is_no_number_is_not_right(answer: str, reference: str) -> None:
    assert not is_right(NumberJudge(kind="number"), answer, reference)


def test_tolerance_is_relative_above_one_and_absolute_below() -> None:
    judge = NumberJudge(kind="number", tolerance=0.01)
    assert is_right(judge, "1009", "1000")
    assert not is_right(judge, "1011", "1000")
    assert is_right(judge, "0.009", "0")
    assert not is_right(judge, "0.011", "0")
    assert not is_right(NumberJudge(kind="number", tolerance=0), "0.1", "0.1000001")


@pytest.mark.parametrize(
    ("judge", "answer", "reference", "right"),
    [
        (ExactJudge(), "  Paris\n", "Paris", True),
        (ExactJudge(), "paris", "Paris", False),
        (ExactJudge(), "Paris.", "Paris", False),
        (ExactJudge(ignore_case=True), "STRASSE", "straße", True),
        (ExactJudge(strip=".!"), "Paris!.", "Paris", True),
        (ExactJudge(strip='"'), '" Paris "', "Paris", True),
        (ExactJudge(strip="."), "P.aris", "Paris", False),
        (ExactJudge(), "", "", True),
        (ExactJudge(), "Paris, France", "Paris", False),
    ],
)
def test_exact(judge: ExactJudge, answer: str, reference: str, right: bool) -> None:
    assert is_right(judge, answer, reference) is right
