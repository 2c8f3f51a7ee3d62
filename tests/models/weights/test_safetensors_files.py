"""Hugging Face directories that are damaged or lie: one line each, whatever was asked for."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from puna import __main__ as cli
from puna.configs.errors import UserError
from puna.models.weights.load import open_weights
from puna.models.weights.safetensors_files import open_tensors

NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


def with_header(header, data=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(4,), begin=0, end=16):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# What model.safetensors holds instead.
FILES = {
    "empty": (b"", "cannot be read"),
    "a few bytes": (b"abc", "is damaged"),
    "not safetensors": (b"PK\x03\x04" + b"x" * 99, "is damaged"),
    "header beyond the end": (struct.pack("<Q", 10**6) + b"{}", "is damaged"),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", "is damaged"),
    "header is no JSON": (with_header(b"{'a': 1}"), "is damaged"),
    "header is a list": (with_header([1, 2]), "is damaged"),
    "header is not text": (with_header(b"\xff\xfe{}"), "is damaged"),
    "deep header": (with_header(b"[" * 10**5), "is damaged"),
    "data beyond the end": (with_header({"x": entry(end=4000, shape=(1000,))}), "is damaged"),
    "length is not that of the shape": (with_header({"x": entry(end=12)}, b"\0" * 12),
                                        "is damaged"),
    "backwards": (with_header({"x": entry(begin=16, end=0)}), "is damaged"),
    "overlap": (with_header({"x": entry(), "y": entry(begin=8, end=24)}, b"\0" * 24),
                "is damaged"),
    "shape overflows": (with_header({"x": entry(shape=(2**40, 2**40))}), "is damaged"),
    "negative shape": (with_header({"x": entry(shape=(-4,))}), "is damaged"),
    "bytes left over": (with_header({"x": entry()}, b"\0" * 17), "is damaged"),
    "same name twice": (
        with_header(b'{"x":%b,"x":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 16),
        "damaged",
    ),
    "unknown dtype": (with_header({"x": entry("F33")}, b"\0" * 16), "is damaged"),
    "quantised": (with_header({"x": entry("F8_E5M2", (16,))}, b"\0" * 16),
                  "has dtype F8_E5M2; F32, F16, BF16, F8_E4M3 are read"),
    "integers": (with_header({"x": entry("I64", (2,))}, b"\0" * 16), "has dtype I64"),
}  # fmt: skip


def changed_tensors(weights, what):
    match what:
        case "missing":
            return {k: v for k, v in weights.items() if k != NORM}
        case "extra":
            return weights | {"model.layers.0.self_attn.q_proj.bias": weights[NORM]}
        case "shape":
            return weights | {NORM: weights[NORM][:-1]}
        case "transposed":
            name = "model.embed_tokens.weight"
            return weights | {name: np.ascontiguousarray(weights[name].T)}
        case "prefix":
            return {f"_orig_mod.{k}": v for k, v in weights.items()}
        case "one layer more":
            more = {k.replace("layers.2.", "layers.3."): v for k, v in weights.items()}
            return weights | more


TENSORS = {
    "missing": f"tensor {NORM} is missing",
    "extra": "tensor model.layers.0.self_attn.q_proj.bias is not part of this architecture",
    "shape": f"tensor {NORM} has shape (31,), the architecture says (32,)",
    "transposed": "tensor model.embed_tokens.weight has shape (32, 64)",
    "prefix": "lm_head.weight is missing (and 29 more), and _orig_mod.lm_head.weight is not part "
    "of this architecture (and 29 more)",
    "one layer more": "is not part of this architecture (and 8 more)",
}

# config.json as text, or keys of it.
CONFIGS = {
    "not JSON": ("{'model_type': 'llama'}", "is not JSON"),
    "cut short": ('{"model_type": "llama"', "is not JSON"),
    "empty": ("", "is not JSON"),
    "a list": ("[1]", "must hold a JSON object"),
    "deep": ("[" * 10**5, "is not JSON"),
    "a key twice": ('{"model_type": "llama", "model_type": "llama"}', "appears twice"),
    "binary": (b"\xff\x00", "is not JSON"),
    "another model": ({"model_type": "gemma"}, "model_type='gemma'"),
    "a list for the model": ({"model_type": ["llama"]}, "model_type=['llama'] must be text"),
    "a number for the layers": (
        {"model_type": "llama4", "text_config": {"no_rope_layers": 5}},
        "a value has the wrong type",
    ),
    "no vocabulary": ({"vocab_size": -5}, "model.vocab_size=-5"),
    "a bias": ({"attention_bias": True}, "k_proj.bias is missing"),
    "another rope": ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "must be a multiple of"),
    "a tower of layers": ({"num_hidden_layers": 10**9}, "layers cannot be made of"),
    "not a number": ({"rms_norm_eps": "tiny"}, "rms_norm_eps='tiny'"),
    "text for an object": ({"rope_parameters": "llama3"}, "rope_parameters"),
    "a number for the vision": (
        {"model_type": "llama4", "vision_config": 3, "text_config": {}}, "vision_config"
    ),
    "text for the text": ({"model_type": "llama4", "text_config": "x"}, "text_config"),
}  # fmt: skip


def damage(files, tiny, folder, kind, case):
    _, config_json, weights = tiny
    if kind == "tensors":
        return files.write_hf(folder, config_json, changed_tensors(weights, case)), TENSORS[case]
    files.write_hf(folder, config_json, weights, shards=3 if kind == "index" else 1)
    if kind == "file":
        (folder / "model.safetensors").write_bytes(FILES[case][0])
        return folder, FILES[case][1]
    if kind == "config":
        content, words = CONFIGS[case]
        if isinstance(content, dict):
            multimodal = content.get("model_type") == "llama4"
            content = json.dumps(content if multimodal else config_json | content)
        content = content.encode() if isinstance(content, str) else content
        (folder / "config.json").write_bytes(content)
        return folder, words
    change, words = INDICES[case]
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(change(folder, index["weight_map"])))
    return folder, words


def renamed(name):
    return lambda folder, place: {"weight_map": place | {NORM: name}}


def lose_shard(folder, place):
    (folder / place[NORM]).unlink()
    return {"weight_map": place}


def truncate(folder, place):
    data = (folder / place[NORM]).read_bytes()
    (folder / place[NORM]).write_bytes(data[:-100])
    return {"weight_map": place}


def twice(folder, place):
    first, second, *_ = sorted(set(place.values()))
    (folder / second).write_bytes((folder / first).read_bytes())
    return {"weight_map": place}


INDICES = {
    "a missing shard": (lose_shard, "which is missing"),
    "a truncated shard": (truncate, "is damaged"),
    "a parent": (renamed("../model.safetensors"), "must be the plain name"),
    "absolute": (renamed("/etc/passwd"), "must be the plain name"),
    "a folder": (renamed("x/model.safetensors"), "must be the plain name"),
    "windows": (renamed("..\\model.safetensors"), "must be the plain name"),
    "another kind": (renamed("model.bin"), "must be the plain name"),
    "nothing": (renamed(""), "must be the plain name"),
    "a number": (renamed(3), "must be an object of file names"),
    "no map": (lambda folder, place: {}, "must be an object of file names"),
    "a list": (lambda folder, place: {"weight_map": list(place)}, "must be an object"),
    "a tensor in two shards": (twice, "stands in another shard too"),
    "a tensor elsewhere": (
        lambda folder, place: {
            "weight_map": place | {NORM: next(s for s in place.values() if s != place[NORM])}
        },
        "is not where",
    ),
    "a tensor that is nowhere": (
        lambda folder, place: {"weight_map": place | {"x": place[NORM]}}, "lacks tensor x"
    ),
}  # fmt: skip


def read_back(folder):
    return {n: t[(slice(None),) * len(t.shape)] for n, t in open_tensors(folder).items()}


@pytest.mark.parametrize("gone", ["", "model-*", "*.index.json"])
def test_a_whole_file_counts_over_an_index(files, tiny, tmp_path, capsys, gone):
    """As in transformers: a model saved again, whole, into the folder of its shards."""
    _, config_json, old = tiny
    files.write_hf(tmp_path, config_json, old, shards=3)
    new = {n: w + 1 for n, w in old.items()}
    files.write_hf(tmp_path, config_json, new)
    (tmp_path / INDEX).write_text("{")  # not even looked at
    for file in tmp_path.glob(gone) if gone else ():
        file.unlink()
    found = read_back(tmp_path)
    assert all(np.array_equal(found[n], new[n]) for n in new) and found.keys() == new.keys()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "model.safetensors is read; ignored beside it: " in said
    assert (INDEX in said) == (gone != "*.index.json")
    assert ("model-00001-of-00003.safetensors" in said) == (gone != "model-*")


def test_shards_of_another_count_are_named(files, tiny, tmp_path, capsys):
    _, config_json, weights = tiny
    files.write_hf(tmp_path, config_json, weights, shards=2)
    files.write_hf(tmp_path, config_json, weights, shards=3)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"x")
    assert read_back(tmp_path).keys() == weights.keys()
    assert capsys.readouterr().err == (
        f"puna: warning: {tmp_path}: {INDEX} is read; ignored beside it: "
        "adapter_model.safetensors, model-00001-of-00002.safetensors, "
        "model-00002-of-00002.safetensors\n"
    )


CASES = [
    (kind, case)
    for kind, cases in (
        ("file", FILES), ("tensors", TENSORS), ("config", CONFIGS), ("index", INDICES)
    )
    for case in cases
]  # fmt: skip


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_one_line_and_nothing_written(files, tiny, tmp_path, kind, case):
    folder, words = damage(files, tiny, tmp_path / "model", kind, case)
    with pytest.raises(UserError) as caught:
        cli._run(["convert", str(folder), str(tmp_path / "out")])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UserError):
        open_weights(folder)


@pytest.mark.parametrize("case", ["truncated", "no directory"])
def test_the_command_ends_with_status_2(files, tiny, tmp_path, case):
    folder, _ = damage(files, tiny, tmp_path / "model", "index", "a truncated shard")
    if case == "no directory":
        folder = tmp_path / "nowhere"
    run = subprocess.run(
        [sys.executable, "-m", "puna", "convert", folder, tmp_path / "out"],
        capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("puna: ") and run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
