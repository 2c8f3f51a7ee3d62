"""`puna convert`: every bit comes back, a release is whole, and licences are kept."""

import json
import logging
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import puna
from puna import __main__ as cli
from puna.configs import schema
from puna.configs.errors import UserError
from puna.models.release.convert import SHARD_BYTES, convert
from puna.models.text import tokenizer as tokenizers
from puna.models.weights import licences, run, tensors
from puna.models.weights.load import open_weights

FAMILIES = (
    "llama1",
    "llama2",
    "llama3_1",
    "llama3_2",
    "scout",
    "maverick",
    "top2",
    "vision",
    "cross",
)


def source(files, folder, name, kind="F32", shards=1):
    config_json, weights = files.hf_family(name)
    weights = {n: w.astype(files.NUMPY[kind]) for n, w in weights.items()}
    return files.write_hf(folder, config_json, weights, shards)


@pytest.fixture
def model(files, tiny, tmp_path):
    """A Hugging Face directory with a tokenizer."""
    _, config_json, weights = tiny
    path = files.write_hf(tmp_path / "src", config_json, weights)
    tokenizer = {
        "version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2},
                                    "merges": []},
        "added_tokens": [{"id": 2, "content": "</s>", "special": True, "single_word": False,
                          "lstrip": False, "rstrip": False, "normalized": False}],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
    }  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "{{ 1 }}"}')
    return path


# --- every bit ----------------------------------------------------------------------------------


# Maverick has a layer of every kind that scout and top2 have.
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if x in ("scout", "top2") else []) for x in FAMILIES],
)
def test_hugging_face_to_puna_and_back(files, tmp_path, name):
    """Through a run on disk and back into several shards, and straight from one to the other."""
    for kind in ("F32", "BF16"):
        folder = tmp_path / kind
        src = source(files, folder / "src", name, kind, shards=2)
        original = files.read_safetensors(src)
        convert(src, folder / "direct")
        assert files.read_safetensors(folder / "direct") == original
        if kind == "F32" and name in ("maverick", "scout", "top2", "vision", "cross"):
            continue  # seconds each
        convert(src, folder / "run", to="puna")
        convert(folder / "run", folder / "back", shard_bytes=30_000)
        assert files.read_safetensors(folder / "back") == original
        assert open_weights(folder / "back").config == open_weights(src).config


def test_dtypes_may_differ_from_tensor_to_tensor(files, tiny, tmp_path):
    _, config_json, weights = tiny
    kinds = {"norm": "F32", "mlp": "F16"}
    mixed = {
        n: w.astype(files.NUMPY[next((k for part, k in kinds.items() if part in n), "BF16")])
        for n, w in weights.items()
    }
    src = files.write_hf(tmp_path / "src", config_json, mixed)
    convert(src, tmp_path / "run", to="puna")
    convert(tmp_path / "run", tmp_path / "back")
    assert files.read_safetensors(tmp_path / "back") == files.read_safetensors(src)
    _, params = puna.load(tmp_path / "run")
    assert all(x.dtype == "float32" for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_one_dtype_for_all(files, tiny, tmp_path, name):
    """Straight, into a run, and out of one: each tensor is the nearest in that dtype."""
    _, config_json, weights = tiny
    mixed = {n: w.astype(files.NUMPY["BF16" if "mlp" in n else "F32"]) for n, w in weights.items()}
    src = files.write_hf(tmp_path / "src", config_json, mixed)
    expected = {n: w.astype(name).tobytes() for n, w in mixed.items()}
    convert(src, tmp_path / "direct", dtype=name)
    convert(src, tmp_path / "run", to="puna", dtype=name)
    convert(tmp_path / "run", tmp_path / "back")
    convert(src, tmp_path / "exact", to="puna")
    cli._run(["convert", f"{tmp_path}/exact", f"{tmp_path}/late", f"--dtype={name}"])
    for folder in ("direct", "back", "late"):
        found = files.read_safetensors(tmp_path / folder)
        assert {n: data for n, (_, _, data) in found.items()} == expected
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == name
    half = run.read_config(run.find(tmp_path / "run")).model.param_dtype
    assert half == ("bfloat16" if name == "bfloat16" else "float32")


def test_what_a_dtype_cannot_hold_is_refused(files, tiny, tmp_path):
    _, config_json, weights = tiny
    weights = weights | {"model.norm.weight": np.full(32, 7e4, np.float32)}
    src = files.write_hf(tmp_path / "src", config_json, weights)
    convert(src, tmp_path / "run", to="puna")
    for where, to in ((src, "hf"), (src, "puna"), (tmp_path / "run", "hf")):
        with pytest.raises(UserError, match="norm.* has values beyond 65504, the .* of float16"):
            convert(where, tmp_path / "out", to=to, dtype="float16")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="dtype='float64' must be one of bfloat16, float16, flo"):
        convert(src, tmp_path / "out", dtype="float64")
    # What was infinite before is no fault of the dtype.
    weights |= {"model.norm.weight": np.full(32, np.inf, np.float32)}
    convert(files.write_hf(tmp_path / "inf", config_json, weights), tmp_path / "o", dtype="float16")


def test_rows_are_cast_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(tensors, "_CAST_BYTES", 32)
    x = np.arange(35, dtype=np.float32).reshape(7, 5) / 3
    assert np.array_equal(tensors.cast(x, tensors.BFLOAT16, "x"), x.astype(tensors.BFLOAT16))
    x[6, 4] = -1e9
    with pytest.raises(UserError, match="x has values beyond"):
        tensors.cast(x, np.dtype(np.float16), "x")


def test_what_orbax_logs_is_not_shown(model, tmp_path, monkeypatch, caplog):
    save, logger = ocp.CheckpointManager.save, logging.getLogger("absl")
    before = logger.level

    def noisy(*args, **kwargs):
        logger.warning("as usual")
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", noisy)
    convert(model, tmp_path / "run", to="puna")
    assert "as usual" not in caplog.text and logger.level == before
    logger.warning("of others")
    assert "of others" in caplog.text


def test_a_converted_run_loads_like_its_source(files, model, tmp_path):
    convert(model, tmp_path / "run", to="puna")
    for dtype in ("float32", "bfloat16"):
        a, b = (puna.load(path, dtype=dtype)[1] for path in (model, tmp_path / "run"))
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))
    tokenizer = puna.load_tokenizer(tmp_path / "run")
    assert (tokenizer.eos_id, tokenizer.chat_template) == (2, "{{ 1 }}")
    with pytest.raises(UserError, match="is a run of puna already"):
        convert(tmp_path / "run", tmp_path / "again", to="puna")


def test_meta_to_hugging_face(files, tiny, tmp_path):
    config, _, weights = tiny
    (tmp_path / "meta").mkdir()
    params = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64,
              "multiple_of": 8, "norm_eps": 1e-5, "rope_theta": 500000.0,
              "ffn_dim_multiplier": 0.38}  # fmt: skip
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    data = files.torch_bytes(files.to_meta(config, weights))
    (tmp_path / "meta" / "consolidated.00.pth").write_bytes(data)
    convert(tmp_path / "meta", tmp_path / "hf")
    found = files.read_safetensors(tmp_path / "hf")
    assert {n: data for n, (_, _, data) in found.items()} == {
        n: w.tobytes() for n, w in weights.items()
    }


# --- a release ----------------------------------------------------------------------------------


def test_a_release_is_whole(files, model, tmp_path):
    convert(model, tmp_path / "out", shard_bytes=20_000)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    shards = sorted(n for n in names if n.endswith(".safetensors"))
    assert names - set(shards) == {
        "config.json", "generation_config.json", "README.md", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert all((tmp_path / "out" / s).stat().st_size < 22_000 for s in shards)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        len(data) for _, _, data in files.read_safetensors(tmp_path / "out").values()
    )
    config_json = json.loads((tmp_path / "out/config.json").read_text())
    assert (config_json["eos_token_id"], config_json["dtype"]) == (2, "float32")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": None}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert "# out\n" in card and "Base model: unknown" in card
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_the_card_of_a_run_says_what_it_saw(files, model, tmp_path):
    from puna.models.release import card

    (tmp_path / "run/eval").mkdir(parents=True)
    (tmp_path / "run/results.json").write_text('{"loss": 1.25, "energy_kwh": 0.5}')
    (tmp_path / "run/eval/results.json").write_text('{"bits_per_byte": 0.75}')
    config = schema.to_dict(schema.Config(data=schema.DataConfig(train="tfds:wiki")))
    read = [{"source": "tfds:wiki", "licence": "cc-by-sa-4.0", "tokens": 1234567}]
    meta = {"config": config, "data": {"0": {}}, "origin": {"init_from": {"path": "base"}},
            "provenance": read}  # fmt: skip
    facts = card.facts_of_run(tmp_path / "run", meta)
    origin = {"base_model": "unknown", "licence": "unknown", "files": {}}
    card.write(tmp_path, "mine", schema.ModelConfig(), origin, facts)
    text = (tmp_path / "README.md").read_text()
    assert "Training data: tfds:wiki" in text and "Started from: base" in text
    assert "| `tfds:wiki` | cc-by-sa-4.0 | 1,234,567 |" in text
    evaluation, energy = text.split("## Energy")
    assert "- loss: 1.25" in evaluation and "- bits_per_byte: 0.75" in evaluation
    assert "- energy_kwh: 0.5" in energy and "energy" not in evaluation.split("## Evaluation")[1]


def test_a_tokenizer_of_ours_goes_along(files, tiny, tmp_path):
    _, config_json, weights = tiny
    src = files.write_hf(tmp_path / "src", config_json, weights)
    tokenizers.byte_tokenizer().save(src)
    convert(src, tmp_path / "run", to="puna")
    convert(tmp_path / "run", tmp_path / "out")
    assert puna.load_tokenizer(tmp_path / "out").encode("a") == [97]
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


# --- the destination ----------------------------------------------------------------------------


def test_a_destination_in_use_is_refused(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(UserError, match="is in use"):
        convert(model, tmp_path / "out")
    with pytest.raises(UserError, match="is in use"):
        convert(model, model)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out/mine").unlink()
    cli._run(["convert", str(model), str(tmp_path / "out"), "--to=hf"])
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("to", ["hf", "puna"])
def test_what_fails_half_way_leaves_nothing(model, tmp_path, monkeypatch, to):
    calls = []
    original = tensors.Weights.read

    def failing(self, source, index=None):
        calls.append(source.name)
        if len(calls) > 5:
            raise OSError("No space left on device")
        return original(self, source, index)

    monkeypatch.setattr(tensors.Weights, "read", failing)
    with pytest.raises(OSError, match="No space left"):
        convert(model, tmp_path / "deep" / "out", to=to)
    assert len(calls) > 5 and not list((tmp_path / "deep").iterdir())


def test_not_numbers_are_said_and_kept(files, tiny, tmp_path, capsys):
    _, config_json, weights = tiny
    weights = weights | {"model.norm.weight": np.full(32, np.nan, np.float32)}
    src = files.write_hf(tmp_path / "src", config_json, weights)
    convert(src, tmp_path / "out")
    assert "NaN or infinity in model.norm.weight" in capsys.readouterr().err
    assert files.read_safetensors(tmp_path / "out") == files.read_safetensors(src)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "takes two paths"), (["one"], "takes two paths"), (["a", "b", "c"], "takes two paths"),
        (["nowhere", "out"], "no such file or directory"),
        (["nowhere", "out", "--to=onnx"], "should be one of"),
        (["nowhere", "out", "--base_licence=mit"], "base_licence='mit' must be one of llama2"),
    ],
)  # fmt: skip
def test_the_command_explains_itself(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        cli._run(["convert", *arguments])
    assert not list(pathlib.Path().iterdir())


def test_an_architecture_that_the_format_lacks(files, model, tmp_path):
    convert(model, tmp_path / "run", to="puna")
    read = run.read_meta

    def with_softmax(folder):
        meta = read(folder)
        meta["config"]["model"] |= {"moe_interval": 3, "num_experts": 2, "expert_dim": 8,
                                    "router": "softmax"}  # fmt: skip
        return meta

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "read_meta", with_softmax)
        with pytest.raises(UserError, match="model.router=softmax must be sigmoid"):
            convert(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- licences -----------------------------------------------------------------------------------

# Licence, name -> whether it may be released under it.
NAMES = [
    ("llama2", "anything", True), ("llama3", "Llama 3 puna", True),
    ("llama3", "Llama-3-puna", True), ("llama3", "Llama-puna", False),
    ("llama3", "puna-Llama-3", False),
    ("llama3.1", "Llama-puna", True), ("llama3.1", "llama-puna", False),
    ("llama3.2", "puna", False), ("llama3.3", "Llama puna", True), ("llama4", "puna-llama", False),
    ("llama4", "Llama-4-puna", True), ("none", "puna", True), ("unknown", "puna", True),
    ("apache-2.0", "puna", True),
]  # fmt: skip


@pytest.mark.parametrize(("licence", "name", "allowed"), NAMES)
def test_names(licence, name, allowed):
    if allowed:
        licences.check_name(name, licence)
    else:
        with pytest.raises(UserError, match="must begin with 'Llama.*--ignore_licence_name"):
            licences.check_name(name, licence)


@pytest.mark.parametrize(
    ("evidence", "licence", "base"),
    [
        ({}, "unknown", "unknown"),
        ({"config.json": {"_name_or_path": "meta-llama/Llama-3.2-1B"}}, "llama3.2",
         "meta-llama/Llama-3.2-1B"),
        ({"config.json": {"_name_or_path": "meta-llama/Meta-Llama-3-8B"}}, "llama3",
         "meta-llama/Meta-Llama-3-8B"),
        ({"config.json": {"_name_or_path": "someone/Llama-3.2-1B"}}, "unknown",
         "someone/Llama-3.2-1B"),
        ({"config.json": {"_name_or_path": "/home/me/x"}}, "unknown", "unknown"),
        ({"LICENSE": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version"}, "llama3.1",
         "unknown"),
        ({"LICENSE": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT"}, "llama3", "unknown"),
        ({"LICENSE.txt": "Apache License\nVersion 2.0"}, "apache-2.0", "unknown"),
        ({"README.md": "---\nlicense: other\nlicense_name: llama4\nbase_model:\n- a/X\n---"},
         "llama4", "a/X"),
        ({"README.md": "---\nlicense: mit\nbase_model: a/b\n---\n"}, "mit", "a/b"),
    ],
)  # fmt: skip
def test_the_base_is_what_the_files_say(tmp_path, evidence, licence, base):
    config_json = evidence.pop("config.json", {})
    for name, text in evidence.items():
        (tmp_path / name).write_text(text)
    found = licences.origin_of(tmp_path, config_json)
    assert (found["licence"], found["base_model"]) == (licence, base)


def test_the_duties_of_a_llama_go_along(model, tmp_path, capsys):
    text = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nand so on"
    (model / "LICENSE").write_text(text)
    (model / "USE_POLICY.md").write_text("be kind")
    convert(model, tmp_path / "run", to="puna")
    for src in (model, tmp_path / "run"):
        with pytest.raises(UserError, match="the name 'mine' must begin with 'Llama'"):
            convert(src, tmp_path / "mine")
        assert not (tmp_path / "mine").exists()
        out = tmp_path / f"Llama-mine-{src.name}"
        convert(src, out)
        assert (out / "LICENSE").read_text() == text
        assert (out / "USE_POLICY.md").read_text() == "be kind"
        assert (out / "NOTICE").read_text() == (
            "Llama 3.1 is licensed under the Llama 3.1 Community License, "
            "Copyright (c) Meta Platforms, Inc. All Rights Reserved.\n"
        )
        card = (out / "README.md").read_text()
        assert "**Built with Llama**" in card and "license: llama3.1" in card
    convert(model, tmp_path / "a", name="Llama-by-flag")
    assert "# Llama-by-flag" in (tmp_path / "a/README.md").read_text()
    convert(model, tmp_path / "b", ignore_licence_name=True)
    convert(model, tmp_path / "c", base_licence="none")
    assert not (tmp_path / "c/NOTICE").exists()
    assert "must be copied" not in capsys.readouterr().err


def test_a_licence_without_its_text_is_said(model, tmp_path, capsys):
    arguments = ["--base_licence=llama3", "--name=Llama-3-x"]
    cli._run(["convert", str(model), str(tmp_path / "x"), *arguments])
    assert "must be copied beside the weights" in capsys.readouterr().err
    assert "**Built with Meta Llama 3**" in (tmp_path / "x/README.md").read_text()
    assert SHARD_BYTES == 5 * 10**9
