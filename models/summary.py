"""`model.summary()`: every parameter of a model with its shape, place and memory."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ..configs import schema
from ..configs.display import html_table
from .parallel import sharding


class Row(NamedTuple):
    """A parameter: its path, shape, the mesh axis of each dim, numbers in it, bytes a device."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    count: int
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The parameters of a model on a mesh; prints as a table, and is one in a notebook.

    Attributes:
      rows: of each parameter.
      mesh: size of each axis that is larger than 1.
      name: what the model is.
    """

    rows: Sequence[Row]
    mesh: dict[str, int]
    name: str

    @property
    def parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(row.count for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Memory of the parameters on one device."""
        return sum(row.bytes_per_device for row in self.rows)

    def _head(self) -> str:
        devices = math.prod(self.mesh.values())
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items()) or "one device"
        each = " on each" if devices > 1 else ""
        memory = f"{self.bytes_per_device / 2**30:,.3f} GiB{each}"
        return f"{self.name}: {self.parameters:,} parameters, {memory}; mesh: {axes}"

    def __str__(self) -> str:
        cells = [("parameter", "shape", "mesh axes", "count", "bytes per device")]
        cells += [(r.path, str(r.shape), f"({', '.join(r.axes)})", f"{r.count:,}",
                   f"{r.bytes_per_device:,}") for r in self.rows]  # fmt: skip
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        lines = [self._head()]
        for row in cells:
            left = (f"{text:<{width}}" for text, width in zip(row[:3], widths, strict=False))
            right = (f"{text:>{width}}" for text, width in zip(row[3:], widths[3:], strict=True))
            lines.append("  " + "  ".join([*left, *right]).rstrip())
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(r.path, r.shape, ", ".join(r.axes), r.count, r.bytes_per_device)
                for r in self.rows]  # fmt: skip
        head = ("parameter", "shape", "mesh axes", "count", "bytes per device")
        return f"<p>{self._head()}</p>{html_table(rows, head)}"


def summarize(config: schema.ModelConfig, boxed, mesh: Mesh | None) -> Summary:
    """Summarize a model's parameters.

    Args:
      config: of the model.
      boxed: its abstract parameters, as `transformer.abstract_params` gives them.
      mesh: None for one device.
    """
    mesh = mesh or sharding.make_mesh(schema.MeshConfig(), jax.devices()[:1])
    places = jax.tree.leaves(sharding.shardings(boxed, mesh))
    leaves = jax.tree.leaves_with_path(sharding.unbox(boxed))
    rows = []
    for (path, x), place in zip(leaves, places, strict=True):
        axes = tuple("-" if axis is None else str(axis) for axis in place.spec)
        held = math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
        rows.append(Row(sharding.path_name(path), x.shape, axes, math.prod(x.shape), held))
    experts = f", {config.num_experts} experts" if config.moe_interval else ""
    name = f"Llama of {config.num_layers} layers, {config.embed_dim} wide{experts}"
    sizes = {axis: size for axis, size in dict(mesh.shape).items() if size > 1}
    return Summary(rows, sizes, name)
