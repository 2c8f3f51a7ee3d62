"""What devices send each other in a compiled training step: nothing that is not meant.

A sharding that the compiler could not follow shows as one collective more in the loop over
layers, or as one of an array larger than a layer's largest weight or the activations of a device.
"""

import collections
import math
import re

import jax
import numpy as np
import pytest

from puna.configs import schema
from puna.models import sharding
from puna.models.transformer import Transformer, abstract_params
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
        step = make_train_step(c, Transformer(c.model), tx, np.ones(matrix.V), places)
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


def per_layer(found, tokens):
    """Collectives of the loops over layers by kind, of weights and of activations apart.

    tokens: leading dims [B, T] of activations of a device, of which sequence parallelism and the
    exchange make other ones of the same size.
    """
    loops = {computation for computation, _, _ in found if computation.startswith("wide.")}
    counts = collections.Counter()
    for computation, kind, shape in found:
        if computation in loops and math.prod(shape) >= math.prod(tokens):
            what = "activation" if shape[:2] in tokens_of(tokens) else "weight"
            counts[what, kind] += 1
    return dict(counts)


def tokens_of(tokens):
    B, T = tokens
    return {(B, T), (1, B * T)}


def largest(found):
    return max(math.prod(shape) for _, _, shape in found)


@pytest.mark.slow
def test_dense_fsdp_and_tensor(matrix):
    found = collectives(compiled_text(matrix, "dense", {"fsdp": 4, "tensor": 2}))
    print(per_layer(found, (8, 32)), largest(found))
