"""What Meta's directories of Llama 3.2 Vision hold beyond the text model of `meta`.

Names, layouts and sizes are those of `llama_models` (llama3/multimodal/model.py). The layers that
attend to images are a list of their own, one before each n-th layer of the text; the tables of
places have a row and a column for each tile of the largest grid, where puna's have an entry for
each grid; the rows of the embedding after the vocabulary are a tensor of their own. Letters of the
rows are those of `tiled_vision_table`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from ..media.images import grids
from .huggingface import Leaf, Row
from .tensors import Joined, Part, Tensor
from .tiled_vision_table import Stack, tower

# Keys of params.json; without the first there are no such layers.
LAYERS = "vision_num_cross_attention_layers"
KEYS = {LAYERS, "vision_chunk_size", "vision_max_num_chunks"}
# Of layers that attend to images, their MLPs apart; q and k turn nowhere.
LAYER = (
    Row("attention_norm/scale_D", "D", "attention_norm.weight", "D"),
    Row("mlp_norm/scale_D", "D", "ffn_norm.weight", "D"),
    Row("cross_attention/wq_DNH", "D N H", "attention.wq.weight", "NH D"),
    Row("cross_attention/wk_DKH", "D K H", "attention.wk.weight", "KH D"),
    Row("cross_attention/wv_DKH", "D K H", "attention.wv.weight", "KH D"),
    Row("cross_attention/wo_NHD", "N H D", "attention.wo.weight", "D NH"),
    Row("cross_attention/q_norm/scale_D", "H", "attention.q_norm.weight", "H"),
    Row("cross_attention/k_norm/scale_D", "H", "attention.k_norm.weight", "H"),
    Row("cross_attention/gate_1", "O", "gate_attn", "O"),
    Row("mlp_gate_1", "O", "gate_ffwd", "O"),
)

_ENCODER = "vision_model.vision_encoder."
_CLASS = f"{_ENCODER}class_embedding"
_PLACES = f"{_ENCODER}gated_positional_embedding"
_TILES = {name: f"{_ENCODER}{name}_pos_embed" for name in ("pre_tile", "post_tile")}
_TABLES = (_PLACES, *(f"{name}.embedding" for name in _TILES.values()))


def _norm(puna: str, meta: str):
    return (
        Row(f"{puna}/scale_D", "D", f"{meta}.weight", "D"),
        Row(f"{puna}/bias_D", "D", f"{meta}.bias", "D"),
    )


# The tables are named as `assemble` leaves them, with an entry for each grid.
_TOWER = (
    Row("patch_WD", "UYX D", f"{_ENCODER}conv1._linear.weight", "D UYX"),
    Row("class_D", "D", _CLASS, "D"),
    Row("positions_gate_1", "O", f"{_PLACES}_gate", "O"),
    Row("positions_PD", "C D", f"{_ENCODER}positional_embedding", "C D"),
    Row("tile_positions_GIPD", "G I C D", _PLACES, "G I C D"),
    *(
        row
        for name, meta in _TILES.items()
        for row in (
            Row(f"{name}_gate_1", "O", f"{meta}.gate", "O"),
            Row(f"{name}_GID", "G I OD", f"{meta}.embedding", "G I O D"),
        )
    ),
    *_norm("norm_in", f"{_ENCODER}ln_pre"),
    *_norm("norm_out", f"{_ENCODER}ln_post"),
    Row("projector_FD", "Q T", "vision_model.vision_projection.weight", "T Q"),
    Row("projector_bias_D", "T", "vision_model.vision_projection.bias", "T"),
)
_BLOCK = (
    *_norm("attention_norm", "ln_1"),
    *_norm("mlp_norm", "ln_2"),
    Row("attention/wq_DNH", "D N H", "attn.wq.weight", "NH D"),
    Row("attention/wk_DNH", "D N H", "attn.wk.weight", "NH D"),
    Row("attention/wv_DNH", "D N H", "attn.wv.weight", "NH D"),
    Row("attention/wo_NHD", "N H D", "attn.wo.weight", "D NH"),
    Row("mlp/w_up_DF", "D F", "mlp.c_fc.weight", "F D"),
    Row("mlp/b_up_F", "F", "mlp.c_fc.bias", "F"),
    Row("mlp/w_down_FD", "F D", "mlp.c_proj.weight", "D F"),
    Row("mlp/b_down_D", "D", "mlp.c_proj.bias", "D"),
)
_GATES = (
    Row("attention_gate_1", "O", "gate_attn", "O"),
    Row("mlp_gate_1", "O", "gate_ffn", "O"),
)
_STACKS = (
    Stack("blocks/layer", f"{_ENCODER}transformer.resblocks", _BLOCK),
    Stack("global_blocks", f"{_ENCODER}global_transformer.resblocks", _BLOCK + _GATES),
)

_EMBEDDING, _EXTRA = "tok_embeddings.weight", "learnable_embedding.weight"
_GATE = re.compile(r"cross_attention_layers\.\d+\.gate_(attn|ffwd)")
# Of the tower, which params.json does not say.
_FIXED = {
    "global_layers": 8, "intermediate_layers": "3,7,15,23,30", "num_heads": 16, "num_layers": 32,
    "patch_size": 14,
}  # fmt: skip


def fields(
    where, get, text: Mapping[str, Any], parts: Mapping[str, list[Tensor]]
) -> dict[str, Any]:
    """Map params.json to the fields of `ModelConfig` that differ from the text model's.

    Args:
      where: params.json, for messages.
      get: `get(key, type, default)` reads a key of it.
      text: the fields of the text model.
      parts: what each rank holds of each tensor.

    Raises:
      UserError: a key or a tensor that tells a size is missing.
    """

    def rows(name):
        if name not in parts or not parts[name][0].shape:
            raise UserError(f"{where.parent}: tensor {name} is missing or has no dimension")
        return parts[name][0].shape[0]

    # One before the last layer of the text and before each `every`-th, counted from there.
    num_layers = text["num_layers"]
    every = -(-num_layers // get(LAYERS, int))
    count = -(-num_layers // every)
    width = rows(_CLASS)
    return {
        "num_layers": num_layers + count,
        "cross": {"first": num_layers - 1 - every * (count - 1), "interval": every + 1},
        "vision": _FIXED
        | {
            "embed_dim": width,
            "mlp_dim": 4 * width,
            "image_size": get("vision_chunk_size", int),
            "max_tiles": get("vision_max_num_chunks", int, 4),
            # The first of the further rows, by llama3/chat_format.py.
            "token_id": text["vocab_size"],
            "extra_rows": rows(_EXTRA) * len(parts[_EXTRA]),
        },
    }


def layer_prefix(config: ModelConfig, layer: int) -> str:
    """What stands before the names of a layer, which count each of the two lists by itself."""
    x = config.cross
    before = len(range(x.first, layer, x.interval)) if x.interval else 0
    if config.is_cross(layer):
        return f"cross_attention_layers.{before}."
    return f"layers.{layer - before}."


def leaves(config: ModelConfig) -> dict[str, Leaf]:
    """The table of the tower, of tensors as `assemble` leaves them."""
    return tower(config, _TOWER, _STACKS)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that `assemble` replaces, the ranks joined."""
    v = config.vision
    if not config.cross.interval:
        return {}
    tiles = (v.max_tiles, v.max_tiles)
    return {
        _EMBEDDING: (config.vocab_size, config.embed_dim),
        _EXTRA: (v.extra_rows, config.embed_dim),
        _PLACES: (*tiles, (v.image_size // v.patch_size) ** 2 + 1, v.embed_dim),
    } | {f"{name}.embedding": (*tiles, 1, v.embed_dim) for name in _TILES.values()}


def one_gate(name: str, ranks: list[Tensor]) -> list[Tensor]:
    """A gate that stands once for every channel, as the one number that it is."""
    if not _GATE.fullmatch(name) or any(len(rank.shape) != 1 for rank in ranks):
        return ranks
    values = [rank[(slice(None),)] for rank in ranks]
    if any(len(value) < 2 or (value != value[0]).any() for value in values):
        return ranks  # one number, or refused by its shape
    return [Part(rank, 0, 1) for rank in ranks]


def assemble(path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the embedding together, and give the tables of places an entry for each grid.

    Raises:
      UserError: one of these has another shape than the architecture says.
    """
    made = dict(tensors)
    for name, shape in shapes(config).items():
        if name in made and tuple(made[name].shape) != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {tuple(made[name].shape)}, "
                f"the architecture says {shape}"
            )
    if not config.cross.interval:
        return made
    extra = made.pop(_EXTRA)
    if _EMBEDDING in made:
        made[_EMBEDDING] = Joined([made[_EMBEDDING], extra], 0)
    return made | {name: _ByGrid(made[name]) for name in _TABLES if name in made}


def params(config: ModelConfig) -> dict[str, int]:
    """The keys of params.json beyond those of a text model; `fields` is the other direction.

    Raises:
      UserError: an encoder whose sizes params.json does not say and Meta's code does not have.
    """
    v = config.vision
    for field, value in (_FIXED | {"mlp_dim": 4 * v.embed_dim}).items():
        if (found := getattr(v, field)) != value:
            raise UserError(
                f"model.vision.{field}={found!r} must be {value!r} for --to=meta: Meta's encoder "
                "has it so; use --to=hf"
            )
    return {
        LAYERS: sum(map(config.is_cross, range(config.num_layers))),
        "vision_chunk_size": v.image_size,
        "vision_max_num_chunks": v.max_tiles,
    }


def names(config: ModelConfig, name: str) -> tuple[str, ...]:
    """The tensors of a file that `assemble` makes one of."""
    if config.cross.interval and name == _EMBEDDING:
        return _EMBEDDING, _EXTRA
    return (name,)


def take_apart(config: ModelConfig, name: str, tensor: np.ndarray) -> tuple[np.ndarray, ...]:
    """Undo what `assemble` does to one tensor, in the order of `names`.

    Raises:
      UserError: grids of tiles have values of their own, and Meta's tables hold one for all.
    """
    if not config.cross.interval:
        return (tensor,)
    if name == _EMBEDDING:
        return tensor[: config.vocab_size], tensor[config.vocab_size :]
    return (_by_place(name, tensor) if name in _TABLES else tensor,)


def _by_place(name: str, table: np.ndarray) -> np.ndarray:
    """A table [G, I, ...] of the grids' tiles as one [I, I, ...] of rows and columns of tiles.

    Places that no grid reaches are zero: nothing ever reads them.
    """
    side = table.shape[1]
    out = np.zeros((side, side, *table.shape[2:]), table.dtype)
    known = np.zeros((side, side), bool)
    unused = [table[0]]
    for entry, (rows, columns) in zip(table[1:], grids(side), strict=True):
        unused.append(entry[rows * columns :])
        for tile in range(rows * columns):
            place = divmod(tile, columns)
            if known[place] and out[place].tobytes() != entry[tile].tobytes():
                raise UserError(
                    f"tensor {name}: row {place[0]}, column {place[1]} of tiles has other values "
                    "in other grids, and one place in Meta's layout; use --to=hf"
                )
            out[place], known[place] = entry[tile], True
    if any(part.any() for part in unused):
        raise UserError(
            f"tensor {name}: has values for tiles beyond a grid, and no place for them in Meta's "
            "layout; use --to=hf"
        )
    return out


class _ByGrid:
    """A table [I, I, ...] of rows and columns of tiles as one [G, I, ...] of the grids' tiles.

    Zero where there is no image (the first of G) and for tiles that a grid does not have: Meta's
    code adds nothing there.
    """

    def __init__(self, table: Tensor):
        self.table, self.dtype = table, table.dtype
        self.grids = [(0, 0), *grids(table.shape[0])]
        self.shape = (len(self.grids), *table.shape[1:])

    def __getitem__(self, index):
        chosen, tiles, *rest = (range(n)[part] for n, part in zip(self.shape, index, strict=True))
        out = np.zeros((len(chosen), len(tiles), *map(len, rest)), self.dtype)
        for g, grid in enumerate(chosen):
            rows, columns = self.grids[grid]
            for i, tile in enumerate(tiles):
                if tile < rows * columns:
                    y, x = divmod(tile, columns)
                    place = (slice(y, y + 1), slice(x, x + 1), *index[2:])
                    out[g, i] = self.table[place][0, 0]
        return out
