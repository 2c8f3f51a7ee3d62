"""Blockwise attention against the plain formula in float64, causality, isolation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.configs.schema import ModelConfig
from puna.models import attention
from puna.models.kernels import blockwise
from puna.models.masks import Tokens

B, T, N, H = 2, 41, 4, 8


def oracle(q, k, v, d_out, q_tokens, k_tokens, chunk_size):
    """Output and gradients by the formula, one head at a time, in float64."""
    out, dq = np.zeros(q.shape), np.zeros(q.shape)
    dk, dv = np.zeros(k.shape), np.zeros(v.shape)
    for b in range(q.shape[0]):
        qp, qs = (np.asarray(x)[b][:, None] for x in (q_tokens.positions_BT, q_tokens.segments_BT))
        kp, ks = (np.asarray(x)[b][None, :] for x in (k_tokens.positions_BT, k_tokens.segments_BT))
        seen = (qs == ks) & (qs > 0) & (kp <= qp)
        if chunk_size:
            seen &= qp // chunk_size == kp // chunk_size
        for n in range(N):
            m = n // (N // k.shape[2])
            s = q[b, :, n] @ k[b, :, m].T / np.sqrt(H)
            e = np.where(seen, np.exp(np.where(seen, s, 0.0)), 0.0)
            p = e / np.maximum(e.sum(1, keepdims=True), 1e-300)
            out[b, :, n] = p @ v[b, :, m]
            dp = d_out[b, :, n] @ v[b, :, m].T
            ds = p * (dp - (p * dp).sum(1, keepdims=True)) / np.sqrt(H)
            dq[b, :, n] = ds @ k[b, :, m]
            dk[b, :, m] += ds.T @ q[b, :, n]
            dv[b, :, m] += p.T @ d_out[b, :, n]
    return out, dq, dk, dv


def arrays(rng, K, S=T):
    return tuple(
        rng.normal(size=shape).astype(np.float32)
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    )


def packed(rows, length=T):
    """Tokens of rows packed from documents of these lengths; the rest is padding."""
    positions, segments = np.zeros((2, len(rows), length), np.int32)
    for b, lengths in enumerate(rows):
        at = 0
        for i, n in enumerate(lengths):
            n = min(n, length - at)
            positions[b, at : at + n] = np.arange(n)
            segments[b, at : at + n] = i + 1
            at += n
    return Tokens(jnp.array(positions), jnp.array(segments))


@functools.cache
def jitted(chunk_size, start, block):
    """Output and gradients of `attend`, compiled with its blocks made this small; 0 = one block."""

    def run(q, k, v, d_out, q_tokens, k_tokens):
        def f(q, k, v):
            return blockwise.attend(q, k, v, q_tokens, k_tokens, chunk_size=chunk_size, start=start)

        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(d_out)

    def compiled(*args):
        with pytest.MonkeyPatch.context() as patch:
            if block:
                patch.setattr(blockwise, "_ONE_BLOCK", 0)
                patch.setattr(blockwise, "_BLOCK", block)
            return jit(*args)

    jit = jax.jit(run)
    return compiled


def check(got, want):
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert np.all(np.isfinite(x)), name
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5, err_msg=name)


documents = st.lists(st.lists(st.integers(1, T), max_size=6), min_size=B, max_size=B)


@pytest.mark.parametrize(
    "chunk_size, K, block",
    [(0, 2, 16), (7, 2, 16), (24, 4, 16), (16, 1, 16), (7, 2, 0)],
)
@given(documents, st.integers(0, 2**31))
def test_blocks_give_what_the_formula_gives(chunk_size, K, block, rows, seed):
    args = arrays(np.random.default_rng(seed), K)
    tokens = packed(rows)
    got = jitted(chunk_size, 0, block)(*args, tokens, tokens)
    check(got, oracle(*(x.astype(np.float64) for x in args), tokens, tokens, chunk_size))


@pytest.mark.parametrize("chunk_size", [0, 5])
def test_keys_in_any_order(chunk_size):
    """Keys of a cache: more than the queries, some slots empty, in no order."""
    rng, S = np.random.default_rng(3), 70
    args = arrays(rng, 2, S)
    positions = np.stack([rng.permutation(S) for _ in range(B)]).astype(np.int32)
    k_tokens = Tokens(jnp.array(positions), jnp.array(rng.integers(0, 2, (B, S), np.int32)))
    q_tokens = Tokens(jnp.array(rng.integers(0, S, (B, T), np.int32)), jnp.ones((B, T), np.int32))
    got = jitted(chunk_size, None, 16)(*args, q_tokens, k_tokens)
    exact = (x.astype(np.float64) for x in args)
    check(got, oracle(*exact, q_tokens, k_tokens, chunk_size))


@pytest.mark.parametrize("block", [0, 16])
def test_large_scores_do_not_overflow(block):
    q, k, v, d_out = arrays(np.random.default_rng(4), 2)
    tokens = packed([[T], [9, 30]])
    out, *gradients = jitted(7, 0, block)(q * 1e3, k * 1e3, v, d_out, tokens, tokens)
    assert all(np.all(np.isfinite(x)) for x in (out, *gradients))
    assert np.abs(out).max() <= np.abs(v).max() * 1.001


@pytest.mark.parametrize("block", [0, 16])
def test_padding_gives_zeros_and_gets_none(block):
    args = arrays(np.random.default_rng(5), 2)
    tokens = packed([[20], []])
    out, dq, dk, dv = jitted(7, 0, block)(*args, tokens, tokens)
    padding = np.asarray(tokens.segments_BT) == 0
    for x in (out, dq, dk, dv):
        assert np.all(np.asarray(x)[padding] == 0.0)
        assert np.any(np.asarray(x)[~padding] != 0.0)


@pytest.mark.parametrize("chunk_size", [0, 7])
def test_no_gradient_flows_to_later_keys(chunk_size):
    q, k, v, _ = arrays(np.random.default_rng(6), 2)
    tokens = packed([[T], [T]])
    run = jitted(chunk_size, 0, 16)
    t, s = np.arange(T)[:, None], np.arange(T)[None, :]
    allowed = s <= t
    if chunk_size:
        allowed &= s // chunk_size == t // chunk_size
    reached = np.zeros((3, T, T))
    for i in range(T):
        d_out = np.zeros((B, T, N, H), np.float32)
        d_out[:, i] = 1.0
        for kind, x in enumerate(run(q, k, v, d_out, tokens, tokens)[1:]):
            reached[kind, i] = np.abs(x).max((0, 2, 3))
    dq, dk, dv = reached
    assert np.all(dk[~allowed] == 0.0) and np.all(dv[~allowed] == 0.0)
    assert np.all(dq[~np.eye(T, dtype=bool)] == 0.0)
    assert np.all(dv[allowed] > 0.0)
    # A query that sees one key gives it all its weight, whatever the score.
    assert np.all(dk[allowed & (allowed.sum(1, keepdims=True) > 1)] > 0.0)


@pytest.mark.parametrize("block", [0, 16])
def test_documents_of_a_row_do_not_touch(block):
    args = arrays(np.random.default_rng(7), 2)
    tokens = packed([[19, 22], [19, 9, 13]])
    run = jitted(7, 0, block)
    other = [x.copy() for x in args]
    for x in other:
        x[:, 19:] = np.random.default_rng(8).normal(size=x[:, 19:].shape)
    for x, y in zip(run(*args, tokens, tokens), run(*other, tokens, tokens), strict=True):
        np.testing.assert_array_equal(x[:, :19], y[:, :19])
        assert np.any(x[:, 19:] != y[:, 19:])


def test_bfloat16_is_close_and_stays_bfloat16():
    args = tuple(jnp.array(x, jnp.bfloat16) for x in arrays(np.random.default_rng(9), 2))
    tokens = packed([[T], [12, 20]])
    got = jitted(7, 0, 16)(*args, tokens, tokens)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    want = oracle(*(np.asarray(x, np.float64) for x in args), tokens, tokens, 7)
    for x, y in zip(got, want, strict=True):
        assert np.abs(np.asarray(x, np.float64) - y).max() < 0.02 * np.abs(y).max()


def test_temperature_grows_by_the_logarithm_of_whole_steps():
    config = ModelConfig(temperature_scale=0.1, temperature_floor=8192)
    positions = np.array([0, 1, 8190, 8191, 8192, 16383, 1_000_000, 10_485_759])
    want = 1 + 0.1 * np.log(1 + np.floor((positions + 1) / 8192))
    got = attention.temperature(jnp.array(positions), config)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.all(np.asarray(got)[:3] == 1.0)
