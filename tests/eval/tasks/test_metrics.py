"""Each metric against a table of right and wrong answers."""

import sys

import pytest

from puna.configs.errors import UserError
from puna.eval.tasks import metrics

EXACT = [
    ("Paris", " paris.\n", 1), ("Paris", "**Paris**", 1), ("Paris", "Paris is nice", 0),
    ("New York", "new  york", 1), ("New York", "York", 0), ("B", "(B)", 1), ("B", "8", 0),
    ("café", "cafe\u0301", 1), ("3", "3.0", 0), ("...", "...", 1), ("...", "!", 0), ("no", "", 0),
]  # fmt: skip
NUMBER = [
    # What a number is written like.
    ("1234", "1,234", 1), ("1234", "1 234", 1), ("1234", "1\u202f234", 1), ("1234", "$1,234.00", 1),
    ("1234567", "1{,}234{,}567", 1), ("1,234", "1234", 1), ("1234", "1,2345", 0),
    ("0.75", "3/4", 1), ("0.75", r"\frac{3}{4}", 1), ("0.75", r"$\dfrac{3}{4}$", 1),
    ("3/4", "0.75", 1), ("3/4", "3", 0), ("3/4", "4/3", 0), ("1.5", "1 1/2", 1), ("0.5", ".5", 1),
    ("0.5", "½", 1), ("1/3", "0.3333333", 1), ("1/3", "0.33", 0), ("-5", "−5", 1), ("-5", "5", 0),
    ("-5", "- 5", 1), ("2", "7-5 = 2", 1), ("5", "x-5", 1), ("1200", "1.2e3", 1),
    ("1200", "It is 1.2e3.", 1),
    ("1200", r"1.2 \times 10^{3}", 1), ("1200", "1.2", 0), ("50", "50%", 1), ("0.5", "50%", 1),
    ("50%", "0.5", 1), ("50", "0.5", 0), ("12", "12 km/h", 1), ("12", "12km", 1), ("3", "£3", 1),
    ("42", "42.0", 1), ("42", "42.", 1), ("42", "4.2", 0), ("42", "420", 0), ("42", "", 0),
    ("42", "forty-two", 0), ("5/0", "5", 1),
    # Which of the numbers in an answer is meant.
    ("42", "The answer is 42, which is more than 7.", 1),
    ("42", "6 * 7 = 42", 1), ("42", "We add 40 and 2.\n#### 42", 1), ("42", "#### 41", 0),
    ("42", r"So \boxed{42} apples, not 43.", 1), ("42", r"\boxed{\text{about } 42\%}", 1),
    ("42", r"\boxed{43} since 42", 0), ("42", "Answer: $42 per day, for 3 days", 1),
    ("42", "The answer is 42. Then 7 remain.", 1), ("42", "First 42, then 43.", 0),
    ("42", "The answer is 41. No, the answer is: **42**!", 1),
    ("3/4", r"the answer is $\boxed{\frac{3}{4}}$", 1),
]  # fmt: skip
MATH = [
    ("1/2", r"$\frac{1}{2}$", 1), (r"\frac{1}{2}", "The answer is 0.5.", 1), ("x+1", "$1+x$", 1),
    (r"\sqrt{8}", r"$2\sqrt{2}$", 1), (r"\sqrt{8}", r"$\sqrt{7}$", 0), ("1/2", r"$\frac{1}{3}$", 0),
    (r"\{1,2\}", r"$\{2,1\}$", 1), (r"\frac{\pi}{4}", r"So \boxed{\pi/4}.", 1), ("12", "", 0),
    ("1234", r"$1{,}234$", 1), ("12", r"$12 \text{ km}$", 1), ("12", "hence 13", 0),
]  # fmt: skip
REGEX = [(r"^(yes|no)$", "yes", 1), (r"^(yes|no)$", "yes, sir", 0), (r"\d{4}", "in 1984", 1)]
CONTAINS = [
    ("1234567", "It is 1234567.", 1), ("1234567", "91234567", 0), ("123\n456", "456 and 123", 1),
    ("123\n456", "only 456", 0.5), ("the Barn", "THE  BARN", 1), ("123", "", 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "table"),
    [(metrics.exact, EXACT), (metrics.number, NUMBER), (metrics.regex, REGEX),
     (metrics.contains, CONTAINS), (metrics.mathematics, MATH)],
    ids=["exact", "number", "regex", "contains", "mathematics"],
)  # fmt: skip
def test_right_and_wrong_answers(metric, table):
    if metric is metrics.mathematics:
        pytest.importorskip("math_verify", reason="needs the extra [tasks]")
    wrong = [row for row in table if metric(row[1], row[0]) != row[2]]
    assert not wrong


def test_a_filter_takes_the_last_match():
    assert metrics.filtered(r"Answer: ([A-D])", "Answer: A\nNo. Answer: C, I think") == "C"
    assert metrics.filtered(r"[A-D]", "x") == "" and metrics.filtered("", " x ") == " x "
    with pytest.raises(UserError, match="target='[(]' is not a regular expression"):
        metrics.regex("x", "(")


def test_mathematics_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install 'puna\[tasks\]'"):
        metrics.mathematics("1", "1")
