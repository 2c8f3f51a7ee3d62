"""Each instruction against texts that follow it and texts that do not."""

import pytest

from puna.configs.errors import UserError
from puna.eval.tasks import instructions

TABLE = [
    ("keywords:existence", {"keywords": ["llama", "puna"]}, "Llama on the puna", "a llama"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "a a", "a"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "a", "a a"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "a Cat."),
    ("keywords:letter_frequency",
     {"letter": "e", "let_frequency": 3, "let_relation": "at least"}, "Eee", "ee"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
     "One. Two!", "One only."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b", "a b c"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "two"}, "One.\n\nTwo is.",
     "Two.\n\nOne"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "x\nP. S. y", "x\nP.P.S y"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x\nP.P.S y", "x\nP.S. y"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* *b*", "*a* **"),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     "SECTION 1 a\nSECTION 2 b", "SECTION 1 a"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >> text"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. Yes.", "Yes. Say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'x "the end."', "The end. x"),
    ("startend:quotation", {}, ' "a" ', '"a'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
     "AN OX is", "An OX"),
    ("change_case:english_capital", {}, "ALL OF IT!", "ALL of it"),
    ("change_case:english_lowercase", {}, "all of it!", "All of it"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), TABLE)
def test_an_instruction(name, kwargs, good, bad):
    assert instructions.follows(good, name, kwargs | {"unused": None})
    assert not instructions.follows(bad, name, kwargs)
    assert not instructions.follows(" \n", name, kwargs)


def test_every_instruction_is_in_the_table():
    assert {row[0] for row in TABLE} | {"language:response_language"} == set(instructions.CHECKS)


def test_languages():
    pytest.importorskip("langdetect", reason="needs the extra [tasks]")
    kwargs = {"language": "de"}
    name = "language:response_language"
    assert instructions.follows("Das Lama frisst das Gras auf der Hochebene.", name, kwargs)
    assert not instructions.follows("The llama eats the grass of the plain.", name, kwargs)
    assert not instructions.follows("12 34", name, kwargs)


def test_loose_scores_forgive_the_frame():
    names, kwargs = ["startend:quotation", "punctuation:no_comma"], [{}, None]
    found = instructions.scores('Sure, here it is:\n"a b"', names, kwargs)
    assert found == {"prompt_strict": 0.0, "prompt_loose": 1.0, "instruction_strict": 0.0,
                     "instruction_loose": 1.0}  # fmt: skip
    found = instructions.scores('"a, b"', names, kwargs)
    assert found["instruction_strict"] == 0.5 and found["prompt_loose"] == 0.0


def test_what_is_no_instruction():
    with pytest.raises(UserError, match="'x:y' is not one of keywords:existence"):
        instructions.follows("a", "x:y", {})
    with pytest.raises(UserError, match="keywords:existence: missing 1 required .* 'keywords'"):
        instructions.follows("a", "keywords:existence", {"keywords": None})


@pytest.mark.parametrize(
    ("names", "kwargs", "reason"),
    [
        ("x", None, "instruction_id_list='x' must be a list"),
        (None, None, "instruction_id_list=None must be a list"),
        ([], None, "must be a list of names"),
        ([{}], None, "must be a list of names"),
        (["punctuation:no_comma"], 3, "kwargs=3 must be a list of objects"),
        (["punctuation:no_comma"], [{}, {}], "kwargs has 2 objects for 1 instructions"),
        (["length_constraints:number_words"], [{"num_words": "five", "relation": "at least"}],
         "number_words: '>=' not supported"),
    ],
)  # fmt: skip
def test_records_that_are_no_instructions(names, kwargs, reason):
    with pytest.raises(UserError, match=reason):
        instructions.scores("a b", names, kwargs)
