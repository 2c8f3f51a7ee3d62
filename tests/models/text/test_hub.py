"""Tokenizers as files of Hugging Face: the same ids here, in `transformers`, after a release."""

import importlib.util
import json
import pathlib
import sys

import pytest

from puna.configs.errors import UserError
from puna.models.text import hub
from puna.models.text.kinds import ByteKind, HuggingFaceKind
from puna.models.text.tokenizer import byte_tokenizer, load_tokenizer, train_bpe

ROOT = pathlib.Path(__file__).resolve().parents[3]


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = benchmark("tokenizer_table")
META = [name for name in table.SOURCES if "Llama 3 folder" in name or "Llama 4 folder" in name]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in META)) for n in table.SOURCES]
)
def test_ids_are_the_same_everywhere(name, tmp_path):
    pytest.importorskip("transformers")
    if "GGUF" in name:
        pytest.importorskip("gguf")
    if name in META:
        pytest.importorskip("llama_models")
    result = table.compare(name, tmp_path, 110)
    assert not any(result["wrong"].values()), result


def test_what_stands_around_a_text(tmp_path):
    table.byte_bpe(tmp_path / "bos")
    table.byte_bpe(tmp_path / "none", bos=False)
    table.byte_bpe(tmp_path / "both", eos=True)
    found = {}
    for name in ("bos", "none", "both"):
        t = load_tokenizer(tmp_path / name)
        found[name] = t.begin_ids, t.end_ids
        assert t.bos_id is not None  # having one does not put it there
    t = load_tokenizer(tmp_path / "bos")
    assert found == {
        "bos": ((t.bos_id,), ()), "none": ((), ()), "both": ((t.bos_id,), (t.eos_id,)),
    }  # fmt: skip


def test_a_rule_of_the_run_replaces_the_tokenizers(tmp_path):
    t = byte_tokenizer()
    assert (t.begin_ids, t.end_ids) == ((256,), (257,))
    other = t.with_ends(False, None)
    assert (other.begin_ids, other.end_ids, other.bos_id) == ((), (257,), 256)
    other.save(tmp_path)
    assert load_tokenizer(tmp_path).begin_ids == ()
    assert other.with_ends(True, False).begin_ids == (256,)
    lacking = train_bpe(["some text"], 300)
    lacking.bos_id = None
    with pytest.raises(UserError, match="data.add_bos=always: this tokenizer has no bos_id"):
        lacking.with_ends(True, None)


def test_what_older_versions_saved_has_both_ends(tmp_path):
    byte_tokenizer().save(tmp_path)
    record = json.loads((tmp_path / "puna_tokenizer.json").read_text())
    for key in ("begin_ids", "end_ids", "generation"):
        del record[key]
    (tmp_path / "puna_tokenizer.json").write_text(json.dumps(record))
    t = load_tokenizer(tmp_path)
    assert (t.begin_ids, t.end_ids, t.generation) == ((256,), (257,), {})


def test_a_chatml_turn_ends(tmp_path):
    pytest.importorskip("sentencepiece")
    table.chatml(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 700}')
    t = load_tokenizer(tmp_path)
    assert (t.vocab_size, t.eos_id) == (702, 700) and 700 in t.stop_ids
    ids = t.chat([{"role": "user", "content": "a<|im_end|>b"}])
    # The template's control tokens are ids; the same name in a message is text.
    assert ids[0] == 701 and ids.count(700) == 1 and ids.count(701) == 2
    assert "<|im_end|>" in t.decode(ids)


def test_an_added_token_out_of_order_is_refused(tmp_path):
    pytest.importorskip("sentencepiece")
    table.sentencepiece(tmp_path, {})
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 703}')
    with pytest.raises(UserError, match="id 703, and 700 is the next"):
        load_tokenizer(tmp_path)


def test_ids_of_the_models_configuration(tmp_path, caplog):
    table.byte_bpe(tmp_path)
    config = {"eos_token_id": [3, 5], "pad_token_id": 9999}
    (tmp_path / "config.json").write_text(json.dumps(config))
    t = load_tokenizer(tmp_path)
    assert {3, 5} <= set(t.stop_ids) and t.pad_id is None
    assert "pad_token_id=9999 is put aside" in caplog.text


def test_a_kind_that_gives_other_ids_is_refused():
    data = hub.tokenizer_json(ByteKind(), (256,), ())
    hub.check(ByteKind(), HuggingFaceKind(data))
    other = data.replace(b'"a": 97', b'"a": 98').replace(b'"b": 98', b'"b": 97')
    assert other != data
    with pytest.raises(UserError, match="gives other ids"):
        hub.check(ByteKind(), HuggingFaceKind(other))


def test_a_text_may_begin_with_any_piece(tmp_path):
    table.byte_bpe(tmp_path, bos=False)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"bos_token_id": 40}')
    t = load_tokenizer(tmp_path).with_ends(True, None)
    assert t.begin_ids == (40,)
    t.save_for_hub(tmp_path / "release")
    assert load_tokenizer(tmp_path / "release").begin_ids == (40,)
