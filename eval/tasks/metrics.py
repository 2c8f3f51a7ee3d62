"""Whether a written answer is right: exact, as a number, as mathematics, by expression, by parts.

lm-eval's `exact_match` compares as the answer stands, white space and all; here what does not
change an answer does not change its score. The tests have a table of what counts and what does not.
"""

import re
import unicodedata
from fractions import Fraction

from ...configs.errors import UserError

_SIGN = r"(?<![\w.)\]])-\s?|(?<=\s)-(?=\d)|"
_PLAIN = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d])|\d+(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})[$€£¥]?(?P<a>{_PLAIN})"
    r"(?:\s*(?:\*|×|x)\s*10\s*\^\s*\{?(?P<power>-?\d+)\}?|[eE](?P<exponent>[+-]?\d+)(?!\w|\.\d))?"
    rf"(?:\s(?P<whole>\d+)/(?P<below>\d+)|\s?/\s?(?P<b>{_PLAIN}))?(?P<percent>\s?%)?"
)
# Where an answer is announced; what comes after the last of these counts.
_MARKS = (
    re.compile(r"####"),
    re.compile(r"\b(?:answer|result)\b\W*(?:is|:|=|would be|equals)\W*", re.IGNORECASE),
)
_CLOSE = Fraction(1, 10**6)  # relative, where decimals were rounded


def exact(answer: str, target: str) -> float:
    """Whether both are the same text, but for case, surrounding marks and white space."""
    return float(_folded(answer) == _folded(target))


def _folded(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,;:!?\"'`*()[]") or text


def number(answer: str, target: str) -> float:
    """Whether the number that an answer comes to is that of the target.

    That is the number in its last \\boxed{}, else the first one after its last "####" or "answer
    is", else the last one. Thousands separators, units, currencies, fractions, LaTeX and percent
    signs do not change a number; 50% is 50 and 0.5.
    """
    wanted = _numbers(target)
    found = _result(answer)
    if found is None or not wanted:
        return 0.0
    (value, percent), (right, right_percent) = found, wanted[-1]
    if percent and not right_percent and _near(value / 100, right):
        return 1.0
    if right_percent and not percent and _near(value, right / 100):
        return 1.0
    return float(_near(value, right))


def _near(a: Fraction, b: Fraction) -> bool:
    return a == b or abs(a - b) <= _CLOSE * abs(b)


def _result(text: str) -> tuple[Fraction, bool] | None:
    """The number that a text comes to, and whether it is a percentage."""
    boxes = _boxes(text)
    if boxes:
        found = _numbers(boxes[-1])
        return found[-1] if found else None
    for mark in _MARKS:
        places = [m.end() for m in mark.finditer(text)]
        if places and (found := _numbers(text[places[-1] :])):
            return found[0]
    found = _numbers(text)
    return found[-1] if found else None


def _boxes(text: str) -> list[str]:
    """What stands in each \\boxed{...}, braces matched."""
    found = []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth, at = 1, match.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        found.append(text[match.end() : at - (depth == 0)])
    return found


def _numbers(text: str) -> list[tuple[Fraction, bool]]:
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    text = re.sub(r"[\u2212\u2012\u2013](?=\s?[\d.$])", "-", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r" \1/\2", text)
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "").replace("\\$", "$")
    text = text.replace("\\%", "%").replace("\\times", "×").replace("\\cdot", "×")
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f_ ](?=\d{3}(?!\d))", "", text)
    found = []
    for match in _NUMBER.finditer(text):
        value = _fraction(match["a"])
        power = match["power"] or match["exponent"]
        if power and abs(int(power)) <= 400:
            value *= Fraction(10) ** int(power)
        if match["below"] and int(match["below"]):
            value += Fraction(int(match["whole"]), int(match["below"]))
        elif match["b"] and _fraction(match["b"]):
            value /= _fraction(match["b"])
        found.append((-value if match["sign"] else value, bool(match["percent"])))
    return found


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def regex(answer: str, target: str) -> float:
    """Whether the target, a regular expression, is somewhere in the answer.

    Raises:
      UserError: it is not an expression.
    """
    try:
        return float(re.search(target, answer) is not None)
    except re.error as error:
        raise UserError(f"target={target!r} is not a regular expression: {error}") from None


def contains(answer: str, target: str) -> float:
    """The share of the target's lines that stand in the answer, as whole words in any case."""
    parts = [part.strip() for part in target.splitlines() if part.strip()]
    text = " ".join(answer.casefold().split())
    found = [
        re.search(rf"(?<!\w){re.escape(' '.join(part.casefold().split()))}(?!\w)", text)
        for part in parts
    ]
    return sum(match is not None for match in found) / len(parts)


def mathematics(answer: str, target: str) -> float:
    """Whether both are the same mathematics, as `math-verify` finds it.

    Raises:
      UserError: the package is not installed.
    """
    parse, verify = math_verify()
    # A bare expression is read as LaTeX only within dollars.
    wanted = parse(target) or parse(f"${target}$")
    if "\\" in target and "$" not in target and "boxed" not in target:
        wanted = parse(f"${target}$") or wanted
    found = parse(answer)
    if not found and "\\" in answer:
        found = parse(f"${answer}$")
    return float(bool(wanted and found and verify(wanted, found)))


def math_verify():
    """`parse` and `verify` of the package, asked for before a model is loaded."""
    try:
        import math_verify as package
    except ImportError:
        raise UserError(
            "metric = \"math\" needs the package math-verify: pip install 'puna[tasks]'"
        ) from None
    return package.parse, package.verify


def filtered(pattern: str, answer: str) -> str:
    """The first group of the last match of an expression, or all of it; "" where it has none."""
    matches = list(re.finditer(pattern, answer, re.MULTILINE)) if pattern else []
    if not pattern:
        return answer
    if not matches:
        return ""
    return (matches[-1].group(1) if matches[-1].re.groups else matches[-1].group()) or ""
