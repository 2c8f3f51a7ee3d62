"""A bit that flips on one device is found, and the device is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from puna.configs.errors import UserError
from puna.configs.schema import MeshConfig
from puna.models.parallel import sharding
from puna.train.resilience.replicas import check_replicas, differing


def flip(array, device):
    """The same array, but for one bit of what `device` holds."""
    parts = []
    for shard in array.addressable_shards:
        host = np.array(shard.data)
        if shard.device == device:
            host.view(np.uint8).reshape(-1)[5] ^= 1
        parts.append(jax.device_put(host, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


@pytest.mark.parametrize("axes,copies", [({"data": 4, "fsdp": 2}, 4), ({"data": 2, "fsdp": 4}, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_flipped_bit_is_found(axes, copies, dtype):
    mesh = sharding.make_mesh(MeshConfig(**axes))
    split = NamedSharding(mesh, PartitionSpec("fsdp", None))
    whole = NamedSharding(mesh, PartitionSpec())
    params = {
        "w": jax.device_put(jax.random.normal(jax.random.key(0), (8, 6)).astype(dtype), split),
        "v": jax.device_put(jnp.ones(12, dtype), whole),
    }
    assert differing(params) == []
    bad = jax.devices()[5]
    found = differing(params | {"w": flip(params["w"], bad)})
    assert any(str(bad) in text and "(w)" in text for text in found)
    assert len(found) == (1 if copies > 2 else 2)
    found = differing(params | {"v": flip(params["v"], bad)})
    assert found == [f"{bad} of process 0 (v)"]
    with pytest.raises(UserError, match="step 7: silent corruption.*(v)"):
        check_replicas(params | {"v": flip(params["v"], bad)}, 7)


def test_without_copies_there_is_nothing_to_compare():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    w = jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, PartitionSpec("fsdp")))
    assert differing({"w": flip(w, jax.devices()[3])}) == []
