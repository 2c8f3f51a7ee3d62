"""Low-rank adapters: a frozen weight plus scale * A B (LoRA, arXiv 2106.09685), and with a length
of its own for what each output multiplies (DoRA, arXiv 2402.09353).

An adapter is a part of the leaf of its weight, so it works wherever a weight does: projections,
MLPs, routed and shared experts, the embedding and the output. Several can lie side by side, of
which each row of a batch has one or none. Dropout is left out on purpose.
"""

import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import traverse_util

from ..configs import patterns
from ..configs.errors import ConfigError
from ..configs.schema import AdapterConfig, ModelConfig
from . import quantize
from .parallel import sharding
from .parallel.sharding import Param


class Adapted(flax.struct.PyTreeNode):
    """The weight `base + scale * a b`, times `gain` if there is one.

    base: the weight's own leaf, or None in a tree that holds adapters alone. a: the dims of the
    weight that a product sums over (of a table with a row for each id: the ids), then the rank. b:
    the rank, then the other dims. Dims that stack layers or experts stand first in both.
    m: of DoRA: the norm over the dims of `a` that the weight is to have, of size 1 along them; the
    gain is m over the norm of the sum. gain: the same once it is known (`leaf.settle`).
    owner_r: where several adapters lie side by side, the number of the one that each rank is of.
    chosen_B: the number of the adapter of each row, another for none (`choose`); without it none
    has one. Layers that are stacked stand first in both.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    m: jax.Array | None = None
    gain: jax.Array | None = None
    owner_r: jax.Array | None = None
    chosen_B: jax.Array | None = None

    @property
    def shape(self):
        return self.base.shape

    @property
    def T(self):
        assert self.m is None and self.gain is None, "a gain multiplies what a product gives"
        return self.replace(base=self.base.T, a=self.b.T, b=self.a.T)


def is_adapted(x) -> bool:
    """Whether a leaf of a tree of parameters has an adapter."""
    return isinstance(x, Adapted)


def factor_names(names, ndim_a: int, ndim_b: int):
    """The names of the dims of A and of B of a weight whose dims have `names`.

    Anything with an entry for each dim will do, such as a string of letters with rank "r".
    """
    rank = "r" if isinstance(names, str) else ("rank",)
    stacked = ndim_a + ndim_b - 2 - len(names)
    return names[: ndim_a - 1] + rank, names[:stacked] + rank + names[ndim_a - 1 :]


def strength(config: AdapterConfig) -> float:
    """What A B is multiplied by: alpha / rank, or alpha / sqrt(rank) (arXiv 2312.03732)."""
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def box(boxed, config: AdapterConfig) -> dict:
    """The adapters of `transformer.abstract_params`, boxed likewise, for the weights that have one.

    Raises:
      ConfigError: a pattern of `adapter.targets` matches no weight.
    """
    flat = {
        sharding.path_name(path): param
        for path, param in jax.tree.leaves_with_path(boxed, is_leaf=_is_param)
    }
    weights = [path for path, param in flat.items() if _can_adapt(param.names)]
    targets = patterns.matching("adapter.targets", config.targets, weights)
    if config.dora and "embed/table_VD" in targets and "unembed" not in boxed:
        raise ConfigError(
            f"adapter.targets={config.targets} must leave out embed/table_VD where "
            "adapter.dora=True and model.tie_embeddings=True: as the output it has other lengths"
        )
    made = {path: _box_one(flat[path], config) for path in targets}
    return traverse_util.unflatten_dict(made, sep="/")


def _is_param(x) -> bool:
    return isinstance(x, Param)


def _can_adapt(names) -> bool:
    return len(sharding.own_dims(names)) > 1 and "patches" not in names


def _box_one(param: Param, config: AdapterConfig) -> Adapted:
    names, shape = param.names, param.value.shape
    rows = len(sharding.row_dims(names))
    stacked = len(names) - len(sharding.own_dims(names))
    sizes = (
        (*shape[: stacked + rows], config.rank),
        (*shape[:stacked], config.rank, *shape[stacked + rows :]),
    )
    most = min(math.prod(shape[stacked : stacked + rows]), math.prod(shape[stacked + rows :]))
    if config.rank > most:
        raise ConfigError(
            f"adapter.rank={config.rank} must be at most {most}, the smaller side of a weight of "
            f"shape {shape}"
        )
    a, b = (
        Param(jax.ShapeDtypeStruct(size, jnp.float32), found)
        for size, found in zip(sizes, factor_names(names, *map(len, sizes)), strict=True)
    )
    m = None
    if config.dora:
        ones = range(stacked, stacked + rows)
        size = tuple(1 if i in ones else n for i, n in enumerate(shape))
        along = tuple(None if i in ones else name for i, name in enumerate(names))
        m = Param(jax.ShapeDtypeStruct(size, jnp.float32), along)
    return Adapted(None, a, b, strength(config), m)


def box_base(boxed, config: AdapterConfig):
    """The frozen parameters under the adapters, boxed, as `adapter.quantize` keeps them."""
    return boxed if config.quantize == "none" else quantize.box(boxed, config.quantize)


def targeted(adapters) -> list[str]:
    """The paths of the weights that have an adapter."""
    return [
        sharding.path_name(path)
        for path, leaf in jax.tree.leaves_with_path(adapters, is_leaf=is_adapted)
        if is_adapted(leaf)
    ]


def misses_experts(config: ModelConfig, adapters) -> bool:
    """Whether a mixture's routed experts, most of its weights, have no adapter."""
    return bool(config.moe_interval) and not any("/moe/w_" in path for path in targeted(adapters))


def init(adapters, key, mesh):
    """New adapters, which change nothing yet, each created where it lies on the mesh.

    A is uniform within 1 / sqrt(fan in) and B zero; of an embedding A is zero and B standard
    normal, as in PEFT. Of DoRA `leaf.with_magnitudes` gives m, which is 1 before.

    Args:
      adapters: from `box`.
    """

    def draw(key):
        made = []
        leaves, tree = jax.tree.flatten(adapters, is_leaf=is_adapted)
        for i, leaf in enumerate(leaves):
            a, b = leaf.a.value, leaf.b.value
            new = jax.random.fold_in(key, i)
            if "vocab" in leaf.a.names:
                first, second = jnp.zeros(a.shape), jax.random.normal(new, b.shape)
            else:
                bound = math.prod(a.shape[i] for i in _rows(leaf.a.names)) ** -0.5
                first = jax.random.uniform(new, a.shape, minval=-bound, maxval=bound)
                second = jnp.zeros(b.shape)
            m = leaf.m and jnp.ones(leaf.m.value.shape)
            made.append(leaf.replace(a=first, b=second, m=m))
        return jax.tree.unflatten(tree, made)

    return jax.jit(draw, out_shardings=sharding.shardings(adapters, mesh))(key)


def _rows(names):
    return [i for i in sharding.own_dims(names) if names[i] != "rank"]


def attach(adapters: dict, base: dict) -> dict:
    """The parameters of a model from nested dicts of adapters, or parts of it, and of the rest."""
    both = {}
    for name in adapters.keys() & base.keys():
        above, below = adapters[name], base[name]
        both[name] = above.replace(base=below) if is_adapted(above) else attach(above, below)
    return {**adapters, **base, **both}


def choose(params, chosen_B):
    """Parameters for a batch whose rows have an adapter each, of those that lie side by side.

    A product multiplies by all of them and counts for each row the ranks of its own: so a row
    gives what its adapter alone would, and its work grows with the sum of their ranks.

    Args:
      chosen_B: int32 numbers of adapters, -1 for none; traced or not.
    """

    def one(leaf):
        if not is_adapted(leaf) or leaf.owner_r is None:
            return leaf
        stacked = leaf.owner_r.shape[:-1]
        return leaf.replace(chosen_B=jnp.broadcast_to(chosen_B, (*stacked, len(chosen_B))))

    return jax.tree.map(one, params, is_leaf=is_adapted)


def detach(params):
    """The base of a model alone: what it was without its adapters."""
    return jax.tree.map(lambda x: x.base if is_adapted(x) else x, params, is_leaf=_is_leaf)


def _is_leaf(x) -> bool:
    return isinstance(x, Adapted) or quantize.is_quantized(x)
