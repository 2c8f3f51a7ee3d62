"""Small checkpoints in the formats of others, written without the code that reads them."""

import io
import json
import pathlib
import struct
import zipfile

import ml_dtypes
import numpy as np

from puna.configs import schema
from puna.models.release import source

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

TINY = {
    "vocab_size": 64, "embed_dim": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "mlp_dim": 32, "max_positions": 64,
}  # fmt: skip
SCOUT = TINY | {
    "num_layers": 5, "moe_interval": 2, "num_experts": 4, "expert_dim": 16, "nope_interval": 4,
    "chunk_size": 8, "qk_norm": True, "temperature_scale": 0.1,
}  # fmt: skip
VISION = SCOUT | {
    "vision": {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 128, "image_size": 16,
               "patch_size": 4, "adapter_dim": 24, "token_id": 60},
}  # fmt: skip
NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
         "BF16": np.dtype(ml_dtypes.bfloat16),
         "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}  # fmt: skip


def model_config(fields):
    return schema.from_dict(fields, schema.ModelConfig)


def random_tensors(shapes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32).astype(dtype) for n, s in shapes.items()}


def safetensors_bytes(tensors, header=None):
    """The file, as its format says; `header` replaces entries of the true one."""
    names = {dtype: name for name, dtype in NUMPY.items()}
    entries, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [len(data), len(data) + len(raw)]}  # fmt: skip
        data += raw
    text = json.dumps(entries | (header or {})).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_hf(folder, config_json, tensors, shards=1):
    """A Hugging Face directory of one file, or of several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return folder
    names, place = list(tensors), {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mine = names[i::shards]
        (folder / shard).write_bytes(safetensors_bytes({n: tensors[n] for n in mine}))
        place |= dict.fromkeys(mine, shard)
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def hf_table(config):
    return source.hf_table(config)


def hf_shapes(config):
    table, _ = source.hf_table(config)
    return {s.name: s.hf_shape for leaf in table.values() for s in leaf.sources}


def hf_family(name):
    """config.json and float32 tensors of a small model of a family."""
    if name == "vision":
        config = model_config(VISION)
        return source.hf_table(config)[1], random_tensors(hf_shapes(config))
    folder = FIXTURES.parent / "media" if name == "cross" else FIXTURES
    with np.load(folder / f"{name}.npz", allow_pickle=False) as stored:
        tensors = {k[7:]: stored[k] for k in stored.files if k.startswith("weight/")}
        return json.loads(str(stored["config"])), tensors


def read_safetensors(folder):
    """Every tensor of a directory, by the `safetensors` package's own reader of bytes."""
    import safetensors

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            assert name not in found
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


# --- torch.save ---------------------------------------------------------------------------------


def _text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _int(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(items):
    return b"(" + b"".join(items) + b"t"


ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def torch_pickle(tensors, keys=None):
    """The pickle of an OrderedDict of tensors, opcode by opcode as torch 2 writes it."""
    kinds = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
             "float64": "DoubleStorage"}  # fmt: skip
    out = b"\x80\x02" + ORDERED_DICT + b"("
    for i, (name, tensor) in enumerate(tensors.items()):
        strides = [s // tensor.itemsize for s in tensor.strides]
        storage = _tuple([
            _text("storage"), f"ctorch\n{kinds[tensor.dtype.name]}\n".encode(),
            _text(str(i if keys is None else keys[i])), _text("cpu"), _int(tensor.size),
        ])  # fmt: skip
        out += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple([
            storage + b"Q", _int(0), _tuple(map(_int, tensor.shape)), _tuple(map(_int, strides)),
            b"\x89", ORDERED_DICT,
        ]) + b"R"  # fmt: skip
    return out + b"u."


def torch_bytes(tensors, pickle=None, compression=zipfile.ZIP_STORED):
    """A file of torch.save."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", torch_pickle(tensors) if pickle is None else pickle)
        archive.writestr("archive/byteorder", "little")
        for i, tensor in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", tensor.tobytes())
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def to_meta(config, hf):
    """The tensors of a dense Llama in Meta's names and order of RoPE pairs, from Hugging Face's."""

    def interleave(w, heads):
        return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    out = {"tok_embeddings.weight": hf["model.embed_tokens.weight"],
           "norm.weight": hf["model.norm.weight"]}  # fmt: skip
    if "lm_head.weight" in hf:
        out["output.weight"] = hf["lm_head.weight"]
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        for a, b in {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
                     "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
                     "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
                     "mlp.up_proj": "feed_forward.w3"}.items():  # fmt: skip
            out[f"{ours}{b}.weight"] = hf[f"{theirs}{a}.weight"]
        for x, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
            w = hf[f"{theirs}self_attn.{x}_proj.weight"]
            out[f"{ours}attention.w{x}.weight"] = interleave(w, heads)
    return {name: np.ascontiguousarray(w) for name, w in out.items()}
