"""Grouped matmul on NVIDIA GPUs: two Triton kernels, written in Pallas.

A program of the first multiplies one block of rows, all of one expert, by a tile of that expert's
weights; one of the second adds up a tile of one expert's gradient over all of its rows. So no loop
of XLA goes over blocks, experts or rows, and nothing is padded but the last block of each expert.
Left out on purpose: tuning of tiles to the device, and Hopper's own way to load them (TMA).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Every width that the kernels tile is a multiple of it.
TILE = 128


def block_rows(mean: float) -> int:
    """Rows of a block: a power of two near what an expert has, as the tensor cores want them."""
    return max(16, min(128, 1 << max(1, int(mean)).bit_length() - 1))


def times_weights(x, w_EDF, expert_N, row_N, end_N, *, block: int, transpose_w: bool, dtype):
    """Rows of x times their expert's w, or its transpose.

    Args:
      x: [M, D], or [M, F] where transposed.
      w_EDF: of x's dtype, or of 8 bits. What is of one dtype is multiplied in it.
      expert_N, row_N, end_N: of each block its expert, its first row and the row after the last
        that it may have; int32. A block is empty where the latter two are equal.
      block: from `block_rows`.
      dtype: of the result.

    Returns:
      [M, F], or [M, D]; rows that are in no block hold anything.
    """
    num_rows, depth = x.shape
    width = w_EDF.shape[1 if transpose_w else 2]
    tile_k = 64 if x.dtype.itemsize == 2 else 128 if x.dtype.itemsize == 1 else 32
    kernel = functools.partial(
        _times_kernel, block=block, tile_k=tile_k, depth=depth, transpose_w=transpose_w
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_rows, width), dtype),
        grid=(width // TILE, len(expert_N)),
        compiler_params=triton.CompilerParams(num_warps=8 if block > 64 else 4, num_stages=3),
        name="grouped_matmul",
    )(expert_N, row_N, end_N, x, w_EDF)


def _times_kernel(
    expert_ref, row_ref, end_ref, x_ref, w_ref, y_ref, *, block, tile_k, depth, transpose_w
):
    n, columns = pl.program_id(1), pl.ds(pl.program_id(0) * TILE, TILE)
    expert, start, end = expert_ref[n], row_ref[n], end_ref[n]

    @pl.when(start < end)
    def _():
        rows, used_B1 = pl.ds(start, block), (start + jnp.arange(block) < end)[:, None]
        whole = jnp.issubdtype(x_ref.dtype, jnp.integer)
        zeros = jnp.zeros((block, TILE), jnp.int32 if whole else jnp.float32)

        def add(k, sums):
            depths = pl.ds(k * tile_k, tile_k)
            # Other rows hold anything, and are not written.
            x = triton.load(x_ref.at[rows, depths], mask=used_B1)
            at = (expert, columns, depths) if transpose_w else (expert, depths, columns)
            w = triton.load(w_ref.at[at])
            if w.dtype != x.dtype:
                # Triton multiplies one kind; bfloat16 holds the numbers of any 8 bits.
                x, w = x.astype(_wider(x.dtype)), w.astype(_wider(x.dtype))
            return sums + _dot(x, w.T if transpose_w else w, sums.dtype)

        sums = lax.fori_loop(0, depth // tile_k, add, zeros)
        triton.store(y_ref.at[rows, columns], sums.astype(y_ref.dtype), mask=used_B1)


def _wider(dtype):
    return jnp.bfloat16 if dtype.itemsize == 1 else dtype


def weight_gradient(x_MD, dy_MF, start_E, end_E, *, dtype):
    """Sum over each expert's rows of the outer products of x and dy [E, D, F], in `dtype`.

    Args:
      start_E, end_E: the first row of each expert and the one after its last; int32.
    """
    embed, hidden = x_MD.shape[1], dy_MF.shape[1]
    tile_m = 64 if x_MD.dtype.itemsize == 2 else 32
    return pl.pallas_call(
        functools.partial(_gradient_kernel, tile_m=tile_m),
        out_shape=jax.ShapeDtypeStruct((len(start_E), embed, hidden), dtype),
        grid=(hidden // TILE, embed // TILE, len(start_E)),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        name="grouped_gradient",
    )(start_E, end_E, x_MD, dy_MF)


def _gradient_kernel(start_ref, end_ref, x_ref, dy_ref, dw_ref, *, tile_m):
    expert = pl.program_id(2)
    start, end = start_ref[expert], end_ref[expert]
    embed, hidden = (pl.ds(pl.program_id(i) * TILE, TILE) for i in (1, 0))

    def add(n, sums):
        first = start + n * tile_m
        rows, used_M1 = pl.ds(first, tile_m), (first + jnp.arange(tile_m) < end)[:, None]
        x, dy = (
            triton.load(ref.at[rows, columns], mask=used_M1, other=0)
            for ref, columns in ((x_ref, embed), (dy_ref, hidden))
        )
        return sums + _dot(x.T, dy, jnp.float32)

    zeros = jnp.zeros((TILE, TILE), jnp.float32)
    sums = lax.fori_loop(0, pl.cdiv(end - start, tile_m), add, zeros)
    triton.store(dw_ref.at[expert, embed, hidden], sums.astype(dw_ref.dtype))


def _dot(a, b, dtype):
    # HIGHEST keeps float32 operands from being rounded to tf32.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=dtype)
