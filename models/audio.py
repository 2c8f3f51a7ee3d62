"""Sound as input: the encoder behind the log-mel frames of `media.sound`.

Several frames are stacked into one
token, which runs through the encoder of the vision tower and a projector; this part is ours, as
Llama 4 has published no audio weights. Letters: I clips of a row, R = B * I of the batch,
S frames of a clip, M mel bands, W values of stacked frames, A width of the encoder.
"""

from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ..configs.architecture import AudioConfig, ModelConfig
from ..configs.errors import UserError
from . import rope
from .encoder import Encoder
from .fusion import Features, check_count
from .layers import contract, normal, param
from .media.sound import count_tokens
from .parallel.sharding import constrain

_ROPE_THETA = 10000.0


class Audio(flax.struct.PyTreeNode):
    """The clips of each row in the order of their tokens.

    frames_BISM: log-mel frames. num_frames_BI: how many of a clip's S frames there are, 0 for no
    clip; what fills it up may be anything.
    """

    frames_BISM: jax.Array
    num_frames_BI: jax.Array


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
        x_RTD = contract("RTW,WD->RTD", stacked_RTW, frames_WD, c.activation_dtype)
        x_RTD = constrain(x_RTD, "batch", None, "act_embed")
        x_RTD = Encoder(c, a, name="encoder")(x_RTD, rope_angles(a, T), valid_RT)
        # Features start out as large as the embeddings they stand among.
        std = (D * c.embed_dim) ** -0.5
        projector_AD = param(self, "projector_AD", (D, c.embed_dim), ("mlp", "embed"), normal(std),
                             c.param_dtype)  # fmt: skip
        y_RTD = contract("RTA,AD->RTD", x_RTD, projector_AD, c.activation_dtype)
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
