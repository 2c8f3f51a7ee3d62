"""From Hugging Face files onto devices: the right numbers, split, cast, and read once."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import puna
from puna.configs import schema
from puna.configs.errors import UserError
from puna.models.parallel import sharding
from puna.models.release.convert import convert
from puna.models.weights import huggingface, placing, tensors
from puna.models.weights.load import open_weights


def mesh(**axes):
    return sharding.make_mesh(schema.MeshConfig(data=-1, **axes))


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for path, x in jax.tree.leaves_with_path(found):
        y = wanted
        for key in path:
            y = y[key.key]
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), sharding.path_name(path))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
def test_loads_what_the_table_says(files, tiny, tmp_path, kind, shards):
    config, config_json, weights = tiny
    weights = {n: w.astype(files.NUMPY[kind]) for n, w in weights.items()}
    path = files.write_hf(tmp_path / "model", config_json, weights, shards)
    model, params = puna.load(path)
    assert model.config == dataclasses.replace(
        config, compute_dtype="float32", param_dtype="float32"
    )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    exact = {n: w.astype(np.float32) for n, w in weights.items()}
    assert_same(params, huggingface.to_puna(config, exact))


# Each device's part is read by itself; a leaf arrives in several pieces where they would be large.
@pytest.mark.parametrize(
    ("name", "pieces"), [("dense", False), ("dense", True), ("scout", True), ("vision", False)]
)
def test_every_split_gives_the_same(files, tmp_path, monkeypatch, name, pieces):
    if pieces:
        monkeypatch.setattr(placing, "_SMALL_BYTES", 0)
        monkeypatch.setattr(placing, "_CHUNK_BYTES", 100)
    fields = {"dense": files.TINY, "scout": files.SCOUT, "vision": files.VISION}[name]
    config = files.model_config(fields)
    weights = files.random_tensors(files.hf_shapes(config))
    path = files.write_hf(tmp_path, files.hf_table(config)[1], weights)
    opened = open_weights(path)
    assert opened.config == config
    one = placing.place(opened, sharding.make_mesh(schema.MeshConfig(), jax.devices()[:1]))
    axes = {"fsdp": 2, "tensor": 2} if name == "dense" else {"expert": 2, "fsdp": 2, "tensor": 2}
    params = placing.place(opened, mesh(**axes))
    assert_same(params, one)
    wanted = sharding.shardings(placing.abstract_params(config), mesh(**axes))
    for (path, x), place in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(wanted), strict=True
    ):
        assert x.sharding.is_equivalent_to(place, x.ndim), sharding.path_name(path)


def test_reads_each_byte_once(files, tiny, tmp_path, monkeypatch):
    _, config_json, weights = tiny
    path = files.write_hf(tmp_path, config_json, weights)
    read = []
    original = tensors.Mapped.__getitem__

    def counted(self, index):
        found = original(self, index)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(tensors.Mapped, "__getitem__", counted)
    puna.load(path, mesh=mesh(fsdp=4, tensor=2))
    assert sum(read) == sum(w.nbytes for w in weights.values())


def test_casts_while_loading(files, tiny, tmp_path):
    config, config_json, weights = tiny
    model, params = puna.load(files.write_hf(tmp_path, config_json, weights), dtype="bfloat16")
    assert model.config.param_dtype == model.config.compute_dtype == "bfloat16"
    half = {n: w.astype(jnp.bfloat16) for n, w in weights.items()}
    assert_same(params, huggingface.to_puna(config, half))


def test_every_other_name_of_the_same_model(files, tiny, tmp_path):
    """Old files with RoPE frequencies, tied ones that store the head, the multimodal prefix."""
    config, config_json, weights = tiny
    old = weights | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(3)
    }
    _, params = puna.load(files.write_hf(tmp_path / "old", config_json, old))
    assert_same(params, huggingface.to_puna(config, weights))

    tied_json = config_json | {"tie_word_embeddings": True}
    tied = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    model, params = puna.load(files.write_hf(tmp_path / "tied", tied_json, tied))
    assert model.config.tie_embeddings and "unembed" not in params

    scout = files.model_config(files.SCOUT)
    weights = files.random_tensors(files.hf_shapes(scout))
    config_json = files.hf_table(scout)[1]
    outer = {"model_type": "llama4", "text_config": config_json}
    prefixed = {f"language_model.{n}": w for n, w in weights.items()}
    _, params = puna.load(files.write_hf(tmp_path / "prefix", outer, prefixed))
    assert_same(params, huggingface.to_puna(scout, weights))


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_a_head_of_its_own_counts_whatever_the_config_says(files, tiny, tmp_path, capsys, prefix):
    """As in transformers; and it is the same model after a release and as a run."""
    if prefix:
        config = files.model_config(files.SCOUT)
        config_json = files.hf_table(config)[1] | {"tie_word_embeddings": True}
        tied_json = {"model_type": "llama4", "text_config": config_json}
        weights = files.random_tensors(files.hf_shapes(config))
    else:
        config, config_json, weights = tiny
        tied_json = config_json | {"tie_word_embeddings": True}
    named = {prefix + n: w for n, w in weights.items()}
    path = files.write_hf(tmp_path / "model", tied_json, named)
    model, params = puna.load(path)
    assert f"{prefix}lm_head.weight differs from the embedding" in capsys.readouterr().err
    assert not model.config.tie_embeddings
    assert_same(params, huggingface.to_puna(config, weights))
    for to in ("hf", "puna"):
        convert(path, tmp_path / to, to=to)
        again, found = puna.load(tmp_path / to)
        assert not again.config.tie_embeddings
        assert_same(found, huggingface.to_puna(config, weights))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("stored", [EMBEDDING, HEAD, "both"])
def test_tied_is_tied_whichever_is_stored(files, tiny, tmp_path, capsys, stored, dtype):
    config, config_json, weights = tiny
    table = weights[EMBEDDING].astype(jnp.bfloat16)
    rest = {n: w for n, w in weights.items() if n not in (HEAD, EMBEDDING)}
    # Equal numbers of two dtypes are equal.
    have = {EMBEDDING: table, HEAD: table.astype(dtype)}
    have = have if stored == "both" else {stored: have[stored]}
    path = files.write_hf(tmp_path, config_json | {"tie_word_embeddings": True}, rest | have)
    model, params = puna.load(path)
    assert model.config.tie_embeddings and "unembed" not in params and not capsys.readouterr().err
    np.testing.assert_array_equal(params["embed"]["table_VD"], table.astype(np.float32))


def test_no_head_where_the_config_has_one(files, tiny, tmp_path):
    """transformers makes one up, at random."""
    _, config_json, weights = tiny
    weights = {n: w for n, w in weights.items() if n != HEAD}
    with pytest.raises(UserError, match="lm_head.weight is missing.* tie_word_embeddings=true"):
        puna.load(files.write_hf(tmp_path, config_json, weights))


def test_of_two_formats_in_a_folder_the_whole_one(files, tiny, tmp_path, capsys):
    config, config_json, weights = tiny
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    with pytest.raises(UserError, match="has none of model.safetensors, .*: save tf_model.h5 as"):
        puna.load(tmp_path)
    for i in range(2):
        (tmp_path / f"{i}.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds 2 GGUF files: give one of them"):
        puna.load(tmp_path)
    params = {
        "dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64,
        "multiple_of": 8, "ffn_dim_multiplier": 0.38, "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(params))
    (tmp_path / "consolidated.00.pth").write_bytes(
        files.torch_bytes(files.to_meta(config, weights))
    )
    _, found = puna.load(tmp_path)
    assert_same(found, huggingface.to_puna(config, weights))
    assert not capsys.readouterr().err
    other = {n: w + 1 for n, w in weights.items()}
    files.write_hf(tmp_path, config_json, other)
    _, found = puna.load(tmp_path)
    assert_same(found, huggingface.to_puna(config, other))
    ignored = "0.gguf, 1.gguf, consolidated.00.pth, tf_model.h5"
    assert f"model.safetensors is read; ignored beside it: {ignored}\n" in capsys.readouterr().err
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "consolidated.pth").write_bytes(b"x")
    with pytest.raises(UserError, match="has both consolidated.pth and consolidated.00.pth"):
        puna.load(tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_files_of_torch_save(files, tiny, tmp_path, shards):
    config, config_json, weights = tiny
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    place = {}
    for i in range(shards):
        mine = list(weights)[i::shards]
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05}-of-00003.bin"
        place |= dict.fromkeys(mine, name)
        (tmp_path / name).write_bytes(files.torch_bytes({n: weights[n] for n in mine}))
    if shards > 1:
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": place}))
    (tmp_path / "old.gguf").write_bytes(b"GGUF")
    _, found = puna.load(tmp_path)
    assert_same(found, huggingface.to_puna(config, weights))
    if shards > 1:
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=f"index.json: names {name}, which is missing"):
            puna.load(tmp_path)
        index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "../x.bin")}))
        with pytest.raises(UserError, match="must be the plain name of a .bin file"):
            puna.load(tmp_path)


@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_warns_of_what_is_no_number(files, tiny, tmp_path, capsys, kind, value):
    _, config_json, weights = tiny
    weights = {n: w.astype(files.NUMPY[kind]) for n, w in weights.items()}
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 4] = value
    _, params = puna.load(files.write_hf(tmp_path, config_json, weights))
    err = capsys.readouterr().err
    assert err == f"puna: warning: {tmp_path}: NaN or infinity in {name}\n"
    assert np.isnan(value) == np.isnan(params["blocks"]["layer_0"]["mlp"]["w_up_DF"][1, 4, 3])


def test_shows_no_bar_in_a_log(files, tiny, tmp_path, capfd):
    _, config_json, weights = tiny
    puna.load(files.write_hf(tmp_path, config_json, weights))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_follows_the_links_of_a_download_cache(files, tiny, tmp_path):
    config, config_json, weights = tiny
    path = files.write_hf(tmp_path / "blobs", config_json, weights)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in path.iterdir():
        (linked / file.name).symlink_to(file)
    _, params = puna.load(linked)
    assert_same(params, huggingface.to_puna(config, weights))


@pytest.mark.parametrize(
    ("arrange", "words"),
    [
        (lambda p: p / "nowhere", "no such file or directory"),
        (lambda p: p, "is neither a run of puna"),
        (lambda p: (p / "x.bin").write_bytes(b"x") and p / "x.bin", "is not a GGUF file"),
        (lambda p: (p / "adapter_config.json").write_text("{}") and p, "an adapter of PEFT alone"),
        (lambda p: 7, "a path is text"),
    ],
)
def test_says_what_is_not_a_model(tmp_path, arrange, words):
    with pytest.raises(UserError, match=words):
        puna.load(arrange(tmp_path))


def test_a_split_that_does_not_fit_is_an_error(files, tiny, tmp_path):
    _, config_json, weights = tiny
    path = files.write_hf(tmp_path, config_json, weights)
    with pytest.raises(UserError, match="must be a multiple of mesh.tensor=8"):
        puna.load(path, mesh=mesh(tensor=8))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["written twice", "a head of its own", "only the head"])
def test_logits_are_those_of_transformers(tmp_path, case):
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    def save(seed, **options):
        torch.manual_seed(seed)
        sizes = {
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        }  # fmt: skip
        config = LlamaConfig(**sizes, tie_word_embeddings=case != "written twice")
        LlamaForCausalLM(config).save_pretrained(tmp_path, **options)

    if case == "written twice":
        save(0, max_shard_size="20KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
    save(1)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if case == "a head of its own":
        tensors[HEAD] = torch.flip(tensors[EMBEDDING], (0,))
    if case == "only the head":
        tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, file, {"format": "pt"})
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits.numpy()
    model, params = puna.load(tmp_path)
    found = model.apply({"params": params}, ids.numpy()).logits_BTV
    np.testing.assert_allclose(found, wanted, atol=2e-5)
