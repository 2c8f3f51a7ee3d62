"""Meta's directories of Llama 3.2 Vision: names, tables of places, ranks, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from puna.configs import architecture, get_config, schema
from puna.configs.errors import UserError
from puna.models.release.convert import convert
from puna.models.weights import meta, meta_cross, tiled_vision_table, torch_files
from puna.models.weights.load import open_weights

PARAMS = {
    "dim": 32, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64, "multiple_of": 8,
    "norm_eps": 1e-5, "rope_theta": 500000.0, "ffn_dim_multiplier": 0.5, "use_scaled_rope": True,
    "vision_chunk_size": 28, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 2,
}  # fmt: skip
WIDTH, PATCHES = 32, 5
ENCODER = "vision_model.vision_encoder."
# How the ranks split a tensor: by the end of its name.
COLUMNS = ("attention.wo.weight", "attn.wo.weight", "feed_forward.w2.weight", "c_proj.weight")
WHOLE = (
    "norm.weight", "ln_1.weight", "ln_2.weight", "ln_pre.weight", "ln_post.weight", "ln_1.bias",
    "ln_2.bias", "ln_pre.bias", "ln_post.bias", "c_proj.bias", "gate", "gate_attn", "gate_ffwd",
    "gate_ffn", "class_embedding", "positional_embedding", "embed.embedding",
)  # fmt: skip


def schedule(num_layers, count):
    """Layers of the text with one that attends to images before them, as Meta's code finds them."""
    every = -(-num_layers // count)
    return sorted(list(reversed(range(num_layers)))[::every][:count])


def by_grid(table):
    """[4, 4, ...] -> [9, 4 * ...]: nothing, and the eight grids of at most four tiles."""
    out = np.zeros((9, 4, *table.shape[2:]), table.dtype)
    shapes = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    for entry, (rows, columns) in zip(out[1:], shapes, strict=True):
        for row in range(rows):
            for column in range(columns):
                entry[row * columns + column] = table[row, column]
    return out.reshape(9, -1)


def to_meta(hf, places):
    """Meta's tensors from Hugging Face's of `PARAMS`, but for the tables of places."""

    def interleave(w, heads):
        return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    text, out = "language_model.model.", dict(places)
    embedding = hf[f"{text}embed_tokens.weight"]
    out["text_model.tok_embeddings.weight"] = embedding[:64]
    out["text_model.learnable_embedding.weight"] = embedding[64:]
    out["text_model.norm.weight"] = hf[f"{text}norm.weight"]
    out["text_model.output.weight"] = hf["language_model.lm_head.weight"]
    mlp = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    before, at = schedule(5, 2), 0
    for i in range(5):
        kinds = ["cross_attn", "self_attn"] if i in before else ["self_attn"]
        for kind in kinds:
            ours = f"text_model.layers.{i}."
            if kind == "cross_attn":
                ours = f"text_model.cross_attention_layers.{before.index(i)}."
            theirs = f"{text}layers.{at}."
            at += 1
            for x in "qkvo":
                w = hf[f"{theirs}{kind}.{x}_proj.weight"]
                if kind == "self_attn" and x in "qk":
                    w = interleave(w, {"q": 4, "k": 2}[x])
                out[f"{ours}attention.w{x}.weight"] = w
            for a, b in mlp.items():
                out[f"{ours}feed_forward.{b}.weight"] = hf[f"{theirs}mlp.{a}.weight"]
            out[f"{ours}attention_norm.weight"] = hf[f"{theirs}input_layernorm.weight"]
            out[f"{ours}ffn_norm.weight"] = hf[f"{theirs}post_attention_layernorm.weight"]
            if kind == "cross_attn":
                for x in "qk":
                    norm = hf[f"{theirs}cross_attn.{x}_norm.weight"]
                    out[f"{ours}attention.{x}_norm.weight"] = norm
                out[f"{ours}gate_attn"] = hf[f"{theirs}cross_attn_attn_gate"]
                out[f"{ours}gate_ffwd"] = hf[f"{theirs}cross_attn_mlp_gate"]

    patches = hf["vision_model.patch_embedding.weight"]
    out[f"{ENCODER}conv1._linear.weight"] = patches.reshape(len(patches), -1)
    out[f"{ENCODER}class_embedding"] = hf["vision_model.class_embedding"]
    positions = "vision_model.gated_positional_embedding"
    out[f"{ENCODER}positional_embedding"] = hf[f"{positions}.embedding"]
    out[f"{ENCODER}gated_positional_embedding_gate"] = hf[f"{positions}.gate"]
    for x in ("pre", "post"):
        gate = hf[f"vision_model.{x}_tile_positional_embedding.gate"]
        out[f"{ENCODER}{x}_tile_pos_embed.gate"] = gate
        for y in ("weight", "bias"):
            out[f"{ENCODER}ln_{x}.{y}"] = hf[f"vision_model.layernorm_{x}.{y}"]
    for y in ("weight", "bias"):
        out[f"vision_model.vision_projection.{y}"] = hf[f"multi_modal_projector.{y}"]
    for kind, depth in (("transformer", 32), ("global_transformer", 8)):
        for i in range(depth):
            ours, theirs = f"{ENCODER}{kind}.resblocks.{i}.", f"vision_model.{kind}.layers.{i}."
            for x in "qkvo":
                out[f"{ours}attn.w{x}.weight"] = hf[f"{theirs}self_attn.{x}_proj.weight"]
            for y in ("weight", "bias"):
                for a, b in {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                             "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
                             }.items():  # fmt: skip
                    out[f"{ours}{b}.{y}"] = hf[f"{theirs}{a}.{y}"]
            if kind == "global_transformer":
                for gate in ("gate_attn", "gate_ffn"):
                    out[f"{ours}{gate}"] = hf[f"{theirs}{gate}"]
    return {name: np.ascontiguousarray(w) for name, w in out.items()}


@pytest.fixture(scope="module")
def model(files):
    """The config, Hugging Face's tensors and Meta's of one model of random numbers."""
    config = files.model_config({
        "vocab_size": 64, "embed_dim": 32, "mlp_dim": 48, "num_layers": 7, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "norm_eps": 1e-5, "rope_theta": 5e5,
        "rope_scaling_factor": 8.0, "rope_high_freq_factor": 4.0, "max_positions": 131072,
        "tie_embeddings": False, "cross": {"first": 1, "interval": 4},
        "vision": {
            "num_layers": 32, "embed_dim": WIDTH, "num_heads": 16, "mlp_dim": 4 * WIDTH,
            "image_size": 28, "patch_size": 14, "max_tiles": 4, "global_layers": 8,
            "intermediate_layers": "3,7,15,23,30", "token_id": 64, "extra_rows": 8,
        },
    })  # fmt: skip
    hf = files.random_tensors(files.hf_shapes(config))
    shapes = {"gated_positional_embedding": (4, 4, PATCHES, WIDTH),
              "pre_tile_pos_embed.embedding": (4, 4, 1, WIDTH),
              "post_tile_pos_embed.embedding": (4, 4, 1, WIDTH)}  # fmt: skip
    places = {
        f"{ENCODER}{name}": table for name, table in files.random_tensors(shapes, seed=1).items()
    }
    for ours, theirs in {
        "gated_positional_embedding": "gated_positional_embedding.tile_embedding.weight",
        "pre_tile_pos_embed.embedding": "pre_tile_positional_embedding.embedding.weight",
        "post_tile_pos_embed.embedding": "post_tile_positional_embedding.embedding.weight",
    }.items():
        made = by_grid(places[f"{ENCODER}{ours}"])
        assert made.shape == hf[f"vision_model.{theirs}"].shape
        hf[f"vision_model.{theirs}"] = made
    return config, hf, to_meta(hf, places)


def write(files, folder, tensors, ranks=1, params=PARAMS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    shards = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        axis = 1 if name.endswith(COLUMNS) else 0
        parts = [tensor] * ranks if name.endswith(WHOLE) else np.split(tensor, ranks, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = np.array(part, order="C")
    for i, shard in enumerate(shards):
        name = "consolidated.pth" if ranks == 1 else f"consolidated.{i:02}.pth"
        (folder / name).write_bytes(files.torch_bytes(shard))
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_equals_the_hugging_face_files(files, model, tmp_path, ranks):
    config, hf, tensors = model
    rope = {"text_model.rope.freqs": np.ones(ranks, np.float32)}
    found = open_weights(write(files, tmp_path / "meta", tensors | rope, ranks))
    assert found.config == config
    files.write_hf(tmp_path / "hf", tiled_vision_table.to_hf(config), hf)
    wanted = open_weights(tmp_path / "hf")
    assert found.table.keys() == wanted.table.keys()
    for path, leaf in wanted.table.items():
        assert found.table[path].shape == leaf.shape
        for a, b in zip(found.table[path].sources, leaf.sources, strict=True):
            np.testing.assert_array_equal(found.read(a), wanted.read(b), err_msg=path)


def reached(tensors):
    """Meta's tensors with zeros where no grid of at most four tiles has a tile."""
    used = np.array([[y * x == 0 or (y, x) == (1, 1) for x in range(4)] for y in range(4)])
    return {n: np.where(used[..., None, None], w, 0) if w.ndim == 4 else w
            for n, w in tensors.items()}  # fmt: skip


def stored(folder):
    """Every tensor of the one file as it lies there."""
    found = torch_files.open_file(folder / "consolidated.00.pth")
    return {n: (t.dtype, t.shape, t[(slice(None),) * len(t.shape)].tobytes())
            for n, t in found.items()}  # fmt: skip


# Through a run it takes seconds.
@pytest.mark.parametrize("kind", ["F32", pytest.param("BF16", marks=pytest.mark.slow)])
def test_written_again_every_byte_is_the_same(files, model, tmp_path, kind):
    """Meta's layout to itself, one dtype through a run; Hugging Face's to Meta's and back."""
    config, hf, tensors = model
    dtype = files.NUMPY[kind]
    tensors = {n: w.astype(dtype) for n, w in reached(tensors).items()}
    write(files, tmp_path / "meta", tensors)
    between = tmp_path / "meta"
    if kind == "BF16":
        between = tmp_path / "run"
        convert(tmp_path / "meta", between, to="puna")
    convert(between, tmp_path / "again", to="meta")
    assert stored(tmp_path / "again") == {
        n: (w.dtype, w.shape, w.tobytes()) for n, w in tensors.items()
    }
    hf = {n: w.astype(dtype) for n, w in hf.items()}
    src = files.write_hf(tmp_path / "hf", tiled_vision_table.to_hf(config), hf)
    convert(src, tmp_path / "from_hf", to="meta")
    assert stored(tmp_path / "from_hf") == stored(tmp_path / "again")
    convert(tmp_path / "from_hf", tmp_path / "back")
    assert files.read_safetensors(tmp_path / "back") == files.read_safetensors(src)
    assert open_weights(tmp_path / "again").config == config


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ((1, 0), "row 0, column 0 of tiles has other values in other grids"),
        ((1, 3), "has values for tiles beyond a grid"),  # of a grid of one tile
        ((0, 0), "has values for tiles beyond a grid"),  # where there is no image
    ],
)
def test_grids_with_values_of_their_own_are_refused(files, model, tmp_path, entry, words):
    config, hf, _ = model
    name = "vision_model.gated_positional_embedding.tile_embedding.weight"
    table = hf[name].copy()
    table.reshape(9, 4, -1)[entry] += 1
    src = files.write_hf(tmp_path / "hf", tiled_vision_table.to_hf(config), hf | {name: table})
    with pytest.raises(UserError, match=f"gated_positional_embedding: .*{words}.*use --to=hf"):
        convert(src, tmp_path / "meta", to="meta")
    assert not (tmp_path / "meta").exists()


def test_a_part_is_that_of_the_whole(files, model, tmp_path):
    found = open_weights(write(files, tmp_path, model[2], 2))
    rng = np.random.default_rng(0)
    for path in ("embed/table_VD", "vision/tile_positions_GIPD", "vision/pre_tile_GID",
                 "vision/projector_FD"):  # fmt: skip
        (source,) = found.table[path].sources
        whole = found.read(source)
        for _ in range(8):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in whole.shape]
            index = tuple(slice(int(low), int(high)) for low, high in ends)
            np.testing.assert_array_equal(found.read(source, index), whole[index])


def test_layers_are_where_metas_code_has_them():
    for num_layers in range(1, 40):
        for count in range(1, num_layers + 1):
            places = schedule(num_layers, count)
            sizes = {"class_embedding": 4, "learnable_embedding.weight": 8}
            parts = {f"{ENCODER}{n}" if n[0] == "c" else n: [np.empty(s)] for n, s in sizes.items()}
            params = PARAMS | {"vision_num_cross_attention_layers": count}
            made = meta_cross.fields(
                None, lambda key, *_, params=params: params[key],
                {"num_layers": num_layers, "vocab_size": 64}, parts,
            )  # fmt: skip
            config = dataclasses.replace(
                schema.ModelConfig(), num_layers=made["num_layers"],
                cross=architecture.CrossConfig(**made["cross"]),
            )  # fmt: skip
            names = []
            for i in range(num_layers):
                if i in places:
                    names.append(f"cross_attention_layers.{places.index(i)}.")
                names.append(f"layers.{i}.")
            found = [meta_cross.layer_prefix(config, i) for i in range(config.num_layers)]
            assert found == names, (num_layers, count)


@pytest.mark.parametrize(
    ("variant", "dim", "layers", "heads", "multiple", "cross"),
    [("11b", 4096, 32, 32, 1024, 8), ("90b", 8192, 80, 64, 4096, 20)],
)
def test_published_models(tmp_path, variant, dim, layers, heads, multiple, cross):
    params = PARAMS | {
        "dim": dim, "n_layers": layers, "n_heads": heads, "n_kv_heads": 8, "vocab_size": 128256,
        "ffn_dim_multiplier": 1.3, "multiple_of": multiple, "vision_chunk_size": 560,
        "vision_num_cross_attention_layers": cross,
    }  # fmt: skip
    nothing = np.empty((0, 0))
    parts = {"tok_embeddings.weight": [nothing], "output.weight": [nothing],
             f"{ENCODER}class_embedding": [np.empty(1280)],
             "learnable_embedding.weight": [np.empty((8, 1))]}  # fmt: skip
    found = meta.config_of(tmp_path, params, parts)
    wanted = schema.from_dict(get_config(f"llama3:3.2-{variant}-vision")).model
    assert found == dataclasses.replace(wanted, remat=found.remat)


def test_a_gate_may_stand_once_for_every_channel(files, model, tmp_path):
    _, hf, tensors = model
    name = "text_model.cross_attention_layers.1.gate_attn"
    wide = tensors | {name: np.repeat(tensors[name], 32)}
    found = open_weights(write(files, tmp_path / "a", wide, 2))
    source = found.table["tail/layer_1/cross_attention/gate_1"].sources[0]
    wanted = hf["language_model.model.layers.5.cross_attn_attn_gate"]
    np.testing.assert_array_equal(found.read(source), wanted)
    wide[name] = np.arange(32, dtype=np.float32)
    with pytest.raises(UserError, match=r"cross_attention_layers\.1\.gate_attn has shape \(32,\)"):
        open_weights(write(files, tmp_path / "b", wide))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("text_model.learnable_embedding.weight", None, "learnable_embedding.weight is missing"),
        (f"{ENCODER}class_embedding", None, "class_embedding is missing"),
        (f"{ENCODER}class_embedding", (), "class_embedding is missing or has no dimension"),
        (
            f"{ENCODER}transformer.resblocks.31.ln_1.bias",
            None,
            r"resblocks.31.ln_1.bias is missing",
        ),
        (f"{ENCODER}gated_positional_embedding", None, "gated_positional_embedding is missing"),
        (f"{ENCODER}gated_positional_embedding", (4, 4, 6, 32), r"has shape \(4, 4, 6, 32\)"),
        (f"{ENCODER}pre_tile_pos_embed.embedding", (3, 3, 1, 32), r"has shape \(3, 3, 1, 32\)"),
        ("text_model.learnable_embedding.weight", (8, 31), r"has shape \(8, 31\)"),
        ("text_model.tok_embeddings.weight", None, "tok_embeddings.weight is missing"),
        ("text_model.more", (1,), "more is not part"),
    ],
)
def test_tensors_that_do_not_fit_are_one_line(files, model, tmp_path, name, shape, words):
    tensors = dict(model[2])
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = np.zeros(shape, np.float32)
    with pytest.raises(UserError, match=words) as caught:
        open_weights(write(files, tmp_path, tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_num_cross_attention_layers": "2"}, "must be of type int"),
        ({"vision_num_cross_attention_layers": -1}, "must be at least 1"),
        ({"vision_num_cross_attention_layers": 0}, "vision_chunk_size=28 is not a key"),
        ({"vision_num_cross_attention_layers": 9}, r"cross_attention_layers\.2\..* is missing"),
        ({"vision_chunk_size": None}, "vision_chunk_size=None must be of type int"),
        ({"vision_chunk_size": 30}, "image_size=30 must be a multiple of model.vision.patch_size"),
        ({"vision_max_num_chunks": 3}, r"has shape \(4, 4"),
        ({"vision_max_num_chunks": 10**6}, "max_tiles=1000000 must be at most"),
    ],
)
def test_params_json_is_honoured_or_refused(files, model, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        open_weights(write(files, tmp_path, model[2], params=PARAMS | change))
