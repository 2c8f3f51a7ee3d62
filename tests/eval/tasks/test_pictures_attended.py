"""Questions about pictures that layers attend to (Llama 3.2 Vision)."""

import base64
import json

import jax
import numpy as np
import pytest

from puna import __main__ as cli
from puna.configs.architecture import CrossConfig, ModelConfig, VisionConfig
from puna.configs.errors import UserError
from puna.configs.schema import MeshConfig
from puna.eval import scoring
from puna.eval.tasks import evaluate
from puna.eval.tasks.pictures import Pictures
from puna.models import tiled_vision, transformer
from puna.models.parallel import sharding
from puna.models.text.tokenizer import train_bpe
from puna.tests.eval.tasks.test_pictures import CHOICE, WRITE, picture

pytest.importorskip("PIL.Image", reason="needs the extra images")

TOKENIZER = train_bpe(["the llama walks over the puna"] * 9, 280)
IMAGE = 290
CONFIG = ModelConfig(
    vocab_size=288, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=192, rope_theta=100.0, compute_dtype="float32",
    cross=CrossConfig(interval=3, first=1), vision=VisionConfig(
        num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, image_size=8, patch_size=4,
        max_tiles=4, token_id=IMAGE, global_layers=1, intermediate_layers="1", extra_rows=8,
    ),
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)
MOST = 3


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def draw(path, x):
        values = rng.normal(size=x.shape)
        return np.asarray(1 + 0.1 * values if "norm" in str(path[-2]) else 0.4 * values, x.dtype)

    return jax.tree.map_with_path(draw, sharding.unbox(transformer.abstract_params(CONFIG)))


@pytest.fixture(scope="module")
def forward(params):
    """The log-probabilities [T, V] of a row with its pictures, by one pass over all of it."""

    @jax.jit
    def run(tokens_BT, images):
        logits_BTV = MODEL.apply({"params": params}, tokens_BT, images=images).logits_BTV
        return jax.nn.log_softmax(logits_BTV)

    def of(ids, found):
        row = np.zeros((1, 192), np.int32)
        row[0, : len(ids)] = ids
        images = tiled_vision.batch_images(CONFIG.vision, [found], max_images=MOST)
        return np.asarray(run(row, images))[0]

    return of


@pytest.mark.slow  # compiles programs of several shapes
def test_log_probabilities_are_those_of_the_whole_pass(params, forward):
    """Pictures in what texts share, after it, at its end, several in a row, and none."""
    seen = Pictures(CONFIG, TOKENIZER)
    a, b, c = seen.add([picture(0, 8, 24), picture(1, 8, 8), picture(2, 16, 8)])
    rng = np.random.default_rng(1)

    def some(count):
        return rng.integers(0, 288, count).tolist()

    stem = [*some(5), IMAGE, *some(65)]
    context = [*some(20), IMAGE, *some(4)]
    texts = [
        (some(9), [], some(2)),
        ([IMAGE, *some(4)], [a], some(3)),
        ([*some(3), IMAGE], [b], some(1)),
        ([IMAGE, IMAGE, *some(20), IMAGE, 3], [a, c, b], some(4)),
        *((stem + end, [a], some(2)) for end in (some(1), some(20), some(7))),
        ([*stem, IMAGE, *some(20)], [a, c], some(2)),
        ([*stem, *some(18), IMAGE], [a, b], some(2)),
    ]
    texts += [(context, [b], some(n)) for n in (1, 2, 5)] + [(context, [c], some(2))]
    keyed = [(seen.keyed(ids, names), more) for ids, names, more in texts]
    groups = scoring._groups(keyed, 288, True)
    assert any(g.stem for g in groups) and any(g.shares for g in groups)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        found = dict(scoring.score(MODEL, params, keyed, 3, (), seen.features(params)))
    for n, (ids, names, more) in enumerate(texts):
        logprobs = forward([*ids, *more], seen.tiles(names))
        at = np.arange(len(ids) - 1, len(ids) + len(more) - 1)
        np.testing.assert_allclose(found[n].logprob, logprobs[at, more].sum(), rtol=2e-5)
    # Which picture it is matters.
    blank = forward([*context, 1], seen.tiles([b])), forward([*context, 1], seen.tiles([c]))
    assert np.abs(blank[0] - blank[1])[: len(context)].max() > 0.01


def test_a_picture_is_one_id_that_only_the_same_has():
    seen = Pictures(CONFIG, TOKENIZER)
    # The same pixels in another grid of tiles are another picture.
    a, b, wide = seen.add([picture(0, 8, 8), picture(1, 8, 8), picture(0, 8, 16)])
    keys = [seen.keyed((1, IMAGE, 2), (name,)) for name in (a, b, wide, a)]
    assert keys[0] == keys[3] and len({*keys}) == 3
    assert all(key[1] < 0 and (key[0], key[2]) == (1, 2) for key in keys)
    with pytest.raises(UserError, match="the two must be equal"):
        seen.keyed((1, IMAGE, IMAGE), (a,))


@pytest.mark.slow  # compiles programs of several shapes
def test_the_command(tmp_path, params, forward, monkeypatch):
    (tmp_path / "a.ppm").write_bytes(picture(0, 8, 24))
    url = "data:image/x-portable-pixmap;base64," + base64.b64encode(picture(1, 8, 8)).decode()
    lines = [
        {"q": "what", "t": 0, "image": url}, {"q": "what", "t": 1, "image": "a.ppm"},
        {"q": "is <|image|> it <|image|>", "t": 2, "images": [url, "a.ppm"]},
        {"q": "who", "t": 2, "image": None},
    ]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "choice.toml").write_text(CHOICE)
    (tmp_path / "write.toml").write_text(WRITE)
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda path: TOKENIZER)
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: (MODEL, params))
    tasks, out = f"--tasks={tmp_path}/choice.toml,{tmp_path}/write.toml", tmp_path / "out"
    cli._run(["eval", "--checkpoint=m", tasks, f"--workdir={out}", "--batch_size=8"])
    asked = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in asked] == ["logprob"] * 12 + ["text"] * 4
    seen = Pictures(CONFIG, TOKENIZER, out / "pictures")
    for line in asked:
        context, names = line["context"], line.get("pictures", ())
        assert context.count(IMAGE) == len(names)
        ids = line.get("continuation") or line["answer"]["ids"]
        at = np.arange(len(context) - 1, len(context) + len(ids) - 1)
        logprobs = forward([*context, *ids], seen.tiles(names))[at]
        if line["kind"] == "logprob":
            want = logprobs[np.arange(len(ids)), ids].sum()
            np.testing.assert_allclose(line["answer"][0], want, rtol=2e-5)
        else:
            assert ids == logprobs[:, : TOKENIZER.vocab_size].argmax(-1).tolist()
    (tmp_path / "a.ppm").unlink()
    cli._run(["eval", "--checkpoint=m", f"--replay={out}"])
    again = json.loads((out / "replay.json").read_text())
    assert again["equal"] == again["requests"] == len(asked)
