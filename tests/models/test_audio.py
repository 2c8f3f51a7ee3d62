"""The log-mel frontend and the audio encoder against independent slow formulas."""

import cmath
import math
import pathlib
import struct
import wave

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs import schema
from puna.configs.errors import UserError
from puna.models import audio
from puna.models.parallel import sharding
from puna.models.transformer import Transformer

STORED = pathlib.Path(__file__).parent.parent / "reference" / "media" / "pictures.npz"
AUDIO = schema.AudioConfig(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, num_mels=5, frames_per_token=3,
    max_tokens=6, token_id=9,
)  # fmt: skip
CONFIG = schema.ModelConfig(
    vocab_size=11, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12,
    compute_dtype="float32", audio=AUDIO,
)  # fmt: skip
WHISPER = schema.AudioConfig(num_layers=1, num_mels=80)


# --- frontend -----------------------------------------------------------------------------------


def test_frames_are_those_of_whisper():
    with np.load(STORED, allow_pickle=False) as stored:
        clip, wanted = stored["clip"], stored["log_mel"]
    found = audio.log_mel(WHISPER, clip)
    assert found.shape == wanted.shape == (56, 80) and found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-5


def slow_mel(frequency):
    """Slaney's mel scale."""
    if frequency < 1000:
        return 3 * frequency / 200
    return 15 + 27 * math.log(frequency / 1000) / math.log(6.4)


def slow_log_mel(samples, num_mels):
    """Frame by frame, bin by bin."""
    length, frames = len(samples), []
    hz = [slow_mel(40.0 * k) for k in range(201)]
    edges = [slow_mel(8000) * i / (num_mels + 1) for i in range(num_mels + 2)]

    def back(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    for start in range(0, max(1, length // 160) * 160, 160):
        window = []
        for n in range(400):
            at = start + n - 200
            at = -at if at < 0 else at
            at = 2 * (length - 1) - at if at >= length else at
            window.append(samples[at] * math.sin(math.pi * n / 400) ** 2)
        bands = [0.0] * num_mels
        for k in range(201):
            power = abs(sum(w * cmath.exp(-2j * math.pi * k * n / 400)
                            for n, w in enumerate(window))) ** 2  # fmt: skip
            for m in range(num_mels):
                low, middle, high = (back(edge) for edge in edges[m : m + 3])
                f = back(hz[k])
                height = min((f - low) / (middle - low), (high - f) / (high - middle))
                bands[m] += max(0.0, height) * 2 / (high - low) * power
        frames.append([math.log10(max(band, 1e-10)) for band in bands])
    top = max(map(max, frames))
    return np.array([[(max(x, top - 8) + 4) / 4 for x in frame] for frame in frames])


@pytest.mark.parametrize("length, frames", [(201, 1), (480, 3), (639, 3)])
def test_frames_by_the_definition(length, frames):
    rng = np.random.default_rng(length)
    samples = rng.uniform(-1, 1, length)
    found = audio.log_mel(schema.AudioConfig(num_layers=1, num_mels=6), samples)
    assert found.shape == (frames, 6)
    np.testing.assert_allclose(found, slow_log_mel(samples, 6), atol=1e-5)


def test_a_tone_is_loudest_in_its_band():
    time = np.arange(16000) / 16000
    for frequency in (200, 1000, 3000, 7000):
        frames = audio.log_mel(WHISPER, np.sin(2 * np.pi * frequency * time))
        assert frames.shape == (100, 80)
        expected = slow_mel(frequency) / slow_mel(8000) * 81 - 1
        assert abs(frames[50].argmax() - expected) <= 1


def test_short_and_silent_clips():
    assert audio.log_mel(WHISPER, np.ones(1)).shape == (1, 80)
    assert audio.log_mel(WHISPER, np.zeros(320)).tolist() == [[-1.5] * 80] * 2
    longest = np.zeros(AUDIO.max_tokens * AUDIO.frames_per_token * audio.HOP, np.float32)
    assert len(audio.log_mel(AUDIO, longest)) == 18


@pytest.mark.parametrize(
    "samples, message",
    [
        (np.zeros(0), r"a clip must be a row of samples, not of shape \(0,\)"),
        (np.zeros((2, 400)), r"not of shape \(2, 400\)"),
        (np.zeros(400, np.int16), "a clip must be floats from -1 to 1, not int16"),
        (np.array([0.0, np.nan]), "a clip must have finite samples only"),
        (np.zeros(19 * 160), r"a clip of 0.19 s must be at most 0.18 s long for .*max_tokens=6"),
    ],
)
def test_clips_that_are_refused(samples, message):
    with pytest.raises(UserError, match=message):
        audio.log_mel(AUDIO, samples)


# --- WAV files ----------------------------------------------------------------------------------


def write_wav(path, values, width, channels=1, rate=16000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 1:
            file.writeframes(bytes(v + 128 for v in values))
        else:
            file.writeframes(b"".join(struct.pack("<i", v)[:width] for v in values))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_every_width(tmp_path, width):
    top = 2 ** (8 * width - 1)
    values = [0, 1, -1, top // 2, -top // 2, top - 1, -top]
    write_wav(tmp_path / "a.wav", values, width)
    found = audio.read_wav(tmp_path / "a.wav")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(values, np.float64).astype(np.float32) / top)


def test_wav_channels_are_averaged(tmp_path):
    write_wav(tmp_path / "a.wav", [0, 16384, 8192, -8192, -16384, -16384], 2, channels=2)
    assert audio.read_wav(tmp_path / "a.wav").tolist() == [0.25, 0.0, -0.5]


def test_wav_errors(tmp_path):
    write_wav(tmp_path / "fast.wav", [0] * 10, 2, rate=44100)
    (tmp_path / "text.wav").write_text("RIFF, or so it says")
    (tmp_path / "empty.wav").write_bytes(b"")
    cases = {
        "fast.wav": "has 44100 samples a second and must have 16000; `ffmpeg",
        "text.wav": "cannot be read as a PCM WAV file",
        "empty.wav": "cannot be read as a PCM WAV file: it is cut short",
        "missing.wav": "cannot be read as a PCM WAV file: No such file",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=f"{name} {message}") as caught:
            audio.read_wav(tmp_path / name)
        assert "\n" not in str(caught.value)


# --- encoder ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    key = jax.random.key(0)
    boxed = audio.AudioEncoder(CONFIG).init(key, audio.no_audio(AUDIO, 1))["params"]
    leaves, tree = jax.tree.flatten(sharding.unbox(boxed))
    rng = np.random.default_rng(0)  # the biases and norms too
    return tree.unflatten([x + 0.3 * rng.standard_normal(x.shape) for x in leaves])


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
    features = audio.encode_audio(CONFIG, {"audio": params}, broken)
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
        features = audio.encode_audio(CONFIG, {"audio": params}, clips)
        return jnp.sum(jnp.where(features.valid_BU[..., None], features.values_BUD, 0.0) ** 2)

    gradient = np.asarray(jax.grad(total)(frames))
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
    config = schema.ModelConfig(embed_dim=5120, audio=schema.AudioConfig(num_layers=12))
    module, clips = audio.AudioEncoder(config), audio.no_audio(config.audio, 1)
    shapes = jax.eval_shape(lambda key: module.init(key, clips), jax.random.key(0))
    D, F = 512, 2048
    layer = 4 * (D * D + D) + 2 * D * F + F + D + 4 * D
    wanted = 8 * 80 * D + 12 * layer + 4 * D + D * 5120
    assert sum(x.size for x in jax.tree.leaves(sharding.unbox(shapes))) == wanted
