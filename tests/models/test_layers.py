"""Small layers: what their gradients must not lose."""

import jax
import jax.numpy as jnp
import numpy as np

from puna.models.layers import look_up


def test_thousands_of_equal_tokens_add_up_in_bfloat16_too():
    rng = np.random.default_rng(0)
    table_VD = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    tokens_BT = jnp.where(jnp.arange(5000) % 5 == 1, 4, 2)[None]
    g_BTD = jnp.asarray(rng.uniform(0.9, 1.1, (1, 5000, 3)), jnp.bfloat16)
    rows_BTD, pull = jax.vjp(lambda t: look_up(t, tokens_BT, "bfloat16"), table_VD)
    np.testing.assert_array_equal(rows_BTD, table_VD.astype(jnp.bfloat16)[tokens_BT])
    (d_VD,) = pull(g_BTD)
    want = np.zeros((5, 3))
    np.add.at(want, np.asarray(tokens_BT[0]), np.asarray(g_BTD[0], np.float64))
    assert d_VD.dtype == jnp.float32
    np.testing.assert_allclose(d_VD, want, rtol=1e-5)


def test_an_id_outside_the_table_is_nan_and_has_no_gradient():
    table_VD = jnp.ones((4, 2))
    rows_BTD, pull = jax.vjp(lambda t: look_up(t, jnp.array([[1, 4]]), "float32"), table_VD)
    assert np.isnan(rows_BTD[0, 1]).all() and np.isfinite(rows_BTD[0, 0]).all()
    np.testing.assert_array_equal(pull(jnp.ones((1, 2, 2)))[0][:, 0], [0, 1, 0, 0])
