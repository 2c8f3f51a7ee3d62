"""Pictures in prompts: text with them is that of the full forward pass, and they are told apart."""

import base64
import io

import jax
import numpy as np
import pytest

from puna.configs.architecture import ModelConfig, VisionConfig
from puna.configs.errors import UserError
from puna.models import transformer, vision
from puna.models.decode import chat, pictures, slots
from puna.models.decode.slots import Engine
from puna.models.media.images import image_ids
from puna.models.text.tokenizer import train_bpe

Image = pytest.importorskip("PIL.Image", reason="needs the extra images")

TOKENIZER = train_bpe(["the llama walks over the puna"] * 9, 280)
PATCH = TOKENIZER.special["<|patch|>"]
CONFIG = ModelConfig(
    vocab_size=288, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=512, rope_theta=100.0, nope_interval=2, chunk_size=16,
    compute_dtype="float32", vision=VisionConfig(
        num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, image_size=8, patch_size=2,
        adapter_dim=20, max_tiles=4, token_id=PATCH,
    ),
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)


def picture(seed, size=(8, 8)):
    """A file's bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def params(drawn):
    return drawn(CONFIG, 0.4)


@pytest.fixture(scope="module")
def engine(params):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "PIECES", (16,))
        yield Engine(MODEL, params, TOKENIZER, 2, 256)


def conversation(text, files):
    parts = [*({"type": "image"} for _ in files), {"type": "text", "text": text}]
    ids = TOKENIZER.chat([{"role": "user", "content": parts}])
    return pictures.expand(CONFIG, TOKENIZER, ids, files, 256)


@pytest.fixture(scope="module")
def forward(params):
    """Log-probabilities of a row, by one pass over tokens and tiles."""

    @jax.jit
    def run(tokens_BT, images):
        logits_BTV = MODEL.apply({"params": params}, tokens_BT, images=images).logits_BTV
        return jax.nn.log_softmax(logits_BTV)

    def logprobs(ids, tiles):
        row = np.zeros((1, 160), np.int32)
        row[0, : len(ids)] = ids
        images = vision.batch_images(CONFIG.vision, [[tiles]], max_tiles=8)
        return np.asarray(run(row, images))[0, : len(ids)]

    return logprobs


def write(engine, ids, tiles, count=6):
    return list(engine.stream(ids, max_tokens=count, tiles=tiles))


def test_text_is_that_of_the_forward_pass_and_pictures_are_told_apart(engine, forward):
    wide, first, another = picture(0, (8, 24)), picture(1), picture(2)
    ids, tiles = conversation("what is it", [wide, first])
    # Three tiles and the whole, and one: 20 patches, in pieces and across chunks.
    assert len(tiles) == 5 and ids.count(PATCH) == 5 * 4 and len(ids) > 48
    other, other_tiles = conversation("what is it", [wide, another])
    assert other == ids
    texts, shared = [], []
    for prompt_tiles in (tiles, tiles, other_tiles):
        before = engine.reused
        made = write(engine, ids, prompt_tiles)
        texts.append([token.id for token in made])
        want = forward([*ids, *texts[-1]], prompt_tiles)[len(ids) - 1 : -1]
        np.testing.assert_array_equal(texts[-1], want[:, : TOKENIZER.vocab_size].argmax(-1))
        np.testing.assert_allclose(
            [token.logprob for token in made], want.max(-1), atol=1e-4, rtol=0
        )
        shared.append(engine.reused - before)
    # Where the patches of the second picture begin.
    second = [t for t, i in enumerate(ids) if i == TOKENIZER.special["<|image|>"]][1] + 1
    assert not np.array_equal(tiles, other_tiles) and texts[0] == texts[1]
    assert shared[0] == 0 < shared[2] <= second < shared[1]


def test_a_chat_keeps_its_pictures(engine, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture(3))
    talk = chat.Chat(engine, max_tokens=4)
    with pytest.raises(UserError, match="there is no such file"):
        talk.attach(str(tmp_path / "b.png"))
    talk.attach(str(path))
    answers = ["".join(talk.say(text)) for text in ("what is it", "and now")]
    before = engine.reused
    parts = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    messages = [
        {"role": "user", "content": parts}, {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "and now"},
    ]  # fmt: skip
    assert talk.messages == [*messages, {"role": "assistant", "content": answers[1]}]
    ids = TOKENIZER.chat(messages)
    ids, tiles = pictures.expand(CONFIG, TOKENIZER, ids, [picture(3)], 256)
    assert "".join(token.text for token in write(engine, ids, tiles, 4)) == answers[1]
    assert engine.reused > before


def test_no_picture_is_longer_than_said():
    for size in ((8, 8), (8, 100), (16, 16), (24, 9)):
        ids, _ = pictures.expand(CONFIG, TOKENIZER, [image_ids(TOKENIZER).image],
                                 [picture(0, size)], 999)  # fmt: skip
        assert len(ids) <= pictures.longest(CONFIG)


def test_mistakes(engine):
    ids, tiles = conversation("x", [picture(0)])
    with pytest.raises(UserError, match="1 places in the text for 2 pictures"):
        one = [image_ids(TOKENIZER).image]
        pictures.expand(CONFIG, TOKENIZER, one, [picture(0)] * 2, 99)
    with pytest.raises(UserError, match="more than 30 tokens with its pictures"):
        place = [image_ids(TOKENIZER).image]
        pictures.expand(CONFIG, TOKENIZER, place * 9, [picture(0)] * 9, 30)
    with pytest.raises(UserError, match="cannot be read as an image|not an image"):
        pictures.expand(CONFIG, TOKENIZER, one, [b"nothing"], 99)
    with pytest.raises(UserError, match="reads no pictures: model.vision.num_layers=0"):
        pictures.expand(ModelConfig(), TOKENIZER, one, [picture(0)], 99)
    with pytest.raises(UserError, match="has 4 tokens of model.vision.token_id"):
        engine.insert(ids, tiles=np.concatenate([tiles, tiles]))
    with pytest.raises(UserError, match="must not end within a picture"):
        engine.insert([1, *[PATCH] * 4], tiles=tiles)
    assert engine.free == 2


def test_over_http(engine, asking):
    def url(data):
        return "data:image/png;base64," + base64.b64encode(data).decode()

    with asking(engine) as post:
        answers = [post(url(picture(n)), url(picture(4, (8, 24)))) for n in (1, 2)]
        assert [a.status_code for a in answers] == [200, 200]
        texts = [a.json()["choices"][0]["message"]["content"] for a in answers]
        bad = [
            ("https://example.org/a.png", "must be a data: URL"),
            ("data:image/png;base64,%%", "not base64"),
            (url(b"GIF89a"), "image"),
            (url(picture(0, (5000, 5000))[:2000]), "5000 x 5000 pixels, more than"),
        ]
        for wrong, message in bad:
            refused = post(wrong)
            assert refused.status_code == 400 and message in refused.json()["error"]["message"]
        refused = post(*[url(picture(0))] * 40)
        assert "more than 256 tokens with its pictures" in refused.json()["error"]["message"]
    for n, text in zip((1, 2), texts, strict=True):
        ids, tiles = conversation("what is it", [picture(n), picture(4, (8, 24))])
        assert "".join(token.text for token in write(engine, ids, tiles, 5)) == text
