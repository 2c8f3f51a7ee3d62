"""Sound to log-mel frames, the way Whisper was trained (arXiv 2212.04356, section 2.2); no JAX.

Letters: S frames of a clip, M mel bands.
"""

import io
import math
import wave

import numpy as np

from ...configs.architecture import AudioConfig
from ...configs.errors import UserError

SAMPLE_RATE = 16000  # Hz
WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms


def read_wav(source) -> np.ndarray:
    """Read PCM samples as mono float32 from -1 to 1; channels are averaged.

    Args:
      source: the path of a WAV file, its bytes, or samples [S] or [S, channels]: floats from -1 to
        1, or integers of 16 bits.

    Raises:
      UserError: not such a file, or not 16 kHz: resampling is left to better tools.
    """
    if isinstance(source, np.ndarray):
        scale = 1.0 if np.issubdtype(source.dtype, np.floating) else 1 / 2.0**15
        samples = source.astype(np.float32) * np.float32(scale)
        return samples if samples.ndim == 1 else samples.reshape(len(samples), -1).mean(axis=1)
    path = "the clip given as bytes" if isinstance(source, bytes) else str(source)
    try:
        with wave.open(io.BytesIO(source) if isinstance(source, bytes) else path, "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, RuntimeError, wave.Error) as error:  # RuntimeError: a chunk is cut
        reason = getattr(error, "strerror", None) or str(error) or "it is cut short"
        raise UserError(f"{path} cannot be read as a PCM WAV file: {reason}") from None
    if width > 4:
        raise UserError(f"{path} has samples of {8 * width} bits and must have at most 32")
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
