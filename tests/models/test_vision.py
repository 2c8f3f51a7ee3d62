"""The vision tower against Hugging Face's numbers, and what must not change them.

`reference/make_vision_fixture.py` says how the stored numbers came to be. "Error" is the largest
absolute error over the largest absolute value of the reference, per tensor.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs import architecture, schema
from puna.configs.errors import UserError
from puna.models import encoder, rope, vision
from puna.models.masks import Tokens
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, abstract_params
from puna.models.weights import config as hf_config
from puna.models.weights import huggingface, vision_table

STORED = pathlib.Path(__file__).parent.parent / "reference" / "media" / "vision.npz"
OUTPUT, GRADIENT = 1e-5, 1e-4  # float32 against float64


class Fixture:
    """The stored model and what it computed, its tiles padded to the same number a row."""

    def __init__(self):
        with np.load(STORED, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        self.json = json.loads(str(arrays["config"]))
        self.weights = {k[7:]: v for k, v in arrays.items() if k.startswith("weight/")}
        self.gradients = {k[9:]: v for k, v in arrays.items() if k.startswith("gradient/")}
        self.tower, self.projected = arrays["tower"], arrays["projected"]
        self.tokens, self.logits, self.loss = (arrays[k] for k in ("tokens", "logits", "loss"))
        self.tiles = arrays["tiles"].transpose(0, 2, 3, 1)
        self.ends = np.cumsum(arrays["num_tiles"])
        fields = hf_config.from_hf(self.json) | {"vision": vision_table.from_hf(self.json)}
        self.config = schema.from_dict(fields | {"compute_dtype": "float32"}, schema.ModelConfig)
        self.table = huggingface.leaves(self.config, "language_model.", hf_config.LLAMA4)
        self.table |= vision_table.leaves(self.config)
        self.params = huggingface.from_tensors(self.table, self.weights)
        self.images = vision.batch_images(
            self.config.vision, [[t] for t in np.split(self.tiles, self.ends[:-1])]
        )


@pytest.fixture(scope="module")
def stored():
    return Fixture()


def error(found, reference):
    reference = np.asarray(reference, np.float64)
    return np.max(np.abs(np.asarray(found, np.float64) - reference)) / np.max(np.abs(reference))


def jit(function):
    # Each of these programs runs once, so time spent on making it fast is lost.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def forward(stored, tokens, images):
    return Transformer(stored.config).apply(
        {"params": stored.params}, tokens, images=images
    ).logits_BTV  # fmt: skip


@pytest.fixture(scope="module")
def run(stored):
    """Images -> logits, loss and gradients of every parameter."""

    def loss(params, images):
        out = Transformer(stored.config).apply({"params": params}, stored.tokens, images=images)
        logp = jax.nn.log_softmax(out.logits_BTV[:, :-1])
        picked = jnp.take_along_axis(logp, stored.tokens[:, 1:, None], axis=2)
        return -jnp.mean(picked), out.logits_BTV

    gradient = jit(jax.value_and_grad(loss, has_aux=True))

    def run(images):
        (value, logits), grads = gradient(stored.params, images)
        return logits, value, grads

    return run


# --- Hugging Face -------------------------------------------------------------------------------


def test_table_round_trip_is_exact(stored):
    wanted = sharding.unbox(abstract_params(stored.config))
    assert jax.tree.map(np.shape, stored.params) == jax.tree.map(np.shape, wanted)
    back = huggingface.to_tensors(stored.table, stored.params)
    assert back.keys() == stored.weights.keys()
    for name, weight in stored.weights.items():
        assert back[name].tobytes() == weight.tobytes(), name


def test_tower_equals_hugging_face(stored):
    images = vision.batch_images(stored.config.vision, [[stored.tiles]])
    module = vision.VisionEncoder(stored.config)
    features, seen = module.apply(
        {"params": stored.params["vision"]}, images,
        capture_intermediates=lambda module, _: module.name == "adapter",
    )  # fmt: skip
    tower = seen["intermediates"]["adapter"]["__call__"][0]
    assert error(tower, stored.tower) < OUTPUT
    assert error(features.values_BUD[0], np.concatenate(stored.projected)) < OUTPUT
    assert features.valid_BU.all()


def test_model_equals_hugging_face(stored, run):
    vision.check_images(stored.config, stored.tokens, stored.images.num_tiles_B)
    logits, loss, gradient = run(stored.images)
    assert error(logits, stored.logits) < OUTPUT
    assert error(loss, stored.loss) < OUTPUT
    found = huggingface.to_tensors(stored.table, gradient)
    errors = {name: error(found[name], wanted) for name, wanted in stored.gradients.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < GRADIENT, f"{worst}: {errors[worst]:.1e}"


# What a port of the tower easily gets wrong; each changes the numbers.
MISTAKES = {
    "positions counted from 0": (
        "rope_angles",
        lambda original, v: original(v) - np.pad(
            np.broadcast_to(original(v)[:, :1], original(v)[:, :-1].shape),
            ((0, 0), (0, 1), (0, 0)),
        ),
    ),
    "columns before rows in RoPE": (
        "rope_angles", lambda original, v: np.roll(original(v), original(v).shape[-1] // 2, -1)
    ),
    "colour fastest in a patch": (
        "cut_patches",
        lambda original, tiles, size: original(tiles, size)
        .reshape(len(tiles), -1, 3, size**2).swapaxes(2, 3).reshape(len(tiles), -1, 3 * size**2),
    ),
    "class token dropped from the front": (
        "pixel_shuffle", lambda original, x: original(jnp.roll(x, 1, axis=1))
    ),
    "columns before rows in the shuffle": (
        "pixel_shuffle",
        lambda original, x: original(
            x.reshape(len(x), 6, 6, -1).swapaxes(1, 2).reshape(x.shape)
        ).reshape(len(x), 3, 3, -1).swapaxes(1, 2).reshape(len(x), 9, -1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_detail_matters(stored, monkeypatch, mistake):
    name, change = MISTAKES[mistake]
    original = getattr(vision, name)
    monkeypatch.setattr(vision, name, lambda *args: change(original, *args))
    images = vision.batch_images(stored.config.vision, [[stored.tiles]])
    features = vision.encode_images(stored.config, stored.params, images)
    assert error(features.values_BUD[0], np.concatenate(stored.projected)) > 100 * OUTPUT


def test_config_round_trip(stored):
    fields = vision_table.from_hf(stored.json)
    config = schema.from_dict(fields, architecture.VisionConfig)
    assert config == dataclasses.replace(stored.config.vision, max_tiles=config.max_tiles)
    assert vision_table.from_hf(vision_table.to_hf(config)) == fields
    with pytest.raises(UserError, match="model.vision.mlp_dim=8 must be 4"):
        vision_table.to_hf(dataclasses.replace(config, mlp_dim=8))


@pytest.mark.parametrize(
    "key, value",
    [
        ("pixel_shuffle_ratio", 0.25),
        ("rope_parameters", {"rope_theta": 500.0}),
        ("projector_input_dim", 64),
        ("intermediate_size", 100),
        ("image_size", [336, 336]),
    ],
)
def test_config_that_cannot_be_honoured(stored, key, value):
    bad = stored.json | {"vision_config": stored.json["vision_config"] | {key: value}}
    with pytest.raises(UserError, match=rf"vision_config\.{key}"):
        vision_table.from_hf(bad)


# --- batches ------------------------------------------------------------------------------------


def test_rows_with_no_one_and_several_images_do_not_touch_each_other(stored):
    images, tokens = stored.images, stored.tokens
    apply = jit(lambda t, i: forward(stored, t, i))
    together = apply(tokens, images)
    for row in range(len(tokens)):
        mine = np.arange(len(tokens)) == row
        others = np.where(mine[:, None], tokens, 5)
        alone = vision.Images(
            np.where(mine[:, None, None, None, None], images.tiles_BIYXC, -0.3),
            np.where(mine, images.num_tiles_B, 1),
        )
        np.testing.assert_array_equal(apply(others, alone)[row], together[row])
    without = jit(lambda t: forward(stored, t, None))(tokens)
    text = images.num_tiles_B == 0
    assert error(without[text], together[text]) < OUTPUT
    assert error(without[~text], together[~text]) > 0.1


def test_what_fills_up_a_row_does_not_count(stored, run):
    tiles, counts = stored.images.tiles_BIYXC, stored.images.num_tiles_B
    beyond = np.arange(tiles.shape[1]) >= counts[:, None]
    assert beyond.any()
    broken = np.where(beyond[:, :, None, None, None], np.nan, tiles)
    _, loss, gradient = run(vision.Images(broken, counts))
    _, wanted, wanted_gradient = run(stored.images)
    assert loss == wanted
    jax.tree.map(np.testing.assert_array_equal, gradient, wanted_gradient)


def test_bfloat16_is_close(stored):
    config = dataclasses.replace(stored.config, compute_dtype="bfloat16")
    features = vision.encode_images(config, stored.params, stored.images)
    exact = vision.encode_images(stored.config, stored.params, stored.images)
    assert features.values_BUD.dtype == jnp.bfloat16
    valid = np.asarray(exact.valid_BU)
    assert error(features.values_BUD[valid], exact.values_BUD[valid]) < 0.05


def test_batch_images():
    config = architecture.VisionConfig(num_layers=1, image_size=4, patch_size=2)
    one, three = np.ones((1, 4, 4, 3)), np.full((3, 4, 4, 3), 2.0)
    images = vision.batch_images(config, [[], [one, three], [one]])
    assert images.tiles_BIYXC.shape == (3, 4, 4, 4, 3)
    assert images.num_tiles_B.tolist() == [0, 4, 1]
    assert images.tiles_BIYXC[:, :, 0, 0, 0].tolist() == [[0] * 4, [1, 2, 2, 2], [1, 0, 0, 0]]
    assert vision.batch_images(config, [[], []]).tiles_BIYXC.shape[:2] == (2, 1)
    assert vision.batch_images(config, [[one]], max_tiles=5).tiles_BIYXC.shape[:2] == (1, 5)
    with pytest.raises(UserError, match="row 1 has 4 tiles, which must be at most max_tiles=3"):
        vision.batch_images(config, [[], [one, three]], max_tiles=3)
    with pytest.raises(UserError, match=r"row 0 has tiles of shape \(1, 4, 4\)"):
        vision.batch_images(config, [[one[..., 0]]])


def test_user_errors(stored):
    c = stored.config
    with pytest.raises(UserError, match=r"row 1 has 0 tokens of model.vision.token_id=37, but its "
                                        r"tiles give 9 features"):  # fmt: skip
        vision.check_images(c, stored.tokens, [2, 1, 1, 3])
    with pytest.raises(UserError, match="4 rows of tokens have 2 rows of tiles"):
        vision.check_images(c, stored.tokens, [2, 0])
    larger = vision.Images(np.zeros((4, 1, 14, 14, 3)), np.ones(4, np.int32))
    with pytest.raises(UserError, match=r"tiles of shape \(14, 14, 3\) must be"):
        Transformer(c).apply({"params": stored.params}, stored.tokens, images=larger)
    text = dataclasses.replace(c, vision=architecture.VisionConfig())
    with pytest.raises(UserError, match="a model without vision takes no images"):
        Transformer(text).apply({"params": stored.params}, stored.tokens, images=stored.images)


def test_a_tile_of_several_blocks_of_patches():
    # 577 tokens, as in Llama 4, are more than attention holds at once.
    sizes = architecture.VisionConfig(
        num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8, image_size=48, patch_size=2
    )
    config = schema.ModelConfig(compute_dtype="float32", vision=sizes)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 577, 8)).astype(np.float32)
    tokens = Tokens(np.zeros((1, 577), np.int32), np.ones((1, 577), np.int32))
    module, angles = encoder.SelfAttention(config, sizes), vision.rope_angles(sizes)
    few = jax.tree.map(lambda t: t[:, :4], tokens)
    params = sharding.unbox(module.init(jax.random.key(0), x[:, :4], angles[:, :4], few, few))
    found = module.apply(params, x, angles, tokens, tokens)
    p = params["params"]
    q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, p[f"w{n}_DNH"]) for n in "qkv")
    q, k = rope.rotate(q, angles), rope.rotate(k, angles)
    weights = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k) / 2.0)
    wanted = jnp.einsum("BNTS,BSNH,NHD->BTD", weights, v, p["wo_NHD"])
    assert error(found, wanted) < OUTPUT


# --- sizes --------------------------------------------------------------------------------------


def test_parameter_count_of_scout():
    # The tower and projector of the published Llama 4 (Scout and Maverick have the same).
    config = schema.ModelConfig(embed_dim=5120, vision=architecture.VisionConfig(num_layers=34))
    one = vision.no_images(config.vision, 1)
    boxed = jax.eval_shape(lambda key: vision.VisionEncoder(config).init(key, one),
                           jax.random.key(0))["params"]  # fmt: skip
    shapes = sharding.unbox(boxed)
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    projector = shapes["projector_AD"].size
    assert (total - projector, projector) == (850_960_896, 20_971_520)
    assert vision.features_per_tile(config.vision) == 144
    # It can lie on a pod: every dim that is split divides.
    sizes = {"fsdp": 64, "tensor": 8}
    mesh = jax.sharding.AbstractMesh(tuple(sizes.get(a, 1) for a in sharding.AXES), sharding.AXES)
    for path, leaf in jax.tree.leaves_with_path(boxed, is_leaf=sharding._is_param):
        sharding.resolve(sharding.path_name(path), leaf.value.shape, leaf.names, mesh)
