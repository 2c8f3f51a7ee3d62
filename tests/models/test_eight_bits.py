"""Products of 8-bit numbers against NumPy, whole tensors against split ones, what stays wide."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import PartitionSpec as P

from puna.configs.schema import MeshConfig, ModelConfig
from puna.models import eight_bits
from puna.models.kernels import experts
from puna.models.kernels.experts import grouped_matmul
from puna.models.layers import contract
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, abstract_params

B, T, N, H, D = 4, 8, 4, 8, 16
KINDS = tuple(eight_bits.FORMATS)
# What NumPy rounds to, and the largest number of it.
NUMPY = {
    ("float8", "forward"): (ml_dtypes.float8_e4m3fn, 448.0),
    ("float8", "backward"): (ml_dtypes.float8_e5m2, 57344.0),
    ("int8", "forward"): (np.int8, 127.0),
    ("int8", "backward"): (np.int8, 127.0),
}


def normal(seed, *shape):
    """Rows of very different sizes, one of them zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, np.float32) * 10.0 ** rng.integers(-6, 6, (*shape[:-1], 1))
    x.reshape(-1, shape[-1])[0] = 0
    return x.astype(np.float32)


def rounded(x, dims, kind, way):
    """The oracle: x as 8 bits hold it, in float64."""
    dtype, most = NUMPY[kind, way]
    scale = np.abs(x).max(dims, keepdims=True) * np.float32(1 / most)
    values = x / np.where(scale > 0, scale, np.float32(1))
    values = np.rint(values) if dtype == np.int8 else values
    return values.astype(dtype).astype(np.float64) * scale


def bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def near(actual, a, b, spec, relative=3e-7):
    """Whether it is the einsum of a and b, but for float32's roundings of its terms."""
    terms = np.einsum(spec, np.abs(a), np.abs(b))
    assert (
        np.abs(np.asarray(actual, np.float64) - np.einsum(spec, a, b)) <= relative * terms
    ).all()


@pytest.fixture(scope="module", params=KINDS)
def product(request):
    """(kind, arrays, y, dx, dw): a product that sums over two dims, and its gradients."""
    kind = request.param
    x_BTNH, w_NHD, g_BTD = normal(0, B, T, N, H), normal(1, N, H, D), normal(2, B, T, D)
    arrays = x_BTNH, w_NHD, g_BTD
    return kind, arrays, jax.jit(functools.partial(both_ways, kind))(*arrays)


def both_ways(kind, x_BTNH, w_NHD, g_BTD):
    y_BTD, pull = jax.vjp(
        lambda x, w: contract("BTNH,NHD->BTD", x, w, kind, "float32"), x_BTNH, w_NHD
    )
    return y_BTD, *pull(g_BTD)


def test_the_product_and_both_gradients_are_those_of_rounded_numbers(product):
    kind, (x_BTNH, w_NHD, g_BTD), (y_BTD, dx_BTNH, dw_NHD) = product
    x8, w8 = rounded(x_BTNH, (2, 3), kind, "forward"), rounded(w_NHD, (0, 1), kind, "forward")
    near(y_BTD, x8, w8, "BTNH,NHD->BTD")
    g8, w8 = rounded(g_BTD, (2,), kind, "backward"), rounded(w_NHD, (2,), kind, "forward")
    near(dx_BTNH, g8, w8, "BTD,NHD->BTNH")
    near(dw_NHD, bfloat16(x_BTNH), bfloat16(g_BTD), "BTNH,BTD->NHD")
    assert dw_NHD.dtype == jnp.float32
    assert contract("BTNH,NHD->BTD", x_BTNH, w_NHD, kind).dtype == jnp.bfloat16


def test_scales_are_of_whole_rows_on_a_mesh(product):
    kind, arrays, alone = product
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = P(("data", "fsdp"), None, "tensor"), P("tensor", None, "fsdp"), P(("data", "fsdp"))
    places = [jax.NamedSharding(mesh, spec) for spec in split]
    with jax.set_mesh(mesh):
        on_mesh = jax.jit(functools.partial(both_ways, kind), in_shardings=places)(*arrays)
    for one, several in zip(alone, on_mesh, strict=True):
        close = np.abs(one).max(axis=-1, keepdims=True) * 1e-6  # sums in another order
        assert (np.abs(one - several) <= close).all()


@pytest.mark.parametrize("kind", KINDS)
def test_experts_multiply_as_their_weights_would_alone(kind):
    E, sizes_E = 3, np.array([5, 0, 9])
    x_MD, w_EDF, g_MF = normal(3, 16, D), normal(4, E, D, H), normal(5, 16, H)
    x_MD[14:] = np.nan  # past the last group
    # Activations are bfloat16 to begin with.
    x_MD, g_MF = (x.astype(ml_dtypes.bfloat16) for x in (x_MD, g_MF))

    @jax.jit
    def grouped(x_MD, w_EDF, g_MF):
        f = functools.partial(grouped_matmul, group_sizes_E=jnp.asarray(sizes_E), dtype=kind)
        y_MF, pull = jax.vjp(f, x_MD, w_EDF)
        return y_MF, *pull(g_MF)

    @jax.jit
    def alone(x_MD, w_DF, g_MF):
        y_MF, pull = jax.vjp(lambda x, w: contract("MD,DF->MF", x, w, kind), x_MD, w_DF)
        return y_MF, *pull(g_MF)

    y_MF, dx_MD, dw_EDF = grouped(x_MD, w_EDF, g_MF)
    assert y_MF.dtype == dx_MD.dtype == jnp.bfloat16
    for e, (start, end) in enumerate(itertools.pairwise([0, *np.cumsum(sizes_E)])):
        rows = slice(start, end)
        if start == end:
            assert not np.asarray(dw_EDF[e]).any()
            continue
        wanted = alone(x_MD[rows], w_EDF[e], g_MF[rows])
        for got, want in zip((y_MF[rows], dx_MD[rows], dw_EDF[e]), wanted, strict=True):
            # The same sums in another order, rounded once more.
            got, want = (np.asarray(x, np.float64) for x in (got, want))
            most = np.abs(want).max(-1, keepdims=True)
            assert (np.abs(got - want) <= 2.0**-8 * np.abs(want) + 1e-6 * most).all()
    assert not np.asarray(y_MF[14:], np.float32).any()


def test_experts_whose_width_is_split_have_scales_of_all_of_it():
    kinds = eight_bits.FORMATS["int8"]
    x_MF, w_EFD, sizes_E = normal(6, 16, N * H), normal(7, 2, N * H, D), jnp.array([7, 9])

    def times(axis, x_MF, w_EFD):
        y_MD = experts._times_scaled(x_MF, w_EFD, sizes_E, 8, (kinds[0],) * 2, axis, False)
        return y_MD if axis is None else jax.lax.psum(y_MD, axis)

    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=4))
    specs = P(None, "tensor"), P(None, "tensor", None)
    with jax.set_mesh(mesh):
        split = jax.jit(
            sharding.per_device(functools.partial(times, "tensor"), specs, P(None, None))
        )(x_MF, w_EFD)
    whole = np.asarray(jax.jit(functools.partial(times, None))(x_MF, w_EFD))
    assert (np.abs(split - whole) <= 1e-6 * np.abs(whole).max(-1, keepdims=True)).all()


def test_what_is_not_a_number_stays_so():
    x_MD = jnp.ones((3, D)).at[0, 1].set(jnp.nan).at[1, 2].set(jnp.inf)
    for kind in KINDS:
        y_MF = contract("MD,DF->MF", x_MD, jnp.ones((D, H)), kind)
        assert not np.isfinite(y_MF[:2]).any() and np.isfinite(y_MF[2]).all()


def dots(jaxpr):
    """The dtypes of the operands of every product of a program, loops included once."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(sorted({v.aval.dtype.name for v in equation.invars}))
        for inner in core.jaxprs_in_params(equation.params):
            yield from dots(inner)


def test_only_the_large_products_of_layers_are_in_8_bits():
    config = ModelConfig(
        vocab_size=32, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_dim=24, moe_interval=2, num_experts=2, expert_dim=24, compute_dtype="float8",
    )  # fmt: skip
    params = sharding.unbox(abstract_params(config))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}

    def logits(params, tokens_BT):
        return Transformer(config).apply({"params": params}, tokens_BT).logits_BTV

    tokens_BT = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    found = list(dots(jax.make_jaxpr(logits)(params, tokens_BT).jaxpr))
    # Two layers of attention (4), an MLP, a shared expert and the routed ones (3 each).
    assert found.count(("float8_e4m3fn",)) == 2 * 4 + 3 * 3
    # Attention and the output head; the router.
    assert {*found} == {("float8_e4m3fn",), ("bfloat16",), ("float32",)}
