"""The mesh, and which mesh axis each named dimension is split over. Nothing else knows.

Every parameter and activation names its dims ("embed", "heads", ...); `RULES` maps names to
mesh axes and `resolve` is strict: an unknown name, a mesh axis used twice or a dim that does not
divide raises with the arithmetic. `jax.jit` does the rest. Axes are of type Auto: under JAX's
newer Explicit axes Linen cannot initialise.
"""

import dataclasses
import math
from typing import Any

import flax
import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ...configs.errors import ConfigError
from ...configs.schema import MeshConfig

AXES = tuple(f.name for f in dataclasses.fields(MeshConfig))

# Logical axis -> mesh axes. Parameters first, then activations. Parameters and optimizer state lie
# split over all axes that split tokens within a slice, and are gathered where they are used.
RULES: dict[str, tuple[str, ...]] = {
    "layers": ("pipeline",),
    "encoder_layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "expert_embed": ("fsdp", "context"),
    "router": (),
    "rank": (),
    "norm": (),
    "patches": (),
    "batch": ("slices", "data", "fsdp", "expert"),
    "length": ("context",),
    # Between attention and MLP each device of a tensor group keeps its own part of the length
    # (sequence parallelism, arXiv 2205.05198).
    "residual_length": ("context", "tensor"),
    "loss_length": ("context", "pipeline"),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}

# Lengths are whatever the caller has, down to one token of generation: one that does not divide
# is split less or not at all. `loop` refuses a training length that context does not divide.
_SPLIT_LESS = {"residual_length": "length", "loss_length": "length", "length": None}


class Param(flax.struct.PyTreeNode, nn.meta.AxisMetadata):
    """A parameter that carries the logical name of each of its dims.

    Flax's own box resolves names with rules of its own and replicates what it does not know;
    this one only remembers them until `resolve` reads them.
    """

    value: Any
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        names = list(self.names)
        names.insert(index, params[nn.meta.PARTITION_NAME])
        return self.replace(names=tuple(names))

    def remove_axis(self, index, params):
        names = list(self.names)
        assert names.pop(index) == params[nn.meta.PARTITION_NAME]
        return self.replace(names=tuple(names))


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The device mesh of a configuration; an axis of -1 takes the devices that are left.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = _sizes(config, len(devices))
    return Mesh(_arrange(shape, devices), AXES, (AxisType.Auto,) * len(AXES))


def abstract_mesh(config: MeshConfig, count: int) -> AbstractMesh:
    """The mesh of so many devices that are nowhere: what lies where, and how much of it.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    return AbstractMesh(_sizes(config, count), AXES, (AxisType.Auto,) * len(AXES))


def _sizes(config, count) -> tuple[int, ...]:
    """Devices along each axis."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(v for v in sizes.values() if v != -1)
    product = " * ".join(f"mesh.{k}={v}" for k, v in sizes.items() if v not in (1, -1)) or "1"
    for axis, size in sizes.items():
        if size == -1:
            if count % fixed:
                raise ConfigError(
                    f"{product} = {fixed} does not divide the {count} devices, "
                    f"so mesh.{axis}=-1 cannot be filled in"
                )
            sizes[axis] = count // fixed
            fixed = count
    if fixed != count:
        raise ConfigError(
            f"{product} = {fixed} must equal the {count} devices here; "
            "set one axis to -1 to take what is left"
        )
    return tuple(sizes.values())


def _arrange(shape, devices) -> np.ndarray:
    """Devices so that neighbours on the last axes are neighbours in the network.

    Where the hardware tells its slices apart, the first axis joins them over the data-centre
    network and no other axis leaves one.
    """
    if len({getattr(d, "slice_index", 0) for d in devices}) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    slices, within = shape[0], shape[1:]
    have = len({d.slice_index for d in devices})
    if slices != have:
        raise ConfigError(f"mesh.slices={slices} must equal the {have} slices here")
    return mesh_utils.create_hybrid_device_mesh(
        (1, *within), (slices, *(1 for _ in within)), devices, allow_split_physical_axes=True
    )


def resolve(what: str, shape, names, mesh) -> PartitionSpec:
    """Turn the logical names of one array into a `PartitionSpec`.

    Args:
      what: the array's own name, for messages.
      shape: its shape.
      names: one logical name, or None, a dim.
      mesh: a mesh or abstract mesh; only its axis sizes matter.

    Raises:
      ConfigError: an unknown name, a mesh axis used twice, or a dim that does not divide.
    """
    if len(shape) != len(names):
        raise ConfigError(f"{what}: shape {tuple(shape)} has {len(names)} names {names}")
    used: set[str] = set()
    spec = []
    for dim, name in zip(shape, names, strict=True):
        if name is not None and name not in RULES:
            raise ConfigError(f"{what}: unknown logical axis {name!r}; sharding.RULES lists them")
        axes = tuple(a for a in RULES.get(name, ()) if mesh.shape[a] > 1)
        if twice := used & set(axes):
            raise ConfigError(f"{what}: mesh axis {twice.pop()!r} would split two dims of {names}")
        used |= set(axes)
        if dim % math.prod(mesh.shape[a] for a in axes):
            raise ConfigError(f"{what}: {name}={dim} must be a multiple of {product(name, mesh)}")
        spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)


def activation(shape, names) -> PartitionSpec:
    """The `PartitionSpec` of an activation on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    names = list(names)
    for i, dim in enumerate(shape):
        while names[i] in _SPLIT_LESS and dim % parts(names[i], mesh):
            names[i] = _SPLIT_LESS[names[i]]
    return resolve("activation", shape, names, mesh)


def constrain(x, *names: str | None):
    """Split an activation by the logical names of its dims; does nothing outside a mesh."""
    if not split_axes():
        return x
    return jax.lax.with_sharding_constraint(x, activation(x.shape, names))


def parts(name: str, mesh=None) -> int:
    """Into how many parts a logical axis is split; on the current mesh by default."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape.get(a, 1) for a in RULES[name])


def product(name: str, mesh) -> str:
    """`parts` as its arithmetic, for messages: `mesh.data=2 * mesh.fsdp=4 = 8`."""
    axes = [f"mesh.{a}={mesh.shape[a]}" for a in RULES[name] if mesh.shape[a] > 1]
    if not axes:
        return "1"
    return " * ".join(axes) + (f" = {parts(name, mesh)}" if len(axes) > 1 else "")


def split_axes() -> dict[str, int]:
    """The axes of the current mesh that split anything, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else {a: n for a, n in mesh.shape.items() if n > 1}


def platform() -> str:
    """Of the mesh that is traced for: "cpu", "gpu" or "tpu".

    Unlike `lax.platform_dependent`, a choice by it saves nothing of the other branches for the
    gradient.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def per_device(f, in_specs, out_specs):
    """`jax.shard_map` over all axes of the current mesh that no enclosing one has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(
        f, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How the arrays of a batch [B, ...] lie on the mesh: split along B."""
    axes = tuple(a for a in RULES["batch"] if mesh.shape[a] > 1)
    return NamedSharding(mesh, PartitionSpec(axes or None))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def path_name(path) -> str:
    """`blocks/layer_0/attention/wq_DNH` for a key path of a pytree."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def own_dims(names) -> list[int]:
    """Dims of one parameter, without those that only stack many of them."""
    return [
        i for i, name in enumerate(names) if name not in ("layers", "encoder_layers", "experts")
    ]


def row_dims(names) -> tuple[int, ...]:
    """Dims of a matrix that a product sums over; of the embedding those of the ids."""
    own = own_dims(names)
    return tuple(own[:1] if names[own[0]].endswith("embed") else own[:-1])


def _is_param(x) -> bool:
    return isinstance(x, Param)


def shardings(boxed, mesh: Mesh):
    """The `NamedSharding` of every leaf of a tree of boxed (abstract) parameters."""
    return jax.tree.map_with_path(
        lambda path, p: NamedSharding(mesh, resolve(path_name(path), p.value.shape, p.names, mesh)),
        boxed,
        is_leaf=_is_param,
    )


def names(boxed) -> dict[str, tuple[str, ...]]:
    """The logical names of the dims of every parameter, by its path."""
    leaves = jax.tree.leaves_with_path(boxed, is_leaf=_is_param)
    return {path_name(path): p.names for path, p in leaves}


def unbox(boxed):
    """The same tree with plain arrays (or shapes) for leaves."""
    return jax.tree.map(lambda p: p.value, boxed, is_leaf=_is_param)


def bytes_per_device(tree) -> int:
    """What one device holds of a tree of arrays, or of shapes with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def table(shapes, shardings) -> str:
    """Parameter, shape, spec and bytes per device, a line each, for people to read."""
    rows, total = [], 0
    leaves = zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True)
    for (path, leaf), sharding in leaves:
        size = int(np.prod(sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        total += size
        spec = ", ".join("-" if s is None else str(s) for s in sharding.spec)
        rows.append((path_name(path), str(leaf.shape), f"({spec})", f"{size:,}"))
    rows.append(("total", "", "", f"{total:,}"))
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    lines = ["parameter, shape, mesh axes, bytes per device"]
    for a, b, c, d in rows:
        lines.append(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}")
    return "\n".join(lines)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process has devices for."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for (rows,) in places.values() for row in range(batch_size)[rows]})


def put_batch(mesh: Mesh, arrays, rows: list[int], batch_size: int):
    """Global arrays [batch_size, ...] from the rows that this process has.

    Args:
      arrays: pytree of host arrays whose first dim follows `rows`.
      rows: row numbers in the global batch, at least those of `local_rows`.
    """
    at = {row: i for i, row in enumerate(rows)}

    def put(x):
        def part(index):
            return x[[at[row] for row in range(batch_size)[index[0]]]]

        shape = (batch_size, *x.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh), part)

    return jax.tree.map(put, arrays)
