"""Tokenizer files: what is read beside them, and one line for everything that can be wrong."""

import base64
import json
import os
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.models.text import files
from puna.models.text.tokenizer import byte_tokenizer, load_tokenizer, train_bpe

TEXT = "The puna is the high grassland where llama herds live, 4000 metres up in the Andes."


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([TEXT], 300)


def tiktoken_ranks(count: int) -> bytes:
    pieces = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(1000)]
    lines = (base64.b64encode(piece) + b" %d" % i for i, piece in enumerate(pieces[:count]))
    return b"\n".join(lines) + b"\n"


def test_a_directory_prefers_what_puna_saved(bpe, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not read")
    bpe.save(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == bpe.vocab_size
    (tmp_path / "puna_tokenizer.json").unlink()
    assert load_tokenizer(str(tmp_path)).vocab_size == bpe.vocab_size
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.model"):
        load_tokenizer(tmp_path)


def test_files_beside_a_tokenizer_are_honoured(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "puna_tokenizer.json").unlink()
    write = lambda name, value: (tmp_path / name).write_text(json.dumps(value))  # noqa: E731
    write("tokenizer_config.json", {"eos_token": {"content": "<|eot|>"}, "pad_token": "<|none|>"})
    write("special_tokens_map.json", {"bos_token": "<|header_start|>"})
    eot, eom, patch = (bpe.special[f"<|{name}|>"] for name in ("eot", "eom", "patch"))
    write("generation_config.json", {"eos_token_id": [eot, patch], "bos_token_id": 3})
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_id == eot
    assert loaded.bos_id == bpe.special["<|header_start|>"]
    assert loaded.pad_id == bpe.special["<|pad|>"]  # the file's name is not in the vocabulary
    assert set(loaded.stop_ids) == {eot, eom, patch, bpe.eos_id}
    assert loaded.chat_template is None
    write("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "x"}]})
    assert load_tokenizer(tmp_path).chat_template == {"default": "x"}
    (tmp_path / "chat_template.jinja").write_text("y")
    assert load_tokenizer(tmp_path / "tokenizer.json").chat_template == "y"


def test_truncation_and_padding_of_a_file_are_ignored(bpe, tmp_path):
    content = json.loads(bpe._kind.data)
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).encode(TEXT) == bpe.encode(TEXT)


BAD_FILES = {
    "empty": (b"", "empty"),
    "blank": (b" \n\n", "empty"),
    "json": (b'{"model": ', "tokenizer.json"),
    "other json": (b'{"a": 1}', "tokenizer.json"),
    "binary": (bytes(range(256)) * 9, "neither"),
    "html": (b"<!doctype html><title>404</title>", "neither"),
    "protobuf": (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n", "neither"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "GGUF"),
    "few ranks": (tiktoken_ranks(300), "300 tiktoken ranks"),
    "cut ranks": (tiktoken_ranks(999)[:-4], "line 999|998 tiktoken"),
    "no bytes": (b"YQ== 0\nYg== 1\n", "single bytes"),
    "twice": (b"YQ== 0\nYQ== 1\n", "line 2"),
    "no rank": (b"YQ== 0\nYg==\n", "line 2"),
    "unigram": (
        b'{"version":"1.0","model":{"type":"Unigram","unk_id":0,"vocab":[["a",0.0]]}}',
        "Unigram",
    ),
    "no decoder": (b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[]}}', "deco"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gives_one_line_that_names_it(name, tmp_path):
    pytest.importorskip("tiktoken")
    pytest.importorskip("sentencepiece")
    data, reason = BAD_FILES[name]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(UserError, match=reason) as error:
        load_tokenizer(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@given(data=st.binary(min_size=1, max_size=80))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_an_error_and_never_a_crash(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError):
        load_tokenizer(tmp_path)


def test_missing_huge_and_odd_paths(tmp_path, monkeypatch):
    for path in (tmp_path / "none", tmp_path, "meta-llama/Llama-3", "a\0b"):
        with pytest.raises(UserError) as error:
            load_tokenizer(path)
        assert str(path).replace("\0", "\\x00") in str(error.value)
    with pytest.raises(UserError, match="NoneType"):
        load_tokenizer(None)
    (tmp_path / "tokenizer.model").write_bytes(b"a" * 100)
    monkeypatch.setattr(files, "_MAX_FILE_BYTES", 50)
    with pytest.raises(UserError, match="100 bytes"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "file, content",
    [
        ("puna_tokenizer.json", "{"),
        ("puna_tokenizer.json", "[]"),
        ("puna_tokenizer.json", '{"version": 9, "kind": "bytes"}'),
        ("tokenizer_config.json", "nonsense"),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", '{"chat_template": [3]}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("special_tokens_map.json", "[1]"),
        ("generation_config.json", '{"eos_token_id": 10000000}'),
        ("generation_config.json", '{"eos_token_id": "<|eot|>"}'),
        ("chat_template.json", ""),
    ],
)
def test_bad_files_beside_a_tokenizer(bpe, tmp_path, file, content):
    bpe.save(tmp_path)
    (tmp_path / "puna_tokenizer.json").unlink()
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "0"},
        {"stop_ids": [10**6]},
        {"stop_ids": 3},
        {"bos_id": "x"},
        {"chat_template": 3},
        {"kind": "bytes"},
        {"kind": ["x"]},
        {"pad_id": None, "version": 2},
    ],
)
def test_a_tampered_record_is_refused(bpe, tmp_path, change):
    bpe.save(tmp_path)
    path = tmp_path / "puna_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_an_interrupted_save_leaves_the_old_file(bpe, tmp_path, monkeypatch):
    byte_tokenizer().save(tmp_path)

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space"):
        patch.setattr(os, "replace", fails)
        bpe.save(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 259
    assert [path.name for path in tmp_path.iterdir()] == ["puna_tokenizer.json"]
    with pytest.raises(UserError, match="cannot save"):
        bpe.save(tmp_path / "puna_tokenizer.json")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_ranks(300))
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="pip install tiktoken"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)
