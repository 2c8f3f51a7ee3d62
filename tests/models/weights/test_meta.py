"""Meta's directories: names, RoPE order, model-parallel ranks, and pickles that want more."""

import io
import json
import pickle
import zipfile

import jax
import numpy as np
import pytest

import puna
from puna.configs.errors import UserError
from puna.models.weights import huggingface, torch_files
from puna.models.weights import meta as meta_files
from puna.models.weights.load import open_weights

PARAMS = {
    "dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64, "multiple_of": 8,
    "norm_eps": 1e-5, "rope_theta": 500000.0, "ffn_dim_multiplier": 0.38,
}  # fmt: skip
ALL = slice(None)
# The axis along which tensor parallelism splits: of the rows of what is computed, or of its inputs.
COLUMNS = ("attention.wo", "feed_forward.w2")


def write_meta(files, folder, params, ranks, **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for i, tensors in enumerate(ranks):
        (folder / f"consolidated.{i:02}.pth").write_bytes(files.torch_bytes(tensors, **kwargs))
    return folder


def split(tensors, n, embedding_axis=0):
    ranks = [{} for _ in range(n)]
    for name, tensor in tensors.items():
        axis = 1 if any(part in name for part in COLUMNS) else 0
        axis = embedding_axis if name.startswith("tok_embeddings") else axis
        if name.endswith("norm.weight"):
            parts = [tensor] * n
        else:
            parts = np.split(tensor, n, axis)
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = np.ascontiguousarray(part)
    return ranks


def assert_tree(found, wanted):
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), b), found, wanted)
    assert all(jax.tree.leaves(same)), same


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("embedding_axis", [0, 1])  # of Llama 3, of Llama 1 and 2
def test_equals_the_hugging_face_files(files, tiny, tmp_path, ranks, embedding_axis):
    config, _, hf = tiny
    hf = {n: w.astype(files.NUMPY["BF16"]) for n, w in hf.items()}
    meta = files.to_meta(config, hf)
    path = write_meta(files, tmp_path, PARAMS, split(meta, ranks, embedding_axis))
    model, params = puna.load(path)
    assert model.config.mlp_dim == config.mlp_dim and model.config.num_kv_heads == 2
    exact = {n: w.astype(np.float32) for n, w in hf.items()}
    assert_tree(params, huggingface.to_puna(config, exact))


def test_key_value_heads_repeated_on_more_ranks(files, tiny, tmp_path):
    config, _, hf = tiny
    meta = files.to_meta(config, hf)
    doubled = dict(meta)
    for name in meta:
        if ".wk." in name or ".wv." in name:
            doubled[name] = np.repeat(meta[name].reshape(2, 8, 32), 2, axis=0).reshape(32, 32)
    _, params = puna.load(write_meta(files, tmp_path, PARAMS, split(doubled, 4)))
    assert_tree(params, huggingface.to_puna(config, hf))


def config_of(files, tmp_path, params, tensors):
    return open_weights(write_meta(files, tmp_path, params, [tensors])).config


def test_params_json_of_every_generation(files, tiny, tmp_path, monkeypatch):
    config, _, hf = tiny
    meta = files.to_meta(config, hf)
    old = {k: v for k, v in PARAMS.items() if k not in ("rope_theta", "vocab_size")}
    made = config_of(files, tmp_path / "2", old | {"vocab_size": -1}, meta)
    assert (made.vocab_size, made.rope_theta, made.max_positions) == (64, 10000.0, 4096)
    scaled = PARAMS | {"use_scaled_rope": True}
    made = config_of(files, tmp_path / "3.1", scaled, meta)
    assert (made.rope_scaling_factor, made.rope_high_freq_factor) == (8.0, 4.0)
    assert made.max_positions == 131072 and not made.tie_embeddings
    tied = meta | {"output.weight": meta["tok_embeddings.weight"]}
    made = config_of(files, tmp_path / "3.2", scaled, tied)
    assert made.rope_scaling_factor == 32.0 and made.tie_embeddings
    # Training has given a Llama 3.2 a head of its own: its RoPE stays what it is.
    monkeypatch.setattr(meta_files, "_LLAMA32", {(32, 3)})
    made = config_of(files, tmp_path / "3.2 trained", scaled, meta)
    assert made.rope_scaling_factor == 32.0 and not made.tie_embeddings
    extra = meta | {"rope.freqs": np.ones(4, np.float32)}
    assert config_of(files, tmp_path / "freqs", PARAMS, extra).num_layers == 3


def test_published_widths_follow_from_params_json():
    from puna.models.weights.meta import _round_up

    published = {  # dim, multiplier, multiple_of: width
        (4096, 1.0, 256): 11008, (6656, 1.0, 256): 17920, (8192, 1.0, 256): 22016,
        (8192, 1.3, 4096): 28672, (4096, 1.3, 1024): 14336, (16384, 1.2, 4096): 53248,
        (2048, 1.5, 256): 8192, (3072, 1.0, 256): 8192,
    }  # fmt: skip
    for (dim, factor, multiple), width in published.items():
        assert _round_up(int(factor * int(2 * (4 * dim) / 3)), multiple) == width


@pytest.mark.parametrize("ranks", [1, 2])
def test_llama4_names_fusions_and_ranks(files, tmp_path, ranks):
    params = {
        "dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64,
        "multiple_of": 8, "ffn_exp": 4.0, "ffn_dim_multiplier": 0.38, "norm_eps": 1e-5,
        "rope_theta": 500000.0, "attention_chunk_size": 8, "nope_layer_interval": 4,
        "use_scaled_rope": True, "use_qk_norm": True,
        "moe_args": {"num_experts": 4, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1,
                     "interleave_moe_layer_step": 2},
    }  # fmt: skip
    fields = files.SCOUT | {
        "num_layers": 4, "rope_scaling_factor": 16.0, "rope_high_freq_factor": 1.0,
        "temperature_scale": 0.0, "max_positions": 262144,
    }  # fmt: skip
    config = files.model_config(fields)
    hf = files.random_tensors(files.hf_shapes(config))
    shards = [{} for _ in range(ranks)]

    def put(name, tensor, axis=None):
        parts = [tensor] * ranks if axis is None else np.split(tensor, ranks, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = np.ascontiguousarray(part)

    put("tok_embeddings.weight", hf["model.embed_tokens.weight"], 1)
    put("norm.weight", hf["model.norm.weight"])
    put("output.weight", hf["lm_head.weight"], 0)
    for i in range(4):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        put(f"{ours}attention.wqkv.layer_norm_weight", hf[f"{theirs}input_layernorm.weight"])
        q, k, v = (np.split(hf[f"{theirs}self_attn.{x}_proj.weight"], ranks) for x in "qkv")
        for r in range(ranks):
            shards[r][f"{ours}attention.wqkv.weight"] = np.concatenate([q[r], k[r], v[r]])
        put(f"{ours}attention.wo.weight", hf[f"{theirs}self_attn.o_proj.weight"], 1)
        mlp_norm = hf[f"{theirs}post_attention_layernorm.weight"]
        if not config.is_moe(i):
            put(f"{ours}feed_forward.mlp.layer_norm_weight", mlp_norm)
            gate, up = (
                np.split(hf[f"{theirs}feed_forward.{x}_proj.weight"], ranks) for x in ("gate", "up")
            )
            for r in range(ranks):
                shards[r][f"{ours}feed_forward.mlp.fc1_weight"] = np.concatenate([gate[r], up[r]])
            put(
                f"{ours}feed_forward.mlp.fc2_weight",
                hf[f"{theirs}feed_forward.down_proj.weight"],
                1,
            )
            continue
        put(f"{ours}feed_forward.norm.weight", mlp_norm)
        put(f"{ours}feed_forward.router_DE", hf[f"{theirs}feed_forward.router.weight"].T)
        put(f"{ours}feed_forward.global_gate_stats_3E", np.zeros((3, 4), np.float32))
        for x, name, axis in (("gate", "w_in_shared_FD", 0), ("up", "w_swiglu_FD", 0),
                              ("down", "w_out_shared_DF", 1)):  # fmt: skip
            shared = hf[f"{theirs}feed_forward.shared_expert.{x}_proj.weight"]
            put(f"{ours}feed_forward.{name}.weight", shared, axis)
        gate, up = np.split(hf[f"{theirs}feed_forward.experts.gate_up_proj"], 2, axis=2)
        down = hf[f"{theirs}feed_forward.experts.down_proj"]
        for name, tensor, axis in (("moe_w_in_eD_F", gate, 2), ("moe_w_swiglu_eD_F", up, 2),
                                   ("moe_w_out_eF_D", down, 1)):  # fmt: skip
            for r, part in enumerate(np.split(tensor, ranks, axis)):
                flat = np.ascontiguousarray(part).reshape(-1, part.shape[2])
                shards[r][f"{ours}feed_forward.experts.{name}"] = flat
    path = write_meta(files, tmp_path, params, shards)
    opened = open_weights(path)
    assert opened.config == config
    _, found = puna.load(path)
    assert_tree(found, huggingface.to_puna(config, hf))


# --- damaged and hostile ------------------------------------------------------------------------


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def evil(what):
    import builtins
    import os

    return {
        "system": pickle.dumps(Evil(os.system, "touch OWNED"), 2),
        "eval": pickle.dumps(Evil(builtins.eval, "1/0"), 4),
        "getattr": pickle.dumps(Evil(builtins.getattr, "x", "upper"), 2),
        "import": pickle.dumps(Evil(__import__, "antigravity"), 3),
        # A memo index that would make the unpickler in C reserve 64 GB.
        "memo": b"\x80\x02}r\xff\xff\xff\xff.",
        "bytes": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",
        "bytearray": b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b"x.",
        "set an attribute": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
        b"}X\x01\x00\x00\x00aK\x01sb.",
        "call a storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "a list": pickle.dumps([1, 2], 2),
        "cut": pickle.dumps({"a": 1}, 2)[:-2],
        "a number": pickle.dumps({"a": 1}, 2),
        "nothing": b"",
    }[what]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("system", "asks for .*system"), ("eval", "asks for builtins.eval"),
        ("getattr", "asks for .*getattr"), ("import", "asks for .*__import__"),
        ("memo", "does not|damaged|missing|tensor"), ("bytes", "damaged"),
        ("bytearray", "damaged"),
        ("set an attribute", "damaged"), ("call a storage", "damaged"),
        ("a list", "does not hold a dict"), ("cut", "damaged"),
        ("a number", "is not a tensor"), ("nothing", "damaged"),
    ],
)  # fmt: skip
def test_a_pickle_may_only_describe_tensors(files, tmp_path, monkeypatch, what, words):
    monkeypatch.chdir(tmp_path)
    path = write_meta(files, tmp_path / "m", PARAMS, [{}], pickle=evil(what))
    with pytest.raises(UserError, match=words) as caught:
        open_weights(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "OWNED").exists()


def test_states_beside_tensors_are_passed_over(files, tmp_path):
    state = {"layers.0.attention.wo._extra_state": io.BytesIO(b"x")}
    for protocol in (2, 4):
        data = files.torch_bytes({}, pickle.dumps(state, protocol))
        (tmp_path / "x.pth").write_bytes(data)
        assert torch_files.open_file(tmp_path / "x.pth") == {}


def broken(files, meta, what):
    """The bytes of consolidated.00.pth."""
    name = "norm.weight"
    whole = files.torch_bytes(meta)
    keys = [str(i) for i in range(len(meta))]
    strided = {k: v.T if k == "output.weight" else v for k, v in meta.items()}
    longer = {k: np.resize(v, (999, *v.shape[1:])) if k == name else v for k, v in meta.items()}
    match what:
        case "not a zip":
            return b"\x80\x02}q\x00."
        case "truncated":
            return whole[: len(whole) // 2]
        case "another zip":
            return zip_of({"word/document.xml": b"<x/>"})
        case "compressed":
            return files.torch_bytes(meta, compression=zipfile.ZIP_DEFLATED)
        case "strides":
            return files.torch_bytes(meta, files.torch_pickle(strided))
        case "too long":
            return files.torch_bytes(meta, files.torch_pickle(longer))
        case "path":
            return files.torch_bytes(meta, files.torch_pickle(meta, ["../../x", *keys[1:]]))
        case "float64":
            return files.torch_bytes(meta | {name: meta[name].astype(np.float64)})
        case "missing":
            return files.torch_bytes({k: v for k, v in meta.items() if k != name})
        case "extra":
            return files.torch_bytes(meta | {"layers.0.attention.wq.bias": meta[name]})
        case "shape":
            return files.torch_bytes(meta | {name: meta[name][:-1]})


def zip_of(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("not a zip", "not a zip archive"), ("truncated", "not a zip archive"),
        ("another zip", "not one of torch.save"), ("compressed", "is compressed"),
        ("strides", "not stored row by row"), ("too long", "beyond the end of its bytes"),
        ("path", "lacks the bytes"), ("float64", "DoubleStorage"),
        ("missing", "norm.weight is missing"), ("extra", "wq.bias is not part"),
        ("shape", "the architecture says"),
    ],
)  # fmt: skip
def test_damaged_files_are_one_line(files, tiny, tmp_path, what, words):
    config, _, hf = tiny
    meta = files.to_meta(config, hf)
    path = write_meta(files, tmp_path, PARAMS, [meta])
    (path / "consolidated.00.pth").write_bytes(broken(files, meta, what))
    with pytest.raises(UserError, match=words) as caught:
        open_weights(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args"),
        ({"dim": "32"}, "dim='32' must be of type int"), ({"n_layers": -3}, "must be at least 1"),
        ({"n_layers": 10**8}, "layers cannot be made of"), ({"n_heads": None}, "n_heads=None"),
        ({"moe_args": {"experts": 3}}, "moe_args must be an object"),
    ],
)  # fmt: skip
def test_params_json_is_honoured_or_refused(files, tiny, tmp_path, change, words):
    config, _, hf = tiny
    meta = files.to_meta(config, hf)
    with pytest.raises(UserError, match=words):
        config_of(files, tmp_path, PARAMS | change, meta)


def test_a_rank_that_is_missing(files, tiny, tmp_path):
    config, _, hf = tiny
    path = write_meta(files, tmp_path, PARAMS, split(files.to_meta(config, hf), 4))
    (path / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match="consolidated.01.pth is missing"):
        open_weights(path)


@pytest.mark.slow
def test_reads_what_torch_writes(files, tiny, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch.save")
    import collections

    config, _, hf = tiny
    state = collections.OrderedDict(
        (n, torch.from_numpy(w).to(torch.bfloat16)) for n, w in files.to_meta(config, hf).items()
    )
    state["layers.0.attention.wo._extra_state"] = io.BytesIO(b"x")
    torch.save(state, tmp_path / "x.pth")
    found = torch_files.open_file(tmp_path / "x.pth")
    assert found.keys() == state.keys() - {"layers.0.attention.wo._extra_state"}
    for name, tensor in found.items():
        wanted = state[name].view(torch.uint16).numpy()
        assert np.array_equal(tensor[(ALL,) * len(tensor.shape)].view(np.uint16), wanted)
