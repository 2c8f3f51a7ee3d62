"""Training on pictures and clips: read, packed, learnt, resumed, on a mesh."""

import base64
import importlib.util
import json
import pathlib
import wave

import jax
import numpy as np
import pytest

import puna
from puna.configs import schema
from puna.configs.errors import ConfigError, UserError
from puna.models.parallel import sharding
from puna.models.text.tokenizer import train_bpe
from puna.train import metrics, objectives
from puna.train.data import make_train_loader
from puna.train.data.packing import media_room
from puna.train.loop import train

Image = pytest.importorskip("PIL.Image")
COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def picture(path, colour, seed, size=(28, 28)):
    noise = np.random.default_rng(seed).integers(-20, 20, (*size, 3))
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)


def write_set(folder, count, shuffled=False):
    """Captioned pictures whose caption only the picture tells; shuffled: another's caption."""
    folder.mkdir(parents=True)
    names = [list(COLOURS)[i % 4] for i in range(count)]
    captions = np.random.default_rng(1).permutation(names).tolist() if shuffled else names
    records = []
    for i, (name, caption) in enumerate(zip(names, captions, strict=True)):
        picture(folder / f"{i}.png", COLOURS[name], i)
        records.append({"text": f"<|image|>{caption}", "image": f"{i}.png"})
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def config():
    config = puna.get_config("llama4:scout-tiny")
    config.model.update(num_layers=2, nope_interval=2, embed_dim=32, mlp_dim=64, expert_dim=32)
    config.model.vision.update(num_layers=1, max_tiles=1)
    config.data.update(
        images=2, seq_len=32, tokenizer="train", tokenizer_vocab=300, validation="",
    )  # fmt: skip
    config.model.vision.token_id = 299
    config.optimizer.update(learning_rate=3e-3, warmup_steps=2)
    config.train.update(steps=4, batch_size=8, log_every=1, save_every=2, eval_every=0)
    return config


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe([" ".join(COLOURS)] * 3, 300)


def first_batch(config, tokenizer):
    """What the first step would train on; nothing is compiled."""
    c = schema.from_dict(config)
    objective = objectives.make(c, tokenizer.token_bytes)
    loader = make_train_loader(c.data, objective.transform(c, tokenizer), c.train.batch_size,
                               media=media_room(c))  # fmt: skip
    batch = next(loader)
    loader.close()
    wanted = objective.abstract_batch(c, sharding.make_mesh(c.mesh))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in wanted.items()
    }
    return batch


def losses(workdir):
    return [m["loss"] for m in metrics.read(workdir / "metrics.jsonl")]


@pytest.mark.slow
def test_training_on_pictures_resumes_bit_for_bit(config, tmp_path, cut):
    config.data.train = str(write_set(tmp_path / "set", 16))
    whole = train(config, tmp_path / "whole")
    resumed = train(config, cut(tmp_path / "whole", tmp_path / "cut"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_training_on_pictures_is_the_same_on_a_mesh(config, tmp_path):
    config.data.train = str(write_set(tmp_path / "set", 16))
    train(config, tmp_path / "whole")
    config.mesh.update(data=1, fsdp=2, expert=2, tensor=2)
    config.data.workers = 1
    train(config, tmp_path / "mesh")
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "whole"), rtol=2e-5)


@pytest.mark.slow
def test_the_picture_is_what_is_learnt(config, tmp_path):
    """The loss on captions with the right picture is clearly below that with shuffled ones."""
    config.train.update(steps=60, save_every=1000)
    config.model.moe_interval, config.model.num_experts = 0, 0
    config.data.train = str(write_set(tmp_path / "set", 16))
    config.data.validation = str(write_set(tmp_path / "held_out", 32))
    train(config, tmp_path / "run")
    right = puna.evaluate(config, tmp_path / "run")["loss"]
    config.data.validation = str(write_set(tmp_path / "shuffled", 32, shuffled=True))
    wrong = puna.evaluate(config, tmp_path / "run")["loss"]
    assert right < 0.8 * wrong, (right, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vision", "sound"])
def test_the_demos_look_and_listen(tmp_path, kind):
    """`benchmarks/media_demo.py`, shortened."""
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "media_demo.py"
    spec = importlib.util.spec_from_file_location("media_demo", path)
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    demo.write_sets(tmp_path, kind, 640, 64)
    config = puna.get_config(f"llama4:{kind}-demo")
    config.data.train = str(tmp_path / "train.jsonl")
    config.train.update(steps=40, save_every=40)
    train(config, tmp_path / "run")
    found = {}
    for name in ("right", "shuffled"):
        config.data.validation = str(tmp_path / f"{name}.jsonl")
        found[name] = puna.evaluate(config, tmp_path / "run")["loss"]
    assert found["right"] < 0.5 * found["shuffled"], found


@pytest.fixture
def cross(config):
    """The same of a model whose layers attend to pictures."""
    made = puna.get_config("llama3:3.2-vision-tiny")
    made.model.update(embed_dim=32, mlp_dim=64)
    made.model.vision.update(num_layers=1, max_tiles=2)
    made.data.update(config.data)
    made.data.images = 4
    made.optimizer.update(config.optimizer)
    made.train.update(config.train)
    return made


def test_pictures_whose_tiles_are_read_together(cross, tokenizer, tmp_path):
    folder = tmp_path / "set"
    write_set(folder, 3)
    picture(folder / "wide.png", COLOURS["red"], 0, (28, 56))
    records = [
        {"text": "<|image|>red", "image": "0.png"},
        {"text": "a <|image|>green<|image|>b", "images": ["1.png", "wide.png"]},
        {"text": "plain"},
    ]
    path = folder / "media.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    cross.data.update(train=str(path), bad_records="refuse", shuffle=False, seq_len=16)
    cross.train.batch_size = 3
    batch = first_batch(cross, tokenizer)
    assert batch["tiles_BMIYXC"].shape == (3, 2, 2, 28, 28, 3)
    # Each picture that is there has a token in its row, which may be the last, a target alone.
    ids = np.concatenate([batch["tokens_BT"], batch["targets_BT"][:, -1:]], axis=1)
    count = (ids == cross.model.vision.token_id).sum(1)
    grids, tiles = batch["grids_BM"], batch["tiles_BMIYXC"]
    assert count.any() and (count == (grids > 0).sum(1)).all()
    filled = tiles.any((3, 4, 5)).sum(2)  # the second grid is of one row and two columns
    assert (filled == grids).all() and set(grids.ravel().tolist()) >= {1, 2}
    assert not batch["weights_BT"][batch["targets_BT"] == cross.model.vision.token_id].any()
    cross.data.images = 3
    with pytest.raises(ConfigError, match="data.images=3 must be a multiple of model.vision.max"):
        train(cross, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["", "cross_attention,mlp_gate,projector"])
def test_layers_that_attend_to_pictures_learn_from_them(cross, tmp_path, trainable):
    """With the tower or without; gates that begin closed open."""
    cross.train.update(steps=100, save_every=1000, trainable=trainable)
    cross.data.train = str(write_set(tmp_path / "set", 16))
    cross.data.validation = str(write_set(tmp_path / "held_out", 32))
    train(cross, tmp_path / "run")
    right = puna.evaluate(cross, tmp_path / "run")["loss"]
    cross.data.validation = str(write_set(tmp_path / "shuffled", 32, shuffled=True))
    wrong = puna.evaluate(cross, tmp_path / "run")["loss"]
    assert right < 0.9 * wrong, (right, wrong)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a", "image": "missing.png"}, "no such file"),
        ({"text": "a", "image": "broken.png"}, "not an image"),
        ({"text": "a", "image": 3}, "must have a path, bytes or base64"),
        ({"text": "a", "image": "data:image/png;base64,?"}, "no base64 data"),
        ({"text": "<|image|><|image|>", "images": ["0.png"]}, "has 2 <.image.> and 1 image"),
        ({"text": "a", "audio": "clip.wav"}, "the model reads none"),
        ({"image": "0.png"}, "has no key 'text'"),
    ],
)
def test_what_cannot_be_read_is_a_bad_record(config, tokenizer, tmp_path, record, reason):
    write_set(tmp_path / "set", 1)
    (tmp_path / "set" / "broken.png").write_text("no picture")
    (tmp_path / "set" / "bad.jsonl").write_text(json.dumps(record) + "\n")
    config.data.update(train=str(tmp_path / "set" / "bad.jsonl"), bad_records="refuse")
    with pytest.raises(UserError, match=reason) as error:
        first_batch(config, tokenizer)
    assert "bad.jsonl line 1" in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_an_encoder_has_no_room_for_pictures(config, tmp_path):
    config.model.vision.num_layers = 0
    with pytest.raises(ConfigError, match="data.images=2 must be 0"):
        train(config, tmp_path / "run")


def test_pictures_as_bytes_and_clips_as_files(config, tokenizer, tmp_path):
    folder = tmp_path / "set"
    write_set(folder, 4)
    with wave.open(str(folder / "clip.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        tone = np.sin(np.arange(3200) / 5) * 2**14
        file.writeframes(tone.astype("<i2").tobytes())
    data = base64.b64encode((folder / "0.png").read_bytes()).decode()
    records = [
        {"text": "red", "image": f"data:image/png;base64,{data}"},
        {"text": "tone <|audio|> end", "audio": "clip.wav"},
        {"text": "both", "images": ["0.png", {"path": "1.png"}], "audio": ["clip.wav"]},
        {"text": "plain"},
    ]
    path = folder / "media.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    config.model.audio.update(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, num_mels=8,
                              max_tokens=8, token_id=298)  # fmt: skip
    config.data.update(
        train=str(path), clips=2, seq_len=64, bad_records="refuse", shuffle=False
    )  # fmt: skip
    config.train.batch_size = 8
    batch = first_batch(config, tokenizer)
    # Rows 0 to 3 begin with the four records.
    assert (batch["num_tiles_B"][:4] > 0).tolist()[0::2] == [True, True]
    assert batch["num_frames_BI"][1, 0] == batch["num_frames_BI"][2, 0] == 20
    tiles = batch["tiles_BIYXC"]
    np.testing.assert_array_equal(
        tiles[0, 0], tiles[2, 0]
    )  # the same picture, as bytes and as file
    pictures = batch["tokens_BT"] == config.model.vision.token_id
    assert not batch["weights_BT"][batch["targets_BT"] == config.model.vision.token_id].any()
    each = (28 // 7 // 2) ** 2
    assert (pictures.sum(1) == each * batch["num_tiles_B"]).all()
