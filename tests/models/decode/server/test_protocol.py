"""Bodies of requests: any JSON at all is a request or a 4xx, never an error of the server."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.models.decode.server.mistakes import ApiError
from puna.models.decode.server.protocol import FIELDS, IGNORED, ONLY, parse
from puna.models.text.tokenizer import train_bpe

TOKENIZER = train_bpe(["the llama walks"], 280)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)  # with lone surrogates
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2**63, -(2**63), 1e308, 10**30])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | VALUES,
            "content": TEXTS
            | VALUES
            | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS | VALUES})),
            "name": VALUES,
            "tool_calls": VALUES
            | st.lists(st.fixed_dictionaries({"function": VALUES}), max_size=2),
        },
    ),
    max_size=3,
)


def bodies(chat):
    good = {"messages": MESSAGES, "prompt": TEXTS | st.lists(TEXTS | st.lists(st.integers(0, 9)))}
    names = sorted(FIELDS[chat] | set(ONLY) | IGNORED)
    return st.fixed_dictionaries(
        {"messages" if chat else "prompt": good["messages" if chat else "prompt"] | VALUES},
        optional={name: VALUES for name in names if name not in good and name != "model"},
    )


@pytest.mark.parametrize("chat", [True, False])
@settings(max_examples=150)
@example(data=None)
@given(data=st.data())
def test_any_json_is_a_request_or_a_mistake(chat, data):
    body = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    if data is not None:
        body = data.draw(bodies(chat))
    try:
        ask = parse(json.dumps(body).encode(), chat, "tiny")
    except ApiError as error:
        assert data is not None and 400 <= error.status < 500
        json.dumps(error.body, allow_nan=False)
        return
    assert ask.chat == chat and 1 <= ask.n <= 128 and isinstance(ask.stop, tuple)
    assert all(isinstance(value, int | float) for value in ask.sampling.values())
    try:
        for prompt in ask.prompts:
            assert isinstance(prompt, list) or TOKENIZER.encode(prompt) is not None
        if chat:
            assert TOKENIZER.chat(ask.messages)
    except UserError as error:
        assert chat and "\n" not in str(error)


def test_null_asks_for_nothing():
    names = sorted(FIELDS[False] - {"prompt"} | set(ONLY))
    body = {"prompt": "a", **dict.fromkeys(names)}
    assert parse(json.dumps(body).encode(), False, "m") == parse(b'{"prompt": "a"}', False, "m")


@pytest.mark.parametrize("name", sorted(ONLY))
def test_what_is_not_supported_is_never_ignored(name):
    for value in ONLY[name]:
        parse(json.dumps({"prompt": "a", name: value}).encode(), False, "m")
    with pytest.raises(ApiError, match=f"{name} is not supported") as error:
        parse(json.dumps({"prompt": "a", name: [1]}).encode(), False, "m")
    assert error.value.body["error"]["code"] == "unsupported_parameter"


def test_an_assistant_may_have_said_nothing_or_refused():
    said = [
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    asked = [*said, {"role": "user", "content": "a"}]
    ask = parse(json.dumps({"messages": asked}).encode(), True, "m")
    want = [{"role": "assistant", "content": text} for text in ("", "no", "no")]
    assert TOKENIZER.chat(ask.messages) == TOKENIZER.chat([*want, asked[-1]])
