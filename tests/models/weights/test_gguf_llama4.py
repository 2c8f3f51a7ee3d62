"""GGUF files of Llama 4: read as llama.cpp's converter writes them, and written so."""

import dataclasses

import jax
import numpy as np
import pytest

import puna
from puna.configs.errors import UserError
from puna.models.release.convert import convert
from puna.models.weights.load import open_weights

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")

SCOUT = {
    "vocab_size": 64, "embed_dim": 32, "num_layers": 5, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "mlp_dim": 64, "expert_dim": 32, "moe_interval": 1, "num_experts": 3,
    "experts_per_token": 1, "max_positions": 20000, "nope_interval": 4, "chunk_size": 8192,
    "temperature_scale": 0.1, "qk_norm": True, "rope_theta": 500000.0,
}  # fmt: skip
MODELS = {
    "scout": SCOUT,
    "maverick": SCOUT | {"moe_interval": 2, "num_experts": 128, "qk_norm": False},
    "dense, one chunk": SCOUT | {
        "moe_interval": 0, "num_experts": 0, "expert_dim": 0, "nope_interval": 0, "chunk_size": 0,
        "temperature_scale": 0.0,
    },
}  # fmt: skip


def write(path, config, hf, change=()):
    """As llama.cpp's `Llama4Model` of convert_hf_to_gguf: no rows permuted, experts taken apart."""
    writer = gguf.GGUFWriter(path, "llama4")
    values = {
        "block_count": config.num_layers, "context_length": config.max_positions,
        "embedding_length": config.embed_dim, "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim, "vocab_size": config.vocab_size,
        "interleave_moe_layer_step": config.moe_interval, "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        "expert_feed_forward_length": config.expert_dim,
    }  # fmt: skip
    if not config.chunk_size:
        values["attention.sliding_window"] = 0
    for key, value in (values | dict(change)).items():
        writer.add_uint32(f"llama4.{key}", value)
    writer.add_float32("llama4.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32("llama4.rope.freq_base", config.rope_theta)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA4, config.num_layers)

    def add(name, tensor):
        found = names.get_name(name, (".weight",))
        assert found, name
        writer.add_tensor(found, np.ascontiguousarray(tensor))

    for name, tensor in hf.items():
        if name.endswith("gate_up_proj"):
            for half, part in zip(("gate", "up"), np.split(tensor, 2, -1), strict=True):
                add(name.replace("gate_up", half) + ".weight", part.swapaxes(-1, -2))
        elif name.endswith("experts.down_proj"):
            add(name + ".weight", tensor.swapaxes(-1, -2))
        else:
            add(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", MODELS)
def test_read_and_written(files, tmp_path, name):
    config = files.model_config(MODELS[name])
    hf = files.random_tensors(files.hf_shapes(config))
    source = files.write_hf(tmp_path / "hf", files.hf_table(config)[1], hf)
    wanted_model, wanted = puna.load(source)
    write(tmp_path / "theirs.gguf", config, hf)
    convert(source, tmp_path / "ours.gguf", to="gguf")
    for path in ("theirs.gguf", "ours.gguf"):
        model, params = puna.load(tmp_path / path)
        assert model.config == wanted_model.config
        assert jax.tree.all(jax.tree.map(np.array_equal, params, wanted))
    theirs, ours = (gguf.GGUFReader(tmp_path / f"{who}.gguf") for who in ("theirs", "ours"))
    described = [
        sorted((t.name, tuple(t.shape), t.tensor_type) for t in file.tensors)
        for file in (theirs, ours)
    ]
    assert described[0] == described[1]
    for key, field in theirs.fields.items():
        if key.startswith("llama4.") and (config.moe_interval or "expert" not in key):
            assert ours.fields[key].contents() == field.contents(), key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qk_norm": False}, "model.qk_norm=False must be True for --to=gguf"),
        ({"chunk_size": 64}, "model.chunk_size=64 must be 8192"),
        ({"temperature_scale": 0.0}, "model.temperature_scale=0.0 must be 0.1"),
        ({"shared_expert": False}, "shared_expert=False must be True"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(files, change, words):
    from puna.models.release import gguf_release

    config = files.model_config(SCOUT | change)
    with pytest.raises(UserError, match=words):
        gguf_release._check_expressible(dataclasses.replace(config))


def test_metadata_that_contradicts(files, tmp_path):
    config = files.model_config(SCOUT)
    hf = files.random_tensors(files.hf_shapes(config))
    for change, words in (
        ({"attention.sliding_window": 512}, "sliding_window=512 must be 8192, or 0"),
        ({"expert_group_count": 2}, "llama4.expert_group_count=2 is not something"),
        ({"expert_count": 4}, "ffn_gate_inp"),
    ):
        write(tmp_path / "m.gguf", config, hf, change)
        with pytest.raises(UserError, match=words):
            open_weights(tmp_path / "m.gguf")
