"""FP8 directories: the numbers that values and scales make, whatever the scales' form."""

import jax
import ml_dtypes
import numpy as np
import pytest

import puna
from puna.configs.errors import UserError
from puna.models.weights import fp8

WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS,
                                  "input_activations": {"num_bits": 8, "dynamic": True}}},
    "ignore": ["re:.*lm_head", "re:.*self_attn"],
}  # fmt: skip
SCOUT = {
    "vocab_size": 64, "embed_dim": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "mlp_dim": 64, "expert_dim": 48, "moe_interval": 2, "num_experts": 3,
    "max_positions": 64, "nope_interval": 4, "chunk_size": 16, "temperature_scale": 0.1,
    "qk_norm": True,
}  # fmt: skip


def quantize(w, scale_shape, block=None):
    """(values, scale, the numbers they stand for) of a tensor [.., out, in]."""
    each = [-(-s // c) for s, c in zip(w.shape, scale_shape, strict=True)] if not block else block
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.5, 2.0, scale_shape).astype(np.float32)
    full = scale
    for axis, n in enumerate(each):
        full = np.repeat(full, n, axis)
    full = full[tuple(slice(s) for s in w.shape)]
    values = (w / full).astype(ml_dtypes.float8_e4m3fn)
    return values, scale, values.astype(np.float32) * full


def taken_apart(hf):
    """The experts of Llama 4 one by one, each [out, in], as llm-compressor leaves them."""
    out = {}
    for name, w in hf.items():
        if ".experts." not in name:
            out[name] = w
            continue
        layer, kind = name.rsplit(".", 1)
        for e, matrix in enumerate(w):
            if kind == "down_proj":
                out[f"{layer}.{e}.down_proj.weight"] = matrix.T
            else:
                gate, up = np.split(matrix, 2, -1)
                out[f"{layer}.{e}.gate_proj.weight"] = gate.T
                out[f"{layer}.{e}.up_proj.weight"] = up.T
    return out


CASES = {
    "compressed-tensors, a scale a channel": (COMPRESSED, "channel", "_scale"),
    "fbgemm, a scale a channel": ({"quant_method": "fbgemm_fp8"}, "flat", "_scale"),
    "a scale a tensor": ({"quant_method": "fp8"}, "tensor", "_scale"),
    "blocks": ({"quant_method": "fp8", "weight_block_size": [24, 16]}, "block", "_scale_inv"),
}


@pytest.mark.parametrize("experts", ["", "one by one", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_values_times_scales(files, tiny, tmp_path, case, experts):
    quantization, form, end = CASES[case]
    config, _, hf = tiny
    if experts:
        config = files.model_config(SCOUT)
        hf = files.random_tensors(files.hf_shapes(config))
    stored, plain = {}, {}
    for name, w in (taken_apart(hf) if experts == "one by one" else hf).items():
        linear = "_proj" in name and "self_attn" not in name
        if not linear or (experts == "fused" and form == "flat" and w.ndim == 3):
            stored[name] = plain[name] = w
            continue
        block = None
        shape = tuple(1 if axis == w.ndim - 1 else s for axis, s in enumerate(w.shape))
        if form == "tensor":
            shape = (1,) * w.ndim
        if form == "block":
            block = [1, 24, 16][-w.ndim :]
            shape = tuple(-(-s // b) for s, b in zip(w.shape, block, strict=True))
        stored[name], scale, plain[name] = quantize(w, shape, block)
        flat = {"flat": (-1,), "tensor": ()}
        stored[name + end] = scale.reshape(flat[form]) if form in flat else scale
        if form == "tensor" and name.endswith(".weight"):
            stored[name.replace(".weight", ".input_scale")] = np.ones((), np.float32)
    if experts == "one by one":  # the same fused, for what is compared with
        plain = fused(plain, hf)
    config_json = files.hf_table(config)[1]
    source = files.write_hf(
        tmp_path / "fp8", config_json | {"quantization_config": quantization}, stored
    )
    model, params = puna.load(source)
    other, wanted = puna.load(files.write_hf(tmp_path / "plain", config_json, plain))
    assert model.config == other.config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, wanted))


def fused(tensors, like):
    out = {name: w for name, w in tensors.items() if ".experts." not in name}
    for name, w in like.items():
        if ".experts." in name:
            layer, kind = name.rsplit(".", 1)
            parts = ["down"] if kind == "down_proj" else ["gate", "up"]
            out[name] = np.stack([
                np.concatenate([tensors[f"{layer}.{e}.{p}_proj.weight"] for p in parts]).T
                for e in range(len(w))
            ])  # fmt: skip
    return out


def test_any_slice_is_that_of_the_whole():
    rng = np.random.default_rng(1)
    halves = [[rng.normal(size=(6, 5)).astype(np.float32) for _ in "gu"] for _ in range(4)]
    values = rng.normal(size=(7, 10)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(1, 2, (3, 4)).astype(np.float32)
    for tensor in (fp8.Expert(halves), fp8.Scaled("d", "w", values, scale, [3, 3])):
        whole = tensor[(slice(None),) * len(tensor.shape)]
        assert whole.shape == tensor.shape
        for _ in range(50):
            index = []
            for size in tensor.shape:
                start = int(rng.integers(size))
                index.append(slice(start, int(rng.integers(start, size)) + 1))
            np.testing.assert_array_equal(tensor[tuple(index)], whole[tuple(index)])


@pytest.mark.parametrize(
    ("quantization", "change", "words"),
    [
        (COMPRESSED, {"drop": "_scale"}, "is in FP8 and has 0 scales"),
        (COMPRESSED, {"scale": np.ones((3, 1), np.float32)}, r"has shape \(3, 1\), which fits"),
        (None, {}, "is in FP8, and config.json has no quantization_config"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, {}, "weight_block_size='128'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {}, "the weights are quantized"),
        ({"quant_method": "gptq", "bits": 4}, {}, "load the unquantized model, or a GGUF"),
        ({"quant_method": "awq", "bits": 4}, {}, "load the unquantized model, or a GGUF"),
        (COMPRESSED | {"format": "pack-quantized"}, {}, "the weights are quantized"),
        (COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}}, {},
         "must be symmetric floats of 8 bits"),
    ],
)  # fmt: skip
def test_what_is_not_right_is_one_line(files, tiny, tmp_path, quantization, change, words):
    config, config_json, hf = tiny
    name = "model.layers.0.mlp.gate_proj.weight"
    values, scale, _ = quantize(hf[name], (hf[name].shape[0], 1))
    stored = hf | {name: values, name + "_scale": change.get("scale", scale)}
    if "drop" in change:
        del stored[name + change["drop"]]
    if quantization is not None:
        config_json = config_json | {"quantization_config": quantization}
    source = files.write_hf(tmp_path / "m", config_json, stored)
    with pytest.raises(UserError, match=words) as caught:
        puna.load(source)
    assert "\n" not in str(caught.value)
