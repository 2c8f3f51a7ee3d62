"""The least time of a training step by arithmetic, for programs that are not at hand.

Matrix products go as fast as large ones have been measured to go on the device, kernels beside
them as fast as its memory, collectives over all of its links at once. Left out on purpose, so that
no program is faster: latency, start of kernels, small or uneven products, input, hosts.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from ...configs.schema import Config
from ...models import hardware
from ...models.parallel import sharding
from ...models.transformer import abstract_params
from .. import ahead
from ..metrics import active_params, flops_per_token

# Shares of the forward pass computed again: of linear layers, of attention.
AGAIN = {"none": (0.0, 0.0), "dots": (0.0, 1.0), "full": (1.0, 1.0)}
# Elements of these axes lie with all devices of a product: their weights are gathered for it.
_GATHERED = ("embed", "expert_embed")


class Passes(NamedTuple):
    """Bytes that kernels beside products move, forward and backward, for one element.

    Attributes:
      residual: of the residual, in all of a layer: two norms and two additions.
      rotated: of queries and keys.
      hidden: of the MLP's width: gate, activation function, product of both.
      logits: of the vocabulary, in the loss.
    """

    residual: tuple[float, float]
    rotated: tuple[float, float]
    hidden: tuple[float, float]
    logits: tuple[float, float]


# All in bfloat16, each array read or written once: a norm takes the residual and what is added to
# it and gives the sum and its norm; backward it takes the sum and two gradients and gives one.
FUSED = Passes((16, 16), (4, 4), (6, 10), (2, 4))
# One kernel for each operation of the model's Python: additions apart from norms, rotations as
# float32 complex numbers, the activation function apart from the product, logits and softmax in
# float32.
EAGER = Passes((20, 24), (20, 20), (10, 18), (14, 22))
_UPDATE = (
    28  # bytes of a parameter in AdamW: itself, gradient and two moments in, three out, float32
)
_CAST = 4  # bytes of an operand's element that becomes float8: read, and written twice, transposed


@dataclasses.dataclass(frozen=True)
class Manner:
    """How a program runs, as far as a config does not say; by default with nothing that takes time.

    Attributes:
      float8: whether linear layers multiply in float8; attention and logits stay in bfloat16.
      passes: of kernels beside products; None = a compiler may have fused them into products.
      again: share of linear layers and of attention computed again; None = as `model.remat`.
      waits: whether nothing overlaps collectives along "tensor".
      stages: of a pipeline, which are among the devices of the mesh's other axes.
      microbatches: of a step, through the pipeline.
      chunks: of layers that a stage has (interleaved 1F1B).
    """

    float8: bool = False
    passes: Passes | None = None
    again: tuple[float, float] | None = None
    waits: bool = False
    stages: int = 1
    microbatches: int = 1
    chunks: int = 1


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds of a step on one device.

    Attributes:
      products: matrix products.
      passes: kernels beside them.
      beside: collectives that may go on meanwhile.
      waiting: collectives that nothing overlaps.
      idle: of a pipeline, for each second of work.
    """

    products: float
    passes: float
    beside: float
    waiting: float
    idle: float

    @property
    def seconds(self) -> float:
        """Of all."""
        return (max(self.products + self.passes, self.beside) + self.waiting) * (1 + self.idle)


def least(config: Config, topology: str, chip: hardware.Chip, manner: Manner = Manner()) -> Bound:
    """A bound on a step's time from below.

    Args:
      config: whose mesh, batch and recomputation they are.
      chip: the device.
      manner: what of the program the config does not say.
    """
    m, length = config.model, config.data.seq_len
    mesh = sharding.abstract_mesh(config.mesh, ahead.count(topology))
    tokens = config.train.batch_size * length / mesh.size
    again = manner.again or AGAIN[m.remat]
    linear, attention, head = _flops(config)
    rate = chip.float8_products if manner.float8 else chip.products
    products = linear * (1 + again[0] / 3) / rate
    products += (attention * (1 + again[1] / 3) + head) / chip.products
    leaves, moved, times = parameters(m), 0.0, _share(chip)
    if manner.passes:
        moved = tokens * _moved(m, manner, again)
        moved += _UPDATE * sum(leaf.value.size for leaf in leaves) / mesh.size
    found = collectives(config, mesh, leaves, chip, again[0])
    found = {axis: seconds / times for axis, seconds in found.items()}
    found["weights"] = found.get("weights", 0) / manner.stages
    n = mesh.shape["tensor"]
    near = found.pop("tensor", 0) * (n - 1) / n * (0.75 if manner.float8 else 1)
    waiting, beside = (near, 0) if manner.waits else (0, near)
    idle = (manner.stages - 1) / manner.microbatches / manner.chunks
    beside += sum(found.values())
    return Bound(products * tokens, moved / chip.memory_bandwidth, beside, waiting, idle)


def parameters(model) -> list[sharding.Param]:
    """The parameters of a model: shapes, and the names of their dims."""
    boxed = abstract_params(model)
    return jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, sharding.Param))


def part(leaf: sharding.Param, mesh, kept: Callable[[str], bool] = lambda name: True) -> int:
    """Elements of a parameter on one device, split along the dims that are kept so."""
    parts = math.prod(sharding.parts(n, mesh) for n in leaf.names if n and kept(n))
    return leaf.value.size // parts


def _flops(config):
    """Model FLOPs of a token: linear layers, attention, logits."""
    m = config.model
    whole, linear = flops_per_token(m, config.data.seq_len), 6 * active_params(m)
    head = 6 * m.vocab_size * m.embed_dim
    return linear - head, whole - linear, head


def _moved(m, manner, again):
    """Bytes of a token that kernels beside products move."""
    width = {
        "residual": m.embed_dim, "rotated": (m.num_heads + m.num_kv_heads) * m.head_dim,
        "hidden": m.mlp_dim,
    }  # fmt: skip
    assert manner.passes is not None
    moved = 0.0
    for name, elements in width.items():
        forward, backward = getattr(manner.passes, name)
        moved += m.num_layers * elements * (forward * (2 if again[0] else 1) + backward)
    moved += m.vocab_size * sum(manner.passes.logits)
    if manner.float8:
        heads, keys = m.num_heads * m.head_dim, 2 * m.num_kv_heads * m.head_dim
        given = 2 * m.embed_dim + heads + m.mlp_dim
        gradients = heads + keys + 2 * m.embed_dim + 2 * m.mlp_dim
        moved += m.num_layers * _CAST * (given * (1 + again[0]) + gradients)
    return moved


def collectives(config, mesh, leaves, chip, again: float) -> dict[str, float]:
    """Seconds of a step's collectives by what they are for, one after another on one ring.

    Args:
      leaves: the parameters, as `parameters` gives them.
      again: share of the forward pass that is computed again.
    """
    m, parts = config.model, config.train.microbatches
    link, near = _links(chip, mesh)
    found = {}
    tokens = config.train.batch_size * config.data.seq_len
    if mesh.shape["fsdp"] * mesh.shape["expert"] * mesh.shape["context"] > 1:
        whole = sum(part(leaf, mesh, lambda n: n not in _GATHERED) for leaf in leaves)
        passes = 3 if again else 2
        found["weights"] = parts * whole * (2 * passes + 4) / link
    if mesh.shape["data"] > 1:
        found["data"] = sum(part(leaf, mesh) for leaf in leaves) * 8 / link
    local = tokens / sharding.parts("batch", mesh) / mesh.shape["context"]
    if mesh.shape["tensor"] > 1:  # 2 gathers and 2 reduce-scatters a layer in each pass
        found["tensor"] = (8 + 4 * again) * m.num_layers * local * m.embed_dim * 2 / near
    if mesh.shape["expert"] > 1:
        moe = m.num_layers // max(1, m.moe_interval)
        sent = local * m.embed_dim * 2 * m.experts_per_token / 4
        found["expert"] = 6 * moe * sent / link
    if mesh.shape["slices"] > 1:
        found["slices"] = sum(part(leaf, mesh) for leaf in leaves) * 8 / chip.network
    return found


def _links(chip, mesh):
    """Bytes a second of a device: along all axes but one, and along "tensor"."""
    if isinstance(chip.compiler, hardware.TpuCompiler):  # one ring, both ways
        return [2 * (chip.link or 1e11)] * 2
    far = chip.link if mesh.size <= 8 else min(chip.link, 8 * chip.network)
    return [far / 2, (chip.link if mesh.shape["tensor"] <= 8 else far) / 2]


def _share(chip):
    """How many times faster links are at best than `_links` takes them to be."""
    return chip.compiler.torus_dims if isinstance(chip.compiler, hardware.TpuCompiler) else 2
