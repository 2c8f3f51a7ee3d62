"""Pictures that layers attend to (Llama 3.2 Vision), in texts that come and go."""

import base64
import dataclasses

import jax
import numpy as np
import pytest

from puna.configs.architecture import CrossConfig, ModelConfig, VisionConfig
from puna.configs.errors import UserError
from puna.configs.schema import MeshConfig
from puna.models import tiled_vision, transformer
from puna.models.decode import chat, fused, pictures, slots
from puna.models.decode.slots import Engine
from puna.models.parallel import sharding
from puna.tests.models.decode.test_pictures import TOKENIZER, picture

IMAGE = 290
CONFIG = ModelConfig(
    vocab_size=288, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=256, rope_theta=100.0, compute_dtype="float32",
    cross=CrossConfig(interval=3, first=1), vision=VisionConfig(
        num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, image_size=8, patch_size=4,
        max_tiles=4, token_id=IMAGE, global_layers=1, intermediate_layers="1", extra_rows=8,
    ),
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)
FIRST, WIDE, ANOTHER = picture(1), picture(0, (8, 24)), picture(2)


@pytest.fixture(scope="module")
def params(drawn):
    return drawn(CONFIG, 0.4)


@pytest.fixture(scope="module")
def engine(params):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "PIECES", (8,))
        yield Engine(MODEL, params, TOKENIZER, 3, 128, max_images=2)


def prompt(text, files):
    """`text` with its places, as `Engine.insert` takes it."""
    places = {pictures.PLACE: (pictures.place_id(TOKENIZER), len(files))}
    ids = fused.with_places(TOKENIZER, text, places)
    return pictures.expand(CONFIG, TOKENIZER, ids, files, 128) if files else (ids, None)


@pytest.fixture(scope="module")
def likeliest(params):
    """The greedy ids that one pass over a whole row gives after a prompt, with their log-probs."""

    @jax.jit
    def run(tokens_BT, images):
        logits_BTV = MODEL.apply({"params": params}, tokens_BT, images=images).logits_BTV
        return jax.nn.log_softmax(logits_BTV)

    def find(ids, found, made):
        row = np.zeros((1, 96), np.int32)
        whole = [*ids, *made]
        row[0, : len(whole)] = whole
        images = tiled_vision.batch_images(CONFIG.vision, [found or []], max_images=2)
        logprobs = np.asarray(run(row, images))[0, len(ids) - 1 : len(whole) - 1]
        known = logprobs[:, : TOKENIZER.vocab_size]
        return known.argmax(-1).tolist(), known.max(-1)

    return find


TALKS = [
    ("what is it <|image|> the llama walks over", [FIRST]),
    ("the llama walks over the puna", []),
    ("<|image|><|image|> and the puna", [WIDE, FIRST]),
    ("the puna <|image|>", [ANOTHER]),
    ("<|image|> and then <|image|> the llama", [FIRST, ANOTHER]),
    ("the llama", []),
]


def test_each_text_is_that_of_whole_passes_whatever_is_beside_it(engine, likeliest):
    asked, texts, waiting = {}, {}, list(enumerate(TALKS))
    steps = 0
    while waiting or engine.requests:
        # One more every other step, as soon as there is a slot.
        if waiting and engine.free and steps % 2 == 0:
            number, (text, files) = waiting.pop(0)
            ids, found = prompt(text, files)
            slot = engine.insert(ids, max_tokens=5, tiles=found)
            asked[slot], texts[number] = number, []
        for slot, token in engine.step():
            texts[asked[slot]].append(token)
        steps += 1
    for number, (text, files) in enumerate(TALKS):
        ids, found = prompt(text, files)
        made = [token.id for token in texts[number]]
        wanted, logprobs = likeliest(ids, found, made)
        assert made == wanted, text
        np.testing.assert_allclose(
            [token.logprob for token in texts[number]], logprobs, atol=1e-4, rtol=0
        )


def test_what_is_kept_is_of_the_same_picture(engine, likeliest):
    texts, reused = [], []
    for file in (FIRST, FIRST, ANOTHER):
        ids, found = prompt("now what is this <|image|> the llama", [file])
        before = engine.reused
        texts.append([t.id for t in engine.stream(ids, max_tokens=4, tiles=found)])
        assert texts[-1] == likeliest(ids, found, texts[-1])[0]
        reused.append(engine.reused - before)
    place = ids.index(IMAGE)
    assert texts[0] == texts[1] and reused[2] <= place < reused[1] == len(ids) - 1


@pytest.mark.slow
def test_proposals_change_nothing(engine, params, drawn, monkeypatch):
    monkeypatch.setattr(slots, "PIECES", (8,))
    ids, found = prompt("the puna the puna <|image|> the puna the", [FIRST])
    wanted = [t.id for t in engine.stream(ids, max_tokens=8, tiles=found)]
    # A draft that reads no pictures lacks their token.
    text = dataclasses.replace(CONFIG, num_layers=1, cross=CrossConfig(), vision=VisionConfig())
    for draft in (None, (transformer.Transformer(text), drawn(text, 0.4))):
        several = Engine(MODEL, params, TOKENIZER, 1, 128, speculate=2, draft=draft)
        if draft:
            several.warm_up()
        assert [t.id for t in several.stream(ids, max_tokens=8, tiles=found)] == wanted
        assert several.proposed > 0


def test_a_text_is_that_of_an_engine_without_room_for_pictures(engine, params):
    ids, _ = prompt("the llama walks", [])
    plain = Engine(MODEL, params, TOKENIZER, 1, 128, max_images=0)
    assert [t.id for t in plain.stream(ids, max_tokens=4)] == [
        t.id for t in engine.stream(ids, max_tokens=4)
    ]
    with pytest.raises(UserError, match="1 pictures, more than max_images=0"):
        ids, found = prompt("<|image|>", [FIRST])
        plain.insert(ids, tiles=found)


@pytest.mark.slow
def test_a_mesh_gives_the_same(engine, params):
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    ids, found = prompt(*TALKS[2])
    alone = [t.id for t in engine.stream(ids, max_tokens=4, tiles=found)]
    places = sharding.shardings(transformer.abstract_params(CONFIG), mesh)
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "PIECES", (8,))
        split = Engine(MODEL, jax.device_put(params, places), TOKENIZER, 2, 128, max_images=2)
        assert [t.id for t in split.stream(ids, max_tokens=4, tiles=found)] == alone


def test_a_chat_keeps_its_picture(engine, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(FIRST)
    talk = chat.Chat(engine, max_tokens=3)
    talk.attach(str(path))
    answers = ["".join(talk.say(text)) for text in ("what is it", "and now")]
    messages = [*talk.messages[:1], {"role": "assistant", "content": answers[0]}, talk.messages[2]]
    ids, found = pictures.expand(CONFIG, TOKENIZER, TOKENIZER.chat(messages), [FIRST], 128)
    made = [t.text for t in engine.stream(ids, max_tokens=3, tiles=found)]
    assert "".join(made) == answers[1]


def test_over_http(engine, asking):
    urls = ["data:image/png;base64," + base64.b64encode(x).decode() for x in (FIRST, WIDE, ANOTHER)]
    with asking(engine) as post:
        said = post(urls[0]).json()["choices"][0]["message"]["content"]
        refused = post(*urls)
    parts = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    ids = TOKENIZER.chat([{"role": "user", "content": parts}])
    ids, found = pictures.expand(CONFIG, TOKENIZER, ids, [FIRST], 128)
    assert "".join(t.text for t in engine.stream(ids, max_tokens=5, tiles=found)) == said
    assert refused.status_code == 400
    assert "there are 3 pictures, more than max_images=2" in refused.json()["error"]["message"]


def test_mistakes(engine):
    ids, found = prompt(*TALKS[0])
    with pytest.raises(UserError, match="there is 1 token|has 1 token"):
        engine.insert(ids, tiles=found * 2)
    with pytest.raises(UserError, match=r"id 290, which must lie in 0\.\.279"):
        engine.insert(ids)
    with pytest.raises(UserError, match="max_images=-1 must be at least 0"):
        Engine(MODEL, {}, TOKENIZER, 1, 64, max_images=-1)
    assert engine.free == 3
