"""The audio encoder against an independent slow formula."""

import cmath
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs import architecture, schema
from puna.configs.errors import UserError
from puna.models import audio
from puna.models.parallel import sharding
from puna.models.transformer import Transformer

AUDIO = architecture.AudioConfig(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, num_mels=5, frames_per_token=3,
    max_tokens=6, token_id=9,
)  # fmt: skip
CONFIG = schema.ModelConfig(
    vocab_size=11, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12,
    compute_dtype="float32", audio=AUDIO,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    key = jax.random.key(0)
    boxed = jax.jit(audio.AudioEncoder(CONFIG).init)(key, audio.no_audio(AUDIO, 1))["params"]
    leaves, tree = jax.tree.flatten(sharding.unbox(boxed))
    rng = np.random.default_rng(0)  # the biases and norms too
    return tree.unflatten([x + 0.3 * rng.standard_normal(x.shape) for x in leaves])


@jax.jit
def encode(params, clips):
    return audio.encode_audio(CONFIG, {"audio": params}, clips)


def slow_encoder(params, frames):
    """Features of one clip, float64: the published formulas, one after another."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    f, heads = AUDIO.frames_per_token, AUDIO.num_heads
    tokens = -(-len(frames) // f)
    stacked = np.zeros((tokens * f, frames.shape[1]))
    stacked[: len(frames)] = frames
    x = stacked.reshape(tokens, -1) @ p["frames_WD"]
    erf = np.vectorize(math.erf)

    def norm(x, w):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w["scale_D"] + w["bias_D"]

    def turn(x):
        half = x.shape[-1] // 2
        out = np.empty_like(x)
        for t in range(tokens):
            for j in range(half):
                angle = t * 10000.0 ** (-j / half)
                z = complex(x[t, j], x[t, j + half]) * cmath.exp(1j * angle)
                out[t, j], out[t, j + half] = z.real, z.imag
        return out

    x = norm(x, p["encoder"]["norm_in"])
    for layer in range(AUDIO.num_layers):
        w = jax.tree.map(lambda a, i=layer: a[i], p["encoder"]["blocks"])
        h, a = norm(x, w["attention_norm"]), w["attention"]
        D = h.shape[1]
        H = D // heads
        q, k, v = (h @ a[f"w{n}_DNH"].reshape(D, D) + a[f"b{n}_D"] for n in "qkv")
        out = np.empty_like(h)
        for n in range(heads):
            cut = slice(n * H, (n + 1) * H)
            scores = turn(q[:, cut]) @ turn(k[:, cut]).T / math.sqrt(H)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, cut] = weights / weights.sum(-1, keepdims=True) @ v[:, cut]
        x = x + out @ a["wo_NHD"].reshape(D, D) + a["bo_D"]
        h, m = norm(x, w["mlp_norm"]), w["mlp"]
        h = h @ m["w_up_DF"] + m["b_up_F"]
        h = h * 0.5 * (1 + erf(h / math.sqrt(2)))
        x = x + h @ m["w_down_FD"] + m["b_down_D"]
    return norm(x, p["encoder"]["norm_out"]) @ p["projector_AD"]


def test_clips_of_a_batch_by_the_definition(params):
    rng = np.random.default_rng(1)
    lengths = [[7, 18], [], [3]]
    rows = [[rng.standard_normal((n, 5)).astype(np.float32) for n in row] for row in lengths]
    batch = audio.batch_audio(AUDIO, rows)
    assert batch.frames_BISM.shape == (3, 2, 18, 5)
    assert batch.num_frames_BI.tolist() == [[7, 18], [0, 0], [3, 0]]
    beyond = np.arange(18) >= batch.num_frames_BI[..., None]
    broken = batch.replace(frames_BISM=np.where(beyond[..., None], np.nan, batch.frames_BISM))
    features = encode(params, broken)
    for row, clips in enumerate(rows):
        found = np.asarray(features.values_BUD[row])[np.asarray(features.valid_BU[row])]
        assert len(found) == sum(-(-n // 3) for n in lengths[row])
        if clips:
            wanted = np.concatenate([slow_encoder(params, frames) for frames in clips])
            assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_filling_gets_no_gradient(params):
    frames = np.random.default_rng(2).standard_normal((1, 2, 10, 5)).astype(np.float32)

    def total(frames):
        clips = audio.Audio(frames, np.array([[4, 0]]))
        features = encode(params, clips)
        return jnp.sum(jnp.where(features.valid_BU[..., None], features.values_BUD, 0.0) ** 2)

    gradient = np.asarray(jax.jit(jax.grad(total))(frames))
    assert (np.abs(gradient[0, 0, :4]) > 0).all()
    assert not gradient[0, 0, 4:].any() and not gradient[0, 1].any()


def test_user_errors(params):
    tokens = np.array([[9, 9, 9, 1]])
    audio.check_audio(CONFIG, tokens, [[7, 0]])
    with pytest.raises(UserError, match=r"row 0 has 3 tokens of model.audio.token_id=9, but its "
                                        r"clips give 4 features"):  # fmt: skip
        audio.check_audio(CONFIG, tokens, [[7, 2]])
    row = [np.zeros((4, 5), np.float32)]
    with pytest.raises(UserError, match="max_clips=1 must be at least 2"):
        audio.batch_audio(AUDIO, [row + row], max_clips=1)
    with pytest.raises(UserError, match="max_frames=3 must be at least 4"):
        audio.batch_audio(AUDIO, [row], max_frames=3)
    with pytest.raises(UserError, match=r"row 0 has frames of shape \(4, 6\), .*num_mels=5"):
        audio.batch_audio(AUDIO, [[np.zeros((4, 6))]])
    for shape, message in (
        ((1, 1, 4, 6), "frames of 6 mel bands must have model.audio.num_mels=5"),
        ((1, 1, 19, 5), "clips of 7 tokens must have at most model.audio.max_tokens=6"),
    ):
        clips = audio.Audio(np.zeros(shape), np.ones(shape[:2], np.int32))
        with pytest.raises(UserError, match=message):
            audio.encode_audio(CONFIG, {"audio": params}, clips)
    text = schema.ModelConfig(num_layers=1, embed_dim=8, vocab_size=11)
    with pytest.raises(UserError, match="a model without audio takes no clips"):
        jax.eval_shape(lambda: Transformer(text).init_with_output(
            jax.random.key(0), tokens, audio=audio.no_audio(AUDIO, 1)
        ))  # fmt: skip


def test_parameter_count():
    config = schema.ModelConfig(embed_dim=5120, audio=architecture.AudioConfig(num_layers=12))
    module, clips = audio.AudioEncoder(config), audio.no_audio(config.audio, 1)
    shapes = jax.eval_shape(lambda key: module.init(key, clips), jax.random.key(0))
    D, F = 512, 2048
    layer = 4 * (D * D + D) + 2 * D * F + F + D + 4 * D
    wanted = 8 * 80 * D + 12 * layer + 4 * D + D * 5120
    assert sum(x.size for x in jax.tree.leaves(sharding.unbox(shapes))) == wanted
