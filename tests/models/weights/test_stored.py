"""Reading the arrays of a checkpoint: the same bits on any mesh, several pieces at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from puna.configs import schema
from puna.models.parallel import sharding
from puna.models.weights import stored


@pytest.fixture(scope="module")
def item(tmp_path_factory):
    """Arrays of several dtypes and shapes, and the folder that Orbax has saved them in."""
    rng = np.random.default_rng(0)
    tree = {
        "a": {"w": rng.normal(size=(16, 24, 8)).astype(np.float32)},
        "b": rng.normal(size=(32, 8)).astype(jnp.bfloat16),
        "step": np.int32(7),
    }
    folder = tmp_path_factory.mktemp("item") / "params"
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder, jax.tree.map(jnp.asarray, tree))
    return folder, tree


def abstract_of(tree, axes, specs):
    mesh = sharding.make_mesh(schema.MeshConfig(data=-1, **axes))
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        tree,
        specs,
    )


SPECS = {
    "a": {"w": PartitionSpec("tensor", "fsdp")}, "b": PartitionSpec("fsdp"),
    "step": PartitionSpec(),
}  # fmt: skip


@pytest.mark.parametrize("axes", [{}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2}])
def test_every_mesh_reads_the_same_bits_in_bounded_pieces(item, monkeypatch, axes):
    folder, tree = item
    monkeypatch.setattr(stored, "_PIECE_BYTES", 256)
    monkeypatch.setattr(stored, "_LEAST_BYTES", 1000)
    monkeypatch.setattr(stored, "_MOST_BYTES", 1000)
    under_way, most = [], [0, 0]

    class Counted:
        def __init__(self, future, size):
            self.future, self.size = future, size
            under_way.append(size)
            most[0], most[1] = max(most[0], len(under_way)), max(most[1], sum(under_way))

        def result(self):
            under_way.remove(self.size)
            return self.future.result()

    start = stored._start

    def counted(array, bounds, part):
        return Counted(start(array, bounds, part), stored._size(bounds) * part.host.itemsize)

    monkeypatch.setattr(stored, "_start", counted)
    abstract = abstract_of(tree, axes, SPECS)
    found = stored.Item(folder).read(abstract)
    for (path, x), want, shape in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(tree), jax.tree.leaves(abstract),
        strict=True,
    ):  # fmt: skip
        assert np.asarray(x).tobytes() == np.asarray(want).tobytes(), path
        assert x.dtype == want.dtype and x.sharding == shape.sharding
    assert most[0] > 3 and most[1] <= 1000 and not under_way


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"b": t["b"][:16]}, r"b is bfloat16\[32, 8\] and must be bfloat16\[16, 8\]"),
        (lambda t: t | {"b": t["b"].astype(np.float32)}, "b is bfloat16.* must be float32"),
        (lambda t: t | {"c": t["step"]}, "c/"),
    ],
)
def test_what_is_not_there_is_an_error(item, change, words):
    folder, tree = item
    tree = change(tree)
    specs = jax.tree.map(lambda _: PartitionSpec(), tree)
    with pytest.raises(ValueError, match=words):
        stored.Item(folder).read(abstract_of(tree, {}, specs))
