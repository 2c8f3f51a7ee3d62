"""Sound in prompts: text after it is that of the full forward pass, and clips are told apart."""

import base64
import io
import wave

import jax
import numpy as np
import pytest

from puna.configs.architecture import AudioConfig, ModelConfig
from puna.configs.errors import UserError
from puna.models import transformer
from puna.models.audio import batch_audio
from puna.models.decode import chat, clips, conversation, fused, slots
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


@pytest.fixture(scope="module")
def engine(drawn):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "PIECES", (16,))
        yield Engine(MODEL, drawn(CONFIG, 0.4), TOKENIZER, 2, 128)


def said(texts, files, longest=128):
    """A conversation whose first message has the clips before its text."""
    parts = [{"type": "image"}] * len(files)
    first, *rest = texts
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": first}]}]
    messages += [
        {"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(rest)
    ]
    media = [("audio", file) for file in files]
    return conversation.with_media(CONFIG, TOKENIZER, TOKENIZER.chat(messages), media, longest)


def answer(engine, texts, files, count=5):
    ids, tiles, frames = said(texts, files)
    assert tiles is None
    return "".join(token.text for token in engine.stream(ids, max_tokens=count, clips=frames))


def test_text_is_that_of_the_forward_pass_and_clips_are_told_apart(drawn, engine):
    params = drawn(CONFIG, 0.4)

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


def test_a_chat_keeps_its_clips(engine, tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(clip(3, 0.3))
    talk = chat.Chat(engine, max_tokens=4)
    with pytest.raises(UserError, match="cannot be read as a PCM WAV file: No such file"):
        talk.attach(str(tmp_path / "b.wav"), "audio")
    with pytest.raises(UserError, match="reads no pictures"):
        talk.attach(str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    chat._attach(talk, "/audio  ~/a.wav")
    assert capsys.readouterr().out == "the next message has ~/a.wav with it\n"
    first = "".join(talk.say("what is it"))
    path.write_bytes(clip(4, 0.3))  # what has been heard is not heard again as something else
    assert "".join(talk.say("and now")) == answer(
        engine, ["what is it", first, "and now"], [clip(3, 0.3)], 4
    )


def test_over_http(engine, asking):
    def part(data, form="wav"):
        data = base64.b64encode(data).decode() if isinstance(data, bytes) else data
        return {"type": "input_audio", "input_audio": {"data": data, "format": form}}

    with asking(engine) as post:
        answers = [post(part(clip(n, 0.3)), part(clip(9, 0.2))) for n in (1, 2)]
        assert [a.status_code for a in answers] == [200, 200]
        ids, _, frames = said(["what is it"], [clip(1, 0.3), clip(9, 0.2)])
        assert answers[0].json()["usage"]["prompt_tokens"] == len(ids) and len(frames) == 2
        bad = [
            (part("%%"), "messages[0]: the clip is not base64"),
            (part(clip(0, 0.1), "mp3"), "messages[0]: input_audio.format='mp3' must be 'wav'"),
            (part(None), "messages[0]: input_audio must have data"),
            ({"type": "input_audio"}, "messages[0]: input_audio must have data"),
            (part(b"ID3"), "cannot be read as a PCM WAV file"),
            (part(clip(0, 2)), "must be at most 1.2 s long"),
        ]
        for wrong, message in bad:
            refused = post(wrong)
            error = refused.json()["error"]
            assert refused.status_code == 400 and message in error["message"], error
            assert "\n" not in error["message"]
        refused = post(*[part(clip(0, 0.3))] * 20)
        assert "more than 128 tokens with its clips" in refused.json()["error"]["message"]
    for n, given in zip((1, 2), answers, strict=True):
        text = given.json()["choices"][0]["message"]["content"]
        assert text == answer(engine, ["what is it"], [clip(n, 0.3), clip(9, 0.2)])
    assert engine.free == 2
