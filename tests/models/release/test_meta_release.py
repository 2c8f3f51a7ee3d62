"""Meta's layout of text models: read back it is the same model, and torch takes the file."""

import json

import numpy as np
import pytest

import puna
from puna import __main__ as cli
from puna.configs import get_config, schema
from puna.configs.errors import UserError
from puna.models.release import meta_release
from puna.models.release.convert import convert
from puna.models.weights import torch_files
from puna.models.weights.load import open_weights

TEXT = {
    "vocab_size": 64, "embed_dim": 32, "mlp_dim": 48, "num_layers": 3, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 8, "norm_eps": 1e-5, "rope_theta": 5e5, "max_positions": 8192,
}  # fmt: skip


def source(files, folder, kind="F32", **changes):
    config = files.model_config(TEXT | changes)
    weights = files.random_tensors(files.hf_shapes(config))
    weights = {n: w.astype(files.NUMPY[kind]) for n, w in weights.items()}
    return files.write_hf(folder, files.hf_table(config)[1], weights)


def stored(folder):
    """Every tensor of the file as it lies there."""
    found = torch_files.open_file(folder / "consolidated.00.pth")
    return {n: (t.dtype, t.shape, t[(slice(None),) * len(t.shape)].tobytes())
            for n, t in found.items()}  # fmt: skip


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_bit_comes_back(files, tmp_path, kind, tied):
    scaled = {"rope_scaling_factor": 32.0, "max_positions": 131072} if tied else {}
    src = source(files, tmp_path / "src", kind, tie_embeddings=tied, **scaled)
    convert(src, tmp_path / "meta", to="meta")
    assert open_weights(tmp_path / "meta").config == open_weights(src).config
    convert(tmp_path / "meta", tmp_path / "hf")
    assert files.read_safetensors(tmp_path / "hf") == files.read_safetensors(src)
    convert(tmp_path / "meta", tmp_path / "run", to="puna")
    convert(tmp_path / "run", tmp_path / "again", to="meta")
    assert stored(tmp_path / "again") == stored(tmp_path / "meta")
    assert ("output.weight" in stored(tmp_path / "meta")) is True  # tied ones have it twice
    text = [(tmp_path / name / "params.json").read_text() for name in ("again", "meta")]
    assert text[0] == text[1]


def test_torch_takes_the_file(files, tmp_path):
    torch = pytest.importorskip("torch")
    src = source(files, tmp_path / "src", "BF16")
    convert(src, tmp_path / "meta", to="meta")
    file = tmp_path / "meta" / "consolidated.00.pth"
    wanted = stored(tmp_path / "meta")
    for mapped in (False, True):
        found = torch.load(file, weights_only=True, mmap=mapped)
        assert list(found) == list(wanted)
        for name, tensor in found.items():
            assert tensor.dtype == torch.bfloat16 and tensor.data_ptr() % 16 == 0
            assert tensor.view(torch.int16).numpy().tobytes() == wanted[name][2], name


def test_tokenizer_and_card_come_along(files, tmp_path):
    src = source(files, tmp_path / "src", vocab_size=720)
    puna.models.text.tokenizer.train_bpe(["a llama on the puna"], 300).save_for_hub(src)
    convert(src, tmp_path / "meta", to="meta")
    text = "llama, puna"
    ids = puna.load_tokenizer(src).encode(text)
    assert puna.load_tokenizer(tmp_path / "meta").encode(text) == ids
    assert "transformers" not in (tmp_path / "meta" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama1:7b", {"multiple_of": 256}),
        ("llama2:70b", {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),
        ("llama3:3.1-8b", {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}),
        ("llama3:3.2-1b", {"multiple_of": 256, "ffn_dim_multiplier": 1.5}),
        ("llama3:3.2-90b-vision", {"multiple_of": 4096, "ffn_dim_multiplier": 1.3,
                                   "n_layers": 80, "vision_num_cross_attention_layers": 20}),
    ],
)  # fmt: skip
def test_params_of_published_models(name, keys):
    found = meta_release.params(schema.from_dict(get_config(name)).model)
    assert {key: found[key] for key in keys} == keys
    assert ("ffn_dim_multiplier" in found) == ("ffn_dim_multiplier" in keys)


@pytest.mark.parametrize("width", [1, 7, 84, 85, 86, 1000])
def test_any_width_of_the_mlp(files, width):
    config = files.model_config(TEXT | {"mlp_dim": width})
    assert meta_release.params(config)["multiple_of"] >= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_interval": 1, "num_experts": 2, "expert_dim": 8}, "Llama 4; use --to=hf"),
        ({"attention_bias": "all"}, "model.attention_bias='all' must be 'none' for --to=meta"),
        ({"mlp_bias": True}, "model.mlp_bias=True must be False"),
        ({"head_dim": 16}, "model.head_dim=16 must be 8"),
        ({"rope_scaling_factor": 4.0}, "model.rope_scaling_factor=4.0 must be 8.0"),
        ({"rope_scaling_factor": 8.0, "rope_original_positions": 64},
         "model.rope_original_positions=64 must be 8192"),
    ],
)  # fmt: skip
def test_what_params_json_cannot_say_is_refused(files, tmp_path, changes, words):
    src = source(files, tmp_path / "src", **changes)
    with pytest.raises(UserError) as caught:
        convert(src, tmp_path / "meta", to="meta")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "meta").exists()


def test_an_encoder_that_the_layout_has_no_place_for_is_refused(files, tmp_path):
    config_json, weights = files.hf_family("cross")
    src = files.write_hf(tmp_path / "src", config_json, weights)
    with pytest.raises(UserError, match=r"model\.vision\.global_layers=\d must be 8 for --to=meta"):
        convert(src, tmp_path / "meta", to="meta")


def test_a_dtype_that_torch_files_are_not_written_in_is_refused(tmp_path):
    tensors = {"x": ((2,), np.dtype(np.float64))}
    with pytest.raises(UserError, match="tensor x is float64; bfloat16, float32, float16 are"):
        torch_files.write_file(tmp_path / "x.pth", tensors, [np.zeros(2)])
    assert not (tmp_path / "x.pth").exists()


def test_a_file_of_no_dimensions_and_of_none(tmp_path):
    arrays = {"a": np.float32(3).reshape(()), "b": np.zeros((0, 4), np.float32)}
    described = {n: (x.shape, x.dtype) for n, x in arrays.items()}
    torch_files.write_file(tmp_path / "x.pth", described, arrays.values())
    found = torch_files.open_file(tmp_path / "x.pth")
    assert found["a"][()] == 3 and found["b"].shape == (0, 4)


def test_the_command(files, tmp_path):
    src = source(files, tmp_path / "src")
    cli._run(["convert", str(src), str(tmp_path / "meta"), "--to=meta"])
    assert json.loads((tmp_path / "meta" / "params.json").read_text())["dim"] == 32
