"""Questions about pictures: scores are those of the full forward pass, a record replays alone."""

import base64
import dataclasses
import json

import jax
import numpy as np
import pytest

from puna import __main__ as cli
from puna.configs import architecture, schema
from puna.configs.errors import UserError
from puna.eval.tasks import during, evaluate
from puna.eval.tasks.definition import load_task
from puna.eval.tasks.documents import documents, fingerprint
from puna.eval.tasks.pictures import Pictures
from puna.eval.tasks.requests import Asking
from puna.models import transformer, vision
from puna.models.parallel import processes, sharding
from puna.models.text.tokenizer import train_bpe

pytest.importorskip("PIL.Image", reason="needs the extra images")

TOKENIZER = train_bpe(["the llama walks over the puna"] * 9, 280)
CONFIG = schema.ModelConfig(
    vocab_size=288, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=192, rope_theta=100.0, nope_interval=2, chunk_size=16,
    compute_dtype="float32",
    vision=architecture.VisionConfig(
        num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, image_size=8, patch_size=2,
        adapter_dim=20, max_tiles=4, token_id=TOKENIZER.special["<|patch|>"],
    ),
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)
CHOICE = """kind = "choice"
data = "d.jsonl"
images = ["image", "images"]
shots = 1
shots_data = "d.jsonl"
prompt = "{{ q }}"
choices = ["llama", "puna", "the wind"]
target = "{{ t }}"
"""
WRITE = CHOICE.replace('"choice"', '"generate"').replace("choices =", "#").replace(
    "shots", "# shots"
) + "max_tokens = 4\n"  # fmt: skip


def picture(seed, height, width):
    """A file's bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()


@pytest.fixture(scope="module")
def params():
    found = transformer.init_params(CONFIG, jax.random.key(0), sharding.make_mesh(
        schema.MeshConfig()))  # fmt: skip
    return jax.tree.map(lambda x: 3 * x, found)


@pytest.fixture
def folder(tmp_path):
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
    return tmp_path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow  # compiles three programs of several shapes
def test_scores_and_texts_are_those_of_the_forward_pass(folder, params, monkeypatch):
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda path: TOKENIZER)
    monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: (MODEL, params))
    tasks = f"--tasks={folder}/choice.toml,{folder}/write.toml"
    out = folder / "out"
    cli._run(["eval", "--checkpoint=m", tasks, f"--workdir={out}", "--batch_size=8"])
    lines = read(out / "requests.jsonl")
    assert [line["kind"] for line in lines] == ["logprob"] * 12 + ["text"] * 4
    # The picture of the example comes first.
    assert [len(line.get("pictures", ())) for line in lines[::3]] == [2, 2, 3, 1, 1, 0]

    @jax.jit
    def forward(tokens_BT, images):
        logits_BTV = MODEL.apply({"params": params}, tokens_BT, images=images).logits_BTV
        return jax.nn.log_softmax(logits_BTV)

    seen = Pictures(CONFIG, TOKENIZER, out / "pictures")
    for line in lines:
        context = line["context"]
        ids = line.get("continuation") or line["answer"]["ids"]
        row = np.zeros((1, 192), np.int32)
        row[0, : len(context) + len(ids)] = [*context, *ids]
        tiles = seen.tiles(line["pictures"]) if "pictures" in line else np.zeros((0, 8, 8, 3))
        assert context.count(CONFIG.vision.token_id) == 4 * len(tiles)
        images = vision.batch_images(CONFIG.vision, [[tiles] if len(tiles) else []], max_tiles=12)
        at = np.arange(len(context) - 1, len(context) + len(ids) - 1)
        logprobs = np.asarray(forward(row, images))[0, at]
        if line["kind"] == "logprob":
            want = logprobs[np.arange(len(ids)), ids].sum()
            # Sums of several tokens, some of which are all but impossible, in float32.
            np.testing.assert_allclose(line["answer"][0], want, rtol=1e-5)
        else:
            assert ids == logprobs[:, : TOKENIZER.vocab_size].argmax(-1).tolist()
    # Which picture it is matters: the first two questions differ in nothing else.
    first, second = ([line["answer"][0] for line in lines[i : i + 3]] for i in (0, 3))
    assert np.abs(np.subtract(first, second)).max() > 0.01

    # While a run trains the numbers are the same.
    c = schema.Config(model=CONFIG)
    asked = ",".join(f"{folder}/{name}.toml" for name in ("choice", "write"))
    c = dataclasses.replace(c, eval=dataclasses.replace(c.eval, tasks=asked, batch_size=8))
    found = during.During(c, TOKENIZER, sharding.make_mesh(c.mesh))(MODEL, params)
    results = json.loads((out / "results.json").read_text())["tasks"]
    for task, metric in [("choice", "accuracy"), ("choice", "accuracy_per_byte"),
                         ("write", "exact")]:  # fmt: skip
        assert found[f"tasks_{task}_{metric}"] == results[task][metric]["value"]

    # Neither the data nor their pictures are needed to ask again.
    (folder / "a.ppm").unlink()
    cli._run(["eval", "--checkpoint=m", f"--replay={out}"])
    again = json.loads((out / "replay.json").read_text())
    assert again["equal"] == again["requests"] == len(lines)
    whole = (out / "requests.jsonl").read_text()
    lines[0]["context"].remove(CONFIG.vision.token_id)
    (out / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="7 tokens of .* 8 features; the two must be equal"):
        evaluate.replay(out, "m")
    (out / "requests.jsonl").write_text(whole)
    some = next((out / "pictures").iterdir())
    some.write_bytes(b"P6 1 1 255\n...")
    with pytest.raises(UserError, match="missing or not the picture that was asked about"):
        evaluate.replay(out, "m")


def test_patches_are_told_apart_and_shared():
    seen = Pictures(CONFIG, TOKENIZER)
    patch = CONFIG.vision.token_id
    a, b = seen.add([picture(0, 8, 8), picture(1, 8, 8)])
    assert a != b and seen.add([picture(0, 8, 8)]) == (a,)
    ids = (1, patch, patch, patch, patch, 2)
    first, other = seen.keyed(ids, (a,)), seen.keyed(ids, (b,))
    assert first == seen.keyed(ids, (a,)) and (first[0], first[-1]) == (1, 2)
    patches = {*first[1:-1], *other[1:-1]}
    assert len(patches) == 8 and max(patches) < 0


def test_a_chat_has_pictures_in_its_turns(folder):
    task = load_task(str(folder / "choice.toml"))
    found = documents(task, TOKENIZER)
    request = Asking(TOKENIZER, 192, True, Pictures(CONFIG, TOKENIZER)).requests(task, found[1])[0]
    parts = [{"type": "image"}, {"type": "text", "text": "what"}]
    messages = [
        {"role": "user", "content": parts}, {"role": "assistant", "content": "llama"},
        {"role": "user", "content": parts},
    ]  # fmt: skip
    control = TOKENIZER.special
    kept = [i for i in request.context if i != control["<|patch|>"]]
    added = {control[f"<|{n}|>"] for n in ("image_start", "image_end", "tile_x_separator",
                                          "tile_y_separator")}  # fmt: skip
    assert [i for i in kept if i not in added] == TOKENIZER.chat(messages)
    assert len(request.pictures) == 2


def test_what_the_data_hash_depends_on(folder):
    task = load_task(str(folder / "write.toml"))
    before = fingerprint(documents(task, TOKENIZER))
    assert before == fingerprint(documents(task, TOKENIZER))
    (folder / "a.ppm").write_bytes(picture(9, 8, 24))
    assert before != fingerprint(documents(task, TOKENIZER))


def test_mistakes(folder, monkeypatch):
    task = load_task(str(folder / "write.toml"))
    [_, wide, *_] = found = documents(task, TOKENIZER)
    blind = Asking(TOKENIZER, 192, False, Pictures(schema.ModelConfig(), TOKENIZER))
    with pytest.raises(UserError, match="write: record 1: this model reads no pictures"):
        blind.requests(task, wide)
    assert blind.requests(task, found[3])
    narrow = Asking(TOKENIZER, 12, False, Pictures(CONFIG, TOKENIZER))
    with pytest.raises(UserError, match="record 1: the prompt has more than 8 tokens"):
        narrow.requests(task, wide)
    for line, reason in [({"image": "b.ppm"}, "image: .*b.ppm: there is no such file"),
                         ({"image": 3}, "image: must have a path"),
                         ({"image": "data:x"}, "image: has no base64 data"),
                         ({"t": "<|image|>", "image": "a.ppm"}, "has <.image.> in an answer"),
                         ({"q": "<|image|>" * 2, "image": "a.ppm"}, "has 2 <.image.> and there")
                         ]:  # fmt: skip
        (folder / "d.jsonl").write_text(json.dumps({"q": "x", "t": 0} | line) + "\n")
        with pytest.raises(UserError, match="write: record 0.*" + reason):
            documents(task, TOKENIZER)
    (folder / "d.jsonl").write_text('{"q": "x", "t": 0, "image": "d.jsonl"}\n')
    [broken] = documents(task, TOKENIZER)
    with pytest.raises(UserError, match="write: record 0: .*cannot be read|not an image"):
        Asking(TOKENIZER, 99, False, Pictures(CONFIG, TOKENIZER)).requests(task, broken)
    c = schema.Config()
    asked = dataclasses.replace(c.eval, tasks="colours")
    with pytest.raises(UserError, match="colours: record 0: this model reads no pictures"):
        during.During(dataclasses.replace(c, eval=asked), TOKENIZER, None)
    # Each process has read some documents and gets the pictures of all, bytes and paths.
    seen = Pictures(CONFIG, TOKENIZER)
    ours = seen.add([picture(1, 8, 8)])
    other = Pictures(CONFIG, TOKENIZER)
    others = other.add([picture(2, 8, 8), str(folder / "a.ppm")])
    merge = processes.merge
    monkeypatch.setattr(processes, "merge", lambda told: merge(told) | other.told())
    seen.share()
    assert seen.tiles([*ours, *others]).shape[0] > 3


def test_made_pictures_show_what_is_asked_for():
    from puna.models.media.images import read_image

    tasks = [load_task(name) for name in ("colours", "squares")]
    for task in tasks:
        for document in documents(task, None)[:20]:
            [file] = document.pictures
            pixels = np.asarray(read_image(file))
            inks = np.unique(pixels[(pixels != 255).any(-1)], axis=0)
            assert len(inks) == 1
            if task.name == "squares":
                assert count(pixels) == int(document.target)
    hashes = {fingerprint(documents(task, None)) for task in tasks}
    assert hashes == {fingerprint(documents(task, None)) for task in tasks} and len(hashes) == 2


def count(pixels):
    """Upper left corners: painted, and neither above nor to the left."""
    painted = np.pad((pixels != 255).any(-1), 1)
    return int((painted[1:, 1:] & ~painted[:-1, 1:] & ~painted[1:, :-1]).sum())
