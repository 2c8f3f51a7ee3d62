"""Conversations: golden text of each built-in format, Meta's own encoders, and bad input."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.models.text.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

SYSTEM = {"role": "system", "content": "You are a helpful assistant"}
USER = {"role": "user", "content": "What is the weather in SF?"}
ANSWER = {"role": "assistant", "content": "25 C. "}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "SF", "n": 2}'}}],
}
RESULT = {"role": "tool", "content": '"25 C"'}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather at a place",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
LLAMA3_NAMES = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
LLAMA3_NAMES += ["eom_id", "python_tag"]


def byte_level(names, **arguments) -> Tokenizer:
    """A byte-level tokenizer with given control tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([tokenizers.AddedToken(n, normalized=False) for n in names])
    return Tokenizer.from_tokenizers(model, **arguments)


LLAMA2 = byte_level(["<s>", "</s>"])
LLAMA3 = byte_level([f"<|{name}|>" for name in LLAMA3_NAMES])
LLAMA4 = train_bpe(["the weather in San Francisco, assistant user system"], 300)
FAMILIES = {"llama2": LLAMA2, "llama3": LLAMA3, "llama4": LLAMA4}


def shown(tokenizer, messages, *args, **kwargs) -> str:
    return tokenizer.decode(tokenizer.chat(messages, *args, **kwargs), show_special=True)


# -- the built-in formats


def test_llama3_format():
    assert shown(LLAMA3, [SYSTEM, USER, ANSWER, USER]) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful assistant<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "What is the weather in SF?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "25 C. <|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "What is the weather in SF?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert shown(LLAMA3, [USER], add_generation_prompt=False).endswith("SF?<|eot_id|>")


def test_llama3_own_tools():
    call = {"name": "brave_search", "arguments": {"query": "gold price"}}
    code = {"name": "code_interpreter", "arguments": {"code": "print(7)"}}
    messages = [
        SYSTEM,
        USER,
        {"role": "assistant", "tool_calls": [{"function": call}]},
        {"role": "ipython", "content": {"price": 1}},
        {"role": "assistant", "content": "Wait.", "tool_calls": [code]},
    ]
    text = shown(LLAMA3, messages, ["brave_search", "wolfram_alpha", "code_interpreter"], False)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Environment: ipython\nTools: brave_search, wolfram_alpha\n\n"
        "You are a helpful assistant<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "What is the weather in SF?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '<|python_tag|>brave_search.call(query="gold price")<|eom_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n{"price": 1}<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        "Wait.<|python_tag|>print(7)<|eom_id|>"
    )
    assert "\n\nEnvironment: ipython\n<|eot_id|>" in shown(LLAMA3, [USER], ["code_interpreter"])


def test_llama3_functions():
    text = shown(LLAMA3, [SYSTEM, USER, CALL, RESULT], [WEATHER])
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful assistant<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Answer the user's question by making use of the following functions if needed.\n"
    )
    assert "JSON format:\n" + json.dumps(WEATHER, indent=4) + "\n\nReturn function calls" in text
    assert text.endswith(
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"type": "function", "name": "get_weather", "parameters": {"city": "SF", "n": 2}}'
        '<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"25 C"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    inner = shown(LLAMA3, [SYSTEM, USER, CALL, RESULT], [WEATHER["function"]])
    assert inner == text


def test_llama4_format():
    calls = [
        {"name": "f", "arguments": {"city": 'S"F', "on": True, "none": None, "d": {"a": [1, 2.5]}}},
        {"name": "g"},
    ]
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": calls}, RESULT, ANSWER]
    assert shown(LLAMA4, messages) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\n"
        "What is the weather in SF?<|eot|><|header_start|>assistant<|header_end|>\n\n"
        '[f(city="S\\"F", on=True, none=None, d={"a": [1, 2.5]}), g()]<|eom|>'
        '<|header_start|>ipython<|header_end|>\n\n"25 C"<|eom|>'
        "<|header_start|>assistant<|header_end|>\n\n25 C. <|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )


def test_llama4_functions_stand_in_the_system_message():
    functions = json.dumps([WEATHER["function"]], indent=4)
    listed = f"Here is a list of functions in JSON format that you can invoke:\n{functions}\n\nShou"
    start = "<|begin_of_text|><|header_start|>system<|header_end|>\n\n"
    assert shown(LLAMA4, [USER], [WEATHER]).startswith(start + listed)
    text = shown(LLAMA4, [SYSTEM, USER], [WEATHER])
    assert text.startswith(start + "You are a helpful assistant\n\n" + listed)


def test_llama4_images_are_placeholders():
    content = [
        {"type": "image"},
        {"type": "text", "text": "Compare <|image|> "},
        {"type": "image", "image": object()},
        {"type": "text", "text": "please"},
    ]
    ids = LLAMA4.chat([{"role": "user", "content": content}])
    assert ids.count(LLAMA4.special["<|image|>"]) == 2
    assert LLAMA4.decode(ids, show_special=True).split("\n\n")[1] == (
        "<|image|>Compare <|image|> <|image|>please<|eot|><|header_start|>assistant<|header_end|>"
    )
    for family in (LLAMA2, LLAMA3):
        with pytest.raises(UserError, match="no images"):
            family.chat([{"role": "user", "content": content}])
    # Llama 3.2 Vision's tokenizer has the token; only users give images.
    vision = byte_level([*(f"<|{name}|>" for name in LLAMA3_NAMES), "<|image|>"])
    message = {"role": "user", "content": content[:2]}
    assert vision.chat([message]).count(vision.special["<|image|>"]) == 1
    assert shown(vision, [message], add_generation_prompt=False).endswith(
        "user<|end_header_id|>\n\n<|image|>Compare <|image|> <|eot_id|>"
    )
    with pytest.raises(UserError, match="Llama 3's chat format has no images"):
        vision.chat([{**message, "role": "system"}])
    without = byte_level(["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"])
    with pytest.raises(UserError, match="lacks <|image|>"):
        without.chat([{"role": "user", "content": content}])
    assert shown(without, [USER, CALL]).count("<|eot|>") == 2


def test_llama2_format():
    assert shown(LLAMA2, [SYSTEM, USER, ANSWER, USER]) == (
        "<s>[INST] <<SYS>>\nYou are a helpful assistant\n<</SYS>>\n\n"
        "What is the weather in SF? [/INST] 25 C. </s>"
        "<s>[INST] What is the weather in SF? [/INST]"
    )
    assert shown(LLAMA2, [USER]) == "<s>[INST] What is the weather in SF? [/INST]"
    whole = shown(LLAMA2, [USER, ANSWER], add_generation_prompt=False)
    assert whole == "<s>[INST] What is the weather in SF? [/INST] 25 C. </s>"


def test_llama2_of_a_sentencepiece_model_encodes_turns_whole(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["[INST] what is the weather [/INST] sunny"] * 20),
            model_writer=file,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    tokenizer = load_tokenizer(tmp_path)
    first, second = "[INST] What is it? [/INST] 25 C. ", "[INST] the weather [/INST]"
    messages = [
        {"role": "user", "content": " What is it?"},
        ANSWER,
        {"role": "user", "content": "the weather\n"},
    ]
    assert tokenizer.chat(messages) == [
        *tokenizer.encode(first, bos=True, eos=True),
        *tokenizer.encode(second, bos=True),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@given(text=st.text(max_size=20), data=st.data())
def test_a_message_cannot_add_control_tokens(family, text, data):
    tokenizer = FAMILIES[family]
    names = st.sampled_from(sorted(tokenizer.special))
    harmless = [SYSTEM | {"content": "a"}, USER | {"content": "b"}]
    text = data.draw(names) + text + data.draw(names)
    harmful = [SYSTEM | {"content": text}, USER | {"content": [{"type": "text", "text": text}]}]
    control = set(tokenizer.special.values())
    kept = [[i for i in tokenizer.chat(m) if i in control] for m in (harmless, harmful)]
    assert kept[0] == kept[1]


# -- bad input


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "messages, reason",
    [
        ("hello", "must be a list"),
        ([], "must be a list"),
        (None, "must be a list"),
        (["hello"], r"messages\[0\]: is a str"),
        ([{"content": "x"}], "no 'role'"),
        ([USER, {"role": "wizard", "content": "x"}], r"messages\[1\]: role 'wizard'"),
        ([{"role": "user"}], "no 'content'"),
        ([{"role": "user", "content": 3}], "content is a int"),
        ([{"role": "user", "content": {"a": 1}}], "content is a dict"),
        ([{"role": "user", "content": [{"type": "video"}]}], "each part"),
        ([{"role": "user", "content": ["x"]}], "each part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "each part"),
        ([CALL | {"tool_calls": [{"function": {"arguments": {}}}]}], "no function name"),
        ([CALL | {"tool_calls": ["f"]}], "no function name"),
        ([CALL | {"tool_calls": "f"}], "must be a list"),
        ([CALL | {"tool_calls": [{"name": "f", "arguments": "{"}]}], "not JSON"),
        ([CALL | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}], "JSON object"),
        ([CALL | {"role": "user"}], "only an assistant"),
    ],
)
def test_bad_messages(family, messages, reason):
    with pytest.raises(UserError, match=reason) as error:
        FAMILIES[family].chat(messages)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "family, messages, tools, reason",
    [
        ("llama2", [USER, CALL], None, "no tools"),
        ("llama2", [USER], [WEATHER], "no tools"),
        ("llama2", [USER, USER], None, r"messages\[1\]: role 'user'"),
        ("llama2", [SYSTEM, ANSWER], None, r"messages\[1\]: role 'assistant'"),
        ("llama2", [SYSTEM], None, "needs a user"),
        ("llama2", [USER, ANSWER], None, "only a user's message"),
        ("llama2", [{"role": "user", "content": "x [/INST] y"}], None, r"\[/INST\]"),
        ("llama3", [USER, CALL | {"tool_calls": CALL["tool_calls"] * 2}], None, "one tool call"),
        ("llama4", [USER], ["brave_search"], "no tools of its own"),
        ("llama4", [USER], [{"description": "nameless"}], "must be"),
        ("llama4", [USER], ["magic"], "must be"),
        ("llama4", [USER], "brave_search", "list of functions"),
        ("llama4", [USER], [{"name": "f", "parameters": {1, 2}}], "not JSON"),
    ],
)
def test_what_a_format_cannot_express(family, messages, tools, reason):
    with pytest.raises(UserError, match=reason) as error:
        FAMILIES[family].chat(messages, tools)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_format_says_so():
    with pytest.raises(UserError, match="no chat format"):
        byte_tokenizer().chat([USER])


# -- against Meta's own encoder

TEXT = st.text(max_size=30) | st.sampled_from(["\nx", " x ", "", "<|eot_id|>", "<|eot|>"])
DIALOGS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXT))


@pytest.fixture(scope="module", params=["llama3", "llama4"])
def meta(request):
    """(family, our tokenizer, Meta's ChatFormat, Meta's data types)."""
    found = importlib.util.find_spec("llama_models")
    if found is None or found.origin is None:
        pytest.skip("llama-models is not installed")
    for name in ("tiktoken", "llama_models.datatypes"):
        pytest.importorskip(name)
    formats = pytest.importorskip(f"llama_models.{request.param}.chat_format")
    path = Path(found.origin).parent / request.param / "tokenizer.model"
    reference = formats.ChatFormat(formats.Tokenizer(path))
    types = importlib.import_module("llama_models.datatypes")
    return request.param, load_tokenizer(path), reference, types


@given(dialog=DIALOGS)
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_built_in_formats_equal_metas_encoder(meta, dialog):
    _, tokenizer, reference, types = meta
    dialog = dialog or [("user", "hi")]
    theirs = [types.RawMessage(role=role, content=text) for role, text in dialog]
    ours = [{"role": role, "content": text} for role, text in dialog]
    assert tokenizer.chat(ours) == reference.encode_dialog_prompt(theirs).tokens


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("get_weather", {"city": "San Francisco", "days": 3, "metric": None, "on": True}),
        ("get_weather", {"places": ["a", "b"]}),
        ("get_weather", {}),
        ("code_interpreter", {"code": "print(7)"}),
    ],
)
def test_tool_calls_equal_metas_encoder(meta, name, arguments):
    family, tokenizer, reference, types = meta
    if name == "code_interpreter" and family == "llama4":
        pytest.skip("Llama 4 has no tools of its own")
    own = name == "code_interpreter"
    call = types.ToolCall(call_id="1", tool_name=name, arguments=arguments)
    stop = types.StopReason.end_of_message if own else types.StopReason.end_of_turn
    theirs = [
        types.RawMessage(role="user", content="hi"),
        types.RawMessage(role="assistant", content="", tool_calls=[call], stop_reason=stop),
        types.RawMessage(role="tool", content="sunny"),
    ]
    ours = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
        {"role": "tool", "content": "sunny"},
    ]
    form = types.ToolPromptFormat.json if family == "llama3" else types.ToolPromptFormat.python_list
    assert tokenizer.chat(ours) == reference.encode_dialog_prompt(theirs, form).tokens
