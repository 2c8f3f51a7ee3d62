"""Weights turned round: the same products, the same texts, and one copy of the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs.schema import AdapterConfig, MeshConfig, ModelConfig
from puna.models import adapters, bits
from puna.models.decode import engine
from puna.models.layers import contract
from puna.models.leaf import dense
from puna.models.parallel import sharding
from puna.models.quantize import quantize_tree
from puna.models.transformer import Transformer, abstract_params, init_params
from puna.models.turned import Turned, turn

SMALL = ModelConfig(
    vocab_size=80, embed_dim=24, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8,
    mlp_dim=40, max_positions=64, rope_theta=100.0, nope_interval=2, chunk_size=6, qk_norm=True,
    compute_dtype="float32",
)  # fmt: skip
CONFIGS = {
    "dense": SMALL,
    "tied": dataclasses.replace(SMALL, tie_embeddings=True, nope_interval=0, chunk_size=0),
    "experts": dataclasses.replace(
        SMALL, num_layers=2, moe_interval=2, num_experts=4, experts_per_token=1, expert_dim=16
    ),
}
SPECS = {
    "BTD,DF->BTF": ((24, 40), ("embed", "mlp")),
    "BTF,FD->BTD": ((40, 24), ("mlp", "embed")),
    "BTD,DNH->BTNH": ((24, 6, 8), ("embed", "heads", "head_dim")),
    "BTNH,NHD->BTD": ((6, 8, 24), ("heads", "head_dim", "embed")),
}


def on_one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def drawn(config, key=0):
    return init_params(config, jax.random.key(key), on_one_device())


def changed(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Turned))
    return [x for x in leaves if isinstance(x, Turned)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_products_are_those_of_the_weight(spec, kind):
    shape, names = SPECS[spec]
    boxed = {"blocks": sharding.Param(jax.ShapeDtypeStruct(shape, jnp.float32), names)}
    rng = np.random.default_rng(1)
    dtype = jnp.float32 if kind == "int8" else jnp.dtype(kind)
    weight = rng.normal(size=shape).astype(dtype)
    held = {"blocks": jax.device_put(weight, jax.devices()[0])}
    if kind == "int8":
        held = quantize_tree(held, boxed)
    plain = jax.tree.map(jnp.copy, held)["blocks"]
    left = spec.split(",")[0]
    turned = turn(held, boxed, 1)["blocks"]
    assert isinstance(turned, Turned)
    assert turned.shape == plain.shape == shape
    np.testing.assert_array_equal(dense(turned), dense(plain))
    xs = []
    for rows in ((1, 1), (1, 3), (2, 1)):
        x = rng.normal(size=(*rows, *shape[: len(left) - 2])).astype(np.float32)
        x[..., 0] = -0.0
        xs.append(x)

    @jax.jit
    def products(weight, xs):
        """Of each input in each dtype, and the gradients of their sums."""

        def product(x, compute):
            return contract(spec, x, weight, compute, "float32")

        of_x = jax.grad(lambda x, compute: product(x, compute).sum())
        return [f(x, c) for f in (product, of_x) for x in xs for c in ("float32", "bfloat16")]

    for found, wanted in zip(products(turned, xs), products(plain, xs), strict=True):
        # Sums of the same products in another order.
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


CASES = [("dense", "int8"), ("dense", ""), ("tied", ""), ("experts", "")] + [
    ("dense", kind) for kind in ("int4", "adapter", "bfloat16")
]


@pytest.mark.parametrize(
    "name,kind", [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])]
)
def test_texts_are_those_of_the_model(name, kind):
    config = CONFIGS[name]
    boxed = abstract_params(config)
    params = drawn(config)
    if kind == "bfloat16":
        config = dataclasses.replace(config, compute_dtype="bfloat16")
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    elif kind == "adapter":
        adapter = AdapterConfig(rank=2, alpha=4.0)
        names = adapters.box(boxed, adapter)
        new = adapters.init(names, jax.random.key(3), on_one_device())
        params = adapters.attach(jax.tree.map(lambda x: x + 0.1, new), params)
    elif kind:
        params = quantize_tree(params, boxed, kind)
    model = Transformer(config)
    prompt = [[5, 9, 11, 3, 5, 9, 1, 2, 60, 7]]

    def text(params):
        blocks = list(engine.decode(model, params, prompt, 20))
        return [np.concatenate(x, 1) for x in zip(*blocks, strict=True)]

    ids, logprobs, _ = text(params)
    old = jax.tree.leaves(params)
    turned = turn(params, boxed, 1)
    assert changed(turned["unembed" if kind == "int4" else "blocks"])
    assert kind != "int4" or not changed(turned["blocks"])  # groups of 4 bits stay as they are
    assert sum(x.is_deleted() for x in old) == len(jax.tree.leaves(changed(turned)))
    assert sum(x.nbytes for x in jax.tree.leaves(turned)) == sum(x.nbytes for x in old)
    found_ids, found, _ = text(turned)
    np.testing.assert_array_equal(found_ids, ids)
    np.testing.assert_allclose(found, logprobs, atol=0.02 if kind == "bfloat16" else 1e-5)
    assert jax.tree.structure(turn(turned, boxed, 1)) == jax.tree.structure(turned)


def test_only_one_row_on_one_device():
    boxed = abstract_params(SMALL)
    params = drawn(SMALL)
    assert turn(params, boxed, 2) is params
    everywhere = sharding.make_mesh(MeshConfig(fsdp=8, data=1))
    abroad = jax.device_put(params, sharding.shardings(boxed, everywhere))
    assert turn(abroad, boxed, 1) is abroad
    # Experts, routers, norms and tables lie as they were.
    config = CONFIGS["experts"]
    turned = turn(drawn(config), abstract_params(config), 1)
    layer = turned["blocks"]["layer_1"]
    assert not changed(layer["moe"] | {"shared": {}})
    assert len(changed(layer["moe"]["shared"])) == 3
    assert len(changed(layer["attention"])) == 4
    assert isinstance(turned["unembed"]["table_DV"], Turned)
    assert not changed(turned["embed"])
    packed = bits.view(turned)
    assert jax.tree.structure(packed) == jax.tree.structure(turned)
