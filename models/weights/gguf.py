"""llama.cpp's GGUF files of `general.architecture` llama (dense Llama 1-3) and llama4 (its text).

Names are those of llama.cpp's `LLM_ARCH_LLAMA` and `LLM_ARCH_LLAMA4`; RoPE pairs lie side by side
in q and k. What no file says of Llama 4 (chunks, NoPE layers, temperature, the norm of q and k) is
what llama.cpp has for each of them. Its image encoder lies in a file of its own, which is not read.
"""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from ...configs import schema
from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from . import config as hf_config
from . import gguf_files, huggingface, keys, licences
from .gguf_files import is_gguf
from .huggingface import Row
from .safetensors_files import check_depth
from .tensors import Tensor, Weights, check

__all__ = ["is_gguf", "leaves", "open_file"]

ROOT = (
    Row("embed/table_VD", "V D", "token_embd.weight", "V D"),
    Row("norm/scale_D", "D", "output_norm.weight", "D"),
)
UNTIED = (Row("unembed/table_DV", "D V", "output.weight", "V D"),)
ATTENTION = (
    Row("attention_norm/scale_D", "D", "attn_norm.weight", "D"),
    Row("mlp_norm/scale_D", "D", "ffn_norm.weight", "D"),
    Row("attention/wq_DNH", "D N RP", "attn_q.weight", "NPR D"),
    Row("attention/wk_DKH", "D K RP", "attn_k.weight", "KPR D"),
    Row("attention/wv_DKH", "D K H", "attn_v.weight", "KH D"),
    Row("attention/wo_NHD", "N H D", "attn_output.weight", "D NH"),
)
MLP = (
    Row("mlp/w_gate_DF", "D F", "ffn_gate.weight", "F D"),
    Row("mlp/w_up_DF", "D F", "ffn_up.weight", "F D"),
    Row("mlp/w_down_FD", "F D", "ffn_down.weight", "D F"),
)
ROUTER = "ffn_gate_inp.weight"
EXPERTS = (
    Row("moe/router_DE", "D E", ROUTER, "E D"),
    Row("moe/w_gate_EDF", "E D X", "ffn_gate_exps.weight", "E X D"),
    Row("moe/w_up_EDF", "E D X", "ffn_up_exps.weight", "E X D"),
    Row("moe/w_down_EFD", "E X D", "ffn_down_exps.weight", "E D X"),
    Row("moe/shared/w_gate_DF", "D X", "ffn_gate_shexp.weight", "X D"),
    Row("moe/shared/w_up_DF", "D X", "ffn_up_shexp.weight", "X D"),
    Row("moe/shared/w_down_FD", "X D", "ffn_down_shexp.weight", "D X"),
)
_NAMES = {  # of biases, for those of Hugging Face
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.bias": "attn_output.bias",
    "mlp.gate_proj.bias": "ffn_gate.bias",
    "mlp.up_proj.bias": "ffn_up.bias",
    "mlp.down_proj.bias": "ffn_down.bias",
}
_FREQUENCIES = "rope_freqs.weight"
# What published Llamas have of (low, high, old context), and where a file of ours says it.
_PUBLISHED = ((1.0, 4.0, 8192), (1.0, 1.0, 8192))
SCALING = ("puna.rope_low_freq_factor", "puna.rope_high_freq_factor",
           "puna.rope_original_positions")  # fmt: skip

# Key under the architecture's name: field.
_SIZES = {
    "block_count": "num_layers",
    "context_length": "max_positions",
    "embedding_length": "embed_dim",
    "feed_forward_length": "mlp_dim",
    "attention.head_count": "num_heads",
}
_EXPERT_SIZES = {
    "expert_count": "num_experts",
    "expert_feed_forward_length": "expert_dim",
    "expert_used_count": "experts_per_token",
    "interleave_moe_layer_step": "moe_interval",
}
_READ = {
    "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.value_length", "rope.dimension_count", "rope.freq_base", "vocab_size",
}  # fmt: skip


def architecture(config: ModelConfig) -> str:
    """`general.architecture` of a model."""
    return "llama" if hf_config.family(config) == hf_config.LLAMA else "llama4"


def llama4_fields(num_experts: int, chunked: bool) -> dict[str, Any]:
    """What llama.cpp has for every Llama 4, by the number of its experts.

    Args:
      num_experts: of a layer; only Maverick, which has 128, does not normalise q and k.
      chunked: whether the file leaves `attention.sliding_window` out; with 0 there, every layer
        has RoPE and sees all.
    """
    fields: dict[str, Any] = {"qk_norm": num_experts != 128, "chunk_size": 0, "nope_interval": 0,
                              "temperature_scale": 0.0}  # fmt: skip
    if chunked:
        fields |= {"chunk_size": 8192, "nope_interval": 4, "temperature_scale": 0.1,
                   "temperature_floor": 8192}  # fmt: skip
    return fields | {"router": "sigmoid", "shared_expert": True} if num_experts else fields


def leaves(config: ModelConfig) -> dict[str, huggingface.Leaf]:
    """The table of a model in a GGUF file."""
    root = ROOT + (() if config.tie_embeddings else UNTIED)
    biases = tuple(
        dataclasses.replace(row, hf=_NAMES[row.hf])
        for row in huggingface.bias_rows(config, interleaved=True)
    )
    return huggingface.stack(
        config,
        root,
        lambda i: ATTENTION + biases + (EXPERTS if config.is_moe(i) else MLP),
        "",
        "blk.{}.".format,
    )


def open_file(path: pathlib.Path) -> Weights:
    """Open a GGUF file and compare its tensors with its metadata.

    Raises:
      UserError: whatever keeps it from being loaded, in one line.
    """
    metadata, tensors = gguf_files.open_model(path)
    kind = metadata.get("general.architecture")
    if kind == "clip":
        raise UserError(
            f"{path}: is an image encoder alone (mmproj), which is not read: give the file of the "
            "text model, or the Hugging Face directory, which has both"
        )
    if kind not in ("llama", "llama4"):
        raise UserError(f"{path}: general.architecture={kind!r} must be llama or llama4")
    config = _config(path, metadata, tensors)
    check_depth(path, config, tensors)
    table = leaves(config)
    check(path, table, tensors, {_FREQUENCIES})
    return Weights(config, table, tensors, _origin(path, metadata))


def _origin(path: pathlib.Path, metadata) -> dict[str, Any]:
    found = licences.origin_of(path.parent) if _alone(path) else {"files": {}}
    base = metadata.get("general.base_model.0.name") or metadata.get("general.name")
    licence = metadata.get("general.license.name") or metadata.get("general.license")
    found["base_model"] = base if isinstance(base, str) else licences.UNKNOWN
    named = licences.normal(licence) if licence != "other" else None
    found["licence"] = named or found.get("licence", licences.UNKNOWN)
    return found


def _alone(path: pathlib.Path) -> bool:
    """Whether the licence files in a folder can only be this model's."""
    return len(gguf_files.models(path.parent)) == 1


def _config(path, metadata, tensors: dict[str, Tensor]) -> ModelConfig:
    kind = metadata["general.architecture"]
    own = {k.removeprefix(f"{kind}."): v for k, v in metadata.items() if k.startswith(f"{kind}.")}
    known = {*_SIZES, *_READ}
    if kind == "llama4":
        known |= {*_EXPERT_SIZES, "attention.sliding_window"}
    for key, value in own.items():
        if key not in known and not keys.says_nothing(key, value):
            raise UserError(
                f"{path}: {kind}.{key}={str(value)[:60]} is not something puna can honour"
            )

    def get(key, of, default=None):
        value = own.get(key, default)
        if type(value) is not of:
            problem = "is missing" if value is None else f"={str(value)[:60]} must be one number"
            raise UserError(f"{path}: {kind}.{key} {problem}".replace(" =", "="))
        return value

    fields: dict[str, Any] = {field: get(key, int) for key, field in _SIZES.items()}
    for name, field in (("attention.head_count", "num_heads"), ("block_count", "num_layers")):
        if not 0 < fields[field] < 2**20:
            raise UserError(f"{path}: {kind}.{name}={fields[field]} must be at least 1")
    fields["num_kv_heads"] = get("attention.head_count_kv", int, fields["num_heads"])
    fields["norm_eps"] = _rounded(get("attention.layer_norm_rms_epsilon", float))
    fields["rope_theta"] = _rounded(get("rope.freq_base", float, 10000.0))
    H = get("attention.key_length", int, fields["embed_dim"] // fields["num_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, int, H) != H:
            raise UserError(f"{path}: {kind}.{key}={own[key]} must be the width of a head, {H}")
    fields["head_dim"] = H
    if kind == "llama4":
        fields |= _llama4(path, get, fields["num_layers"])
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: tensor token_embd.weight is missing")
    fields["vocab_size"] = tensors["token_embd.weight"].shape[0]
    fields["tie_embeddings"] = "output.weight" not in tensors
    if "blk.0.attn_q.bias" in tensors:
        fields["attention_bias"] = "all" if "blk.0.attn_output.bias" in tensors else "qkv"
    fields["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if _FREQUENCIES in tensors:
        pairs = list(_PUBLISHED)
        if all(type(metadata.get(key)) in (int, float) for key in SCALING):
            pairs.insert(0, tuple(_rounded(metadata[key]) for key in SCALING))
        fields |= _scaling(path, tensors[_FREQUENCIES], H, fields["rope_theta"], pairs)
    return schema.from_dict(fields, ModelConfig, "model.")


def _llama4(path, get, num_layers) -> dict[str, Any]:
    fields = {field: get(key, int, 0) for key, field in _EXPERT_SIZES.items()}
    window = get("attention.sliding_window", int, 8192)
    if window not in (0, 8192):
        raise UserError(f"{path}: llama4.attention.sliding_window={window} must be 8192, or 0")
    if not (fields["num_experts"] and fields["moe_interval"]):
        fields = {}
    made = fields | llama4_fields(fields.get("num_experts", 0), bool(window))
    if made["nope_interval"] > num_layers:  # there is no such layer
        made |= {"nope_interval": 0, "temperature_scale": 0.0}
    return made


def _rounded(value: float) -> float:
    """The number that was written before it became a float32: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _scaling(path, tensor: Tensor, H: int, theta: float, pairs) -> dict[str, Any]:
    """Llama 3.1's scaling, of which a file keeps the divisor of each frequency only.

    llama.cpp writes them from factor, low 1, high 4 and old context; one of `pairs` (low, high,
    old) with the largest divisor as the factor must give the same again. Files of ours say which.
    """
    if tuple(tensor.shape) != (H // 2,):
        raise UserError(f"{path}: tensor {_FREQUENCIES} has shape {tensor.shape}, not {(H // 2,)}")
    found = tensor[(slice(None),)].astype(np.float64)
    if not np.all(found >= 1.0):
        raise UserError(f"{path}: tensor {_FREQUENCIES} must hold divisors of at least 1")
    factor = float(found.max())
    if factor == 1.0:
        return {}
    f = theta ** (-np.arange(0, H, 2) / H)
    for low, high, old in pairs:
        wavelength = 2 * math.pi / f
        if high > low:
            smooth = np.clip((old / wavelength - low) / (high - low), 0, 1)
        else:
            smooth = (wavelength < old / high).astype(float)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), found, rtol=1e-4):
            return {
                "rope_scaling_factor": factor,
                "rope_low_freq_factor": low,
                "rope_high_freq_factor": high,
                "rope_original_positions": int(old),
            }
    raise UserError(f"{path}: tensor {_FREQUENCIES} is not the scaling of a published Llama 3")
