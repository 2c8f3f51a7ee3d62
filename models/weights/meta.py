"""Meta's own directories: params.json and consolidated.NN.pth, one file a model-parallel rank.

Names and layouts are those of `llama_models` (llama3/model.py, llama4/{model,moe,ffn}.py). RoPE
pairs lie side by side in all of them. What Llama 3.2 Vision has beyond a text model is in
`meta_cross`; the image encoder of Llama 4 is read from Hugging Face's files only.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ...configs import schema
from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from . import huggingface, keys, licences, meta_cross, torch_files
from .huggingface import Row
from .safetensors_files import check_depth, read_json, same
from .tensors import Joined, Part, Weights, check, warn

ROOT = (
    Row("embed/table_VD", "I D", "tok_embeddings.weight", "I D"),
    Row("norm/scale_D", "D", "norm.weight", "D"),
)
UNTIED = (Row("unembed/table_DV", "D V", "output.weight", "V D"),)
ATTENTION = (
    Row("attention_norm/scale_D", "D", "attention_norm.weight", "D"),
    Row("mlp_norm/scale_D", "D", "ffn_norm.weight", "D"),
    Row("attention/wq_DNH", "D N RP", "attention.wq.weight", "NPR D"),
    Row("attention/wk_DKH", "D K RP", "attention.wk.weight", "KPR D"),
    Row("attention/wv_DKH", "D K H", "attention.wv.weight", "KH D"),
    Row("attention/wo_NHD", "N H D", "attention.wo.weight", "D NH"),
)
DENSE = (
    Row("mlp/w_gate_DF", "D F", "feed_forward.w1.weight", "F D"),
    Row("mlp/w_up_DF", "D F", "feed_forward.w3.weight", "F D"),
    Row("mlp/w_down_FD", "F D", "feed_forward.w2.weight", "D F"),
)
EXPERTS = (
    Row("moe/router_DE", "D E", "feed_forward.router_DE", "D E"),
    Row("moe/w_gate_EDF", "E D X", "feed_forward.experts.moe_w_in_eD_F", "E D X"),
    Row("moe/w_up_EDF", "E D X", "feed_forward.experts.moe_w_swiglu_eD_F", "E D X"),
    Row("moe/w_down_EFD", "E X D", "feed_forward.experts.moe_w_out_eF_D", "E X D"),
    Row("moe/shared/w_gate_DF", "D X", "feed_forward.w_in_shared_FD.weight", "X D"),
    Row("moe/shared/w_up_DF", "D X", "feed_forward.w_swiglu_FD.weight", "X D"),
    Row("moe/shared/w_down_FD", "X D", "feed_forward.w_out_shared_DF.weight", "D X"),
)

# Released files' own names for tensors of the table above.
_RENAMED = {
    "attention.wqkv.layer_norm_weight": "attention_norm.weight",
    "feed_forward.mlp.layer_norm_weight": "ffn_norm.weight",
    "feed_forward.norm.weight": "ffn_norm.weight",
    "feed_forward.mlp.fc2_weight": "feed_forward.w2.weight",
}
# RoPE frequencies and statistics of the training of Llama 4.
_IGNORED = re.compile(
    r"rope\.freqs|freqs_cis|layers\.\d+\.(attention\.inner_attention\.rope\.freqs"
    r"|feed_forward\.(global_gate_stats_3E|running_gate_stats_3E|experts\.expert_activation_DE"
    r"|expert_activation_DE)|.*\._extra_state)"
)
_VISION = re.compile(r"vision_(embeddings|projection)\.")
# Width and depth of the text models of Llama 3.2.
_LLAMA32 = {(2048, 16), (3072, 28)}
_HARMLESS = {"max_batch_size", "max_seq_len", "model_parallel_size", "vision_args"}
_KEYS = {
    "attention_chunk_size", "attn_scale", "attn_temperature_tuning", "dim", "ffn_dim_multiplier",
    "ffn_exp", "floor_scale", "head_dim", "moe_args", "multiple_of", "n_heads", "n_kv_heads",
    "n_layers", "nope_layer_interval", "norm_eps", "rope_high_freq_factor", "rope_scaling_factor",
    "rope_theta", "use_qk_norm", "use_scaled_rope", "vocab_size",
}  # fmt: skip


def is_whole(path: pathlib.Path) -> bool:
    """Whether a directory has both params.json and weights."""
    return (path / "params.json").is_file() and bool(list(path.glob("consolidated*.pth")))


def open_directory(path: pathlib.Path) -> Weights:
    """Open a directory of Meta's and compare its tensors with its params.json.

    Raises:
      UserError: whatever keeps it from being loaded, in one line.
    """
    params = read_json(path / "params.json")
    ranks = [_rename(torch_files.open_file(file)) for file in _files(path)]
    names = ranks[0].keys()
    for rank, tensors in enumerate(ranks):
        if odd := sorted(tensors.keys() ^ names):
            raise UserError(f"{path}: rank {rank} and rank 0 do not both have tensor {odd[0]}")
    if vision := [name for name in names if _VISION.match(name)]:
        warn(
            f"{path}: the image encoder ({len(vision)} tensors) is left out; the Hugging Face "
            "files of this model have it in the form that is read"
        )
    parts = {n: [rank[n] for rank in ranks] for n in names if n not in vision}
    config = config_of(path, params.get("model", params), parts)
    check_depth(path, config, parts)
    table = leaves(config)
    shapes = {s.name: s.hf_shape for leaf in table.values() for s in leaf.sources}
    shapes |= meta_cross.shapes(config)
    parts = _split(path, config, parts)
    tensors = {name: _joined(path, name, p, shapes.get(name)) for name, p in parts.items()}
    tensors = meta_cross.assemble(path, config, tensors)
    ignored = {"output.weight"} if config.tie_embeddings else set()
    check(path, table, tensors, ignored)
    return Weights(config, table, tensors, licences.origin_of(path))


def leaves(config: ModelConfig) -> dict[str, huggingface.Leaf]:
    """The table of a model in Meta's layout, the ranks joined and what they fuse taken apart."""
    root = ROOT + (() if config.tie_embeddings else UNTIED)

    def layer(i):
        if config.is_cross(i):
            return meta_cross.LAYER + DENSE
        return ATTENTION + (EXPERTS if config.is_moe(i) else DENSE)

    table = huggingface.stack(config, root, layer, "", lambda i: meta_cross.layer_prefix(config, i))
    return table | meta_cross.leaves(config)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    single = path / "consolidated.pth"
    found = sorted(path.glob("consolidated.*.pth"))
    if single.exists():
        if found:
            raise UserError(
                f"{path}: has both {single.name} and {found[0].name}; keep those of one model"
            )
        found = [single]
    wanted = [path / f"consolidated.{i:02}.pth" for i in range(len(found))]
    if not found:
        raise UserError(f"{path}: has params.json but no consolidated.00.pth")
    if found != [single] and found != wanted:
        missing = next(w for w in wanted if w not in found)
        raise UserError(f"{path}: {missing.name} is missing, there is {found[-1].name}")
    return found


def _rename(tensors):
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")  # of Llama 3.2 Vision
        if _IGNORED.fullmatch(name):
            continue
        if match := re.fullmatch(r"(layers\.\d+\.)(.*)", name):
            name = match[1] + _RENAMED.get(match[2], match[2])
        if name in renamed:
            raise UserError(f"tensor {name} appears twice, under two names")
        renamed[name] = tensor
    return renamed


def config_of(path, params: Mapping[str, Any], parts) -> ModelConfig:
    """Map params.json, whose unknown keys are refused; a few facts stand in the tensors only."""
    where = path / "params.json"
    cross = bool(params.get(meta_cross.LAYERS))
    known = _KEYS | _HARMLESS | (meta_cross.KEYS if cross else set())
    for key, value in params.items():
        if key not in known and not keys.says_nothing(key, value):
            raise UserError(f"{where}: {key}={str(value)[:60]} is not a key that puna knows")

    def get(key, kind, default: Any = None) -> Any:
        value = params.get(key, default)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{where}: {key}={value!r} must be of type {kind.__name__}")
        if kind is int and not 0 < value < 2**31:
            raise UserError(f"{where}: {key}={value!r} must be at least 1")
        return value

    dim, heads = get("dim", int), get("n_heads", int)
    ranks = len(next(iter(parts.values()), [0]))
    fields: dict[str, Any] = {
        "embed_dim": dim,
        "num_heads": heads,
        "num_layers": get("n_layers", int),
        "num_kv_heads": get("n_kv_heads", int, heads),
        "head_dim": get("head_dim", int, dim // heads),
        "norm_eps": get("norm_eps", float, 1e-5),
        "rope_theta": get("rope_theta", float, 10000.0),
    }
    fields["vocab_size"] = _vocab_size(where, params.get("vocab_size", -1), parts, dim, ranks)
    width = int(2 * int(get("ffn_exp", float, 4.0) * dim) / 3)
    width = int(get("ffn_dim_multiplier", float, 1.0) * width)
    multiple = get("multiple_of", int, 256)
    fields["mlp_dim"] = _round_up(width, multiple)
    scaled = get("use_scaled_rope", bool, False)
    moe = params.get("moe_args")
    if moe is not None:
        fields |= _llama4(where, get, moe, width, multiple, fields["num_layers"])
    tied = "output.weight" not in parts
    if not tied and ranks == 1 and not cross:  # Llama 3.2 writes the one table twice
        tied = same(parts["output.weight"][0], parts["tok_embeddings.weight"][0])
    if scaled:
        # Of the dense ones only Llama 3.2's text models scale by 32; their params.json does not say
        # so, the published Hugging Face configurations do. They are known by the one table, and by
        # their sizes where training has taken it apart.
        small = tied or (dim, fields["num_layers"]) in _LLAMA32
        factor = 16.0 if moe is not None else 32.0 if small else 8.0
        fields["rope_scaling_factor"] = get("rope_scaling_factor", float, factor)
        high = 1.0 if moe is not None else 4.0
        fields["rope_high_freq_factor"] = get("rope_high_freq_factor", float, high)
    fields["tie_embeddings"] = tied
    # Not in the file: the published figures by generation, which no number depends on.
    fields["max_positions"] = (
        262144 if moe is not None else 131072 if scaled
        else 8192 if fields["rope_theta"] > 10000 else 4096
    )  # fmt: skip
    if cross:
        fields |= meta_cross.fields(where, get, fields, parts)
    return schema.from_dict(fields, ModelConfig, "model.")


def _vocab_size(where, value, parts, dim, ranks) -> int:
    if type(value) is int and value > 0:
        return value
    if "tok_embeddings.weight" not in parts:
        raise UserError(f"{where.parent}: tensor tok_embeddings.weight is missing")
    rows, *columns = parts["tok_embeddings.weight"][0].shape
    return rows if columns == [dim // ranks] else rows * ranks


def _llama4(where, get, moe, width, multiple, num_layers) -> dict[str, Any]:
    known = {"num_experts", "capacity_factor", "auto_scale_F", "top_k", "interleave_moe_layer_step"}
    if not isinstance(moe, dict) or not moe.keys() <= known:
        raise UserError(f"{where}: moe_args must be an object of {', '.join(sorted(known))}")
    for key, value in moe.items():
        if isinstance(value, str | list | dict):
            raise UserError(f"{where}: moe_args.{key}={value!r} must be a number")
    if moe.get("auto_scale_F", True):
        width = int(width / (moe.get("capacity_factor", 1.0) + 1))
    step = moe.get("interleave_moe_layer_step", 1)
    chunk = get("attention_chunk_size", int, 2**30)
    fields = {
        "moe_interval": step,
        "num_experts": moe.get("num_experts", 0),
        "experts_per_token": moe.get("top_k", 1),
        "expert_dim": _round_up(width, multiple),
        "router": "sigmoid",
        "shared_expert": True,
        "qk_norm": get("use_qk_norm", bool, False),
        "chunk_size": 0 if chunk == 2**30 else chunk,
    }
    every = get("nope_layer_interval", int, num_layers + 1)
    fields["nope_interval"] = every if every <= num_layers else 0
    if fields["nope_interval"] and get("attn_temperature_tuning", bool, False):
        fields["temperature_scale"] = get("attn_scale", float, 0.1)
        fields["temperature_floor"] = int(get("floor_scale", float, 8192.0))
    return fields


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _split(path, config: ModelConfig, parts):
    """Take fused tensors apart, rank by rank, and give those of the experts their third axis."""
    out = {}
    for name, ranks in parts.items():
        n, ranks = len(ranks), meta_cross.one_gate(name, ranks)
        if name.endswith("attention.wqkv.weight"):
            heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
            rows = [math.ceil(h / n) * config.head_dim for h in heads]
            made = [
                ("wqkv.weight", f"w{x}.weight", size) for x, size in zip("qkv", rows, strict=True)
            ]
        elif name.endswith("feed_forward.mlp.fc1_weight"):
            half = ranks[0].shape[0] // 2
            made = [("mlp.fc1_weight", f"w{x}.weight", half) for x in (1, 3)]
        elif ".experts.moe_w_" in name and config.num_experts:
            if len(ranks[0].shape) == 2 and ranks[0].shape[0] % config.num_experts == 0:
                E = config.num_experts
                ranks = [r.reshape((E, r.shape[0] // E, r.shape[1])) for r in ranks]
            out[name] = ranks
            continue
        else:
            out[name] = ranks
            continue
        if any(r.shape[:1] != (sum(size for *_, size in made),) for r in ranks):
            raise UserError(
                f"{path}: tensor {name} has shape {ranks[0].shape}, "
                f"the architecture says {sum(size for *_, size in made)} rows a rank"
            )
        start = 0
        for old, new, size in made:
            out[name.replace(old, new)] = [Part(r, start, start + size) for r in ranks]
            start += size
    return out


def _joined(path, name: str, ranks, shape):
    """One tensor of what the ranks hold: copies, or parts along the axis that the shapes tell."""
    n, part = len(ranks), ranks[0].shape
    if any(r.shape != part or r.dtype != ranks[0].dtype for r in ranks):
        raise UserError(f"{path}: the ranks disagree on the shape of tensor {name}")
    if n == 1 or shape is None or part == shape or len(part) != len(shape):
        return ranks[0]
    for axis in range(len(shape)):
        if part[axis] * n == shape[axis] and part[:axis] + part[axis + 1 :] == (
            shape[:axis] + shape[axis + 1 :]
        ):
            return Joined(ranks, axis)
    if re.search(r"attention\.w[kv]\.weight$", name) and part[1:] == shape[1:]:
        copies, rest = divmod(part[0] * n, shape[0])
        if not rest and n % copies == 0:  # fewer key/value heads than ranks: each stands repeated
            return Joined(ranks[::copies], 0)
    raise UserError(f"{path}: tensor {name}: {n} ranks of {part} do not make {shape}")
