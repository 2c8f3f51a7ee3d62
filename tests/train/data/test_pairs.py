"""Pairs of answers: what is learnt of a record, how it is packed, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.models.text.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from puna.train.data.examples import RecordError
from puna.train.data.packing import Cursor, Room, pack_row, to_batch
from puna.train.data.pairs import PairTransform

BYTES = byte_tokenizer()
BPE = train_bpe(["Question: what is 3 + 4? Answer: 7. été 3 3 3 the the"] * 3, 300)
TEXT = st.text("ab é3?\n", max_size=12)
EOT = "<|eot_id|>"


@pytest.fixture(scope="module")
def made():
    """A tokenizer of bytes with Llama 3's control tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", EOT]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=names, show_progress=False
    )
    made.train_from_iterator(["assistant user"], trainer)
    return made


@pytest.fixture(scope="module")
def llama3(made):
    return Tokenizer.from_tokenizers(made)


def encode(transform, record):
    return transform.encode(transform.parse(record, ""))


def texts(example):
    """(ids, learnt ids) of the chosen and of the rejected text."""
    (border,) = example.borders
    for part in (slice(None, border), slice(border, None)):
        ids, weights = example.ids[part], example.weights[part]
        yield ids.tolist(), ids[weights > 0].tolist()


@given(TEXT, TEXT.filter(bool), TEXT.filter(bool), st.sampled_from([BYTES, BPE]))
def test_answers_and_their_ends_are_learnt(prompt, chosen, rejected, tokenizer):
    if chosen == rejected:
        return
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    example = encode(PairTransform(tokenizer, 100, "26 Jul 2024"), record)
    assert example.whole
    for answer, (ids, learnt) in zip((chosen, rejected), texts(example), strict=True):
        assert ids == tokenizer.encode(prompt + answer, bos=True, eos=True)
        assert learnt == ids[len(ids) - len(learnt) :] and learnt[-1] == tokenizer.eos_id
        # An id that spans the border belongs to the answer, whose every character is learnt.
        assert tokenizer.decode(learnt).endswith(answer)


def message(role, content):
    return {"role": role, "content": content}


QUESTION = [message("system", "Be a llama."), message("user", "Hum?")]
CHAT = {
    "prompt": QUESTION,
    "chosen": [message("assistant", "Mmm.")],
    "rejected": [message("assistant", "Woof.")],
}


def test_of_messages_the_answer_and_the_end_of_its_turn_are_learnt(llama3):
    example = encode(PairTransform(llama3, 300, "26 Jul 2024"), CHAT)
    for answer, (ids, learnt) in zip(("Mmm.", "Woof."), texts(example), strict=True):
        asked = llama3.chat(QUESTION)
        assert ids == [*asked, *llama3.encode(answer), llama3.special[EOT]]
        assert learnt == ids[len(asked) :]


def test_conversations_need_no_prompt(llama3):
    transform = PairTransform(llama3, 300, "26 Jul 2024")
    found = encode(transform, {key: QUESTION + CHAT[key] for key in ("chosen", "rejected")})
    wanted = encode(transform, CHAT)
    assert found.ids.tolist() == wanted.ids.tolist() and found.borders == wanted.borders
    assert found.weights.tolist() == wanted.weights.tolist()


@pytest.mark.parametrize(
    "record",
    [
        CHAT | {"chosen": "Mmm.", "rejected": "Woof."},
        CHAT | {"chosen": CHAT["chosen"][0], "rejected": CHAT["rejected"][0]},
        CHAT | {"prompt": QUESTION[1:], "system": "Be a llama."},
        CHAT | {"prompt": "Hum?", "system": "Be a llama."},
        {"prompt": "Hum?"} | {key: QUESTION + CHAT[key] for key in ("chosen", "rejected")},
        CHAT | {key: QUESTION + CHAT[key] for key in ("chosen", "rejected")},
        {"conversations": QUESTION, "chosen": CHAT["chosen"][0], "rejected": CHAT["rejected"][0]},
        CHAT | {
            "prompt": [QUESTION[0], {"from": "human", "value": "Hum?"}],
            "chosen": {"from": "gpt", "value": "Mmm."},
        },
    ],
)  # fmt: skip
def test_every_form_is_the_same_pair(llama3, record):
    transform = PairTransform(llama3, 300, "26 Jul 2024")
    wanted, found = encode(transform, CHAT), encode(transform, record)
    assert found.ids.tolist() == wanted.ids.tolist() and found.borders == wanted.borders


def test_tools_and_calls_of_a_pair(llama3):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    record = CHAT | {"chosen": [call], "tools": [{"name": "f", "parameters": {}}]}
    example = encode(PairTransform(llama3, 2000, "26 Jul 2024"), record)
    (chosen, learnt), (rejected, _) = texts(example)
    assert '"name": "f"' in llama3.decode(rejected) and '"name": "f"' in llama3.decode(learnt)
    assert chosen != rejected


def test_what_a_template_writes_behind_the_turn_is_not_learnt(made):
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|eot_id|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    llama3 = Tokenizer.from_tokenizers(made, chat_template=template)
    for answer, (_, learnt) in zip(
        ("Mmm.", "Woof."),
        texts(encode(PairTransform(llama3, 300, "26 Jul 2024"), CHAT)),
        strict=True,
    ):
        assert learnt == [*llama3.encode(answer), llama3.special[EOT]]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("plain", "is plain text; pairs need prompt, chosen and rejected"),
        ({"prompt": "a", "chosen": "b"}, "has no key 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "has no key 'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "has the same answer under"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "has an empty answer under 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "has an empty answer under 'rejected'"),
        ({"prompt": "a", "chosen": 3, "rejected": ""}, "no string under 'chosen' but a JSON num"),
        (
            {"prompt": "a" * 90, "chosen": "b", "rejected": "c"},
            "has 93 . 93 tokens, more than data",
        ),
        (CHAT | {"chosen": 3}, "a list of messages under 'chosen', not a number"),
        (CHAT | {"prompt": []}, "a list of messages under 'prompt', not an empty array"),
        (
            {"prompt": "No?"} | {key: QUESTION + CHAT[key] for key in ("chosen", "rejected")},
            "a prompt that is not what its conversations begin with",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "d"}, "has a system prompt or"),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "c"}, "half a surrogate pair"),
        (CHAT | {"chosen": CHAT["rejected"]}, "has the same answer under"),
        (CHAT | {"chosen": [message("assistant", "")]}, "is an assistant turn without text"),
        (CHAT | {"chosen": [message("user", "Mmm.")]}, "must have a message of the assistant"),
        (CHAT | {"chosen": []}, "a list of messages under 'chosen', not an empty array"),
        (CHAT | {"chosen": [message("assistant", None)]}, r"chosen\[0\] has no content"),
        (CHAT | {"prompt": [message("user", [])]}, "has a message without text; pairs"),
        (CHAT | {"prompt": None}, "has no message in its prompt"),
        ({"chosen": QUESTION + CHAT["chosen"], "rejected": CHAT["rejected"]}, "must differ in"),
        (CHAT, "cannot be written: this tokenizer has no chat format"),
    ],
)
def test_what_cannot_be_a_pair_says_why(record, reason):
    with pytest.raises(RecordError, match=reason):
        encode(PairTransform(BYTES, 100, "26 Jul 2024"), record)


def test_an_answer_that_nothing_predicts_is_refused():
    silent = BYTES.with_ends(False, None)
    silent.eos_id = None
    record = {"prompt": "", "chosen": "a", "rejected": "b"}
    with pytest.raises(RecordError, match="of no token that could be predicted"):
        encode(PairTransform(silent, 100, "26 Jul 2024"), record)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=8))
def test_a_pair_is_two_segments_of_one_row(lengths):
    transform = PairTransform(BYTES, 14, "26 Jul 2024")
    pairs = [("p", "x" * a, "y" * b, None) for a, b in lengths]
    examples = [transform.encode(pair) for pair in pairs]
    cursor, found = Cursor(examples.__getitem__, 0, stop=len(examples)), []
    while (row := pack_row(cursor, Room(15)))["segment_ids"].any():
        batch = to_batch(row)
        assert batch["segment_ids_BT"].max() % 2 == 0
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            assert row["positions"][here].tolist() == list(range(here.sum()))
            found.append(BYTES.decode(row["tokens"][here]))
            # Every id of an answer is a target, in its own text.
            within = batch["segment_ids_BT"] == segment
            assert batch["weights_BT"][within].sum() == row["weights"][here].sum()
    assert found == ["p" + answer for _, *answers, _ in pairs for answer in answers]
