"""What devices send each other in a compiled training step: nothing that is not meant.

A sharding that the compiler could not follow shows as one collective more in the loop over
layers, or as one of an array larger than a layer's largest weight or the activations of a device.
"""

import collections
import math
import re

import jax
import numpy as np

from puna.configs import schema
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, abstract_params
from puna.train import objectives
from puna.train.optimizer import make_optimizer
from puna.train.state import abstract_state
from puna.train.step import make_train_step

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def compiled_text(matrix, name, mesh_axes):
    c = schema.Config(
        model=matrix.MODELS[name], data=schema.DataConfig(seq_len=matrix.T),
        train=schema.TrainConfig(batch_size=matrix.B),
        mesh=schema.MeshConfig(**({"data": 1} | mesh_axes)),
    )  # fmt: skip
    mesh = sharding.make_mesh(c.mesh)
    tx = make_optimizer(c, abstract_params(c.model))
    places = abstract_state(c, tx, mesh)
    split = sharding.batch_sharding(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), matrix.batch(c.model)
    )
    with jax.set_mesh(mesh):
        step = make_train_step(
            c, Transformer(c.model), tx, objectives.make(c, np.ones(matrix.V)), places
        )
        return step.lower(places, batch).compile().as_text()


def collectives(text):
    """(computation, kind, shape) of every array that is sent; groups of one device send nothing."""
    found, computation = [], ""
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = match[1]
        match = re.search(rf"= (.+?) ({KINDS})(?:-start)?\(", line)
        if match and "replica_groups={{0},{1}" not in line:
            for shape in re.findall(r"\w\d+\[([\d,]*)\]", match[1]):
                found.append(
                    (computation, match[2], tuple(map(int, filter(None, shape.split(",")))))
                )
    return found


def per_layer(found, rows: int, length: int):
    """Arrays sent in the loops over layers, forward and backward together, of some size."""
    counts = collections.Counter()
    for computation, kind, shape in found:
        # XLA calls a loop over layers so once it has moved what it can out of it.
        if computation.startswith("wide.") and len(shape) > 1:
            activation = shape[:2] in ((rows, length), (1, rows * length))
            counts["activation" if activation else "weight", kind] += 1
    return dict(counts)


def largest(found):
    return max(math.prod(shape) for _, _, shape in found)


def test_dense_fsdp_and_tensor(matrix):
    model, rows = matrix.DENSE, matrix.B // 4
    found = collectives(compiled_text(matrix, "dense", {"fsdp": 4, "tensor": 2}))
    weights = 7  # wq wk wv wo, gate up down
    assert per_layer(found, rows, matrix.T) == {
        # Gathered from the fsdp group forward and again backward; gradients are added up once.
        ("weight", "all-gather"): 2 * weights,
        ("weight", "all-reduce"): weights,
        # Sequence parallelism gathers before attention and before the MLP, and the cotangents of
        # their results; partial sums of wo and down forward, of q k v gate up backward.
        ("activation", "all-gather"): 2 + 2,
        ("activation", "all-reduce"): 2 + 5,
    }
    activation = rows * matrix.T * model.embed_dim
    assert largest(found) <= max(activation, model.embed_dim * model.mlp_dim)


def test_experts_and_fsdp(matrix):
    model, rows = matrix.SCOUT, matrix.B // 8
    found = collectives(compiled_text(matrix, "scout", {"fsdp": 4, "expert": 2}))
    # wq wk wv wo, router, gate up down of these experts and the shared one; two layers a turn.
    weights = 2 * 11
    counts = per_layer(found, rows, matrix.T)
    # Tokens go out and come back as cotangents, to each of two devices.
    assert counts.pop(("activation", "all-to-all")) == 2 * 2 * 2
    # The experts' gradients are added up into the parts in which they lie.
    experts = 2 * 3
    assert counts == {
        ("weight", "all-gather"): 2 * weights,
        ("weight", "all-reduce"): weights - experts,
        ("weight", "reduce-scatter"): experts,
    }
    sent = {shape for _, kind, shape in found if kind == "all-to-all"}
    assert sent == {(1, rows * matrix.T, model.embed_dim), (1, rows * matrix.T, 1)}
    experts_here = model.num_experts // 2 * model.embed_dim * model.expert_dim
    assert largest(found) <= experts_here
