"""What trains and what does not: split by patterns, saved once, whole again when loaded."""

import json
import shutil

import jax
import numpy as np
import pytest

import puna
from puna.configs import schema
from puna.configs.errors import ConfigError
from puna.models.parallel import sharding
from puna.models.release.convert import convert
from puna.models.transformer import init_params
from puna.models.weights import run
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
    return {sharding.path_name(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}


class Partly:
    """A run in which the attention and the norms train, which nobody may change."""

    def __init__(self, config, folder, optimizer):
        config.train.update(
            trainable="attention/,norm", eval_every=0, local_every=2, local_dir=str(folder / "fast")
        )
        config.optimizer.name = optimizer
        config.mesh.update(data=2, fsdp=4)
        self.config, self.folder, self.local = config, folder / "run", folder / "fast"
        self.state = train(config, self.folder)


@pytest.fixture(scope="module")
def partly(make_config, tmp_path_factory):
    return Partly(make_config(), tmp_path_factory.mktemp("partly"), "muon")


def test_what_does_not_train_stays_and_is_saved_once(partly, tmp_path):
    check_what_does_not_train(partly, tmp_path)


@pytest.mark.slow
def test_what_does_not_train_stays_under_adamw(config, tmp_path):
    check_what_does_not_train(Partly(config, tmp_path, "adamw"), tmp_path)


def check_what_does_not_train(partly, tmp_path):
    c, whole = schema.from_dict(partly.config), partly.state
    random = init_params(c.model, jax.random.key(c.train.seed), sharding.make_mesh(c.mesh))
    start = leaves(split(random, c.train.trainable)[1])
    frozen = leaves(whole.frozen["base"])
    assert start.keys() == frozen.keys() and "embed/table_VD" in frozen
    assert all(np.array_equal(start[name], frozen[name]) for name in start)
    # A checkpoint holds what trains; the rest lies beside the checkpoints.
    (folder,) = (partly.folder / run.FROZEN).iterdir()
    sums = run.read_meta(run.find(partly.folder))["checksums"]
    assert set(sums["params"]) == set(leaves(whole.params))
    assert {f"base/{name}" for name in frozen} == set(sums["frozen"])
    assert run.frozen_name(sums["frozen"]) == folder.name
    model, params = puna.load(partly.folder)
    assert {**frozen, **leaves(whole.params)}.keys() == leaves(params).keys()
    for name, x in leaves(params).items():
        assert np.array_equal(x, {**frozen, **leaves(whole.params)}[name]), name
    convert(partly.folder, tmp_path / "release")
    for name, x in leaves(puna.load(tmp_path / "release")[1]).items():
        assert np.array_equal(x, leaves(params)[name]), name


def test_a_run_with_frozen_parameters_resumes_bit_for_bit(partly, tmp_path, cut):
    resumed = train(partly.config, cut(partly.folder, tmp_path / "cut"))
    for a, b in zip(jax.tree.leaves(partly.state), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_damaged_frozen_parameters_are_an_error(partly, tmp_path):
    shutil.copytree(partly.folder, tmp_path, dirs_exist_ok=True)
    (folder,) = (tmp_path / run.FROZEN).iterdir()
    meta = folder / "checkpoints" / "0" / "meta" / "metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"sha256": "0"}))
    with pytest.raises(run.Damaged, match="damaged checkpoint"):
        puna.load(tmp_path)
    with pytest.raises(run.Damaged, match="damaged checkpoint"):
        convert(tmp_path, tmp_path.with_name("release"))


def test_a_local_checkpoint_has_its_frozen_parameters_with_it(partly, monkeypatch):
    state = partly.state
    (local,) = partly.local.rglob("run/checkpoints/4")
    _, params = puna.load(local)
    assert leaves(params).keys() == leaves(join(state.params, state.frozen)).keys()
    for name, x in leaves(state.frozen["base"]).items():
        assert np.array_equal(leaves(params)[name], x)
    monkeypatch.chdir(local.parent)
    assert leaves(puna.load("4")[1]).keys() == leaves(params).keys()
