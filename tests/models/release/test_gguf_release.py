"""GGUF files of ours: every number comes back, the tokenizer gives its ids, llama.cpp's names."""

import json

import jax
import numpy as np
import pytest

import puna
from puna.configs.errors import UserError
from puna.models.release.convert import convert
from puna.models.text import hub
from puna.models.text.tokenizer import byte_tokenizer, load_tokenizer, train_bpe

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")


def leaves(path):
    _, params = puna.load(path)
    return jax.tree.leaves_with_path(params)


@pytest.mark.parametrize("name", ["llama1", "llama2", "llama3_1", "llama3_2", "biases"])
def test_every_number_comes_back(files, tmp_path, name):
    if name == "biases":
        config = files.model_config(files.TINY | {"attention_bias": "all", "mlp_bias": True})
        config_json = files.hf_table(config)[1]
        weights = files.random_tensors(files.hf_shapes(config))
    else:
        config_json, weights = files.hf_family(name)
    src = files.write_hf(tmp_path / "src", config_json, weights)
    convert(src, tmp_path / "m.gguf", to="gguf")
    model, _ = puna.load(src)
    again, _ = puna.load(tmp_path / "m.gguf")
    assert again.config == model.config
    for (path, a), (_, b) in zip(leaves(src), leaves(tmp_path / "m.gguf"), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b)), path


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2**-8), ("float16", 2**-10),
                                              ("q8_0", 1 / 127)])  # fmt: skip
def test_smaller_dtypes(files, tmp_path, dtype, bound):
    config_json, weights = files.hf_family("llama2")
    src = files.write_hf(tmp_path / "src", config_json, weights)
    convert(src, tmp_path / "m.gguf", to="gguf", dtype=dtype)
    assert (tmp_path / "m.gguf").stat().st_size < (src / "model.safetensors").stat().st_size
    for (path, a), (_, b) in zip(leaves(src), leaves(tmp_path / "m.gguf"), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.max(np.abs(a - b)) <= bound * np.max(np.abs(a)), path
        if "norm" in jax.tree_util.keystr(path):
            assert np.array_equal(a, b)


def with_tokenizer(files, folder, save):
    config_json, weights = files.hf_family("llama2")
    config_json = config_json | {"vocab_size": 720}
    rng = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = rng.normal(size=(720, weights[name].shape[1])).astype(np.float32)
    src = files.write_hf(folder, config_json, weights)
    save(src)
    return src


@pytest.mark.parametrize("name", ["bytes", "bpe", "llama3", "llama2", "chatml"])
def test_the_tokenizer_inside_gives_the_same_ids(files, table, tmp_path, name):
    save = {
        "bytes": byte_tokenizer().save,
        "bpe": lambda folder: train_bpe(table.corpus(), 700).save(folder),
        "llama3": table.byte_bpe,
        "llama2": lambda folder: table.sentencepiece(folder, {}),
        "chatml": table.chatml,
    }[name]
    src = with_tokenizer(files, tmp_path / "src", save)
    convert(src, tmp_path / "m.gguf", to="gguf")
    here, there = load_tokenizer(src), load_tokenizer(tmp_path / "m.gguf")
    assert here.begin_ids == there.begin_ids and here.eos_id == there.eos_id
    assert set(here.stop_ids) == set(there.stop_ids)
    for text in (*hub.PROBES, *table.texts(here.special, 90)):
        assert here.encode(text) == there.encode(text)
        assert here.encode(text, allow_special=True) == there.encode(text, allow_special=True)
    assert there.chat_template == here.chat_template
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert len(reader.get_field("tokenizer.ggml.tokens").data) == 720


def test_what_the_format_cannot_hold_is_refused(files, table, tmp_path):
    config_json, weights = files.hf_family("scout")
    src = files.write_hf(tmp_path / "scout", config_json, weights)
    with pytest.raises(UserError, match="llama.cpp has it so"):
        convert(src, tmp_path / "m.gguf", to="gguf")

    def odd(folder):
        table.byte_bpe(folder)
        made = json.loads((folder / "tokenizer.json").read_text())
        made["pre_tokenizer"]["use_regex"] = False
        (folder / "tokenizer.json").write_text(json.dumps(made))

    src = with_tokenizer(files, tmp_path / "odd", odd)
    with pytest.raises(UserError, match="no name for how this tokenizer splits words"):
        convert(src, tmp_path / "m.gguf", to="gguf")
    with pytest.raises(UserError, match="must be one of float32, float16, bfloat16, q8_0"):
        convert(src, tmp_path / "m.gguf", to="gguf", dtype="int4")
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))
