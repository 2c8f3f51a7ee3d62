"""Sound in prompts: text after it is that of the full forward pass, and clips are told apart."""

import io
import wave

import jax
import numpy as np
import pytest

from puna.configs.architecture import AudioConfig, ModelConfig
from puna.configs.errors import UserError
from puna.models import transformer
from puna.models.audio import batch_audio
from puna.models.decode import clips, fused, slots
from puna.models.decode.slots import Engine
from puna.models.text.tokenizer import train_bpe

TOKENIZER = train_bpe(["the llama walks over the puna"] * 9, 280)
CONFIG = ModelConfig(
    vocab_size=288, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=256, rope_theta=100.0, nope_interval=2, chunk_size=16,
    compute_dtype="float32", audio=AudioConfig(
        num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, num_mels=8, frames_per_token=4,
        max_tokens=30, token_id=TOKENIZER.special["<|patch|>"],
    ),
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)


def clip(seed, seconds):
    """A file's bytes."""
    samples = np.random.default_rng(seed).normal(0, 3000, int(16000 * seconds)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes(samples.tobytes())
    return file.getvalue()


def prompt(text, files, config=CONFIG):
    places = {clips.PLACE: (clips.place_id(config), len(files))}
    return clips.expand(config, fused.with_places(TOKENIZER, text, places), files, 200)


def test_text_is_that_of_the_forward_pass_and_clips_are_told_apart(drawn, monkeypatch):
    params = drawn(CONFIG, 0.4)
    monkeypatch.setattr(slots, "PIECES", (16,))
    engine = Engine(MODEL, params, TOKENIZER, 2, 128)

    @jax.jit
    def run(tokens_BT, audio):
        return jax.nn.log_softmax(
            MODEL.apply({"params": params}, tokens_BT, audio=audio).logits_BTV
        )

    files = [clip(0, 0.9), clip(1, 0.31)]
    ids, frames = prompt("the<|audio|>llama", files)
    # 23 tokens and 8: in pieces and across chunks.
    assert [len(f) for f in frames] == [90, 31] and ids.count(CONFIG.audio.token_id) == 23 + 8
    other, other_frames = prompt("the<|audio|>llama", [files[0], clip(2, 0.31)])
    assert other == ids
    texts, shared = [], []
    for given in (frames, frames, other_frames):
        before = engine.reused
        made = list(engine.stream(ids, max_tokens=6, clips=given))
        texts.append([token.id for token in made])
        row = np.zeros((1, 64), np.int32)
        row[0, : len(ids) + 6] = [*ids, *texts[-1]]
        audio = batch_audio(CONFIG.audio, [given], max_frames=120)
        want = np.asarray(run(row, audio))[0, len(ids) - 1 : len(ids) + 5]
        np.testing.assert_array_equal(texts[-1], want[:, : TOKENIZER.vocab_size].argmax(-1))
        np.testing.assert_allclose([t.logprob for t in made], want.max(-1), atol=1e-4, rtol=0)
        shared.append(engine.reused - before)
    second = len(ids) - 1 - ids[::-1].index(CONFIG.audio.token_id) - 7  # where its tokens begin
    assert shared[0] == 0 < shared[2] <= second < shared[1] and texts[0] == texts[1]


@pytest.mark.parametrize(
    ("text", "files", "wrong"),
    [
        ("the", [clip(0, 2)], "must be at most 1.2 s long"),
        ("the", [b"RIFF"], "cannot be read as a PCM WAV file"),
        ("the", [clip(0, 1)] * 9, "more than 200 tokens with its clips"),
        ("<|audio|> <|audio|>", [clip(0, 1)], "has 2 <|audio|>, which is more than the 1"),
    ],
)
def test_what_cannot_be_read_is_one_line(text, files, wrong):
    with pytest.raises(UserError, match=wrong.replace("|", r"\|")) as e:
        prompt(text, files)
    assert "\n" not in str(e.value)


def test_a_model_without_sound_takes_none():
    with pytest.raises(UserError, match="model.audio.num_layers=0"):
        clips.place_id(ModelConfig())
