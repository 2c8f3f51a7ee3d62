"""Hugging Face tensors <-> puna's parameters: one table, read in both directions.

A row says which tensor holds a leaf and how their dims correspond, so loading, saving and reading
only the part that one device needs all follow from it. A Linear of torch is [out, in], puna
contracts [in, ...]; the expert tensors are [in, out] on both sides. Only the text model is here:
the image encoder brings rows of its own.

Letters are those of `models/__init__.py`, and six more: X = hidden width of an expert, S = the
two halves (gate, up) of a fused tensor, I = rows of the embedding, O = a gate's one number, and a
head's H = R * P where RoPE turns P pairs of R = 2.
puna and the Hugging Face files of Llama 1-3 keep the members of a pair half a head apart (RP),
those of Llama 4 side by side (PR).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from .config import LLAMA4, family

# The parameter of a reward model beside those of the model, see `train/objectives/reward.py`.
REWARD = "reward/head_D"


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of a layer (or of the root) and the tensor that holds it.

    `dims` and `hf_dims` list the axes of both, a word for each dim; a word of several letters is
    a dim that merges them, the slowest first. `part` picks the leaf's half on axis S.
    """

    puna: str
    dims: str
    hf: str
    hf_dims: str
    part: int | None = None


ROOT = (
    Row("embed/table_VD", "I D", "model.embed_tokens.weight", "I D"),
    Row("norm/scale_D", "D", "model.norm.weight", "D"),
)
UNTIED = (Row("unembed/table_DV", "D V", "lm_head.weight", "V D"),)
NORMS = (
    Row("attention_norm/scale_D", "D", "input_layernorm.weight", "D"),
    Row("mlp_norm/scale_D", "D", "post_attention_layernorm.weight", "D"),
)
HALF_SPLIT = (
    Row("attention/wq_DNH", "D N H", "self_attn.q_proj.weight", "NH D"),
    Row("attention/wk_DKH", "D K H", "self_attn.k_proj.weight", "KH D"),
)
# NoPE layers too: what turns nowhere may be permuted as well, q and k alike.
INTERLEAVED = (
    Row("attention/wq_DNH", "D N RP", "self_attn.q_proj.weight", "NPR D"),
    Row("attention/wk_DKH", "D K RP", "self_attn.k_proj.weight", "KPR D"),
)
# Of layers that attend to images; q and k turn nowhere.
CROSS = (
    Row("cross_attention/wq_DNH", "D N H", "cross_attn.q_proj.weight", "NH D"),
    Row("cross_attention/wk_DKH", "D K H", "cross_attn.k_proj.weight", "KH D"),
    Row("cross_attention/wv_DKH", "D K H", "cross_attn.v_proj.weight", "KH D"),
    Row("cross_attention/wo_NHD", "N H D", "cross_attn.o_proj.weight", "D NH"),
    Row("cross_attention/q_norm/scale_D", "H", "cross_attn.q_norm.weight", "H"),
    Row("cross_attention/k_norm/scale_D", "H", "cross_attn.k_norm.weight", "H"),
    Row("cross_attention/gate_1", "O", "cross_attn_attn_gate", "O"),
    Row("mlp_gate_1", "O", "cross_attn_mlp_gate", "O"),
)
VALUES = (
    Row("attention/wv_DKH", "D K H", "self_attn.v_proj.weight", "KH D"),
    Row("attention/wo_NHD", "N H D", "self_attn.o_proj.weight", "D NH"),
)


BIASES = {
    "none": (),
    "qkv": (
        Row("attention/bq_Q", "NH", "self_attn.q_proj.bias", "NH"),
        Row("attention/bk_M", "KH", "self_attn.k_proj.bias", "KH"),
        Row("attention/bv_M", "KH", "self_attn.v_proj.bias", "KH"),
    ),
}
BIASES["all"] = (*BIASES["qkv"], Row("attention/bo_D", "D", "self_attn.o_proj.bias", "D"))
MLP_BIASES = (
    Row("mlp/b_gate_F", "F", "mlp.gate_proj.bias", "F"),
    Row("mlp/b_up_F", "F", "mlp.up_proj.bias", "F"),
    Row("mlp/b_down_D", "D", "mlp.down_proj.bias", "D"),
)
# Of q and k in files whose pairs lie side by side.
_TURNED = {"attention/bq_Q": ("NRP", "NPR"), "attention/bk_M": ("KRP", "KPR")}


def bias_rows(config: ModelConfig, interleaved: bool) -> tuple[Row, ...]:
    """The table of a layer's biases."""
    rows = BIASES[config.attention_bias]
    if interleaved:
        rows = tuple(
            dataclasses.replace(row, dims=_TURNED[row.puna][0], hf_dims=_TURNED[row.puna][1])
            if row.puna in _TURNED else row
            for row in rows
        )  # fmt: skip
    return rows + (MLP_BIASES if config.mlp_bias else ())


def _swiglu(puna: str, hf: str, width: str) -> tuple[Row, ...]:
    return (
        Row(f"{puna}/w_gate_DF", f"D {width}", f"{hf}.gate_proj.weight", f"{width} D"),
        Row(f"{puna}/w_up_DF", f"D {width}", f"{hf}.up_proj.weight", f"{width} D"),
        Row(f"{puna}/w_down_FD", f"{width} D", f"{hf}.down_proj.weight", f"D {width}"),
    )


EXPERTS = (
    Row("moe/router_DE", "D E", "feed_forward.router.weight", "E D"),
    Row("moe/w_gate_EDF", "E D X", "feed_forward.experts.gate_up_proj", "E D SX", part=0),
    Row("moe/w_up_EDF", "E D X", "feed_forward.experts.gate_up_proj", "E D SX", part=1),
    Row("moe/w_down_EFD", "E X D", "feed_forward.experts.down_proj", "E X D"),
)
SHARED = _swiglu("moe/shared", "feed_forward.shared_expert", "X")


def layer_rows(config: ModelConfig, layer: int, kind: str) -> tuple[Row, ...]:
    """The table of one decoder layer of family `kind`."""
    if config.is_cross(layer):
        return NORMS + CROSS + _swiglu("mlp", "mlp", "F")
    rows = NORMS + (INTERLEAVED if kind == LLAMA4 else HALF_SPLIT) + VALUES
    rows += bias_rows(config, interleaved=kind == LLAMA4)
    if config.is_moe(layer):
        return rows + EXPERTS + (SHARED if config.shared_expert else ())
    return rows + _swiglu("mlp", "feed_forward" if kind == LLAMA4 else "mlp", "F")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one layer's leaf lies in a Hugging Face tensor, and how to get it out and back."""

    name: str
    row: Row
    sizes: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the leaf, for one layer."""
        return self._shape(self.row.dims)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Of the Hugging Face tensor."""
        return self._shape(self.row.hf_dims)

    def _shape(self, dims):
        return tuple(math.prod(self.sizes[a] for a in dim) for dim in dims.split())

    def window(self, index: tuple[slice, ...] | None = None):
        """Say which block of the Hugging Face tensor holds `leaf[index]`.

        Args:
          index: a slice (without a step) for each dim of the leaf; None for the whole leaf.

        Returns:
          The slices of the smallest such block that is a slice on every dim, and the range
          (start, stop) that the block covers on every axis.
        """
        dims = self.row.dims.split()
        index = index or (slice(None),) * len(dims)
        wanted = {axis: (0, size) for axis, size in self.sizes.items()}
        for dim, size, part in zip(dims, self.shape, index, strict=True):
            if len(dim) == 1:  # a merged dim is read whole and cut afterwards
                wanted[dim] = part.indices(size)[:2]
        if self.row.part is not None:
            wanted["S"] = (self.row.part, self.row.part + 1)
        slices, covered = [], {}
        for dim in self.row.hf_dims.split():
            start, length, several = 0, 1, False
            for axis in dim:
                # Inside a merged dim only the outermost axis with several entries can be cut.
                low, high = (0, self.sizes[axis]) if several else wanted[axis]
                start, length = start * self.sizes[axis] + low, length * (high - low)
                covered[axis] = (low, high)
                several = several or high - low > 1
            slices.append(slice(start, start + length))
        return tuple(slices), covered

    def load(self, tensor, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return the leaf of one layer, or `leaf[index]`, reading only what that takes.

        Args:
          tensor: the whole Hugging Face tensor, or anything that slices like it.
        """
        slices, covered = self.window(index)
        axes, hf_axes = self._axes()
        block = np.asarray(tensor[slices])
        block = block.reshape([covered[a][1] - covered[a][0] for a in hf_axes])
        if self.row.part is not None:
            block = block.squeeze(hf_axes.index("S"))
            hf_axes = hf_axes.replace("S", "")
        leaf = block.transpose([hf_axes.index(a) for a in axes])
        dims = self.row.dims.split()
        leaf = leaf.reshape([math.prod(covered[a][1] - covered[a][0] for a in d) for d in dims])
        if index is None:
            return leaf
        rest = []
        for dim, size, part in zip(dims, self.shape, index, strict=True):
            start, stop, _ = part.indices(size)
            offset = covered[dim][0] if len(dim) == 1 else 0
            rest.append(slice(start - offset, stop - offset))
        return leaf[tuple(rest)]

    def store(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Write one layer's leaf into its place in a whole (contiguous) Hugging Face tensor."""
        axes, hf_axes = self._axes()
        view = tensor.reshape([self.sizes[a] for a in hf_axes])
        if self.row.part is not None:
            view = view[(slice(None),) * hf_axes.index("S") + (self.row.part,)]
            hf_axes = hf_axes.replace("S", "")
        view = view.transpose([hf_axes.index(a) for a in axes])
        view[...] = leaf.reshape([self.sizes[a] for a in axes])

    def _axes(self):
        return self.row.dims.replace(" ", ""), self.row.hf_dims.replace(" ", "")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter tree: its shape and, for each layer stacked in it, the source.

    `stacked` leaves have a leading axis, one entry a source; others have exactly one source.
    """

    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    stacked: bool


def leaves(config: ModelConfig, prefix: str = "", kind: str | None = None) -> dict[str, Leaf]:
    """Return the whole table of a model: every leaf of puna's text parameters by its path.

    Args:
      config: the architecture.
      prefix: what stands before every Hugging Face name, such as "language_model.".
      kind: "llama" or "llama4_text", the model type that names the tensors and orders the RoPE
        pairs; by default the simplest that can express the model, which is what `to_hf` writes.
    """
    kind = kind or family(config)
    return stack(
        config,
        ROOT + (() if config.tie_embeddings else UNTIED),
        lambda i: layer_rows(config, i, kind),
        prefix,
        "model.layers.{}.".format,
    )


def stack(
    config: ModelConfig,
    root: tuple[Row, ...],
    layer: Callable[[int], tuple[Row, ...]],
    prefix: str,
    layer_prefix: Callable[[int], str],
) -> dict[str, Leaf]:
    """Build a table from the rows outside the layers and those of layer i, for any format.

    Tensors of layer i are called `{prefix}{layer_prefix(i)}{row.hf}`, others `{prefix}{row.hf}`.
    """
    sizes = _sizes(config)
    sources = {row.puna: [Source(prefix + row.hf, row, sizes)] for row in root}
    blocks = config.num_layers // config.period
    for i in range(config.num_layers):
        block, j = divmod(i, config.period)
        where = "blocks" if block < blocks else "tail"
        for row in layer(i):
            source = Source(f"{prefix}{layer_prefix(i)}{row.hf}", row, sizes)
            sources.setdefault(f"{where}/layer_{j}/{row.puna}", []).append(source)
    table = {}
    for path, found in sources.items():
        stacked = path.startswith("blocks/")
        shape = (len(found), *found[0].shape) if stacked else found[0].shape
        table[path] = Leaf(shape, tuple(found), stacked)
    return table


def reward_leaf(config: ModelConfig) -> Leaf:
    """The vector of a reward model, `REWARD`, as the classifier of one label that it is there."""
    row = Row(REWARD, "D", "score.weight", "S D", part=0)
    source = Source(row.hf, row, {"S": 1, "D": config.embed_dim})
    return Leaf(source.shape, (source,), False)


def _sizes(config):
    return {
        "D": config.embed_dim,
        "E": config.num_experts,
        "F": config.mlp_dim,
        "H": config.head_dim,
        "I": config.embedding_rows,
        "K": config.num_kv_heads,
        "O": 1,
        "N": config.num_heads,
        "P": config.head_dim // 2,
        "R": 2,
        "S": 2,
        "V": config.vocab_size,
        "X": config.expert_dim,
    }


def hf_shapes(
    config: ModelConfig, prefix: str = "", kind: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every Hugging Face tensor of a model, by name; see `leaves`."""
    table = leaves(config, prefix, kind).values()
    return {source.name: source.hf_shape for leaf in table for source in leaf.sources}


def to_puna(
    config: ModelConfig,
    get: Callable[[str], np.ndarray] | Mapping[str, np.ndarray],
    prefix: str = "",
    kind: str | None = None,
) -> dict[str, Any]:
    """Build puna's parameters from Hugging Face tensors; dtypes stay as they are.

    Args:
      config: the architecture.
      get: the tensors by name.
      prefix, kind: see `leaves`.

    Returns:
      The nested dict that `Transformer.apply` takes, of NumPy arrays.

    Raises:
      UserError: a tensor is missing or has another shape than the architecture says.
    """
    return from_tensors(leaves(config, prefix, kind), get)


def from_tensors(
    table: Mapping[str, Leaf], get: Callable[[str], np.ndarray] | Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """`to_puna` by a table, of any format."""
    read = get.__getitem__ if isinstance(get, Mapping) else get
    params: dict[str, Any] = {}
    for path, leaf in table.items():
        whole = None
        for i, source in enumerate(leaf.sources):
            part = source.load(_checked(read, source))
            if not leaf.stacked:
                whole = np.ascontiguousarray(part)
                break
            if whole is None:
                whole = np.empty(leaf.shape, part.dtype)
            whole[i] = part
        _insert(params, path, whole)
    return params


def from_puna(
    config: ModelConfig, params: Mapping[str, Any], prefix: str = "", kind: str | None = None
) -> dict[str, np.ndarray]:
    """Build the Hugging Face tensors from puna's parameters: the exact inverse of `to_puna`.

    Every transform only moves numbers, so gradients map the same way as parameters.

    Raises:
      UserError: the tree is not that of `config`.
    """
    return to_tensors(leaves(config, prefix, kind), params)


def to_tensors(table: Mapping[str, Leaf], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`from_puna` by a table, of any format."""
    flat = dict(_flatten(params))
    if flat.keys() != table.keys():
        odd = sorted(flat.keys() ^ table.keys())[0]
        state = "is not one of" if odd in flat else "is missing from"
        raise UserError(f"parameter {odd} {state} the parameters of this architecture")
    out: dict[str, np.ndarray] = {}
    for path, leaf in table.items():
        value = np.asarray(flat[path])
        if value.shape != leaf.shape:
            raise UserError(
                f"parameter {path} has shape {value.shape}, the architecture says {leaf.shape}"
            )
        for i, source in enumerate(leaf.sources):
            if source.name not in out:
                out[source.name] = np.empty(source.hf_shape, value.dtype)
            source.store(value[i] if leaf.stacked else value, out[source.name])
    return out


def _checked(read, source):
    try:
        tensor = read(source.name)
    except KeyError:
        raise UserError(f"tensor {source.name} is missing from the weights") from None
    if tuple(tensor.shape) != source.hf_shape:
        raise UserError(
            f"tensor {source.name} has shape {tuple(tensor.shape)}, "
            f"the architecture says {source.hf_shape}"
        )
    return tensor


def _insert(tree, path, value):
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _flatten(tree, path="") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value
