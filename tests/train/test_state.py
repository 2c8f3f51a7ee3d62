"""What trains and what does not: split by patterns, saved once, whole again when loaded."""

import json
import shutil

import jax
import numpy as np
import pytest

import puna
from puna.configs.errors import ConfigError, UserError
from puna.models.release.convert import convert
from puna.models.weights import run
from puna.train import checkpoint
from puna.train.loop import train
from puna.train.state import join, split

TREE = {"embed": {"table_VD": 1}, "blocks": {"layer_0": {"mlp": {"w": 2}, "attention": {"w": 3}}}}


@pytest.mark.parametrize(
    ("trainable", "count"),
    [("", 3), ("embed", 1), ("mlp/, attention", 2), ("^blocks", 2), ("w$", 2), ("layer_0/mlp", 1)],
)
def test_split_and_join(trainable, count):
    trains, rest = split(TREE, trainable)
    assert len(jax.tree.leaves(trains)) == count
    assert len(jax.tree.leaves(rest)) == 3 - count
    assert join(trains, {"base": rest}) == TREE
    assert join(TREE, {}) == TREE


@pytest.mark.parametrize(
    ("trainable", "message"),
    [("(", "no regular expression"), ("embed,mlq", "no parameter.s path has mlq; a path is like")],
)
def test_patterns_that_match_nothing_are_refused(trainable, message):
    with pytest.raises(ConfigError, match=message):
        split(TREE, trainable)


def leaves(tree):
    return {run.sharding.path_name(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_does_not_train_stays_and_is_saved_once(config, tmp_path, optimizer):
    config.train.update(trainable="attention/,norm", eval_every=0)
    config.optimizer.name = optimizer
    config.mesh.update(data=2, fsdp=4)
    start = leaves(train(config.copy_and_resolve_references(), tmp_path / "a").frozen["base"])
    whole = train(config, tmp_path / "b")
    frozen = leaves(whole.frozen["base"])
    assert start.keys() == frozen.keys() and "embed/table_VD" in frozen
    assert all(np.array_equal(start[name], frozen[name]) for name in start)
    # A checkpoint holds what trains; the rest lies beside the checkpoints.
    (folder,) = (tmp_path / "b" / run.FROZEN).iterdir()
    sums = run.read_meta(run.find(tmp_path / "b"))["checksums"]
    assert set(sums["params"]) == set(leaves(whole.params))
    assert {f"base/{name}" for name in frozen} == set(sums["frozen"])
    assert run.frozen_name(sums["frozen"]) == folder.name
    model, params = puna.load(tmp_path / "b")
    assert {**frozen, **leaves(whole.params)}.keys() == leaves(params).keys()
    for name, x in leaves(params).items():
        assert np.array_equal(x, {**frozen, **leaves(whole.params)}[name]), name
    convert(tmp_path / "b", tmp_path / "release")
    for name, x in leaves(puna.load(tmp_path / "release")[1]).items():
        assert np.array_equal(x, leaves(params)[name]), name


def test_a_run_with_frozen_parameters_resumes_bit_for_bit(config, tmp_path):
    config.train.update(trainable="mlp", eval_every=0)
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    resumed = train(config, tmp_path / "cut")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_damaged_frozen_parameters_are_an_error(config, tmp_path):
    config.train.update(trainable="mlp", eval_every=0, steps=3)
    train(config, tmp_path)
    (folder,) = (tmp_path / run.FROZEN).iterdir()
    meta = folder / "checkpoints" / "0" / "meta" / "metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"sha256": "0"}))
    with pytest.raises(run.Damaged, match="damaged checkpoint"):
        puna.load(tmp_path)
    with pytest.raises(run.Damaged, match="damaged checkpoint"):
        convert(tmp_path, tmp_path.with_name("release"))


def test_a_local_checkpoint_has_its_frozen_parameters_with_it(config, tmp_path, monkeypatch):
    config.train.update(
        trainable="mlp", eval_every=0, steps=4, save_every=4, local_every=2,
        local_dir=str(tmp_path / "fast"),
    )  # fmt: skip
    state = train(config, tmp_path / "run")
    local = next((tmp_path / "fast").rglob("checkpoints/2"))
    _, params = puna.load(local)
    assert leaves(params).keys() == leaves(join(state.params, state.frozen)).keys()
    for name, x in leaves(state.frozen["base"]).items():
        assert np.array_equal(leaves(params)[name], x)
    monkeypatch.chdir(local.parent)
    assert leaves(puna.load("2")[1]).keys() == leaves(params).keys()


def test_a_run_of_before_a_key_resumes_under_its_default(config, tmp_path, monkeypatch):
    config.train.update(eval_every=0, steps=3)
    to_dict = checkpoint.to_dict

    def older(c):
        values = to_dict(c)
        del values["train"]["trainable"], values["data"]["images"]
        return values

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "to_dict", older)
        train(config, tmp_path)
    config.train.update(steps=6)
    assert int(train(config, tmp_path).step) == 6
    config.train.update(trainable="mlp", steps=9)
    with pytest.raises(UserError, match="train.trainable='mlp' differs from ''"):
        train(config, tmp_path)
