"""Tokenizers: the same promises for every kind, then each kind against an independent reference."""

import base64
import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.models.text import kinds
from puna.models.text import tokenizer as tokenizer_module
from puna.models.text.tokenizer import (
    BPE_SPECIAL,
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    train_bpe,
)

CORPUS = [
    "The puna is the high grassland where llama herds live, 4000 metres up in the Andes.",
    "Las llamas viven en la puna; el ñandú también. ¿Cuántas hay? 12345 o más.",
    "ラマはアンデス山脈の高地に住んでいる。 高地 高地 高地",
    "for i in range(1000):\n    print(i, i * i)\n\n\nif x != y:\n\treturn None\n",
] * 4
# Each shape of text that some tokenizer has been known to change.
TEXTS = st.one_of(
    st.text(),
    st.text(alphabet=" \t\n\r\u00a0\u3000"),
    st.text(alphabet="aA1 '\u0301é\U0001f600\u200d<|>_sot"),
    st.sampled_from(["", " ", "don't DON'T", "1234567", "<|eot_id|>", "\x00\x7f", "<0x41>", "<s>"]),
)
function_scoped = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def corpus_bpe():
    return train_bpe(CORPUS, 400)


def sentencepiece_like():
    """A tokenizer.json in the form that Llama 1 and 2 were converted to."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "th", "the", "\u2581the", "\u2581\u2581"]
    model = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "\u2581")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return Tokenizer.from_tokenizers(model)


def sentencepiece_model() -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return written.getvalue()


def tiktoken_ranks(count: int) -> bytes:
    """A file of the right size and form: the bytes, then pairs, then triples."""
    pieces = [bytes([i]) for i in range(256)]
    pieces += [bytes([i // 256, i % 256]) for i in range(65536)]
    pieces += [b"the", *(bytes([255, i // 256 % 256, i % 256]) for i in range(65536))]
    pieces += [bytes([254, 254 - i // 65536, i // 256 % 256, i % 256]) for i in range(131072)]
    lines = (base64.b64encode(piece) + b" %d" % i for i, piece in enumerate(pieces[:count]))
    return b"\n".join(lines) + b"\n"


def tiktoken_kind():
    pytest.importorskip("tiktoken")
    return Tokenizer(kinds.TiktokenKind(tiktoken_ranks(128_000)))


MAKERS = {
    "bytes": byte_tokenizer,
    "bpe": corpus_bpe,
    "sentencepiece_like": sentencepiece_like,
    "sentencepiece": lambda: Tokenizer(kinds.SentencePieceKind(sentencepiece_model())),
    "tiktoken": tiktoken_kind,
}
BYTE_LEVEL = {"bytes", "bpe", "tiktoken"}


@pytest.fixture(scope="module", params=MAKERS)
def kind(request):
    return request.param, MAKERS[request.param]()


@pytest.fixture(scope="module")
def bpe():
    return corpus_bpe()


# -- promises of every kind


@given(text=TEXTS)
def test_decode_undoes_encode(kind, text):
    _, tokenizer = kind
    if tokenizer.decode(tokenizer.encode("\u2581")) != "\u2581":
        text = text.replace("\u2581", "")  # SentencePiece's own sign for a space
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@given(text=TEXTS)
def test_token_bytes_count_the_text(kind, text):
    name, tokenizer = kind
    ids = tokenizer.encode(text)
    added = 0 if name in BYTE_LEVEL or not text else 1  # SentencePiece's leading space
    if name in BYTE_LEVEL or "\u2581" not in text:
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + added
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.int32
    assert not tokenizer.token_bytes[list(tokenizer.special.values())].any()


@given(text=TEXTS, data=st.data())
def test_text_never_becomes_a_control_token(kind, text, data):
    _, tokenizer = kind
    names = st.sampled_from(sorted(tokenizer.special))
    text = data.draw(names) + text + data.draw(names)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == text.replace(
        "\u2581", tokenizer.decode(tokenizer.encode("\u2581"))
    )


def test_control_tokens_are_read_only_when_asked(kind):
    _, tokenizer = kind
    for name in list(tokenizer.special)[:20]:
        ids = tokenizer.encode(f"a{name}b", allow_special=True)
        assert ids.count(tokenizer.special[name]) == 1
        parts = (tokenizer.encode("a"), [tokenizer.special[name]], tokenizer.encode("b"))
        assert ids == [i for part in parts for i in part]
        assert tokenizer.decode(ids, show_special=True).replace(" ", "") == f"a{name}b"


def test_encode_puts_bos_and_eos(kind):
    _, tokenizer = kind
    ids = tokenizer.encode("hello")
    assert tokenizer.encode("hello", bos=True, eos=True) == [
        tokenizer.bos_id,
        *ids,
        tokenizer.eos_id,
    ]
    assert tokenizer.eos_id in tokenizer.stop_ids


@given(data=st.data())
def test_any_ids_decode(kind, data):
    _, tokenizer = kind
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    text = tokenizer.decode(ids)
    assert text == tokenizer.decode_bytes(ids).decode(errors="replace")
    assert len(tokenizer.decode_bytes(ids, continuation=True)) == tokenizer.token_bytes[ids].sum()
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids, continuation=True)


def test_a_stream_holds_back_half_a_character():
    tokenizer = byte_tokenizer()
    assert list(tokenizer.decode_stream(tokenizer.encode("aé漢"))) == ["a", "é", "漢"]
    assert list(tokenizer.decode_stream(iter([0xE6, 0xBC]))) == ["\ufffd"]


def test_decode_takes_arrays_and_names_bad_ids(kind):
    _, tokenizer = kind
    ids = tokenizer.encode("hello")
    assert tokenizer.decode(np.array(ids, np.int32)) == tokenizer.decode(iter(ids)) == "hello"
    assert tokenizer.decode([]) == tokenizer.decode(np.zeros(0, np.int32)) == ""
    for bad in ([-1], [0, tokenizer.vocab_size], [2**70]):
        with pytest.raises(UserError, match=str(bad[-1])):
            tokenizer.decode(bad)
    for bad in ([0.5], [[1]], 3, "text", [None], [[1], [2, 3]], [True]):
        with pytest.raises(UserError, match="flat list"):
            tokenizer.decode(bad)
    with pytest.raises(UserError, match="string"):
        tokenizer.encode(b"bytes")


def test_lone_surrogates_become_replacement_characters(kind):
    _, tokenizer = kind
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"


def same(a: Tokenizer, b: Tokenizer) -> bool:
    texts = [*CORPUS[:4], "<|eot|><s>\x00 \u00e9"]
    return (
        a._settings() == b._settings()
        and a.special == b.special
        and np.array_equal(a.token_bytes, b.token_bytes)
        and [a.encode(t, allow_special=True) for t in texts]
        == [b.encode(t, allow_special=True) for t in texts]
        and [a.encode(t) for t in texts] == [b.encode(t) for t in texts]
    )


def test_it_travels_by_save_and_by_pickle(kind, tmp_path):
    name, tokenizer = kind
    again = Tokenizer(
        tokenizer._kind, bos_id=3, pad_id=5, stop_ids=[7], chat_template={"default": "é"}
    )
    for each in (again,) if name == "tiktoken" else (again, tokenizer):
        each.save(tmp_path / "new")
        assert same(load_tokenizer(tmp_path / "new"), each)
        assert same(load_tokenizer(tmp_path / "new" / "puna_tokenizer.json"), each)
        assert same(pickle.loads(pickle.dumps(each)), each)


# -- training


def test_training_gives_the_size_asked_for(bpe):
    assert bpe.vocab_size == 400
    assert bpe.special == {name: 387 + i for i, name in enumerate(BPE_SPECIAL)}
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id) == (387, 388, 389)
    assert set(bpe.stop_ids) == {bpe.special[f"<|{n}|>"] for n in ("end_of_text", "eot", "eom")}
    assert train_bpe(["ab"], 269).vocab_size == 269
    assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0]) / 2


def test_training_on_too_little_says_so(caplog):
    tokenizer = train_bpe(iter(["abab", ""]), 1000)
    assert 269 < tokenizer.vocab_size < 280
    assert "not 1000" in caplog.text


def test_digits_are_grouped_by_three_at_most():
    tokenizer = train_bpe(["123456789 " * 50], 300)
    assert max(tokenizer.token_bytes) <= 3
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == ["123", "456", "7"]


def test_training_is_deterministic(bpe):
    code = (
        f"from puna.models.text.tokenizer import train_bpe\nimport hashlib\n"
        f"print(hashlib.sha256(train_bpe({CORPUS!r}, 400)._kind.data).hexdigest())"
    )
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH", "")]))
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed, **threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", {}), ("2", {"TOKENIZERS_PARALLELISM": "false"}))
    }
    assert len(runs) == 1


@pytest.mark.parametrize(
    "texts, size, reason",
    [
        ([], 300, "no text"),
        (["", ""], 300, "no text"),
        (["abc"], 268, "at least 269"),
        (["abc"], -1, "at least 269"),
        ([b"abc"], 300, "not bytes"),
        (["abc", None], 300, "not NoneType"),
    ],
)
def test_training_refuses(texts, size, reason):
    with pytest.raises(UserError, match=reason):
        train_bpe(texts, size)


def test_errors_of_the_corpus_are_not_swallowed():
    def broken():
        yield "abc"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        train_bpe(broken(), 300)


# -- against independent references


def test_sentencepiece_agrees_with_its_library():
    sentencepiece = pytest.importorskip("sentencepiece")
    data = sentencepiece_model()
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = Tokenizer(kinds.SentencePieceKind(data))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    for text in [*CORPUS, "", " ", "  two", "\n", "<s>"]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode([1, *ids, 2]) == reference.decode([1, *ids, 2])
        assert tokenizer.decode([*ids, 2, 1, *ids]) == reference.decode([*ids, 2, 1, *ids])


def test_continuations_keep_their_space():
    tokenizer = sentencepiece_like()
    ids = tokenizer.encode("the the")
    assert tokenizer.decode(ids[:1]) == "the"
    assert tokenizer.decode(ids[1:], continuation=True) == " the"


def test_the_post_processor_names_bos(tmp_path):
    tokenizer = sentencepiece_like()
    tokenizer.save(tmp_path)
    for extra in ("puna_tokenizer.json", "tokenizer_config.json"):
        (tmp_path / extra).unlink()
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, None)


def test_huggingface_files_agree_with_their_library(bpe):
    import tokenizers

    for tokenizer in (bpe, sentencepiece_like()):
        reference = tokenizers.Tokenizer.from_buffer(tokenizer._kind.data)
        for text in [*CORPUS, "", "  two", "<s> a </s> <|eot|> b"]:
            expected = reference.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, allow_special=True) == expected
            assert tokenizer.decode(expected) == reference.decode(expected)


def test_a_saved_bpe_works_in_transformers(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe.save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS[:4]:
        assert reference(text)["input_ids"] == bpe.encode(text, bos=True)
    assert reference.pad_token_id == bpe.pad_id and len(reference) == bpe.vocab_size


def test_a_byte_level_run_needs_no_library():
    code = (
        "import sys\nfrom puna.models.text.tokenizer import byte_tokenizer\n"
        "byte_tokenizer().encode('x')\n"
        "print({'tokenizers', 'tiktoken', 'sentencepiece', 'transformers'} & set(sys.modules))"
    )
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH", "")]))
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "set()", run.stderr


def test_from_tokenizers_takes_settings(bpe):
    import tokenizers

    made = Tokenizer.from_tokenizers(
        tokenizers.Tokenizer.from_buffer(bpe._kind.data), eos_id=5, stop_ids=[6], chat_template="t"
    )
    assert made.eos_id == 5 and {5, 6} <= set(made.stop_ids) and made.chat_template == "t"
    assert tokenizer_module.Tokenizer is type(made)
