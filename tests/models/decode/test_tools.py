"""Calls in what a model writes: every form, in any pieces, and its own grammar allows them."""

import json
import keyword

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.models.decode import grammar, tools
from puna.models.decode.tools import Call, Calls
from puna.models.text.tokenizer import Tokenizer, byte_tokenizer, train_bpe

LLAMA3, LLAMA4 = byte_tokenizer(), train_bpe(["the llama walks over the puna"] * 9, 280)
CHATML = Tokenizer(LLAMA3._kind, chat_template="calls stand in <tool_call>")
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "where": {"$ref": "#/$defs/where"},
        },
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"where": {"enum": ["in", None, True]}},
    },
}
NAMES = ["get_weather", "now"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.just(0.5) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
KEYS = st.from_regex("[a-z_]{1,5}", fullmatch=True).filter(lambda k: not keyword.iskeyword(k))
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(KEYS, VALUES, max_size=3)),
    min_size=1, max_size=3,
)  # fmt: skip


def llama3(calls):
    return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in calls)


def llama3_type(calls):
    one = ({"type": "function", "name": n, "parameters": a} for n, a in calls)
    return "<|python_tag|>" + ";".join(map(json.dumps, one))


def listed(calls):
    return "\n" + json.dumps([{"name": n, "arguments": json.dumps(a)} for n, a in calls], indent=1)


def python(calls):
    one = (f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls)
    return f"[{', '.join(one)}]"


def python_of_json(calls):
    one = (f"{n}({', '.join(f'{k}={json.dumps(v)}' for k, v in a.items())})" for n, a in calls)
    return f"<|python_start|>[{', '.join(one)}]<|python_end|>"


def tags(calls):
    one = ({"name": n, "arguments": a} for n, a in calls)
    return "\n".join(f"<tool_call>\n{json.dumps(c)}\n</tool_call>" for c in one)


def functions(calls):
    return "".join(f"<function={n}>{json.dumps(a)}</function>" for n, a in calls)


def parts(text, cuts=()):
    """Text and calls when `text` comes in pieces."""
    found, made = Calls(NAMES), []
    edges = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    for start, end in zip(edges, edges[1:], strict=False):
        made += found.add(text[start:end])
    made += found.add("", final=True)
    words = "".join(part for part in made if isinstance(part, str))
    calls = [part for part in made if isinstance(part, Call)]
    assert found.found == len(calls)
    return words, [(call.name, json.loads(call.arguments)) for call in calls]


FORMS = (llama3, llama3_type, listed, python, python_of_json, tags, functions)


@pytest.mark.parametrize("write", FORMS)
@settings(max_examples=40)
@given(calls=CALLS, cuts=st.lists(st.integers(0, 300), max_size=20))
def test_calls_are_found_however_they_come(write, calls, cuts):
    text = write(calls)
    assert parts(text, cuts) == parts(text, range(len(text)))
    words, found = parts(text, cuts)
    assert found == calls and not words.strip()


@pytest.mark.parametrize("write", (tags, functions))
@settings(max_examples=30)
@given(calls=CALLS, said=TEXTS, cuts=st.lists(st.integers(0, 300), max_size=20))
def test_text_may_stand_before_tags(write, calls, said, cuts):
    words, found = parts(f"a{said}{write(calls)}", cuts)
    assert words.rstrip("\n") == f"a{said}".rstrip("\n") and found == calls


@settings(max_examples=200)
@given(
    pieces=st.lists(
        st.sampled_from(
            ["{", "}", "[", "]", "<tool_call>", "</tool_call>", "<function=now>", "</function>",
             '{"name": "now"}', "now(", ")", "<tool", " ", "\n", "a", ";", '"', "\\d", "-" * 50]
        ) | TEXTS, max_size=9,
    ),
    cuts=st.lists(st.integers(0, 60), max_size=20),
)  # fmt: skip
def test_nothing_is_lost_of_any_text(pieces, cuts):
    text = "".join(pieces)
    words, calls = parts(text, cuts)
    assert (words, calls) == parts(text)
    if not calls:
        assert words == text


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "other", "parameters": {}}', '{"name": "now", "parameters": [1]}', '{"name": ',
        '{"name": "now", "parameters": {"a": NaN}}', "[1] says that", "[other(a=1)]", "[now(1)]",
        "[now(a=f())]", "[now(**{})]", "[now(a=1), 2]", "[]", "[now(a=1)", "[now]", "{}", "[[]]",
        "<tool_call>no</tool_call>", "<tool_call>", "<function=other>{}</function>", "  \n",
        "a < b", "The call is {\"name\": \"now\"}", "[now(a=" + "-" * 9999 + "1)]", "{" * 9999,
        "[now(a=" + "[" * 999 + "]" * 999 + ")]", "[now(a={1: 2})]", "[now(a=b'x')]",
    ],
)  # fmt: skip
def test_what_is_no_call_stays_text(text):
    assert parts(text) == (text, [])
    assert parts(text, range(0, 99, 2)) == (text, [])


def test_text_is_not_held_back_for_long():
    found = Calls(NAMES)
    assert found.add("  \n") == [] and found.add("a <") == ["  \na "]
    assert found.add("tool x") == ["<tool x"]
    assert Calls(NAMES).add("[1, 2") == ["[1, 2"]
    assert Calls(NAMES).add("[no") == []
    assert Calls(NAMES).add("[not(") == ["[not("]


def allowed(tokenizer, source, text):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    matcher = grammar.Constraints(tokenizer).compile(source)._matcher
    ids = tokenizer.encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


TYPED = '{"type": "function", "name": "now", "parameters": {}}'
TAGGED = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    "tokenizer, several, yes, no",
    [
        (LLAMA3, True, [TYPED], [TYPED + "; " + TYPED, '{"type": "function", "name": "x"']),
        (LLAMA4, True, ['[get_weather(city="a", where=null)]', '[now(), get_weather(city="\\n")]'],
         ["[get_weather(days=1)]", '[get_weather(days=1, city="a")]', "[now(a=1)]", "[]"]),
        (LLAMA4, False, ["[now()]"], ["[now(), now()]"]),
        (CHATML, True, [TAGGED, f"{TAGGED}\n{TAGGED}"], [TAGGED.replace("{}", '{"a": 1}')]),
        (CHATML, False, [TAGGED], [f"{TAGGED}\n{TAGGED}"]),
    ],
)  # fmt: skip
def test_a_call_that_must_be_made_has_the_form_of_the_model(tokenizer, several, yes, no):
    source = tools.grammar(tokenizer, [WEATHER, {"name": "now"}], several, free=False)
    for text in yes:
        assert allowed(tokenizer, source, text)
        assert parts(text)[1] and not parts(text)[0].strip()
    for text in [*no, "", "hello", " " + yes[0]]:
        assert not allowed(tokenizer, source, text)


@pytest.mark.parametrize(
    "tokenizer, yes, no",
    [
        (LLAMA3, [TYPED, "hi {", " \n[", ""], ["{}", " {", TYPED + " "]),
        (LLAMA4, ["[now()]", "hi [", "{"], ["[]", "[1]", "[now()] "]),
        (CHATML, [TAGGED, f"hi {TAGGED} there", "<tool"], ["<tool_call>x", "a<tool_call>\n{}"]),
    ],
)
def test_a_strict_call_is_held_to_its_schema_and_text_is_free(tokenizer, yes, no):
    source = tools.grammar(tokenizer, [WEATHER, {"name": "now"}], several=True, free=True)
    for text in yes:
        assert allowed(tokenizer, source, text)
    for text in no:
        assert not allowed(tokenizer, source, text)


def test_a_name_that_python_lacks():
    with pytest.raises(UserError, match="'get-it' is no name in the form"):
        tools.grammar(LLAMA4, [{"name": "get-it"}], False, False)
