"""Logical names to mesh axes: what a device holds, and what is refused by the array's name."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from puna.configs.errors import ConfigError
from puna.configs.schema import MeshConfig, ModelConfig
from puna.models.parallel import sharding
from puna.models.transformer import abstract_params


def abstract(**axes):
    """A mesh of any size; no device is needed to resolve names."""
    return AbstractMesh(tuple(axes.get(a, 1) for a in sharding.AXES), sharding.AXES)


def boxed(shape, *names):
    return {"mlp": {"w_DF": sharding.Param(jax.ShapeDtypeStruct(shape, jnp.float32), names)}}


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((8, 8), ("embed", "widht"), "unknown logical axis 'widht'"),
        ((8, 8), ("embed", "expert_embed"), "mesh axis 'fsdp' would split two dims"),
        ((8, 10), ("embed", "mlp"), "mlp=10 must be a multiple of mesh.tensor=4"),
        ((6, 8), ("embed", "mlp"), "embed=6 must be a multiple of mesh.fsdp=2 * mesh.expert=2 = 4"),
        ((8, 8), ("embed",), "shape (8, 8) has 1 names"),
    ],
)
def test_what_cannot_be_split_names_the_parameter(shape, names, message):
    mesh = abstract(fsdp=2, expert=2, tensor=4)
    with pytest.raises(ConfigError, match="^mlp/w_DF: .*" + re.escape(message)):
        sharding.shardings(boxed(shape, *names), mesh)


def test_every_parameter_of_a_model_is_refused_by_its_path():
    model = ModelConfig(
        vocab_size=8, embed_dim=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=8
    )
    params = abstract_params(model)
    with pytest.raises(ConfigError) as caught:
        sharding.shardings(params, abstract(tensor=4))
    assert re.match(r"blocks/layer_0/attention/wk_DKH: kv_heads=2 must be a multiple of "
                    r"mesh.tensor=4$", str(caught.value))  # fmt: skip
    sharding.shardings(params, abstract(tensor=2))


@given(
    sizes=st.fixed_dictionaries({axis: st.integers(1, 3) for axis in sharding.AXES}),
    names=st.lists(st.sampled_from([None, *sharding.RULES]), max_size=3),
    factors=st.lists(st.integers(1, 12), min_size=3, max_size=3),
)
def test_a_device_holds_its_share_of_each_dim_or_nothing_is_made(sizes, names, factors):
    """By counting: the parts of all dims multiply to no more devices than there are."""
    mesh = abstract(**sizes)
    shape = tuple(factors[: len(names)])
    split = [[a for a in sharding.RULES.get(n, ()) if sizes[a] > 1] for n in names]
    parts = [math.prod(sizes[a] for a in axes) for axes in split]
    used = [axis for axes in split for axis in axes]
    possible = len(used) == len(set(used)) and not any(
        d % p for d, p in zip(shape, parts, strict=True)
    )
    if not possible:
        with pytest.raises(ConfigError, match="^x: "):
            sharding.resolve("x", shape, names, mesh)
        return
    spec = sharding.resolve("x", shape, names, mesh)
    held = NamedSharding(mesh, spec).shard_shape(shape)
    assert held == tuple(d // p for d, p in zip(shape, parts, strict=True))
    assert [sharding.parts(n, mesh) for n in names if n] == [
        p for n, p in zip(names, parts, strict=True) if n
    ]


@pytest.mark.parametrize(
    ("length", "parts"), [(16, ("context", "tensor")), (6, "context"), (5, None), (1, None)]
)
def test_a_length_that_does_not_divide_is_split_less(length, parts):
    with jax.sharding.use_abstract_mesh(abstract(context=2, tensor=4)):
        spec = sharding.activation((3, length, 7), ("batch", "residual_length", "act_embed"))
    assert spec == PartitionSpec(None, parts, None)


def test_a_mesh_takes_the_devices_that_are_left_or_says_the_product():
    devices = jax.devices()
    assert sharding.make_mesh(MeshConfig(data=-1, tensor=2), devices).shape["data"] == 4
    assert sharding.make_mesh(MeshConfig(data=1), devices[:1]).devices.size == 1
    with pytest.raises(ConfigError, match=r"mesh.data=2 \* mesh.fsdp=2 = 4 must equal the 8 "):
        sharding.make_mesh(MeshConfig(data=2, fsdp=2), devices)
    with pytest.raises(ConfigError, match="mesh.tensor=3 = 3 does not divide the 8 devices"):
        sharding.make_mesh(MeshConfig(data=-1, tensor=3), devices)


def test_what_is_counted_is_what_lies_on_a_device():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x_DF = np.arange(32, dtype=np.float32).reshape(4, 8)
    places = sharding.shardings(boxed(x_DF.shape, "embed", "mlp"), mesh)
    tree = jax.tree.map(lambda place: jax.device_put(x_DF, place), places)
    array = tree["mlp"]["w_DF"]
    assert len({str(shard.index) for shard in array.addressable_shards}) == 4
    for shard in array.addressable_shards:
        assert sharding.bytes_per_device(tree) == shard.data.nbytes == x_DF.nbytes // 4
    table = sharding.table(tree, places).splitlines()
    assert table[1].split() == ["mlp/w_DF", "(4,", "8)", "(fsdp,", "tensor)", "32"]
    assert table[2].split() == ["total", "32"]


def test_rows_of_a_batch_come_back_in_their_order():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = sharding.local_rows(mesh, 8)
    assert rows == list(range(8))
    batch = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8)}
    shuffled = rows[::-1]
    put = sharding.put_batch(mesh, jax.tree.map(lambda x: x[shuffled], batch), shuffled, 8)
    for name, x in batch.items():
        np.testing.assert_array_equal(put[name], x)
        assert {len(shard.data) for shard in put[name].addressable_shards} == {2}
