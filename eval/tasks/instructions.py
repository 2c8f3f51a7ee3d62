"""Instructions that a program can check: the 25 kinds of IFEval (arXiv 2311.07911).

The names, arguments and meanings are those of its data, with two differences. Where the original
splits sentences with a trained model, a sentence here ends at `.`, `!` or `?` before white space,
so counts can differ by abbreviations. Where it also guesses whether a text in capitals or in lower
case is English, which fails for short ones, any language will do here.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence

from ...configs.errors import UserError


def follows(answer: str, name: str, kwargs: Mapping) -> bool:
    """Whether an answer follows one instruction.

    Args:
      answer: text; an empty one follows none.
      name: such as "punctuation:no_comma".
      kwargs: its arguments; those that are None are as if they were not there.

    Raises:
      UserError: there is no such instruction, an argument is missing, or the language cannot be
        told without a package.
    """
    if name not in CHECKS:
        raise UserError(f"instruction {name!r} is not one of {', '.join(CHECKS)}")
    given = {key: value for key, value in kwargs.items() if value is not None}
    try:
        return bool(answer.strip()) and CHECKS[name](answer, **given)
    except TypeError as error:
        said = str(error)
        raise UserError(f"instruction {name}: {said.partition('() ')[2] or said}") from None


def variants(answer: str) -> list[str]:
    """An answer and what is left without its first line, last line and asterisks: the loose way."""
    lines = answer.split("\n")
    texts = [answer, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])]
    texts = [text.strip() for text in texts[1:]]
    return [answer, *texts, *(text.replace("*", "") for text in (answer, *texts))]


def scores(answer: str, names: Sequence[str], kwargs: Sequence[Mapping]) -> dict[str, float]:
    """The four accuracies of IFEval for one prompt; those of instructions are means over them.

    Raises:
      UserError: these are no lists of names and of as many objects of arguments; see `follows`.
    """
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(f"instruction_id_list={names!r} must be a list of names of instructions")
    kwargs = [{}] * len(names) if kwargs is None else kwargs
    if not isinstance(kwargs, list) or not all(isinstance(k, Mapping | None) for k in kwargs):
        raise UserError(f"kwargs={kwargs!r} must be a list of objects")
    kwargs = kwargs or [{}] * len(names)
    if len(kwargs) != len(names):
        raise UserError(f"kwargs has {len(kwargs)} objects for {len(names)} instructions")
    strict = [follows(answer, n, k or {}) for n, k in zip(names, kwargs, strict=True)]
    texts = variants(answer)
    loose = [
        any(follows(text, n, k or {}) for text in texts) for n, k in zip(names, kwargs, strict=True)
    ]
    return {
        "prompt_strict": float(all(strict)), "prompt_loose": float(all(loose)),
        "instruction_strict": sum(strict) / len(strict),
        "instruction_loose": sum(loose) / len(loose),
    }  # fmt: skip


def _compare(count: int, relation: str | None, wanted: int) -> bool:
    return count < wanted if relation == "less than" else count >= wanted


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _existence(text, keywords):
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


def _frequency(text, keyword, frequency, relation=None):
    found = re.findall(re.escape(keyword), text, re.IGNORECASE)
    return _compare(len(found), relation, frequency)


def _forbidden(text, forbidden_words):
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words
    )


def _letters(text, letter, let_frequency, let_relation=None):
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _language(text, language):
    try:
        import langdetect
    except ImportError:
        raise UserError(
            "language:response_language needs the package langdetect: pip install 'puna[tasks]'"
        ) from None
    langdetect.DetectorFactory.seed = 0  # it draws samples
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return False


def _sentences(text, num_sentences, relation=None):
    found = [s for s in re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip()) if re.search(r"\w", s)]
    return _compare(len(found), relation, num_sentences)


def _paragraphs(text, num_paragraphs):
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = parts[1:-1]
    # One that is empty may stand at either end only.
    if any(not part.strip() for part in inner):
        return False
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


def _count_words(text, num_words, relation=None):
    return _compare(len(_words(text)), relation, num_words)


def _first_word(text, num_paragraphs, nth_paragraph, first_word):
    parts = [part for part in re.split(r"\n\n", text) if part.strip()]
    if len(parts) != num_paragraphs or nth_paragraph > len(parts):
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _placeholders(text, num_placeholders):
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text, postscript_marker):
    forms = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    form = forms.get(postscript_marker, re.escape(postscript_marker))
    return re.search(form, text, re.IGNORECASE) is not None


def _bullets(text, num_bullets):
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE)) == num_bullets


_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _highlights(text, num_highlights):
    single = [s for s in re.findall(r"\*[^\n\*]*\*", text) if s.strip("*").strip()]
    double = [s for s in re.findall(r"\*\*[^\n\*]*\*\*", text) if s.strip("*").strip()]
    return len(single) + len(double) >= num_highlights


def _sections(text, section_spliter, num_sections):
    return len(re.split(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) - 1 >= num_sections


def _json(text):
    text = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text):
    return any(t.strip("<> ") for t in re.findall(r"<<[^\n]+>>", text))


def _two(text):
    parts = text.split("******")
    inner = [part for i, part in enumerate(parts) if part.strip() or 0 < i < len(parts) - 1]
    good = len(inner) == 2 and all(part.strip() for part in inner)
    return good and inner[0].strip() != inner[1].strip()


def _repeat(text, prompt_to_repeat):
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(text, end_phrase):
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(text):
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(text, capital_frequency, capital_relation=None):
    count = sum(word.isupper() for word in _words(text))
    return _compare(count, capital_relation, capital_frequency)


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _count_words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text: any(c in text for c in _CONSTRAINED),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "punctuation:no_comma": lambda text: "," not in text,
}
