"""Meta's own tokenizer files, from the package llama-models: published ids and Meta's own code."""

import importlib.util
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.models.text import kinds
from puna.models.text.tokenizer import load_tokenizer, train_bpe

TEXTS = st.one_of(
    st.text(),
    st.text(alphabet=" \t\n\r\u00a0\u3000"),
    st.text(alphabet="aA1 '\u0301é\U0001f600\u200d<|>_sot/"),
    st.sampled_from(["", " ", "don't DON'T", "1234567", "<|eot_id|>", "<|eot|>", "\x00\x7f"]),
)


def meta_file(family: str) -> Path:
    pytest.importorskip("tiktoken")
    found = importlib.util.find_spec("llama_models")
    if found is None or found.origin is None:
        pytest.skip("llama-models is not installed")
    return Path(found.origin).parent / family / "tokenizer.model"


@pytest.fixture(scope="module", params=["llama3", "llama4"])
def meta(request):
    """(family, our tokenizer)."""
    return request.param, load_tokenizer(meta_file(request.param))


@pytest.fixture(scope="module")
def meta_pair(meta):
    """(our tokenizer, Meta's)."""
    family, ours = meta
    module = pytest.importorskip(f"llama_models.{family}.tokenizer")
    return ours, module.Tokenizer(meta_file(family))


def test_meta_tokenizers_have_their_published_ids(meta):
    name, tokenizer = meta
    special, greeting = tokenizer.special, tokenizer.encode("Hello world, 12345", bos=True)
    if name == "llama3":
        assert greeting == [128000, 9906, 1917, 11, 220, 4513, 1774]
        assert tokenizer.vocab_size == 128256
        assert tokenizer.stop_ids == (128001, 128008, 128009)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (128000, 128001, 128004)
        assert special["<|python_tag|>"] == 128010 and special["<|start_header_id|>"] == 128006
        assert special["<|reserved_special_token_245|>"] == 128255
    else:
        assert greeting == [200000, 19873, 3817, 24, 220, 7235, 2127]
        assert tokenizer.vocab_size == 202048
        assert tokenizer.stop_ids == (200001, 200007, 200008)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (200000, 200001, 200018)
        ids = {"header_start": 200005, "eot": 200008, "python_start": 200016, "patch": 200092}
        ids |= {"image_start": 200080, "tile_x_separator": 200084, "tile_y_separator": 200085}
        ids |= {"image": 200090, "reasoning_thinking_end": 201143}
        assert {name: special[f"<|{name}|>"] for name in ids} == ids
        assert max(special.values()) == 202047
    assert len(special) == tokenizer.vocab_size - tokenizer.bos_id


LONG = ["a" * 60_001, " " * 60_001, "ab " * 140_000, "x" * 26_000 + " " + "é" * 26_000]


@given(text=TEXTS)
def test_ids_equal_metas_own_tokenizer(meta_pair, text):
    ours, theirs = meta_pair
    assert ours.special == theirs.special_tokens
    ids = ours.encode(text)
    assert ids == theirs.encode(text, bos=False, eos=False)
    assert ours.token_bytes[ids].sum() == len(text.encode())
    assert ours.decode(ids) == theirs.decode(ids) == text


def test_long_texts_are_cut_where_meta_cuts_them(meta_pair):
    ours, theirs = meta_pair
    for text in LONG:
        assert ours.encode(text) == theirs.encode(text, bos=False, eos=False)


def test_a_long_text_halts_no_other_thread(monkeypatch):
    tokenizer, text = train_bpe(["the llama walks"], 280), "the llama " * 30_000
    ticks, ended = [], threading.Event()

    def tick():
        while not ended.wait(0.002):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    begun = time.monotonic()
    ids = tokenizer.encode(text)
    done = time.monotonic()
    ended.set()
    thread.join()
    assert sum(begun < t < done for t in ticks) > 3
    monkeypatch.setattr(kinds, "_LONG", len(text) + 1)
    assert tokenizer.encode(text) == ids == tokenizer.encode(text, allow_special=True)
