"""What devices send each other in a compiled training step: nothing that is not meant.

A sharding that the compiler could not follow shows as one collective too many in a loop over
layers, or as one of an array larger than a layer's largest weight or the activations of a device.
Bounds, not counts: a compiler may save one, join several or name them anew.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

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
GATHER, EXCHANGE, SUMS = "all-gather", "all-to-all", ("all-reduce", "reduce-scatter")


def compiled(matrix, name, mesh_axes):
    """The compiled step's computations, and the shapes of the parameters' parts on a device."""
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
        text = step.lower(places, batch).compile().as_text()
    parts = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(places.params)}
    return computations(text), parts


class Sent(NamedTuple):
    """An array that devices exchange."""

    kind: str
    shape: tuple[int, ...]


def computations(text) -> dict[str, list[str]]:
    """The instructions of each computation of a compiled program, by name; the entry's is ENTRY."""
    found, lines = {}, []
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = found[match[1] and "ENTRY" or match[2]] = []
        elif line.startswith("  "):
            lines.append(line)
    return found


def group_size(line) -> int:
    """How many devices take part in a collective: it sends nothing if there is one in a group."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    # The axes of a mesh, and those that make a group: whole, or 'axis':(before)size of one.
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2  # collective-permute has pairs, and {} means all


def sent(lines) -> list[Sent]:
    """The arrays that some instructions send."""
    found = []
    for line in lines:
        match = re.search(rf"= (.+?) ({KINDS})(?:-start)?\(", line)
        if match and group_size(line) > 1:
            for shape in re.findall(r"\w\d+\[([\d,]*)\]", match[1]):
                found.append(Sent(match[2], tuple(map(int, filter(None, shape.split(","))))))
    return found


def reached(program, name) -> set[str]:
    """A computation and those that it calls."""
    found, left = set(), [name]
    while left:
        if (name := left.pop()) in found or name not in program:
            continue
        found.add(name)
        left += re.findall(r"%([\w.\-]+)", " ".join(
            match for line in program[name] for match in re.findall(
                r"(?:body|calls|to_apply|computations?)=(\{.*?\}|%[\w.\-]+)", line
            )
        ))  # fmt: skip
    return found


def loops(program):
    """Of each loop over layers, forward and backward: the arrays it sends, and those it carries."""
    found = []
    for line in program["ENTRY"]:
        if match := re.search(r"= (.*) while\(.*body=%([\w.\-]+)", line):
            lines = [x for name in reached(program, match[2]) for x in program[name]]
            if sends := sent(lines):
                shapes = re.findall(r"\w\d+\[([\d,]+)\]", match[1])
                found.append((sends, {tuple(map(int, shape.split(","))) for shape in shapes}))
    forward, backward = found
    return forward, backward


def of_weights(sends, rows, length):
    """Arrays of two dims and more that are not activations: weights, or gradients of them."""
    return [x for x in sends if len(x.shape) > 1 and not of_activation(x, rows, length)]


def of_activation(x, rows, length):
    return x.shape[:2] in ((rows, length), (1, rows * length))


def check_weights(program, parts, weights, layers, rows, length):
    """Each weight of a turn is gathered once forward and once backward, and its gradient is added
    up once, into the part in which it lies."""
    (forward, _), (backward, carried) = loops(program)
    gathered = Counter(x.shape for x in of_weights(forward, rows, length) if x.kind == GATHER)
    again = Counter(x.shape for x in of_weights(backward, rows, length) if x.kind == GATHER)
    assert 0 < gathered.total() <= weights
    # One gradient gathered, or one weight twice, would be one more of some shape.
    assert again <= gathered
    sums = [x for x in of_weights(backward, rows, length) if x.kind in SUMS]
    assert 0 < len(sums) <= weights
    # Where sums are not scattered at once, each device keeps its own part and nothing else.
    assert not carried & {(layers, *shape) for shape in gathered} - parts


def largest(program):
    every = [x for lines in program.values() for x in sent(lines)]
    return max(math.prod(x.shape) for x in every)


def count(sends, kinds, rows, length):
    return sum(x.kind in kinds and of_activation(x, rows, length) for x in sends)


def test_dense_fsdp_and_tensor(matrix):
    model, rows = matrix.DENSE, matrix.B // 4
    program, parts = compiled(matrix, "dense", {"fsdp": 4, "tensor": 2})
    weights = 7  # wq wk wv wo, gate up down
    check_weights(program, parts, weights, model.num_layers, rows, matrix.T)
    (forward, carried), (backward, _) = loops(program)
    # Sequence parallelism gathers before attention and before the MLP, and the cotangents of their
    # results; partial sums of wo and down forward, of q k v gate up backward. Between the layers
    # the activations lie in parts.
    assert 0 < count(forward, [GATHER], rows, matrix.T) <= 2
    assert (rows, matrix.T // 2, model.embed_dim) in carried
    assert count(forward, SUMS, rows, matrix.T) <= 2
    assert count(backward, [GATHER], rows, matrix.T) <= 2
    assert count(backward, SUMS, rows, matrix.T) <= 5
    assert {x.kind for x in forward + backward} <= {GATHER, *SUMS}
    activation = rows * matrix.T * model.embed_dim
    assert largest(program) <= max(activation, model.embed_dim * model.mlp_dim)


def test_experts_and_fsdp(matrix):
    model, rows = matrix.SCOUT, matrix.B // 8
    program, parts = compiled(matrix, "scout", {"fsdp": 4, "expert": 2})
    # wq wk wv wo, router, gate up down of these experts and the shared one; two layers a turn.
    check_weights(program, parts, 2 * 11, model.num_layers // 2, rows, matrix.T)
    (forward, _), (backward, _) = loops(program)
    # Tokens go out and come back, to each of two devices; in the backward pass so do cotangents.
    # No other activation leaves its device.
    assert 0 < count(forward, [EXCHANGE], rows, matrix.T)
    assert count(backward, [EXCHANGE], rows, matrix.T)
    assert not count(forward + backward, [GATHER, *SUMS], rows, matrix.T)
    shapes = {x.shape for x in forward + backward if x.kind == EXCHANGE}
    assert shapes <= {(1, rows * matrix.T, model.embed_dim), (1, rows * matrix.T, 1)}
    experts_here = model.num_experts // 2 * model.embed_dim * model.expert_dim
    assert largest(program) <= experts_here
