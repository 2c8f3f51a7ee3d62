"""Conversations in the formats that people keep, what is learnt of them, and what is refused."""

import json

import numpy as np
import pytest

import puna
from puna.configs import schema
from puna.configs.errors import UserError
from puna.models.text.tokenizer import Tokenizer, train_bpe
from puna.models.text.turns import assistant_turns
from puna.train.data.chats import chat_of
from puna.train.data.examples import RecordError
from puna.train.data.preview import Preview
from puna.train.objectives import sft

BPE = train_bpe(["a llama answers a question of the puna"] * 3, 320)
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def transform_of(longest=100, overrides=()):
    config = puna.get_config("sft", overrides)
    config.data.seq_len = longest
    built = schema.build(config)
    return sft.make(built, BPE.token_bytes).transform(built, BPE)


def learnt(example):
    text = BPE.decode(example.ids[example.weights > 0], show_special=True)
    return text.split("<|eot|>")[:-1]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": " ", "output": "b"},
        {"instruction": "a", "context": "", "response": "b", "category": "c"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "b"},
        {"messages": None, "instruction": None, "conversations": [USER, ASSISTANT]},
        {"messages": [{**USER, "from": None}, {"role": None, "from": "gpt", "value": "b"}]},
        {"messages": json.dumps([USER, ASSISTANT])},
        {"messages": [{**USER, "content": [{"type": "text", "text": "a"}]}, ASSISTANT],
         "tools": None},
    ],
)  # fmt: skip
def test_every_format_is_the_same_conversation(record):
    t = transform_of()
    example = t.encode(t.parse(record, ""))
    assert example.ids.tolist() == BPE.chat([USER, ASSISTANT], add_generation_prompt=False)
    assert learnt(example) == ["b"] and example.whole and not example.cut


def test_a_system_prompt_tools_and_calls():
    record = {
        "system": "be brief",
        "tools": json.dumps([{"name": "f", "parameters": {}}]),
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "b"},
        ],
    }
    chat = chat_of(record)
    assert [m["role"] for m in chat.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert chat.tools == [{"name": "f", "parameters": {}}]
    t = transform_of(800)
    example = t.encode(t.parse(record, ""))
    text = BPE.decode(example.ids[example.weights > 0], show_special=True)
    assert text == "[f(x=1)]<|eom|>b<|eot|>"


def test_calls_as_older_programs_write_them():
    """OpenAI's first form, and ShareGPT's of several calls at once."""
    f, g = ({"name": name, "arguments": "{}"} for name in "fg")
    calls = [{"function": {"name": name, "arguments": {}}} for name in "fg"]
    old = {"role": "assistant", "content": None, "function_call": f}
    record = {"messages": [USER, old], "functions": [{"name": "f", "parameters": {}}]}
    new = {"messages": [USER, {**ASSISTANT, "content": None, "tool_calls": calls[:1]}],
           "tools": record["functions"]}  # fmt: skip
    several = {"messages": [USER, {"from": "function_call", "value": json.dumps([f, g])}]}
    wanted = {"messages": [USER, {"role": "assistant", "tool_calls": calls}]}
    t = transform_of(900)
    for one, other in ((record, new), (several, wanted)):
        ids, others = (t.encode(t.parse(r, "")).ids.tolist() for r in (one, other))
        assert ids == others


def test_earlier_turns_of_alpaca():
    record = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    t = transform_of()
    example = t.encode(t.parse(record, ""))
    text = BPE.decode(example.ids, show_special=True)
    assert learnt(example) == ["b", "d"] and text.index("a<") < text.index("c<")


@pytest.mark.parametrize("learn", ["assistant", "all"])
def test_a_turn_of_weight_0_is_read_and_not_learnt(learn):
    messages = [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "content": "d", "weight": 1}]
    t = transform_of(overrides=[f"sft.learn={learn}"])
    example = t.encode(t.parse({"messages": messages}, ""))
    text = BPE.decode(example.ids[example.weights == 0], show_special=True)
    assert "b<|eot|>" in text and "d<|eot|>" not in text
    if learn == "assistant":
        assert learnt(example) == ["d"]


def test_only_the_completion_of_a_conversation_is_learnt():
    t = transform_of()
    record = {"prompt": [USER, ASSISTANT, USER], "completion": [{**ASSISTANT, "content": "c"}]}
    assert learnt(t.encode(t.parse(record, ""))) == ["c"]
    whole = transform_of(overrides=["sft.learn=all"])
    example = whole.encode(whole.parse(record, ""))
    assert (example.weights == 1).all()


def test_a_long_conversation_ends_after_the_last_turn_that_fits():
    messages = [USER, ASSISTANT] * 6
    whole = BPE.chat(messages, add_generation_prompt=False)
    half = BPE.chat(messages[:6], add_generation_prompt=False)
    t = transform_of(len(half) + 3)
    example = t.encode(t.parse({"messages": messages}, ""))
    assert example.ids.tolist() == half and example.cut == len(whole) - len(half)
    assert learnt(example) == ["b"] * 3
    # What lies behind a row is not looked for: each turn takes the time of all before it.
    found = assistant_turns(BPE, messages, longest=len(half) + 3)
    assert found.messages == [1, 3, 5, 7] and found.ids == whole
    with pytest.raises(RecordError, match="its first assistant turn ends behind data.seq_len=5"):
        transform_of(5).encode(t.parse({"messages": messages}, ""))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "must have a list of messages under 'messages'"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [ASSISTANT, USER]}, r"out of order: messages\[0\] is 'assistant', first"),
        ({"messages": [USER, USER, ASSISTANT]}, r"messages\[1\] is 'user', after 'user'"),
        ({"messages": [USER, ASSISTANT, {"role": "system", "content": "x"}]}, "out of order"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "the role 'robot'"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "turn without text"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] has no content"),
        ({"messages": [USER, "x"]}, r"messages\[1\] must be a message, not a JSON string"),
        ({"messages": [USER, {"content": "x"}]}, r"messages\[1\] has no role"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, "tools that are not JSON"),
        ({"instruction": "a"}, "has an instruction and no output or response"),
        ({"instruction": "a", "output": " "}, "turn without text"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "list of pairs under 'history'"),
        ({"messages": "a"}, "must have a list of messages under 'messages', not a string"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "weight=0.5, which must be 0 or 1"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "every assistant turn has weight 0"),
        ({"messages": [USER, {**ASSISTANT, "content": [{"type": "text", "text": " "}]}]},
         "turn without text"),
        ({"messages": [USER, {**ASSISTANT, "content": "\ud800"}]}, "half a surrogate pair"),
        ({"prompt": "a\ud800", "completion": "b"}, "half a surrogate pair under 'prompt'"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "a prompt and completion of text"),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}, "completion of text"),
        ({"messages": [{"role": "system", "content": "a"}, USER, ASSISTANT], "system": "b"},
         "two system prompts"),
        ({"text": "a"}, r"has none of messages.*\(its keys: 'text'\)"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]},
         "has images, and the model reads none: model.vision.num_layers=0"),
    ],
)  # fmt: skip
def test_what_cannot_teach_says_why(record, reason):
    t = transform_of()
    with pytest.raises(RecordError, match=reason):
        t.encode(t.parse(record, ""))


@pytest.fixture
def previewed(tmp_path):
    BPE.save(tmp_path / "tokenizer")
    path = tmp_path / "chats.jsonl"
    records = [{"messages": [USER, ASSISTANT] * n} for n in (1, 2, 9)] + [{"messages": [USER]}]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return puna.get_config(
        "sft", [f"data.train={path}", f"data.tokenizer={tmp_path / 'tokenizer'}", "data.seq_len=64"]
    )


def test_a_preview_shows_what_is_learnt_and_what_is_left_out(previewed):
    preview = Preview(previewed)
    first = next(preview.examples())
    assert preview.shown(first, colour=False).endswith("<|header_end|>\n\n[[b<|eot|>]]")
    assert preview.shown(first, colour=True).endswith("\x1b[32mb<|eot|>\x1b[0m")
    summary = preview.summary(100)
    assert (summary["examples"], summary["cut"], summary["dropped"]) == (3, 1, 1)
    lengths = [len(e.ids) for e in preview.examples()]
    assert summary["tokens"] == sum(lengths) and summary["longest"] == max(lengths) <= 64
    assert summary["learnt"] == sum(int(np.sum(e.weights > 0)) for e in preview.examples())
    assert list(summary["reasons"]) == ["has no assistant turn: there is nothing to learn from it"]


def test_a_file_that_teaches_nothing_is_refused(previewed, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": [USER]}) + "\n")
    previewed.data.train = str(path)
    with pytest.raises(UserError, match="no assistant turn"):
        next(Preview(previewed).examples())


def test_pictures_of_a_conversation(tmp_path):
    """An image part becomes the tokens of its picture, read and not learnt, in the user's turn."""
    Image = pytest.importorskip("PIL.Image")
    Image.fromarray(np.full((28, 28, 3), 200, np.uint8)).save(tmp_path / "a.png")
    parts = [{"type": "image"}, {"type": "text", "text": "a"}]
    record = {"messages": [{"role": "user", "content": parts}, ASSISTANT], "images": ["a.png"]}
    config = puna.get_config("llama4:scout-tiny")
    config.model.vision.update(max_tiles=1)
    config.model.vision.token_id = BPE.special["<|patch|>"]
    config.data.update(images=1, seq_len=200)
    config.train.objective = "sft"
    built = schema.build(config)
    t = sft.make(built, BPE.token_bytes).transform(built, BPE)
    example = t.encode(t.parse(record, str(tmp_path)))
    (media,) = example.media
    patches = example.ids == BPE.special["<|patch|>"]
    assert patches.any() and patches.nonzero()[0].min() > media.start
    assert example.ids[media.start] == BPE.special["<|image_start|>"]
    assert example.ids[media.stop - 1] == BPE.special["<|image_end|>"]
    assert not example.weights[: media.stop].any() and learnt(example) == ["b"]
    text = BPE.decode(example.ids[media.stop :], show_special=True)
    assert text.startswith("a<|eot|>")
    with pytest.raises(RecordError, match="1 image parts and 0 image records"):
        t.parse({"messages": record["messages"]}, str(tmp_path))


def test_what_a_template_hides_is_refused_before_training(previewed):
    tokenizer = puna.load_tokenizer(previewed.data.tokenizer)
    hides = "{% for m in messages if m.role != 'user' %}{{ m.content }}<|eot|>{% endfor %}"
    Tokenizer(tokenizer._kind, chat_template=hides).save(previewed.data.tokenizer)
    with pytest.raises(UserError, match=r"3 of the first 3 records are bad.*leaves out") as error:
        next(Preview(previewed).examples())
    assert "\n" not in str(error.value)
