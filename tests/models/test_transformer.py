"""What the model gives, and what is not computed where it is not asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs import schema
from puna.models.decode import engine
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, _init, abstract_params, init_params, unembed
from puna.train import objectives
from puna.train.optimizer import make_optimizer
from puna.train.state import abstract_state
from puna.train.step import make_train_step
from puna.train.validation import _row_sums

V = 89  # no other dim has it


def config(tied=False, **train):
    model = {
        "vocab_size": V, "embed_dim": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
        "head_dim": 4, "mlp_dim": 12, "tie_embeddings": tied,
    }  # fmt: skip
    train = {"batch_size": 2, "loss_chunk": 8} | train
    return schema.from_dict({"model": model, "data": {"seq_len": 16}, "train": train})


def logits_in(jaxpr, tokens: int) -> bool:
    """Whether a program computes logits of as many tokens, those of programs in it included."""
    for eqn in jaxpr.eqns:
        for shape in (v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape")):
            if len(shape) == 3 and shape[-1] == V and shape[0] * shape[1] == tokens:
                return True
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        for x in (getattr(x, "jaxpr", x) for x in inner):
            if hasattr(x, "eqns") and logits_in(x, tokens):
                return True
    return False


def abstract(c):
    return sharding.unbox(abstract_params(c.model))


def test_parameters_are_traced_once_and_given_anew():
    c = config().model
    mesh = sharding.make_mesh(schema.MeshConfig(data=4, fsdp=2))
    with jax.set_mesh(mesh):
        first, second = abstract_params(c), abstract_params(c)
        fresh = jax.eval_shape(lambda key: _init(c, key), jax.random.key(0))
    assert jax.tree.structure(first) == jax.tree.structure(fresh)
    for a, b, new in zip(*map(jax.tree.leaves, (first, second, fresh)), strict=True):
        assert a is b and a == new and a.sharding == new.sharding
    # What one caller does to its dicts is not what the next one gets.
    del first["embed"]
    assert "embed" in second and "embed" in abstract_params(c)


@pytest.mark.parametrize("tied", [False, True])
def test_training_and_prefill_ask_for_no_logits(tied):
    c = config(tied)
    model, mesh = Transformer(c.model), sharding.make_mesh(c.mesh, jax.devices()[:1])
    tokens_BT = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    forward = jax.make_jaxpr(model.apply)({"params": abstract(c)}, tokens_BT)
    assert logits_in(forward.jaxpr, 32)  # what this test looks for can be found

    tx, objective = make_optimizer(c, abstract_params(c.model)), objectives.make(c, np.ones(V))
    state = abstract_state(c, tx, mesh)
    step = make_train_step(c, model, tx, objective, state)
    batch = objective.abstract_batch(c, mesh)
    assert not logits_in(jax.make_jaxpr(step)(state, batch).jaxpr, 32)
    prefill = jax.make_jaxpr(engine._prefill, static_argnums=(0, 1))(
        model, 32, abstract(c), None, tokens_BT, tokens_BT, None
    )
    assert not logits_in(prefill.jaxpr, 32)
    batch = {name: jax.ShapeDtypeStruct((128, 16), x.dtype) for name, x in batch.items()}
    validation = jax.make_jaxpr(_row_sums, static_argnums=(0, 1))(
        objective, model, abstract(c), {}, batch
    )
    assert not logits_in(validation.jaxpr, 128 * 16)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_part_of_every_output(tied):
    """Plain, under jit, vmap and grad, and of shapes alone; from the states they are the same."""
    c = config(tied).model
    model = Transformer(c)
    params = init_params(c, jax.random.key(0), sharding.make_mesh(schema.MeshConfig()))
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 5), 0, V)

    def logits(params, tokens_BT):
        return model.apply({"params": params}, tokens_BT).logits_BTV

    whole = jax.jit(logits)(params, tokens_BT)
    assert whole.dtype == jnp.float32 and whole.shape == (2, 5, V)
    shape = jax.eval_shape(model.apply, {"params": params}, tokens_BT).logits_BTV
    assert (shape.dtype, shape.shape) == (whole.dtype, whole.shape)
    returned = jax.jit(model.apply)({"params": params}, tokens_BT)
    np.testing.assert_array_equal(returned.logits_BTV, whole)
    each = jax.jit(jax.vmap(lambda p, t: model.apply({"params": p}, t[None]), (None, 0)))(
        params, tokens_BT
    )
    np.testing.assert_allclose(each.logits_BTV[:, 0], whole, atol=0.05)
    states = jax.jit(lambda p, t: model.apply({"params": p}, t, method="states"))(params, tokens_BT)
    np.testing.assert_array_equal(unembed(c, params, states.hidden_BTD), whole)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(logits(p, tokens_BT) ** 2)))(params)
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))


def test_remat_computes_as_much_again_as_its_name_says():
    """Products with weights are kept by "dots", which repeats attention; "full" repeats all."""

    def products(remat):
        model = dataclasses.replace(config().model, remat=remat)
        params = sharding.unbox(abstract_params(model))
        tokens = jax.ShapeDtypeStruct((1, 16), "int32")

        def total(params, tokens):
            return Transformer(model).apply({"params": params}, tokens).logits_BTV.sum()

        return str(jax.make_jaxpr(jax.grad(total))(params, tokens)).count("dot_general")

    none, dots, full = map(products, ("none", "dots", "full"))
    assert none <= dots < full
    # Of the seven products with weights in a layer the last is of no use to its own gradient.
    assert full - dots == 6
