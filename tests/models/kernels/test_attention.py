"""Attention's kernels give the blockwise form's numbers, and lower where they should.

Splash attention runs here in Pallas' interpreter; cuDNN cannot run without a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from puna.models.kernels import attention as kernels
from puna.models.kernels import blockwise
from puna.models.masks import Tokens

B, T, N, K = 2, 256, 4, 2


@pytest.fixture
def interpreted(monkeypatch):
    make = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", make)
    kernels._splash_kernel.cache_clear()
    yield
    kernels._splash_kernel.cache_clear()


def operands(head_dim, dtype=jnp.bfloat16, length=T):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, length, heads, head_dim) for heads in (N, K, K, N)]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def packed(length=T) -> Tokens:
    """Documents of several lengths, one across a chunk's end, padding between and behind."""
    positions, segments = np.zeros((2, B, length), np.int32)
    for row, pieces in enumerate([((1, 100), (2, 37), (0, 9), (3, 90)), ((1, length),)]):
        start = 0
        for segment, size in pieces:
            positions[row, start : start + size] = np.arange(size)
            segments[row, start : start + size] = segment
            start += size
    return Tokens(jnp.asarray(positions), jnp.asarray(segments))


def value_and_gradient(form, q, k, v, w):
    def total(q, k, v):
        out = form(q, k, v).astype(jnp.float32)
        return jnp.sum(out * w), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


@pytest.mark.parametrize(
    ("head_dim", "chunk_size", "fused"), [(128, 0, True), (128, 48, False), (64, 48, True)]
)
def test_splash_equals_blockwise(interpreted, monkeypatch, head_dim, chunk_size, fused):
    if not fused:
        monkeypatch.setattr(kernels, "_FUSED_LONGEST", 0)
    arrays = operands(head_dim)
    tokens = packed()
    expected = value_and_gradient(
        lambda q, k, v: blockwise.attend(q, k, v, tokens, tokens, chunk_size=chunk_size, start=0),
        *arrays,
    )
    actuals = value_and_gradient(
        lambda q, k, v: kernels._splash(q, k, v, tokens, chunk_size), *arrays
    )
    padding = np.asarray(tokens.segments_BT == 0)
    for actual, wanted in zip(actuals, expected, strict=True):
        # bfloat16 operands, and one rounding more: splash takes its scale inside of q.
        np.testing.assert_allclose(actual, wanted, rtol=0.02, atol=0.01 * np.abs(wanted).max())
        assert not actual[padding].any()


def tpu_kernels(dtype=jnp.bfloat16, length=T, start=0, platform="tpu"):
    """How many Pallas kernels a gradient step has on a mesh of one device that is not here."""
    q, k, v, _ = operands(128, dtype, length)
    tokens = packed(length)
    device = jax.sharding.AbstractDevice("TPU v5", 2, platform)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)

    @functools.partial(jax.shard_map, in_specs=PartitionSpec(), out_specs=PartitionSpec(),
                       check_vma=False)  # fmt: skip
    def attend(q, k, v):
        return kernels.attend(q, k, v, tokens, tokens, start=start)

    def total(q, k, v):
        out, _ = jax.lax.scan(lambda q, _: (attend(q, k, v), None), q, length=2)
        return jnp.sum(out.astype(jnp.float32))

    kernels._splash_kernel.cache_clear()  # so that it is made in the middle of all these traces
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, v)
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    return lowered.count("stablehlo.custom_call @tpu_custom_call")


def test_splash_is_lowered_for_tpu_only():
    assert tpu_kernels() == 2  # forward, and backward in one
    assert tpu_kernels(platform="cpu") == 0


@pytest.mark.parametrize(
    "otherwise", [{"dtype": jnp.float32}, {"length": T + 8}, {"start": None}], ids=str
)
def test_what_splash_cannot_do_goes_to_blockwise(otherwise):
    assert tpu_kernels(**otherwise) == 0


def test_pieces_are_documents_or_their_chunks():
    tokens = Tokens(jnp.array([[0, 1, 2, 3, 0, 1, 0, 0]]), jnp.array([[1, 1, 1, 1, 2, 2, 0, 0]]))
    assert kernels._pieces(tokens, 0).tolist() == [[0, 0, 0, 0, 1, 1, 2, 2]]
    assert kernels._pieces(tokens, 2).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
