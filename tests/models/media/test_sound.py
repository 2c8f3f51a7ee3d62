"""Sound to log-mel frames against an independent slow formula; WAV files."""

import cmath
import math
import pathlib
import struct
import wave

import numpy as np
import pytest

from puna.configs import architecture
from puna.configs.errors import UserError
from puna.models.media import sound

STORED = pathlib.Path(__file__).parents[2] / "reference" / "media" / "pictures.npz"
AUDIO = architecture.AudioConfig(num_layers=2, num_mels=5, frames_per_token=3, max_tokens=6)
WHISPER = architecture.AudioConfig(num_layers=1, num_mels=80)


def test_frames_are_those_of_whisper():
    with np.load(STORED, allow_pickle=False) as stored:
        clip, wanted = stored["clip"], stored["log_mel"]
    found = sound.log_mel(WHISPER, clip)
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
    found = sound.log_mel(architecture.AudioConfig(num_layers=1, num_mels=6), samples)
    assert found.shape == (frames, 6)
    np.testing.assert_allclose(found, slow_log_mel(samples, 6), atol=1e-5)


def test_a_tone_is_loudest_in_its_band():
    time = np.arange(16000) / 16000
    for frequency in (200, 1000, 3000, 7000):
        frames = sound.log_mel(WHISPER, np.sin(2 * np.pi * frequency * time))
        assert frames.shape == (100, 80)
        expected = slow_mel(frequency) / slow_mel(8000) * 81 - 1
        assert abs(frames[50].argmax() - expected) <= 1


def test_short_and_silent_clips():
    assert sound.log_mel(WHISPER, np.ones(1)).shape == (1, 80)
    assert sound.log_mel(WHISPER, np.zeros(320)).tolist() == [[-1.5] * 80] * 2
    longest = np.zeros(AUDIO.max_tokens * AUDIO.frames_per_token * sound.HOP, np.float32)
    assert len(sound.log_mel(AUDIO, longest)) == 18


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
        sound.log_mel(AUDIO, samples)


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
    found = sound.read_wav(tmp_path / "a.wav")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(values, np.float64).astype(np.float32) / top)


def test_wav_channels_are_averaged(tmp_path):
    write_wav(tmp_path / "a.wav", [0, 16384, 8192, -8192, -16384, -16384], 2, channels=2)
    assert sound.read_wav(tmp_path / "a.wav").tolist() == [0.25, 0.0, -0.5]


def test_wav_errors(tmp_path):
    write_wav(tmp_path / "fast.wav", [0] * 10, 2, rate=44100)
    (tmp_path / "text.wav").write_text("RIFF, or so it says")
    (tmp_path / "empty.wav").write_bytes(b"")
    write_wav(tmp_path / "cut.wav", [0] * 10, 2)
    whole = (tmp_path / "cut.wav").read_bytes()
    (tmp_path / "wide.wav").write_bytes(whole[:32] + struct.pack("<HH", 8, 64) + whole[36:])
    (tmp_path / "cut.wav").write_bytes(whole[:36] + b"LIST\xff\xff\x00\x00")
    cases = {
        "fast.wav": "has 44100 samples a second and must have 16000; `ffmpeg",
        "text.wav": "cannot be read as a PCM WAV file",
        "empty.wav": "cannot be read as a PCM WAV file: it is cut short",
        "cut.wav": "cannot be read as a PCM WAV file: it is cut short",
        "wide.wav": "has samples of 64 bits and must have at most 32",
        "missing.wav": "cannot be read as a PCM WAV file: No such file",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=f"{name} {message}") as caught:
            sound.read_wav(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_clip_may_be_a_path_bytes_or_samples(tmp_path):
    write_wav(tmp_path / "a.wav", [0, 16384, -8192], 2)
    wanted = [0.0, 0.5, -0.25]
    assert sound.read_wav((tmp_path / "a.wav").read_bytes()).tolist() == wanted
    assert sound.read_wav(np.array([0, 16384, -8192], np.int16)).tolist() == wanted
    assert sound.read_wav(np.array([[0.0, 0.0], [1.0, 0.0], [-0.5, 0.0]])).tolist() == wanted
    with pytest.raises(UserError, match="the clip given as bytes cannot be read as a PCM WAV"):
        sound.read_wav(b"no sound")
