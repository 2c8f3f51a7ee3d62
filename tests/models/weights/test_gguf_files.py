"""A model in several GGUF files, as llama-gguf-split and the `gguf` package write them."""

import shutil

import jax
import numpy as np
import pytest

import puna
from puna.configs.errors import UserError
from puna.models.weights.load import open_weights

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")


@pytest.fixture(scope="module")
def written(files, tiny, tmp_path_factory):
    """The folder of a split model, its tensors, and how many parts it has."""
    config, _, hf = tiny
    folder = tmp_path_factory.mktemp("split")
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=4)
    for key, value in {
        "block_count": config.num_layers, "context_length": config.max_positions,
        "embedding_length": config.embed_dim, "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim, "rope.dimension_count": config.head_dim,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*"abc", "ab"])
    writer.add_token_types([1] * 4)
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    meta = files.to_meta(config, hf)
    for name, tensor in meta.items():
        writer.add_tensor(names.get_name(name, (".weight",)), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(folder.glob("*.gguf"))
    assert len(parts) == -(-len(meta) // 4) > 2
    return folder, config, hf, parts


def test_every_part_and_the_folder_name_the_whole(files, written, tmp_path):
    folder, config, hf, parts = written
    source = files.write_hf(tmp_path / "hf", files.hf_table(config)[1], hf)
    wanted_model, wanted = puna.load(source)
    for path in (folder, parts[0], parts[-1]):
        model, params = puna.load(path)
        assert model.config == wanted_model.config
        assert jax.tree.all(jax.tree.map(np.array_equal, params, wanted))
        assert puna.load_tokenizer(path).encode("abc") == [3, 2]


def test_a_part_that_is_missing_or_another_is_named(written, tmp_path):
    folder, _, _, parts = written

    def copy(name):
        return shutil.copytree(folder, tmp_path / name)

    broken = copy("missing")
    (broken / parts[2].name).unlink()
    with pytest.raises(UserError, match=rf"{parts[2].name}: is missing: part 3 of {len(parts)}"):
        open_weights(broken)
    broken = copy("first")
    (broken / parts[0].name).unlink()
    with pytest.raises(UserError, match=f"{parts[0].name}: no such file"):
        open_weights(broken)
    broken = copy("swapped")
    shutil.copy(parts[1], broken / parts[2].name)
    with pytest.raises(UserError, match=f"{parts[2].name}: must be part 3 of {len(parts)}"):
        open_weights(broken)
    broken = copy("renamed")
    (broken / parts[0].name).rename(broken / "whole.gguf")
    with pytest.raises(UserError, match=r"split.count=\d+ must stand in its name"):
        open_weights(broken / "whole.gguf")
    broken = copy("cut")
    data = parts[-1].read_bytes()
    (broken / parts[-1].name).write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError, match=parts[-1].name):
        open_weights(broken)
