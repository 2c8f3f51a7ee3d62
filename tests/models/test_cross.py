"""Llama 3.2 Vision against Hugging Face's numbers and Meta's rule, and what must not change them.

`reference/make_cross_fixture.py` says how the stored numbers came to be; `reference/cross_numpy.py`
is the network in NumPy. "Error" is the largest absolute error over the largest absolute value of
the reference, per tensor.
"""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs import architecture, get_config, schema
from puna.configs.errors import ConfigError, UserError
from puna.models import tiled_vision
from puna.models.cache import init_cache
from puna.models.decode.engine import decode
from puna.models.decode.generate import complete
from puna.models.media import images
from puna.models.parallel import sharding
from puna.models.text.tokenizer import byte_tokenizer
from puna.models.transformer import Transformer, abstract_params, init_params
from puna.models.weights import huggingface, tiled_vision_table

REFERENCE = pathlib.Path(__file__).parent.parent / "reference"
OUTPUT, GRADIENT = 1e-5, 1e-4  # float32 against float32 or float64
IMAGE = 43


def _oracle():
    path = REFERENCE / "cross_numpy.py"
    spec = importlib.util.spec_from_file_location("cross_numpy", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _oracle()


class Fixture:
    """The stored model and what it computed."""

    def __init__(self):
        with np.load(REFERENCE / "media" / "cross.npz", allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        self.json = json.loads(str(arrays["config"]))
        self.arrays = arrays
        self.weights = {k[7:]: v for k, v in arrays.items() if k.startswith("weight/")}
        self.tokens, self.features = arrays["tokens"], arrays["features"]
        fields = tiled_vision_table.from_hf(self.json) | {"compute_dtype": "float32"}
        self.config = schema.from_dict(fields, schema.ModelConfig)
        self.table = table_of(self.config)
        self.params = huggingface.from_tensors(self.table, self.weights)
        self.pixels, self.grids = arrays["tiles"], arrays["grids"]
        self.images = tiled_vision.TiledImages(self.pixels.transpose(0, 1, 2, 4, 5, 3), self.grids)

    def row(self, i):
        """The images of one row, for the oracle."""
        return [(t, int(g)) for t, g in zip(self.pixels[i], self.grids[i], strict=True) if g]


def table_of(config):
    return huggingface.leaves(config, "language_model.") | tiled_vision_table.leaves(config)


@pytest.fixture(scope="module")
def stored():
    return Fixture()


def error(found, reference):
    reference = np.asarray(reference, np.float64)
    assert np.shape(found) == reference.shape
    return np.max(np.abs(np.asarray(found, np.float64) - reference)) / np.max(np.abs(reference))


def imageless(config):
    return dataclasses.replace(config, cross=dataclasses.replace(config.cross, imageless=True))


def one_later(config):
    """As transformers 5.23 reads the numbers of layers: their outputs, not their inputs."""
    later = ",".join(str(int(i) + 1) for i in config.vision.intermediate_layers.split(","))
    vision = dataclasses.replace(config.vision, intermediate_layers=later)
    return dataclasses.replace(config, vision=vision)


def apply(config, params, tokens, images, **rest):
    run = jax.jit(lambda p, t, i: Transformer(config).apply({"params": p}, t, images=i, **rest))
    return run(params, tokens, images)


@pytest.fixture(scope="module")
def logits(stored):
    return np.asarray(apply(stored.config, stored.params, stored.tokens, stored.images).logits_BTV)


# --- the references -----------------------------------------------------------------------------


def test_table_round_trip_is_exact(stored):
    wanted = sharding.unbox(abstract_params(stored.config))
    assert jax.tree.map(np.shape, stored.params) == jax.tree.map(np.shape, wanted)
    back = huggingface.to_tensors(stored.table, stored.params)
    assert back.keys() == stored.weights.keys()
    for name, weight in stored.weights.items():
        assert back[name].shape == weight.shape and back[name].tobytes() == weight.tobytes(), name


def test_features_equal_hugging_face(stored):
    features = jax.jit(lambda p, i: tiled_vision.encode_images(one_later(stored.config), p, i))(
        stored.params, stored.images
    )
    # Those of an image that is not there have a meaning in both, of none.
    wanted = stored.features.reshape(features.values_BUD.shape)
    assert error(features.values_BUD, wanted) < OUTPUT
    tiles = np.array([0, 1, 2, 3, 4, 2, 4, 3, 4])[stored.grids]
    valid = np.arange(4) < tiles[..., None]
    assert (features.valid_BU == np.repeat(valid, 5, axis=2).reshape(4, -1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["", "meta_"])
def test_model_equals_hugging_face(stored, rule):
    config = one_later(stored.config if rule else imageless(stored.config))

    def loss(params):
        out = Transformer(config).apply({"params": params}, stored.tokens, images=stored.images)
        logp = jax.nn.log_softmax(out.logits_BTV[:, :-1])
        targets = stored.tokens[:, 1:]
        picked = jnp.take_along_axis(logp, np.minimum(targets, 40)[..., None], axis=2)[..., 0]
        learnt = targets != IMAGE
        return -jnp.sum(picked * learnt) / jnp.sum(learnt), out.logits_BTV

    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(stored.params)
    assert error(found, stored.arrays[f"{rule}logits"]) < OUTPUT
    assert error(value, stored.arrays[f"{rule}loss"]) < OUTPUT
    gradient = huggingface.to_tensors(stored.table, gradient)
    errors = {
        name: error(gradient[name], stored.arrays[f"{rule}gradient/{name}"]) for name in gradient
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] < GRADIENT, f"{worst}: {errors[worst]:.1e}"


def test_model_equals_metas_rule_in_numpy(stored, logits):
    for row, tokens in enumerate(stored.tokens):
        wanted = oracle.logits(stored.json, stored.weights, tokens, stored.row(row))
        assert error(logits[row], wanted) < OUTPUT
    other = apply(imageless(stored.config), stored.params, stored.tokens, stored.images).logits_BTV
    assert error(other, logits) > 0.1
    wanted = oracle.logits(stored.json, stored.weights, stored.tokens[0], stored.row(0), True)
    first = jax.tree.map(lambda x: x[:1, :1], stored.images)
    alone = apply(imageless(stored.config), stored.params, stored.tokens[:1], first).logits_BTV
    assert error(alone[0], wanted) < OUTPUT


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours(stored, logits):
    for row, tokens in enumerate(stored.tokens):
        count = np.sum(stored.grids[row] > 0)
        images = jax.tree.map(lambda x, r=row, n=count: x[r : r + 1, :n], stored.images)
        alone = apply(stored.config, stored.params, tokens[None], images if count else None)
        assert error(alone.logits_BTV[0], logits[row]) < OUTPUT


def test_without_images_it_is_the_text_model(stored, logits):
    # The layers that attend to images taken out, there is a Llama left.
    text = stored.config.num_layers - len(stored.json["text_config"]["cross_attention_layers"])
    kept = [i for i in range(stored.config.num_layers) if not stored.config.is_cross(i)]
    config = dataclasses.replace(
        stored.config,
        num_layers=text,
        cross=architecture.CrossConfig(),
        vision=architecture.VisionConfig(),
    )
    params = {}
    for path, leaf in huggingface.leaves(config).items():
        parts = []
        for source in leaf.sources:
            name = source.name
            if name.startswith("model.layers."):
                _, _, number, rest = name.split(".", 3)
                name = f"model.layers.{kept[int(number)]}.{rest}"
            tensor = stored.weights[f"language_model.{name}"][: source.hf_shape[0]]
            parts.append(source.load(tensor))
        *parents, last = path.split("/")
        tree = params
        for name in parents:
            tree = tree.setdefault(name, {})
        tree[last] = np.stack(parts) if leaf.stacked else parts[0]
    tokens = stored.tokens[2:3]
    found = apply(config, params, tokens, None).logits_BTV
    np.testing.assert_allclose(found, logits[2:3], atol=1e-5)


def test_what_fills_up_an_image_does_not_count(stored, logits):
    there = np.arange(4) < np.array([0, 1, 2, 3, 4, 2, 4, 3, 4])[stored.grids][..., None]
    broken = np.where(there[..., None, None, None], stored.images.tiles_BMIYXC, np.nan)
    images = stored.images.replace(tiles_BMIYXC=broken)
    found = apply(stored.config, stored.params, stored.tokens, images).logits_BTV
    np.testing.assert_array_equal(found, logits)


def test_packed_documents_see_their_own_images_only(stored):
    # Rows 1 and 3 behind one another, and padding: as if each stood alone.
    tokens = np.concatenate([stored.tokens[1], stored.tokens[3], [0, IMAGE]])[None]
    segments = np.repeat([1, 2, 0], [22, 22, 2])[None]
    positions = np.concatenate([np.arange(22), np.arange(22), [0, 0]])[None]
    pixels, grids = stored.images.tiles_BMIYXC, stored.grids
    both = (np.concatenate([x[1], x[3, :2]])[None] for x in (pixels, grids))
    images = tiled_vision.TiledImages(*both)
    found = apply(
        stored.config, stored.params, tokens, images, positions_BT=positions,
        segment_ids_BT=segments,
    ).logits_BTV[0]  # fmt: skip
    for row, part in ((1, found[:22]), (3, found[22:44])):
        wanted = oracle.logits(stored.json, stored.weights, stored.tokens[row], stored.row(row))
        assert error(part, wanted) < OUTPUT


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [(22,), (1, 2, 3, 9, 14, 15, 22), tuple(range(1, 23))])
@pytest.mark.parametrize("rule", ["meta", "transformers"])
def test_cached_equals_uncached(stored, cuts, rule):
    # The first piece has the images; then their keys and values come from the cache.
    config = stored.config if rule == "meta" else imageless(stored.config)
    tokens, images = stored.tokens, stored.images
    segments = np.ones_like(tokens)
    segments[0, 17:] = 0  # a shorter row
    wanted = apply(config, stored.params, tokens, images, segment_ids_BT=segments).logits_BTV
    model = Transformer(config)
    cache = init_cache(config, len(tokens), 22, images=images.grids_BM.shape[1])
    run = jax.jit(
        lambda t, s, c, i: model.apply(
            {"params": stored.params}, t, segment_ids_BT=s, cache=c, images=i
        )
    )
    found, start = [], 0
    for stop in cuts:
        piece = np.s_[:, start:stop]
        out = run(tokens[piece], segments[piece], cache, images if start == 0 else None)
        found.append(out.logits_BTV)
        cache, start = out.cache, stop
    live = segments != 0
    assert error(np.concatenate(found, axis=1)[live], wanted[live]) < OUTPUT


@pytest.mark.slow
def test_generation_is_that_of_whole_passes(stored):
    # Greedy, rows of several lengths: each token is the likeliest after a pass over the whole row.
    rows, params = (0, 1, 3), jax.tree.map(jnp.asarray, stored.params)
    prompts = [stored.tokens[r, : 22 - r].tolist() for r in rows]
    pixels = stored.images.tiles_BMIYXC
    images = tiled_vision.batch_images(
        stored.config.vision,
        [[(pixels[r, i], g) for i, g in enumerate(stored.grids[r]) if g] for r in rows],
    )
    made = next(decode(Transformer(stored.config), params, prompts, 4, images=images))
    for i, prompt in enumerate(prompts):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], images)
        whole = np.array([*prompt, *made.ids_BT[i]])[None]
        logits = apply(stored.config, params, whole, one).logits_BTV[0]
        last = logits[len(prompt) - 1 : -1]
        assert np.argmax(last, axis=-1).tolist() == made.ids_BT[i].tolist()
        logprobs = jax.nn.log_softmax(last)[np.arange(4), made.ids_BT[i]]
        np.testing.assert_allclose(made.logprobs_BT[i], logprobs, atol=1e-4)


@pytest.mark.slow
def test_texts_with_pictures(stored):
    image = pytest.importorskip("PIL.Image")
    config = dataclasses.replace(
        stored.config, vocab_size=300,
        vision=dataclasses.replace(stored.config.vision, token_id=301),
    )  # fmt: skip
    model, tokenizer = Transformer(config), byte_tokenizer()
    params = jax.jit(lambda: sharding.unbox(model.init(jax.random.key(0), stored.tokens)))()
    params = jax.tree.map_with_path(  # open gates
        lambda path, x: x + 0.7 if "gate" in sharding.path_name(path) else x, params["params"]
    )
    noise = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3)).astype(np.uint8)
    drawn = [image.fromarray(x) for x in noise]
    prompts = ["a<|image|>b<|image|>", "<|image|>"]
    given = [drawn, drawn[:1]]
    made = complete(model, params, tokenizer, prompts, 3, images=given)
    ids = [[*tokenizer.begin_ids, *tokenizer.encode("a"), 301, *tokenizer.encode("b"), 301],
           [*tokenizer.begin_ids, 301]]  # fmt: skip
    rows = [[images.tile_together(config.vision, p) for p in row] for row in given]
    wanted = next(decode(model, params, ids, 3, vocab_size=tokenizer.vocab_size,
                         stop_ids=[tokenizer.eos_id],
                         images=tiled_vision.batch_images(config.vision, rows)))  # fmt: skip
    for completion, found in zip(made, wanted.ids_BT.tolist(), strict=True):
        assert completion.ids == [i for i in found if i >= 0]
    with pytest.raises(UserError, match="images has 1 rows, which must be one for each of 2"):
        complete(model, params, tokenizer, prompts, 3, images=[drawn])


def test_generation_counts_images(stored):
    model, prompts = Transformer(stored.config), [[3, IMAGE, IMAGE, 2]]
    images = tiled_vision.batch_images(stored.config.vision, [[(np.zeros((4, 8, 8, 3)), 2)]])
    with pytest.raises(UserError, match="row 0 has 2 tokens of model.vision.token_id=43, but its"):
        decode(model, {}, prompts, 4, images=images)
    with pytest.raises(UserError, match=r"prompt 0 has id 43, which must lie in 0\.\.40"):
        decode(model, {}, prompts, 4)
    text = Transformer(schema.ModelConfig())
    with pytest.raises(UserError, match="images are generated from by models whose layers attend"):
        decode(text, {}, [[1]], 4, images=images)
    with pytest.raises(UserError, match="max_images=1 must be at least 2"):
        tiled_vision.batch_images(stored.config.vision, [[1, 2]], max_images=1)


@pytest.mark.slow
def test_bfloat16_is_close(stored, logits):
    config = dataclasses.replace(stored.config, compute_dtype="bfloat16")
    found = apply(config, stored.params, stored.tokens, stored.images).logits_BTV
    assert error(found, logits) < 0.06


@pytest.mark.slow
def test_gradients_do_not_depend_on_what_is_computed_again(stored):
    def gradient(remat):
        config = dataclasses.replace(stored.config, remat=remat)

        def loss(params):
            out = Transformer(config).apply({"params": params}, stored.tokens, images=stored.images)
            return jnp.mean(out.logits_BTV**2)

        return jax.jit(jax.grad(loss))(stored.params)

    kept, again = gradient("none"), gradient("full")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kept, again)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"context": 2, "tensor": 2, "expert": 2},
             {"pipeline": 2, "fsdp": 2, "context": 2}]
)  # fmt: skip
def test_on_a_mesh_it_is_the_same(axes):
    config = dataclasses.replace(
        schema.from_dict(get_config("llama3:3.2-vision-tiny")).model,
        num_layers=10, embed_dim=32, mlp_dim=64, head_dim=8,
    )  # fmt: skip
    model, rng = Transformer(config), np.random.default_rng(0)
    tokens = rng.integers(512, size=(8, 16))
    tokens[::2, 3], tokens[1::4, 5:7] = 512, 512
    grids = np.zeros((8, 2), np.int32)
    grids[::2, 0], grids[1::4] = 6, (2, 1)
    tiles = rng.normal(size=(8, 2, 4, 28, 28, 3)).astype(np.float32)
    given = tiled_vision.TiledImages(tiles, grids)

    def loss(params):
        out = model.apply({"params": params}, tokens, images=given)
        return jnp.mean(jnp.sin(out.logits_BTV)), out.logits_BTV

    def run(mesh_config, devices):
        mesh = sharding.make_mesh(schema.MeshConfig(**mesh_config), devices)
        with jax.set_mesh(mesh):
            params = init_params(config, jax.random.key(0), mesh)
            params = jax.tree.map_with_path(
                lambda path, x: x + 0.7 if "gate" in sharding.path_name(path) else x, params
            )
            (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return jax.device_get((logits, grads))

    wanted, found = run({}, jax.devices()[:1]), run({"data": 1} | axes, jax.devices())
    assert error(found[0], wanted[0]) < OUTPUT
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
                 found[1], wanted[1])  # fmt: skip


# --- files --------------------------------------------------------------------------------------


def test_config_round_trip(stored):
    written = tiled_vision_table.to_hf(stored.config)
    text = stored.json["text_config"] | written["text_config"]
    text["rope_parameters"] = stored.json["text_config"]["rope_parameters"]
    vision = stored.json["vision_config"] | written["vision_config"]
    assert stored.json == stored.json | {"text_config": text, "vision_config": vision}
    fields = tiled_vision_table.from_hf(written) | {"compute_dtype": "float32"}
    assert schema.from_dict(fields, schema.ModelConfig) == stored.config


# What a file may say that cannot be honoured.
REFUSED = {
    "places": ("text_config", "cross_attention_layers", [1, 2, 4]),
    "no places": ("text_config", "cross_attention_layers", []),
    "falling": ("text_config", "cross_attention_layers", [3, 1]),
    "no list": ("text_config", "cross_attention_layers", 3),
    "activation": ("vision_config", "hidden_act", "gelu_pytorch_tanh"),
    "width": ("vision_config", "vision_output_dim", 25),
    "order": ("vision_config", "intermediate_layers_indices", [1, 0]),
    "grids": ("vision_config", "supported_aspect_ratios", [[1, 1], [2, 1]]),
    "tiles": ("vision_config", "max_num_tiles", 0),
    "side": ("vision_config", "image_size", [8, 8]),
    "unknown": ("vision_config", "attention_softcap", 3.0),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_that_cannot_be_honoured(stored, case):
    section, key, value = REFUSED[case]
    bad = stored.json | {section: stored.json[section] | {key: value}}
    with pytest.raises(UserError, match=rf"{section}\.{key}"):
        tiled_vision_table.from_hf(bad)


# --- mistakes -----------------------------------------------------------------------------------


def test_user_errors(stored):
    tiles = np.zeros((4, 1, 3, 8, 8, 3))
    with pytest.raises(UserError, match=r"tiles of shape \(3, 8, 8, 3\) must be of shape \(4, 8"):
        apply(stored.config, stored.params, stored.tokens,
              tiled_vision.TiledImages(tiles, np.ones((4, 1), np.int32)))  # fmt: skip


RULES = {
    "first is beyond": ({"cross.first": 5, "cross.interval": 5}, "cross.first=5 is beyond"),
    "first in the first": (
        {"cross.first": 2},
        "cross.first=2 must be below model.cross.interval=2",
    ),
    "interval": ({"cross.interval": 9}, "model.cross.interval=9 is beyond model.num_layers=5"),
    "tower": ({"vision.num_layers": 0}, "model.vision.num_layers=0 must be at least 1"),
    "global": ({"vision.global_layers": 0}, "model.vision.global_layers=0 must be at least 1"),
    "tied": ({"tie_embeddings": True}, "model.tie_embeddings=True must be False"),
    "experts": ({"moe_interval": 1, "num_experts": 2, "expert_dim": 8}, "moe_interval=1 must be"),
    "layers": ({"vision.intermediate_layers": "0,3"}, "intermediate_layers=0,3 must be below"),
    "order": ({"vision.intermediate_layers": "1,0"}, "'1,0' must be rising numbers"),
    "token": ({"vision.token_id": 49}, r"token_id=49 must be below model.vocab_size=41 \+ model"),
    "patches": ({"vision.patch_size": 3}, "image_size=8 must be a multiple of model.vision.patch"),
}


@pytest.mark.parametrize("rule", RULES)
def test_config_errors(stored, rule):
    changes, message = RULES[rule]
    values = schema.to_dict(stored.config)
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = value
    with pytest.raises(ConfigError, match=message):
        schema.from_dict(values, schema.ModelConfig, "model.")
