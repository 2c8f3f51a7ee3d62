"""Sound as input: the log-mel frontend and the encoder behind it.

The frames are Whisper's (arXiv 2212.04356, section 2.2). Several frames are stacked into one
token, which runs through the encoder of the vision tower and a projector; this part is ours, as
Llama 4 has published no audio weights. Letters: I clips of a row, R = B * I of the batch,
S frames of a clip, M mel bands, W values of stacked frames, A width of the encoder.
"""

import math
import wave
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ..configs.errors import UserError
from ..configs.schema import AudioConfig, ModelConfig
from . import rope
from .encoder import Encoder
from .fusion import Features, check_count
from .layers import contract, normal, param
from .parallel.sharding import constrain

SAMPLE_RATE = 16000  # Hz
WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
_ROPE_THETA = 10000.0


class Audio(flax.struct.PyTreeNode):
    """The clips of each row in the order of their tokens.

    frames_BISM: log-mel frames. num_frames_BI: how many of a clip's S frames there are, 0 for no
    clip; what fills it up may be anything.
    """

    frames_BISM: jax.Array
    num_frames_BI: jax.Array


# --- samples to frames, on the host --------------------------------------------------------------


def read_wav(path) -> np.ndarray:
    """Read a WAV file of PCM samples as mono float32 from -1 to 1.

    Channels are averaged.

    Raises:
      UserError: not such a file, or not 16 kHz: resampling is left to better tools.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        reason = getattr(error, "strerror", None) or str(error) or "it is cut short"
        raise UserError(f"{path} cannot be read as a PCM WAV file: {reason}") from None
    if rate != SAMPLE_RATE:
        raise UserError(f"{path} has {rate} samples a second and must have {SAMPLE_RATE}; "
                        f"`ffmpeg -i IN -ar {SAMPLE_RATE} OUT.wav` converts it")  # fmt: skip
    data = np.frombuffer(data, np.uint8)
    data = data[: len(data) // (width * channels) * width * channels].reshape(-1, width)
    if width == 1:  # the only width that has no sign
        samples = (data[:, 0].astype(np.float32) - 128.0) / 128.0
    else:
        filled = np.zeros((len(data), 4), np.uint8)
        filled[:, 4 - width :] = data
        samples = (filled.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    return samples.reshape(-1, channels).mean(axis=1)


def mel_filters(num_mels: int) -> np.ndarray:
    """Weights of the bins of the spectrum in each mel band, float64 [WINDOW / 2 + 1, M].

    Triangles of unit area on Slaney's mel scale (Auditory Toolbox, 1998), from 0 Hz to half the
    sample rate: linear up to 1000 Hz, 27 bands to a factor of 6.4 above.
    """
    step, log_step, corner = 200.0 / 3, math.log(6.4) / 27, 1000.0
    top = corner / step + math.log(SAMPLE_RATE / 2 / corner) / log_step
    mels = np.linspace(0.0, top, num_mels + 2)
    above = corner * np.exp(log_step * (mels - corner / step))
    edges = np.where(mels < corner / step, mels * step, above)
    bins = np.arange(WINDOW // 2 + 1) * (SAMPLE_RATE / WINDOW)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - low) / (middle - low)
    falling = (high - bins[:, None]) / (high - middle)
    return np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (high - low)


def log_mel(config: AudioConfig, samples) -> np.ndarray:
    """Turn a mono clip into log-mel frames, one every 10 ms.

    Power spectra under a periodic Hann window centred on each frame, the clip mirrored at its
    ends; log10 of the mel bands, cut at 8 decades below the loudest, divided by 4 after adding 4.

    Args:
      config: of the audio encoder.
      samples: floats from -1 to 1 at 16 kHz.

    Returns:
      float32 [S, M] with S = max(1, len(samples) // HOP).

    Raises:
      UserError: not a clip of finite floats, or longer than `max_tokens` tokens.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or not samples.size:
        raise UserError(f"a clip must be a row of samples, not of shape {samples.shape}")
    if not np.issubdtype(samples.dtype, np.floating):
        raise UserError(f"a clip must be floats from -1 to 1, not {samples.dtype}")
    if not np.isfinite(samples).all():
        raise UserError("a clip must have finite samples only")
    num_frames = max(1, len(samples) // HOP)
    if count_tokens(config, num_frames) > config.max_tokens:
        seconds = config.max_tokens * config.frames_per_token * HOP / SAMPLE_RATE
        raise UserError(
            f"a clip of {len(samples) / SAMPLE_RATE:.2f} s must be at most {seconds:g} s long for "
            f"model.audio.max_tokens={config.max_tokens}; cut it into several"
        )
    padded = np.pad(samples.astype(np.float64), WINDOW // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:num_frames]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(windows * hann, axis=-1)) ** 2
    log = np.log10(np.maximum(power @ mel_filters(config.num_mels), 1e-10))
    return ((np.maximum(log, log.max() - 8.0) + 4.0) / 4.0).astype(np.float32)


def count_tokens(config: AudioConfig, num_frames):
    """Tokens that a clip of `num_frames` frames takes, or an array of them; the last may be
    filled up.
    """
    return -(-num_frames // config.frames_per_token)


def batch_audio(config: AudioConfig, rows: Sequence[Sequence], max_clips: int = 0,
                max_frames: int = 0) -> Audio:  # fmt: skip
    """Put the clips of the rows of a batch into one pair of NumPy arrays.

    Args:
      config: of the audio encoder.
      rows: for each row the frames [S, M] of its clips, as `log_mel` gives them.
      max_clips, max_frames: what to make room for in each row; 0 = as many as the fullest has.
        Fix them where every batch must have one shape.

    Raises:
      UserError: frames of another shape, or more than there is room for.
    """
    for r, row in enumerate(rows):
        for frames in row:
            if np.ndim(frames) != 2 or np.shape(frames)[1] != config.num_mels:
                raise UserError(f"row {r} has frames of shape {np.shape(frames)}, which must be "
                                f"(n, model.audio.num_mels={config.num_mels})")  # fmt: skip
    clips = max((len(row) for row in rows), default=0)
    length = max((len(frames) for row in rows for frames in row), default=0)
    for name, most, room in (("max_clips", clips, max_clips), ("max_frames", length, max_frames)):
        if room and most > room:
            raise UserError(f"{name}={room} must be at least {most} for these clips")
    shape = (len(rows), max_clips or max(clips, 1), max_frames or max(length, 1))
    out = np.zeros((*shape, config.num_mels), np.float32)
    counts = np.zeros(shape[:2], np.int32)
    for r, row in enumerate(rows):
        for i, frames in enumerate(row):
            out[r, i, : len(frames)], counts[r, i] = frames, len(frames)
    return Audio(out, counts)


def check_audio(config: ModelConfig, tokens_BT, num_frames_BI) -> None:
    """Check on the host that every row has as many audio tokens as its clips give features.

    Raises:
      UserError: the first row where they differ.
    """
    count_B = np.sum(count_tokens(config.audio, np.asarray(num_frames_BI)), axis=1)
    check_count("clips", "model.audio.token_id", config.audio.token_id, tokens_BT, count_B)


# --- frames to features ---------------------------------------------------------------------------


def no_audio(config: AudioConfig, batch_size: int) -> Audio:
    """`Audio` of one clip a row, none of which is there."""
    frames = jnp.zeros((batch_size, 1, config.frames_per_token, config.num_mels), jnp.float32)
    return Audio(frames, jnp.zeros((batch_size, 1), jnp.int32))


def encode_audio(config: ModelConfig, params, audio: Audio) -> Features:
    """Run the encoder alone, for features that are used more than once.

    `Transformer` takes the result in the place of `audio`.
    """
    features = AudioEncoder(config).apply({"params": params["audio"]}, audio)
    assert isinstance(features, Features)
    return features


class AudioEncoder(nn.Module):
    """Stacked frames, encoder and projector."""

    config: ModelConfig

    @nn.compact
    def __call__(self, audio: Audio) -> Features:
        """Encode every clip by itself.

        Raises:
          UserError: frames of another width than the config's, too many, or a model without audio.
        """
        c, a = self.config, self.config.audio
        B, num_clips, S, M = audio.frames_BISM.shape
        R = B * num_clips
        T = count_tokens(a, S)
        _check_frames(a, M, T)
        W, D = a.frames_per_token * M, a.embed_dim
        num_frames_R = jnp.asarray(audio.num_frames_BI).reshape(R)
        frames_RSM = jnp.asarray(audio.frames_BISM).reshape(R, S, M)
        # A gradient of zero would not stop a NaN in what fills up a clip.
        inside_RS = jnp.arange(S) < num_frames_R[:, None]
        frames_RSM = jnp.where(inside_RS[..., None], frames_RSM, 0.0)
        frames_RSM = jnp.pad(frames_RSM, ((0, 0), (0, T * a.frames_per_token - S), (0, 0)))
        stacked_RTW = constrain(frames_RSM.reshape(R, T, W), "batch", None, None)
        valid_RT = jnp.arange(T) < count_tokens(a, num_frames_R)[:, None]

        frames_WD = param(self, "frames_WD", (W, D), ("patches", "embed"), normal(W**-0.5),
                          c.param_dtype)  # fmt: skip
        x_RTD = contract("RTW,WD->RTD", stacked_RTW, frames_WD, c.compute_dtype)
        x_RTD = constrain(x_RTD, "batch", None, "act_embed")
        x_RTD = Encoder(c, a, name="encoder")(x_RTD, rope_angles(a, T), valid_RT)
        # Features start out as large as the embeddings they stand among.
        std = (D * c.embed_dim) ** -0.5
        projector_AD = param(self, "projector_AD", (D, c.embed_dim), ("mlp", "embed"), normal(std),
                             c.param_dtype)  # fmt: skip
        y_RTD = contract("RTA,AD->RTD", x_RTD, projector_AD, c.compute_dtype)
        y_RTD = constrain(y_RTD, "batch", None, "act_embed")
        values_BUD = constrain(y_RTD.reshape(B, -1, c.embed_dim), "batch", None, "act_embed")
        return Features(values_BUD, valid_RT.reshape(B, -1))


def rope_angles(config: AudioConfig, num_tokens: int):
    """Radians by which each pair of a head turns, float32 [1, T, H / 2]."""
    H = config.embed_dim // config.num_heads
    frequencies = _ROPE_THETA ** (-np.arange(0, H, 2, dtype=np.float64) / H)
    return rope.angles(np.arange(num_tokens)[None], frequencies)


def _check_frames(a: AudioConfig, num_mels, num_tokens):
    if not a.num_layers:
        raise UserError("model.audio.num_layers=0: a model without audio takes no clips")
    if num_mels != a.num_mels:
        raise UserError(f"frames of {num_mels} mel bands must have model.audio.num_mels="
                        f"{a.num_mels}")  # fmt: skip
    if num_tokens > a.max_tokens:
        raise UserError(f"clips of {num_tokens} tokens must have at most model.audio.max_tokens="
                        f"{a.max_tokens}")  # fmt: skip
