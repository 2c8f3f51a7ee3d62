"""Expert computation: tokens go to the few experts that a router chose, and come back.

Pure functions, no router, no parameters and no mesh. Tokens are sorted by expert and each
expert multiplies only its own rows (Gale et al. 2022, "MegaBlocks", arXiv:2211.15841), so work
grows with the tokens and not with the number of experts. Left out on purpose: exchange of
tokens between devices (wrap these functions in `shard_map`) and fused activation kernels.

Letters beside the usual legend: M (token, expert) pairs, R rows in expert order (R = M, or
E*C with a capacity).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...configs.architecture import EIGHT_BITS, activation_dtype
from .. import bits, eight_bits
from ..layers import contract, swiglu
from ..leaf import numbers, of_rows, resolve
from ..quantize import Grouped, is_quantized
from . import experts_gpu

# Rows of one matmul of the loop at most: more gains nothing on a CPU and wastes more padding.
_MAX_BLOCK = 256
# Side of the TPU's matrix unit: the megablox kernels want multiples of it.
_LANE = 128


class Routing(NamedTuple):
    """Which token goes to which expert, as M pairs; the one contract of every router.

    Token choice lists A experts of each token, expert choice C tokens of each expert; a token
    may be in any number of pairs. A pair whose expert is `num_experts` is unused: it costs no
    matmul, adds nothing, and sends no gradient. Pairs compete for capacity in list order.

    token_M, expert_M: int32.
    input_scale_M: multiplies what an expert reads (Llama 4), or None.
    output_scale_M: multiplies what an expert writes (Mixtral), or None.
    """

    token_M: jax.Array
    expert_M: jax.Array
    input_scale_M: jax.Array | None = None
    output_scale_M: jax.Array | None = None


class ExpertStats(NamedTuple):
    """load_E: pairs sent to each expert, before dropping; dropped: pairs over capacity. int32."""

    load_E: jax.Array
    dropped: jax.Array


def sort_by_expert(expert_M, num_experts):
    """Order pairs by expert, keeping list order within one; unused pairs go last.

    Returns:
      order_M: pair at each place of the sorted list.
      group_sizes_E: int32, pairs of each expert.
    """
    order_M = jnp.argsort(expert_M, stable=True)
    group_sizes_E = jnp.bincount(expert_M, length=num_experts + 1)[:num_experts]
    return order_M, group_sizes_E.astype(jnp.int32)


def swiglu_experts(
    x_TD, routing, w_gate_EDF, w_up_EDF, w_down_EFD, *,
    capacity: int | None = None, expected_pairs: int | None = None, dtype, hidden_axis=None,
):  # fmt: skip
    """Sum over each token's experts of `output_scale * E(input_scale * x)`, E a SwiGLU.

    Args:
      routing: a `Routing` of the T tokens.
      capacity: None computes every pair. An int is the most rows an expert takes, in list
        order; later pairs add nothing.
      expected_pairs: how many of the M pairs are in use as a rule, if not all: where experts
        are split over devices, an even share. It sets block sizes, never results.
      dtype: of the matmul operands: bfloat16, float32 or a kind of `eight_bits`; sums are in
        float32.
      hidden_axis: the mesh axis that F is split over, if any, and y_TD to be summed over.

    Returns:
      (y_TD in the dtype of x_TD, ExpertStats). Gradients reach x, both scales and the weights.
    """
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    num_experts, num_pairs = w_gate_EDF.shape[0], len(routing.token_M)
    order_M, load_E = sort_by_expert(routing.expert_M, num_experts)
    if capacity is None:
        pair_R = jnp.where(jnp.arange(num_pairs) < load_E.sum(), order_M, num_pairs)
        dropped = jnp.zeros((), jnp.int32)

        def grouped(rows, w, split):
            return grouped_matmul(
                rows, w, load_E, expected_rows=expected_pairs, dtype=dtype, split=split
            )

        matmul = grouped
    else:
        capacity = min(capacity, num_pairs)
        slot_EC, filled_EC = _head_rows(load_E, num_pairs, capacity)
        pair_R = jnp.where(filled_EC, order_M[slot_EC], num_pairs).reshape(-1)
        dropped = jnp.maximum(load_E - capacity, 0).sum()

        def batched(rows, w, split):
            x_ECD = rows.astype(activation_dtype(dtype)).reshape(num_experts, capacity, -1)
            y_ECF = contract("ECD,EDF->ECF", x_ECD, w, dtype, split=split)
            return y_ECF.reshape(num_experts * capacity, -1)

        matmul = batched

    rows_RD = read_pairs(x_TD, routing, pair_R)
    token_R = tokens_of(pair_R, routing, x_TD)
    gate, up, down = of_rows(
        weights, lambda chosen_T: chosen_T.at[token_R].get(mode="fill", fill_value=-1)
    )
    gate_RF, up_RF = (matmul(rows_RD, w, (None, hidden_axis)) for w in (gate, up))
    out_RD = matmul(swiglu(gate_RF, up_RF), down, (hidden_axis, None))
    return write_pairs(out_RD, routing, pair_R, x_TD), ExpertStats(load_E, dropped)


def tokens_of(pair_R, routing: Routing, x_TD):
    """The token of each pair, T where pair_R is M."""
    return routing.token_M.at[pair_R].get(mode="fill", fill_value=len(x_TD))


def read_pairs(x_TD, routing: Routing, pair_R):
    """What the experts of the pairs read: their tokens, scaled; zeros where pair_R is M."""
    token_R = tokens_of(pair_R, routing, x_TD)
    return _scale(x_TD.at[token_R].get(mode="fill", fill_value=0), routing.input_scale_M, pair_R)


def write_pairs(y_RD, routing: Routing, pair_R, x_TD):
    """Add up for each token what its pairs gave, scaled; an array like x_TD.

    What an unused row holds is dropped, so no NaN leaks from it.
    """
    token_R = tokens_of(pair_R, routing, x_TD)
    y_RD = _scale(y_RD, routing.output_scale_M, pair_R).astype(jnp.float32)
    y_TD = jnp.zeros(x_TD.shape, jnp.float32).at[token_R].add(y_RD, mode="drop")
    return y_TD.astype(x_TD.dtype)


def _scale(rows, scale_M, pair_R):
    if scale_M is None:
        return rows
    return rows * scale_M.at[pair_R].get(mode="fill", fill_value=0)[:, None]


def grouped_matmul(
    x_MD, w_EDF, group_sizes_E, *, expected_rows: int | None = None, dtype, split=(None, None)
):
    """Multiply rows sorted by expert by their expert's weights, without padding to a capacity.

    Args:
      w_EDF: a leaf of any kind, whose adapters are chosen for each of the M rows.
      x_MD: the first group_sizes_E[0] rows belong to expert 0, the next to expert 1, ...
      group_sizes_E: int32; the sum is at most M.
      expected_rows: the sum to choose block sizes for; None means M.
      dtype: operands are rounded to it: bfloat16, float32 or a kind of `eight_bits`; sums are in
        float32.
      split: the mesh axes that D and F are split over; scales of 8 bits are of whole dims.

    Returns:
      y_MF in `dtype`, or in bfloat16; rows past the last group are zero, whatever x holds there.
      In the backward pass an expert without rows gets a gradient of exactly zero.
    """
    # An expert's rows under a balanced router: what every block size is chosen from.
    mean = max(1, expected_rows or x_MD.shape[0]) / w_EDF.shape[0]
    weight = resolve(w_EDF)
    rest = activation_dtype(dtype)
    x_MD = x_MD.astype(rest)
    y_MF = _grouped_matmul(x_MD, weight.values, group_sizes_E, mean, dtype, split)

    def of_experts(x_E1F):
        return _of_experts(x_E1F, group_sizes_E, len(x_MD))

    if weight.scale is not None:
        y_MF = (y_MF * of_experts(weight.scale)).astype(rest)
    if weight.a is not None:
        low_Mr = weight.low(_grouped_matmul(x_MD, weight.a, group_sizes_E, mean, rest))
        y_MF += _grouped_matmul(low_Mr, weight.b, group_sizes_E, mean, rest)
    if weight.gain is not None:
        y_MF = (y_MF * of_experts(weight.gain)).astype(rest)
    return y_MF


def _of_experts(x_E1F, group_sizes_E, num_rows):
    """Of each row that of its expert [M, F]."""
    ends_E = jnp.cumsum(group_sizes_E)
    expert_M = _place(ends_E, jnp.arange(num_rows))
    return x_E1F[:, 0].at[expert_M].get(mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _grouped_matmul(x_MD, w_EDF, group_sizes_E, mean, dtype, split=(None, None)):
    if dtype not in EIGHT_BITS:
        return _times_weights(x_MD, w_EDF, group_sizes_E, mean, transpose_w=False)
    kind = eight_bits.FORMATS[dtype].forward
    return _times_scaled(x_MD, w_EDF, group_sizes_E, mean, (kind, kind), split[0], False)


def _grouped_forward(x_MD, w_EDF, group_sizes_E, mean, dtype, split):
    y_MF = _grouped_matmul(x_MD, w_EDF, group_sizes_E, mean, dtype, split)
    return y_MF, (x_MD, w_EDF, group_sizes_E)


def _grouped_backward(mean, dtype, split, saved, dy_MF):
    x_MD, w_EDF, group_sizes_E = saved
    if dtype in EIGHT_BITS:
        kinds = eight_bits.FORMATS[dtype]
        kinds = kinds.backward, kinds.forward
        dx_MD = _times_scaled(dy_MF, w_EDF, group_sizes_E, mean, kinds, split[1], True)
    else:
        dx_MD = _times_weights(dy_MF, w_EDF, group_sizes_E, mean, transpose_w=True)
    if is_quantized(w_EDF) or not jnp.issubdtype(w_EDF.dtype, jnp.floating):
        return dx_MD, None, None
    dw_EDF = _weight_gradient(x_MD, dy_MF, group_sizes_E, mean, w_EDF.dtype)
    return dx_MD, dw_EDF, None


_grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def _times_scaled(x, w_EDF, group_sizes_E, mean, dtypes, axis, transpose_w):
    """`_times_weights` of x and w quantised to `dtypes`, in x's dtype."""
    values, scale_M1 = eight_bits.quantize(x, (1,), dtypes[0], axis)
    summed = 2 if transpose_w else 1
    w_EDF, w_scale = eight_bits.quantize(numbers(w_EDF), (summed,), dtypes[1], axis)
    y = _times_weights(values, w_EDF, group_sizes_E, mean, transpose_w=transpose_w)
    w_scale_E1F = jnp.swapaxes(w_scale, 1, 2) if transpose_w else w_scale
    y = y * scale_M1 * _of_experts(w_scale_E1F, group_sizes_E, len(x))
    return jnp.where(_used(x, group_sizes_E), y, 0).astype(x.dtype)


def _used(x, group_sizes_E):
    return (jnp.arange(len(x)) < group_sizes_E.sum())[:, None]


def _times_weights(x, w_EDF, group_sizes_E, mean, *, transpose_w):
    """Rows of x times their expert's w, or its transpose, as the platform does it best.

    The result is in x's dtype; of 8 bits in float32.
    """
    tpu, gpu, loop = (
        functools.partial(f, mean=mean, transpose_w=transpose_w)
        for f in (_times_weights_tpu, _times_weights_gpu, _times_weights_loop)
    )
    # Of weights of 4 bits the loop multiplies out those of the experts in use alone.
    gpu = loop if isinstance(w_EDF, Grouped) else gpu
    y = _on_platform(tpu, gpu, loop, w_EDF.shape[1:], (x, w_EDF, group_sizes_E))
    return jnp.where(_used(x, group_sizes_E), y, 0)


def _weight_gradient(x_MD, dy_MF, group_sizes_E, mean, dtype):
    """Sum over each expert's rows of the outer products of x and dy; rounded once, to `dtype`."""
    return _on_platform(
        functools.partial(_weight_gradient_tpu, mean=mean, dtype=dtype),
        functools.partial(_weight_gradient_gpu, dtype=dtype),
        functools.partial(_weight_gradient_blocks, mean=mean, dtype=dtype),
        (x_MD.shape[1], dy_MF.shape[1]),
        (x_MD, dy_MF, group_sizes_E),
    )


def _on_platform(on_tpu, on_gpu, anywhere, widths, operands):
    """Trace all forms and let lowering pick, so one program also compiles ahead for another."""
    if any(width % _LANE for width in widths):
        return anywhere(*operands)
    # megablox would round float32.
    tpu = anywhere if operands[0].dtype == jnp.float32 else on_tpu
    return lax.platform_dependent(*operands, tpu=tpu, cuda=on_gpu, default=anywhere)


def _times_weights_loop(x, w_EDF, group_sizes_E, *, mean, transpose_w):
    # Only blocks that hold rows are visited, and only their experts' weights are read. A block
    # may overrun its expert into the next one's rows; the blocks after it write those again.
    num_rows, block = x.shape[0], _block_rows(mean)
    expert_N, row_N, num_blocks = _blocks(group_sizes_E, num_rows, block)
    x = jnp.pad(x, ((0, block), (0, 0)))
    spec = "BF,DF->BD" if transpose_w else "BD,DF->BF"
    width = w_EDF.shape[1 if transpose_w else 2]
    is_scaled = _result(x.dtype) != x.dtype
    w_EDF = bits.pack(w_EDF)

    def multiply(n, y):
        w_DF = numbers(bits.unpack(jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, expert_N[n], keepdims=False), w_EDF
        )))  # fmt: skip
        x_block = lax.dynamic_slice_in_dim(x, row_N[n], block)
        y_block = _einsum(spec, x_block, w_DF if is_scaled else w_DF.astype(x.dtype))
        return lax.dynamic_update_slice_in_dim(y, y_block.astype(y.dtype), row_N[n], axis=0)

    y = jnp.zeros((num_rows + block, width), _result(x.dtype))
    return lax.fori_loop(0, num_blocks, multiply, y)[:num_rows]


def _weight_gradient_blocks(x_MD, dy_MF, group_sizes_E, *, mean, dtype):
    # The first rows of every expert in one batched product, which writes the gradient once;
    # a loop that began from zeros would write it twice, and it is the largest array here.
    num_rows, head, block = x_MD.shape[0], _balanced_rows(mean), _block_rows(mean)
    row_EC, used_EC = _head_rows(group_sizes_E, num_rows, head)
    x_ECD = jnp.where(used_EC[..., None], x_MD[row_EC], 0)
    dy_ECF = jnp.where(used_EC[..., None], dy_MF[row_EC], 0)
    dw_EDF = _einsum("ECD,ECF->EDF", x_ECD, dy_ECF)

    expert_N, row_N, num_blocks = _blocks(group_sizes_E, num_rows, block, skip=head)
    end_N = jnp.cumsum(group_sizes_E)[expert_N]
    x_MD, dy_MF = (jnp.pad(rows, ((0, block), (0, 0))) for rows in (x_MD, dy_MF))

    def accumulate(n, dw_EDF):
        used_B = row_N[n] + jnp.arange(block) < end_N[n]
        x_BD, dy_BF = (
            jnp.where(used_B[:, None], lax.dynamic_slice_in_dim(rows, row_N[n], block), 0)
            for rows in (x_MD, dy_MF)
        )
        dw_DF = lax.dynamic_index_in_dim(dw_EDF, expert_N[n], keepdims=False)
        dw_DF += _einsum("BD,BF->DF", x_BD, dy_BF)
        return lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, expert_N[n], axis=0)

    return lax.fori_loop(0, num_blocks, accumulate, dw_EDF).astype(dtype)


def _balanced_rows(mean):
    """Rows that most experts stay under when the router is balanced: mean plus one deviation."""
    return _round_up(mean + math.sqrt(mean), 8)


def _block_rows(mean):
    """Rows of one block of the loop: a few blocks an expert, so padding stays a fraction."""
    rows = _balanced_rows(mean)
    return _round_up(rows / math.ceil(rows / _MAX_BLOCK), 8)


def _round_up(value, multiple):
    return math.ceil(value / multiple) * multiple


def _head_rows(group_sizes_E, num_rows, head):
    """The first `head` rows of each expert: (row_EC, which of them the expert really has)."""
    start_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    place_C = jnp.arange(head)
    row_EC = jnp.minimum(start_E[:, None] + place_C, num_rows - 1)
    return row_EC, place_C < group_sizes_E[:, None]


def _blocks(group_sizes_E, num_rows, block, skip=0):
    """Cut each expert's rows, but its first `skip`, into blocks of `block` rows.

    Returns:
      (expert_N, first row_N, number of blocks in use): N is the most blocks there can be.
    """
    num_experts = len(group_sizes_E)
    blocks_E = -(-jnp.maximum(group_sizes_E - skip, 0) // block)
    ends_E = jnp.cumsum(blocks_E)
    n_N = jnp.arange(-(-num_rows // block) + num_experts, dtype=jnp.int32)
    expert_N = _place(ends_E, n_N).astype(jnp.int32)
    expert_N = jnp.minimum(expert_N, num_experts - 1)
    start_E = jnp.cumsum(group_sizes_E) - group_sizes_E + skip
    row_N = start_E[expert_N] + (n_N - (ends_E - blocks_E)[expert_N]) * block
    return expert_N, row_N, ends_E[-1]


def _result(dtype):
    """The dtype of a product of operands in `dtype`: that, but float32 for 8 bits."""
    return dtype if jnp.dtype(dtype).itemsize > 1 else jnp.dtype(jnp.float32)


def _place(ends_E, x_N):
    """How many of some rising numbers each x has reached."""
    # Compared with all of them: a search is a loop, each step of which waits for the one before.
    return jnp.searchsorted(ends_E, x_N, side="right", method="compare_all")


def _einsum(spec, a, b):
    """Contract in float32; float32 operands are not rounded, as TPUs would by default."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    sums = eight_bits.accumulator(a.dtype)
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=sums)


def _times_weights_tpu(x, w_EDF, group_sizes_E, *, mean, transpose_w):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    num_rows, (depth, width) = x.shape[0], w_EDF.shape[1:]
    depth, width = (width, depth) if transpose_w else (depth, width)
    tile_m = _row_tile(mean)
    tiling = (tile_m, _tile(depth, 1024), _tile(width, 1024))
    out = _result(x.dtype)
    if out != x.dtype:  # megablox takes no 8 bits; bfloat16 holds them exactly
        x = x.astype(jnp.bfloat16)
    x = jnp.pad(x, ((0, -num_rows % tile_m), (0, 0)))
    w_EDF = numbers(w_EDF).astype(x.dtype)
    y = gmm(x, w_EDF, group_sizes_E, out, tiling, transpose_rhs=transpose_w)
    return y[:num_rows]


def _weight_gradient_tpu(x_MD, dy_MF, group_sizes_E, *, mean, dtype):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tile_m = _row_tile(mean)
    # The float32 tile of the result stays on the chip, twice: hence narrower than above.
    tiling = (tile_m, _tile(x_MD.shape[1], 512), _tile(dy_MF.shape[1], 512))
    padding = ((0, -len(x_MD) % tile_m), (0, 0))
    x_DM = jnp.pad(x_MD, padding).swapaxes(0, 1)
    return tgmm(x_DM, jnp.pad(dy_MF, padding), group_sizes_E, dtype, tiling)


def _times_weights_gpu(x, w_EDF, group_sizes_E, *, mean, transpose_w):
    block = experts_gpu.block_rows(mean)
    expert_N, row_N, num_blocks = _blocks(group_sizes_E, len(x), block)
    is_used_N = jnp.arange(len(expert_N)) < num_blocks
    end_N = jnp.where(is_used_N, jnp.cumsum(group_sizes_E)[expert_N], row_N)
    if w_EDF.dtype.itemsize > 1:
        w_EDF = w_EDF.astype(x.dtype)
    return experts_gpu.times_weights(
        x, w_EDF, expert_N, row_N, end_N,
        block=block, transpose_w=transpose_w, dtype=_result(x.dtype),
    )  # fmt: skip


def _weight_gradient_gpu(x_MD, dy_MF, group_sizes_E, *, dtype):
    end_E = jnp.cumsum(group_sizes_E)
    return experts_gpu.weight_gradient(x_MD, dy_MF, end_E - group_sizes_E, end_E, dtype=dtype)


def _row_tile(mean):
    return max(_LANE, min(512, int(mean) // _LANE * _LANE))


def _tile(size, most):
    """The largest multiple of 128 that divides `size` and is at most `most`."""
    return max(tile for tile in range(_LANE, most + 1, _LANE) if size % tile == 0)
