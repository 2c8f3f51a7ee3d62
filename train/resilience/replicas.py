"""Silent corruption: copies of the same parameters on different devices that are not the same.

All copies are updated by the same arithmetic from the same sums, so they are equal to the last
bit, until a device computes or stores something wrong.
"""

import collections
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ...configs.errors import UserError
from ...models.parallel import processes, sharding
from ...models.weights.checksum import checksum


def differing(params) -> list[str]:
    """The devices whose copies differ from those of the others, with the parameter.

    Where two copies differ and there is no third, both are named. Checksums of each device's part
    are compared, so only a few numbers leave the devices.
    """
    leaves = jax.tree.leaves_with_path(params)
    mesh = leaves[0][1].sharding.mesh
    sums = processes.on_host(_sums(tuple(x.sharding.spec for _, x in leaves), mesh)(params))
    devices = list(mesh.devices.flat)
    found = []
    for i, (path, leaf) in enumerate(leaves):
        copies = collections.defaultdict(list)
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            copies[str(index)].append(device)
        for same in copies.values():
            seen = {d: tuple(sums[devices.index(d), i]) for d in same}
            counts = collections.Counter(seen.values())
            if len(counts) > 1:
                usual, most = counts.most_common(1)[0]
                odd = [d for d, v in seen.items() if v != usual or most * 2 <= len(same)]
                name = sharding.path_name(path)
                found += [f"{d} of process {d.process_index} ({name})" for d in odd]
    return found


@functools.cache
def _sums(specs, mesh):
    """Jitted: parameters -> uint32 [devices, leaves, 2], of each device's own parts."""

    def local(params):
        return jnp.stack([checksum(x) for x in jax.tree.leaves(params)])[None]

    def run(params):
        in_specs = jax.tree.unflatten(jax.tree.structure(params), specs)
        out = PartitionSpec(mesh.axis_names)
        return jax.shard_map(
            local, mesh=mesh, in_specs=(in_specs,), out_specs=out, check_vma=False
        )(params)

    return jax.jit(run)


def check_replicas(params, step: int) -> None:
    """Raise `UserError` that names the devices whose copies differ."""
    if found := differing(params):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"step {step}: silent corruption: copies of the same parameters differ on "
            f"{', '.join(found[:3])}{more}; take the device out and start again: the run resumes "
            "from its last checkpoint"
        )
