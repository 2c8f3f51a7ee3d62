"""Attention of one device by the best kernel that its platform has.

TPU: splash attention, a Pallas kernel of JAX. GPU: cuDNN's fused attention. Else, and wherever
those two would not do what `blockwise.attend` does or would be slower at it, that function. The
choice is by the mesh's devices, which need not be there: see `train/ahead.py`.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from ..masks import Tokens, visible
from ..parallel import sharding
from . import blockwise

# Splash attention builds its mask on the host, in time O(T^2): a second here, minutes at 131,072.
_SPLASH_LONGEST = 16384
# Its fused backward pass holds T / block partial sums of the gradient of q.
_FUSED_LONGEST = 8192
_SPLASH_BLOCKS = (1024, 512, 256, 128)
_LANE = 128
# cuDNN takes a mask of documents only as a bias [B, 1, T, T], and gives its gradient as well:
# 128 MiB each for a row of this length.
_CUDNN_LONGEST = 8192


def attend(q_BTNH, k_BSKH, v_BSKH, q_tokens: Tokens, k_tokens: Tokens, *, chunk_size=0,
           start=None):  # fmt: skip
    """What `blockwise.attend` returns for the same arguments, by the platform's own kernel.

    Those take the int 0 as `start`, with T = S, and each document in one piece with rising
    positions.
    """
    whole = isinstance(start, int) and start == 0 and q_BTNH.shape[1] == k_BSKH.shape[1]
    # The kernels round float32 operands, which a caller that asks for float32 does not want.
    if whole and q_BTNH.dtype == jnp.bfloat16:
        platform = sharding.platform()
        if platform == "tpu" and _fits_splash(q_BTNH):
            return _splash(q_BTNH, k_BSKH, v_BSKH, q_tokens, chunk_size)
        if platform == "gpu" and _fits_cudnn(q_BTNH, k_BSKH):
            return _cudnn(q_BTNH, k_BSKH, v_BSKH, q_tokens, chunk_size)
    return blockwise.attend(
        q_BTNH, k_BSKH, v_BSKH, q_tokens, k_tokens, chunk_size=chunk_size, start=start
    )


def _zero_padding(out_BTNH, tokens: Tokens):
    """Kernels let padding see padding; nothing of it may come out, nor a gradient go in."""
    return jnp.where((tokens.segments_BT != 0)[:, :, None, None], out_BTNH, 0)


def _fits_splash(q_BTNH):
    T = q_BTNH.shape[1]
    return T % _SPLASH_BLOCKS[-1] == 0 and T <= _SPLASH_LONGEST


def _splash(q_BTNH, k_BTKH, v_BTKH, tokens: Tokens, chunk_size):
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    T, N, H = q_BTNH.shape[1:]
    kernel = _splash_kernel(T, N, chunk_size if chunk_size < T else 0)
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    # Zeros beyond the head's width change no score.
    wide = [(0, 0)] * 3 + [(0, -H % _LANE)]
    heads_first = (jnp.pad(x, wide).swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    pieces_BT = _pieces(tokens, chunk_size)
    out_BNTH = jax.vmap(kernel)(*heads_first, SegmentIds(pieces_BT, pieces_BT))
    return _zero_padding(out_BNTH.swapaxes(1, 2)[..., :H], tokens)


def _pieces(tokens: Tokens, chunk_size):
    """Numbers a row's documents, or its documents' chunks, which see nothing of one another."""
    chunks_BT = tokens.positions_BT // chunk_size if chunk_size else jnp.zeros((), jnp.int32)
    kinds = (tokens.segments_BT, jnp.broadcast_to(chunks_BT, tokens.segments_BT.shape))
    new_BT = functools.reduce(jnp.logical_or, (x[:, 1:] != x[:, :-1] for x in kinds))
    return jnp.pad(jnp.cumsum(new_BT, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


@functools.cache
def _splash_kernel(length, num_heads, chunk_size):
    """The kernel for rows of `length`, which passes over blocks that no query sees.

    In a packed row chunks start anywhere, but none reaches further back than its size.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    if chunk_size:
        mask = splash.LocalMask(shape, window_size=(chunk_size - 1, 0), offset=0)
    else:
        mask = splash.CausalMask(shape)
    block = next(size for size in _SPLASH_BLOCKS if length % size == 0)
    compute, fused = min(block, 512), length <= _FUSED_LONGEST
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=compute,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block, block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )  # fmt: skip

    def make():
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * num_heads), block_sizes=sizes, head_shards=1,
            q_seq_shards=1,
        )  # fmt: skip
        return jax.tree.map(np.asarray, kernel)

    # Something is being traced here, maybe for a device that is not there. A thread of its own
    # knows nothing of that, so its arrays have values.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _fits_cudnn(q_BTNH, k_BTKH):
    if q_BTNH.shape[1] > _CUDNN_LONGEST or q_BTNH.shape[1] % 2:
        return False
    try:  # the only way to ask whether cuDNN is here and takes heads of this width
        ask = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        jax.eval_shape(ask, q_BTNH, k_BTKH, k_BTKH)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _cudnn(q_BTNH, k_BTKH, v_BTKH, tokens: Tokens, chunk_size):
    # Causal by place in the row lets it pass over half of the blocks; the mask does the rest.
    mask_B1TT = visible(tokens, tokens, chunk_size)[:, None]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TT, is_causal=True, implementation="cudnn"
    )
    return _zero_padding(out_BTNH, tokens)
