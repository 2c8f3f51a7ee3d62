"""Parameters in bfloat16: they move, learn as float32 does, on any mesh, and resume bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import puna
from puna.configs import schema
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, abstract_params
from puna.models.weights.load import load
from puna.train import metrics, objectives
from puna.train.init_from import initial_state
from puna.train.loop import train
from puna.train.master_weights import MasterWeights
from puna.train.optimizer import make_optimizer
from puna.train.state import abstract_state
from puna.train.step import make_train_step


def leaves(tree):
    return {sharding.path_name(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}


def bits(tree):
    return {name: (x.dtype, x.tobytes()) for name, x in leaves(tree).items()}


def master(state):
    assert isinstance(state.opt_state.inner, MasterWeights)
    return state.opt_state.inner.master


def check_rounded(state):
    """Parameters are the master weights rounded, and nothing of the optimizer is below float32."""
    found, exact = leaves(state.params), leaves(master(state))
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.dtype == (np.float32 if "router_bias" in name else jnp.bfloat16), name
        assert np.array_equal(value, exact[name].astype(value.dtype)), name
    dtypes = {x.dtype for x in leaves(state.opt_state).values()}
    assert dtypes <= {np.dtype(np.float32), np.dtype(np.int32)}


def losses(workdir):
    return np.array([m["loss"] for m in metrics.read(workdir / "metrics.jsonl")])


SPREAD = {"data": 2, "fsdp": 2, "tensor": 2}


# Each is two programs; the numbers of Adafactor on a mesh have a fast test below.
@pytest.mark.parametrize(
    ("name", "tied", "axes"),
    [
        ("adamw", True, {}),
        pytest.param("adamw", False, SPREAD, marks=pytest.mark.slow),
        pytest.param("adafactor", True, SPREAD, marks=pytest.mark.slow),
        pytest.param("muon", False, SPREAD, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_learns_as_float32_does_and_moves(config, tmp_path, name, tied, axes):
    """Within a hundredth of what is learned, and the same weights change.

    At this rate an update is far below the step between two bfloat16 of a weight's size.
    """
    config.model.tie_embeddings = tied
    config.optimizer.update(name=name, learning_rate=3e-4, warmup_steps=0, schedule="constant")
    config.train.update(steps=30, save_every=30, eval_every=0, microbatches=2)
    config.mesh.update(axes)
    exact = train(config, tmp_path / "float32")
    config.model.param_dtype = "bfloat16"
    start = leaves(setup(config)[0].params)
    state = train(config, tmp_path / "bfloat16")
    check_rounded(state)
    found, wanted = losses(tmp_path / "bfloat16"), losses(tmp_path / "float32")
    learned = wanted[0] - wanted[-1]
    assert learned > 0.2
    np.testing.assert_allclose(found, wanted, atol=0.015 * learned)
    end = leaves(state.params)
    # As many as of float32 parameters, rounded; rows of ids that never occur stay in both.
    moved, wanted = (
        sum(np.sum(start[path] != tree[path].astype(jnp.bfloat16)) for path in start)
        for tree in (end, leaves(exact.params))
    )
    assert moved > 0.98 * wanted and wanted > 0.5 * sum(x.size for x in start.values())


def setup(config, devices=8):
    """A state before its first step, and the step, on some of the devices."""
    c = schema.from_dict(config)
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:devices])
    tx = make_optimizer(c, abstract_params(c.model))
    places = abstract_state(c, tx, mesh)
    with jax.set_mesh(mesh):
        state = initial_state(c, tx, mesh)
        step = make_train_step(
            c, Transformer(c.model), tx, objectives.make(c, np.ones(264)), places
        )
    return state, places, mesh, step


EXPERTS = {"moe_interval": 2, "num_experts": 4, "expert_dim": 16, "bias_update_rate": 1e-4}
MESHES = [
    pytest.param("adamw", {}, {"data": 2, "fsdp": 2, "tensor": 2}, 3, marks=pytest.mark.slow),
    pytest.param(
        "muon", EXPERTS, {"fsdp": 2, "expert": 2, "context": 2}, 3, marks=pytest.mark.slow
    ),
    # Its steps are of one size, so differences do not stay small for long.
    ("adafactor", {"tie_embeddings": True}, {"pipeline": 2, "fsdp": 4}, 1),
]


@pytest.mark.parametrize(("name", "model", "axes", "steps"), MESHES)
def test_a_mesh_gives_the_numbers_of_one_device(config, name, model, axes, steps):
    """Master weights lie as their parameters do, and are the same however they lie."""
    config.model.update(param_dtype="bfloat16", **model)
    # Adam's usual epsilon makes a whole step of a gradient that is zero but for rounding.
    adam = {} if name == "adafactor" else {"eps": 1e-3}
    config.optimizer.update(name=name, learning_rate=1e-3, warmup_steps=0, **adam)
    rng = np.random.default_rng(0)
    batches = rng.integers(1, 256, (3, 8, 33)).astype(np.int32)
    found = []
    for devices, mesh_axes in ((1, {"data": 1}), (8, {"data": 1} | axes)):
        config.mesh.update(mesh_axes)
        state, places, mesh, step = setup(config, devices)
        start = leaves(master(state))
        for path, copy in jax.tree.leaves_with_path(master(state)):
            assert copy.sharding == at(places.params, path).sharding, path
            assert copy.sharding == at(state.params, path).sharding, path
        with jax.set_mesh(mesh):
            for tokens in batches[:steps]:
                ones = np.ones((8, 32), np.int32)
                batch = {
                    "tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:],
                    "positions_BT": ones * np.arange(32, dtype=np.int32), "segment_ids_BT": ones,
                    "weights_BT": ones.astype(np.float32),
                }  # fmt: skip
                batch = sharding.put_batch(mesh, batch, list(range(8)), 8)
                state, _ = step(state, batch)
        check_rounded(state)
        found.append({path: x - start[path] for path, x in leaves(master(state)).items()})
    one, eight = found
    for path in one:
        # Gradients may round to the next bfloat16, 2**-8 of them away; next to zero, where a rule
        # divides by their size, that can be another sign: in a few elements of a tensor.
        error = np.quantile(np.abs(eight[path] - one[path]), 0.99)
        assert error < 0.01 * np.abs(one[path]).max(), path


def at(tree, path):
    for part in path:
        tree = tree[part.key]
    return tree


@pytest.mark.parametrize("name", ["adafactor", "adamw", "muon"])
@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_with_frozen_parameters(config, tmp_path, cut, name):
    config.model.update(param_dtype="bfloat16", tie_embeddings=True)
    config.optimizer.name = name
    config.train.update(trainable="attention/,norm,embed", eval_every=0)
    config.mesh.update(data=2, fsdp=4)
    whole = train(config, tmp_path / "whole")
    check_rounded(whole)
    assert {x.dtype for x in leaves(whole.frozen).values()} == {np.dtype(jnp.bfloat16)}
    assert bits(train(config, cut(tmp_path / "whole", tmp_path / "cut"))) == bits(whole)
    _, params = load(tmp_path / "cut", None)
    assert bits(params).items() >= bits(whole.params).items()


def test_a_run_starts_from_weights_before_they_are_rounded(config, tmp_path):
    """A branch with the optimizer has the very master weights of its run."""
    config.train.update(eval_every=0)
    train(config, tmp_path / "float32")
    config.model.param_dtype = "bfloat16"
    config.train.init_from = str(tmp_path / "float32")
    _, params = puna.load(tmp_path / "float32")
    state = setup(config)[0]
    check_rounded(state)
    assert bits(master(state)) == bits(params)
    run = train(config, tmp_path / "bfloat16")
    config.train.update(init_from=str(tmp_path / "bfloat16"), with_optimizer=True)
    branch = setup(config)[0]
    assert bits(master(branch)) == bits(master(run)) and bits(branch.params) == bits(run.params)


def test_parts_of_a_batch_are_summed_in_float32(config):
    config.model.update(param_dtype="bfloat16", tie_embeddings=True)
    config.train.microbatches = 4
    config.mesh.update(data=1)
    c = schema.from_dict(config)
    _, places, mesh, step = setup(config, 1)
    with jax.set_mesh(mesh):
        traced = step.trace(places, objectives.make(c, np.ones(264)).abstract_batch(c, mesh))
    (scan,) = (
        e for e in traced.jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 4
    )
    shapes = {x.shape for x in jax.tree.leaves(places.params)}
    sums = [x.aval for x in scan.outvars if x.aval.shape in shapes]
    assert {x.dtype for x in sums} == {np.dtype(np.float32)}
    assert {x.shape for x in sums} == shapes


def test_memory_of_the_state(config):
    """As docs/meshes.md states it: 14 bytes a parameter with AdamW, split as the parameters are."""
    config.model.update(param_dtype="bfloat16", embed_dim=256, mlp_dim=512)
    config.mesh.update(data=1, fsdp=8)
    c = schema.from_dict(config)
    tx = make_optimizer(c, abstract_params(c.model))
    state = abstract_state(c, tx, sharding.make_mesh(c.mesh))
    size = sum(x.size for x in jax.tree.leaves(state.params))
    assert sharding.bytes_per_device(state) == pytest.approx(14 * size / 8, rel=0.02)
