"""Images and sound inside the text: who goes where, on one device and on eight, and learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.configs import architecture, schema
from puna.models import audio, vision
from puna.models.cache import init_cache
from puna.models.fusion import Features, fuse
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, abstract_params

PATCH, SOUND = 30, 31
VISION = architecture.VisionConfig(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, image_size=8, patch_size=2, adapter_dim=20,
    token_id=PATCH,
)  # fmt: skip
AUDIO = architecture.AudioConfig(
    num_layers=1, embed_dim=12, num_heads=2, mlp_dim=16, num_mels=6, frames_per_token=2,
    max_tokens=8, token_id=SOUND,
)  # fmt: skip
CONFIG = schema.ModelConfig(
    vocab_size=32, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=24,
    compute_dtype="float32", remat="full", vision=VISION, audio=AUDIO,
)  # fmt: skip
T = 20


def rows():
    """Four rows of text, images and clips: both, one of them twice, one, none."""
    rng = np.random.default_rng(0)
    tile = lambda: rng.uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)  # noqa: E731
    clip = lambda n: rng.standard_normal((n, 6)).astype(np.float32)  # noqa: E731
    images = [[tile()], [tile(), tile()], [], []]
    clips = [[clip(3)], [], [clip(5), clip(2)], []]
    tokens = rng.integers(PATCH, size=(4, T)).astype(np.int32)
    tokens[0, 3:7], tokens[0, 9:11] = PATCH, SOUND
    tokens[1, :4], tokens[1, 8:12] = PATCH, PATCH
    tokens[2, 2:5], tokens[2, 19] = SOUND, SOUND
    return tokens, vision.batch_images(VISION, images), audio.batch_audio(AUDIO, clips)


def loss(params, tokens, images, clips):
    out = Transformer(CONFIG).apply({"params": params}, tokens, images=images, audio=clips)
    logp = jax.nn.log_softmax(out.logits_BTV[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2)), out.logits_BTV


@given(st.data())
def test_the_kth_token_takes_the_kth_feature(data):
    bits = lambda n: np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))  # noqa: E731
    here, valid = bits(14).reshape(2, 7), bits(10).reshape(2, 5)
    values = np.arange(10, dtype=np.float32).reshape(2, 5, 1) + 100
    x = np.arange(14, dtype=np.float32).reshape(2, 7, 1)
    found = np.asarray(fuse(x, np.where(here, 3, 1), 3, Features(values, valid)))
    for row in range(2):
        features = list(values[row][valid[row]])
        for t in range(7):
            wanted = features.pop(0) if here[row, t] and features else x[row, t]
            assert found[row, t] == wanted
    done = data.draw(st.integers(0, 5))
    left = Features(values, jnp.asarray(valid)).skip(np.array([done, 0]))
    assert left.valid_BU[0].sum() == max(0, valid[0].sum() - done)
    assert not np.asarray(left.valid_BU)[0][
        : np.flatnonzero(valid[0])[:done].max(initial=-1) + 1
    ].any()
    np.testing.assert_array_equal(left.valid_BU[1], valid[1])


def test_no_features_at_all():
    x = np.ones((2, 3, 4), np.float32)
    empty = Features(np.zeros((2, 0, 4), np.float32), np.zeros((2, 0), bool))
    np.testing.assert_array_equal(fuse(x, np.zeros((2, 3), int), 0, empty), x)


def test_parameters_exist_whether_used_or_not():
    names = {
        sharding.path_name(path)
        for path, _ in jax.tree.leaves_with_path(sharding.unbox(abstract_params(CONFIG)))
    }
    assert "vision/encoder/blocks/attention/wq_DNH" in names
    assert "audio/encoder/blocks/mlp/w_down_FD" in names
    text = dataclasses.replace(
        CONFIG, vision=architecture.VisionConfig(), audio=architecture.AudioConfig()
    )
    assert {n for n in names if not n.startswith(("vision/", "audio/"))} == {
        sharding.path_name(path)
        for path, _ in jax.tree.leaves_with_path(sharding.unbox(abstract_params(text)))
    }


def jit(function):
    # Each of these programs runs a few times, so time spent on making it fast is lost.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def params():
    """Drawn here: compiling random numbers for each shape takes longer than the tests."""
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        draw = 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)
        return draw + (path[-1].key == "scale_D")

    return jax.tree.map_with_path(draw, sharding.unbox(abstract_params(CONFIG)))


@pytest.fixture(scope="module")
def gradient():
    return jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def alone(params, gradient):
    """Loss, logits and gradients of the rows on one device."""
    return gradient(params, *rows())


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(params, gradient, alone):
    tokens, images, clips = rows()
    vision.check_images(CONFIG, tokens, images.num_tiles_B)
    audio.check_audio(CONFIG, tokens, clips.num_frames_BI)
    (one, one_logits), one_grads = alone
    mesh = sharding.make_mesh(schema.MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    placed = sharding.put_batch(mesh, (tokens, images, clips), list(range(4)), 4)
    params = jax.device_put(params, sharding.shardings(abstract_params(CONFIG), mesh))
    with jax.set_mesh(mesh):
        (eight, eight_logits), eight_grads = gradient(params, *placed)
    assert abs(float(one) - float(eight)) < 1e-6 * float(one)
    np.testing.assert_allclose(one_logits, eight_logits, atol=1e-5)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(one_grads), jax.tree.leaves(eight_grads), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a).max() > 0, sharding.path_name(path)
        assert np.abs(a - b).max() < 1e-4 * np.abs(a).max(), sharding.path_name(path)


def test_reading_in_pieces_equals_reading_at_once(params, alone):
    tokens, images, clips = rows()
    (_, wanted), _ = alone
    seen = jit(lambda images: vision.encode_images(CONFIG, params, images))(images)
    heard = jit(lambda clips: audio.encode_audio(CONFIG, params, clips))(clips)

    @jit
    def read(cache, piece, seen, heard):
        return Transformer(CONFIG).apply(
            {"params": params}, piece, cache=cache, images=seen, audio=heard
        )

    cache, found = init_cache(CONFIG, 4, T), []
    for start in range(0, T, 5):  # through the middle of images
        before = tokens[:, :start]
        out = read(
            cache, tokens[:, start : start + 5], seen.skip((before == PATCH).sum(1)),
            heard.skip((before == SOUND).sum(1)),
        )  # fmt: skip
        cache = out.cache
        found.append(out.logits_BTV)
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=2e-5)


def test_what_only_images_and_clips_tell_is_learnt(params):
    # Same text in every row: only the picture, or the clip, says how it goes on.
    rng = np.random.default_rng(0)
    images = vision.batch_images(VISION, [
        [rng.uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)] if row < 4 else [] for row in range(8)
    ])  # fmt: skip
    clips = audio.batch_audio(AUDIO, [
        [rng.standard_normal((5, 6)).astype(np.float32)] if row >= 4 else [] for row in range(8)
    ])  # fmt: skip
    tokens = np.full((8, 10), 1, np.int32)
    tokens[:4, 1:5], tokens[4:, 1:4] = PATCH, SOUND
    tokens[:, 6:] = rng.integers(2, PATCH, size=(8, 4))
    tokens[:4, 6], tokens[4:, 6] = rng.permutation(16)[:4] + 2, rng.permutation(16)[:4] + 2
    weights = np.zeros((8, 9), np.float32)
    weights[:, 5:] = 1.0
    tx = optax.adam(1e-2)

    def objective(params):
        out = Transformer(CONFIG).apply({"params": params}, tokens, images=images, audio=clips)
        logp = jax.nn.log_softmax(out.logits_BTV[:, :-1])
        nll = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2)[..., 0]
        return jnp.sum(nll * weights) / weights.sum()

    @jit
    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(100):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[0] > 2
    assert losses[-1] < 0.05
