"""Checkpoints: no damage loads silently, the one before a damaged one is used, which are kept."""

import json
import pathlib
import random
import re
import shutil

import jax
import numpy as np
import pytest

import puna
from puna.configs import schema
from puna.configs.errors import UserError
from puna.models.parallel import sharding
from puna.models.transformer import abstract_params
from puna.models.weights import run
from puna.models.weights.checksum import checksums
from puna.train import checkpoint
from puna.train.checkpoint import Checkpoints
from puna.train.optimizer import make_optimizer
from puna.train.state import abstract_state, init_state

POSITION = {"epoch": 1, "record": 7}
TOKENIZER = {"tokenizer.json": b"{}"}


class Run:
    """A run without its loop: a state, and where it is saved."""

    def __init__(self, config, workdir, fsdp=4):
        config.mesh.update(data=8 // fsdp, fsdp=fsdp)
        self.config, self.workdir = schema.from_dict(config), workdir
        self.mesh = sharding.make_mesh(self.config.mesh)
        self.tx = make_optimizer(self.config, abstract_params(self.config.model))
        self.abstract = abstract_state(self.config, self.tx, self.mesh)

    def save(self, *steps):
        state = jax.tree.map(unlike_zero, init_state(self.config, self.tx, self.mesh))
        with Checkpoints(self.workdir, self.config, TOKENIZER) as checkpoints:
            checkpoints.restore(self.abstract)
            for step in steps:
                state = state.replace(step=state.step * 0 + step)
                if checkpoints.due(step):
                    checkpoints.save(state, step, POSITION)
        return state

    def restore(self):
        with Checkpoints(self.workdir, self.config, TOKENIZER) as checkpoints:
            return checkpoints.restore(self.abstract)

    def folder(self, step):
        return self.workdir / "checkpoints" / str(step)


def unlike_zero(x):
    """Moments as after some steps: zeros are stored as nothing at all."""
    value = np.asarray(x)
    value = value + np.sin(np.arange(x.size)).reshape(x.shape).astype(x.dtype)
    return jax.device_put(value, x.sharding)


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def largest(folder):
    return max(files(folder), key=lambda p: p.stat().st_size)


def spoil(file: pathlib.Path):
    """Change a byte here and there: some of the largest file is of no use to anyone."""
    data = bytearray(file.read_bytes())
    data[::997] = bytes(x ^ 0x10 for x in data[::997])
    file.write_bytes(data)


def steps_in(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_checksums_know_every_bit_and_place_but_no_mesh(config):
    values = {
        "a": np.arange(64, dtype=np.float32).reshape(8, 8),
        "b": np.arange(16).astype(jax.numpy.bfloat16),
        "c": np.array([True, False] * 4),
        "d": np.int32(5),
    }
    before = checksums(values)
    assert before["a"].startswith("float32[8, 8] ") and before["d"].startswith("int32[] ")
    mesh = sharding.make_mesh(schema.MeshConfig(data=2, fsdp=4))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    for where in (split, sharding.replicated(mesh)):
        placed = {k: jax.device_put(v, where) for k, v in values.items() if k != "d"}
        assert checksums(placed).items() <= before.items()

    def changed(name, change):
        other = values | {name: values[name].copy()}
        change(other[name])
        after = checksums(other)
        assert {k for k in before if before[k] != after[k]} == {name}

    for element in range(64):
        for bit in (0, 13, 31):
            changed("a", lambda x, e=element, b=bit: x.view(np.uint32).reshape(-1)
                    .__setitem__(e, x.view(np.uint32).flat[e] ^ np.uint32(1 << b)))  # fmt: skip
    # Linear sums miss these: two signs, and two rows that have changed places.
    changed("a", lambda x: np.negative(x[3:5, 1:3], out=x[3:5, 1:3]))
    changed("a", lambda x: x.__setitem__([2, 6], x[[6, 2]]))
    changed("b", lambda x: x.__setitem__(slice(4), 0))
    changed("c", lambda x: x.__setitem__(3, True))


def damage(rng, folder):
    """Flip some bits of a byte, or cut a file off; returns how to mend it, and what was done."""
    found = files(folder)
    # Every file, but the larger ones more often: most files are small, and of Orbax's own.
    (file,) = rng.choices(found, [1000 + p.stat().st_size for p in found])
    before = file.read_bytes()
    place, bits = rng.randrange(len(before)), rng.randrange(1, 256)
    if rng.random() < 0.25:
        file.write_bytes(before[:place])
        return file, before, f"{file} cut at {place} of {len(before)}"
    file.write_bytes(before[:place] + bytes([before[place] ^ bits]) + before[place + 1 :])
    return file, before, f"{file} ^ {bits:#x} at {place} of {len(before)}"


@pytest.mark.parametrize("times", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_no_damage_loads_silently(config, tmp_path, times):
    """Whatever is wrong in whichever file: an error of one line, or the very same state."""
    here = Run(config, tmp_path)
    state = here.save(3)
    _, params = puna.load(tmp_path)
    rng, found = random.Random(times), {"detected": 0, "harmless": 0}
    for _ in range(times):
        file, before, what = damage(rng, here.folder(3))
        try:
            restored, position = here.restore()
            assert same(restored, state) and position == POSITION, what
            found["harmless"] += 1
        except UserError as error:
            assert "damaged checkpoint" in str(error) and "\n" not in str(error), what
            found["detected"] += 1
        try:
            model, loaded = puna.load(tmp_path)
            assert same(loaded, params) and model.config.embed_dim == 16, what
        except UserError as error:
            assert "\n" not in str(error), what
        file.write_bytes(before)
    assert same(here.restore()[0], state)
    print(found)
    assert found["detected"] > times // 4


def test_a_damaged_checkpoint_is_set_aside(config, tmp_path, capsys):
    here = Run(config, tmp_path, fsdp=2)
    here.save(3, 6)
    spoil(largest(here.folder(6) / "params"))
    state, position = Run(config, tmp_path, fsdp=8).restore()
    assert state.step == 3 and position == POSITION
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "6: damaged checkpoint" in err and "6.damaged" in err
    assert steps_in(tmp_path) == ["3", "6.damaged"]
    # The run goes on and saves that step again, which can be damaged again.
    here.save(6)
    (here.folder(6) / "meta" / "metadata").write_text("{}")
    assert here.restore()[0].step == 3
    assert steps_in(tmp_path) == ["3", "6.damaged", "6.damaged1"]


def test_where_all_are_damaged_nothing_is_renamed(config, tmp_path):
    here = Run(config, tmp_path)
    here.save(3, 6)
    for step in (3, 6):
        shutil.rmtree(here.folder(step) / "optimizer" / "d")
        shutil.rmtree(here.folder(step) / "optimizer" / "ocdbt.process_0")
    with pytest.raises(UserError, match=r"6: damaged checkpoint: cannot restore optimizer"):
        here.restore()
    assert steps_in(tmp_path) == ["3", "6"]


def test_a_run_of_an_older_version(config, tmp_path, capsys):
    here = Run(config, tmp_path)
    state = here.save(3)
    file = here.folder(3) / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["sha256"], meta["checksums"], meta["provenance"]
    file.write_text(json.dumps(meta))
    assert same(here.restore()[0], state)
    assert "no checksums, as older versions" in capsys.readouterr().err
    meta["checksuns"] = {}
    file.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="meta is not what was saved"):
        here.restore()


def test_which_are_kept(config, tmp_path):
    config.train.update(steps=9, save_every=1, keep=2, keep_every=3)
    Run(config, tmp_path).save(*range(1, 9))
    assert steps_in(tmp_path) == ["3", "6", "7", "8"]


def test_the_best_are_kept(config, tmp_path):
    """By losses that are known once a step is saved; one that is no number is nobody's best."""
    config.data.validation = config.data.train
    config.train.update(steps=20, save_every=1, eval_every=1, keep=2, keep_best=2)
    here = Run(config, tmp_path)
    state = here.save()
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: float("nan"), 5: 2.0, 6: 6.0, 7: 6.0, 8: 6.0}
    with Checkpoints(tmp_path, here.config, TOKENIZER) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(state.replace(step=state.step * 0 + step), step, POSITION)
            checkpoints.losses[step] = loss
        checkpoints.wait()
        assert checkpoints.best() == 5
    assert steps_in(tmp_path) == ["2", "5", "7", "8"]
    shutil.rmtree(here.folder(5))
    with Checkpoints(tmp_path, here.config, TOKENIZER) as checkpoints:
        assert checkpoints.best() is None
        checkpoints.losses |= losses
        assert checkpoints.best() == 2


def test_local_checkpoints(config, tmp_path, capsys):
    """Between two of the workdir others are kept elsewhere, and the newest whole one counts."""
    local, workdir = tmp_path / "local", tmp_path / "run"
    config.train.update(steps=20, save_every=4, local_dir=str(local), local_every=1)
    here = Run(config, workdir)
    workdir.mkdir()
    (workdir / "config.json").write_text("{}")
    here.save(*range(1, 8))
    (folder,) = local.rglob("checkpoints")
    assert steps_in(workdir) == ["4"] and steps_in(folder.parent) == ["7"]
    assert here.restore()[0].step == 7
    spoil(largest(folder / "7" / "params"))
    assert here.restore()[0].step == 4
    here.save(5)
    assert here.restore()[0].step == 5
    # A new run of the same name does not go on from the checkpoints of the old one.
    shutil.rmtree(workdir)
    capsys.readouterr()
    assert here.restore() is None
    assert "checkpoints of an earlier" in capsys.readouterr().err
    assert [p.name for p in folder.parent.glob("checkpoints.old/5")] == ["5"]


def test_a_run_of_before_a_key_resumes_under_its_default(config, tmp_path, monkeypatch):
    to_dict = checkpoint.to_dict

    def older(c):
        values = to_dict(c)
        del values["train"]["trainable"], values["data"]["images"]
        return values

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "to_dict", older)
        Run(config, tmp_path).save(3)
    assert Run(config, tmp_path).restore()[0].step == 3
    config.train.trainable = "mlp"
    with pytest.raises(UserError, match="train.trainable='mlp' differs from ''"):
        Run(config, tmp_path).restore()


SPELLINGS = {
    "./a.jsonl,2*./b*.jsonl": ("./tokenizer", "./run@2"),
    "{here}/a.jsonl, 2.0*{here}/b*.jsonl": ("{here}/tokenizer", "{here}/run/checkpoints/2"),
    "1*~/a.jsonl,2*~/b*.jsonl": ("~/tokenizer", "~/run@2"),
    "link/a.jsonl,2*link/b*.jsonl": ("link/../here/tokenizer", "link/run@2"),
}


def test_a_path_may_be_spelt_otherwise_when_a_run_resumes(config, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "here" / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)

    def spelt(train, tokenizer, init_from):
        texts = [text.format(here=folder) for text in (train, tokenizer, init_from)]
        config.data.update(train=texts[0], tokenizer=texts[1])
        config.train.init_from = texts[2]
        return Run(config, tmp_path / "saved")

    first = ("a.jsonl,2*b*.jsonl", "tokenizer", "run@2")
    spelt(*first).save(3)
    for train, rest in SPELLINGS.items():
        assert spelt(train, *rest).restore()[0].step == 3
    others = ("a.jsonl,2*c*.jsonl", "bytes", "run@3")
    keys = ("data.train", "data.tokenizer", "train.init_from")
    for i, key in enumerate(keys):
        with pytest.raises(UserError, match=f"{key}='{re.escape(others[i])}' differs from"):
            spelt(*first[:i], others[i], *first[i + 1 :]).restore()


@pytest.mark.parametrize(
    "keys,message",
    [
        ({"keep_every": 5}, "train.keep_every=5 must be a multiple of train.save_every=3"),
        ({"keep_best": 1}, "train.keep_best=1 must be 0 where data.validation is empty"),
        ({"keep_best": 1, "eval_every": 4}, "train.eval_every=4 must be a multiple of .*every=3"),
        ({"keep_best": 1, "eval_every": 0}, "train.eval_every=0 must be a multiple of .*every=3"),
        ({"local_dir": "/x"}, "train.local_every=50 must be below train.save_every=3"),
    ],
)
def test_keys_that_contradict_each_other(config, keys, message):
    config.data.validation = config.data.train if "eval_every" in keys else ""
    config.train.update(keys)
    with pytest.raises(UserError, match=message):
        schema.from_dict(config)
    assert run.steps("/x") == []
